"""The comparison of mitigations: its bookkeeping by hand, its files, and its way through the bundled model once."""

from __future__ import annotations

import csv
import json
import math
import re
import xml.etree.ElementTree as ET

import pytest
import torch

from sd_dejavu.cli.compare import plot, record_of
from sd_dejavu.cli.main import main
from sd_dejavu.core.statistics import spread
from sd_dejavu.demo import evaluation
from sd_dejavu.demo.evaluation import MitigationRow, Share, _row, _Tally, every_mitigation
from sd_dejavu.mitigations import available
from sd_dejavu.peak_memory import peak_memory
from sd_dejavu.report.scatter import LINE, Mark, _places, scatter_chart


def row(method: str, copied: int = 3, caption: float = 0.9) -> MitigationRow:
    return MitigationRow(method, Share(copied, 4), 0.5, 0.95, 2.0, caption, math.nan, Share(0, 0), 1.5, math.nan)


def test_a_row_is_made_of_what_was_counted() -> None:
    plain = _Tally(seconds={0: 1.0, 1: 2.0, 2: 4.0})
    likeness = [0.1 * n for n in range(11)]
    tally = _Tally(
        likeness,
        [2.0, 4.0],
        [0.5, 1.0],
        {0: 1.1, 1: 3.0, 2: 12.0, 3: 99.0},
        [100.0, 300.0],
        [0.0, 0.2],
        1,
        2,
        [True, False, True],
    )
    found = _row("x", tally, plain)
    assert (found.copies.hits, found.copies.count) == (3, 11)  # .8, .9 and 1 of 0, .1, ... 1
    assert found.similarity == pytest.approx(0.5) and found.similarity_top5 == pytest.approx(0.95)
    assert (found.score, found.caption_score) == (3.0, 0.75)
    assert found.change_on_ordinary == pytest.approx(0.1) and (found.untouched.hits, found.untouched.count) == (1, 2)
    assert found.seconds_ratio == pytest.approx(1.5)  # the middle of 1.1, 1.5 and 3: pair 3 was not drawn plainly
    assert found.not_measured == 2
    assert (found.part_copies.hits, found.part_copies.count) == (2, 3)
    nothing = _row("x", _Tally(not_measured=5), plain)
    assert nothing.copies.count == 0 and math.isnan(nothing.seconds_ratio) and math.isnan(nothing.similarity_top5)
    assert found.peak_memory_mb == 300


def test_a_record_holds_plain_numbers() -> None:
    found = record_of(row("none"))
    assert found["copies"] == 0.75 and (found["copies_hits"], found["copies_of"]) == (3, 4)
    assert found["untouched"] is None and found["change_on_ordinary"] is None and found["peak_memory_mb"] is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_part_of_the_pairs_is_taken_at_even_distances() -> None:
    assert spread(range(40), 4) == [0, 10, 20, 30]
    assert spread(range(3), 2) == [0, 1]
    assert spread(range(3), 7) == spread(range(3), None) == [0, 1, 2]


def test_every_method_is_compared_and_the_last_term_left_out_once() -> None:
    methods = every_mitigation()
    assert set(methods) == {*available(), "amg: no dissimilarity"}
    assert methods["amg"].dissimilarity > 0 == methods["amg: no dissimilarity"].dissimilarity


def test_the_plot_puts_each_method_where_its_figures_are() -> None:
    svg = plot([row("none", 4, 0.5), row("amg <b>", 0, 1.0), row("unknown", 2, math.nan)])
    tree = ET.fromstring(svg)
    circles = [e for e in tree.iter() if e.tag.endswith("circle")]
    assert len(circles) == 2  # without a caption score there is no place
    (a, b) = [(float(c.get("cx", 0)), float(c.get("cy", 0))) for c in circles]
    # 720 x 420 with margins of 48 left, 212 right, 16 above and 40 below.
    assert a == pytest.approx((48 + 460 / 2, 16)) and b == pytest.approx((508, 380))
    assert "amg &lt;b&gt;" in svg and "<b>" not in svg


def test_names_stand_a_line_apart_and_above_the_axis() -> None:
    heights = [380.0, 380.0, 375.0, 100.0, 101.0]
    found = _places(heights, 380)
    assert found == [380, 365, 350, 86, 101]
    assert all(abs(a - b) >= LINE for i, a in enumerate(found) for b in found[:i])
    assert _places([20.0, 20.0, 20.0], 380) == [46, 31, 16]  # none above the plot
    assert re.search(r"\bx: up 0\.25, across 0\.50", scatter_chart([Mark("x", 0.5, 0.25)], "t", "across", "up"))


def test_the_peak_is_that_of_the_block() -> None:
    with peak_memory(torch.device("cpu")) as small:
        pass
    if math.isnan(small.megabytes):
        pytest.skip("this system does not tell a process's peak memory")
    with peak_memory(torch.device("cpu")) as large:
        held = torch.ones(64, 2**20)  # 256 MiB
        del held
    with peak_memory(torch.device("cpu")) as after:
        pass
    assert 200 <= large.megabytes - small.megabytes <= 320
    assert after.megabytes < small.megabytes + 100


def test_the_command_writes_rows_table_and_plot(tmp_path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(evaluation, "follows", lambda model, pair, latent: 0.75)  # slow, and tested with the model
    chosen = ["guidance-transition", "amg"]
    files = ["--json", str(tmp_path / "a" / "rows.json"), "--csv", str(tmp_path / "rows.csv"), "--out", str(tmp_path)]
    given = ["compare", "--methods", *chosen, "--pairs", "1", "--ordinary", "1", "--steps", "3", *files]
    assert main(given) == 0
    told = json.loads((tmp_path / "a" / "rows.json").read_text())
    rows = {r["method"]: r for r in told["rows"]}
    assert set(rows) == {"none", *chosen}
    assert (told["pairs"], told["ordinary"], told["images"], told["steps"]) == (1, 1, 1, 3)
    assert told["device"] == "cpu"
    assert rows["none"]["seconds_ratio"] == 1 and rows["none"]["change_on_ordinary"] == 0
    for r in rows.values():
        assert r["copies_of"] == r["untouched_of"] == 1 and r["caption_score"] == 0.75
        assert (r["untouched"] == 1) == (r["change_on_ordinary"] == 0)
    with (tmp_path / "rows.csv").open(encoding="utf-8") as file:
        assert [r["method"] for r in csv.DictReader(file)] == list(rows)
    ET.fromstring((tmp_path / "compare.svg").read_text())
    assert "guidance-transition" in capsys.readouterr().out


def test_unknown_methods_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--methods", "prayer"]) == 2
    assert "there is no method prayer: use some of amg" in capsys.readouterr().err
