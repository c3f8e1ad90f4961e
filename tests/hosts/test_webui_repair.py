"""The repair in a real Automatic1111 and a real Forge: what they draw of the LoRA that is left, and what they keep of it."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import miniature
import numpy as np
import pytest
import torch
from host_process import RequestRefused
from webui_page import open_webui
from webui_reference_set import reference_set
from webui_server import WebUIServer
from webui_watched import errors_of_ours, pixels

from sd_dejavu.demo import world
from sd_dejavu.training.lora_files import change, read
from sd_dejavu.training.repair import KEPT

LORA = Path(miniature.LORA).stem
SMALL: dict[str, Any] = {
    "references": "repaired",
    "lora": LORA,
    "width": 64,
    "height": 64,
    "way": "strength",
    "most_copies": 0.0,
    "captions": 1,
    "ordinary": 4,
    "images": 1,
    "steps": 2,
    "guidance_scale": 2.0,
}
TOLD = re.compile(r"measuring the captions: [\d,]+ of [\d,]+, \S+ a (second|minute|hour), about \S+ \S+ left")


@pytest.fixture(scope="module")
def repairing(webui: WebUIServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUIServer]:
    """A host with a set of three images, made by the command line."""
    rng = np.random.default_rng(6)
    pairs = [(world.draw_scene(scene), caption) for caption, scene, _ in (world.ordinary(rng) for _ in range(3))]
    with reference_set(webui, "repaired", tmp_path_factory.mktemp("repaired"), pairs):
        yield webui


def repaired(server: WebUIServer, **values: Any) -> dict[str, Any]:
    document: dict[str, Any] = server.post_json("/dejavu/repair", {**SMALL, **values}, 600)
    return document


def loras(server: WebUIServer) -> dict[str, str]:
    """Those that the host lists, with their files."""
    return {one["name"]: one["path"] for one in server.get_json("/sdapi/v1/loras")}


def test_what_is_left_is_a_lora_that_the_host_draws_with(repairing: WebUIServer) -> None:
    plain, before = repairing.txt2img(), loras(repairing)
    found = repaired(repairing, save_as="mended")
    assert [row["kept"] for row in found["rows"]] == [1.0, *KEPT["strength"]] and found["before"]["drawn"] == 1
    assert found["lora"] == "mended" and loras(repairing).keys() - before.keys() == {"mended"}
    file, kept = Path(loras(repairing)["mended"]), found["after"]["kept"]
    try:
        assert file.parent == Path(before[LORA]).parent
        own, whole = read(file), read(Path(before[LORA]))
        assert {module.name for module in own.modules} == {module.name for module in whole.modules}
        theirs = {module.name: module for module in whole.modules}
        for now in own.modules:
            then = theirs[now.name]
            zero = torch.zeros(len(then.parts["up"]), *then.parts["down"].shape[1:])
            torch.testing.assert_close(change(zero, now), kept * change(zero, then), atol=1e-5, rtol=1e-4)
        # Nothing of what was tried stays, and the host draws with the file as with the LoRA at that strength.
        assert (pixels(repairing.txt2img()) == pixels(plain)).all()
        drawn = [
            pixels(repairing.txt2img(prompt=f"a fox {tag}")) for tag in ("<lora:mended:1>", f"<lora:{LORA}:{kept}>")
        ]
        assert abs(drawn[0] - drawn[1]).max() <= 1
        if kept < 1:
            assert abs(drawn[0] - pixels(repairing.txt2img(prompt=f"a fox <lora:{LORA}:1>"))).max() > 1
        held = file.read_bytes()
        with pytest.raises(RequestRefused, match="is a LoRA 'mended' already: give the new one another name"):
            repaired(repairing, save_as="mended", seed=1)
        assert file.read_bytes() == held and errors_of_ours(repairing) == []
    finally:
        file.unlink()


@pytest.mark.newest
def test_directions_are_those_of_the_hosts_own_weights(repairing: WebUIServer) -> None:
    found = repaired(repairing, save_as="anchored", way="base-anchored", most_copies=1.0)
    file = Path(loras(repairing)["anchored"])
    try:
        assert [row["kept"] for row in found["rows"]] == [1.0, *KEPT["base-anchored"]]
    finally:
        file.unlink()


def test_it_can_be_stopped_and_nothing_is_written(repairing: WebUIServer) -> None:
    told: list[str] = []
    before = loras(repairing)

    def post() -> None:
        with pytest.raises(RequestRefused) as refused:
            repaired(repairing, save_as="stopped", ordinary=200)
        told.append(refused.value.body)

    thread = threading.Thread(target=post)
    thread.start()
    deadline = time.monotonic() + 120
    while not TOLD.fullmatch(repairing.get_json("/sdapi/v1/progress")["textinfo"] or ""):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    repairing.post_json("/sdapi/v1/interrupt", {})
    thread.join(60)
    assert told and "it was stopped, and no LoRA was written" in told[0] and loras(repairing) == before
    assert list((repairing.home / "dejavu" / "repairs").iterdir())  # started again, it goes on


def test_the_tab_repairs_the_lora_that_is_audited(repairing: WebUIServer) -> None:
    with open_webui(repairing.url) as page:
        page.browser.locator("#tabs > .tab-nav button", has_text="Déjà Vu").click()
        page.more("repair")
        assert page.browser.locator("#dejavu_save_as_repair :is(input, textarea)").first.input_value() == "repaired"
        page.browser.locator("#dejavu_begin_repair").click()
        found = page.browser.locator("#dejavu_found_repair p")
        found.wait_for(timeout=60_000)
        assert found.inner_text() == "No repair: no LoRA is chosen: choose the one to repair"


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"colour": "red"}, "no argument colour"),
        ({"references": "../references/repaired"}, "no reference set"),
        ({"lora": "../secret"}, "no LoRA"),
        ({"lora": "none"}, "no LoRA is chosen"),
        ({"save_as": "../gone"}, "cannot be the new LoRA's name"),
        ({"save_as": LORA}, "give the new one another name"),
        ({"way": "text layers"}, "would leave all of this LoRA, or nothing of it"),
        ({"ordinary": 1}, "ordinary must be at least 4"),
    ],
)
def test_what_makes_no_sense_is_told(repairing: WebUIServer, values: dict[str, Any], why: str) -> None:
    before = loras(repairing)
    with pytest.raises(RequestRefused) as refused:
        repaired(repairing, **values)
    assert refused.value.status == 400 and why in refused.value.body and loras(repairing) == before
