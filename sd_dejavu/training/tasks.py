"""The pieces that an audit is cut into, and how one is done: the same in one process and on a cluster.

A task is some prompts of one variant of a model. What comes of it are plain values, equal whichever process did it:
prompts that share a noise are measured together wherever the borders of the tasks lie.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from ..calibration.first_step import PROMPTS_A_SEED, SEED_BASE
from ..core.conditioning import Conditioning, sharing, stack
from ..core.denoiser import Model
from ..core.memory import OutOfMemory, one_by_one
from ..core.sampling import batches, first_step
from ..detectors.magnitude import rounding
from ..explain.views import explain
from ..kept.foreign import is_number
from ..reference.images import thumbnail
from ..report.wording import top_words
from ..run.measure import Measurement, baseline_of, measure_runs
from .recovery import as_trained, drawn, recoveries

if TYPE_CHECKING:
    from PIL.Image import Image

Kind = Literal["nulls", "captions", "drawn", "stand-ins", "images"]
MEASURED = ("magnitude", "recovery")  # of a caption, or an ordinary prompt
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
class Chosen(Sequence[bytes]):
    """Some of many files by their numbers, each read when it is asked for."""

    files: Sequence[bytes]
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self.files[number] for number in self.numbers[place]]
        return self.files[self.numbers[place]]


@dataclass(frozen=True)
class Task:
    """``prompts`` are those from number ``first`` on, a multiple of 25.

    ``captions`` are measured, and ``nulls`` with other noises; ``training`` holds an image file for each, which is
    compared under ``others``. ``drawn`` ones are drawn without guidance, as thumbnails of at most ``side`` pixels,
    ``stand-ins`` so with other noises, and ``images`` as users draw them; then ``words`` asks for the word that brings an
    image about.
    """

    kind: Kind
    variant: Variant
    first: int
    prompts: tuple[str, ...]
    training: Sequence[bytes] = ()
    words: bool = False
    side: int = 0
    others: tuple[str, ...] = ()

    def as_row(self) -> dict[str, Any]:
        """Plain values, for a table's row."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        lists = {name: list(values[name]) for name in ("prompts", "training", "others")}
        return {**values, **lists, "variant": asdict(self.variant)}

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> Task:
        variant = Variant(**row["variant"])
        prompts, training, others = (tuple(row[name]) for name in ("prompts", "training", "others"))
        words, side = bool(row["words"]), int(row["side"])
        return cls(row["kind"], variant, int(row["first"]), prompts, training, words, side, others)


@dataclass(frozen=True)
class Work:
    """Does a task with the model of its variant. Can be sent to another process."""

    wanted: Measurement
    batch_size: int = 32

    def __call__(self, model: Trained, task: Task) -> list[dict[str, Any]]:
        """A value a prompt: what was measured of it, or what was drawn; or ``why`` there is nothing."""
        if task.kind == "images":
            return list(self._images(model, task))
        one_part = self._without_guidance if task.kind in ("drawn", "stand-ins") else self._measured
        found: list[dict[str, Any]] = []
        for begin in range(0, len(task.prompts), PROMPTS_A_SEED):
            found += one_part(model, task, begin)
        return found

    def _measured(self, model: Trained, task: Task, begin: int) -> Iterator[dict[str, Any]]:
        """25 prompts share a noise, the nulls' others than the captions', so that neither hangs on one noise."""
        wanted, here = self.wanted, slice(begin, begin + PROMPTS_A_SEED)
        sigma, base = model.sigmas(wanted.steps)[0], baseline_of(model, wanted)
        noise = model.noise(_seed(wanted, task, begin), wanted.images)
        latents = model.latents_of(as_trained(task.training[here], *model.image_size))
        encoded = [_encoded(model, prompt) for prompt in task.prompts[here]]
        sound = [(number, one) for number, one in enumerate(encoded) if isinstance(one, Conditioning)]
        compared = [_encoded(model, prompt) for prompt in task.others]
        others = [one for one in compared if isinstance(one, Conditioning)]

        def measured(some: Sequence[tuple[int, Conditioning]]) -> list[tuple[Tensor, float]]:
            conditionings = [one for _, one in some]
            magnitudes = first_step(model, conditionings, base, noise, sigma, self.batch_size)
            own = latents[[number for number, _ in some]]
            found = recoveries(model, conditionings, others or [base], own, noise, self.batch_size)
            return list(zip(magnitudes, found.tolist(), strict=True))

        values = iter(one_by_one(measured, sound))
        for one in encoded:
            if isinstance(one, str):
                yield {"why": one}
                continue
            found = next(values)
            if isinstance(found, OutOfMemory):
                yield {"why": f"not measured: {found}"}
            else:
                yield _value(*found, rounding(noise[0].numel(), sigma))

    def _without_guidance(self, model: Trained, task: Task, begin: int) -> Iterator[dict[str, Any]]:
        """An image of each of 25 prompts, each from a noise of its own."""
        prompts = task.prompts[begin : begin + PROMPTS_A_SEED]
        noise = model.noise(_seed(self.wanted, task, begin), len(prompts))
        sigma = model.sigmas(self.wanted.steps)[0]
        encoded = [_encoded(model, prompt) for prompt in prompts]
        sound = [(number, one) for number, one in enumerate(encoded) if isinstance(one, Conditioning)]

        def images(some: Sequence[tuple[int, Conditioning]]) -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = [{} for _ in some]
            for part in batches(sharing([one for _, one in some]), 1, self.batch_size):
                places = [place for place, _ in part]
                together = stack([some[place][1] for place in places])
                latents = drawn(model, together, noise[[some[place][0] for place in places]], sigma, self.batch_size)
                for place, latent, image in zip(places, latents, model.decode(latents), strict=True):
                    finite = bool(torch.isfinite(latent).all()) and bool(torch.isfinite(image).all())
                    found[place] = _thumbnail(image, task.side) if finite else {"why": f"not drawn: {_NOT_FINITE}"}
            return found

        values = iter(one_by_one(images, sound))
        for one in encoded:
            if isinstance(one, str):
                yield {"why": one}
                continue
            found = next(values)
            yield {"why": f"not drawn: {found}"} if isinstance(found, OutOfMemory) else found

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


