"""What works on this machine, and what does not, and why: packages, devices, gradients, the folder of calibrations."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import torch

from .calibration.store import user_folder
from .core.memory import free_memory
from .kept.foreign import one_line

GIB = 1024**3
LEAST_MEMORY = 4 * GIB  # what words of one image take beside Stable Diffusion 1.5's weights in half precision
_PACKAGES = {
    "torch": "everything",
    "numpy": "everything",
    "safetensors": "reading weights and reference sets",
    "jinja2": "reports",
    "pillow": "images",
    "diffusers": "reading models",
    "transformers": "reading models",
    "peft": "training LoRAs",
    "pyarrow": "lists and training sets in Parquet",
}
_OF_COMMANDS = ("diffusers", "transformers", "peft", "pyarrow")  # a host reads its models itself
_OPTIONAL = {"peft": "finetune", "pyarrow": "parquet"}  # and the extra that installs it


@dataclass(frozen=True)
class Finding:
    """One line: ``name`` and what was found; ``works`` is None where that is nothing to judge, and ``advice`` the one
    thing to do where it does not work."""

    name: str
    value: str
    works: bool | None = None
    advice: str = ""


_MARKS = {True: "works", False: "fails", None: "-"}


def in_lines(found: Finding) -> list[str]:
    """A finding as it is told: a line, and its advice in a second one.

    >>> in_lines(Finding("peft", "not installed", None, "pip install peft"))
    ['-     peft: not installed', '      pip install peft']
    """
    return [f"{_MARKS[found.works]:6}{found.name}: {found.value}", *([f"      {found.advice}"] if found.advice else [])]


def headline(found: Iterable[Finding]) -> str:
    """What stands above the lines: whether all works, or how much does not and what that is.

    >>> headline([Finding("torch", "2.1", True), Finding("peft", "not installed")])
    'Everything works on this machine.'
    >>> headline([Finding("cpu", "too little", False), Finding("numpy", "not installed", False)])
    '2 things do not work here: cpu, numpy.'
    """
    failing = [one.name for one in found if one.works is False]
    if not failing:
        return "Everything works on this machine."
    return (
        f"{'1 thing does' if len(failing) == 1 else f'{len(failing)} things do'} not work here: {', '.join(failing)}."
    )


def findings(calibrations: Path | None = None, in_host: bool = False) -> Iterator[Finding]:
    """The lines, one after another. Asks no network.

    ``calibrations`` is the folder where they are kept, that of the commands by default; ``in_host`` leaves out packages
    that only the commands need.
    """
    yield Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    wanted = (name for name in _PACKAGES if not (in_host and name in _OF_COMMANDS))
    yield from (_package(name, _PACKAGES[name]) for name in wanted)
    for device in _devices():
        yield _memory(device)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            yield _gradients(device, dtype)
    yield _folder(user_folder() / "calibration" if calibrations is None else calibrations)


def _package(name: str, use: str) -> Finding:
    if util.find_spec({"pillow": "PIL"}.get(name, name)) is None:
        extra = _OPTIONAL.get(name)
        command = f"pip install 'sd-dejavu[{extra}]'" if extra else f"pip install {name}"
        return Finding(name, "not installed", None if extra else False, f"for {use}: {command}")
    try:
        return Finding(name, metadata.version(name), True)
    except metadata.PackageNotFoundError:
        return Finding(name, "installed, without its version", True)


def _devices() -> list[torch.device]:
    cards = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    metal = [torch.device("mps")] if torch.backends.mps.is_available() else []
    return [*cards, *metal, torch.device("cpu")]


def _memory(device: torch.device) -> Finding:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cores"
    free = free_memory(device)
    value = name if free is None else f"{name}, {free / GIB:.1f} GiB free"
    if free is not None and free < LEAST_MEMORY:
        return Finding(str(device), value, False, "too little for the words of an image: close other programs")
    return Finding(str(device), value, True)


def _gradients(device: torch.device, dtype: torch.dtype) -> Finding:
    """The gradient of a small sum of squares, whose value is known."""
    name = f"{device}, {str(dtype).removeprefix('torch.')}"
    try:
        x = torch.full((64, 64), 0.5, device=device, dtype=dtype, requires_grad=True)
        begun = time.perf_counter()
        (found,) = torch.autograd.grad((x @ torch.eye(64, device=device, dtype=dtype)).square().sum(), x)
        right = torch.allclose(found.float().cpu(), torch.ones(64, 64))
        seconds = time.perf_counter() - begun
    except Exception as error:  # devices refuse what they cannot do with errors of many kinds
        return Finding(name, one_line(error), False, "choose another precision")
    if not right:
        return Finding(name, "gradients are wrong", False, "choose another precision")
    return Finding(name, f"gradients in {1000 * seconds:.0f} ms", True)


def _folder(folder: Path) -> Finding:
    count = len(list(folder.glob("*.json"))) if folder.is_dir() else 0
    place = next(one for one in (folder, *folder.parents) if one.exists())
    value = f"{count} kept in {folder}"
    if not os.access(place, os.W_OK):
        return Finding("calibrations", value, False, f"{place} cannot be written to: change its permissions")
    return Finding("calibrations", value, True)


def timed(work: Callable[[], str], name: str, advice: str) -> Finding:
    """One piece of real work: what it found and how long it took, or the first line of how it failed."""
    begun = time.perf_counter()
    try:
        found = work()
    except Exception as error:  # whatever keeps it from working is what was asked
        return Finding(name, one_line(error), False, advice)
    return Finding(name, f"{found}, in {time.perf_counter() - begun:.1f} s", True)


def version() -> str:
    """The version of this package, and whether it is installed or a folder of a host's."""
    folder = Path(__file__).parents[1]
    try:
        return f"{metadata.version('sd-dejavu')}, installed"
    except metadata.PackageNotFoundError:
        project = folder / "pyproject.toml"
        found = re.search(r'^version = "(.+)"$', project.read_text("utf-8") if project.is_file() else "", re.MULTILINE)
        return f"{found[1] if found else 'of unknown version'}, in the folder {folder.name}"
