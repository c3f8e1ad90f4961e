"""The report's words, charts, images, page and panel, against values worked by hand."""

from __future__ import annotations

import base64
import io
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from sd_dejavu.calibration.profile import Null, Profile, Setting
from sd_dejavu.core.attention import AttentionRule
from sd_dejavu.core.conditioning import Conditioning, split_words
from sd_dejavu.core.verdict import BandStep, Explanation, Verdict, WordSignificance
from sd_dejavu.mitigations import Outcome
from sd_dejavu.report.chart import loss_sparkline, magnitude_chart
from sd_dejavu.report.html import Case, Mitigated, Report, render, similarity_text
from sd_dejavu.report.image import colours, png_uri, where_overlay
from sd_dejavu.report.scatter import Mark, scatter_chart
from sd_dejavu.report.share_chart import share_chart
from sd_dejavu.report.terminal import step_sparkline, verdict_panel
from sd_dejavu.report.wording import beside_label, calibrated, changed, facts, label, number, sentence
from sd_dejavu.report.words import word_legend, word_spans

pytestmark = pytest.mark.filterwarnings("error")

PLAIN = Verdict("a red ball", 7.314, 0.002, True, 0.01, nulls=999)
BAND = (BandStep(14.6, 1.0, 2.0, 3.0), BandStep(7.0, 1.0, 2.0, 3.5), BandStep(3.0, 1.0, 2.0, 4.0))
STEPS = ((14.6, 7.3), (7.0, None), (3.0, 2.5))

NASTY = [
    '<script>alert("x")</script> </span></p></article> \'"><img src=x onerror=alert(1)>',
    "&amp; &lt;b&gt; &#60;i&#62; {{ 7 * 7 }} {% raw %} [bold]x[/bold] %s {0}",
    "كرة حمراء על הדשא \u202e drow-desrever",
    "👩‍🚀 🧑🏽‍🎨 two  spaces\n\nand\ttabs ",
    "word " * 1000,
]


def explained(prompt: str) -> Explanation:
    words = split_words(prompt)
    values = [1 / (1 + i) for i in range(len(words))]
    marked = (WordSignificance(w.text, w.start, w.end, 3 * v, v) for w, v in zip(words, values, strict=True))
    return Explanation("input gradient", tuple(marked), "<L2> per token")


class Page(HTMLParser):
    """Elements by tag, and the text below the first element of a class."""

    VOID = ("meta", "img", "br", "path", "rect", "circle", "polyline", "polygon")

    def __init__(self, text: str, collect: str = "dejavu-words") -> None:
        super().__init__(convert_charrefs=True)
        self.collect, self.tags, self.attributes, self.words = collect, [], [], ""
        self._open: list[str] = []
        self._inside: int | None = None
        self._done = False
        self.feed(str(text))  # the parser would slice Markup into Markup
        self.close()
        assert not self._open, "every element is closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)
        if ("class", self.collect) in attrs and self._inside is None and not self._done:
            self._inside = len(self._open)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        # Browsers and this parser take '<rect ...>text</rect>' as a pair; here it is opened as void.
        if tag in self.VOID:
            return
        assert self._open.pop() == tag
        if self._inside is not None and len(self._open) < self._inside:
            self._inside, self._done = None, True

    def handle_data(self, data):
        if self._inside is not None:
            self.words += data


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def full_case(prompt: str) -> Case:
    before = replace(PLAIN, prompt=prompt, score_per_step=STEPS, explanation=explained(prompt))
    after = replace(before, prompt=prompt, score=2.0, p_value=0.41, flagged=False, score_per_step=((14.6, 2.0),))
    mitigated = Mitigated(prompt, prompt, after, [image(2)], 0.31, [8.0, 4.0, 2.0], 3.2, note=prompt)
    return Case(before, BAND, [image()], torch.rand(8, 8), image(1), 0.93, 0.8, (mitigated, replace(mitigated)))


