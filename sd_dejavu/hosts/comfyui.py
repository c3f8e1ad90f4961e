"""ComfyUI's models as a denoiser for the core, and a monitor that watches its samplers.

Nothing here outlives a run: the monitor works through wrappers that the host itself registers on a clone of the
model, and gradients are taken through aliases of the weights that are put back before anything else runs. The
host executes prompts in inference mode, where nothing can be differentiated; an alias is a normal tensor on the
same storage (no copy), which can.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import comfy.conds
import comfy.model_management
import comfy.model_sampling
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor

from ..calibration import store
from ..calibration.calibrate import calibrate as run_calibration
from ..calibration.ordinary_prompts import ordinary_prompts
from ..calibration.profile import ORDINARY_QUANTILE, Profile, Setting
from ..conditioning import Conditioning, EncoderInput, Reencoding, TokenRow, Unconditional, align
from ..demo import bundled
from ..denoiser import Predictions, PredictionType, seeded_noise
from ..explain import confirmed_gradient, output_gradient
from ..measure import Measurement
from ..mitigations import Outcome, Start, available
from ..mitigations.optimise_conditioning import Settings as OptimiseSettings
from ..monitor import Monitoring, Report, Watch, flagged
from ..prompt_weights import parse

SOURCE = "dejavu_source"  # key in a conditioning's dict that holds its Source
FINGERPRINT = "dejavu_fingerprint"  # attachment of a model whose fingerprint is known
KEY = "dejavu"
RUNS_KEPT = 8

log = logging.getLogger("dejavu")


class Stopped(RuntimeError):
    """The monitor was told to end flagged runs, and this one was flagged."""


# --------------------------------------------------------------------------------- text encoding


@dataclass(frozen=True)
class Source:
    """Where a conditioning came from: the text and the encoder; travels in the conditioning's dict."""

    clip: Any
    text: str


def encode_text(clip: Any, text: str) -> list[list[Any]]:
    """What CLIPTextEncode gives, with the text and the encoder kept along. Raises ValueError without a CLIP."""
    if clip is None:
        raise ValueError("the CLIP input is empty: the checkpoint that was loaded may hold no text encoder")
    encoded = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    for entry in encoded:
        entry[1][SOURCE] = Source(clip, text)
    return encoded


def conditioning_of(rows: Tensor, options: dict[str, Any]) -> Conditioning:
    """One entry of a host's conditioning as the core's, with words and way back where the encoder is known.

    Without a source the tokens stay unknown: rows can be measured and optimised, words not named.
    """
    pooled = options.get("pooled_output")
    extras = {} if pooled is None else {"pooled_output": pooled}
    source: Source | None = options.get(SOURCE)
    if source is None:
        return Conditioning(rows, extras)
    found = _encode(source.clip, source.text)
    # The host may have changed the rows since (averaged, concatenated, zeroed): then the words no longer fit them.
    if found.rows.shape != rows.shape or not torch.allclose(found.rows.to(rows), rows, atol=1e-3, rtol=1e-3):
        return Conditioning(rows, extras)
    return replace(found, rows=rows, extras=extras)


