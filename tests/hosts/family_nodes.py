"""A custom node pack for ComfyUI: models of today's families at a hundredth of their size, and what looks on.

The host's own classes of each family, with random weights, from configurations that its loaders would not take; and a
text encoder that gives what the family's own gives (rows, pooled vector, masks, a second encoder's rows), of a length
that depends on the prompt. Only a ComfyUI process can import this module.
"""

from __future__ import annotations

import sys
import zlib
from types import SimpleNamespace
from typing import Any

import comfy.ldm.flux.model
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sample
import comfy.sd
import comfy.supported_models
import torch

WIDTH, VOCABULARY = 32, 997  # of the text encoder's rows

_FLUX = {
    "image_model": "flux",
    "guidance_embed": True,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": WIDTH,
    "context_in_dim": WIDTH,
    "hidden_size": 64,
    "mlp_ratio": 2.0,
    "num_heads": 4,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [4, 6, 6],
    "theta": 10000,
    "qkv_bias": True,
    "txt_ids_dims": [],
}
_LUMINA = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 48,
    "cap_feat_dim": WIDTH,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 1,
    "multiple_of": 16,
    "ffn_dim_multiplier": 2.0,
    "qk_norm": True,
    "axes_dims": [8, 8, 8],
    "axes_lens": [300, 512, 512],
}
_Z_IMAGE = {
    **_LUMINA,
    "dim": 256,  # its modulation takes no less
    "n_heads": 4,
    "n_kv_heads": 4,
    "axes_dims": [16, 24, 24],
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
_QWEN = {
    "image_model": "qwen_image",
    "in_channels": 64,
    "num_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "axes_dims_rope": (4, 6, 6),
}
_HUNYUAN_DIT = {
    "image_model": "hydit",
    "depth": 2,
    "hidden_size": 64,
    "num_heads": 4,
    "text_states_dim": WIDTH,
    "text_states_dim_t5": WIDTH,
    "text_len": 8,
    "text_len_t5": 16,
}
_WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 48,
    "ffn_dim": 64,
    "freq_dim": 64,
    "text_dim": WIDTH,
    "text_len": 16,
    "num_heads": 2,
    "num_layers": 1,
    "in_dim": 16,
    "out_dim": 16,
    "patch_size": (1, 2, 2),
}
FAMILIES = {
    "Flux": ("Flux", _FLUX),
    "Lumina2": ("Lumina2", _LUMINA),
    "Z-Image": ("ZImage", _Z_IMAGE),
    "Qwen-Image": ("QwenImage", _QWEN),
    "HunyuanDiT": ("HunyuanDiT", _HUNYUAN_DIT),
    "Wan 2.1": ("WAN21_T2V", _WAN),
}


def _fill(module: torch.nn.Module, seed: int) -> None:
    """Random weights: unit variance goes through, and what multiplies stays near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):
        drawn = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1:
            drawn = drawn / max(1, tensor[0].numel()) ** 0.5
        else:
            drawn = 0.1 * drawn + float(name.endswith(("weight", "scale")))
        tensor.data.copy_(drawn)


class FamilyModel:
    """A model of this family; its weights depend on nothing but the family."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CLIP"), "load", "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"family": (list(FAMILIES),)}}

    def load(self, family: str) -> tuple[Any, Any]:
        name, unet_config = FAMILIES[family]
        if name == "Flux":
            known = comfy.ldm.flux.model.FluxParams.__dataclass_fields__
            unet_config = {key: v for key, v in unet_config.items() if key in known or key == "image_model"}
        config = getattr(comfy.supported_models, name)(unet_config)
        config.set_inference_dtype(torch.float32, None)
        device = comfy.model_management.get_torch_device()
        model = config.get_model({}, device=comfy.model_management.unet_offload_device())
        _fill(model.diffusion_model, zlib.crc32(family.encode()))
        patcher = comfy.model_patcher.ModelPatcher(
            model.eval(), load_device=device, offload_device=comfy.model_management.unet_offload_device()
        )
        target = SimpleNamespace(clip=ENCODERS[family], tokenizer=Tokenizer, params={})
        return (patcher, comfy.sd.CLIP(target))


# ------------------------------------------------------------------------------------------- text