# ---------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # p = (1 + count) / (n + 1)
        ({}, "Likely a replay of training images: 1 of 999 ordinary prompts scores as high (p = 0.002)"),
        (
            {"p_value": 0.001},
            "Likely a replay of training images: none of 999 ordinary prompts scores as high (p ≤ 0.001)",
        ),
        # 1 / 123 = 0.00813: a bound may only be rounded up.
        (
            {"p_value": 1 / 123, "nulls": 122},
            "Likely a replay of training images: none of 122 ordinary prompts scores as high (p ≤ 0.0082)",
        ),
        ({"p_value": 41 / 100}, "Nothing unusual: 409 of 999 ordinary prompts score as high (p = 0.41)"),
        ({"p_value": 0.05}, "Nothing unusual: 49 of 999 ordinary prompts score as high (p = 0.05)"),
        ({"p_value": 0.049}, "Unusual, but not enough to flag: 48 of 999 ordinary prompts score as high (p = 0.049)"),
        ({"p_value": 0.01, "nulls": 1999}, "19 of 1,999 ordinary prompts score as high (p = 0.01)"),
        ({"p_value": 1.0}, "Nothing unusual: practically every ordinary prompt scores as high (p = 1)"),
        # 0.0104 is above alpha = 0.01 and must not be shown as 0.01.
        (
            {"p_value": 0.0104, "nulls": 9999},
            "Unusual, but not enough to flag: 103 of 9,999 ordinary prompts score as high (p = 0.0104)",
        ),
        # Counted eight times, or twice where each ordinary prompt has four images.
        (
            {"p_value": 0.008, "batch": 8},
            "Likely a replay of training images: none of 999 ordinary prompts scores as high (p ≤ 0.008 for 8 images)",
        ),
        ({"p_value": 0.08, "batch": 8}, "9 of 999 ordinary prompts score as high (p = 0.08 for 8 images)"),
        (
            {"p_value": 0.08, "batch": 8, "null_images": 4},
            "39 of 999 ordinary prompts score as high in one of 4 images (p = 0.08 for 8 images)",
        ),
    ],
)
def test_sentence_counts_the_ordinary_prompts(changes, expected):
    verdict = replace(PLAIN, **changes)
    verdict = replace(verdict, flagged=verdict.p_value <= verdict.alpha)
    assert sentence(verdict).startswith("Likely a replay") == verdict.flagged
    assert sentence(verdict).endswith(expected)


@pytest.mark.parametrize(
    ("score", "why", "expected"),
    [
        (None, "the model's predictions are not finite.", "No verdict: the model's predictions are not finite"),
        (7.314, "no profile is loaded", "No verdict: the score is 7.31, but no profile is loaded"),
        (7.314, None, "No verdict: the score is 7.31, but there is nothing to compare it with yet"),
        (None, None, "No verdict: nothing was measured"),
    ],
)
def test_sentence_without_a_verdict_says_why(score, why, expected):
    verdict = replace(PLAIN, score=score, p_value=None, flagged=None, why=why, nulls=0)
    assert sentence(verdict) == expected
    assert label(verdict) == "No verdict"
    assert f"{label(verdict)}: {beside_label(verdict)}".lower() == sentence(verdict).lower()


def test_facts_name_unit_images_and_calibration():
    verdict = replace(PLAIN, images=4, null_style="caption")
    assert facts(verdict) == [
        ("Score", "7.31 (L2, first step, mean of 4 images)"),
        ("p", "0.002 (flagged if p ≤ 0.01)"),
        ("Calibration", "999 ordinary prompts of style 'caption'"),
        ("Measured against", "the empty prompt"),
    ]


