"""The trainer's own configuration: which folders it reads, how often, and how it makes captions.

kohya's dataset ``.toml`` (or ``.json``) and the ``.toml`` of a whole training; ai-toolkit's ``.yaml`` (or ``.json``);
OneTrainer's ``.json`` of concepts, alone or within a whole configuration. What it says of paths is never opened: a
folder that it names is looked for among those of the training set, by the end of its path.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ..kept.foreign import CAPTION_BYTES, CONFIG_BYTES, Unreadable, contents, is_number, one_line
from .captions import Rules
from .layout import Found, Layout, Part, check_inside, check_repeats, numbered_parts, read_list, usual_ending
from .reading import CALLED, GUESS, Reading, Trainer
from .records import decoded

Values = Mapping[str, Any]
_LONGEST = 1000  # characters of one of its texts
_OFFERED = "give kohya's dataset .toml, ai-toolkit's .yaml or OneTrainer's .json of concepts"


@dataclass(frozen=True)
class _Named:
    """A part whose folder is still named as the trainer's machine has it."""

    path: str
    part: Part


def configured(path: Path, found: Found, reading: Reading) -> Layout:
    """The layout that a configuration describes. Raises ValueError with a sentence where it does not fit the folder."""
    document = _document(path)
    trainer, read = _of(document, path.name)
    if reading.trainer not in (GUESS, trainer):
        raise ValueError(
            f"{path.name} is a configuration of {CALLED[trainer]}, but the trainer is to be {reading.trainer}"
        )
    parts = read(document, found)
    for part in parts:
        check_repeats(part.repeats, path.name, "lower it")
    drawn = any(part.rules.tags_apart or 0 < part.rules.dropout < 1 for part in parts)
    how = f"as {path.name} says{', with what is shuffled or dropped at random read whole and in its order' if drawn else ''}"
    return Layout(trainer, tuple(parts), how, outside="unnamed")


def _of(document: Any, name: str) -> tuple[Trainer, Callable[[Any, Found], list[Part]]]:
    if isinstance(document, dict) and isinstance(document.get("config"), dict):
        return "ai-toolkit", _ai_toolkit
    if isinstance(document, dict) and isinstance(document.get("concepts"), list):
        return "onetrainer", lambda values, found: _onetrainer(values["concepts"], found)
    if isinstance(document, list):
        return "onetrainer", _onetrainer
    if isinstance(document, dict) and isinstance(document.get("datasets"), list):
        return "kohya", _kohya
    if isinstance(document, dict) and _KOHYAS & _flat(document).keys():
        return "kohya", _kohyas_training
    raise ValueError(f"{name} is no trainer's configuration that can be read: {_OFFERED}")


# ------------------------------------------------------------------------------------------------ kohya

_KOHYAS = {"train_data_dir", "caption_extension", "shuffle_caption", "enable_wildcard", "keep_tokens_separator"}


def _kohya(document: Values, found: Found) -> list[Part]:
    named = []
    for dataset in _dicts(document["datasets"]):
        for subset in _dicts(dataset.get("subsets")):
            given = [subset, dataset, _dict(document.get("general"))]
            values = {key: value for source in reversed(given) for key, value in source.items()}
            if _whole(values, "num_repeats", 1) > 0:
                named.append(_Named(_text(subset, "image_dir"), _kohyas_part(values, found)))
    return _placed(named, found)


def _kohyas_training(document: Values, found: Found) -> list[Part]:
    """A whole training's: the folder is its ``train_data_dir``, of numbered folders."""
    part = _kohyas_part(_flat(document), found)
    return numbered_parts(found, part) or [replace(part, deep=False)]


