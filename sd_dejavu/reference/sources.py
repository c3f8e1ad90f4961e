"""Where the images of a reference set come from: a folder, webdataset tars, or Parquet files.

A source gives its records one after the other, always in the same order, and can begin anywhere in it, so that a
build that was stopped goes on where it stood. What cannot be read is a record too, with the reason.

What is read at most of a file, a member and a row is said in :mod:`sd_dejavu.kept.foreign`.
"""

from __future__ import annotations

from pathlib import Path

from .folder import FolderSource
from .layout import layout_of, look
from .parquet import ParquetSource, without_images
from .reading import GUESS, Reading
from .records import IMAGE_ENDINGS, Source
from .tar import TarSource
from .trainer_config import configured

_TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
_TABLE_ENDINGS = (".parquet",)


def open_source(path: Path, reading: Reading = Reading()) -> Source:
    """The source at ``path``. Raises ValueError with a sentence where there is nothing to read."""
    if path.is_file():
        if path.name.lower().endswith(_TAR_ENDINGS):
            return _unlike_folders(TarSource((path,)), reading)
        if path.suffix.lower() in _TABLE_ENDINGS:
            return _unlike_folders(ParquetSource((path,), reading), reading)
        raise ValueError(f"{path} is neither a folder, nor a .tar, nor a .parquet file")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a pipe or a device: name a folder, or a .tar or .parquet file")
    if not path.is_dir():
        raise ValueError(f"there is no folder or file {path}")
    found = look(path, _TAR_ENDINGS, _TABLE_ENDINGS)
    images = [name for name in found.images if name.rpartition(".")[2].lower() in IMAGE_ENDINGS]
    kinds = {f"{len(images)} images": images, f"{len(found.tars)} tars": found.tars}
    kinds[f"{len(found.tables)} Parquet"] = found.tables
    there = [text for text, files in kinds.items() if files]
    if len(there) > 1:
        raise ValueError(f"{path} holds {' and '.join(there)} files: name the folder or file that holds one kind only")
    if found.tars:
        return _unlike_folders(TarSource(found.tars), reading)
    if found.tables:
        return _unlike_folders(ParquetSource(found.tables, reading), reading)
    if not images:
        raise ValueError(f"{path} holds no images ({', '.join(IMAGE_ENDINGS)}), tars or Parquet files")
    if reading.trainer_config:
        return FolderSource(found, configured(Path(reading.trainer_config), found, reading))
    return FolderSource(found, layout_of(found, reading))


def caption_tables(path: Path, reading: Reading = Reading()) -> ParquetSource | None:
    """The Parquet file or files at ``path`` where they hold captions without images; None where they do not."""
    if path.is_dir():
        found = look(path, _TAR_ENDINGS, _TABLE_ENDINGS)
        files = () if found.images or found.tars else tuple(found.tables)
    else:
        files = (path,) if path.is_file() and path.suffix.lower() in _TABLE_ENDINGS else ()
    return ParquetSource(files, reading, captions_alone=True) if files and without_images(files, reading) else None


def _unlike_folders(source: Source, reading: Reading) -> Source:
    """Raises ValueError where a trainer's rules are asked for: they are for folders of images."""
    if reading.trainer_config or reading.trainer not in (GUESS, "plain"):
        raise ValueError("tars and Parquet files are read in one way: name no trainer, and no configuration of one")
    return source
