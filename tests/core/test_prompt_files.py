"""Every kind of input, and the sentence for each kind of fault."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sd_dejavu.cli import prompt_files
from sd_dejavu.cli.prompt_files import InputError, read_prompts
from sd_dejavu.kept.foreign import CAPTION_CHARACTERS

WANTED = ["a red fox, asleep", "Blue Vase; With Handle", 'the "old" mill']


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def read(path: Path, column: str | None = None) -> list[str]:
    return read_prompts(path, [], None, column)


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def failure(path: Path, column: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        read(path, column)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_arguments_come_first_then_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "more.txt", "third\n")
    assert read_prompts(path, ["first", "  second "], io.StringIO("not read")) == ["first", "second", "third"]


def test_standard_input() -> None:
    piped = "\ufeffa fox\r\n\n# not a comment\n"
    wanted = ["a fox", "# not a comment"]
    assert read_prompts(None, [], io.StringIO(piped)) == wanted
    assert read_prompts(Path("-"), [], Terminal(piped)) == wanted
    assert read_prompts(None, ["first", "-", "last"], io.StringIO(piped)) == ["first", *wanted, "last"]


@pytest.mark.parametrize("stdin", [None, Terminal("typed later")])
def test_nothing_given(stdin: io.StringIO | None) -> None:
    with pytest.raises(InputError, match="no prompt is given: write one"):
        read_prompts(None, [], stdin)


class Endless(io.RawIOBase):
    """What a device gives: bytes without an end."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        buffer[:] = b"a" * len(buffer)
        return len(buffer)


