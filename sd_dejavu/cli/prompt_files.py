"""Prompts from the command line, from a file, or from standard input.

What is wrong with an input is said in one :class:`InputError` sentence that names the place and what
to do. Nothing is skipped silently but blank lines: a dropped prompt would shift the numbering of
every result after it.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from ..kept.foreign import ROWS, TEXT_BYTES, Unreadable, check_caption, contents, one_line
from ..reference.parquet import column_of, parquet_file

STDIN = "-"
KNOWN_COLUMNS = ("prompt", "caption", "text", "prompts", "captions", "texts")

_NEITHER = "\x1f"  # the ASCII unit separator stands for 'no delimiter'


class InputError(ValueError):
    """An input that holds no usable prompts, in a sentence for the person at the screen."""


def read_prompts(
    path: Path | None, arguments: Sequence[str], stdin: TextIO | None, column: str | None = None
) -> list[str]:
    """All prompts: first the arguments, then the file's; blanks around a prompt are dropped.

    ``-``, as an argument or as the path, stands for standard input, one prompt a line; so does giving
    nothing while something is piped in. The file's kind follows from its ending: .txt (or none) one
    prompt a line; .csv and .tsv; .jsonl and .ndjson; .json; .parquet. ``column`` names the column or
    key that holds the prompts of a table; without it the first of :data:`KNOWN_COLUMNS` is taken, in
    any letter case.
    """
    prompts: list[str] = []
    for number, argument in enumerate(arguments, 1):
        if argument == STDIN:
            prompts += _from_stdin(stdin)
        else:
            prompts.append(_checked(argument, f"prompt {number}" if len(arguments) > 1 else ""))
    if path is not None:
        prompts += _from_stdin(stdin) if str(path) == STDIN else _from_file(path, column)
    elif not arguments:
        if stdin is None or stdin.isatty():
            raise InputError("no prompt is given: write one in quotation marks, name a file, or pipe prompts in")
        prompts = _from_stdin(stdin)
    return prompts


def _from_stdin(stdin: TextIO | None) -> list[str]:
    if stdin is None:
        raise InputError("standard input is not open here: write the prompt in quotation marks, or name a file")
    try:
        text = stdin.read(TEXT_BYTES + 1)
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not {error.encoding} text: pipe in UTF-8 text") from error
    if len(text) > TEXT_BYTES:
        raise InputError(f"standard input has no end in sight: at most {TEXT_BYTES:,} characters are read")
    return _some(_lines(text.removeprefix("\ufeff"), "standard input"), "standard input")


def _from_file(path: Path, column: str | None) -> list[str]:
    ending = path.suffix.lower()
    if ending == ".parquet":
        return _some(_parquet(path, column), path.name)
    readers: dict[str, Callable[[str, str], Iterable[str]]] = {
        "": _lines,
        ".txt": _lines,
        ".csv": lambda text, name: _table(text, name, ",;\t", column),
        ".tsv": lambda text, name: _table(text, name, "\t", column),
        ".jsonl": lambda text, name: _json_lines(text, name, column),
        ".ndjson": lambda text, name: _json_lines(text, name, column),
        ".json": lambda text, name: _json_list(text, name, column),
    }
    if ending not in readers:
        known = ", ".join([*filter(None, readers), ".parquet"])
        raise InputError(f"{path.name}: files that end in {ending} cannot be read: give one of {known}")
    return _some(readers[ending](_decoded(path), path.name), path.name)


def _decoded(path: Path) -> str:
    try:
        data = contents(path, TEXT_BYTES)
    except Unreadable as error:
        raise InputError(f"{path}: {error}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The codec counts from behind the byte order mark, and error.object is what it counts in.
        line = error.object[: error.start].count(b"\n") + 1
        byte = error.object[error.start]
        raise InputError(
            f"{path.name}, line {line}: not UTF-8 text (byte 0x{byte:02x}): save the file with UTF-8 encoding"
        ) from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise InputError(
            f"{path.name}, line {line}: holds a NUL character: save the file as plain text with UTF-8 encoding"
        )
    return text


# --------------------------------------------------------------------------------------- each kind


def _lines(text: str, name: str) -> Iterator[str]:
    # Not splitlines(): it also breaks at characters such as U+2028, which prompts from the web hold.
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        if line.strip():
            yield _checked(line, f"{name}, line {number}")


def _table(text: str, name: str, delimiters: str, column: str | None) -> Iterator[str]:
    delimiter, header = _delimiter(text, name, delimiters, column)
    if not header:
        return
    records = _records(text, name, delimiter)
    chosen = _column(header, column)
    index = 0
    headless = delimiter == _NEITHER and column is None and chosen is None
    if not headless:
        place, _ = next(records)
        if chosen is None:
            raise _missing(place, "column", header, column)
        index = header.index(chosen)
    for place, fields in records:
        if len(fields) != len(header):
            raise InputError(
                f"{place}: {len(fields)} fields where the first line has {len(header)}: put quotation marks around "
                "fields that hold the delimiter or a line break"
            )
        yield _checked(fields[index], place)


def _delimiter(text: str, name: str, delimiters: str, column: str | None) -> tuple[str, list[str]]:
    """The delimiter under which the first record has the wanted column, else the most fields."""

    def fit(candidate: tuple[str, list[str]]) -> tuple[bool, int]:
        return _column(candidate[1], column) is not None, len(candidate[1])

    # The first record under 'no delimiter' comes first, so it wins where no delimiter splits anything:
    # commas in later lines of a one-column file then belong to the prompts.
    # Not strict: under a wrong delimiter a sound file may look like one with broken quotation.
    candidates = [(d, next(_records(text, name, d, strict=False), ("", []))[1]) for d in (_NEITHER, *delimiters)]
    return max(candidates, key=fit)


def _records(text: str, name: str, delimiter: str, strict: bool = True) -> Iterator[tuple[str, list[str]]]:
    """(place, fields) of each record that is not an empty line."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=strict)
    while True:
        place = f"{name}, line {reader.line_num + 1}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(
                f"{place}: not valid CSV ({error}): close every quotation mark, and double those inside a quoted field"
            ) from error
        if fields:
            yield place, fields