class Tokenizer:
    """A start token, then one token a word."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **options: Any) -> dict[str, Any]:
        words = [1 + zlib.crc32(word.encode()) % (VOCABULARY - 1) for word in text.split()]
        return {"stand_in": [[(token, 1.0) for token in (0, *words)]]}


class Encoder(torch.nn.Module):
    """Rows that have read all the words before them, padded to a multiple of ``multiple`` and at least ``least``."""

    multiple, least = 1, 1

    def __init__(self, device: Any = None, dtype: Any = None, model_options: Any = None) -> None:
        super().__init__()
        self.dtypes = {torch.float32}
        self.table = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.mixing = torch.nn.Linear(WIDTH, WIDTH)
        self.padding = torch.nn.Parameter(torch.zeros(1, WIDTH))
        _fill(self, 5)
        self.requires_grad_(False)

    def set_clip_options(self, options: dict[str, Any]) -> None:
        pass

    def reset_clip_options(self) -> None:
        pass

    def read(self, tokens: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [1, N, WIDTH] and their mask [1, N]: 0 at padding."""
        numbers = torch.tensor([token for token, _ in tokens["stand_in"][0]])
        given = self.table(numbers)
        mean = given.cumsum(0) / torch.arange(1, len(given) + 1)[:, None]
        rows = given + torch.tanh(2 * self.mixing(mean))
        length = max(self.least, -(-len(rows) // self.multiple) * self.multiple)
        filled = torch.cat([rows, 3 * self.padding.expand(length - len(rows), WIDTH)])
        return filled[None], (torch.arange(length) < len(rows)).long()[None]

    def encode_token_weights(self, tokens: Any) -> tuple[Any, ...]:
        raise NotImplementedError


class FluxEncoder(Encoder):
    """T5's rows, padded, without a mask, and CLIP's pooled vector."""

    least = 12

    def encode_token_weights(self, tokens: Any) -> tuple[Any, ...]:
        rows, mask = self.read(tokens)
        return rows, rows[:, int(mask.sum()) - 1]


class LuminaEncoder(Encoder):
    """As many rows as tokens; the mask masks none of them, the host counts by it."""

    def encode_token_weights(self, tokens: Any) -> tuple[Any, ...]:
        rows, mask = self.read(tokens)
        return rows, None, {"attention_mask": mask}


class QwenEncoder(Encoder):
    """The mask is there for some prompts only: where nothing is masked it is left out."""

    multiple = 4

    def encode_token_weights(self, tokens: Any) -> tuple[Any, ...]:
        rows, mask = self.read(tokens)
        return rows, None, {} if bool(mask.all()) else {"attention_mask": mask}


class HunyuanEncoder(Encoder):
    """Rows of two encoders of fixed lengths, each with a mask."""

    def encode_token_weights(self, tokens: Any) -> tuple[Any, ...]:
        rows, mask = self.read(tokens)
        first = torch.nn.functional.pad(rows, (0, 0, 0, 16))[:, :8]
        second = torch.nn.functional.pad(rows.flip(-1), (0, 0, 0, 16))[:, :16]
        pad = torch.nn.functional.pad(mask, (0, 16))
        extra = {"attention_mask": pad[:, :8], "conditioning_mt5xl": second, "attention_mask_mt5xl": pad[:, :16]}
        return first, rows[:, 0], extra


class WanEncoder(Encoder):
    """Rows of a fixed length, zero behind the prompt."""

    def encode_token_weights(self, tokens: Any) -> tuple[Any, ...]:
        rows, _ = self.read(tokens)
        return torch.nn.functional.pad(rows, (0, 0, 0, 16))[:, :16], None


ENCODERS: dict[str, type[Encoder]] = {
    "Flux": FluxEncoder,
    "Lumina2": LuminaEncoder,
    "Z-Image": LuminaEncoder,
    "Qwen-Image": QwenEncoder,
    "HunyuanDiT": HunyuanEncoder,
    "Wan 2.1": WanEncoder,
}


# -------------------------------------------------------------------------------------- looking on


class OnLook:
    """Sees every call of the network below all guidance: whose conditionings, at which level, and what came out."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "SEEN"), "look", "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def look(self, model: Any) -> tuple[Any, list[Any]]:
        seen: list[Any] = []
        clone = model.clone()

        def note(module: Any, arguments: Any, named: dict[str, Any], output: torch.Tensor) -> None:
            options = named["transformer_options"]
            level = float(options["sigmas"][0])
            seen.append((list(options["cond_or_uncond"]), output.detach().float().clone(), level))

        def outer_sample(executor: Any, *arguments: Any, **named: Any) -> torch.Tensor:
            network = executor.class_obj.model_patcher.model.diffusion_model
            handle = network.register_forward_hook(note, with_kwargs=True)
            seen.clear()  # the node above is cached and goes on to fill the same list
            try:
                return executor(*arguments, **named)
            finally:
                handle.remove()

        clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, "onlook", outer_sample)
        return (clone, seen)


class OnLooked:
    """What was seen: conditionings of each call, and the norms of the first difference between two of them."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "tell", "test", True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"seen": ("SEEN",), "samples": ("LATENT",)}}

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> float:
        return float("nan")

    def tell(self, seen: list[Any], samples: dict[str, Any]) -> dict[str, Any]:
        parts = [part for which, output, _ in seen for part in output.chunk(len(which))][:2]
        gap = (parts[0] - parts[1]).flatten(1).norm(dim=1).tolist() if len(parts) == 2 else []
        shape = list(samples["samples"].shape)
        digest = [float(samples["samples"].double().sum()), float(samples["samples"].double().square().sum())]
        calls = [[level, *which] for which, _, level in seen]
        return {"ui": {"norms": gap, "sigma": [seen[0][2]], "calls": calls, "shape": shape, "digest": digest}}


class Slopes:
    """The score's slopes along one direction of rows and of the pooled vector: by gradient, and by differences."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "do", "test", True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "positive": ("CONDITIONING",),
                "negative": ("CONDITIONING",),
                "latent_image": ("LATENT",),
                "sigma": ("FLOAT", {"max": 1000.0}),
                "step": ("FLOAT", {}),
            }
        }

    def do(self, model: Any, positive: Any, negative: Any, latent_image: Any, sigma: float, step: float) -> Any:
        host = next(m for name, m in sys.modules.items() if name.endswith("sd_dejavu.hosts.comfyui"))
        latent = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))

        def work(dejavu: Any, x: torch.Tensor, level: torch.Tensor) -> list[float]:
            given = host.conditioning_of(*positive[0])
            base = host.conditioning_of(*negative[0])
            generator = torch.Generator().manual_seed(1)
            along = torch.randn(given.rows.shape, generator=generator)
            pooled = given.extras.get("pooled_output")
            beside = None if pooled is None else torch.randn(pooled.shape, generator=generator)

            def moved(rows: torch.Tensor, vector: Any) -> Any:
                return given.with_rows(rows, {} if vector is None else {"pooled_output": vector})

            def loss(conditioning: Any) -> torch.Tensor:
                gap = dejavu(x, level, conditioning) - unconditional
                return (gap / level[0]).flatten(1).norm(dim=1).mean()

            with torch.no_grad():
                unconditional = dejavu(x, level, base)
            with dejavu.differentiable():
                x, level, unconditional = x.clone(), level.clone(), unconditional.clone()
                rows = given.rows.clone().float().requires_grad_(True)
                vector = None if pooled is None else pooled.clone().float().requires_grad_(True)
                leaves = [rows] if vector is None else [rows, vector]

                def slopes() -> list[float]:
                    found = torch.autograd.grad(loss(moved(rows, vector)), leaves, allow_unused=True)
                    return [
                        0.0 if gradient is None else float((gradient * direction).sum())
                        for gradient, direction in zip(found, (along, beside), strict=False)
                    ]

                by_gradient = slopes()
                by_difference = []
                with torch.no_grad():
                    for number in range(len(leaves)):
                        ends = []
                        for sign in (1, -1):
                            new = [leaf.detach().clone() for leaf in leaves]
                            new[number] += sign * step * (along, beside)[number]
                            ends.append(float(loss(moved(new[0], new[1] if len(new) > 1 else None))))
                        by_difference.append((ends[0] - ends[1]) / (2 * step))
            with dejavu.differentiable(checkpointing=True):
                recomputed = slopes()
            return [*by_gradient, *by_difference, *recomputed]

        found = host.with_model(model, positive, latent, noise, torch.tensor([sigma, 0.0]), work)
        return {"ui": {"slopes": found}}


class RatioLatent:
    """An empty latent that says how many pixels it counts a cell, as newer versions of the host do."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"side": ("INT", {}), "ratio": ("INT", {})}}

    def make(self, side: int, ratio: int) -> tuple[dict[str, Any]]:
        return ({"samples": torch.zeros(1, 4, side, side), "downscale_ratio_spacial": ratio},)


class SeveralDevices:
    """What the host puts into a run's options for several devices: here there is one."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "do", "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def do(self, model: Any) -> tuple[Any]:
        clone = model.clone()

        def outer_sample(executor: Any, *arguments: Any, **named: Any) -> torch.Tensor:
            guider = executor.class_obj
            guider.model_options["multigpu_clones"] = {clone.load_device: guider.model_patcher}
            try:
                return executor(*arguments, **named)
            finally:
                del guider.model_options["multigpu_clones"]

        clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, "devices", outer_sample)
        return (clone,)


NODE_CLASS_MAPPINGS = {
    "FamilyModel": FamilyModel,
    "OnLook": OnLook,
    "OnLooked": OnLooked,
    "RatioLatent": RatioLatent,
    "SeveralDevices": SeveralDevices,
    "Slopes": Slopes,
}