def test_standard_input_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="standard input is not open"):
        read_prompts(None, ["-"], None)
    endless = io.TextIOWrapper(io.BufferedReader(Endless()), encoding="utf-8")
    monkeypatch.setattr(prompt_files, "TEXT_BYTES", 50)
    with pytest.raises(InputError, match="standard input has no end in sight: at most 50 "):
        read_prompts(None, [], endless)
    with pytest.raises(InputError, match="standard input: holds no prompt"):
        read_prompts(None, [], io.StringIO(" \n"))
    with pytest.raises(InputError, match="standard input is not utf-8 text"):
        read_prompts(None, [], io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("", "^the prompt is empty: "),
        (" \t", "^the prompt is empty: "),
        ("a\0b", "^the prompt holds a NUL character"),
        ("caf\udce9", "lone surrogate"),
    ],
)
def test_bad_arguments(argument: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        read_prompts(None, [argument], None)
    with pytest.raises(InputError, match=r"^prompt 2: the prompt "):
        read_prompts(None, ["a fox", argument], None)


def test_what_is_too_long_for_a_caption_never_reaches_a_tokenizer(tmp_path: Path) -> None:
    endless = "c" * (CAPTION_CHARACTERS + 1)
    with pytest.raises(InputError, match=r"its caption is too long: 100,001 characters, and at most 100,000 are read$"):
        read_prompts(None, [endless], None)
    for name, content in (("list.txt", f"first\n{endless}"), ("list.json", json.dumps(["first", endless]))):
        assert "caption is too long" in failure(written(tmp_path, name, content))
    assert read(written(tmp_path, "fits.txt", endless[1:])) == [endless[1:]]


def test_text(tmp_path: Path) -> None:
    # U+2028 breaks lines for str.splitlines, not for an editor or `wc -l`.
    content = "\ufeffa fox\r\n\r\n#1 dad mug\rone\u2028prompt\n\n"
    for name in ("list.txt", "LIST.TXT", "list"):
        assert read(written(tmp_path, name, content)) == ["a fox", "#1 dad mug", "one\u2028prompt"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("header", ["prompt", "Caption", " TEXT"])
def test_csv_with_an_index_column(tmp_path: Path, delimiter: str, header: str) -> None:
    rows = [f"{i}{delimiter}" + '"' + p.replace('"', '""') + '"' for i, p in enumerate(WANTED)]
    path = written(tmp_path, "list.csv", "\ufeff" + "\r\n".join([f"{delimiter}{header}", *rows, ""]))
    assert read(path) == WANTED


def test_tsv_leaves_commas_alone(tmp_path: Path) -> None:
    assert read(written(tmp_path, "list.tsv", "a,b\tcaption\n1\tfox, owl\n")) == ["fox, owl"]


def test_csv_columns(tmp_path: Path) -> None:
    path = written(tmp_path, "list.csv", "text,prompt,note\na,b,c\n")
    assert read(path) == ["b"]
    assert read(path, "text") == ["a"]
    assert read(path, "Note") == ["c"]
    assert failure(path, "title") == (
        "list.csv, line 1: no column 'title' among 'text', 'prompt', 'note': name the column that holds the prompts"
    )


def test_csv_with_everything_quoted(tmp_path: Path) -> None:
    assert read(written(tmp_path, "list.csv", '"id","prompt"\n"1","fox; owl"\n')) == ["fox; owl"]


def test_csv_of_one_column(tmp_path: Path) -> None:
    body = 'a fox, asleep\n"quoted, owl"\n\n"two\nlines"\n'
    wanted = ["a fox, asleep", "quoted, owl", "two\nlines"]
    assert read(written(tmp_path, "headed.csv", "prompt\n" + body)) == wanted
    assert read(written(tmp_path, "bare.csv", "a mill\n" + body)) == ["a mill", *wanted]


def test_csv_faults_name_the_line(tmp_path: Path) -> None:
    head = 'id,prompt\n1,"two\nlines"\n'
    assert failure(written(tmp_path, "a.csv", head + "2, \n")).startswith("a.csv, line 4: the prompt is empty: ")
    assert failure(written(tmp_path, "b.csv", head + "2,fox, owl\n")).startswith(
        "b.csv, line 4: 3 fields where the first line has 2: put quotation marks"
    )
    assert failure(written(tmp_path, "c.csv", head + '2,"open\n')).startswith("c.csv, line 4: not valid CSV (")
    assert failure(written(tmp_path, "d.csv", "id,name\n1,fox\n")).startswith(
        "d.csv, line 1: no column 'prompt' among 'id', 'name': "
    )
    assert failure(written(tmp_path, "f.csv", 'prompt\n""\n')).startswith("f.csv, line 2: the prompt is empty: ")
    assert failure(written(tmp_path, "g.csv", "fox, owl\nkite, moon\n")).startswith("g.csv, line 1: no column 'prompt'")
    assert failure(written(tmp_path, "h.csv", ""), "note") == "h.csv: holds no prompt: give at least one"
    assert failure(written(tmp_path, "e.csv", "id,prompt\n")) == "e.csv: holds no prompt: give at least one"


@pytest.mark.parametrize("name", ["list.jsonl", "list.ndjson"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    lines = [json.dumps({"id": 1, "Prompt": WANTED[0]}), "", json.dumps(WANTED[1]), json.dumps({"text": WANTED[2]})]
    assert read(written(tmp_path, name, "\ufeff" + "\r\n".join(lines))) == WANTED


def test_json_list(tmp_path: Path) -> None:
    path = written(tmp_path, "list.json", json.dumps([WANTED[0], {"caption": WANTED[1]}, {"x": 1, "text": WANTED[2]}]))
    assert read(path) == WANTED


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            '{"prompt": ',
            "prompts.jsonl, line 3: not valid JSON (Expecting value): every line must hold one JSON object",
        ),
        ("[" * 100_000, "prompts.jsonl, line 3: JSON that cannot be read ("),
        ("9" * 5_000, "prompts.jsonl, line 3: "),
        ("17", "prompts.jsonl, line 3: 17 is not text: every line must hold"),
        ('{"prompt": null}', "prompts.jsonl, line 3, 'prompt': null is not text: every line must hold"),
        ('{"title": "fox"}', "prompts.jsonl, line 3: no key 'prompt' among 'title': name the key"),
        ("{}", "prompts.jsonl, line 3: no key 'prompt' among none: name the key"),
        ('{"prompt": ""}', "prompts.jsonl, line 3, 'prompt': the prompt is empty: "),
        ('"a\\u0000b"', "prompts.jsonl, line 3: the prompt holds a NUL character"),
        ('"\\ud83d"', "prompts.jsonl, line 3: the prompt holds half a character"),
    ],
)
def test_json_lines_faults(tmp_path: Path, line: str, sentence: str) -> None:
    assert failure(written(tmp_path, "prompts.jsonl", f'"fox"\n\n{line}\n')).startswith(sentence)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('["fox",\n', "list.json, line 2: not valid JSON (Expecting value): the file must hold a JSON list"),
        ('{"prompt": "fox"}', "list.json: not a JSON list: the file must hold a JSON list"),
        ('["fox", 3]', "list.json, item 2: 3 is not text"),
        ("[]", "list.json: holds no prompt"),
        (" ", "list.json: holds no prompt"),
    ],
)
def test_json_list_faults(tmp_path: Path, content: str, sentence: str) -> None:
    assert failure(written(tmp_path, "list.json", content)).startswith(sentence)


