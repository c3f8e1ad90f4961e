"""Automatic1111, Forge and ComfyUI-Manager run this at start. It installs nothing: everything needed comes with the host."""

import importlib.util

NEEDED = ("torch", "numpy", "safetensors", "PIL", "jinja2", "markupsafe")

missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if missing:
    print(f"[Déjà Vu] These packages are missing and every host brings them: {', '.join(missing)}. Repair the host.")
