"""Models in diffusers layout, single-file checkpoints and hub ids, as denoisers for the core.

diffusers and transformers are imported only when a model is loaded.
"""


class ModelError(ValueError):
    """The model cannot be used; the text says why and what to do."""