@pytest.mark.parametrize(
    ("count", "images", "expected"),
    [
        (98, 1, "Too few to flag anything at alpha = 0.01: that takes at least 99."),
        (99, 1, "Enough to flag at alpha = 0.01 one image at a time."),
        (1000, 1, "Enough to flag at alpha = 0.01 in batches of up to 10."),
        (1000, 4, "Enough to flag at alpha = 0.01 in batches of up to 40."),
    ],
)
def test_a_calibration_says_what_it_can_flag(count, images, expected):
    setting = Setting(
        model="abc",
        prediction_type="epsilon",
        latent_shape=(4, 8, 8),
        steps=50,
        sigma=14.6,
        guidance_scale=7.5,
        baseline="empty prompt",
    )
    nulls = tuple(Null("plain", {"first step": (float(n),) * images}) for n in range(count))
    text = calibrated(Profile(setting, nulls), images)
    assert text.startswith(f"{count:,} ordinary prompts at sigma 14.6: median {number((count - 1) / 2)}, ")
    assert text.endswith(expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "Sampled with another conditioning: first-step score 5 before, 0.4 after."),
        ({"x": torch.zeros(1)}, "Sampled from other noise: first-step score 5 before, 0.4 after."),
        (
            {"x": torch.zeros(1), "rule": list},
            "Sampled from other noise, with guidance from a later step on: first-step score 5 before, 0.4 after.",
        ),
        (
            {"rule": list, "score_after": 5.0},
            "Sampled under another guidance, which leaves the first step's score at 5.",
        ),
        (
            {
                "conditioning": Conditioning(
                    torch.zeros(1, 1, 1), attention=AttentionRule(torch.ones(1), torch.ones(1) > 0)
                )
            },
            "Sampled with other attention to the prompt's tokens: first-step score 5 before, 0.4 after.",
        ),
    ],
)
def test_what_a_mitigation_changed_is_told_by_what_it_touched(changes, expected):
    assert changed(replace(Outcome(Conditioning(torch.zeros(1, 1, 1)), 5.0, 0.4), **changes)) == expected


@pytest.mark.parametrize(("value", "text"), [(0.01234, "0.0123"), (7.0, "7"), (99.96, "100"), (1234.5, "1,234")])
def test_number_has_three_digits(value, text):
    assert number(value) == text


@pytest.mark.parametrize("prompt", NASTY)
def test_prompt_stays_text(prompt):
    page = Page(word_spans(prompt, explained(prompt)))
    assert page.words == prompt
    assert page.tags == ["span"] * (1 + len(split_words(prompt)))
    assert {name for name, _ in page.attributes} == {"class", "dir", "style", "tabindex", "title"}
    assert Page(word_spans(prompt, None)).words == prompt


def test_words_speak_without_colour():
    explanation = explained("red ball")
    html = word_spans("red ball", explanation)
    assert 'title="significance 0.50, 1.5 (&lt;L2&gt; per token)"' in html
    assert html.count("font-weight:700") == 1
    assert 'border-bottom:4px solid;font-weight:700">red<' in html
    assert 'border-bottom:2px solid">ball<' in html
    legend = word_legend(explanation)
    assert "input gradient" in legend
    assert "red 1.00, ball 0.50" in legend


def test_explanation_without_words_shows_the_prompt():
    assert Page(word_spans("x", Explanation("leave one out", (), "L2"))).words == "x"


# ---------------------------------------------------------------------------------------- chart


def drawn(svg: str, tag: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(svg).iter(tag))


def test_chart_leaves_gaps_and_says_so():
    svg = magnitude_chart(STEPS, BAND)
    points = [c.find("title").text for c in drawn(svg, "circle") if c.find("title") is not None]
    assert points == ["this prompt, evaluation 1: 7.3", "this prompt, evaluation 3: 2.5"]
    assert "this prompt, evaluation 2: not measured" in svg
    assert len(drawn(svg, "polygon")) == 1
    assert drawn(svg, "desc")[0].text == (
        "This prompt: 2 of 3 evaluations measured, 7.3 at the first, 2.5 to 7.3 over all, "
        "above the ordinary range at 1 of 2."
    )
    assert ElementTree.fromstring(svg).get("role") == "img"


def test_chart_points_lie_on_the_scale():
    """10 of a scale to 10 lies on the top tick, 0 and 5 in proportion."""
    svg = magnitude_chart(((3.0, 10.0), (2.0, 5.0), (1.0, 0.0)))
    tops = [float(c.get("cy")) for c in drawn(svg, "circle") if c.find("title") is not None]
    ticks = {t.text: float(t.get("y")) - 4 for t in drawn(svg, "text") if t.get("text-anchor") == "end"}
    assert tops == [
        pytest.approx(ticks["10"]),
        pytest.approx((ticks["10"] + ticks["0"]) / 2),
        pytest.approx(ticks["0"]),
    ]


def test_band_follows_sigma_not_only_place():
    svg = magnitude_chart(((14.6, 5.0), (9.9, 5.0), (3.0, 5.0)), BAND)
    assert len(drawn(svg, "polygon")) == 2, "the step at sigma 9.9 has no band"


