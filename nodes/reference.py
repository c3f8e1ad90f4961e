"""Reference images: a set built from training images, and whether an image is a copy of one of them."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io

from ..sd_dejavu.hosts.comfyui import reference as host
from ..sd_dejavu.hosts.comfyui.api import ClipVision
from ..sd_dejavu.reference.build import BuildSettings
from ..sd_dejavu.reference.left_out import notes_in_short
from ..sd_dejavu.reference.nearest import Answer
from ..sd_dejavu.reference.network_files import ENDINGS
from ..sd_dejavu.reference.parts import PartMatch
from ..sd_dejavu.reference.reading import Reading
from ..sd_dejavu.reference.reference_set import files_of
from ..sd_dejavu.reference.sources import open_source
from ..sd_dejavu.report.wording import part_sentence, skipped
from . import sockets

BUNDLED = "the bundled model's training pictures"  # as saved workflows name it
SSCD_FOLDER = "sscd"
# Parquet files have their usual columns; the others have inputs of one line.
NOT_CHOSEN = ("image_column", "caption_column", "trainer_config", "trigger_word")

folder_paths.add_model_folder_path(SSCD_FOLDER, os.path.join(folder_paths.models_dir, SSCD_FOLDER))


class BuildReferenceSet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DejaVuBuildReferenceSet",
            display_name="Build Reference Set (Déjà Vu)",
            category=sockets.CATEGORY,
            description="Makes a reference set from training images, to compare generated ones with. If you stop it, it goes on when you run it again.",
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=_input_folders(),
                    tooltip="A folder below ComfyUI's input folder: images with their captions as a trainer reads them, webdataset tars or Parquet files.",
                ),
                io.String.Input("name", default="my images", tooltip="The name to keep the set under."),
                io.Combo.Input(
                    "features",
                    options=host.feature_choices(list(_sscd_files())),
                    default="grey",
                    tooltip="What makes two images alike: grey, pixels and latents need no download; SSCD files are those in models/sscd; TorchScript can hold code, so take it from its authors only.",
                ),
                io.Boolean.Input(
                    "restart",
                    default=False,
                    tooltip="Throw away what is there under this name, finished or not, and start again.",
                ),
                io.ClipVision.Input(
                    "clip_vision", optional=True, tooltip="For features by a CLIP Vision model: from Load CLIP Vision."
                ),
                *sockets.inputs_of(Reading, NOT_CHOSEN, optional=True),
                io.String.Input(
                    "trainer_config",
                    display_name="trainer config",
                    default="",
                    optional=True,
                    tooltip="The trainer's own configuration, by its name below ComfyUI's input folder: kohya's dataset .toml, ai-toolkit's .yaml or OneTrainer's .json of concepts. It says folders, repeats and captions.",
                ),
                io.String.Input(
                    "trigger_word",
                    display_name="trigger word",
                    default="",
                    optional=True,
                    tooltip="What ai-toolkit put in for [trigger] and [name], if no configuration says it.",
                ),
            ],
            outputs=[
                sockets.References.Output(display_name="references", tooltip="For Nearest Reference and AMG."),
                io.String.Output(display_name="report", tooltip="What was read, and which images could not be."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str, **others: object) -> str:
        path = _input_folder(folder)
        return open_source(path, _reading(others)).identity if path is not None else ""

    @classmethod
    def validate_inputs(cls, folder: str | None, name: str | None, trainer_config: str | None = "") -> bool | str:
        return _fault_of(folder, name, trainer_config) or True

    @classmethod
    def execute(
        cls,
        folder: str,
        name: str,
        features: str,
        restart: bool,
        clip_vision: ClipVision | None = None,
        **reading: object,
    ) -> io.NodeOutput:
        path, fault = _input_folder(folder), _fault_of(folder, name, str(reading.get("trainer_config", "")))
        if path is None or fault:
            raise ValueError(fault)
        networks = host.chosen_features(features, clip_vision, _sscd_files())
        try:
            made = host.build_set(
                path, sockets.kept_folder("references") / f"{name}.safetensors", networks, restart, _reading(reading)
            )
        except ValueError as error:
            raise ValueError(str(error).replace("--restart", "'restart'")) from error
        text = _told(made, name)
        return io.NodeOutput(made, text, ui={"text": [text]})


class LoadReferenceSet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DejaVuLoadReferenceSet",
            display_name="Load Reference Set (Déjà Vu)",
            category=sockets.CATEGORY,
            description="A reference set made earlier, or the bundled model's own training images.",
            inputs=[
                io.Combo.Input("name", options=_names(), tooltip="The set."),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="The same CLIP Vision model that the set was made with, if it was made with one.",
                ),
            ],
            outputs=[sockets.References.Output(display_name="references", tooltip="For Nearest Reference and AMG.")],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str, **others: object) -> float:
        path = _set_file(name)
        return path.stat().st_mtime if path is not None else 0.0

    @classmethod
    def validate_inputs(cls, name: str | None) -> bool | str:
        if name is None:  # linked: the host does not know yet what will come
            return True
        return True if name in _names() else _absent(name)

    @classmethod
    def execute(cls, name: str, clip_vision: ClipVision | None = None) -> io.NodeOutput:
        if name == BUNDLED:
            return io.NodeOutput(host.bundled_set())
        path = _set_file(name)
        if path is None:
            raise ValueError(_absent(name))
        return io.NodeOutput(host.load_set(path, clip_vision, _sscd_files()))


def _absent(name: str) -> str:
    return f"there is no reference set {name!r}: make one with Build Reference Set"


class NearestReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DejaVuNearestReference",
            display_name="Nearest Reference (Déjà Vu)",
            category=sockets.CATEGORY,
            description="Is this image a copy? Shows it beside the training images that it is most like.",
            inputs=[
                io.Image.Input("image", tooltip="The images to look up."),
                sockets.References.Input("references", tooltip="From Build or Load Reference Set."),
                io.Int.Input("count", default=3, min=1, max=16, tooltip="How many training images to show of each."),
                io.Boolean.Input(
                    "parts",
                    default=False,
                    optional=True,
                    tooltip="Also look for copies of parts of training images: tiles, crops, mirrored. It takes longer the first time.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="side by side", tooltip="Each image, then its nearest training images."),
                io.Float.Output(display_name="similarity", tooltip="The highest similarity of the batch."),
                io.Boolean.Output(
                    display_name="copy",
                    tooltip="Whether any image is a copy by the features' threshold; no where there is none.",
                ),
                io.String.Output(display_name="report", tooltip="The neighbours of every image as JSON."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, image: torch.Tensor, references: host.HostReferences, count: int, parts: bool = False
    ) -> io.NodeOutput:
        from ..sd_dejavu.report.neighbour_image import neighbour_image

        answers = host.nearest(references, image, count)
        pixels = (image[..., :3].clamp(0, 1) * 255).round().byte().cpu().numpy()
        found = host.parts(references, image) if parts else [None] * len(answers)
        told = list(zip(answers, found, strict=True))
        shown = [
            neighbour_image(query, references.references, answer, part)
            for query, (answer, part) in zip(pixels, told, strict=True)
        ]
        records = [answer.as_json() | ({"part": part.as_json()} if part else {}) for answer, part in told]
        return io.NodeOutput(
            torch.cat([sockets.image_of(pair) for pair in shown]),
            max(answer.similarity for answer in answers),
            any(answer.copy for answer in answers),
            json.dumps(records, ensure_ascii=False),
            ui={"text": ["\n".join(_sentence(answer, part) for answer, part in told)]},
        )


def _sentence(answer: Answer, part: PartMatch | None) -> str:
    return answer.sentence if part is None else f"{answer.sentence}\n{part_sentence(part)}"


def _input_folders() -> list[str]:
    """All folders below the input folder, by their relative names."""
    top = Path(folder_paths.get_input_directory())
    found = []
    for place, folders, _ in os.walk(top):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name).relative_to(top).as_posix() for name in folders]
    return sorted(found)


def _input_folder(name: str) -> Path | None:
    """The folder of this very name; nothing outside the input folder can be named."""
    return Path(folder_paths.get_input_directory()) / name if name in _input_folders() else None


def _fault_of(folder: str | None, name: str | None, trainer_config: str | None) -> str:
    """What is wrong with the inputs of a build, in a sentence; of None, which are linked, nothing is known yet."""
    if folder is not None and _input_folder(folder) is None:
        return f"there is no folder {folder!r} below ComfyUI's input folder: put the images into one there"
    if name is not None and not re.fullmatch(r"\w([\w .-]*\w)?", name):
        return f"a set cannot be kept as {name!r}: use letters, digits, blanks, dots, '-' and '_'"
    if trainer_config is not None and trainer_config.strip() and _configuration(trainer_config) is None:
        return f"there is no configuration {trainer_config!r:.80} below ComfyUI's input folder: put it there"
    return ""


def _reading(values: dict[str, object]) -> BuildSettings:
    """As what the training images are read."""
    wanted: BuildSettings = sockets.settings_of(BuildSettings, values)
    return replace(wanted, trainer_config=str(_configuration(wanted.trainer_config) or ""))


def _configuration(name: str) -> Path | None:
    """A trainer's configuration by its name below the input folder; nothing outside of that can be named."""
    top = os.path.realpath(folder_paths.get_input_directory())
    path = Path(os.path.realpath(os.path.join(top, name.strip())))
    return path if name.strip() and path.is_file() and path.is_relative_to(top) else None


