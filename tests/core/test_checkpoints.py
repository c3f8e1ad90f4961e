"""Loading and measuring real formats in miniature, against plain diffusers and finite differences."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import miniatures
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd_dejavu.calibration import store
from sd_dejavu.calibration.profile import Profile
from sd_dejavu.core.conditioning import Conditioning
from sd_dejavu.core.denoiser import PromptTooLong, initial_latent
from sd_dejavu.core.sampling import Guidance, first_step, levels_of, predict, sample
from sd_dejavu.core.trace import Trace
from sd_dejavu.demo import bundled
from sd_dejavu.explain import input_gradient, output_gradient
from sd_dejavu.hosts.diffusers import ModelError, adapter
from sd_dejavu.hosts.diffusers.adapter import DiffusersModel
from sd_dejavu.hosts.diffusers.clip import CHUNK, MAX_CHUNKS
from sd_dejavu.hosts.diffusers.load import load
from sd_dejavu.run.measure import Measurement, setting_of
from sd_dejavu.weights import digest, fingerprint, of_text_encoder, sampled

PROMPTS = ("the red fox under an old oak", "lighthouse painting, dawn")
STEPS = 8
NUDGE = 1e-6  # of the finite differences, in float64
WRITERS = {"1.x": miniatures.write_sd1, "2.x": miniatures.write_sd2, "xl": miniatures.write_sdxl}
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "text_encoder/model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only wait for their threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("miniatures")
    return {family: write(place / family.replace(".", "")) for family, write in WRITERS.items()}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, DiffusersModel]:
    return {family: load(str(folder)) for family, folder in folders.items()}


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Every attempt to reach the network, which fails; the hub's libraries may try, and have an empty cache."""
    attempts: list[Any] = []

    def refuse(*target: Any, **options: Any) -> None:
        attempts.append(target)
        raise OSError("there is no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    return attempts


# ------------------------------------------------------------------- against the plain pipeline objects


@dataclass
class Plain:
    """Stable Diffusion as its papers and diffusers' own pipelines have it, on the pipeline's parts."""

    pipeline: Any

    def encode(self, prompt: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(rows with the prompt, rows without, and for XL what goes with each in the order without, with)."""
        if hasattr(self.pipeline, "text_encoder_2"):
            rows, empty, pooled, empty_pooled = self.pipeline.encode_prompt(prompt, negative_prompt="")
            side = self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor
            times = torch.tensor([[side, side, 0, 0, side, side]] * 2, dtype=rows.dtype)
            return rows, empty, {"text_embeds": torch.cat([empty_pooled, pooled]), "time_ids": times}
        rows, empty = self.pipeline.encode_prompt(prompt, "cpu", 1, True, negative_prompt="")
        return rows, empty, {}

    def noise_prediction(self, x: Tensor, timestep: int, rows: Tensor, extras: dict[str, Tensor]) -> Tensor:
        """epsilon of unit-variance x [B, ...]; epsilon = sqrt(abar) v + sqrt(1 - abar) x where the model predicts v."""
        many = {k: v.expand(x.shape[0], -1) for k, v in extras.items()}
        time = torch.tensor(timestep)
        given = rows.expand(x.shape[0], -1, -1)
        output = self.pipeline.unet(x, time, encoder_hidden_states=given, added_cond_kwargs=many or None).sample
        if self.pipeline.scheduler.config.prediction_type == "v_prediction":
            abar = self.pipeline.scheduler.alphas_cumprod.to(x.dtype)[timestep]
            return abar.sqrt() * output + (1 - abar).sqrt() * x
        return output

    @torch.no_grad()
    def run(self, prompt: str, x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """DDIM from unit-variance noise x: the magnitude of each step [STEPS, B], and the final latents."""
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler.from_config(
            self.pipeline.scheduler.config,
            timestep_spacing="leading",
            steps_offset=1,
            clip_sample=False,
            set_alpha_to_one=True,
            prediction_type="epsilon",
        )
        scheduler.set_timesteps(STEPS)
        assert scheduler.init_noise_sigma == 1
        rows, empty, extras = self.encode(prompt)
        magnitudes = []
        for timestep in scheduler.timesteps:
            unconditional = self.noise_prediction(x, int(timestep), empty, {k: v[:1] for k, v in extras.items()})
            with_prompt = self.noise_prediction(x, int(timestep), rows, {k: v[1:] for k, v in extras.items()})
            magnitudes.append((with_prompt - unconditional).flatten(1).norm(dim=1))
            x = scheduler.step(unconditional + scale * (with_prompt - unconditional), timestep, x).prev_sample
        return torch.stack(magnitudes), x


def plain(folder: Path) -> Plain:
    import diffusers

    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    options = {} if "XL" in name else {"safety_checker": None, "requires_safety_checker": False}
    pipeline = getattr(diffusers, name).from_pretrained(folder, local_files_only=True, **options)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return Plain(pipeline)


@pytest.mark.parametrize("family", WRITERS)
def test_the_whole_run_is_the_pipelines(
    family: str, folders: dict[str, Path], models: dict[str, DiffusersModel]
) -> None:
    model, other = models[family], plain(folders[family])
    noise = model.noise(5, 3)
    assert torch.equal(noise, torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5)))
    sigmas = model.sigmas(STEPS)
    conditionings = [model.encode(prompt) for prompt in PROMPTS]
    at_once = first_step(model, conditionings, model.encode(""), noise, sigmas[0], batch_size=4)
    for prompt, conditioning, scores in zip(PROMPTS, conditionings, at_once, strict=True):
        expected, latents = other.run(prompt, noise, 7.5)
        trace = Trace()
        start = initial_latent(noise, sigmas[0], model.prediction_type)
        final = sample(
            model,
            start,
            sigmas,
            conditioning,
            Guidance(model.encode(""), 7.5),
            lambda e, trace=trace: trace.record(e.predictions),
        )
        torch.testing.assert_close(torch.tensor([r.values for r in trace.readings]), expected, rtol=1e-4, atol=0)
        torch.testing.assert_close(scores, expected[0], rtol=1e-4, atol=0)
        assert torch.linalg.norm(final - latents) < 1e-4 * torch.linalg.norm(latents)


@pytest.mark.parametrize("family", WRITERS)
def test_images_are_the_pipelines(family: str, folders: dict[str, Path], models: dict[str, DiffusersModel]) -> None:
    vae = plain(folders[family]).pipeline.vae
    latents = models[family].noise(0, 2)
    expected = vae.decode(latents / {"xl": 0.13025}.get(family, 0.18215)).sample / 2 + 0.5
    images = models[family].decode(latents)
    assert images.shape == (2, 3, 16, 16)
    torch.testing.assert_close(images, expected.clamp(0, 1), rtol=1e-5, atol=1e-5)


def test_what_the_files_say(models: dict[str, DiffusersModel]) -> None:
    assert [m.prediction_type for m in models.values()] == ["epsilon", "v_prediction", "epsilon"]
    assert {m.latent_shape for m in models.values()} == {(4, 8, 8)}
    assert len({m.fingerprint for m in models.values()}) == 3
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    expected = [*((1 - abar) / abar).sqrt()[[751, 501, 251, 1]].tolist(), 0]
    assert models["1.x"].sigmas(4) == pytest.approx(expected, rel=1e-5)


def test_the_second_tokenizer_pads_with_exclamation_marks(models: dict[str, DiffusersModel]) -> None:
    conditioning = models["xl"].encode("fox")
    assert conditioning.reencoding is not None
    first, second = conditioning.reencoding.inputs
    assert [t.text for t in first.tokens[:3]] == ["<|startoftext|>", "fox</w>", "<|endoftext|>"]
    assert [t.text for t in second.tokens[:5]] == ["<|startoftext|>", "f", "o", "x</w>", "<|endoftext|>"]
    # One end token, then the embedding of '!' (number 0); the first encoder's padding is the end token.
    tables = [encoder.get_input_embeddings().weight for _, encoder in models["xl"]._encoders]
    assert torch.equal(second.embeddings[5:], tables[1][:1].expand(72, -1))
    assert torch.equal(first.embeddings[2:], tables[0][-1:].expand(75, -1))
    assert conditioning.extras["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]]
    assert models["xl"].encode("fox", (24, 32)).extras["time_ids"].tolist() == [[24, 32, 0, 0, 24, 32]]


# ------------------------------------------------------------------------------------- long prompts


@pytest.mark.parametrize("family", ["1.x", "xl"])
def test_long_prompts_are_encoded_in_chunks(
    family: str, folders: dict[str, Path], models: dict[str, DiffusersModel]
) -> None:
    model, pipeline = models[family], plain(folders[family]).pipeline
    prompt = " ".join(["red fox"] * 38)  # 76 tokens; for XL's second tokenizer 228, four chunks
    conditioning = model.encode(prompt)
    chunks = {"1.x": 2, "xl": 4}[family]
    assert conditioning.rows.shape[1] == len(conditioning.tokens) == 77 * chunks
    assert len(conditioning.words) == 76
    assert [t.word for t in conditioning.tokens if t.role == "word"] == list(range(76))

    def encoded(tokenizer: Any, encoder: Any, number: int) -> Any:
        body = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids[75 * number : 75 * (number + 1)]
        ids = [tokenizer.bos_token_id, *body, tokenizer.eos_token_id]
        ids += [tokenizer.pad_token_id] * (77 - len(ids))
        return encoder(torch.tensor([ids]), output_hidden_states=True)

    for number in range(chunks):
        rows = conditioning.rows[:, 77 * number : 77 * (number + 1)]
        outputs = [encoded(pipeline.tokenizer, pipeline.text_encoder, number)]
        expected = outputs[0].last_hidden_state
        if family == "xl":
            outputs.append(encoded(pipeline.tokenizer_2, pipeline.text_encoder_2, number))
            expected = torch.cat([o.hidden_states[-2] for o in outputs], dim=-1)
            if number == 0:
                torch.testing.assert_close(conditioning.extras["text_embeds"], outputs[1].text_embeds)
        torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)
    scores = first_step(
        model, [conditioning, model.encode("fox")], model.encode(""), model.noise(0, 2), model.sigmas(50)[0]
    )
    assert (scores > 0).all()
    norms = significance(model, conditioning, input_gradient.token_gradient_norms)
    assert all(len(n) == 77 * chunks and (n > 0).any() for n in norms)


def test_the_longest_prompt_and_one_token_more(models: dict[str, DiffusersModel]) -> None:
    most = MAX_CHUNKS * CHUNK
    assert models["1.x"].encode("fox " * most).rows.shape[1] == 77 * MAX_CHUNKS
    with pytest.raises(PromptTooLong, match=r"too long: 601 tokens, at most 600 can be read; shorten it"):
        models["1.x"].encode("fox " * (most + 1))
    with pytest.raises(PromptTooLong, match="too long: 100,001 characters, at most 100,000"):
        models["1.x"].encode("f" * 100_001)
    assert models["1.x"].encode("fox " * CHUNK).rows.shape[1] == 77
    assert models["1.x"].encode("").rows.shape[1] == 77


# --------------------------------------------------------------------------------------- gradients


def significance(
    model: DiffusersModel,
    conditioning: Conditioning,
    measure: Callable[..., Any],
    checkpointing: bool = False,
    images: int = 2,
) -> Any:
    sigma = model.sigmas(50)[0]
    x = initial_latent(model.noise(0, images), sigma, model.prediction_type)
    levels = levels_of(x, sigma)
    with model.differentiable(checkpointing):
        return measure(model, x, levels, conditioning, predict(model, x, levels, model.encode("")))


@pytest.mark.parametrize("family", WRITERS)
def test_gradients_are_the_finite_differences(
    family: str, folders: dict[str, Path], models: dict[str, DiffusersModel]
) -> None:
    """Central differences in float64 on the pipeline's parts, at the tokens that count most."""
    model, other, prompt = models[family], plain(folders[family]), "red fox, old glass"
    conditioning = model.encode(prompt)
    pipeline = other.pipeline
    tokens, images = (2, 2) if family == "1.x" else (1, 1)
    encoders = [(pipeline.tokenizer, pipeline.text_encoder)]
    if family == "xl":
        encoders.append((pipeline.tokenizer_2, pipeline.text_encoder_2))
    for module in (pipeline.unet, *(e for _, e in encoders)):
        module.double()
    noise = model.noise(0, images).double()
    rows, empty, extras = other.encode(prompt)
    with torch.no_grad():
        unconditional = other.noise_prediction(noise, 981, empty, {k: v[:1] for k, v in extras.items()})

    @torch.no_grad()
    def losses(rows: Tensor, extras: Sequence[dict[str, Tensor]]) -> Tensor:
        """Mean magnitude over the noises under each of rows [P, N, D], with the extras of each."""
        x = noise.repeat(len(rows), 1, 1, 1)
        together = {k: torch.cat([e[k] for e in extras]).repeat_interleave(images, 0) for k in extras[0]}
        predicted = other.noise_prediction(x, 981, rows.repeat_interleave(images, 0), together)
        gaps = (predicted - unconditional.repeat(len(rows), 1, 1, 1)).flatten(1).norm(dim=1)
        return gaps.reshape(-1, images).mean(1)

    def slope(values: Tensor) -> float:
        up, down = values.reshape(2, -1)
        return float(((up - down) / (2 * NUDGE)).norm())

    mine = {k: v[1:] for k, v in extras.items()}
    norms = significance(model, conditioning, output_gradient.row_gradient_norms, images=images)
    for token in norms.topk(tokens).indices.tolist():
        nudges = torch.zeros(rows.shape[2], *rows.shape[1:], dtype=torch.float64)
        nudges[:, token] = NUDGE * torch.eye(rows.shape[2])
        both = torch.cat([rows + nudges, rows - nudges])
        assert float(norms[token]) == pytest.approx(slope(losses(both, [mine] * len(both))), rel=1e-3)

    # The embedding of a token that occurs once is nudged in the encoder's own table.
    for (tokenizer, encoder), norms in zip(
        encoders, significance(model, conditioning, input_gradient.token_gradient_norms, images=images), strict=True
    ):
        ids = tokenizer(prompt).input_ids
        once = [place for place, number in enumerate(ids[:-1]) if ids.count(number) == 1]
        largest = sorted(once, key=lambda place: -float(norms[place]))[:tokens]
        table = encoder.get_input_embeddings().weight
        for token in largest:
            encoded = []
            for step in (NUDGE, -NUDGE):
                for number in range(table.shape[1]):
                    table.data[ids[token], number] += step
                    encoded.append(other.encode(prompt))
                    table.data[ids[token], number] -= step
            values = losses(torch.cat([e[0] for e in encoded]), [{k: v[1:] for k, v in e[2].items()} for e in encoded])
            assert float(norms[token]) == pytest.approx(slope(values), rel=1e-3)


@pytest.mark.parametrize("family", WRITERS)
def test_words_add_up_their_tokens(family: str, models: dict[str, DiffusersModel]) -> None:
    conditioning = models[family].encode("red glass, fox")
    assert conditioning.reencoding is not None
    for view, tables in (
        (output_gradient, [conditioning.tokens]),
        (input_gradient, [i.tokens for i in conditioning.reencoding.inputs]),
    ):
        measure = output_gradient.row_gradient_norms if view is output_gradient else input_gradient.token_gradient_norms
        norms = significance(models[family], conditioning, measure)
        norms = [norms] if isinstance(norms, Tensor) else norms
        expected = [
            sum(float(n[i]) for n, table in zip(norms, tables, strict=True) for i, t in enumerate(table) if t.word == w)
            for w in range(3)
        ]
        words = significance(models[family], conditioning, view.explain).words
        assert [w.text for w in words] == ["red", "glass,", "fox"]
        assert [w.raw for w in words] == pytest.approx(expected, rel=1e-5)
        assert [w.significance for w in words] == pytest.approx([e / max(expected) for e in expected], rel=1e-5)


@pytest.mark.parametrize("family", WRITERS)
def test_checkpointing_changes_no_gradient(family: str, models: dict[str, DiffusersModel]) -> None:
    model = models[family]
    conditioning = model.encode(PROMPTS[0])
    for measure in (output_gradient.row_gradient_norms, input_gradient.token_gradient_norms):
        kept = significance(model, conditioning, measure)
        recomputed = significance(model, conditioning, measure, checkpointing=True)
        torch.testing.assert_close(recomputed, kept, rtol=1e-5, atol=1e-9)
    assert not any("forward" in vars(module) for module in model._unet.modules())


@pytest.mark.parametrize("family", WRITERS)
def test_recomputing_keeps_less_and_is_chosen_by_what_is_free(
    family: str, models: dict[str, DiffusersModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models[family]
    conditioning = model.encode(PROMPTS[0])

    def bytes_kept(free: int | None, wanted: bool) -> int:
        monkeypatch.setattr(adapter, "free_memory", lambda device: free)
        own = {p.untyped_storage().data_ptr() for module in model._modules() for p in module.parameters()}
        found: dict[int, torch.UntypedStorage] = {}  # held, so that no other is given the same address meanwhile

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage
            return tensor

        x, sigma = model.noise(0, 1), torch.tensor([model.sigmas(50)[0]])
        rows = conditioning.with_rows(conditioning.rows.clone().requires_grad_(True))
        with model.differentiable(wanted), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            output = model(x, sigma, rows)  # its graph lives until all of it is counted
            assert output.requires_grad
            return sum(storage.nbytes() for storage in found.values())

    plenty, unknown, asked, short = (
        bytes_kept(*given) for given in ((2**40, False), (None, False), (2**40, True), (1000, False))
    )
    assert plenty == unknown
    assert asked == short < 0.6 * plenty


def test_a_batch_is_cut_by_what_an_evaluation_may_take(
    models: dict[str, DiffusersModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = models["1.x"], []
    noise, sigma = model.noise(0, 7), torch.full((7,), 3.0)
    conditioning = model.encode(PROMPTS[0])
    whole = predict(model, noise, sigma, conditioning)
    handle = model._unet.conv_in.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    # In fp32 a latent pixel takes twice the bytes that it takes in half precision.
    monkeypatch.setattr(adapter, "EVALUATION", 3 * 2 * model.family.evaluation_bytes * noise[0, 0].numel())
    parts = predict(model, noise, sigma, conditioning, batch_size=32)
    own = Conditioning(conditioning.rows.repeat(7, 1, 1))
    together = model(noise, sigma, own)
    handle.remove()
    assert seen == [3, 3, 1, 3, 3, 1]
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together, whole, rtol=1e-4, atol=1e-4)


def test_the_decoder_recomputes_large_images_only_and_its_gradient_stays(
    models: dict[str, DiffusersModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, found = models["1.x"], []
    for limit in (2**40, 0):
        monkeypatch.setattr(adapter, "RECOMPUTED_FROM", limit)
        latents = model.noise(0, 2).requires_grad_(True)
        found.append(torch.autograd.grad(model.images_of(latents).square().sum(), latents)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    assert not any("forward" in vars(module) for module in model._vae.modules())


# ---------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("family", WRITERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.02), ("bfloat16", 0.06)])
def test_half_precision(
    family: str, dtype: str, tolerance: float, folders: dict[str, Path], models: dict[str, DiffusersModel]
) -> None:
    full, half = models[family], load(str(folders[family]), dtype=dtype)
    sigma, noise = full.sigmas(50)[0], full.noise(1, 2)
    scores = [first_step(m, [m.encode(p) for p in PROMPTS], m.encode(""), noise, sigma) for m in (full, half)]
    assert scores[1].dtype == torch.float32
    torch.testing.assert_close(scores[1], scores[0], rtol=tolerance, atol=0)
    images = half.decode(noise)
    assert torch.isfinite(images).all()
    torch.testing.assert_close(images, full.decode(noise), rtol=0, atol=tolerance)
    # Gradients are taken in the model's own precision, nothing is turned into fp32 for them. How well they agree is
    # asked of the bundled model (test_bundled): random networks are far more sensitive than trained ones.
    own, seen = half.encode(PROMPTS[0]), set()
    handle = half._unet.conv_in.register_forward_hook(lambda module, given, output: seen.add(output.dtype))
    for measure in (output_gradient.row_gradient_norms, input_gradient.token_gradient_norms):
        found = significance(half, own, measure)
        for norms in found if isinstance(found, list) else [found]:
            assert norms.dtype == torch.float32
            assert norms.isfinite().all() and bool((norms > 0).any())
    handle.remove()
    assert seen == {getattr(torch, dtype)} == {p.dtype for p in half._unet.parameters()}


# --------------------------------------------------------------------------------------- single files


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
@pytest.mark.parametrize("family", WRITERS)
def test_single_files_are_their_folders(
    family: str,
    suffix: str,
    folders: dict[str, Path],
    models: dict[str, DiffusersModel],
    tmp_path: Path,
    network: list[Any],
) -> None:
    path = miniatures.write_single_file(folders[family], tmp_path / f"model.{suffix}")
    model, folder = load(str(path), config=str(folders[family])), models[family]
    assert model.fingerprint == folder.fingerprint
    sigma = folder.sigmas(50)[0]
    x = initial_latent(folder.noise(2, 2), sigma, folder.prediction_type)
    for prompt in PROMPTS:
        ours, theirs = model.encode(prompt), folder.encode(prompt)
        torch.testing.assert_close(ours.rows, theirs.rows, rtol=1e-6, atol=1e-6)
        predictions = [predict(m, x, levels_of(x, sigma), c) for m, c in ((model, ours), (folder, theirs))]
        torch.testing.assert_close(*predictions, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.decode(x / sigma), folder.decode(x / sigma), rtol=1e-6, atol=1e-6)
    assert network == []


def copied(folder: Path, place: Path, change: Callable[[dict[str, Tensor]], Any], file: str = UNET_WEIGHTS) -> str:
    """A copy of a folder with other weights in one of its files."""
    shutil.copytree(folder, place)
    weights = load_file(place / file)
    change(weights)
    save_file(weights, place / file, metadata={"format": "pt"})
    return str(place)


def test_folders_of_pickled_weights(
    folders: dict[str, Path], models: dict[str, DiffusersModel], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(folders["1.x"], tmp_path / "bin"))
    for name in (UNET_WEIGHTS, TEXT_WEIGHTS, UNET_WEIGHTS.replace("unet", "vae")):
        file = folder / name
        pickled = file.with_name("pytorch_model.bin" if name == TEXT_WEIGHTS else "diffusion_pytorch_model.bin")
        torch.save(load_file(file), pickled)
        file.unlink()
    assert load(str(folder)).fingerprint == models["1.x"].fingerprint
    assert capfd.readouterr() == ("", "")


# -------------------------------------------------------------------------------------------- errors


def sentence(*arguments: str, **options: str) -> str:
    """The text of the ModelError that loading ends in; one line that starts with what it is about."""
    with pytest.raises(ModelError) as raised:
        load(*arguments, **options)
    text = str(raised.value)
    assert "\n" not in text and "\x1b" not in text and len(text) < 500
    return text


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
@pytest.mark.parametrize("family", WRITERS)
def test_a_single_file_without_configuration(
    family: str, suffix: str, folders: dict[str, Path], tmp_path: Path, network: list[Any]
) -> None:
    path = miniatures.write_single_file(folders[family], tmp_path / f"model.{suffix}")
    text = sentence(str(path))
    assert text.startswith(str(path)) and "of other sizes" in text and text.endswith("with --config")
    assert network == []


@pytest.mark.parametrize("config", ["nowhere", "./nowhere", "nowhere/of/all", "/nowhere"])
def test_a_configuration_that_is_not_there(
    config: str, folders: dict[str, Path], tmp_path: Path, network: list[Any]
) -> None:
    path = miniatures.write_single_file(folders["1.x"], tmp_path / "model.safetensors")
    assert f"the configuration {config} does not exist" in sentence(str(path), config=config)
    assert network == []


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "../nowhere", "/no/where", "a/b/c", "a/b.safetensors", "a/"])
def test_a_model_that_is_not_there(name: str, network: list[Any]) -> None:
    assert f"the model {name} does not exist: give a diffusers folder" in sentence(name)
    assert network == []


def test_only_hub_ids_reach_for_the_network(folders: dict[str, Path], tmp_path: Path, network: list[Any]) -> None:
    assert "could not be fetched from the hub" in sentence("owner/name")
    assert network
    network.clear()
    path = miniatures.write_single_file(folders["1.x"], tmp_path / "model.safetensors")
    assert str(path) in sentence(str(path), config="owner/name")
    assert network


def test_folders_that_are_no_model(folders: dict[str, Path], tmp_path: Path) -> None:
    assert "it holds no model_index.json" in sentence(str(tmp_path))
    index = tmp_path / "model_index.json"
    index.write_text("{")
    assert "model_index.json is broken" in sentence(str(tmp_path))
    with index.open("wb") as file:
        file.truncate(1 << 40)  # without its bytes on the disk: one that is read would fill any memory
    assert "model_index.json is broken: too large" in sentence(str(tmp_path))
    index.write_text("[]")
    assert "holds a pipeline without a name; what can be read is: Stable Diffusion" in sentence(str(tmp_path))
    index.write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    schedule = tmp_path / "scheduler" / "scheduler_config.json"
    schedule.parent.mkdir()
    for levels in (0, 10**9, "many", None):
        schedule.write_text(json.dumps({"num_train_timesteps": levels}))
        assert f"scheduler_config.json is broken: {levels!r} noise levels" in sentence(str(tmp_path))
    schedule.unlink()
    schedule.parent.rmdir()
    index.write_text(json.dumps({"_class_name": "FluxPipeline"}))
    assert "holds a FluxPipeline; what can be read is: Stable Diffusion 1.x and 2.x, Stable Diffusion XL" in sentence(
        str(tmp_path)
    )
    index.write_text((folders["1.x"] / "model_index.json").read_text())
    assert str(tmp_path) in sentence(str(tmp_path))


def test_models_of_another_kind(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["2.x"], tmp_path / "sample")
    scheduler = tmp_path / "sample" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("v_prediction", "sample"))
    assert "predicts 'sample'; only epsilon and v_prediction" in sentence(str(tmp_path / "sample"))
    state = miniatures.original_names(folders["1.x"])
    state["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(32, 9, 3, 3)
    save_file(state, tmp_path / "inpainting.safetensors")
    assert "inpainting or editing" in sentence(str(tmp_path / "inpainting.safetensors"), config=str(folders["1.x"]))
    save_file({"lora_unet_mid.lora_up.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    assert "holds no whole model that can be read (Stable Diffusion" in sentence(str(tmp_path / "lora.safetensors"))
    save_file(miniatures.original_names(folders["xl"]) | {"v_pred": torch.zeros(1)}, tmp_path / "v.safetensors")
    assert "predicts v, but its config" in sentence(str(tmp_path / "v.safetensors"), config=str(folders["xl"]))


def test_broken_files(folders: dict[str, Path], tmp_path: Path) -> None:
    cut = Path(shutil.copytree(folders["1.x"], tmp_path / "cut"))
    whole = (cut / UNET_WEIGHTS).read_bytes()
    (cut / UNET_WEIGHTS).write_bytes(whole[:-1000])
    assert "cannot be loaded: Unable to load weights" in sentence(str(cut))
    for name in ("junk.safetensors", "junk.ckpt"):
        (tmp_path / name).write_bytes(b"junk" * 30)
        assert str(tmp_path / name) in sentence(str(tmp_path / name), config=str(folders["1.x"]))
    assert "is broken, or holds Python objects" in sentence(str(tmp_path / "junk.ckpt"))


def test_tensors_that_are_missing(folders: dict[str, Path], tmp_path: Path) -> None:
    """A loader that fills the gap with random numbers would give another score at every start."""

    def drop(weights: dict[str, Tensor]) -> None:
        del weights[next(k for k in weights if "conv1.weight" in k or "fc1.weight" in k)]

    for file in (UNET_WEIGHTS, TEXT_WEIGHTS, "text_encoder_2/model.safetensors"):
        part = file.split("/")[0]
        text = sentence(copied(folders["xl"], tmp_path / part, drop, file))
        assert f"is incomplete: it lacks 1 of the tensors of its {part}, such as" in text
    state = miniatures.original_names(folders["1.x"])
    del state["model.diffusion_model.middle_block.0.in_layers.2.weight"]
    save_file(state, tmp_path / "hole.safetensors")
    assert "is incomplete" in sentence(str(tmp_path / "hole.safetensors"), config=str(folders["1.x"]))


@pytest.mark.parametrize(
    ("file", "value"),
    [(UNET_WEIGHTS, float("nan")), (TEXT_WEIGHTS, float("inf")), (UNET_WEIGHTS.replace("unet", "vae"), float("nan"))],
)
def test_weights_that_are_not_finite(file: str, value: float, folders: dict[str, Path], tmp_path: Path) -> None:
    def spoil(weights: dict[str, Tensor]) -> None:
        weights[sorted(weights)[-1]].flatten()[-1] = value

    assert "contain NaN or infinity" in sentence(copied(folders["1.x"], tmp_path / "spoilt", spoil, file))


class Foreign:
    """What a hostile checkpoint holds: unpickling it makes a directory."""

    def __init__(self, traces: Path) -> None:
        self.traces = traces

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.traces),)


def test_foreign_code_is_refused_and_not_run(folders: dict[str, Path], tmp_path: Path) -> None:
    traces = tmp_path / "executed"
    content = {"state_dict": miniatures.original_names(folders["1.x"]), "callbacks": Foreign(traces)}
    torch.save(content, tmp_path / "new.ckpt")
    torch.save(content, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for name in ("new.ckpt", "old.ckpt"):
        for options in ({}, {"config": str(folders["1.x"])}):
            assert "could run code and are not loaded" in sentence(str(tmp_path / name), **options)
    for file, pickled in ((UNET_WEIGHTS, "diffusion_pytorch_model.bin"), (TEXT_WEIGHTS, "pytorch_model.bin")):
        folder = Path(shutil.copytree(folders["1.x"], tmp_path / pickled))
        (folder / file).unlink()
        torch.save({"x": Foreign(traces)}, (folder / file).with_name(pickled))
        assert str(folder) in sentence(str(folder))
    folder = Path(shutil.copytree(folders["1.x"], tmp_path / "code"))
    (folder / "unet" / "own.py").write_text(f"import os\nos.mkdir({str(traces)!r})\nclass Own: pass\n")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"unet": ["own", "Own"]}))
    assert "brings its own code for its unet, which is not run" in sentence(str(folder))
    assert not traces.exists()
    torch.load(tmp_path / "new.ckpt", weights_only=False)  # the file does what it is made for
    assert traces.exists()


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


CODE_BESIDE = {  # where diffusers or transformers look for a model's own code, and what the sentence names
    "None.py": "None.py",
    "pipeline.PY": "pipeline.PY",
    "unet/diffusers.py": "unet/diffusers.py",
    "tokenizer/transformers.py": "tokenizer/transformers.py",
}


def marking(place: Path, marker: Path) -> None:
    """Code that leaves a mark as soon as it is imported."""
    lines = f"from pathlib import Path\nPath({str(marker)!r}).touch()\nfrom diffusers import StableDiffusionPipeline"
    place.write_text(f"{lines}\nclass Own(StableDiffusionPipeline): pass\n")


@pytest.mark.parametrize("place", CODE_BESIDE)
def test_code_beside_a_model_is_refused_before_diffusers_sees_it(
    place: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers up to 0.37 imports the first of these; from 0.38 on it has a guard of its own."""
    import diffusers

    asked: list[Any] = []
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *given, **options: asked.append(given))
    folder, marker = Path(shutil.copytree(folders["1.x"], tmp_path / "model")), tmp_path / "executed"
    marking(folder / place, marker)
    text = sentence(str(folder))
    assert f"brings its own code ({CODE_BESIDE[place]}), which is not run" in text
    single = miniatures.write_single_file(folders["1.x"], tmp_path / "model.safetensors")
    assert "which is not run" in sentence(str(single), config=str(folder))
    assert not marker.exists() and not asked


@pytest.mark.parametrize("file", ["unet/config.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json"])
def test_a_configuration_that_calls_for_code_is_refused(file: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["1.x"], tmp_path / "model"))
    edit(folder / file, lambda config: config.update(auto_map={"AutoModel": "own.Own"}))
    assert f"brings its own code ({file})" in sentence(str(folder))


@pytest.mark.parametrize(
    "changed",
    [
        {"_class_name": ["own", "Own"]},
        {"unet": ["own", "Own"]},
        {"unet": []},
        {"unet": ["os", "system"]},
        {"../unet": ["diffusers", "UNet2DConditionModel"]},
        {"unet": [["own"], "Own"]},
    ],
)
def test_an_index_that_names_other_classes_is_refused(
    changed: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["1.x"], tmp_path / "model"))
    edit(folder / "model_index.json", lambda index: index.update(changed))
    text = sentence(str(folder))
    assert "brings its own code" in text or "what can be read is: Stable Diffusion" in text


def cached(folder: Path, tmp_path: Path, owner: str = "owner--name") -> Path:
    """The folder where an earlier download from the hub would have left it."""
    place = tmp_path / "hub-cache" / f"models--{owner}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    return Path(shutil.copytree(folder, place / "snapshots" / ("0" * 40)))


def test_a_hub_id_is_looked_at_before_diffusers_downloads_it(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    asked: list[Any] = []
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", lambda *given, **options: asked.append(given))
    folder, marker = cached(folders["1.x"], tmp_path), tmp_path / "executed"
    marking(folder / "None.py", marker)
    assert "brings its own code (None.py)" in sentence("owner/name")
    single = miniatures.write_single_file(folders["1.x"], tmp_path / "model.safetensors")
    assert "brings its own code (None.py)" in sentence(str(single), config="owner/name")
    assert not marker.exists() and not asked


def test_what_is_cached_of_a_hub_id_is_read_without_the_network(
    folders: dict[str, Path], models: dict[str, DiffusersModel], tmp_path: Path
) -> None:
    cached(folders["1.x"], tmp_path)
    single = miniatures.write_single_file(folders["1.x"], tmp_path / "model.safetensors")
    for model in (load("owner/name"), load(str(single), config="owner/name")):
        assert model.fingerprint == models["1.x"].fingerprint


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder_2", "tokenizer_2", "scheduler", "vae"])
@pytest.mark.parametrize("how", ["missing", "empty"])
def test_a_part_that_the_index_names_must_be_there(
    part: str, how: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["xl"], tmp_path / "model"))
    shutil.rmtree(folder / part)
    if how == "empty":
        (folder / part).mkdir()
    assert sentence(str(folder)) == f"{folder} is incomplete: it has no {part}; get the model again, whole"


def test_a_tokenizer_that_does_not_fit_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """transformers makes up a vocabulary where files lack; without merges words fall into letters."""

    def with_tokenizer(name: str, change: Callable[[Path], Any]) -> str:
        folder = Path(shutil.copytree(folders["1.x"], tmp_path / name))
        change(folder / "tokenizer")
        return sentence(str(folder))

    def only_configuration(tokenizer: Path) -> None:
        for file in ("vocab.json", "merges.txt", "tokenizer.json"):
            (tokenizer / file).unlink(missing_ok=True)

    def without_merges(tokenizer: Path) -> None:
        (tokenizer / "tokenizer.json").unlink(missing_ok=True)
        (tokenizer / "merges.txt").write_text("#version: 0.2\n")

    size = len(json.loads((folders["1.x"] / "tokenizer" / "vocab.json").read_text()))
    assert f"tokens for {size:,} embeddings" in with_tokenizer("unread", only_configuration)
    assert "cannot read the words of its own vocabulary" in with_tokenizer("cut", without_merges)
    larger = with_tokenizer("larger", lambda place: edit(place / "vocab.json", lambda v: v.update({"more</w>": size})))
    assert f"does not fit its text encoder: {size + 1:,} tokens for {size:,} embeddings" in larger


@pytest.mark.parametrize("side", [0, -8, 10**6, None, 8.0, [8], True, "8"])
def test_a_size_that_cannot_be_drawn_is_refused(side: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["1.x"], tmp_path / "model"))
    edit(folder / "unet" / "config.json", lambda config: config.update(sample_size=side))
    assert f"the sample_size of its UNet is {side!r} and must be a whole number between 1 and 1024" in sentence(
        str(folder)
    )


def test_weights_that_hold_themselves_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    state["state_dict"] = state
    torch.save(state, tmp_path / "endless.ckpt")
    assert "without an end" in sentence(str(tmp_path / "endless.ckpt"), config=str(folders["1.x"]))


def test_warnings_before_a_refusal_are_not_shown(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def read(path: Path) -> None:
        warnings.warn("a storage of an old kind\nin two lines", stacklevel=1)
        raise ValueError("no weights\nat all")

    monkeypatch.setattr("sd_dejavu.hosts.diffusers.load._shapes", read)
    (tmp_path / "old.ckpt").touch()
    assert sentence(str(tmp_path / "old.ckpt")).endswith("cannot be loaded: no weights at all")
    assert not recwarn.list


# --------------------------------------------------------------------------------------- fingerprints


def weights_alone(model: DiffusersModel) -> str:
    """The fingerprint of version 0.1.0, before it took tokenizers in."""
    digest = hashlib.sha256(model.prediction_type.encode())
    for module in (model._unet, *(encoder for _, encoder in model._encoders)):
        for key, value in sorted(module.state_dict().items()):
            chosen = value.reshape(-1)[:: max(1, value.numel() // 64)][:64].float()
            digest.update(f"{key}{tuple(value.shape)}".encode() + chosen.numpy().tobytes())
    return digest.hexdigest()[:16]


def test_the_bundled_model_is_still_known_by_the_name_in_its_profiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SD_DEJAVU_HOME", str(tmp_path))
    model = load()
    profiles = [Profile.load(file) for file in bundled.CALIBRATIONS]
    assert {p.setting.model for p in profiles} == {model.fingerprint.former} == {weights_alone(model)}
    assert model.fingerprint != model.fingerprint.former
    for profile in profiles:
        run = replace(profile.setting, model=model.fingerprint, text_encoder=model.text_encoder)
        assert profile.setting.mismatch(run, "first step") is None
    found = store.find(setting_of(model, Measurement()), "first step", also=bundled.CALIBRATIONS)
    assert found is not None and found.setting == profiles[0].setting


def test_the_published_tokenizer_leaves_the_text_encoder_as_it_is(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(str(folders["xl"]))
    digests = [adapter.tokenizer_digest(tokenizer) for tokenizer, _ in model._encoders]
    assert len(set(digests)) == 2 and not {*digests} & {*adapter._KNOWN_TOKENIZERS}
    assert model.fingerprint.former != weights_alone(model)
    monkeypatch.setattr(adapter, "_KNOWN_TOKENIZERS", tuple(digests))
    published = load(str(folders["xl"]))
    assert published.fingerprint.former == weights_alone(model)
    assert published.fingerprint == model.fingerprint and published.text_encoder != model.text_encoder


def test_the_text_encoder_is_told_apart_by_the_vocabulary_and_the_order_of_the_merges(
    folders: dict[str, Path], models: dict[str, DiffusersModel], tmp_path: Path
) -> None:
    def swapped(vocabulary: dict[str, int]) -> None:
        vocabulary["fox</w>"], vocabulary["red</w>"] = vocabulary["red</w>"], vocabulary["fox</w>"]

    found, former = {models["1.x"].text_encoder}, {models["1.x"].fingerprint.former}
    folder = Path(shutil.copytree(folders["1.x"], tmp_path / "swapped"))
    edit(folder / "tokenizer" / "vocab.json", swapped)
    model = load(str(folder))
    found.add(model.text_encoder)
    former.add(model.fingerprint.former)
    folder = Path(shutil.copytree(folders["1.x"], tmp_path / "turned"))
    merges = folder / "tokenizer" / "merges.txt"
    head, first, second, *rest = merges.read_text().splitlines()
    merges.write_text("\n".join([head, second, first, *rest]) + "\n")
    model = load(str(folder))
    found.add(model.text_encoder)
    former.add(model.fingerprint.former)
    assert len(found) == len(former) == 3 and model.fingerprint == models["1.x"].fingerprint


@pytest.mark.parametrize("family", ["1.x", "2.x", "xl"])
def test_a_checkpoint_file_is_the_same_model_as_its_folder_in_every_precision(
    family: str, folders: dict[str, Path], models: dict[str, DiffusersModel]
) -> None:
    """The file's names are the hosts'; the folder's are diffusers'."""
    file = miniatures.original_names(folders[family])
    unet = [(n, t.half(), None) for n, t in file.items() if n.startswith("model.diffusion_model.")]
    encoders = [(n, t, None) for n, t in file.items() if n.startswith(("cond_stage_model.", "conditioner."))]
    model = models[family]
    half = load(str(folders[family]), dtype="float16")
    assert model.fingerprint == half.fingerprint == fingerprint(sampled(unet), model.prediction_type)
    told = fingerprint(sampled(of_text_encoder(encoders)))
    tokenizers = [adapter.tokenizer_digest(tokenizer).encode() for tokenizer, _ in model._encoders]
    assert model.text_encoder == half.text_encoder == digest(told.encode(), *tokenizers)
    assert load(str(folders[family]), dtype="bfloat16").fingerprint != model.fingerprint


def test_dtypes_and_devices_that_are_not_there(folders: dict[str, Path]) -> None:
    folder = str(folders["1.x"])
    assert sentence(folder, dtype="int8") == "dtype 'int8' is unknown: use one of float32, float16, bfloat16"
    assert sentence(folder, device="abacus") == "device 'abacus' is unknown: use cpu, cuda, cuda:1 or mps"
    assert sentence(folder, device="meta") == "device 'meta' cannot be used here: use cpu, cuda, cuda:1 or mps"
    assert "this PyTorch sees no such device: use --device cpu" in sentence(folder, device="cuda:99")


# --------------------------------------------------------------------------------------------- quiet


def test_nothing_is_printed(folders: dict[str, Path], tmp_path: Path) -> None:
    """A process of its own, with every Python warning shown: nothing comes out, and the libraries' levels stay."""
    single = miniatures.write_single_file(folders["1.x"], tmp_path / "model.ckpt")
    script = f"""
import diffusers, transformers
levels = [l.utils.logging.get_verbosity() for l in (diffusers, transformers)]
import warnings; warnings.simplefilter("always")
from sd_dejavu.hosts.diffusers.load import load
folders = {[str(f) for f in folders.values()]!r}
for model in (*map(load, folders), load(folders[2], dtype="float16"), load({str(single)!r}, config=folders[0])):
    rows = model.encode("the red fox " * 30)
    with model.differentiable(checkpointing=True):
        model(model.noise(0, 1), model.schedule.alphas_cumprod[:1], rows)
    model.decode(model.noise(0, 1))
assert levels == [l.utils.logging.get_verbosity() for l in (diffusers, transformers)]
assert diffusers.utils.logging.is_progress_bar_enabled() and transformers.utils.logging.is_progress_bar_enabled()
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
