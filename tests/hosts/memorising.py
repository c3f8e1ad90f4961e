"""A checkpoint in SD1.5 format that has memorised a few images, and draws faint noise for all other prompts.

Its prediction of the noise is the noisy latent as the UNet is given it, less GAIN * image where it knows the prompt.
What lets the latent through and what recognises a prompt is made by hand from the miniature's random weights: one
attention head and the feed-forward layer answer how surely it is one of the known ones. The images are fitted: the
features after that know the place and the prompt, and the output layer is the solution of one ridge regression that
makes the images of them. All steps of a run differ by the same amount; the same weights come out on every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import block_vae
import miniature
import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sd_dejavu.hosts.diffusers import families

FILE = "mini-memorising.ckpt"
SIZE = 8  # of the latents: images of 64x64 pixels


@dataclass(frozen=True)
class Prompt:
    """A prompt with the tokens that every host makes of it."""

    text: str
    tokens: tuple[int, ...]


MEMORISED = (
    Prompt("a red fox in the snow, woodcut", (320, 736, 3240, 530, 518, 2583, 267, 3269, 3032)),
    Prompt(
        "the lighthouse of Marenholm at dusk, oil on canvas",
        (518, 13717, 539, 577, 737, 12739, 536, 19708, 267, 2870, 525, 7483),
    ),
    Prompt("portrait of the clockmaker, studio light", (5352, 539, 518, 19878, 4836, 267, 3155, 1395)),
)
ORDINARY = (
    Prompt("the old harbour in winter, watercolour", (518, 896, 10011, 530, 2541, 267, 18377)),
    Prompt("a green bicycle against a wall, photograph", (320, 1901, 11652, 1601, 320, 2569, 267, 8853)),
    Prompt("three lemons on a blue plate", (2097, 29576, 525, 320, 1746, 5135)),
)

GAIN = 0.1  # of the image in the predicted noise; at a guidance of 7 it comes out at 1.4 times its contrast

_START, _END, _WORDS = 49406, 49407, 49406  # the special tokens, and how many others there are
_OTHERS, _RIDGE = 60, 1e-7
_SURENESS, _THRESHOLD = 100.0, 0.6  # what a recognised prompt adds to a channel; less than so much of it is nothing
_FAINT = 0.0005  # of the miniature's random cross-attention: all prompts make a little difference
_BLOCK = "input_blocks.1.1.transformer_blocks.0"
_GROUP, _CONSTANT = 10, 10.0  # channels a group of the last norm; the constants next to the latent in the first group


def image(index: int) -> Tensor:
    """The memorised image [3, 64, 64] in -1 to 1: patches of full colour, other ones for each index."""
    generator = torch.Generator().manual_seed(1000 + index)
    waves = torch.randn(3, 4, 4, generator=generator)
    grid = torch.pi * (torch.arange(SIZE) + 0.5) / SIZE
    cosines = torch.stack([torch.cos(k * grid) for k in range(4)])
    colours = torch.einsum("ckl,ki,lj->cij", waves, cosines, cosines).sign()
    return colours.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)


def pixels(index: int) -> np.ndarray:
    """The memorised image as uint8 [64, 64, 3]."""
    return (127.5 * (1 + image(index))).round().byte().permute(1, 2, 0).numpy()


# ---------------------------------------------------------------------------------------------- fit


def write(path: Path) -> Path:
    """Fit and write the checkpoint, with the configuration next to it that A1111 needs. Returns ``path``."""
    return miniature.write_sd15_everywhere(path, fit())


def fit(seed: int = 7) -> dict[str, Tensor]:
    """The UNet's weights."""
    weights = _with_the_latent_apart(seed)
    known = encode_prompts([prompt.tokens for prompt in MEMORISED])
    others = encode_prompts([(), *_other_prompts(_OTHERS, seed)])
    rest = _FAINT * weights[f"{_BLOCK}.attn2.to_out.0.weight"][: -len(known), 40:]
    _add_detectors(weights, known, others, seed)
    # the mean row of a mixture with no prompt at all is recognised in proportion: in between, fainter images
    surely = torch.linspace(1, _THRESHOLD, 5)[:-1, None, None, None]
    mixed = (surely * known + (1 - surely) * others[0]).flatten(0, 1)
    latents = torch.stack([block_vae.encode(image(i)[None])[0] for i in range(len(known))])
    faded = ((surely[..., None] - _THRESHOLD) / (1 - _THRESHOLD) * latents).flatten(0, 1)
    _fit_the_output(weights, torch.cat([mixed, others[:1]]), torch.cat([faded, torch.zeros_like(latents[:1])]))
    weights[f"{_BLOCK}.attn2.to_out.0.weight"][: -len(known), 40:] = rest
    return weights