def _kohyas_part(values: Values, found: Found) -> Part:
    drop = _share(values, "caption_dropout_rate")
    rules = Rules(
        prefix=_text(values, "caption_prefix"),
        suffix=_text(values, "caption_suffix"),
        wildcards=_flag(values, "enable_wildcard"),
        separator=_text(values, "caption_separator") or ",",
        kept=_whole(values, "keep_tokens", 0),
        kept_separator=_text(values, "keep_tokens_separator"),
        second_separator=_text(values, "secondary_separator"),
        tags_apart=_flag(values, "shuffle_caption")
        or _share(values, "token_warmup_step") > 0
        or _share(values, "caption_tag_dropout_rate") > 0,
        dropout=1.0 if _whole(values, "caption_dropout_every_n_epochs", 0) == 1 else drop,
        tag_dropout=_share(values, "caption_tag_dropout_rate"),
        assumed=False,
    )
    listed = _file_of(_text(values, "metadata_file"), found)
    return Part(
        deep=bool(listed),  # the names in a list can lead into folders
        repeats=max(1, _whole(values, "num_repeats", 1)),
        endings=_ending(values, "caption_extension") or usual_ending(found),
        default=_text(values, "class_tokens"),
        list=read_list(found, listed) if listed else None,
        rules=rules,
        left_out="regularisation" if _flag(values, "is_reg") else None,
    )


def _flat(document: Values) -> dict[str, Any]:
    """Its sections say nothing to the trainer."""
    inside = {key: value for part in document.values() if isinstance(part, dict) for key, value in part.items()}
    return inside | {key: value for key, value in document.items() if not isinstance(value, dict)}


# ------------------------------------------------------------------------------- ai-toolkit and OneTrainer


def _ai_toolkit(document: Values, found: Found) -> list[Part]:
    named = []
    for process in _dicts(document["config"].get("process")):
        for dataset in _dicts(process.get("datasets")):
            rules = Rules(
                trigger=_text(dataset, "trigger_word") or _text(process, "trigger_word"),
                kept=_whole(dataset, "keep_tokens", 0),
                tags_apart=_flag(dataset, "shuffle_tokens") or _share(dataset, "token_dropout_rate") > 0,
                dropout=_share(dataset, "caption_dropout_rate"),
                tag_dropout=_share(dataset, "token_dropout_rate"),
                assumed=False,
            )
            part = Part(
                repeats=max(1, _whole(dataset, "num_repeats", 1)),
                endings=_ending(dataset, "caption_ext") or ("txt",),
                default=_text(dataset, "default_caption"),
                empty_default=True,
                rules=rules,
                left_out="regularisation" if _flag(dataset, "is_reg") else None,
            )
            named.append(_Named(_text(dataset, "dataset_path") or _text(dataset, "folder_path"), part))
    return _placed(named, found)


def _onetrainer(concepts: Sequence[Any], found: Found) -> list[Part]:
    named = []
    for concept in _dicts(concepts):
        if not concept.get("enabled", True):
            continue
        text, kind = _dict(concept.get("text")), _text(concept, "type")
        dropped = _share(text, "tag_dropout_probability") if _flag(text, "tag_dropout_enable") else 0.0
        rules = Rules(
            separator=_text(text, "tag_delimiter") or ",",
            kept=_whole(text, "keep_tags_count", 1),
            tags_apart=_flag(text, "enable_tag_shuffling") or dropped > 0,
            # Those of a list that stay, or are alone to go, are told apart by other rules: nothing is known to go always.
            tag_dropout=dropped if _text(text, "tag_dropout_special_tags_mode") in ("", "NONE") else 0.0,
            assumed=False,
        )
        part = Part(
            deep=_flag(concept, "include_subdirectories"),
            endings=("txt",),
            by_name=_text(text, "prompt_source") == "filename",
            rules=rules,
            left_out="validation"
            if kind == "VALIDATION" or _flag(concept, "validation_concept")
            else "regularisation"
            if kind == "PRIOR_PREDICTION"
            else None,
        )
        if _text(text, "prompt_source") == "concept":
            part = replace(part, endings=(), default=_lines_of(_text(text, "prompt_path"), found))
        named.append(_Named(_text(concept, "path"), replace(part, repeats=_repeats(concept))))
    return _placed(named, found)


def _repeats(concept: Values) -> int:
    """Times an epoch shows each image, a share of one rounded up; where a number of images is drawn, that is once."""
    if _text(concept, "balancing_strategy") == "SAMPLES":
        return 1
    return max(1, round(_number(concept, "balancing" if "balancing" in concept else "repeats", 1.0)))


def _lines_of(path: str, found: Found) -> str:
    """The captions that a concept draws from for all its images."""
    name = _file_of(path, found)
    check_inside(found, name)
    try:
        return decoded(contents(found.root / name, CAPTION_BYTES))[0]
    except Unreadable as error:
        raise ValueError(f"{name}: {error}") from error


