"""What is said of an audit, and what tells its results apart."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd_dejavu.cli.audit import _write_parquet
from sd_dejavu.hosts.webui.text import as_typed
from sd_dejavu.reference.parts import PartMatch
from sd_dejavu.report.audit_html import AuditPage, render_audit
from sd_dejavu.report.audit_image import audit_images
from sd_dejavu.report.audit_rows import (
    as_json,
    as_markdown,
    figures,
    json_pieces,
    notes,
    ranked,
    row_as_json,
    sentence,
    verdict_of,
)
from sd_dejavu.report.tiles import GAP, SIDE
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
    assert {line.replace("\\|", "").count("|") for line in lines} == {10}
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


PART = PartMatch(2, "c.png", 0.93, 2.5, True, (0.25, 0.0, 0.75, 0.5), (0.5, 0.25, 1.0, 0.75), True, 0.001)


def test_a_copied_part_is_told_with_its_place() -> None:
    partly = replace(ROWS[0], copies=0, drawn=4, parts=1, part=PART, part_drawn=3)
    found = replace(FOUND, rows=(*ROWS[1:], partly))
    assert [row.image for row in ranked(found)] == ["c.png", "a.png", "b.png", "d.png"]
    assert verdict_of(partly) == "Partly copied"
    assert figures(partly)["part"] == (
        "drawn again 3: 25-75% across, 0-50% down is like 50-100% across, 25-75% down of c.png, mirrored (similarity 0.93)"
    )
    assert "1 came out as a copy, 1 with a copy of a part" in sentence(found)
    assert any("stands out by more than 99.9% of pairs of different training images" in note for note in notes(found))
    document = json.loads(json.dumps(row_as_json(partly)))
    assert document["part"]["box"] == [0.25, 0.0, 0.75, 0.5] and document["parts"] == 1
    assert "1 of 4" in as_markdown(found)


def test_the_page_and_the_image_frame_both_parts() -> None:
    rng = np.random.default_rng(0)
    files = []
    for kind in ("PNG", "JPEG"):
        file = io.BytesIO()
        Image.fromarray(rng.integers(100, 110, (64, 64, 3), dtype=np.uint8)).save(file, kind)
        files.append(file.getvalue())
    partly = replace(ROWS[0], copies=0, drawn=2, parts=1, part=PART, part_drawn=2, images=(files[0],) * 2)
    found = replace(FOUND, rows=(partly,))
    page = render_audit(AuditPage(found, "m", "", "d", {"a.png": files[1]}, {}))
    assert page.count("left:25%;top:0%;width:50%;height:50%") == 1
    assert page.count("left:50%;top:25%;width:50%;height:50%") == 1
    (framed,) = audit_images(found, {"a.png": files[1]})
    (plain,) = audit_images(replace(found, rows=(replace(partly, part=None),)), {"a.png": files[1]})
    changed = (framed[: GAP + SIDE] != plain[: GAP + SIDE]).any(2)
    for tile, (left, top, right, bottom) in ((0, PART.of_box), (2, PART.box)):
        start = GAP + tile * (SIDE + GAP)
        rows, columns = np.nonzero(changed[GAP:, start : start + SIDE])
        assert (columns.min(), columns.max()) == pytest.approx((left * SIDE, right * SIDE), abs=4)
        assert (rows.min(), rows.max()) == pytest.approx((top * SIDE, bottom * SIDE), abs=4)
    assert not changed[:, GAP + SIDE + GAP : GAP + 2 * SIDE + GAP].any()


def test_a_table_of_rows_holds_what_the_document_holds(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    match = PartMatch(3, "b.png", 0.9, 1.5, True, (0.0, 0.0, 0.5, 0.5), (0.25, 0.0, 0.75, 0.5), True, 0.001)
    rows = (Row("a.png", "a fox", 1.0, duplicates=("c.png",), parts=1, part=match, part_drawn=0), Row("b.png", "b"))
    _write_parquet(Audit(rows, "recovery", 100, 0.05, 1), tmp_path / "audit.parquet")
    assert parquet.read_table(tmp_path / "audit.parquet").to_pylist() == [row_as_json(row) for row in rows]
