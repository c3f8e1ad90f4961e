"""Fine-tuning of a Stable Diffusion UNet, whole or by a LoRA, with the filter in its loss.

The UNet alone is trained; text encoders and autoencoder stay as they are. Everything random in a step
(samples, dropped captions, timesteps, noise) depends on the seed and the step alone, and checkpoints are
renamed into place when they are whole: a run that was stopped at any point and is started again comes to
the same result as an unbroken one, bit for bit on the CPU.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..core.conditioning import Conditioning, stack
from ..core.schedule import Schedule
from ..core.settings import Checked, option
from ..kept import (
    PARTIAL,
    Resumable,
    check_finite,
    json_text,
    not_kept,
    replacing,
    write_tensors,
    write_text,
)
from ..kept.foreign import one_line
from ..quiet import quiet
from ..reference.records import Source
from .dataset import LatentSet, latents_of
from .filter import FilterSettings, TrainingFilter
from .loss import Batch, filtered_loss, stratified_timesteps
from .tasks import Trained

_KOHYA = {"lora_A": "lora_down", "lora_B": "lora_up"}
TRAINED_BY_LORA = ("to_q", "to_k", "to_v", "to_out.0")
_KNOWN_CAPTIONS = 256  # conditionings that are kept
_STATE, _RESULT = "state-", "result.json"
_SUMMARY = {
    "result",
    "model",
    "source",
    "samples",
    "shown_in_an_epoch",
    "steps",
    "trained_parameters",
    "filter",
    "skipped",
}
_LONGEST_EPOCH = 10_000_000  # samples, as often as they are shown

Progress = Callable[[str, int, int], None]


class Trainable(Trained, Protocol):
    """A model with a UNet to train: a pipeline of diffusers, and the noise schedule that it was trained with."""

    pipeline: Any
    device: torch.device

    @property
    def schedule(self) -> object: ...

    def encode(self, prompt: str, image_size: tuple[int, int] | None = None) -> Conditioning:
        """``image_size`` is (height, width) in pixels, the model's own by default."""
        ...


class Stopped(Exception):
    """The run was asked to stop and has written its state."""


@dataclass(frozen=True)
class FinetuneSettings(Checked):
    """How a UNet is fine-tuned, apart from the filter."""

    rank: int | None = option(
        None, "rank of the LoRA to train (default: none, the whole UNet is trained)", kind=int, minimum=1, maximum=1024
    )
    epochs: int = option(10, "times the training set is shown", minimum=1)
    steps: int | None = option(None, "optimizer steps in all, in place of epochs", kind=int, minimum=1)
    batch_size: int = option(4, "samples in one evaluation of the model", minimum=1)
    gradient_accumulation: int = option(1, "batches whose gradients make one optimizer step", minimum=1)
    learning_rate: float = option(1e-4, "learning rate of AdamW", minimum=0.0, maximum=1000.0, exclusive=True)
    learning_rate_schedule: str = option(
        "constant", "course of the learning rate after its warm-up", choices=("constant", "linear", "cosine")
    )
    learning_rate_warm_up: int = option(0, "optimizer steps over which the learning rate rises", minimum=0)
    weight_decay: float = option(0.01, "weight decay of AdamW", minimum=0.0, maximum=1000.0)
    caption_dropout: float = option(0.1, "share of captions left empty", minimum=0.0, maximum=1.0)
    ema: float = option(
        0.0, "decay of the averaged weights, which are then what is saved (0: no average)", minimum=0.0, maximum=0.99999
    )
    mixed_precision: str = option("no", "precision of the evaluations", choices=("no", "fp16", "bf16"))
    gradient_checkpointing: bool = option(False, "compute activations again in place of keeping them: less memory")
    resolution: int | None = option(
        None, "side of the images in pixels (default: the model's own)", kind=int, minimum=8, maximum=4096
    )
    save_every: int = option(1, "save the result every so many epochs", minimum=1)
    state_every: int = option(500, "optimizer steps between the states from which a stopped run goes on", minimum=1)
    seed: int = option(0, "seed of everything random", minimum=0, maximum=2**63 - 1)