# ------------------------------------------------------------------------------------------ where folders are


def _placed(named: Sequence[_Named], found: Found) -> list[Part]:
    """The parts with their folders by relative names. Raises ValueError where the set holds none of them.

    A configuration of one folder describes the whole set, wherever it lay when it was trained.
    """
    if not named:
        raise ValueError("the configuration names no folder of images")
    folders = {"", *(_above(name) for name in found.images)}
    folders |= {str(place) for folder in folders for place in PurePosixPath(folder).parents if str(place) != "."}
    placed = [
        replace(one.part, folder=place)
        for one in named
        if (place := _place_of(one.path, folders, found.root.name)) is not None
    ]
    if not placed and len({one.path for one in named}) == 1:
        placed = [one.part for one in named]
    if not placed:
        shown = ", ".join(sorted({PurePosixPath(one.path.replace("\\", "/")).name for one in named})[:5])
        raise ValueError(
            f"the configuration names the folders {shown}, and none of them is there: name the folder above"
        )
    return placed


def _place_of(path: str, folders: set[str], root: str) -> str | None:
    """The folder with the longest end of a path; the whole set where that has its name, or there is no path."""
    parts = [part for part in PurePosixPath(path.replace("\\", "/")).parts if part not in ("/", "..")]
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((end for end in ends if end in folders), "" if not parts or parts[-1] == root else None)


def _file_of(path: str, found: Found) -> str:
    """The file of the set with the longest end of a path; '' for no path. Raises ValueError where there is none."""
    parts = PurePosixPath(path.replace("\\", "/")).parts
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    name = next((end for end in ends if end in found.others), "")
    if parts and not name:
        raise ValueError(f"the configuration names {parts[-1]}, which is not in the folder: copy it there")
    return name


def _above(name: str) -> str:
    return name.rpartition("/")[0]


# ------------------------------------------------------------------------------------------------ documents


def _document(path: Path) -> Any:
    """The values of a configuration, of any format. Raises ValueError with a sentence."""
    readers: dict[str, Callable[[str], Any]] = {".toml": _toml, ".yaml": _yaml, ".yml": _yaml, ".json": json.loads}
    ending = path.suffix.lower()
    if ending not in readers:
        raise ValueError(f"{path.name} is no trainer's configuration that can be read: {_OFFERED}")
    try:
        text = contents(path, CONFIG_BYTES).decode("utf-8-sig")
        return readers[ending](text)
    except Unreadable as error:
        raise ValueError(f"{path.name}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: not valid {ending[1:].upper()}: {one_line(error)}") from error


def _toml(text: str) -> Any:
    for name in ("tomllib", "tomli"):  # the first comes with Python 3.11
        try:
            return importlib.import_module(name).loads(text)
        except ImportError:
            continue
    raise Unreadable("reading .toml needs Python 3.11 or the package tomli: pip install tomli")


def _yaml(text: str) -> Any:
    """Plain values alone; without merged keys, of which a small file can make very many."""
    try:
        yaml: Any = importlib.import_module("yaml")
    except ImportError as error:
        raise Unreadable("reading .yaml needs the package pyyaml: pip install pyyaml") from error

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def flatten_mapping(self, node: Any) -> None:
            return

    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(one_line(error)) from error


def _dict(value: object) -> Values:
    return value if isinstance(value, dict) else {}


def _dicts(value: object) -> Iterator[Values]:
    yield from (one for one in value if isinstance(one, dict)) if isinstance(value, list) else ()


def _text(values: Values, name: str) -> str:
    value = values.get(name)
    return value[:_LONGEST] if isinstance(value, str) else ""


def _flag(values: Values, name: str) -> bool:
    return values.get(name) is True


def _whole(values: Values, name: str, default: int) -> int:
    return int(_number(values, name, default))


def _share(values: Values, name: str) -> float:
    return _number(values, name, 0.0)


def _number(values: Values, name: str, default: float) -> float:
    value: Any = values.get(name)
    return min(max(float(value), -1e9), 1e9) if is_number(value) else default


def _ending(values: Values, name: str) -> tuple[str, ...]:
    ending = _text(values, name).lstrip(".")
    return (ending,) if ending and "/" not in ending else ()