def _json_lines(text: str, name: str, column: str | None) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"{name}, line {number}"
            advice = f"every line must hold one JSON object with a {_wanted(column)} or a string"
            yield _from_json(_parsed(line, name, number, advice), place, column, advice)


def _json_list(text: str, name: str, column: str | None) -> Iterator[str]:
    advice = f"the file must hold a JSON list of objects with a {_wanted(column)} or of strings"
    if not text.strip():
        return
    items = _parsed(text, name, 1, advice)
    if not isinstance(items, list):
        raise InputError(f"{name}: not a JSON list: {advice}")
    for number, item in enumerate(items, 1):
        yield _from_json(item, f"{name}, item {number}", column, advice)


def _parsed(text: str, name: str, first_line: int, advice: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise InputError(f"{name}, line {line}: not valid JSON ({error.msg}): {advice}") from error
    except (ValueError, RecursionError) as error:
        # Too deep a nesting, or a number of thousands of digits.
        raise InputError(f"{name}, line {first_line}: JSON that cannot be read ({error}): {advice}") from error


def _from_json(value: Any, place: str, column: str | None, advice: str) -> str:
    if isinstance(value, dict):
        key = _column(list(value), column)
        if key is None:
            raise _missing(place, "key", list(value), column)
        value, place = value[key], f"{place}, {key!r}"
    if not isinstance(value, str):
        raise InputError(f"{place}: {json.dumps(value)[:40]} is not text: {advice}")
    return _checked(value, place)


def _parquet(path: Path, column: str | None) -> Iterator[str]:
    """Row by row: a file of some kilobytes can hold the same 100 MB in every row."""
    characters = 0
    try:
        with parquet_file(path) as file:
            names = file.schema_arrow.names
            chosen = _column(names, column)
            if chosen is None:
                raise _missing(path.name, "column", names, column)
            for number, row in enumerate(file.iter_batches(1, columns=[chosen]), 1):
                place = f"{path.name}, row {number}"
                (value,) = row.column(0).to_pylist()
                if value is not None and not isinstance(value, str):
                    raise InputError(f"{place}: {value!r:.40} is not text: name the column that holds the prompts")
                prompt = _checked(value or "", place)
                characters += len(prompt)
                if number > ROWS or characters > TEXT_BYTES:
                    raise InputError(
                        f"{place}: at most {ROWS:,} rows and {TEXT_BYTES:,} characters are read: part the file"
                    )
                yield prompt
    except InputError:
        raise
    except Unreadable as error:
        raise InputError(f"{path.name}: {error}") from error
    except Exception as error:  # the library raises many types for broken bytes
        lacking = isinstance(error.__cause__, ImportError)
        raise InputError(
            one_line(error) if lacking else f"{path.name}: not a sound Parquet file ({one_line(error)})"
        ) from error


# ------------------------------------------------------------------------------------ what they share


def _column(names: Sequence[str], wanted: str | None) -> str | None:
    return column_of(names, wanted, KNOWN_COLUMNS)


def _wanted(column: str | None) -> str:
    return repr(column or KNOWN_COLUMNS[0])


def _missing(place: str, kind: str, names: Sequence[str], column: str | None) -> InputError:
    shown = ", ".join(repr(name if len(name) <= 40 else f"{name[:37]}...") for name in names[:12]) or "none"
    return InputError(f"{place}: no {kind} {_wanted(column)} among {shown}: name the {kind} that holds the prompts")


def _checked(prompt: str, place: str) -> str:
    """The prompt without blanks around it, if a text encoder can take it."""
    lead = f"{place}: " if place else ""
    stripped = prompt.strip()
    if not stripped:
        raise InputError(f"{lead}the prompt is empty: write what the image shows, or leave the entry out")
    if "\0" in stripped:
        raise InputError(f"{lead}the prompt holds a NUL character: take it out")
    if any("\ud800" <= character <= "\udfff" for character in stripped):
        raise InputError(f"{lead}the prompt holds half a character (a lone surrogate): write it again as UTF-8 text")
    try:
        return check_caption(stripped)
    except Unreadable as error:
        raise InputError(f"{lead}{error}") from error


def _some(prompts: Iterable[str], name: str) -> list[str]:
    found = list(prompts)
    if not found:
        raise InputError(f"{name}: holds no prompt: give at least one")
    return found