@pytest.mark.parametrize(
    ("steps", "band", "after"),
    [
        ((), (), None),
        (((1.0, None),), BAND, ()),
        (((1.0, float("nan")), (0.5, float("inf"))), (), None),
        (((14.6, 4.0),), BAND, None),
        (((14.6, 0.0),), (), ((14.6, 0.0), (7.0, 1.0))),
        (tuple((1000.0 - i, 1.0 + i) for i in range(1000)), (), None),
    ],
)
@pytest.mark.parametrize("width", [320, 560])
def test_chart_bears_little_and_much(steps, band, after, width):
    svg = magnitude_chart(steps, band, after, width)
    assert "nan" not in svg and "inf" not in svg
    assert drawn(svg, "title")
    for text in drawn(svg, "text"):
        assert text.text


def test_second_curve_has_another_shape():
    svg = magnitude_chart(STEPS, BAND, ((14.6, 2.0), (7.0, 1.5)))
    squares = [r.find("title").text for r in drawn(svg, "rect") if r.find("title") is not None]
    assert squares == ["after mitigation, evaluation 1: 2", "after mitigation, evaluation 2: 1.5"]


def test_loss_sparkline():
    assert drawn(loss_sparkline([8.0, 4.0, 2.0]), "desc")[0].text == "The loss went from 8 to 2 in 3 steps."
    assert drawn(loss_sparkline([1.0]), "circle")
    assert loss_sparkline([]) == ""


@pytest.mark.parametrize("nasty", NASTY)
def test_every_text_in_a_chart_is_escaped(nasty):
    shares = share_chart([nasty, "2"], [0.25, 1.0], nasty, nasty)
    scatter = scatter_chart([Mark(nasty, 0.5, 0.25)], nasty, nasty, nasty)
    for svg, tags in ((shares, {"svg", "title", "desc", "path", "text", "polyline", "circle"}), (scatter, None)):
        page = Page(svg)
        assert set(page.tags) <= (tags or set(Page(scatter_chart([Mark("a", 0, 0)], "b", "c", "d")).tags))
        assert not [name for name, _ in page.attributes if name.startswith("on")]
    told = [c.find("title").text for c in drawn(shares, "circle")]
    assert told == [f"{nasty} {nasty}: 25%", f"{nasty} 2: 100%"]


# ---------------------------------------------------------------------------------------- images


def test_png_uri_gives_the_pixels_back():
    head, data = png_uri(image()).split(",")
    assert head == "data:image/png;base64"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), image())


def test_overlay_colours_the_highest_and_the_lowest_place():
    spot = torch.zeros(8, 8, dtype=torch.bfloat16)
    spot[0, 0] = 5
    mixed = where_overlay(np.full((64, 48, 3), 100, np.uint8), spot, opacity=0.5)
    assert mixed.shape == (64, 48, 3) and mixed.dtype == np.uint8
    # Half grey 100, half the ramp's ends (252, 255, 164) and (0, 0, 4).
    assert mixed[0, 0].tolist() == [176, 178, 132]
    assert mixed[-1, -1].tolist() == [50, 50, 52]


def test_flat_or_broken_map_is_lowest_everywhere():
    for values in (np.full((4, 4), 3.0), np.full((4, 4), np.nan)):
        assert (
            where_overlay(np.zeros((4, 4, 3), np.uint8), values, opacity=1).reshape(-1, 3).tolist() == [[0, 0, 4]] * 16
        )


def test_ramp_gets_brighter_all_the_way():
    assert (np.diff(colours(np.linspace(0, 1, 50)) @ (0.2126, 0.7152, 0.0722)) > 0).all()


def test_wrong_shapes_are_told():
    with pytest.raises(ValueError, match=r"must be uint8 \[height, width, 3\], not float64 \[4, 4\]"):
        png_uri(np.zeros((4, 4)))
    with pytest.raises(ValueError, match=r"must have shape \[height, width\], not \[1, 4, 4\]"):
        where_overlay(image(), torch.zeros(1, 4, 4))


# ---------------------------------------------------------------------------------------- page


