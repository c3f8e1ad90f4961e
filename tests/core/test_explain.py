"""Word significance against gradients worked out on paper (see hand_made)."""

from __future__ import annotations

import pytest
import torch
from hand_made import LinearDenoiser, encoder, v_scale, word_rows
from torch import Tensor

from sd_dejavu.core.conditioning import Conditioning, EncoderInput, Reencoding, TokenRow, split_words
from sd_dejavu.core.denoiser import initial_latent, seeded_noise
from sd_dejavu.core.sampling import levels_of
from sd_dejavu.explain import confirmed_gradient, explanation, input_gradient, leave_one_out, output_gradient
from sd_dejavu.explain.leave_one_out import drop_word
from sd_dejavu.explain.views import default_view
from sd_dejavu.explain.views import explain as explain_by_view
from sd_dejavu.run.measure import Measurement

SIGMA = 2.0
WEIGHTS = (4.0, 1.0, -2.0, 0.5, 3.0, 5.0)
WORDS = split_words("red fox asleep")
# Two chunks: 'fox' ends the first in one token and 'asleep' is two tokens, one in each chunk.
CHUNKS = (
    TokenRow("<s>", "start"),
    TokenRow("red", "word", 0),
    TokenRow("fox", "word", 1),
    TokenRow("as", "word", 2),
    TokenRow("leep", "word", 2),
    TokenRow("</s>", "end"),
)


