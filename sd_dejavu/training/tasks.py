"""The pieces that an audit is cut into, and how one is done: the same in one process and on a cluster.

A task is some prompts of one variant of a model. What comes of it are plain values, equal whichever process did it:
prompts that share a noise are measured together wherever the borders of the tasks lie.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..calibration.first_step import PROMPTS_A_SEED, SEED_BASE
from ..core.conditioning import Conditioning
from ..core.denoiser import Model
from ..core.memory import OutOfMemory, one_by_one
from ..core.sampling import first_predictions
from ..detectors.magnitude import magnitude, rounding
from ..explain.views import explain
from ..kept.foreign import is_number
from ..report.wording import top_words
from ..run.measure import Measurement, baseline_of, measure_runs
from .alignment import alignment, as_trained

Kind = Literal["nulls", "captions", "images"]
_NOT_FINITE = "the model gives NaN or infinity"


class Trained(Model, Protocol):
    """A model with both ends of its autoencoder."""

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of what it draws."""
        ...

    def latents_of(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in 0..1 -> latents [B, C, h, w]."""
        ...


@dataclass(frozen=True)
class Variant:
    """The model that is audited, with its LoRA at a strength; or the base model, which has not seen the training set."""

    lora: str | None = None
    strength: float = 1.0
    base: bool = False


@dataclass(frozen=True)
class Task:
    """``prompts`` are those from number ``first`` on, a multiple of 25.

    ``training`` holds image files: with captions one for each, with nulls a few for each 25 prompts; none where the
    training set's images are not at hand. ``words`` asks for the word that brings an image about.
    """

    kind: Kind
    variant: Variant
    first: int
    prompts: tuple[str, ...]
    training: tuple[bytes, ...] = ()
    words: bool = False

    def images_at(self, begin: int) -> tuple[bytes, ...]:
        """The image files of the 25 prompts from number ``begin`` of this task on."""
        if self.kind == "nulls":
            each = len(self.training) // -(-len(self.prompts) // PROMPTS_A_SEED)
            begin = begin // PROMPTS_A_SEED * each
            return self.training[begin : begin + each]
        return self.training[begin : begin + PROMPTS_A_SEED]

    def as_row(self) -> dict[str, Any]:
        """Plain values, for a table's row."""
        return {**asdict(self), "prompts": list(self.prompts), "training": list(self.training)}

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> Task:
        variant = Variant(**row["variant"])
        return cls(
            row["kind"], variant, int(row["first"]), tuple(row["prompts"]), tuple(row["training"]), bool(row["words"])
        )


@dataclass(frozen=True)
class Work:
    """Does a task with the model of its variant. Can be sent to another process."""

    wanted: Measurement
    batch_size: int = 32

    def __call__(self, model: Trained, task: Task) -> list[dict[str, Any]]:
        """A value a prompt: what was measured at the first step, or its images; or ``why`` there is nothing."""
        if task.kind == "images":
            return list(self._images(model, task))
        return list(self._first_step(model, task))

    def _first_step(self, model: Trained, task: Task) -> Iterator[dict[str, Any]]:
        """Every 25 prompts share a noise, the nulls' others than the captions', so that neither hangs on one noise."""
        wanted = self.wanted
        sigma = model.sigmas(wanted.steps)[0]
        base = baseline_of(model, wanted)
        seed = wanted.seed + task.first + (SEED_BASE if task.kind == "nulls" else 0)
        for begin in range(0, len(task.prompts), PROMPTS_A_SEED):
            prompts = task.prompts[begin : begin + PROMPTS_A_SEED]
            given = task.images_at(begin)
            latents = model.latents_of(as_trained(given, *model.image_size)) if given else None
            encoded = [_encoded(model, prompt) for prompt in prompts]
            sound = [one for one in encoded if isinstance(one, Conditioning)]
            noise = model.noise(seed + begin, wanted.images)

            def measured_of(
                some: Sequence[Conditioning],
                noise: Tensor = noise,
                given: Sequence[bytes] = given,
                latents: Tensor | None = latents,
            ) -> list[tuple[Tensor, list[float]]]:
                magnitudes = torch.zeros(len(some), wanted.images)
                aligned = torch.zeros(len(some), wanted.images, len(given))
                for part, predictions in first_predictions(model, some, base, noise, sigma, self.batch_size):
                    towards = torch.zeros(len(part), 0) if latents is None else alignment(predictions, latents).cpu()
                    values = zip(part, magnitude(predictions).cpu(), strict=True)
                    for number, ((prompt, image), value) in enumerate(values):
                        magnitudes[prompt, image] = value
                        aligned[prompt, image] = towards[number]
                return list(zip(magnitudes, aligned.mean(1).tolist(), strict=True))

            measured = iter(one_by_one(measured_of, sound))
            for place, one in enumerate(encoded):
                if isinstance(one, str):
                    yield {"why": one}
                    continue
                found = next(measured)
                if isinstance(found, OutOfMemory):
                    yield {"why": f"not measured: {found}"}
                    continue
                own_magnitudes, alignments = found
                if task.kind == "captions" and given:  # its own image first, then the others
                    others = [a for a, data in zip(alignments, given, strict=True) if data != given[place]]
                    alignments = [alignments[place], *others]
                yield _value(own_magnitudes, alignments, rounding(noise[0].numel(), sigma))

    def _images(self, model: Trained, task: Task) -> Iterator[dict[str, Any]]:
        """The images of each prompt as PNG in base64, and the word that brings them about."""
        noise = model.noise(self.wanted.seed, self.wanted.images)

        def drawn(prompts: Sequence[str]) -> list[dict[str, Any]]:
            return [self._drawn(model, prompt, noise, task.words) for prompt in prompts]

        for found in one_by_one(drawn, task.prompts):
            lacking: dict[str, Any] = {"images": [], "word": None}
            yield {**lacking, "why": f"not drawn: {found}"} if isinstance(found, OutOfMemory) else found

    def _drawn(self, model: Trained, prompt: str, noise: Tensor, words: bool) -> dict[str, Any]:
        conditioning = model.encode(prompt)
        (run,) = measure_runs(model, [conditioning], noise, self.wanted, None, self.batch_size)
        assert run.latents is not None  # whole runs end in latents
        if not bool(torch.isfinite(run.latents).all()):
            return {"images": [], "word": None, "why": f"not drawn: {_NOT_FINITE}"}
        named = words and len(conditioning.words) > 0
        return {
            "images": [png(image) for image in model.decode(run.latents)],
            "word": top_word(model, conditioning, self.wanted, self.batch_size) if named else None,
        }


def _value(magnitudes: Tensor, alignments: Sequence[float], equal: float) -> dict[str, Any]:
    """Means over the images: of magnitudes [images], which up to ``equal`` are none, and alignments with each image."""
    if not bool(torch.isfinite(magnitudes).all()) or not all(map(math.isfinite, alignments)):
        return {"why": f"not measured: {_NOT_FINITE}"}
    if not bool((magnitudes > equal).all()):
        return {"why": "both predictions are equal: the prompt acts on nothing"}
    found: dict[str, Any] = {"magnitude": float(magnitudes.mean())}
    return {**found, "alignment": list(alignments)} if alignments else found


def check_values(task: Task, values: Any) -> list[dict[str, Any]]:
    """The values themselves. Raises ValueError where they are not those of such a task, or hold NaN or infinity."""
    if not isinstance(values, list) or len(values) != len(task.prompts):
        raise ValueError(f"it holds no list of {len(task.prompts)} values")
    for value in values:
        if not isinstance(value, dict) or not (_is_drawn(value) if task.kind == "images" else _is_measured(value)):
            raise ValueError(f"{value!r:.60} is not what is found of a prompt")
    return values


def _is_measured(value: dict[str, Any]) -> bool:
    if "why" in value:
        return isinstance(value["why"], str) and len(value) == 1
    aligned = value.get("alignment", [0.0])
    numbers = isinstance(aligned, list) and bool(aligned) and all(is_number(one) for one in aligned)
    return numbers and is_number(value.get("magnitude")) and value["magnitude"] >= 0


def _is_drawn(value: dict[str, Any]) -> bool:
    images, words = value.get("images"), (value.get("word"), value.get("why"))
    if not isinstance(images, list) or not all(word is None or isinstance(word, str) for word in words):
        return False
    try:
        return all(base64.b64decode(image, validate=True)[:4] == b"\x89PNG" for image in images)
    except (ValueError, TypeError):
        return False


def _encoded(model: Model, prompt: str) -> Conditioning | str:
    if not prompt.strip():
        return "there is no caption"
    try:
        return model.encode(prompt)
    except ValueError as error:  # a prompt that is too long
        return str(error)


def top_word(model: Model, conditioning: Conditioning, wanted: Measurement, batch_size: int = 32) -> str | None:
    """The word that brings the prompt's image about most; None where no word does."""
    found = top_words(explain(model, conditioning, wanted, batch_size=batch_size), 1)
    return found[0].text.strip(",.;:") if found and found[0].raw > 0 else None


def png(image: Tensor) -> str:
    """A PNG file in base64, of an image [3, H, W] in 0..1."""
    from PIL import Image

    file = io.BytesIO()
    eights = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(eights).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


# --------------------------------------------------------------------------------------------- engines

Engine = Callable[[Sequence[Task], Callable[[Variant], Trained], Work], Iterator[tuple[Task, list[dict[str, Any]]]]]


class Bench:
    """Does tasks one after the other; keeps the model of the last variant."""

    def __init__(self, load: Callable[[Variant], Trained], work: Work) -> None:
        self._load, self._work = load, work
        self._model: Trained | None = None
        self._variant: Variant | None = None

    def __call__(self, task: Task) -> list[dict[str, Any]]:
        if self._model is None or self._variant != task.variant:
            self._model = None  # so that two are never in memory
            self._model, self._variant = self._load(task.variant), task.variant
        return self._work(self._model, task)


def one_process(
    tasks: Sequence[Task], load: Callable[[Variant], Trained], work: Work
) -> Iterator[tuple[Task, list[dict[str, Any]]]]:
    """The engine of one machine; a variant is loaded when its first task comes."""
    bench = Bench(load, work)
    for task in tasks:
        yield task, bench(task)


def nothing_apart(variant: Variant) -> Trained:
    """For hosts that bring an engine: none of their models can be loaded apart from their runs."""
    raise ValueError("this host's models can be asked during its own runs only")