@pytest.mark.parametrize("prompt", NASTY)
def test_page_holds_user_text_as_text_only(prompt):
    def page(text: str) -> Page:
        texts = {"title": text, "subtitle": text, "model": text, "settings": {text: text}}
        return Page(render(Report(cases=[full_case(text), full_case(text)], **texts)))

    nasty, harmless = page(prompt), page("word " * len(split_words(prompt)))
    assert nasty.words == prompt
    assert nasty.tags == harmless.tags
    assert not any(name.startswith("on") for name, _ in nasty.attributes)


def test_page_is_self_contained_and_ordered():
    text = render(Report("Three prompts", "a try", "little world", [full_case("a red ball")], {"steps": 50}))
    page = Page(text)
    for outside in ("http://", "https://", "url(", "@import", "<script", "<link"):
        assert outside not in text
    assert all(value.startswith("data:image/png;base64,") for name, value in page.attributes if name == "src")
    assert {"header", "main", "footer", "h1", "h2", "figure"} <= set(page.tags)
    assert "Déjà Vu" in text
    order = [
        "Likely a replay of training images: 1 of 999",
        "dejavu-words",
        "How much each word counts",
        "<svg",
        "Generated image",
    ]
    order += ["Where the prompt acts", "Training image it copies", "similarity 0.93, a copy (0.80 or more)"]
    order += ["Nothing unusual: 409 of 999", "similarity 0.31, not a copy (below 0.80)", "Loss 8 to 2"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


def test_page_bears_nothing_and_lone_surrogates():
    assert "No prompt was examined" in render(Report("", "", "", []))
    empty = Verdict("\ud800", None, None, None, 0.01, why="guidance is off")
    text = render(Report("t", "", "m", [Case(empty), Case(replace(empty, prompt=""))]))
    assert "No verdict" in text and "Guidance is off" in text
    assert "(empty prompt)" in text
    text.encode("utf-8")


def test_the_band_of_ordinary_prompts_is_shown():
    assert "ordinary prompts, 5 to 95 %" in render(Report("", "", "", [full_case("a red ball")]))


def test_similarity_at_the_threshold_is_a_copy():
    assert similarity_text(0.8, 0.8) == "similarity 0.80, a copy (0.80 or more)"
    assert similarity_text(0.5, None) == "similarity 0.50"
    assert similarity_text(None, 0.8) == ""


# ---------------------------------------------------------------------------------------- terminal


def printed(verdict: Verdict, **how) -> str:
    console = Console(file=io.StringIO(), width=100, **how)
    console.print(verdict_panel(verdict))
    return console.file.getvalue()


def test_panel_says_everything_without_colour():
    verdict = replace(PLAIN, prompt="a red ball", explanation=explained("a red ball"), score_per_step=STEPS)
    text = printed(verdict, no_color=True)
    assert "\x1b" not in text
    assert "Likely a replay of training images: 1 of 999 ordinary prompts scores as high (p = 0.002)" in text
    assert "a red ball" in text
    assert "a 1.00, red 0.50, ball 0.33 (how much each counts, of 1)" in text
    assert "█·▃" in text, "7.3 is the highest; 2.5 / 7.3 of 8 blocks is the third"
    assert text.index("Likely") < text.index("a red ball") < text.index("Score")


def test_panel_keeps_markup_and_escapes_as_text():
    text = printed(replace(PLAIN, prompt="[bold]x[/bold] \x1b[31mred\x07 \ud800"), force_terminal=True, no_color=True)
    assert "[bold]x[/bold]" in text
    assert "\x1b[31m" not in text and "\x07" not in text
    text.encode("utf-8")


@pytest.mark.parametrize("flagged", [True, False, None])
def test_panel_names_the_result(flagged):
    verdict = replace(PLAIN, flagged=flagged, p_value=None if flagged is None else 0.002)
    assert f"Déjà Vu: {label(verdict)}" in printed(verdict)


@pytest.mark.parametrize(
    ("values", "text"), [([], ""), ([0.0, 0.0], "▁▁"), ([None], "·"), ([1.0, 4.0, float("nan"), 8.0], "▂▅·█")]
)
def test_step_sparkline(values, text):
    assert step_sparkline(values) == text