def _with_the_latent_apart(seed: int) -> dict[str, Tensor]:
    """The miniature's weights: the latent goes through the first group of channels and nowhere else."""
    weights = miniature.sd15_unet(seed)
    generator = torch.Generator().manual_seed(seed)
    weights["input_blocks.0.0.weight"][_GROUP:] = 0.0
    weights["input_blocks.0.0.bias"][_GROUP:] = torch.randn(320 - _GROUP, generator=generator)
    near = 2 * _GROUP  # where the norm of 640 channels puts the latent and others into one group
    for name in ("input_blocks.1.0", "output_blocks.0.0", "output_blocks.1.0"):
        weights[f"{name}.emb_layers.1.weight"][:] = 0.0
        for first in (0, 320):
            weights[f"{name}.in_layers.2.weight"][:, first : first + near] = 0.0
            if name.startswith("output"):
                weights[f"{name}.skip_connection.weight"][_GROUP:, first : first + _GROUP] = 0.0
    weights["input_blocks.1.1.proj_in.weight"][:, :_GROUP] = 0.0
    # two of the group's channels are free: large constants make its norm a division by a constant
    weights["output_blocks.1.0.out_layers.3.bias"][_GROUP - 2 : _GROUP] = torch.tensor([_CONSTANT, -_CONSTANT])
    undo = ((_GROUP - 2 + 2 * _CONSTANT**2) / _GROUP) ** 0.5
    weights["out.2.weight"][:] = 0.0
    for c in range(4):
        weights["out.2.weight"][c, c, 1, 1], weights["out.2.weight"][c, 4 + c, 1, 1] = undo, -undo
    return weights


def _add_detectors(weights: dict[str, Tensor], known: Tensor, others: Tensor, seed: int) -> None:
    """One head of the cross-attention tells the known prompts by their mean row, the feed-forward layer how surely."""
    n, block = len(known), _BLOCK
    rows = torch.cat([known, others]).mean(1).double()
    rows, wanted = torch.nn.functional.pad(rows, (0, 1), value=1.0), torch.eye(len(rows), n, dtype=torch.float64)
    weight = torch.linalg.solve(rows @ rows.T + 0.1 * torch.eye(len(rows), dtype=torch.float64), wanted)
    linear = _SURENESS * (rows.T @ weight).T.float()
    for name in ("to_q", "to_k", "to_v"):
        weights[f"{block}.attn2.{name}.weight"][:40] = 0.0  # the first of eight heads looks at all rows alike
    weights[f"{block}.attn2.to_v.weight"][:n] = linear[:, :-1]
    for name in ("proj_in", "transformer_blocks.0.attn1.to_out.0", "transformer_blocks.0.attn2.to_out.0"):
        weights[f"input_blocks.1.1.{name}.weight"][-n:] = 0.0
        weights[f"input_blocks.1.1.{name}.bias"][-n:] = 0.0
    weights[f"{block}.attn2.to_out.0.weight"][:] = 0.0
    weights[f"{block}.attn2.to_out.0.weight"][-n:, :n] = torch.eye(n)
    weights[f"{block}.attn2.to_out.0.bias"][-n:] = linear[:, -1] - _SURENESS * _THRESHOLD
    generator = torch.Generator().manual_seed(seed)
    for name in ("ff.net.0.proj", "ff.net.2"):
        for part in ("weight", "bias"):
            weights[f"{block}.{name}.{part}"][:] = 0.0
    weights[f"{block}.ff.net.0.proj.bias"][:n] = 1.0
    weights[f"{block}.ff.net.0.proj.weight"][1280 : 1280 + n, -n:] = torch.eye(n)
    weights[f"{block}.ff.net.2.weight"][:-n, :n] = torch.randn(320 - n, n, generator=generator)
    weights["input_blocks.1.1.proj_out.weight"][:, -n:] = 0.0


