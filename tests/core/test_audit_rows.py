"""What is said of an audit, and what tells its results apart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from sd_dejavu.hosts.webui.text import as_typed
from sd_dejavu.report.audit_rows import as_json, as_markdown, json_pieces, notes, ranked, row_as_json
from sd_dejavu.training.audit import BASE, Audit, Row
from sd_dejavu.training.ledger import Ledger
from sd_dejavu.training.tasks import Task, Variant

ROWS = (
    Row("a.png", "plain", score=0.1, p_value=0.5, q_value=0.6, flagged=False),
    Row("b.png", "named | twice\nover", score=0.4, p_value=0.01, q_value=0.02, flagged=True),
    Row("c.png", "copied", score=0.3, p_value=0.02, q_value=0.03, flagged=True, copies=2, drawn=2, similarity=0.9),
    Row("d.png", "", why="there is no caption"),
)
FOUND = Audit(ROWS, "gain", 99, 0.05, 1)


def test_rows_come_worst_first() -> None:
    assert [row.image for row in ranked(FOUND)] == ["c.png", "b.png", "a.png", "d.png"]


def test_what_was_read_and_left_out_is_among_the_notes() -> None:
    skipped = ({"name": "m.png", "reason": "a mask", "kind": "mask"}, {"name": "x.png", "reason": "broken"})
    found = replace(FOUND, skipped=skipped, remarks=("Training set: 4 images.", "A folder '[a](b)' was read."))
    told = notes(found)
    assert [note for note in told if note in found.remarks] == list(found.remarks)
    assert "Left out: 1 image that could not be read, 1 mask." in told
    assert as_json(found, "m", [])["remarks"] == list(found.remarks)
    assert r"A folder '\[a\](b)' was read." in as_markdown(found)
    assert not any(note.startswith(("Left out", "Training set")) for note in notes(FOUND))


def test_the_document_is_the_same_written_row_by_row() -> None:
    for found in (FOUND, replace(FOUND, rows=ROWS[:1], remarks=("ü",))):
        assert "".join(json_pieces(found, "m", ["l"])) == json.dumps(as_json(found, "m", ["l"]), indent=1) + "\n"


def test_a_caption_makes_no_cells_of_its_own() -> None:
    lines = [line for line in as_markdown(FOUND).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(ROWS) and "| gain |" in lines[0]
    assert {line.replace("\\|", "").count("|") for line in lines} == {9}
    assert "named \\| twice over" in lines[3] and "there is no caption" in lines[5]


def test_markup_in_a_caption_is_shown_as_it_is() -> None:
    """By CommonMark a backslash takes the meaning from any of these signs."""
    caption = "<script>alert(1)</script> [a](b) ![i](https://x.y/z) `c` *d* _e_ ~~f~~ &lt; \\<b> www.x.y a@b.c $x$"
    text = as_markdown(Audit((replace(ROWS[1], caption=caption),), "gain", 99, 0.05, 1))
    assert (
        r"\<script\>alert(1)\</script\> \[a\](b) \!\[i\](https:\//x.y/z) \`c\` \*d\* \_e\_ \~\~f\~\~ \&lt; \\\<b\> "
        r"www\.x.y a\@b.c \$x\$"
    ) in text


def test_plain_values_hold_all_but_the_images() -> None:
    document = as_json(FOUND, "the model", [])
    assert document["rows"] == [row_as_json(row) for row in ROWS] and document["counts"] == "gain"
    assert "images" not in document["rows"][0] and document["rows"][2]["copies"] == 2


def test_results_of_the_base_model_are_kept_apart(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, {})
    both = [Task("captions", variant, 0, ("a red fox",)) for variant in (Variant(), BASE)]
    for number, task in enumerate(both):
        ledger.keep(task, [{"magnitude": number, "recovery": 0.5}])
    assert [value["magnitude"] for value in ledger.values(both)] == [0, 1]


def test_a_caption_holds_no_syntax_of_the_hosts() -> None:
    assert as_typed("a (red:1.3) [fox] AND snow BREAK") == r"a \(red:1.3\) \[fox\] and snow break"
    assert as_typed(r"<lora:other:1> BAND \o/") == r"< lora:other:1> BAND \\o/"
