"""Déjà Vu for ComfyUI: the pack's entry. Nothing is imported here when Python meets the folder by itself."""

if __package__:
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./web"

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
