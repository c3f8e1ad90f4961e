"""The controls of Automatic1111 and Forge, and the panel they show: plain values and text, no host."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from test_monitor import PROFILE, SETTING, predictions

from sd_dejavu.conditioning import Conditioning
from sd_dejavu.hosts.webui import controls
from sd_dejavu.mitigations import Outcome
from sd_dejavu.monitor import Monitoring, Report, Watch
from sd_dejavu.report.panel import panel, paragraph, plain_text
from sd_dejavu.verdict import Explanation, WordSignificance


def watch(prompt: str = "a red fox", gap: float = 3.0) -> Watch:
    found = Watch(Monitoring(), prompt, SETTING, PROFILE)
    found.trace.record(predictions(gap))
    return found


def test_every_setting_of_a_monitor_is_a_control() -> None:
    names = [known.name for known in controls.OPTIONS]
    assert names == [*(f.name for f in fields(Monitoring)), "perturb", "insertions", "references"]


def test_arguments_come_as_a_list_or_as_a_dictionary() -> None:
    listed = controls.read([True, "empty prompt", "stop"])
    named = controls.read([{"without": "empty prompt", "when_flagged": "stop"}])
    assert listed == named and named.enabled
    assert named.monitoring == Monitoring(without="empty prompt", when_flagged="stop")
    assert not controls.read([]).enabled and not controls.read([{"enabled": False}]).enabled
    assert controls.read([False], {"enabled": True, "alpha": 0.2}).monitoring.alpha == 0.2


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"colour": "red"}, "no argument colour"),
        ({"alpha": 2}, "alpha must be"),
        ({"when_flagged": "explode"}, "when flagged must be one of"),
        ({"perturb": "everything"}, "perturb must be one of"),
        ({"insertions": 99}, "insertions must be"),
    ],
)
def test_arguments_that_make_no_sense_are_named(arguments: dict, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        controls.read([arguments])


def test_settings_written_into_a_picture_come_back() -> None:
    wanted = controls.read([{"when_flagged": "mitigate", "alpha": 0.05, "perturb": "random-word", "insertions": 7}])
    parameters = {controls.INFOTEXT: controls.as_infotext(wanted)}
    assert parameters[controls.INFOTEXT] == "when_flagged=mitigate; alpha=0.05; perturb=random-word; insertions=7"
    back = {known.name: controls.pasted(parameters, known.name) for known in controls.OPTIONS}
    assert controls.read([{"enabled": True, **back}]) == wanted
    assert controls.as_infotext(controls.read([{}])) == "default"
    assert controls.pasted({}, "alpha") is None


def test_each_picture_gets_its_lines() -> None:
    high, low = (Report.of(watch(gap=gap)) for gap in (3.0, 0.505))
    lines = controls.infotexts([(0, high), (1, low)])
    # No null of 199 reaches 3: p is at most 1 / 200; 149 of them reach .505.
    assert lines == {
        "Déjà Vu": ["Flagged", "Not flagged"],
        "Déjà Vu score": ["3", "0.505"],
        "Déjà Vu p-value": ["<= 0.005", "0.75"],
    }
    silent = Report.missing("nothing was seen")
    assert controls.infotexts([(0, high), (0, silent)])["Déjà Vu"] == ["Flagged"]


def test_the_panel_shows_text_as_text() -> None:
    found = watch("<b>a</b> fox")
    words = (WordSignificance("<b>a</b>", 0, 8, 2.0, 1.0, 0.1), WordSignificance("fox", 9, 12, 1.0, 0.5, 2.0))
    found.explanation = Explanation("confirmed gradient", words, "norm")
    found.note("a <i>note</i>")
    page = panel([("Picture 1", Report.of(found))])
    assert "&lt;b&gt;a&lt;/b&gt;" in page and "<b>" not in page and "<i>" not in page
    assert "Likely memorised" in page and page.count('class="dejavu-word"') == 2 and "<svg" in page
    assert page.count("data:image/png;base64,") == 1
    assert plain_text([("Picture 1", Report.of(found))]).startswith("Picture 1: Likely memorised")
    assert paragraph("<script>") == "<p>&lt;script&gt;</p>"
    assert "No run" in panel([])


def test_the_panel_tells_what_was_sampled_instead() -> None:
    found = watch()
    changed = Conditioning(torch.zeros(1, 2, 3), {}, "a fox")
    found.mitigated(Outcome(changed, 3.0, 0.3, {"moved": 0.25, "losses": (3.0, 1.0, 0.3)}))
    found.trace.record(predictions(0.3))
    page = panel([("Picture 1", Report.of(found))])
    assert "score 3 before, 0.3 after" in page and "moved by 25%" in page and "Prompt: a fox" in page
    assert page.count("<svg") == 2
