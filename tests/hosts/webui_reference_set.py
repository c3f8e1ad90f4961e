"""A reference set in the data folder of a webui, made by the command line as a user makes it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from webui_server import WebUIServer

ROOT = Path(__file__).parents[2]


@contextmanager
def reference_set(
    server: WebUIServer, name: str, source: Path, pairs: Iterable[tuple[np.ndarray, str]]
) -> Iterator[None]:
    """Of images (uint8 [H, W, 3]) with captions, written to the folder ``source``; afterwards it is gone."""
    for number, (image, caption) in enumerate(pairs):
        Image.fromarray(image).save(source / f"{number}.png")
        (source / f"{number}.txt").write_text(caption, encoding="utf-8")
    made = server.home / "dejavu" / "references" / f"{name}.safetensors"
    made.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "sd_dejavu", "refset", "build", str(source), str(made), "--features", "grey"]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    try:
        yield
    finally:
        for file in (made, made.with_suffix(".json")):
            file.unlink(missing_ok=True)
