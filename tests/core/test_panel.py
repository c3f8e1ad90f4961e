"""The controls of Automatic1111 and Forge, and the panel they show: plain values and text, no host."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from test_monitor import PROFILE, SETTING, predictions

from sd_dejavu.calibration.profile import Profile
from sd_dejavu.core.conditioning import Conditioning
from sd_dejavu.core.settings import Option, options_of
from sd_dejavu.core.verdict import Explanation, WordSignificance
from sd_dejavu.doctor import Finding
from sd_dejavu.hosts.webui import controls
from sd_dejavu.mitigations import Outcome
from sd_dejavu.reference.reading import Reading
from sd_dejavu.report.panel import Offer, findings, framed, panel, paragraph, plain_text
from sd_dejavu.run.monitoring import Monitoring
from sd_dejavu.run.report import Report
from sd_dejavu.run.state import RunState


def watch(prompt: str = "a red fox", gap: float = 3.0, profile: Profile | None = PROFILE) -> RunState:
    found = RunState(Monitoring(), prompt, SETTING, profile)
    found.trace.record(predictions(gap))
    return found


def test_every_setting_of_a_monitor_is_a_control() -> None:
    names = [known.name for known in controls.OPTIONS]
    # In the order in which they came: saved arguments of the host's API are known by their places.
    released = [f.name for f in fields(Monitoring) if f.name != "calibrate_first"]
    assert names == [*released, "perturb", "insertions", "references", "calibrate_first"]


def test_arguments_come_as_a_list_or_as_a_dictionary() -> None:
    listed = controls.read([True, "empty prompt", "stop"])
    named = controls.read([{"baseline": "empty prompt", "when_flagged": "stop"}])
    assert listed == named and named.enabled
    assert named.monitoring == Monitoring(baseline="empty prompt", when_flagged="stop")
    # Names of release 0.1 are taken too.
    assert controls.read([{"without": "negative prompt", "remedy": "start-token"}]).monitoring == Monitoring(
        baseline="negative prompt", mitigation="start-token"
    )
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
        ({"insertions": None}, "insertions must be a whole number, not None"),
        ({"insertions": "4"}, "insertions must be a whole number, not '4'"),
        ({"insertions": 2.5}, "insertions must be a whole number, not 2.5"),
        ({"insertions": [4]}, "insertions must be a whole number"),
        ({"references": None}, "references must be text, not None"),
        ({"references": {}}, "references must be text"),
        ({"perturb": None}, "perturb must be one of"),
        ({"mitigation": []}, "mitigation must be one of"),
        ({"alpha": None}, "alpha must be a number, not None"),
        ({"alpha": "0.01"}, "alpha must be a number"),
        ({"enabled": "no"}, "enabled must be true or false, not 'no'"),
        ({"enabled": None}, "enabled must be true or false, not None"),
    ],
)
def test_arguments_that_make_no_sense_are_named(arguments: dict, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        controls.read([arguments])


def test_pages_give_whole_numbers_as_floats_and_the_api_no_switch() -> None:
    assert controls.read([{"insertions": 4.0}]).insertions == 4
    assert controls.read([None, "empty prompt"]).enabled is False


@pytest.mark.parametrize(
    "name",
    [
        "cats; 2024",
        "cats; alpha=0.5",
        "50%",
        "%3B",
        "a=b",
        " both ends ",
        "\u3000",
        "two\nlines",
        "猫、犬",
        'say "so"',
        "a,b: c",
    ],
)
def test_a_reference_set_of_any_name_is_written_and_comes_back(name: str) -> None:
    wanted = controls.read([{"references": name, "alpha": 0.05}])
    written = controls.as_infotext(wanted)
    assert written == written.strip() and "\n" not in written
    back = {known.name: controls.pasted({controls.INFOTEXT: written}, known.name) for known in controls.OPTIONS}
    assert controls.read([{"enabled": True, **back}]) == wanted


@pytest.mark.parametrize("written", ["alpha=x", "alpha=7", "insertions=2.5", "mitigation=prayer"])
def test_what_an_option_cannot_have_leaves_its_control_as_it_is(written: str) -> None:
    assert controls.pasted({controls.INFOTEXT: written}, written.split("=")[0]) is None


@pytest.mark.parametrize(("text", "value"), [("True", True), ("False", False), ("no", None)])
def test_a_switch_is_a_checkbox_and_comes_back_as_it_was(monkeypatch, text: str, value: bool | None) -> None:
    switch = Option("loud", not value, "say more", bool)
    monkeypatch.setattr(controls, "OPTIONS", (*controls.OPTIONS, switch))
    assert controls.pasted({controls.INFOTEXT: f"alpha=0.05; loud={text}"}, "loud") is value
    assert controls.shown_as(switch) == "checkbox"


def test_the_components_of_options() -> None:
    kinds = {known.name: controls.shown_as(known, known.choices) for known in controls.OPTIONS}
    assert (
        kinds["mitigation"] == kinds["references"] == "dropdown" and kinds["alpha"] == kinds["insertions"] == "slider"
    )
    building = {known.name: controls.shown_as(known, known.choices) for known in options_of(Reading)}
    assert building["trainer"] == "dropdown" and building["trainer_config"] == building["trigger_word"] == "text"
    assert controls.shown_as(Option("count", 1, "", int)) == "number"
    assert controls.shown_as(Option("count", 1, "", int, maximum=controls.SLIDER_LIMIT + 1)) == "number"


def test_settings_written_into_an_image_come_back() -> None:
    wanted = controls.read([{"when_flagged": "mitigate", "alpha": 0.05, "perturb": "random-word", "insertions": 7}])
    parameters = {controls.INFOTEXT: controls.as_infotext(wanted)}
    assert parameters[controls.INFOTEXT] == "when_flagged=mitigate; alpha=0.05; perturb=random-word; insertions=7"
    back = {known.name: controls.pasted(parameters, known.name) for known in controls.OPTIONS}
    assert controls.read([{"enabled": True, **back}]) == wanted
    assert controls.as_infotext(controls.read([{}])) == "default"
    assert controls.pasted({}, "alpha") is None


def test_each_image_gets_its_lines() -> None:
    high, low = (Report.of(watch(gap=gap)) for gap in (3.0, 0.505))
    lines = controls.infotexts([(0, high), (1, low)])
    # No null of 199 reaches 3: p is at most 1 / 200; 149 of them reach .505.
    assert lines == {
        "Déjà Vu": ["Flagged", "Not flagged"],
        "Déjà Vu score": ["3", "0.505"],
        "Déjà Vu p-value": ["≤ 0.005", "0.75"],
    }
    silent = Report.missing("nothing was seen")
    assert controls.infotexts([(0, high), (0, silent)])["Déjà Vu"] == ["Flagged"]


def test_the_panel_shows_text_as_text() -> None:
    found = watch("<b>a</b> fox")
    words = (WordSignificance("<b>a</b>", 0, 8, 2.0, 1.0, 0.1), WordSignificance("fox", 9, 12, 1.0, 0.5, 2.0))
    found.explanation = Explanation("confirmed gradient", words, "norm")
    found.note("a <i>note</i>")
    page = panel([("Image 1", Report.of(found))])
    assert "&lt;b&gt;a&lt;/b&gt;" in page and "<b>" not in page and "<i>" not in page
    assert "Likely a replay" in page and page.count('class="dejavu-word"') == 2 and "<svg" in page
    assert "data:image/png;base64," not in page  # the prompt acts alike everywhere
    assert plain_text([("Image 1", Report.of(found))]).startswith("Image 1: Likely a replay")
    assert paragraph("<script>") == "<p>&lt;script&gt;</p>"
    assert framed('<p class="x">', '"t"').endswith('title="&#34;t&#34;" srcdoc="&lt;p class=&#34;x&#34;&gt;"></iframe>')
    titled = panel([("<b>1</b>", Report.missing("<i>why</i>"))])
    assert "&lt;b&gt;1" in titled and "&lt;i&gt;why" in titled and "<b>" not in titled and "<i>" not in titled
    assert "No run" in panel([])


def explained(flagged_at: float) -> RunState:
    """A run of 'a fox', of which two words were looked at; its score is flagged at half of ``flagged_at`` or less."""
    found = watch("a fox", gap=flagged_at)
    words = (WordSignificance("a", 0, 1, 2.0, 1.0, 0.1), WordSignificance("fox", 2, 5, 1.0, 0.5, None))
    found.explanation = Explanation("confirmed gradient", words, "norm")
    return found


def test_where_the_prompt_acts_is_offered_where_that_tells_parts_of_the_image_apart(monkeypatch: Any) -> None:
    """Half against half does; a chessboard, whose parts are all alike, does not."""
    chessboard = torch.arange(64).reshape(8, 8).add(torch.arange(8)[:, None]) % 2
    for values, offered in ((torch.ones(8, 8).triu(), True), (chessboard, False), (torch.ones(8, 8), False)):
        monkeypatch.setattr(Report, "maps", lambda self, values=values: values[None].float())
        page = panel([("Image 1", Report.of(watch("a fox")))])
        assert ("Show where" in page) is offered and page.count("data:image/png;base64,") == int(offered)


def test_words_are_pale_where_nothing_is_flagged() -> None:
    loud, calm = (panel([("Image 1", Report.of(explained(gap)))]) for gap in (3.0, 0.505))
    assert "dejavu-badge dejavu-flagged" in loud and "font-weight:700" in loud and "border-bottom:4px" in loud
    assert "dejavu-calm" not in loud and "thicker line" in loud
    assert "dejavu-badge dejavu-not-flagged" in calm and "dejavu-calm" in calm and "thicker line" not in calm
    words = calm[calm.index('data-dejavu="prompt"') : calm.index("Click a word")]
    assert "font-weight" not in words and "border-bottom" not in words and "213 94 0" not in words


def test_each_word_knows_what_the_score_would_be_without_it() -> None:
    page = panel([("Image 1", Report.of(explained(3.0)))])
    assert "Without it the first step would score about 0.1 instead of 3; ordinary prompts score about " in page
    assert "This run did not measure what the score would be without it." in page
    assert "Click a word to see" in page and "<summary>Details</summary>" in page and "Generate again" in page
    assert "Click a word" not in panel([("Image 1", Report.of(watch()))])


def test_the_panel_offers_to_calibrate() -> None:
    lacking = watch()
    lacking.profile = None
    reports = [("Image 1", Report.of(lacking))]
    assert 'data-dejavu="calibrate"' not in panel(reports)
    page = panel(reports, Offer(((100, 18.0), (1000, 180.0))))
    assert page.count('data-dejavu="calibrate"') == 2 and 'data-count="1000"' in page
    assert "Measures 100 ordinary prompts once (about 20 s). P-values then come in steps of 1 in 100." in page
    page = panel(reports, Offer(((1000, 8000.0),), whole_runs=True))
    assert page.count('data-dejavu="calibrate"') == 1 and "<summary>more</summary>" not in page
    assert "Samples 1,000 ordinary prompts to the end once (about 2 h)." in page


def test_a_run_that_begins_with_an_image_is_told_that_it_gets_no_verdict() -> None:
    found = watch()
    found.setting = replace(SETTING, begins_with="an image")
    page = panel([("1", Report.of(found))])
    assert "begin with an image (img2img, the hires fix) get a score but no verdict" in page
    assert 'data-dejavu="waits"' not in page


def test_an_image_that_a_calibration_would_help_is_marked() -> None:
    assert 'data-dejavu="waits"' in panel([("1", Report.of(watch(profile=None)))])
    assert 'data-dejavu="waits"' not in panel([("1", Report.of(watch()))])


def test_figures_stand_behind_what_they_are_good_for() -> None:
    assert paragraph("Ready <b>") == "<p>Ready &lt;b&gt;</p>"
    page = paragraph("Ready", "median <1>")
    assert page.startswith("<p>Ready</p><details") and "<p>median &lt;1&gt;</p></details>" in page


def test_what_works_on_this_machine_is_text() -> None:
    page = findings([Finding("torch", "2 <b>", True), Finding("x", "gone", False, "get <it>"), Finding("y", "")])
    assert "<strong>1 thing does not work here: x.</strong>" in page
    assert "works</span> torch: 2 &lt;b&gt;" in page and "fails</span> x: gone" in page and "get &lt;it&gt;" in page


def test_a_page_says_what_a_control_is_in_few_words() -> None:
    named = {known.name: (controls.label_of(known), controls.told_of(known)) for known in controls.OPTIONS}
    assert named["baseline"] == ("Measured against", "What the prompt is measured against")
    assert named["mitigation"] == ("How to mitigate", "") and named["when_flagged"][0] == "When flagged"
    assert all(len(told) <= controls.LONGEST_INFO for _, told in named.values())
    labels = [label for label, _ in named.values()]
    assert len(set(labels)) == len(labels) and all(label[0].isupper() for label in labels)


def test_the_panel_tells_what_was_sampled_instead() -> None:
    found = watch()
    changed = Conditioning(torch.zeros(1, 2, 3), {}, "a fox")
    found.mitigated(Outcome(changed, 3.0, 0.3, {"moved": 0.25, "losses": (3.0, 1.0, 0.3)}))
    found.trace.record(predictions(0.3))
    page = panel([("Image 1", Report.of(found))])
    assert "score 3 before, 0.3 after" in page and "moved by 25%" in page and "Prompt: a fox" in page
    assert page.count("<svg") == 2
