"""A denoiser whose magnitudes and gradients can be worked out on paper.

The network puts out, for an image x with mean m(x), the 4 numbers

    o = (1 + gain * m(x)) * sum_n w_n r_n                  (r_n row n of the conditioning, 4 wide)

as an image [1, 2, 2]. Hence for two conditionings with d = sum_n w_n (c_n - u_n), g = 1 + gain * m(x):
the magnitude is k * |g| * ||d||, its gradient at row n is k * |g| * w_n * d / ||d||, and the norm of
that is k * |g| * |w_n|. A conditioning with an attention rule gives sum_n f_n w_n r_n over the rows kept, and the
attention that row n gets is |r_n| / sum |r_m|. k is 1 for epsilon and flow and 1 / sqrt(1 + sigma^2) for v, whose noise
prediction is eps = alpha * v + ... with alpha = 1 / sqrt(1 + sigma^2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sd_dejavu.core.conditioning import Conditioning, EncoderInput, Reencoding, TokenRow, Word, split_words
from sd_dejavu.core.denoiser import PredictionType, denoised_from_output, seeded_noise

SHAPE = (1, 2, 2)


class LinearDenoiser:
    """``calls`` holds the batch size and the conditioning of each call."""

    name = "hand-made"
    fingerprint = "hand-made"
    text_encoder = ""
    patches = ""
    latent_shape = SHAPE

    def __init__(
        self, weights: Sequence[float] | None = None, prediction_type: PredictionType = "epsilon", gain: float = 0.0
    ) -> None:
        self.weights, self.prediction_type, self.gain = weights, prediction_type, gain
        self.calls: list[tuple[int, Conditioning]] = []
        self.differentiable_opened = 0

    def output(self, x: Tensor, rows: Tensor) -> Tensor:
        weights = torch.ones(rows.shape[1]) if self.weights is None else torch.tensor(self.weights[: rows.shape[1]])
        image = torch.einsum("n,bnd->bd", weights, rows.float()).reshape(-1, *SHAPE)
        return (1 + self.gain * x.mean(dim=(1, 2, 3), keepdim=True)) * image

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        self.calls.append((x.shape[0], conditioning))
        rows, rule = conditioning.rows, conditioning.attention
        if rule is not None:
            rows = rows * (rule.factors * rule.keep)[:, None]
        return denoised_from_output(self.output(x, rows), x, sigma, self.prediction_type)

    # The rest of a Model.
    def encode(self, prompt: str) -> Conditioning:
        return encoder({})(prompt)

    def sigmas(self, steps: int) -> list[float]:
        return [float(n) for n in range(steps, -1, -1)]

    def noise(self, seed: int, images: int) -> Tensor:
        return seeded_noise(SHAPE, seed, images)

    def decode(self, latents: Tensor) -> Tensor:
        return self.images_of(latents)

    def images_of(self, latents: Tensor) -> Tensor:
        return latents.expand(-1, 3, -1, -1)

    def attention_mass(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        mass = conditioning.rows.norm(dim=2)
        return (mass / mass.sum()).expand(x.shape[0], -1)

    @contextmanager
    def differentiable(self, checkpointing: bool = False) -> Iterator[None]:
        self.differentiable_opened += 1
        yield


def v_scale(prediction_type: PredictionType, sigma: float) -> float:
    """k of the module's docstring."""
    return (1 + sigma**2) ** -0.5 if prediction_type == "v_prediction" else 1.0


def word_rows(words: Sequence[Word]) -> tuple[TokenRow, ...]:
    """A start row, one row a word, an end row."""
    middle = [TokenRow(word.text, "word", number) for number, word in enumerate(words)]
    return (TokenRow("<s>", "start"), *middle, TokenRow("</s>", "end"))


def encoder(strengths: dict[str, float], reencodes: bool = True) -> Callable[[str], Conditioning]:
    """A prompt's word of strength s gives the row s * (1, 1, 1, 1); unknown words, start and end give 0.

    Under :class:`LinearDenoiser` with weights of 1 the magnitude against the empty prompt is then
    2 * sum of s, as the norm of (1, 1, 1, 1) is 2. The input embedding of each token is (1, 1, 1, 1) and
    the encoder multiplies it by s, so the gradient there has the norm |s|.
    """

    def encode(prompt: str) -> Conditioning:
        words = split_words(prompt)
        tokens = word_rows(words)
        values = torch.tensor([0.0, *(strengths.get(w.text, 0.0) for w in words), 0.0])[None, :, None]
        embeddings = torch.ones(len(tokens), 4)
        way = Reencoding((EncoderInput(embeddings, tokens),), lambda given: (values * given[0], {}))
        return Conditioning(values.expand(1, -1, 4).clone(), {}, prompt, words, tokens, way if reencodes else None)

    return encode
