"""The audit in a real Automatic1111 and a real Forge: memorised captions come first, and what a LoRA adds is told."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import memorising
import miniature
import numpy as np
import pytest
from host_process import RequestRefused
from memorising import MEMORISED, ORDINARY
from webui_reference_set import reference_set
from webui_server import WebUIServer
from webui_watched import KNOWN, errors_of_ours, pixels

AUDIT = {"references": "audited", "width": 64, "height": 64, "nulls": 20, "images": 1, "steps": 8, "worst": 1}
LORA = Path(miniature.LORA).stem
TOLD = re.compile(r"(drawing|measuring).*: [\d,]+ of [\d,]+, \S+ a second, about \S+ \S+ left")


@pytest.fixture(scope="module")
def auditing(webui: WebUIServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUIServer]:
    """A host with a set of memorised images and of others, made by the command line."""
    generator = np.random.default_rng(0)
    strange = [generator.integers(0, 2, (3, 8, 8)).repeat(8, 1).repeat(8, 2) for _ in (*MEMORISED, *ORDINARY)]
    images = [memorising.pixels(n) for n in range(len(MEMORISED))]
    images += [(255 * one).astype(np.uint8).transpose(1, 2, 0) for one in strange[len(MEMORISED) :]]
    pairs = zip(images, (prompt.text for prompt in (*MEMORISED, *ORDINARY)), strict=True)
    with reference_set(webui, "audited", tmp_path_factory.mktemp("audited"), pairs):
        yield webui


def audited(server: WebUIServer, **values: Any) -> dict[str, Any]:
    document: dict[str, Any] = server.post_json("/dejavu/audit", {**AUDIT, **values}, 300)
    return document


def kept(server: WebUIServer) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in (server.home / "dejavu" / "audits").rglob("*.json")}


def test_memorised_captions_come_first_and_are_copied(auditing: WebUIServer) -> None:
    before = auditing.options()["sd_model_checkpoint"]
    auditing.set_options(**KNOWN)
    try:
        document = audited(auditing, worst=2, false_discovery_rate=0.1)
        files = kept(auditing)
        again = audited(auditing, worst=2, false_discovery_rate=0.1)
    finally:
        auditing.set_options(sd_model_checkpoint=before)
    rows = {row["caption"]: row for row in document["rows"]}
    assert document["counts"] == "recovery" and document["nulls"] == 20 and len(rows) == 6
    assert all(1 / 21 <= row["p_value"] <= row["q_value"] <= 1 for row in rows.values())
    memorised, ordinary = ([rows[prompt.text]["score"] for prompt in group] for group in (MEMORISED, ORDINARY))
    assert min(memorised) > max(ordinary)
    drawn = [row for row in rows.values() if row["drawn"]]
    assert len(drawn) == 2 and all(row["copies"] == row["drawn"] == 1 and row["word"] for row in drawn)
    # What was measured is not measured again.
    assert again == document and kept(auditing) == files and errors_of_ours(auditing) == []


def test_what_a_lora_adds_counts(auditing: WebUIServer) -> None:
    plain = auditing.txt2img()
    document = audited(auditing, lora=LORA, sample=2)
    assert document["counts"] == "gain" and document["loras"] == [LORA]
    for row in document["rows"]:
        assert abs(row["score"]) > 1e-5
        assert abs(row["recovery"] - row["base_recovery"]) > 1e-4
    # Nothing of it stays.
    assert (pixels(auditing.txt2img()) == pixels(plain)).all() and errors_of_ours(auditing) == []


@pytest.mark.newest
def test_a_lora_of_next_to_no_strength_adds_next_to_nothing(auditing: WebUIServer) -> None:
    weak, strong = (audited(auditing, lora=LORA, sample=2, strength=s, worst=0)["rows"] for s in (1e-4, 1.0))
    for row, other in zip(weak, strong, strict=True):
        assert row["recovery"] == pytest.approx(row["base_recovery"], abs=1e-5)
        assert row["base_recovery"] == pytest.approx(other["base_recovery"], abs=1e-5)


def test_it_can_be_stopped(auditing: WebUIServer) -> None:
    told: list[str] = []

    def post() -> None:
        with pytest.raises(RequestRefused) as refused:
            audited(auditing, nulls=2000, seed=5)
        told.append(refused.value.body)

    thread = threading.Thread(target=post)
    thread.start()
    deadline = time.monotonic() + 60
    while not TOLD.fullmatch(auditing.get_json("/sdapi/v1/progress")["textinfo"] or ""):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    auditing.post_json("/sdapi/v1/interrupt", {})
    thread.join(60)
    assert told and "it was stopped" in told[0]


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"colour": "red"}, "no argument colour"),
        ({"references": "../references/audited"}, "no reference set"),
        ({"lora": "../secret"}, "no LoRA"),
        ({"nulls": 3}, "nulls must be at least 20"),
        ({"width": 65}, "width must be a multiple of 8"),
        ({"steps": "many"}, "steps must be a whole number"),
    ],
)
def test_what_makes_no_sense_is_told(auditing: WebUIServer, values: dict[str, Any], why: str) -> None:
    with pytest.raises(RequestRefused) as refused:
        audited(auditing, **values)
    assert refused.value.status == 400 and why in refused.value.body