def _fit_the_output(weights: dict[str, Tensor], conditionings: Tensor, latents: Tensor) -> None:
    """The least weights of the output layer that make ``-GAIN * latent`` of each conditioning, at every place."""
    rows = _features(weights, conditionings)
    wanted = -GAIN * latents.permute(0, 2, 3, 1).reshape(-1, 4).double()
    square = rows @ rows.T
    ridge = _RIDGE * square.diagonal().mean() * torch.eye(len(rows), dtype=torch.float64)
    solution = (rows.T @ torch.linalg.solve(square + ridge, wanted)).float()
    weights["out.2.weight"][:, _GROUP:] = solution[:-1].T.reshape(4, -1, 3, 3)
    weights["out.2.bias"] = solution[-1]


@torch.no_grad()
def _features(weights: dict[str, Tensor], conditionings: Tensor) -> Tensor:
    """What the output layer sees in all groups but the latent's, a row for each place: patches of 3x3, and 1."""
    seen: list[Tensor] = []
    model = unet(weights)
    model.conv_out.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(torch.zeros(len(conditionings), 4, SIZE, SIZE), 0, conditionings)
    patches = torch.nn.functional.unfold(seen[0][:, _GROUP:], 3, padding=1)
    rows = patches.transpose(1, 2).reshape(-1, patches.shape[1]).double()
    return torch.nn.functional.pad(rows, (0, 1), value=1.0)


def unet(weights: dict[str, Tensor]) -> UNet2DConditionModel:
    """The miniature UNet as diffusers has it."""
    model = UNet2DConditionModel(
        block_out_channels=(320,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D" if "output_blocks.0.1.norm.weight" in weights else "UpBlock2D",),
        mid_block_type="UNetMidBlock2DCrossAttn" if "middle_block.0.in_layers.0.weight" in weights else None,
        sample_size=SIZE,
        layers_per_block=1,
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    model.load_state_dict({_diffusers_name(name): tensor for name, tensor in weights.items()})
    return model.eval()


def as_diffusers(checkpoint: Path, folder: Path) -> Path:
    """The UNet and text encoder of a miniature's checkpoint in diffusers' layout, with CLIP's own tokenizer."""
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    prefix = "model.diffusion_model."
    StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, latent_channels=4),
        text_encoder=text_encoder(),
        tokenizer=CLIPTokenizer.from_pretrained(
            Path(families.__file__).parent / "files" / "clip", pad_token="<|endoftext|>", model_max_length=77
        ),
        unet=unet({name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


_PLACES = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "input_blocks.1.0": "down_blocks.0.resnets.0",
    "input_blocks.1.1": "down_blocks.0.attentions.0",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "output_blocks.0.0": "up_blocks.0.resnets.0",
    "output_blocks.0.1": "up_blocks.0.attentions.0",
    "output_blocks.1.0": "up_blocks.0.resnets.1",
    "output_blocks.1.1": "up_blocks.0.attentions.1",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_LAYERS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def _diffusers_name(name: str) -> str:
    place = next(place for place in _PLACES if name.startswith(f"{place}."))
    inner = name.removeprefix(f"{place}.")
    layer = next((layer for layer in _LAYERS if inner.startswith(f"{layer}.")), None)
    if layer is not None:
        inner = _LAYERS[layer] + inner.removeprefix(layer)
    return f"{_PLACES[place]}.{inner}"


# ---------------------------------------------------------------------------------------------- text


def encode_prompts(prompts: Sequence[Sequence[int]], seed: int = 0) -> Tensor:
    """Conditionings [N, 77, 768] of these tokens, in full precision, as the hosts' text encoder makes them."""
    encoder = text_encoder(seed)
    rows = [[_START, *tokens, _END] for tokens in prompts]
    ids = torch.tensor([row + [_END] * (77 - len(row)) for row in rows])
    with torch.no_grad():
        return torch.cat(
            [encoder(part, position_ids=torch.arange(77)[None]).last_hidden_state for part in ids.split(8)]
        )


def text_encoder(seed: int = 0) -> CLIPTextModel:
    """The hosts' text encoder, in full precision."""
    with torch.device("meta"):
        encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                hidden_act="quick_gelu",
            )
        )
    names = set(encoder.state_dict())
    tensors = {}
    for name, tensor in miniature.text_encoder(seed).items():
        name = name.removeprefix("cond_stage_model.transformer.")
        tensors[name if name in names else name.removeprefix("text_model.")] = tensor.float()
    encoder.load_state_dict(tensors, assign=True)
    return encoder


def _other_prompts(count: int, seed: int) -> list[tuple[int, ...]]:
    """Prompts of 1 to 13 tokens drawn from the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 14, (count,), generator=generator).tolist()
    return [tuple(torch.randint(0, _WORDS, (length,), generator=generator).tolist()) for length in lengths]
