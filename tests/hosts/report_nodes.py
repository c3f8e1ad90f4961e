"""Nodes that do to a model what packs of public reports do; for test_public_reports.py."""

from __future__ import annotations

import gc
import hashlib
from typing import Any

import comfy.patcher_extension
import torch

TYPES = comfy.patcher_extension.WrappersMP
KEYS = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_known: dict[str, Any] = {}


class GGMLTensor(torch.Tensor):
    """What a pack for quantised files keeps its weights in."""


def changed(function: Any) -> Any:
    """A node that makes another model of the one that is linked."""

    class Node:
        RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "do", "test"

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {"model": ("MODEL",)}}

        def do(self, model: Any) -> tuple[Any]:
            clone = model.clone()
            function(clone)
            return (clone,)

    return Node


def quantise(model: Any) -> None:
    weight = model.get_model_object(KEYS).detach().clone().as_subclass(GGMLTensor)
    model.add_object_patch(KEYS, torch.nn.Parameter(weight, requires_grad=False))


def change_options(model: Any) -> None:
    """Puts a function of its own into the run's options, by a new list, while the run is open."""

    def post_cfg(arguments: dict[str, Any]) -> Any:
        _known["called"] = _known.get("called", 0) + 1
        return arguments["denoised"]

    def outer_sample(executor: Any, *arguments: Any, **named: Any) -> Any:
        options = executor.class_obj.model_options
        before = options.get("sampler_post_cfg_function", [])
        options["sampler_post_cfg_function"] = [*before, post_cfg]
        return executor(*arguments, **named)

    def look(executor: Any, *arguments: Any, **named: Any) -> Any:
        options = executor.class_obj.model_options
        drawn = executor(*arguments, **named)
        left = options["sampler_post_cfg_function"]
        _known["left"] = [function is post_cfg for function in left]
        return drawn

    model.add_wrapper_with_key(TYPES.OUTER_SAMPLE, "other pack", outer_sample)
    model.wrappers[TYPES.OUTER_SAMPLE] = {"look": [look], **model.wrappers[TYPES.OUTER_SAMPLE]}


def swap_blocks(model: Any) -> None:
    """Each block's weights are a copy while it runs, and that memory is another's afterwards."""

    held: dict[Any, list[tuple[dict[str, Any], str, Any]]] = {}

    def bring(block: Any, arguments: Any) -> None:
        places = [part._parameters for part in block.modules()]
        held[block] = [
            (place, name, stored) for place in places for name, stored in place.items() if stored is not None
        ]
        for place, name, stored in held[block]:
            place[name] = torch.nn.Parameter(stored.detach().clone(), requires_grad=False)
        _known["swaps"] = _known.get("swaps", 0) + 1

    def take_away(block: Any, arguments: Any, output: Any) -> None:
        for place, name, stored in held.pop(block):
            with torch.inference_mode():
                place[name].fill_(float("nan"))
            place[name] = stored

    def outer_sample(executor: Any, *arguments: Any, **named: Any) -> Any:
        network = executor.class_obj.model_patcher.model.diffusion_model
        blocks = [part for group in (*network.input_blocks, *network.output_blocks) for part in group]
        hooks = [block.register_forward_pre_hook(bring) for block in blocks]
        hooks += [block.register_forward_hook(take_away) for block in blocks]
        try:
            return executor(*arguments, **named)
        finally:
            for hook in hooks:
                hook.remove()

    model.add_wrapper_with_key(TYPES.OUTER_SAMPLE, "swap", outer_sample)


def adapt(model: Any) -> None:
    """A LoRA of rank 1 on one layer, whatever the network."""
    generator = torch.Generator().manual_seed(0)
    key = next(key for key in model.model_state_dict() if key.endswith("attn2.to_k.weight"))
    rows, columns = model.model_state_dict()[key].shape
    up, down = torch.randn(rows, 1, generator=generator), torch.randn(1, columns, generator=generator)
    model.add_patches({key: ("diff", (0.05 * up @ down,))}, 1.0)


def look_at_cache(model: Any) -> None:
    """Counts the network's passes; linked above a cache, so that a skipped step is none."""

    def wrapper(executor: Any, *arguments: Any, **named: Any) -> Any:
        _known["passes"] = _known.get("passes", 0) + (not torch.is_grad_enabled())
        return executor(*arguments, **named)

    model.add_wrapper_with_key(TYPES.DIFFUSION_MODEL, "count", wrapper)


class State:
    """What a finished run has left: weights, the host's bookkeeping, what was counted, tensors that hold a graph."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "tell", "test", True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "after": ("LATENT",)}}

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> float:
        return float("nan")

    def tell(self, model: Any, after: Any) -> dict[str, Any]:
        gc.collect()
        network, digest, kinds = model.model.diffusion_model, hashlib.sha256(), set()
        for name, tensor in sorted(network.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.as_subclass(torch.Tensor).detach().contiguous().view(torch.uint8).numpy().tobytes())
        for parameter in network.parameters():
            kinds.add(
                (type(parameter).__name__, str(parameter.dtype), parameter.is_inference(), parameter.requires_grad)
            )
        patched = [name for name, part in network.named_modules() if "forward" in vars(part)]
        books = [str(kinds), patched, len(model.model_options.get("sampler_post_cfg_function", []))]
        books += [len(model.backup), len(model.object_patches_backup), str(model.model.current_weight_patches_uuid)]
        graphs = 0
        for found in gc.get_objects():
            if type(found) is torch.Tensor and found.grad_fn is not None:
                graphs += 1
        told = {"weights": digest.hexdigest(), "books": books, "graphs": graphs}
        told |= {name: _known.pop(name) for name in ("called", "left", "passes", "swaps") if name in _known}
        return {"ui": {"state": [told]}}


NODE_CLASS_MAPPINGS = {
    "ChangedOptions": changed(change_options),
    "CountedPasses": changed(look_at_cache),
    "OwnLora": changed(adapt),
    "Quantised": changed(quantise),
    "State": State,
    "SwappedBlocks": changed(swap_blocks),
}