def at(images: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return seeded_noise((1, 2, 2), seed, images), torch.full((images,), SIGMA)


def base(denoiser: LinearDenoiser, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The prediction with rows of zeros: the output is then 0 at any noise."""
    return denoiser(x, sigma, Conditioning(torch.zeros(1, 6, 4)))


def gains(denoiser: LinearDenoiser, x: torch.Tensor) -> torch.Tensor:
    return (1 + denoiser.gain * x.mean(dim=(1, 2, 3))).abs()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_gradient_at_an_output_row_is_its_weight(prediction_type, dtype) -> None:
    denoiser = LinearDenoiser(WEIGHTS, prediction_type, gain=0.5)
    (x, sigma), prompt = at(3), Conditioning(seeded_noise((6, 4), 1, 1).to(dtype), words=WORDS, tokens=CHUNKS)
    norms = output_gradient.row_gradient_norms(denoiser, x, sigma, prompt, base(denoiser, x, sigma))
    # L is the mean of the per-image norms, each k g ||d||; all gradients at a row point along d.
    scale = v_scale(prediction_type, SIGMA) * float(gains(denoiser, x).mean())
    assert norms.tolist() == pytest.approx([scale * abs(w) for w in WEIGHTS], rel=1e-4)
    found = output_gradient.explain(denoiser, x, sigma, prompt, base(denoiser, x, sigma))
    assert found.view == "output gradient"
    assert [w.raw for w in found.words] == pytest.approx([scale * s for s in (1, 2, 0.5 + 3)], rel=1e-4)
    assert [w.significance for w in found.words] == pytest.approx([1 / 3.5, 2 / 3.5, 1], rel=1e-4)
    assert found.top.text == "asleep"


def test_several_chunks_leave_every_start_and_end_row_out() -> None:
    tokens = (
        TokenRow("<s>", "start"),
        TokenRow("red", "word", 0),
        TokenRow("</s>", "end"),
        TokenRow("<s>", "start"),
        TokenRow("fox", "word", 1),
        TokenRow("</s>", "end"),
    )
    denoiser, (x, sigma) = LinearDenoiser((9.0, 1.0, 9.0, 9.0, 2.0, 9.0)), at(1)
    prompt = Conditioning(seeded_noise((6, 4), 1, 1), words=split_words("red fox"), tokens=tokens)
    found = output_gradient.explain(denoiser, x, sigma, prompt, base(denoiser, x, sigma))
    assert [w.raw for w in found.words] == pytest.approx([1, 2], rel=1e-4)


def test_four_equal_images_give_the_significance_of_one() -> None:
    # One norm over the whole batch, as in the reference code, would give twice as much.
    denoiser, prompt = LinearDenoiser(WEIGHTS, gain=0.5), Conditioning(seeded_noise((6, 4), 1, 1))
    x, sigma = at(1)
    four, sigmas = x.repeat(4, 1, 1, 1), sigma.repeat(4)
    one = output_gradient.row_gradient_norms(denoiser, x, sigma, prompt, base(denoiser, x, sigma))
    same = output_gradient.row_gradient_norms(denoiser, four, sigmas, prompt, base(denoiser, four, sigmas))
    torch.testing.assert_close(same, one)


def two_encoders() -> tuple[Conditioning, torch.Tensor]:
    """Each encoder gives half the width and mixes tokens: rows = T_k e_k. Returns T [2, 6, 6] as well."""
    mixing = torch.tril(seeded_noise((6, 6), 5, 2))  # causal, as a text encoder
    inputs = [seeded_noise((6, 2), seed, 1)[0] for seed in (6, 7)]
    others = (
        TokenRow("<s>", "start"),
        TokenRow("redfox", "word", 0),
        *[TokenRow(word.text, "word", number) for number, word in enumerate(WORDS[1:], 1)],
        *[TokenRow("!", "end")] * 2,
    )

    def encode(given):
        return torch.cat([mixing[k] @ given[k] for k in range(2)], dim=1)[None], {}

    way = Reencoding((EncoderInput(inputs[0], CHUNKS), EncoderInput(inputs[1], others)), encode)
    return Conditioning(encode(inputs)[0], {}, "red fox asleep", WORDS, CHUNKS, way), mixing


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_the_gradient_at_the_input_tokens_goes_back_through_both_encoders(prediction_type) -> None:
    denoiser, (x, sigma) = LinearDenoiser(WEIGHTS, prediction_type, gain=0.5), at(3)
    prompt, mixing = two_encoders()
    # o = sum_m (w^T T_k)_m e_k,m: encoder k has the weights w^T T_k, and its half of d / ||d||.
    weights = torch.einsum("n,knm->km", torch.tensor(WEIGHTS), mixing).abs()
    d = torch.einsum("n,nd->d", torch.tensor(WEIGHTS), prompt.rows[0])
    halves = torch.stack([d[:2].norm(), d[2:].norm()]) / d.norm()
    expected = v_scale(prediction_type, SIGMA) * gains(denoiser, x).mean() * weights * halves[:, None]
    norms = input_gradient.token_gradient_norms(denoiser, x, sigma, prompt, base(denoiser, x, sigma))
    torch.testing.assert_close(torch.stack(norms), expected, rtol=1e-3, atol=1e-5)
    found = input_gradient.explain(denoiser, x, sigma, prompt, base(denoiser, x, sigma))
    first, second = expected.tolist()
    by_word = [first[1] + second[1], first[2] + second[2], first[3] + first[4] + second[3]]
    assert found.view == "input gradient"
    assert [w.raw for w in found.words] == pytest.approx(by_word, rel=1e-3)


def test_gradients_are_taken_even_where_the_caller_has_switched_them_off() -> None:
    denoiser, (x, sigma), (prompt, _) = LinearDenoiser(WEIGHTS), at(1), two_encoders()
    with torch.no_grad():
        for view in (output_gradient, input_gradient):
            assert view.explain(denoiser, x, sigma, prompt, base(denoiser, x, sigma)).top.raw > 0
    assert not prompt.rows.requires_grad


def test_views_say_what_they_miss() -> None:
    denoiser, (x, sigma) = LinearDenoiser(), at(1)
    bare = Conditioning(torch.ones(1, 6, 4))
    with pytest.raises(ValueError, match="tokens of this conditioning are not known"):
        output_gradient.explain(denoiser, x, sigma, bare, base(denoiser, x, sigma))
    with pytest.raises(ValueError, match="text encoder is not at hand"):
        input_gradient.explain(denoiser, x, sigma, bare, base(denoiser, x, sigma))


def test_significance_is_the_share_of_the_largest_value_and_never_negative() -> None:
    found = explanation("leave one out", WORDS, torch.tensor([2.0, -1.0, 4.0]), "unit")
    assert [w.raw for w in found.words] == [2, -1, 4]
    assert [w.significance for w in found.words] == [0.5, 0, 1]
    assert [(w.text, w.start, w.end) for w in found.words] == [("red", 0, 3), ("fox", 4, 7), ("asleep", 8, 14)]
    below = explanation("leave one out", WORDS, torch.tensor([-2.0, -1.0, -4.0]), "unit")
    assert [w.significance for w in below.words] == [0, 0, 0]


def test_nothing_to_explain_and_broken_values_are_refused() -> None:
    with pytest.raises(ValueError, match="no words"):
        explanation("leave one out", (), torch.zeros(0), "unit")
    with pytest.raises(ValueError, match="not finite"):
        explanation("leave one out", WORDS, torch.tensor([1.0, float("nan"), 2.0]), "unit")


# ------------------------------------------------------------------------- leave one out

STRENGTHS = {"red": 0.5, "Zorblax": 3.0, "vase": 1.0, "dull": -0.5}


def test_leaving_a_word_out_loses_its_part_of_the_magnitude() -> None:
    encode, denoiser = encoder(STRENGTHS), LinearDenoiser()
    prompt, noise = encode("red Zorblax dull vase"), seeded_noise((1, 2, 2), 0, 2)
    scores = leave_one_out.scores_without(denoiser, encode, prompt, encode(""), noise, SIGMA)
    # The whole prompt scores 2 * (.5 + 3 - .5 + 1) = 8; each word gives 2 s.
    torch.testing.assert_close(scores, torch.tensor([7.0, 2.0, 9.0, 6.0])[:, None].expand(4, 2), rtol=1e-4, atol=1e-4)
    found = leave_one_out.explain(denoiser, encode, prompt, encode(""), noise, SIGMA, batch_size=3)
    assert [w.raw for w in found.words] == pytest.approx([1, 6, -1, 2], rel=1e-4)
    assert [w.score_without for w in found.words] == pytest.approx([7, 2, 9, 6], rel=1e-4)
    assert [w.significance for w in found.words] == pytest.approx([1 / 6, 1, 0, 1 / 3], rel=1e-4)


@pytest.mark.parametrize(
    ("prompt", "word", "left"),
    [
        ("a red, fox", 1, "a fox"),
        ("An Old  River", 2, "An Old"),
        ("fox, asleep, | night", 3, "fox, asleep"),
        ("Fox , asleep", 0, "asleep"),
        ("red red fox", 1, "red fox"),
        ("fox", 0, ""),
        ("1girl,solo,red", 1, "1girl,red"),
        ("東京の夜", 2, "東京夜"),
    ],
)
def test_a_dropped_word_leaves_no_gap_and_no_dangling_separator(prompt: str, word: int, left: str) -> None:
    assert drop_word(prompt, split_words(prompt)[word]) == left


# ------------------------------------------------------------------------- one door for all


def test_every_view_through_one_door() -> None:
    model, encode = LinearDenoiser(), encoder(STRENGTHS)
    model.encode = encode
    wanted, prompt = Measurement(images=2, steps=3), encode("red Zorblax vase")
    # With weights of 1 every output row weighs the same; the input embeddings weigh their strength.
    expected = {"output gradient": [1, 1, 1], "input gradient": [0.5, 3, 1], "leave one out": [1, 6, 2]}
    for view, raw in expected.items():
        found = explain_by_view(model, prompt, wanted, view, batch_size=2)
        assert found.view == view
        # Neither gradient carries the factor 2 = ||(1, 1, 1, 1)||; at the input it is in d e = s (1, 1, 1, 1).
        assert [w.raw for w in found.words] == pytest.approx(raw, rel=1e-4)
    assert model.differentiable_opened == 2  # leaving words out needs no gradient
    assert default_view(prompt) == "confirmed gradient"
    assert default_view(prompt.with_rows(prompt.rows)) == "output gradient"


def test_word_rows_of_the_hand_made_encoder_align_with_its_words() -> None:
    assert [t.word for t in word_rows(WORDS)] == [None, 0, 1, 2, None]


def test_the_confirmed_gradient_is_gradient_times_what_blanking_the_word_loses() -> None:
    """Rows are the embeddings themselves here, so blanking a word drops its row from the sum, worked out by hand."""
    network, prompt, sigma = LinearDenoiser(gain=0.7), "red boat", 2.0
    rows, empty = seeded_noise((3, 4), 1, 1), seeded_noise((3, 4), 2, 1)
    tokens = (TokenRow("<s>", "start"), TokenRow("red</w>", "word", 0), TokenRow("boat</w>", "word", 1))
    way = Reencoding((EncoderInput(rows[0], tokens),), lambda given: (given[0][None], {}))
    conditioning = Conditioning(rows, {}, prompt, split_words(prompt), tokens, way)
    x = initial_latent(seeded_noise((1, 2, 2), 0, 2), sigma, "epsilon")
    base = network(x, levels_of(x, sigma), Conditioning(empty))
    found = confirmed_gradient.explain(network, x, levels_of(x, sigma), conditioning, base)
    gradient = input_gradient.explain(network, x, levels_of(x, sigma), conditioning, base)

    def score(kept: Tensor) -> float:
        gap = network.output(x, kept) - network.output(x, empty)
        return float(gap.flatten(1).norm(dim=1).mean())

    for number, row in enumerate((1, 2)):
        kept = rows.clone()
        kept[:, row] = 0
        lost = max(score(rows) - score(kept), 0.0)
        assert found.words[number].raw == pytest.approx(gradient.words[number].raw * lost, rel=1e-4, abs=1e-6)
        assert found.words[number].score_without == pytest.approx(score(kept), rel=1e-4)
