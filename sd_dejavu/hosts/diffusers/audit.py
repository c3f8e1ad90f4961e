"""What an audit needs of this host: the variants of a model, loaded wherever its tasks are done."""

from __future__ import annotations

from dataclasses import dataclass

from ...training.tasks import Trained, Variant
from .load import load


@dataclass(frozen=True)
class Load:
    """Loads a variant of a model; can be sent to another process. ``base`` is the model that it was trained from."""

    model: str | None = None
    config: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    prompt_weights: bool = False
    base: str | None = None

    def __call__(self, variant: Variant) -> Trained:
        named = self.base if variant.base and self.base is not None else self.model
        lora = None if variant.base else variant.lora
        return load(named, self.device, self.dtype, self.config, self.prompt_weights, lora, variant.strength)
