"""One prompt drawn plainly and under mitigations, for reports: images, verdicts, similarities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..calibration.profile import Profile
from ..core.denoiser import Model
from ..core.similarity import COPY_THRESHOLD, grey_correlation
from ..core.verdict import Verdict
from ..explain.views import explain
from ..mitigations import Outcome, Start, available
from ..report import html
from ..run.measure import Measured, Measurement, measure_runs, sampled_with, setting_of, verdict_on


@dataclass(frozen=True)
class MitigatedRun:
    method: str
    outcome: Outcome
    verdict: Verdict
    images: Tensor
    similarity: float | None


@dataclass(frozen=True)
class Case:
    """``images`` [images, 3, H, W] in 0..1; similarities are means over the images, None without a training image."""

    verdict: Verdict
    images: Tensor
    where: Tensor | None
    training_image: Tensor | None
    similarity: float | None
    mitigated: tuple[MitigatedRun, ...]


def run_case(
    model: Model,
    prompt: str,
    wanted: Measurement,
    profile: Profile | None,
    start: Start,
    methods: Mapping[str, Any],
    training_image: Tensor | None = None,
    on_run: Callable[[], None] = lambda: None,
) -> Case:
    """Draw one prompt as it is and once for each of ``methods`` (name -> settings), all from the same noise.

    ``on_run`` is called after each drawing.
    """
    setting, conditioning = setting_of(model, wanted), model.encode(prompt)

    def verdict_of(measured: Measured, words_of: str) -> Verdict:
        words = None
        if words_of.split():
            words = explain(model, model.encode(words_of), wanted, batch_size=start.batch_size)
        return verdict_on(measured, wanted, setting, profile, words)

    (plain,) = measure_runs(model, [conditioning], start.noise, wanted, None, start.batch_size)
    on_run()
    assert plain.latents is not None  # measure_runs always samples
    images = model.decode(plain.latents)
    mitigated = []
    for name, settings in methods.items():
        outcome = available()[name].apply(model, conditioning, start, settings)
        after = sampled_with(model, outcome, start.x, wanted, start.batch_size)
        on_run()
        assert after.latents is not None
        drawn = model.decode(after.latents)
        verdict = verdict_of(after, outcome.conditioning.prompt)
        mitigated.append(MitigatedRun(name, outcome, verdict, drawn, similarity_to(training_image, drawn)))
    similarity = similarity_to(training_image, images)
    return Case(verdict_of(plain, prompt), images, plain.where, training_image, similarity, tuple(mitigated))


def similarity_to(training_image: Tensor | None, images: Tensor) -> float | None:
    return None if training_image is None else float(grey_correlation(images, training_image[None]).mean())


def pixels(image: Tensor) -> Any:
    """[3, H, W] in 0..1 -> [H, W, 3] uint8."""
    return (image.permute(1, 2, 0) * 255).round().byte().numpy()


def save_images(cases: Sequence[Case], folder: Path) -> None:
    """prompt-1-image-1.png, prompt-1-image-1-METHOD.png, ..."""
    for number, case in enumerate(cases, 1):
        for suffix, images in [("", case.images), *((f"-{m.method}", m.images) for m in case.mitigated)]:
            for place, image in enumerate(images, 1):
                Image.fromarray(pixels(image)).save(folder / f"prompt-{number}-image-{place}{suffix}.png")


def render_cases(
    title: str, subtitle: str, model: Model, wanted: Measurement, profile: Profile | None, cases: Sequence[Case]
) -> str:
    """The HTML report of these cases."""
    band = profile.band if profile else ()
    shown = [
        html.Case(
            verdict=case.verdict,
            band=band,
            images=[pixels(p) for p in case.images],
            where=case.where[0] if case.where is not None else None,
            training_image=None if case.training_image is None else pixels(case.training_image),
            similarity=case.similarity,
            copy_threshold=COPY_THRESHOLD,
            mitigations=tuple(_shown(run, case) for run in case.mitigated),
        )
        for case in cases
    ]
    settings = {k.replace("_", " "): v for k, v in asdict(wanted).items() if v != ""}
    return html.render(html.Report(title, subtitle, model.name, shown, settings))


def _shown(run: MitigatedRun, case: Case) -> html.Mitigated:
    details = run.outcome.details
    removed = details.get("words")
    changed = run.outcome.conditioning.prompt != case.verdict.prompt
    return html.Mitigated(
        method=run.method,
        prompt=run.outcome.conditioning.prompt if changed else None,
        verdict=run.verdict,
        images=[pixels(p) for p in run.images],
        similarity=run.similarity,
        losses=details.get("losses", ()),
        moved=details.get("moved"),
        note=f"dropped: {', '.join(removed)}" if removed else "",
    )