def _sscd_files() -> dict[str, Path]:
    found = (name for name in folder_paths.get_filename_list(SSCD_FOLDER) if name.lower().endswith(ENDINGS))
    return {name: Path(folder_paths.get_full_path_or_raise(SSCD_FOLDER, name)) for name in found}


def _names() -> list[str]:
    return [BUNDLED, *sorted(path.stem for path in sockets.kept_folder("references").glob("*.json"))]


def _set_file(name: str) -> Path | None:
    """The text of the set of this very name in our folder; nothing outside it can be named."""
    is_there = name != BUNDLED and name in _names()
    return files_of(sockets.kept_folder("references") / f"{name}.json")[1] if is_there else None


def _told(made: host.HostReferences, name: str) -> str:
    """What became of a build, with the images that were skipped."""
    references = made.references
    lines = [
        f"{references.details['source']}: {len(references)} different images, "
        f"{sum(bool(caption) for caption in references.captions)} with a caption, "
        f"{int(references.duplicates.sum())} shown in an epoch. Features {references.features}. Kept as {name}."
    ]
    lines += notes_in_short(references.details["notes"])
    return "\n".join([*lines, *skipped(references.details["skipped"], f"{name}.json")])


NODES = [BuildReferenceSet, LoadReferenceSet, NearestReference]