def _encode(clip: Any, text: str) -> Conditioning:
    """The conditioning of a text, encoded where the encoder's weights lie.

    The host's own call would load the encoder first, which in the middle of a run may push the sampled model out.
    """
    tokens = clip.tokenize(text)
    if not set(tokens) <= {"l", "g", "h"}:
        with torch.no_grad():
            rows, extras = _run_encoder(clip, tokens)
        return Conditioning(rows, extras, text)
    encoders = [_Encoder(clip, name, tokens[name]) for name in sorted(tokens, key="lgh".index)]
    read = parse(text)
    words, _ = align(read.text, [])
    rows_of = [encoder.token_rows(read.text) for encoder in encoders]

    def encode_from(embeddings: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        with ExitStack() as hooks:
            for encoder, given in zip(encoders, embeddings, strict=True):
                hooks.enter_context(encoder.replaced(given))
            return _run_encoder(clip, tokens)

    with torch.no_grad():
        rows, extras = _run_encoder(clip, tokens)
        reencoding = None
        if all(encoder.is_plain for encoder in encoders):
            inputs = (EncoderInput(e.embeddings(), r) for e, r in zip(encoders, rows_of, strict=True))
            reencoding = Reencoding(tuple(inputs), encode_from)
    typed = tuple(replace(w, start=read.places[w.start], end=read.places[w.end - 1] + 1) for w in words)
    known = rows_of[0] if len(rows_of[0]) == rows.shape[1] else ()
    return Conditioning(rows, extras, text, typed, known, reencoding)


def _run_encoder(clip: Any, tokens: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    encoder = clip.cond_stage_model
    encoder.reset_clip_options()
    if clip.layer_idx is not None:
        encoder.set_clip_options({"layer": clip.layer_idx})
    rows, pooled = encoder.encode_token_weights(tokens)[:2]
    return rows, {} if pooled is None else {"pooled_output": pooled}


class _Encoder:
    """One CLIP encoder of a host's text model, with the chunks of (token, weight) it is about to read."""

    def __init__(self, clip: Any, name: str, chunks: list[list[tuple[Any, float]]]) -> None:
        self.chunks = chunks
        self._tokenizer = getattr(clip.tokenizer, f"clip_{name}")
        self._table = getattr(clip.cond_stage_model, f"clip_{name}").transformer.get_input_embeddings()

    @property
    def is_plain(self) -> bool:
        """No textual inversions: those are vectors, not tokens of the table."""
        return not any(isinstance(token, Tensor) for chunk in self.chunks for token, _ in chunk)

    def token_rows(self, text: str) -> tuple[TokenRow, ...]:
        pieces: list[str] = []
        roles: list[Any] = []
        for chunk in self.chunks:
            ended = False
            for number, (token, _) in enumerate(chunk):
                is_vector = isinstance(token, Tensor)
                ended = ended or (not is_vector and number > 0 and token == self._tokenizer.end_token)
                roles.append("start" if number == 0 else "end" if ended else "word")
                pieces.append("" if is_vector else self._tokenizer.inv_vocab.get(token, ""))
        _, owners = align(text, [p for p, role in zip(pieces, roles, strict=True) if role == "word"])
        place = iter(owners)
        return tuple(
            TokenRow(piece, role, next(place) if role == "word" else None)
            for piece, role in zip(pieces, roles, strict=True)
        )

    def embeddings(self) -> Tensor:
        """[chunks * tokens, d] of the tokens, as they enter the encoder."""
        numbers = torch.tensor([[token for token, _ in chunk] for chunk in self.chunks])
        weight = self._table.weight
        return self._table(numbers.to(weight.device), out_dtype=torch.float32).flatten(0, 1)

    @contextmanager
    def replaced(self, embeddings: Tensor) -> Iterator[None]:
        """While open, the table gives these instead; it is asked once a chunk, and then for the empty prompt."""
        parts = iter(embeddings.split([len(chunk) for chunk in self.chunks]))

        def give(module: Any, arguments: Any, output: Tensor) -> Tensor:
            part = next(parts, None)
            return output if part is None else part[None].to(output)

        handle = self._table.register_forward_hook(give)
        try:
            yield
        finally:
            handle.remove()


# -------------------------------------------------------------------------------------- gradients


@contextmanager
def _differentiable(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Out of inference mode, with every inference tensor of the modules aliased to a normal one; all put back."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autograd.graph.allow_mutation_on_saved_tensors(),
        ExitStack() as stack,
    ):
        for module in modules:
            stack.enter_context(_aliased(module))
        yield


@contextmanager
def _aliased(module: torch.nn.Module) -> Iterator[None]:
    taken: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for part in module.modules():
            for table in (part._parameters, part._buffers):
                for name, tensor in table.items():
                    if tensor is not None and tensor.is_inference():
                        taken.append((table, name, tensor))
                        table[name] = _alias(tensor, is_parameter=table is part._parameters)
        yield
    finally:
        for table, name, tensor in taken:
            table[name] = tensor


def _alias(tensor: Tensor, is_parameter: bool) -> Any:
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        raise ValueError(f"gradients cannot be taken through {type(tensor).__name__} weights: load a plain checkpoint")
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    return torch.nn.Parameter(alias, requires_grad=False) if is_parameter else alias


def _normal(tensor: Tensor) -> Tensor:
    """A tensor that may be saved for backward."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor


# ------------------------------------------------------------------------------------------ model


def prediction_type_of(sampling: Any) -> PredictionType:
    """What the network puts out, from the host's model_sampling object. Raises ValueError for others."""
    if isinstance(sampling, comfy.model_sampling.V_PREDICTION):
        return "v_prediction"
    if isinstance(sampling, comfy.model_sampling.CONST):
        return "flow"
    if isinstance(sampling, comfy.model_sampling.EPS):
        return "epsilon"
    raise ValueError(f"models that sample by {type(sampling).__mro__[1].__name__} cannot be measured")


class ComfyModel:
    """A model during a run of the host, as the core's denoiser.

    ``entry`` is the host's processed conditioning whose rows are replaced; control nets, areas, masks and whatever
    else it carries stay as they are.
    """

    def __init__(
        self, patcher: Any, inner: Any, entry: dict[str, Any], model_options: dict[str, Any], sigmas: Tensor, x: Tensor
    ) -> None:
        self._patcher, self._inner, self._entry = patcher, inner, entry
        self._options = model_options
        self._sigmas = [float(s) for s in sigmas]
        self._device, self.latent_shape = x.device, tuple(x.shape[1:])
        self.prediction_type = prediction_type_of(inner.model_sampling)
        self.clip = source.clip if (source := entry.get(SOURCE)) is not None else None
        self.name = "the loaded model"
        self._plain_attention = False

    @property
    def fingerprint(self) -> str:
        return fingerprint(self._patcher)

    @property
    def brought_along(self) -> tuple[Path, ...]:
        """Profiles that came with the model: the bundled one has some."""
        return bundled.CALIBRATIONS if FINGERPRINT in self._patcher.attachments else ()

    def sigmas(self, steps: int) -> list[float]:
        """The run's own noise levels, whatever the number of steps asked for."""
        return self._sigmas

    def noise(self, seed: int, images: int) -> Tensor:
        return seeded_noise(self.latent_shape, seed, images).to(self._device)

    def encode(self, prompt: str) -> Conditioning:
        """Raises ValueError where the text encoder is not at hand."""
        if self.clip is None:
            raise ValueError("the text encoder is not at hand: encode the prompt with the Déjà Vu Text Encode node")
        return _encode(self.clip, prompt)

    def decode(self, latents: Tensor) -> Tensor:
        raise ValueError("pictures are decoded by the host's own nodes")

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        return self.calculate([self.entry_with(conditioning, x)], x, sigma)

    def calculate(self, entries: list[dict[str, Any]], x: Tensor, sigma: Tensor) -> Tensor:
        """The host's own prediction for a list of its processed conditionings."""
        options = self._options
        if self._plain_attention:
            transformer = {**options.get("transformer_options", {}), "optimized_attention_override": _attention}
            options = {**options, "transformer_options": transformer}
        (found,) = comfy.samplers.calc_cond_batch(self._inner, [entries], _normal(x), _normal(sigma), options)
        return found.float()

    def entry_with(self, conditioning: Conditioning, x: Tensor) -> dict[str, Any]:
        """The entry with other rows, and with the pooled vector that belongs to them."""
        entry = dict(self._entry)
        held = {}
        for name, cond in entry["model_conds"].items():
            value = getattr(cond, "cond", None)
            held[name] = cond._copy_with(_normal(value)) if isinstance(value, Tensor) else cond
        rows = _normal(conditioning.rows).to(x.device)
        held["c_crossattn"] = comfy.conds.CONDCrossAttn(rows)
        pooled = conditioning.extras.get("pooled_output")
        if pooled is not None and "y" in held:
            height, width = x.shape[-2] * 8, x.shape[-1] * 8
            sizes = {"width": width, "height": height, "prompt_type": "positive"}
            settings = {**sizes, **entry, "device": x.device, "noise": x, "pooled_output": _normal(pooled)}
            held["y"] = comfy.conds.CONDRegular(self._inner.encode_adm(**settings))
        entry["model_conds"] = held
        # The host reuses what it computed for a conditioning of the same number.
        return {**entry, "cross_attn": rows, "uuid": uuid.uuid4()}

    @contextmanager
    def differentiable(self, checkpointing: bool = False) -> Iterator[None]:
        """Gradients through the model and, where it is at hand, the text encoder."""
        modules = [self._inner, *([self.clip.cond_stage_model] if self.clip is not None else [])]
        before = self._plain_attention
        try:
            self._plain_attention = True
            with _differentiable(modules), _checkpointed(self._inner.diffusion_model, checkpointing):
                yield
        finally:
            self._plain_attention = before


def _attention(function: Any, *arguments: Any, **settings: Any) -> Tensor:
    """PyTorch's own attention: every other kind of the host may lack a backward pass."""
    return attention_pytorch(*arguments, **settings)


@contextmanager
def _checkpointed(network: torch.nn.Module, wanted: bool) -> Iterator[None]:
    """While open, the blocks of the network recompute their activations in the backward pass."""
    if not wanted:
        yield
        return
    lists = [
        getattr(network, name, None) for name in ("input_blocks", "output_blocks", "joint_blocks", "double_blocks")
    ]
    blocks = [block for part in lists if part is not None for block in part]
    plain = []
    try:
        for block in (
            inner for outer in blocks for inner in (outer if isinstance(outer, torch.nn.Sequential) else [outer])
        ):
            plain.append(block)
            block.forward = _recomputing(block.forward)
        yield
    finally:
        for block in plain:
            del block.forward  # the class's own shows again


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **settings: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(forward, *arguments, use_reentrant=False, **settings)

    return run


def fingerprint(patcher: Any) -> str:
    """16 hexadecimal digits from names, shapes and sampled values of the network's weights, patches included.

    Weights that a patch has changed in place are read from the host's backup of them.
    """
    found = _fingerprints.setdefault(patcher.model, {})
    if patcher.patches_uuid not in found:
        found[patcher.patches_uuid] = _fingerprint(patcher)
    return found[patcher.patches_uuid]


_fingerprints: WeakKeyDictionary[Any, dict[Any, str]] = WeakKeyDictionary()


def _fingerprint(patcher: Any) -> str:
    known = patcher.attachments.get(FINGERPRINT)
    if known is not None and not patcher.patches:
        return str(known)
    digest = hashlib.sha256()
    if known is not None:
        digest.update(str(known).encode())
    else:
        for key, value in sorted(patcher.model.diffusion_model.state_dict().items()):
            kept = patcher.backup.get(f"diffusion_model.{key}")
            _sample(digest, key, kept.weight if kept is not None else value)
    for key in sorted(patcher.patches, key=str):
        for strength, patch, on_model, *_ in patcher.patches[key]:
            digest.update(f"{key}{strength}{on_model}".encode())
            for tensor in _tensors(patch):
                _sample(digest, "", tensor)
    return digest.hexdigest()[:16]


def _sample(digest: Any, key: str, value: Tensor) -> None:
    flat = value.detach().reshape(-1)
    chosen = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
    digest.update(f"{key}{tuple(value.shape)}".encode() + chosen.numpy().tobytes())


def _tensors(patch: Any) -> Iterator[Tensor]:
    if isinstance(patch, Tensor):
        yield patch
    elif isinstance(patch, (tuple, list)):
        for part in patch:
            yield from _tensors(part)
    elif hasattr(patch, "weights"):
        yield from _tensors(patch.weights)


class _Body(comfy.samplers.Sampler):
    """Runs a function where a sampler would run: models loaded, conditionings processed."""

    def __init__(self, work: Callable[[ComfyModel, Tensor, Tensor], Any]) -> None:
        self._work = work
        self.result: Any = None

    def sample(  # the host's signature
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        entry = model_wrap.conds["positive"][0]
        model = ComfyModel(
            model_wrap.model_patcher, model_wrap.inner_model, entry, extra_args["model_options"], sigmas, noise
        )
        sampling = model_wrap.inner_model.model_sampling
        start = torch.zeros_like(noise) if latent_image is None else latent_image
        x = sampling.noise_scaling(sigmas[0], noise.clone(), start, self.max_denoise(model_wrap, sigmas))
        self.result = self._work(model, x, sigmas[0].expand(x.shape[0]))
        return start


def with_model(
    patcher: Any,
    positive: Any,
    latent: Tensor,
    noise: Tensor,
    sigmas: Tensor,
    work: Callable[[ComfyModel, Tensor, Tensor], Any],
) -> Any:
    """``work(model, x, sigma)`` at the start of the run that a sampler would make of this noise and these sigmas."""
    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds(positive, positive)
    body = _Body(work)
    guider.sample(noise, latent, body, sigmas, disable_pbar=True)
    return body.result


# ---------------------------------------------------------------------------------------- monitor


@dataclass
class Run:
    """One run of a sampler under a monitor."""

    watch: Watch
    evaluations: int = 0
    output: tuple[Any, ...] | None = None
    negative: Unconditional | None = None  # what the host's negative conditioning was found to be
    from_picture: bool = False
    cond: Tensor | None = field(default=None, repr=False)
    uncond: Tensor | None = field(default=None, repr=False)


class Monitor:
    """Watches every run of the models it is attached to; keeps the last few."""

    def __init__(
        self, monitoring: Monitoring, profile: Profile | None = None, folder: Path | None = None, clip: Any = None
    ) -> None:
        """``profile`` is the user's choice; without one those of ``folder`` are looked through."""
        self.monitoring = monitoring
        self._profile, self._folder, self._clip = profile, folder, clip
        self.runs: deque[Run] = deque(maxlen=RUNS_KEPT)
        self._open: list[Run] = []
        self._lock = threading.Lock()

    def attach(self, patcher: Any) -> Any:
        """A clone of the model whose runs are watched."""
        types = comfy.patcher_extension.WrappersMP
        clone = patcher.clone()
        key = f"{KEY}-{uuid.uuid4().hex[:8]}"
        # Plain functions: the host deep-copies what it finds, and a method would bring its object along.
        clone.add_wrapper_with_key(types.OUTER_SAMPLE, key, lambda *a, **k: self._outer_sample(*a, **k))
        clone.add_wrapper_with_key(types.PREDICT_NOISE, key, lambda *a, **k: self._predict_noise(*a, **k))
        return clone

    def report_of(self, samples: Tensor) -> Report:
        """The report on the run that gave these samples."""
        run = self._run_of(samples)
        return Report.missing("no sampler has used the monitored model") if run is None else Report.of(run.watch)

    def _run_of(self, samples: Tensor) -> Run | None:
        """The finished run that gave these samples; the last finished one where none did."""
        wanted = _digest(samples)
        with self._lock:
            finished = [run for run in self.runs if run.watch.finished]
        matching = [run for run in finished if run.output == wanted] or finished
        return matching[-1] if matching else None

    def _outer_sample(
        self, executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *a: Any, **k: Any
    ) -> Tensor:
        guider = executor.class_obj
        run = Run(Watch(self.monitoring), from_picture=bool(torch.count_nonzero(latent_image)))
        self._open.append(run)
        options = guider.model_options
        before = options.get("sampler_post_cfg_function", [])

        def read(arguments: dict[str, Any]) -> Tensor:
            with self._guarded(run):
                self._read(run, guider, arguments)
            return arguments["denoised"]

        options["sampler_post_cfg_function"] = [*before, read]
        try:
            samples = executor(noise, latent_image, sampler, sigmas, *a, **k)
            run.watch.finished = True
        finally:
            options["sampler_post_cfg_function"] = before
            self._open.remove(run)
            if run.evaluations:
                with self._lock:
                    self.runs.append(run)
        with self._guarded(run):
            run.output = _digest(samples)
        return samples

    @contextmanager
    def _guarded(self, run: Run) -> Iterator[None]:
        """Our own faults never cost a picture; the host's interruption, and ending a flagged run, pass."""
        try:
            yield
        except (comfy.model_management.InterruptProcessingException, Stopped):
            raise
        except Exception as error:
            if isinstance(error, comfy.model_management.OOM_EXCEPTION):
                comfy.model_management.soft_empty_cache()
                text = "there was not enough memory: choose 'remove-trigger', or a smaller batch"
            else:
                text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            if text not in run.watch.notes:  # a fault of every step is told once
                log.warning("[Déjà Vu] no verdict: %s", text, exc_info=not isinstance(error, ValueError))
            run.watch.note(text)

    def _predict_noise(
        self, executor: Any, x: Tensor, timestep: Tensor, model_options: Any = None, seed: Any = None
    ) -> Tensor:
        options = {} if model_options is None else model_options
        denoised = executor(x, timestep, options, seed)
        if not self._open:
            return denoised
        run, guider = self._open[-1], executor.class_obj
        changed = None
        with self._guarded(run):
            changed = self._after(run, guider, x, timestep, options)
        run.evaluations += 1
        run.cond = run.uncond = None
        if changed is None:
            return denoised
        denoised = executor(x, timestep, options, seed)
        if run.uncond is None:
            with self._guarded(run):
                self._measure_apart(run, changed, guider, x, timestep)
        run.cond = run.uncond = None
        return denoised

    # ------------------------------------------------------------------------------- reading

    def _read(self, run: Run, guider: Any, arguments: dict[str, Any]) -> None:
        """Take one guidance step in, if it tells both predictions; see :meth:`_after` for those that do not."""
        positive, negative = guider.conds.get("positive"), guider.conds.get("negative")
        sigma = arguments["sigma"]
        if arguments.get("cond") is not positive or not _covers(positive, sigma):
            return
        run.cond = arguments["cond_denoised"]
        if arguments.get("uncond") is None:
            return
        kind: Unconditional
        if "empty_cond_denoised" in arguments:  # perpendicular negative guidance
            unconditional, kind = arguments["empty_cond_denoised"], "empty prompt"
        elif arguments["uncond"] is negative and _covers(negative, sigma):
            unconditional, kind = arguments["uncond_denoised"], self._kind(run, positive, negative)
        else:
            return
        if kind == "negative prompt" and self.monitoring.without == "empty prompt":
            return
        run.uncond = unconditional
        run.watch.trace.record(Predictions(run.cond, unconditional, sigma, kind))

    def _after(self, run: Run, guider: Any, x: Tensor, sigma: Tensor, options: dict[str, Any]) -> ComfyModel | None:
        """After an evaluation: measure what guidance did not tell, then explain and mitigate.

        The model where the evaluation shall be run again, with another conditioning.
        """
        watch = run.watch
        if x.ndim != 4:
            watch.note("only pictures can be measured, this model draws something else")
            return None
        positive = guider.conds["positive"]
        model = None
        if run.evaluations == 0 or (run.uncond is None and watch.measures(run.evaluations)):
            sigmas = options.get("transformer_options", {}).get("sample_sigmas", sigma[:1])
            model = ComfyModel(guider.model_patcher, guider.inner_model, positive[0], options, sigmas, x)
            model.clip = model.clip or self._clip
        if run.uncond is None:
            if model is None or not watch.measures(run.evaluations):
                watch.trace.skip(sigma[0], "guidance is off here, and only the steps of the score are measured")
            else:
                self._measure_apart(run, model, guider, x, sigma)
        if run.evaluations or model is None:
            return None
        self._identify(run, model, guider)
        return model if self._act(run, model, guider, x, sigma) else None

    def _kind(self, run: Run, positive: Any, negative: Any) -> Unconditional:
        if run.negative is None:
            source = positive[0].get(SOURCE)
            run.negative = _kind_of(negative, source.clip if source is not None else self._clip)
        return run.negative

    def _measure_apart(self, run: Run, model: ComfyModel, guider: Any, x: Tensor, sigma: Tensor) -> None:
        """Evaluations of our own where guidance has none to read: cfg 1, other guiders, another 'without'."""
        positive, negative = guider.conds["positive"], guider.conds.get("negative")
        kind: Unconditional
        if not _covers(positive, sigma):
            run.watch.trace.skip(sigma[0], "the prompt does not act on the whole picture here (an area, mask or range)")
            return
        with torch.no_grad():
            if self.monitoring.without == "negative prompt" and negative and _covers(negative, sigma):
                without, kind = model.calculate(negative, x, sigma), self._kind(run, positive, negative)
            elif model.clip is not None:
                without, kind = model(x, sigma, model.encode("")), "empty prompt"
            else:
                run.watch.trace.skip(
                    sigma[0],
                    "guidance gives nothing to measure against here, and the empty prompt needs the text encoder: "
                    "encode the prompt with the Déjà Vu Text Encode node",
                )
                return
            run.uncond = without
            conditional = model.calculate(positive, x, sigma) if run.cond is None else run.cond
            run.watch.trace.record(Predictions(conditional, without, sigma, kind))

    def _identify(self, run: Run, model: ComfyModel, guider: Any) -> None:
        watch = run.watch
        source = guider.conds["positive"][0].get(SOURCE)
        watch.prompt = source.text if source is not None else ""
        without = watch.trace.without or self.monitoring.without
        scale = float(getattr(guider, "cfg", 1.0))
        watch.setting = _setting(model, without, guider.conds.get("negative"), scale, run.from_picture)
        watch.profile = self._profile or _profile_for(watch.setting, model, self.monitoring, self._folder)

    # -------------------------------------------------------------------------------- acting

    def _act(self, run: Run, model: ComfyModel, guider: Any, x: Tensor, sigma: Tensor) -> bool:
        watch, wanted = run.watch, self.monitoring
        if wanted.when_flagged == "report" and wanted.explain == "never":
            return False  # nothing to decide now, so nothing is waited for
        is_flagged = bool(flagged(watch.verdicts("first step")))
        entries = guider.conds["positive"]
        explaining = wanted.explain == "always" or (wanted.explain == "flagged" and is_flagged)
        mitigating = is_flagged and wanted.when_flagged == "mitigate"
        if run.uncond is None or not (explaining or is_flagged):
            return False
        conditioning = self._conditioning(watch, entries) if explaining or mitigating else None
        if explaining and conditioning is not None and conditioning.tokens:
            view = confirmed_gradient if conditioning.reencoding is not None else output_gradient
            with self._guarded(run), model.differentiable():
                watch.explanation = view.explain(
                    model, x.clone(), sigma.clone(), conditioning, run.uncond.float().clone()
                )
        if is_flagged and wanted.when_flagged == "stop":
            raise Stopped(_stop_message(watch))
        if not mitigating or conditioning is None:
            return False
        changed = self._mitigated(watch, model, conditioning, x, sigma, run.uncond)
        guider.conds["positive"] = [model.entry_with(changed, x)]
        return True

    def _conditioning(self, watch: Watch, entries: list[dict[str, Any]]) -> Conditioning | None:
        if len(entries) != 1:
            watch.note(f"the prompt is combined from {len(entries)} conditionings, so its words are not told apart")
            return None
        if entries[0].get("cross_attn") is None:
            watch.note("this conditioning has no rows to explain or change")
            return None
        found = conditioning_of(entries[0]["cross_attn"], entries[0])
        if not found.tokens:
            watch.note("the words are not known: encode the prompt with the Text Encode (Déjà Vu) node to see them")
        return found

    def _mitigated(
        self, watch: Watch, model: ComfyModel, conditioning: Conditioning, x: Tensor, sigma: Tensor, without: Tensor
    ) -> Conditioning:
        assert watch.profile is not None  # nothing is flagged without one
        target = watch.profile.quantile(0.5, "first step", 1)
        ordinary = watch.profile.quantile(ORDINARY_QUANTILE, "first step", 1)
        with torch.inference_mode(False):
            x, sigma, base = x.clone(), sigma.clone(), without.float().clone()
        start = Start(x, sigma, x, conditioning, base, target, 0, ordinary)
        if self.monitoring.remedy == "remove-trigger":
            method = available()["remove-trigger"]
            settings = method.settings()
        else:
            method = available()["optimise-tokens" if conditioning.reencoding else "optimise-conditioning"]
            settings = OptimiseSettings()
        outcome = method.apply(model, conditioning, start, settings)
        watch.mitigated(outcome)
        return outcome.conditioning


# ------------------------------------------------------------------------------- before sampling


def examine(
    patcher: Any,
    positive: Any,
    negative: Any,
    start: tuple[Tensor, Tensor, Tensor],
    monitoring: Monitoring,
    profile: Profile | None,
    folder: Path | None,
) -> Report:
    """The report on a run's first step without the run; ``start`` is its latent, noise and sigmas."""
    monitor = Monitor(replace(monitoring, when_flagged="report", score="first step"), profile, folder)
    latent, noise, sigmas = start

    def sample(
        model: Any, x: Tensor, step_sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None
    ) -> Tensor:
        model(x, step_sigmas[0].expand(x.shape[0]), **(extra_args or {}))
        return x

    guider = comfy.samplers.CFGGuider(monitor.attach(patcher))
    guider.set_conds(positive, negative)
    guider.set_cfg(7.0)  # any scale that lets both predictions be made; the first step does not depend on it
    guider.sample(noise, latent, comfy.samplers.KSAMPLER(sample), sigmas, disable_pbar=True)
    return Report.of(monitor.runs[-1].watch)


def mitigate(
    patcher: Any,
    positive: Any,
    negative: Any,
    start: tuple[Tensor, Tensor, Tensor],
    target: float,
    settings: OptimiseSettings,
    profile: Profile | None,
    folder: Path | None,
) -> tuple[list[list[Any]], dict[str, Any]]:
    """A conditioning for the host whose first-step score is ordinary, and what was done as plain values.

    Raises ValueError where the prompt has several conditionings, or no target is given and no calibration found.
    """
    if len(positive) != 1:
        raise ValueError(f"the prompt is combined from {len(positive)} conditionings; mitigate each before combining")
    latent, noise, sigmas = start

    def work(model: ComfyModel, x: Tensor, sigma: Tensor) -> Outcome:
        conditioning = conditioning_of(positive[0][0], positive[0][1])
        entries = comfy.sampler_helpers.convert_cond(negative)
        without = conditioning_of(negative[0][0], negative[0][1])
        kind = _kind_of(entries, positive[0][1][SOURCE].clip if SOURCE in positive[0][1] else None)
        with torch.no_grad():
            base = model(x, sigma, without)
        goal = target
        if not goal:
            setting = _setting(model, kind, entries, 1.0)
            known = profile or _profile_for(setting, model, Monitoring(), folder)
            if known is None:
                raise ValueError("there is no calibration to take the target from: calibrate, or give a target")
            if why := known.setting.mismatch(setting, "first step"):
                raise ValueError(f"the calibration is for another setting: {why}")
            goal = known.quantile(0.5, "first step", 1)
        with torch.inference_mode(False):
            begin = Start(x.clone(), sigma.clone(), x, without, base.clone(), goal)
        method = available()["optimise-tokens" if conditioning.reencoding else "optimise-conditioning"]
        return method.apply(model, conditioning, begin, settings)

    outcome: Outcome = with_model(patcher, positive, latent, noise, sigmas, work)
    options = dict(positive[0][1])
    options.pop(SOURCE, None)  # these rows are no longer what the text encodes to
    if (pooled := outcome.conditioning.extras.get("pooled_output")) is not None:
        options["pooled_output"] = pooled
    document = {
        "score_before": outcome.score_before,
        "score_after": outcome.score_after,
        **{k: list(v) if isinstance(v, tuple) else v for k, v in outcome.details.items()},
    }
    return [[outcome.conditioning.rows.cpu(), options]], document


def calibrate(
    patcher: Any,
    clip: Any,
    latent: Tensor,
    noise: Tensor,
    sigmas: Tensor,
    negative: str,
    count: int,
    on_prompt: Callable[[str], None],
) -> Profile:
    """First-step scores of ``count`` ordinary prompts, at the first of ``sigmas``; one picture each."""
    if FINGERPRINT in patcher.attachments:  # the bundled model knows no other world than its own
        prompts = bundled.held_out_ordinary(count, 0)
    else:
        prompts = [prompt for prompt, _ in ordinary_prompts(count)]
    wanted = Measurement(
        images=1,
        steps=max(1, len(sigmas) - 1),
        negative=negative,
        without="negative prompt" if negative.strip() else "empty prompt",
    )
    clip.load_model()
    return with_model(
        patcher,
        encode_text(clip, ""),
        latent,
        noise,
        sigmas,
        lambda model, x, sigma: run_calibration(model, prompts, wanted, 0, 8, on_prompt),
    )


def _setting(
    model: ComfyModel, without: Unconditional, negative: Any, scale: float, from_picture: bool = False
) -> Setting:
    return Setting(
        model.fingerprint,
        model.prediction_type,
        model.latent_shape,
        len(model.sigmas(0)) - 1,
        model.sigmas(0)[0],
        scale,
        without,
        _negative_name(negative) if without == "negative prompt" else "",
        "a picture" if from_picture else "noise",
    )


def _profile_for(setting: Setting, model: ComfyModel, monitoring: Monitoring, folder: Path | None) -> Profile | None:
    """One that holds the monitor's kind of score, or else the first step's, which decides during the run."""
    kinds = dict.fromkeys((monitoring.score, "first step"))
    found = (store.find(setting, kind, 1, model.brought_along, folder) for kind in kinds)
    return next((profile for profile in found if profile is not None), None)


def _kind_of(negative: Any, clip: Any = None) -> Unconditional:
    """The empty prompt where the host's negative conditioning comes from one, or equals what ``clip`` makes of it."""
    for entry in negative:
        source, rows = entry.get(SOURCE), entry.get("cross_attn")
        if source is not None:
            is_empty = not source.text.strip()
        else:
            is_empty = clip is not None and rows is not None and _equals_empty(rows, clip)
        if not is_empty:
            return "negative prompt"
    return "empty prompt"


_empty_rows: WeakKeyDictionary[Any, dict[Any, Tensor]] = WeakKeyDictionary()


def _equals_empty(rows: Tensor, clip: Any) -> bool:
    known = _empty_rows.setdefault(clip.cond_stage_model, {})
    key = (clip.patcher.patches_uuid, clip.layer_idx)
    if key not in known:
        known[key] = _encode(clip, "").rows.detach().cpu()
    return known[key].shape == rows.shape and torch.allclose(known[key].to(rows), rows, atol=1e-3, rtol=1e-3)


def _negative_name(negative: Any) -> str:
    """The negative prompt as typed, or a digest of its rows where the text is unknown."""
    names = []
    for entry in negative or ():
        source, rows = entry.get(SOURCE), entry.get("cross_attn")
        names.append(source.text if source is not None else "" if rows is None else _row_name(rows))
    return " | ".join(names)


def _row_name(rows: Tensor) -> str:
    digest = hashlib.sha256()
    _sample(digest, "rows", rows)
    return f"conditioning {digest.hexdigest()[:12]}"


def _covers(entries: Any, sigma: Tensor) -> bool:
    """Whether some conditioning acts on the whole picture now: the host leaves zeros where none does."""
    whole = [e for e in entries if "area" not in e and "mask" not in e]
    if any("timestep_start" not in e and "timestep_end" not in e for e in whole):
        return True
    level = float(sigma[0]) if whole else 0.0
    return any(e.get("timestep_end", 0.0) <= level <= e.get("timestep_start", float("inf")) for e in whole)


def _digest(samples: Tensor) -> tuple[Any, ...]:
    """Tells the outputs of runs apart."""
    flat = samples.detach().float()
    return (tuple(samples.shape), float(flat.sum()), float(flat.square().sum()))


def _stop_message(watch: Watch) -> str:
    from ..report.wording import sentence

    worst = min((v for v in watch.verdicts("first step") if v.p_value is not None), key=lambda v: v.p_value or 0.0)
    return f"Déjà Vu ended this run at its first step. {sentence(worst)}. Nothing is broken: change the prompt, or set the monitor to report."
