"""Properties of what reads text, files and scores, on inputs that nobody thought of."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import tarfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from sd_dejavu.calibration.profile import Null, Profile, Setting, conformal_p
from sd_dejavu.cli.prompt_files import InputError, read_prompts
from sd_dejavu.core.conditioning import split_words
from sd_dejavu.core.prompt_weights import parse, words_as_typed
from sd_dejavu.core.settings import LEAST_ABOVE, Option
from sd_dejavu.core.verdict import BandStep
from sd_dejavu.hosts.webui import controls
from sd_dejavu.kept.foreign import Unreadable, contents, json_of, one_line
from sd_dejavu.reference.images import open_image
from sd_dejavu.reference.sources import open_source

quick = settings(
    max_examples=80,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

PROMPTS = st.text(st.sampled_from("ab1,;.:()[]\\ \t\n\u3000é猫はカ🦄-+"), max_size=40) | st.text(max_size=40)
LINES = st.lists(
    st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20).filter(str.strip),
    min_size=1,
    max_size=6,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def tried(kind: type[Exception], read: Callable[[Any], Any], given: Any) -> tuple[Any, str]:
    """(what was read, '') or (None, why it was refused); any other error fails the test."""
    try:
        return read(given), ""
    except kind as error:
        return None, str(error) or repr(error)


# --------------------------------------------------------------------------------------------- prompts


@quick
@given(PROMPTS)
def test_brackets_are_read_from_any_text(prompt: str) -> None:
    read = parse(prompt)
    assert len(read.text) == len(read.weights) == len(read.places)
    assert [prompt[place] for place in read.places] == list(read.text)
    assert list(read.places) == sorted(set(read.places))
    for typed, word in zip(words_as_typed(prompt), split_words(read.text), strict=True):
        assert read.places[word.start] == typed.start < typed.end <= len(prompt) and typed.text == word.text


@quick
@given(PROMPTS, st.decimals("-3", "3", places=2))
def test_a_bracket_that_is_meant_weighs_nothing_and_a_weight_what_it_says(prompt: str, weight: Any) -> None:
    meant = re.sub(r"([()\[\]\\])", r"\\\1", prompt)
    read = parse(meant)
    assert read.text == prompt and set(read.weights) <= {1.0}
    weighed = parse(f"a ({meant}:{weight}) b")
    assert weighed.text == f"a {prompt} b"
    assert list(weighed.weights) == [1.0] * 2 + [float(weight)] * len(prompt) + [1.0] * 2


@quick
@given(PROMPTS)
def test_words_are_all_of_the_prompt_but_its_blanks(prompt: str) -> None:
    words, at = split_words(prompt), 0
    for word in words:
        assert not prompt[at : word.start].strip() and word.text == prompt[word.start : word.end]
        assert word.text and not any(character.isspace() for character in word.text)
        at = word.end
    assert not prompt[at:].strip()


def _csv(prompts: list[str]) -> str:
    file = io.StringIO(newline="")
    csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["prompt", "number"], *([p, 1] for p in prompts)])
    return file.getvalue()


WRITERS: dict[str, Callable[[list[str]], str]] = {
    ".txt": "\n".join,
    ".csv": _csv,
    ".jsonl": lambda prompts: "\n".join(json.dumps({"number": 1, "prompt": p}) for p in prompts),
    ".json": json.dumps,
}


@pytest.mark.parametrize("kind", WRITERS)
@quick
@given(prompts=LINES)
def test_prompts_are_read_as_they_were_written(tmp_path: Path, kind: str, prompts: list[str]) -> None:
    path = tmp_path / f"prompts{kind}"
    path.write_text(WRITERS[kind](prompts), encoding="utf-8", newline="")
    assert read_prompts(path, [], None) == [prompt.strip() for prompt in prompts]


def _mutated(data: bytes, cuts: list[tuple[int, int, bytes]]) -> bytes:
    """At each place so many bytes are taken out and others put in."""
    for place, length, new in cuts:
        place %= len(data) + 1
        data = data[:place] + new + data[place + length :]
    return data


CUTS = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 40), st.binary(max_size=12)), min_size=1, max_size=3)


@pytest.mark.parametrize("kind", WRITERS)
@quick
@given(prompts=LINES, cuts=CUTS)
def test_broken_prompt_files_are_refused_on_one_line(
    tmp_path: Path, kind: str, prompts: list[str], cuts: list[Any]
) -> None:
    path = tmp_path / f"prompts{kind}"
    path.write_bytes(_mutated(WRITERS[kind](prompts).encode(), cuts))
    found, why = tried(InputError, lambda path: read_prompts(path, [], None), path)
    assert "\n" not in why and (why or found)
    assert why or all(prompt == prompt.strip() != "" for prompt in found)


# --------------------------------------------------------------------------------------- foreign files


@quick
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()), st.integers(0, 80))
def test_json_and_bytes_of_others_are_values_or_unreadable(tmp_path: Path, data: bytes, most: int) -> None:
    path = tmp_path / "foreign.json"
    path.write_bytes(data)
    tried(Unreadable, json_of, path)
    found, why = tried(Unreadable, lambda path: contents(path, most), path)
    assert bool(why) == (len(data) > most) and (why or found == data)


@quick
@given(st.text(max_size=900))
def test_what_was_said_takes_one_line(said: str) -> None:
    found = one_line(said)
    assert found and len(found) <= 300 and found.splitlines() == [found]


def _png() -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((16, 16)).convert("RGB").save(file, "PNG")
    return file.getvalue()


PNG = _png()


@quick
@given(CUTS)
def test_a_broken_image_is_an_image_or_unreadable(cuts: list[Any]) -> None:
    found, why = tried(Unreadable, open_image, _mutated(PNG, cuts))
    assert why or found.mode == "RGB"


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in (("a.png", PNG), ("a.txt", b"a red fox"), ("b.png", PNG), ("b.txt", b"a boat")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


TAR = _tar()


@quick
@given(CUTS)
def test_a_broken_tar_gives_records_or_is_unreadable(tmp_path: Path, cuts: list[Any]) -> None:
    path = tmp_path / "set.tar"
    path.write_bytes(_mutated(TAR, cuts))
    found, why = tried(ValueError, lambda path: list(open_source(path).records()), path)
    assert why or all(record.data or record.fault for record in found)


# ------------------------------------------------------------------------------------ infotext and page


def _values(known: Option) -> st.SearchStrategy[Any]:
    if known.choices:
        return st.sampled_from(known.choices)
    if known.kind is bool:
        return st.booleans()
    if known.kind is str:
        return st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
    low, high = (known.minimum or 0) + (LEAST_ABOVE if known.exclusive else 0), known.maximum
    if known.kind is int:
        return st.integers(int(low), int(high or 10**6))
    return st.floats(low, high, exclude_max=known.exclusive and high is not None, allow_nan=False, allow_infinity=False)


@quick
@given(st.fixed_dictionaries({known.name: _values(known) for known in controls.OPTIONS}))
def test_settings_are_pasted_back_as_they_were(chosen: dict[str, Any]) -> None:
    written = controls.as_infotext(controls.read([chosen]))
    assert written.isprintable() and written == written.strip()
    assert {name: controls.pasted({controls.INFOTEXT: written}, name) for name in chosen} == chosen


@quick
@given(st.text(max_size=60), st.sampled_from([known.name for known in controls.OPTIONS]))
def test_any_infotext_can_be_pasted(written: str, name: str) -> None:
    controls.pasted({controls.INFOTEXT: written}, name)


# -------------------------------------------------------------------------------------------- p-values

SCORES = st.lists(st.integers(0, 12).map(float), min_size=1, max_size=40)  # few values, so that many are equal


@quick
@given(SCORES, st.floats(0, 13), st.floats(0, 13))
def test_p_is_a_share_and_falls_with_the_score(nulls: list[float], one: float, other: float) -> None:
    low, high = (conformal_p(score, sorted(nulls)) for score in sorted((one, other)))
    assert 0 < high <= low <= 1
    assert low == (1 + sum(null >= min(one, other) for null in nulls)) / (len(nulls) + 1)


@quick
@given(SCORES)
def test_of_exchangeable_scores_at_most_alpha_have_such_a_p(scores: list[float]) -> None:
    """Any of them may be the prompt at hand: of n, at most k have p <= k / n, however many are equal."""
    p = [conformal_p(score, sorted(scores[:place] + scores[place + 1 :])) for place, score in enumerate(scores)]
    for k in range(1, len(scores) + 1):
        assert sum(value <= k / len(scores) + 1e-12 for value in p) <= k


SETTING = Setting(
    model="fox",
    prediction_type="epsilon",
    latent_shape=(4, 8, 8),
    steps=20,
    sigma=14.6,
    guidance_scale=7.5,
    baseline="empty prompt",
)


def _profile(values: list[list[float]]) -> Profile:
    return Profile(SETTING, tuple(Null("plain", {"first step": tuple(images)}) for images in values))


@st.composite
def _batches(draw: Any) -> list[list[float]]:
    images = draw(st.integers(2, 4))
    return draw(
        st.lists(st.lists(st.integers(0, 12).map(float), min_size=images, max_size=images), min_size=2, max_size=15)
    )


@quick
@given(_batches())
def test_of_exchangeable_batches_at_most_alpha_are_flagged(batches: list[list[float]]) -> None:
    """A batch is flagged where any of its images is: compared with batches of as many, that is one in 1 / alpha."""
    smallest = []
    for place, images in enumerate(batches):
        known = _profile(batches[:place] + batches[place + 1 :])
        smallest.append(min(known.p_value(score, SETTING, batch=len(images)).p for score in images))
    for k in range(1, len(batches) + 1):
        assert sum(p <= k / len(batches) + 1e-12 for p in smallest) <= k


@quick
@given(_batches(), st.integers(2, 20), st.floats(0, 13))
def test_more_images_than_the_nulls_have_count_as_often(nulls: list[list[float]], batch: int, score: float) -> None:
    at_once = min(batch, len(nulls[0]))
    highest = sorted(max(images[:at_once]) for images in nulls)
    found = _profile(nulls).p_value(score, SETTING, batch=batch)
    assert found.p == pytest.approx(min(1.0, math.ceil(batch / at_once) * conformal_p(score, highest)))


# ------------------------------------------------------------------------------- profiles and settings

NUMBERS = st.floats(0, 1e6).map(lambda value: float(f"{value:.9g}"))
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=10)
SETTINGS = st.builds(
    Setting,
    model=TEXTS,
    prediction_type=st.sampled_from(("epsilon", "v_prediction", "flow")),
    latent_shape=st.lists(st.integers(1, 128), min_size=2, max_size=4).map(tuple),
    steps=st.integers(1, 100),
    sigma=st.floats(0.1, 100),
    guidance_scale=st.floats(0, 30),
    baseline=st.sampled_from(("empty prompt", "negative prompt")),
    negative_prompt=TEXTS,
    sampler=TEXTS,
    patches=st.sampled_from(("", "clip skip 2", "text encoder unknown", "control net")),
)
PROFILES = st.builds(
    Profile,
    SETTINGS,
    st.lists(
        st.builds(
            Null,
            TEXTS,
            st.fixed_dictionaries({"first step": st.lists(NUMBERS, min_size=1, max_size=3).map(tuple)}),
        ),
        max_size=4,
    ).map(tuple),
    st.lists(st.builds(BandStep, NUMBERS, NUMBERS, NUMBERS, NUMBERS), max_size=2).map(tuple),
)


@quick
@given(PROFILES)
def test_profiles_are_read_as_they_were_saved(tmp_path: Path, profile: Profile) -> None:
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile


def _put(document: Any, path: list[int], value: Any) -> Any:
    """The document with another value at a place: each number picks one of the parts, the last part is replaced."""
    if not path or not isinstance(document, (dict, list)) or not document:
        return value
    keys = list(document) if isinstance(document, dict) else list(range(len(document)))
    key = keys[path[0] % len(keys)]
    changed = dict(document) if isinstance(document, dict) else list(document)
    changed[key] = _put(document[key], path[1:], value)
    return changed


@quick
@given(PROFILES, st.lists(st.integers(0, 20), max_size=5), JSON, CUTS)
def test_a_broken_profile_is_refused_with_a_sentence(
    tmp_path: Path, profile: Profile, path: list[int], value: Any, cuts: list[Any]
) -> None:
    file = tmp_path / "profile.json"
    profile.save(file)
    saved = file.read_bytes()
    for broken in (json.dumps(_put(json.loads(saved), path, value)).encode(), _mutated(saved, cuts)):
        file.write_bytes(broken)
        found, why = tried(ValueError, Profile.load, file)
        assert not why or str(file) in why
        values = [v for null in found.nulls for scores in null.scores.values() for v in scores] if found else []
        assert all(math.isfinite(v) for v in values)


@quick
@given(SETTINGS, SETTINGS, st.sampled_from([known.name for known in fields(Setting)]))
def test_settings_that_differ_in_anything_do_not_fit_either_way(one: Setting, other: Setting, name: str) -> None:
    assert one.mismatch(replace(one), "all steps") is None
    for kind in ("first step", "all steps"):
        assert (one.mismatch(other, kind) is None) == (other.mismatch(one, kind) is None)
    changed = replace(one, **{name: getattr(other, name)})
    before, after = (getattr(known, name) for known in (one, changed))
    if name == "negative_prompt":  # blanks are nothing to the tokenizers
        before, after = before.split(), after.split()
    if name == "patches":  # where one side does not know its text encoder, that part is left out
        assume(not any("unknown" in told for told in (before, after)))
    if name == "sigma":
        assume(before == after or not math.isclose(before, after, rel_tol=2e-3))
    why = one.mismatch(changed, "all steps")
    assert (why is None) == (before == after)
    assert why is None or name.replace("_", " ") in why
