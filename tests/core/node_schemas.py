"""What our nodes tell the host of themselves, without the host: any name of its modules stands for nothing but itself."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NOWHERE = str(ROOT / "no such folder")
PACK = "dejavu_pack"
HOST = ("comfy", "comfy_api", "comfy_execution", "folder_paths", "server")
WIDGETS = {"STRING", "INT", "FLOAT", "BOOLEAN", "COMBO"}


@dataclass(frozen=True)
class Slot:
    """An input or an output; ``label`` is its name as it is shown, ``given`` all else that the node says of it."""

    name: str
    type: str
    tooltip: str
    is_optional: bool
    given: dict[str, Any]
    label: str

    @property
    def id(self) -> str:
        """As the host calls an input's name."""
        return self.name


@dataclass(frozen=True)
class Node:
    id: str
    display_name: str
    description: str
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]

    @property
    def sockets(self) -> list[tuple[str, str]]:
        """In the front end's order: required ones first, then optional ones."""
        return [(i.name, i.type) for i in self._ordered if i.type not in WIDGETS]

    @property
    def widgets(self) -> list[Slot | None]:
        """In the front end's order; None is the value that says what becomes of a seed after each run."""
        found: list[Slot | None] = []
        for known in self._ordered:
            if known.type in WIDGETS:
                found += [known, None] if known.given.get("control_after_generate") else [known]
        return found

    @property
    def _ordered(self) -> list[Slot]:
        return sorted(self.inputs, key=lambda i: i.is_optional)


@cache
def declared() -> dict[str, Node]:
    """All nodes of the pack by their ids."""
    with pack() as load:
        listed = [load(f"nodes.{file.stem}") for file in sorted((ROOT / "nodes").glob("*.py"))]
        schemas = [node.define_schema() for module in listed for node in getattr(module, "NODES", ())]
    return {
        s.node_id: Node(s.node_id, s.display_name, s.description, tuple(s.inputs), tuple(s.outputs)) for s in schemas
    }


@contextmanager
def pack() -> Iterator[Callable[[str], ModuleType]]:
    """While open, modules of the pack can be loaded by their names; none of it stays."""
    before, finder = set(sys.modules), _Finder()
    sys.meta_path.insert(0, finder)
    sys.modules[PACK] = ModuleType(PACK)
    sys.modules[PACK].__path__ = [str(ROOT)]
    try:
        yield lambda name: importlib.import_module(f"{PACK}.{name}")
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in (PACK, *HOST):
                del sys.modules[name]


class _Anything(type):
    """A class whose every attribute is another such class."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Module(ModuleType):
    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self.__name__ == "folder_paths":
            return NOWHERE if name.endswith("_dir") else lambda *given: NOWHERE
        return _Api() if name == "io" else _Anything(name, (), {})


class _Api:
    """comfy_api's ``io``."""

    ComfyNode = object
    Schema = SimpleNamespace

    def __getattr__(self, name: str) -> Any:
        type_ = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).upper()  # ClipVision is CLIP_VISION
        return _kind(type_) if name != "Hidden" else _Anything(name, (), {})

    @staticmethod
    def Custom(name: str) -> Any:
        return _kind(name)


def _kind(type_: str) -> Any:
    def slot(name: str = "", display_name: str = "", tooltip: str = "", optional: bool = False, **given: Any) -> Slot:
        return Slot(name, type_, tooltip, optional, given, display_name or name.replace("_", " "))

    def output(display_name: str = "", **given: Any) -> Slot:
        return slot(display_name or type_, **given)

    return SimpleNamespace(Input=slot, Output=output)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self) if name.partition(".")[0] in HOST else None

    def create_module(self, spec: Any) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""
