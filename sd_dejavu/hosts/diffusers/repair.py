"""What a repair needs of this host: which weights of the base model a LoRA's file is for."""

from __future__ import annotations

from collections.abc import Mapping

from ...training.lora_files import Contents
from ...training.spectral import Place
from .adapter import DiffusersModel
from .lora import placed


def places_of(model: DiffusersModel, contents: Contents) -> tuple[Contents, Mapping[str, Place]]:
    """The contents as this model takes them, and the place of each of their modules that fits it, by name."""
    encoders = [part for part, _ in model.family.text_encoders]
    contents, modules = placed(model.pipeline, model.family.network, encoders, contents)
    names = {
        id(module): (part, name)
        for part in (model.family.network, *encoders)
        for name, module in getattr(model.pipeline, part).named_modules()
    }
    weights = {name: module.get_parameter("weight") for name, module in modules.items()}
    return contents, {name: Place(*names[id(module)], weights[name].detach().cpu()) for name, module in modules.items()}