@dataclass(frozen=True)
class Plan:
    """How many samples an epoch shows, how many a step takes, and how many steps there are."""

    epoch: int
    samples_a_step: int
    steps: int

    @staticmethod
    def of(epoch: int, wanted: FinetuneSettings) -> Plan:
        samples = wanted.batch_size * wanted.gradient_accumulation
        return Plan(epoch, samples, wanted.steps or -(-epoch * wanted.epochs // samples))

    def epochs_done(self, step: int) -> int:
        return step * self.samples_a_step // self.epoch


def finetune(
    model: Trainable,
    source: Source,
    out: Path,
    wanted: FinetuneSettings = FinetuneSettings(),
    filtering: FilterSettings = FilterSettings(),
    on_progress: Progress = lambda stage, done, total: None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Trains ``model``, in place, on a source; returns the summary, which is written to ``out/result.json`` too.

    Goes on with what ``out`` holds of the same run. ``on_progress(stage, done, total)`` is called as the work goes
    on; where ``stop()`` says so, the state is written and :class:`Stopped` raised. ``out`` gets ``training.csv``
    (loss, share of samples kept and learning rate of each step), ``filter.jsonl`` (the filter's log), and the result
    after every ``save_every`` epochs and at the end: ``lora-epoch-0006.safetensors`` and ``lora.safetensors``, or
    folders ``model-epoch-0006`` and ``model`` in diffusers layout. Raises ValueError with a sentence for a folder
    that holds another run or that another process writes to, a training set without usable images, a resolution that
    the model cannot take, a flow model, a filter over batches of 1, of which it never leaves out any, and trained weights that are not
    finite, which are never saved.
    """
    if filtering.filter != "none" and wanted.batch_size == 1:
        raise ValueError(
            "the filter leaves no batch empty, so it would do nothing at a batch size of 1: take 2 or more, or no filter"
        )
    size, schedule = _size(model, wanted), _schedule(model)
    out.mkdir(parents=True, exist_ok=True)
    identity = {
        "model": model.fingerprint,
        "source": source.identity,
        "settings": asdict(wanted),
        "filter": asdict(filtering),
    }
    work = Resumable(out, "a fine-tuning", "give another folder, or remove this one", note="finetune.json", shared=True)
    with work.held():
        work.begin(identity)
        if (out / _RESULT).is_file():
            return work.read(_RESULT, _SUMMARY)
        samples = latents_of(
            source,
            model.pipeline.vae,
            size,
            out / "latents.safetensors",
            f"{source.identity} {model.fingerprint} {size}",
            lambda done, total: on_progress("images", done, total),
        )
        if sum(samples.repeats) > _LONGEST_EPOCH:
            raise ValueError(
                f"an epoch would show {sum(samples.repeats):,} samples, and at most {_LONGEST_EPOCH:,} are possible: "
                "lower the repeats in the folders' names"
            )
        with _Run(model, schedule, samples, out, wanted, filtering, size) as run:
            run.train(lambda done, total: on_progress("steps", done, total), stop)
            summary = run.summary(source.description)
        write_text(out / _RESULT, json_text(summary, indent=1, ensure_ascii=False) + "\n")
        for left in out.glob(f"{_STATE}*"):
            shutil.rmtree(left)
    return summary


# -------------------------------------------------------------------------------------------- the run


class _Run:
    """The state of one fine-tuning; a context manager, as accelerate keeps its own state in globals."""

    def __init__(
        self,
        model: Trainable,
        schedule: Schedule,
        samples: LatentSet,
        out: Path,
        wanted: FinetuneSettings,
        filtering: FilterSettings,
        size: tuple[int, int],
    ) -> None:
        from accelerate import Accelerator
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        self.model, self.schedule, self.samples, self.out, self.wanted = model, schedule, samples, out, wanted
        self.order = samples.epoch()
        self.plan = Plan.of(len(self.order), wanted)
        self.filter = (
            None
            if filtering.filter == "none"
            else TrainingFilter(filtering, model.prediction_type, self.schedule.alphas_cumprod)
        )
        self.captions = _Captions(model, size)
        self.log = _GrowingFile(out / "training.csv")
        self.filter_log = _GrowingFile(out / "filter.jsonl")
        self.step = 0
        self.accelerator = Accelerator(
            cpu=model.device.type == "cpu",
            mixed_precision=wanted.mixed_precision,
            gradient_accumulation_steps=wanted.gradient_accumulation,
        )
        if self.accelerator.num_processes > 1:
            raise ValueError("fine-tuning runs in one process: start it without more of them")
        unet = model.pipeline.unet
        self.parameters = _trained(unet, wanted)
        if wanted.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW(self.parameters.values(), wanted.learning_rate, weight_decay=wanted.weight_decay)
        name = wanted.learning_rate_schedule
        rate = get_scheduler(
            "constant_with_warmup" if name == "constant" else name,
            optimizer,
            num_warmup_steps=wanted.learning_rate_warm_up,
            num_training_steps=self.plan.steps,
        )
        self.ema = EMAModel(self.parameters.values(), decay=wanted.ema, foreach=True) if wanted.ema else None
        self.unet, self.optimizer, self.rate = self.accelerator.prepare(unet, optimizer, rate)
        self.unet.train()
        self.accelerator.register_save_state_pre_hook(self._write)
        self.accelerator.register_load_state_pre_hook(self._read)

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *error: object) -> None:
        from accelerate.state import AcceleratorState

        self.accelerator.free_memory()
        unet = self.accelerator.unwrap_model(self.unet, keep_fp32_wrapper=False)
        unet.eval().requires_grad_(False)
        unet.disable_gradient_checkpointing()
        AcceleratorState._reset_state(reset_partial_state=True)

    # ------------------------------------------------------------------------------------ training

    def train(self, on_progress: Callable[[int, int], None], stop: Callable[[], bool]) -> None:
        self._resume()
        self.log.cut()
        self.filter_log.cut()
        on_progress(self.step, self.plan.steps)
        while self.step < self.plan.steps:
            self._step()
            last = self.step == self.plan.steps
            epochs = self.plan.epochs_done(self.step)
            ended = epochs > self.plan.epochs_done(self.step - 1)
            if last:
                self._save("")
            elif ended and epochs % self.wanted.save_every == 0:
                self._save(f"-epoch-{epochs:04}")
            stopping = stop() and not last
            if last or stopping or self.step % self.wanted.state_every == 0:
                self._write_state()
            on_progress(self.step, self.plan.steps)
            if stopping:
                raise Stopped(f"stopped after {self.step} of {self.plan.steps} steps; the same command goes on there")

    def _step(self) -> None:
        losses, kept, seen = [], 0, 0
        for part in range(self.wanted.gradient_accumulation):
            batch = self._batch(self.step * self.wanted.gradient_accumulation + part)
            with self.accelerator.accumulate(self.unet):
                loss, stay = filtered_loss(self.unet, self.schedule, self.model.prediction_type, batch, self.filter)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(list(self.parameters.values()), 1.0)
                rate = self.rate.get_last_lr()[0]
                self.optimizer.step()
                self.rate.step()
                self.optimizer.zero_grad()
            losses.append(loss.detach())
            kept, seen = kept + int(stay.sum()), seen + len(stay)
        if self.ema is not None:
            self.ema.step(self.parameters.values())
        self.step += 1
        row = {
            "step": self.step,
            "epoch": self.plan.epochs_done(self.step - 1) + 1,
            "loss": float(torch.stack(losses).mean()),
            "kept_share": kept / seen,
            "learning_rate": rate,
        }
        if not np.isfinite(row["loss"]):
            raise ValueError(
                f"the loss of step {self.step} is not finite (NaN or infinity): lower the learning rate, "
                "or train in a higher precision"
            )
        self.log.add_row(row)
        if self.filter is not None:
            text = io.StringIO()
            self.filter.write_log(text)
            self.filter_log.add(text.getvalue())

    def _batch(self, number: int) -> Batch:
        generator = torch.Generator().manual_seed(_seed(self.wanted.seed, number))
        size = self.wanted.batch_size
        chosen = [self._sample(place) for place in range(number * size, (number + 1) * size)]
        dropped = (torch.rand(size, generator=generator) < self.wanted.caption_dropout).tolist()
        captions = ["" if drop else self.samples.captions[n] for n, drop in zip(chosen, dropped, strict=True)]
        latents = self.samples.latents[chosen]
        timesteps = stratified_timesteps(size, len(self.schedule), generator)
        noise = torch.randn(latents.shape, generator=generator)
        conditioning, empty = self.captions.together(captions)
        device = self.model.device
        names = [self.samples.names[n] for n in chosen]
        return Batch(latents.to(device), conditioning, empty, timesteps.to(device), noise.to(device), names)

    def _sample(self, place: int) -> int:
        epoch, within = divmod(place, self.plan.epoch)
        return self.order[_permutation(self.plan.epoch, self.wanted.seed, epoch)[within]]

    # ------------------------------------------------------------------------------ state and result

    def _resume(self) -> None:
        states = sorted(path for path in self.out.glob(f"{_STATE}*") if path.suffix != PARTIAL)
        for left in self.out.glob(f"*{PARTIAL}"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        if states:
            try:
                self.accelerator.load_state(str(states[-1]))
            except (SafetensorError, KeyError, TypeError, ValueError, EOFError, RuntimeError, UnpicklingError) as error:
                raise ValueError(
                    f"{states[-1]} is damaged ({one_line(error)}): remove it, and training goes on from the beginning"
                ) from error

    def _write_state(self) -> None:
        self._check_weights()
        path = self.out / f"{_STATE}{self.step:08}"
        with replacing(path) as partial:
            self.accelerator.save_state(str(partial))
        for older in self.out.glob(f"{_STATE}*"):
            if older != path:
                shutil.rmtree(older)

    def _write(self, models: list[Any], weights: list[Any], folder: str) -> None:
        """accelerate's hook: the trained weights alone, in files that hold nothing but numbers and texts."""
        weights.clear()
        trained = {name: parameter.detach().contiguous() for name, parameter in self.parameters.items()}
        write_tensors(Path(folder, "trained.safetensors"), trained)
        progress: dict[str, Any] = {"step": self.step, "log": self.log.size, "filter_log": self.filter_log.size}
        if self.filter is not None:
            progress["filter"] = self.filter.state_dict()
        if self.ema is not None:
            state = self.ema.state_dict()
            averaged = state.pop("shadow_params")
            values = {name: value.contiguous() for name, value in zip(self.parameters, averaged, strict=True)}
            write_tensors(Path(folder, "averaged.safetensors"), values)
            progress["ema"] = state
        write_text(Path(folder, "progress.json"), json.dumps(progress))

    def _read(self, models: list[Any], folder: str) -> None:
        models.clear()
        device = self.model.device
        trained = load_file(Path(folder, "trained.safetensors"))
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(trained[name])
        progress = json.loads(Path(folder, "progress.json").read_text(encoding="utf-8"))
        self.step, self.log.size, self.filter_log.size = progress["step"], progress["log"], progress["filter_log"]
        if self.filter is not None:
            self.filter.load_state_dict(progress["filter"])
        if self.ema is not None:
            averaged = load_file(Path(folder, "averaged.safetensors"))
            self.ema.load_state_dict({**progress["ema"], "shadow_params": [averaged[k] for k in self.parameters]})
            self.ema.to(device)

    def _check_weights(self) -> None:
        """Raises ValueError for weights that are no result."""
        try:
            check_finite(self.parameters, f"the result of step {self.step}")
        except ValueError as error:
            raise ValueError(f"{error}: lower the learning rate, or train in a higher precision") from error

    def _save(self, ending: str) -> None:
        with self._averaged():
            self._check_weights()
            if self.wanted.rank is None:
                path = self.out / f"model{ending}"
                with replacing(path) as partial:
                    with quiet():
                        self.model.pipeline.save_pretrained(partial, safe_serialization=True)
                    shutil.rmtree(path, ignore_errors=True)
            else:
                self._save_lora(self.out / f"lora{ending}.safetensors")

    def _save_lora(self, path: Path) -> None:
        """In kohya's names, which every host reads: ComfyUI passes over those that diffusers writes."""
        from peft.utils import get_peft_model_state_dict

        tensors: dict[str, torch.Tensor] = {}
        for key, value in get_peft_model_state_dict(self.model.pipeline.unet).items():
            module, _, side = key.removesuffix(".weight").rpartition(".")
            name = f"lora_unet_{module.replace('.', '_')}"
            tensors[f"{name}.{_KOHYA[side]}.weight"] = value.detach().cpu().contiguous()
            tensors[f"{name}.alpha"] = torch.tensor(float(self.wanted.rank or 0))
        write_tensors(path, tensors)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """While open, the trained weights are the averaged ones where there are any."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters.values())
        self.ema.copy_to(self.parameters.values())
        try:
            yield
        finally:
            self.ema.restore(self.parameters.values())

    def summary(self, description: str) -> dict[str, Any]:
        kind = "model" if self.wanted.rank is None else "lora.safetensors"
        return {
            "result": kind,
            "model": self.model.name,
            "source": description,
            "samples": len(self.samples.names),
            "shown_in_an_epoch": self.plan.epoch,
            "steps": self.step,
            "trained_parameters": sum(p.numel() for p in self.parameters.values()),
            "filter": self.filter and {**asdict(self.filter.counts), "kept_share": self.filter.counts.kept_share},
            "skipped": [{"name": name, "reason": why, "kind": kind} for name, why, kind in self.samples.skipped],
        }


# ------------------------------------------------------------------------------------------- its parts


class _Captions:
    """Conditionings of captions, the recently used ones kept; shorter ones are filled up with empty chunks."""

    def __init__(self, model: Trainable, size: tuple[int, int]) -> None:
        self._model, self._size = model, size
        self._of = lru_cache(_KNOWN_CAPTIONS)(self._encoded)
        self._empty = self._encoded("")

    def together(self, captions: Sequence[str]) -> tuple[Conditioning, Conditioning]:
        """The conditioning of a batch, and that of the empty prompt with as many rows (batch 1)."""
        found = [self._of(caption) for caption in captions]
        rows = max(c.rows.shape[1] for c in found)
        return stack([self._filled(c, rows) for c in found]), self._filled(self._empty, rows)

    def _encoded(self, caption: str) -> Conditioning:
        made = self._model.encode(caption, self._size)
        return Conditioning(made.rows, made.extras)

    def _filled(self, conditioning: Conditioning, rows: int) -> Conditioning:
        lacking = (rows - conditioning.rows.shape[1]) // self._empty.rows.shape[1]
        return conditioning.with_rows(torch.cat([conditioning.rows, *[self._empty.rows] * lacking], dim=1))


class _GrowingFile:
    """A text file that is cut back to where a state was written, as what comes after it is done again."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0

    def cut(self) -> None:
        with self.path.open("ab") as file:
            file.truncate(self.size)

    def add(self, text: str) -> None:
        data = text.encode()
        try:
            with self.path.open("ab") as file:
                file.write(data)
        except OSError as error:
            raise not_kept(self.path, error) from error
        self.size += len(data)

    def add_row(self, row: dict[str, Any]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, row, lineterminator="\n")
        if self.size == 0:
            writer.writeheader()
        writer.writerow(row)
        self.add(text.getvalue())


def _trained(unet: Any, wanted: FinetuneSettings) -> dict[str, torch.nn.Parameter]:
    """The parameters to train, in fp32; a LoRA's frozen UNet goes to the precision of the evaluations."""
    unet.requires_grad_(False)
    if wanted.rank is None:
        unet.float().requires_grad_(True)
    else:
        from peft import LoraConfig

        torch.manual_seed(wanted.seed)
        precision = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(wanted.mixed_precision, torch.float32)
        torch.nn.Module.to(unet, precision)  # diffusers' own warns of modules it keeps in fp32: here none
        unet.add_adapter(
            LoraConfig(
                r=wanted.rank,
                lora_alpha=wanted.rank,
                init_lora_weights="gaussian",
                target_modules=list(TRAINED_BY_LORA),
            )
        )
    parameters = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    return parameters


def _schedule(model: Trainable) -> Schedule:
    """On the model's device."""
    if not isinstance(model.schedule, Schedule):
        raise ValueError(
            f"{model.name} predicts {model.prediction_type!r}; only epsilon and v_prediction models can be fine-tuned "
            "here: give another model"
        )
    return Schedule(model.schedule.alphas_cumprod.to(model.device))


def _size(model: Trainable, wanted: FinetuneSettings) -> tuple[int, int]:
    """(height, width) of the images in pixels."""
    if wanted.resolution is None:
        return model.image_size
    step = model.image_size[0] // model.latent_shape[1] * 2 ** (len(model.pipeline.unet.config.block_out_channels) - 1)
    if wanted.resolution % step:
        raise ValueError(f"resolution must be a multiple of {step} for this model, not {wanted.resolution}")
    return wanted.resolution, wanted.resolution


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(_seed(seed, epoch, 1))).tolist()