def _seed(wanted: Measurement, task: Task, begin: int) -> int:
    return wanted.seed + task.first + begin + (SEED_BASE if task.kind in ("nulls", "drawn") else 0)


def _value(magnitudes: Tensor, recovery: float, equal: float) -> dict[str, Any]:
    """The mean of magnitudes [images], of which those up to ``equal`` are none, and the recovery of the image."""
    if not bool(torch.isfinite(magnitudes).all()) or not math.isfinite(recovery):
        return {"why": f"not measured: {_NOT_FINITE}"}
    if not bool((magnitudes > equal).all()):
        return {"why": "both predictions are equal: the prompt acts on nothing"}
    return {"magnitude": float(magnitudes.mean()), "recovery": recovery}


def check_values(task: Task, values: Any) -> list[dict[str, Any]]:
    """The values themselves. Raises ValueError where they are not those of such a task, or hold NaN or infinity."""
    if not isinstance(values, list) or len(values) != len(task.prompts):
        raise ValueError(f"it holds no list of {len(task.prompts)} values")
    for value in values:
        if not isinstance(value, dict) or not _LOOKS[task.kind](value):
            raise ValueError(f"{value!r:.60} is not what is found of a prompt")
    return values


def _says_why(value: dict[str, Any]) -> bool:
    return isinstance(value.get("why"), str) and len(value) == 1


def _is_measured(value: dict[str, Any]) -> bool:
    if "why" in value:
        return _says_why(value)
    return is_number(value.get("magnitude")) and value["magnitude"] >= 0 and is_number(value.get("recovery"))


def _is_thumbnail(value: dict[str, Any]) -> bool:
    return _says_why(value) if "why" in value else _are_files([value.get("image")], b"\xff\xd8")


def _is_drawn(value: dict[str, Any]) -> bool:
    images, words = value.get("images"), (value.get("word"), value.get("why"))
    named = all(word is None or isinstance(word, str) for word in words)
    return named and isinstance(images, list) and _are_files(images, b"\x89PNG")


def _are_files(images: Sequence[Any], head: bytes) -> bool:
    """Whether these are files in base64 that begin so."""
    try:
        return all(base64.b64decode(image, validate=True).startswith(head) for image in images)
    except (ValueError, TypeError):
        return False


_LOOKS: dict[Kind, Callable[[dict[str, Any]], bool]] = {
    "nulls": _is_measured,
    "captions": _is_measured,
    "drawn": _is_thumbnail,
    "stand-ins": _is_thumbnail,
    "images": _is_drawn,
}


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
    file = io.BytesIO()
    _in_eights(image).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def _thumbnail(image: Tensor, side: int) -> dict[str, Any]:
    """As a reference set keeps its images, so that what is drawn is measured as they are."""
    return {"image": base64.b64encode(thumbnail(_in_eights(image), side)).decode("ascii")}


def _in_eights(image: Tensor) -> Image:
    from PIL import Image as pillow

    return pillow.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


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
