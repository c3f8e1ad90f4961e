"""A real Automatic1111 or Forge in a process of its own, on the CPU, with all of its data below a folder of the test's.

Needs the standard library only, so that it runs in the project's environment while the host has its own.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import host_process
from host_process import HOST, HostProcess


@dataclass(frozen=True)
class Kind:
    """One of the two hosts; ``folder`` is its name in the user's cache, and here."""

    folder: str
    name: str
    variable: str
    on_the_cpu: tuple[str, ...]
    version_at: tuple[str, str]


A1111 = Kind(
    folder="a1111",
    name="Automatic1111",
    variable="DEJAVU_A1111",
    on_the_cpu=("--use-cpu", "all"),
    version_at=("CHANGELOG.md", r"## (\S+)"),
)
FORGE = Kind(
    folder="forge",
    name="Forge",
    variable="DEJAVU_FORGE",
    on_the_cpu=("--always-cpu", "--all-in-fp32", "--clip-in-fp32", "--vae-in-fp32"),
    version_at=("modules_forge/forge_version.py", r"version = '(.+?)'"),
)
KINDS = {kind.folder: kind for kind in (A1111, FORGE)}
SETTINGS = {"live_previews_enable": False}  # one of its ways downloads a model
STYLES = 'name,prompt,negative_prompt\nWoodcut,"{prompt}, woodcut by Moxgaen",blurry\n'  # read at the start


@dataclass(frozen=True)
class Generated:
    """What a run gave: the files, and the host's own account of them."""

    images: list[bytes]
    info: dict[str, Any]

    @property
    def infotexts(self) -> list[str]:
        """The generation parameters of each image, as the host writes them into the file."""
        texts: list[str] = self.info["infotexts"]
        return texts


def find_install(kind: Kind) -> Path | None:
    """The host's environment variable, or the folder in the user's cache; None if it is not there."""
    return next(iter(host_process.find_installs(kind.folder, kind.variable, "launch.py")), None)


def version(kind: Kind, install: Path) -> str:
    return host_process.version(install, host_process.number(install, *kind.version_at))


def make_home(
    home: Path,
    extension: Path | None = None,
    extensions: Sequence[Path] = (),
    models: Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """A data directory for the host; ``extension`` is linked as 'sd-dejavu', others under their own names.

    ``models`` is linked instead of an empty folder; ``settings`` are of the host's settings page. Returns ``home``.
    """
    for name in ("extensions", "temp"):
        (home / name).mkdir(parents=True, exist_ok=True)
    if models is None:
        (home / "models").mkdir(exist_ok=True)
    else:
        host_process.link({"models": models}, home)
    linked = {folder.name: folder for folder in extensions} | ({"sd-dejavu": extension} if extension else {})
    host_process.link(linked, home / "extensions")
    (home / "styles.csv").write_text(STYLES, encoding="utf-8")
    (home / "config.json").write_text(json.dumps(SETTINGS | dict(settings or {})), encoding="utf-8")
    return home


class WebUIServer(HostProcess):
    """With ``page=False`` the host offers its API alone."""

    threads = 1  # on a busy machine, two that wait for each other take four times as long for a miniature

    def __init__(
        self,
        kind: Kind,
        install: Path,
        home: Path,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        page: bool = True,
    ) -> None:
        temporary = {"GRADIO_TEMP_DIR": str(home / "temp"), "GRADIO_ANALYTICS_ENABLED": "False"}
        super().__init__(install, home, options, temporary | dict(env or {}))
        self.kind, self.name, self.page = kind, kind.name, page

    def _folder(self) -> Path:
        """A copy of the install's code: Gradio serves no file that has a dot before any folder's name in its path."""
        folder = self.home / "host"
        if not folder.exists():
            left_out = shutil.ignore_patterns("venv", ".git", "__pycache__")
            shutil.copytree(self.install, folder, ignore=left_out, symlinks=True)
        return folder

    def _command(self) -> list[str]:
        command = ["launch.py", "--skip-prepare-environment", "--skip-torch-cuda-test", "--skip-version-check"]
        command += ["--no-half", "--no-download-sd-model", "--disable-console-progressbars", *self.kind.on_the_cpu]
        command += ["--data-dir", str(self.home), "--styles-file", str(self.home / "styles.csv")]
        command += ["--server-name", HOST, "--port", str(self._port)]
        return [*command, "--api" if self.page else "--nowebui"]

    def _ready(self) -> bool:
        if "Startup time:" not in self.log():  # only then all extensions have been told that the host has started
            return False
        try:
            self.get("/sdapi/v1/options")
        except HTTPError as refused:
            return refused.code == 401  # it asks for a password, so it answers
        return True

    def reported_errors(self) -> list[str]:
        """What the host says went wrong, a line each: it reports errors of extensions in its log and goes on."""
        return re.findall(r"^\*\*\* (.+)", self.log(), re.MULTILINE)

    # ------------------------------------------------------------------------------------------ runs

    def txt2img(self, *, timeout: float = 300.0, **payload: Any) -> Generated:
        """An image of 64x64 pixels in 4 steps of Euler, seed 1, unless the payload says otherwise."""
        return self._generate("txt2img", payload, timeout)

    def img2img(self, image: bytes, *, timeout: float = 300.0, **payload: Any) -> Generated:
        """The same from an image's file."""
        start = {"init_images": [base64.b64encode(image).decode()]}
        return self._generate("img2img", start | payload, timeout)

    def interrupt(self) -> None:
        self.post_json("/sdapi/v1/interrupt", {})

    def progress(self) -> dict[str, Any]:
        """'progress' from 0 to 1, and the 'state' of the current run."""
        progress: dict[str, Any] = self.get_json("/sdapi/v1/progress?skip_current_image=true")
        return progress

    def options(self) -> dict[str, Any]:
        """All settings."""
        options: dict[str, Any] = self.get_json("/sdapi/v1/options")
        return options

    def set_options(self, **settings: Any) -> None:
        """Change settings, until they are changed again."""
        self.post_json("/sdapi/v1/options", settings)

    def scripts(self) -> dict[str, list[str]]:
        """Names of the scripts, in small letters, under 'txt2img' and 'img2img'."""
        scripts: dict[str, list[str]] = self.get_json("/sdapi/v1/scripts")
        return scripts

    def _generate(self, what: str, payload: Mapping[str, Any], timeout: float) -> Generated:
        default = {"prompt": "a red fox in the snow", "seed": 1, "steps": 4, "width": 64, "height": 64}
        default |= {"cfg_scale": 7, "sampler_name": "Euler"}
        answer = self.post_json(f"/sdapi/v1/{what}", default | payload, timeout)
        return Generated([base64.b64decode(image) for image in answer["images"]], json.loads(answer["info"]))