@pytest.mark.parametrize("ending", ["txt", "csv", "tsv", "jsonl", "json"])
def test_any_empty_or_wrongly_encoded_file(tmp_path: Path, ending: str) -> None:
    name = f"list.{ending}"
    assert failure(written(tmp_path, name, "")) == f"{name}: holds no prompt: give at least one"
    assert failure(written(tmp_path, name, b"\xef\xbb\xbffox\ncaf\xe9\n")) == (
        f"{name}, line 2: not UTF-8 text (byte 0xe9): save the file with UTF-8 encoding"
    )
    assert failure(written(tmp_path, name, "fox".encode("utf-16"))).startswith(
        f"{name}, line 1: not UTF-8 text (byte 0xff)"
    )
    assert failure(written(tmp_path, name, "a\nb".encode("utf-16-le"))).startswith(
        f"{name}, line 1: holds a NUL character"
    )


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "none.txt"
    assert failure(missing) == f"{missing}: cannot be read: No such file or directory"
    assert failure(tmp_path / "none.parquet").endswith("cannot be read: No such file or directory")
    assert failure(tmp_path).startswith(f"{tmp_path}: cannot be read: ")
    assert failure(written(tmp_path, "list.xlsx", "fox")) == (
        "list.xlsx: files that end in .xlsx cannot be read: "
        "give one of .txt, .csv, .tsv, .jsonl, .ndjson, .json, .parquet"
    )


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "list.parquet"
    pq.write_table(pa.table({"URL": ["x"] * 3, "TEXT": WANTED, "width": [1, 2, 3]}), path)
    assert read(path) == WANTED
    assert read(path, "url") == ["x"] * 3
    assert failure(path, "width") == "list.parquet, row 1: 1 is not text: name the column that holds the prompts"
    assert failure(path, "title").startswith("list.parquet: no column 'title' among 'URL', 'TEXT', 'width': ")
    pq.write_table(pa.table({"prompt": ["fox", None]}), path)
    assert failure(path).startswith("list.parquet, row 2: the prompt is empty: ")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    assert failure(path) == "list.parquet: holds no prompt: give at least one"
    assert failure(written(tmp_path, "broken.parquet", "fox")).startswith("broken.parquet: not a sound Parquet file (")


def test_a_parquet_file_is_read_row_by_row_up_to_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One value of a dictionary can stand in every row: together they would fill the memory."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path, read_at_once = tmp_path / "list.parquet", []
    pq.write_table(pa.table({"prompt": ["x" * 1000] * 50}), path, row_group_size=20)
    real = prompt_files.parquet_file

    def watched(path: Path) -> Any:
        file = real(path)
        batches = file.iter_batches
        file.iter_batches = lambda *a, **k: ((read_at_once.append(b.num_rows), b)[1] for b in batches(*a, **k))
        return file

    monkeypatch.setattr(prompt_files, "parquet_file", watched)
    assert len(read(path)) == 50 and read_at_once == [1] * 50
    monkeypatch.setattr(prompt_files, "ROWS", 30)
    assert failure(path).startswith("list.parquet, row 31: at most 30 rows and ")
    monkeypatch.setattr(prompt_files, "TEXT_BYTES", 4500)
    read_at_once.clear()
    assert failure(path).startswith("list.parquet, row 5: at most 30 rows and 4,500 characters are read")
    assert len(read_at_once) == 5


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert failure(tmp_path / "list.parquet") == (
        "list.parquet: reading Parquet files needs pyarrow: pip install pyarrow"
    )
