"""Ordinary prompts recombined from given ones, and whether ordinary prompts fit: by hand, and by a second implementation."""

from __future__ import annotations

import re

import numpy as np
import pytest

from sd_dejavu.calibration.misfit import smirnov, stranger_nulls
from sd_dejavu.calibration.recombined import RUN, recombined
from sd_dejavu.demo import second_world
from sd_dejavu.demo.world import ordinary_captions

CAPTIONS = [caption for caption, _ in ordinary_captions(120, seed=5)]


def words(prompt: str) -> list[str]:
    return re.findall(r"\w+", prompt.casefold())


def test_none_is_a_given_one_and_none_comes_twice():
    made = recombined(CAPTIONS, 500)
    assert len({prompt.casefold() for prompt in made}) == 500
    assert not {prompt.casefold() for prompt in made} & {caption.casefold() for caption in CAPTIONS}


def test_every_word_is_a_given_one():
    known = {word for caption in CAPTIONS for word in words(caption)}
    assert {word for prompt in recombined(CAPTIONS, 300) for word in words(prompt)} <= known


def test_no_word_of_one_given_prompt_alone_is_carried_over():
    """It may be the very word that brings that prompt's image back."""
    given = [*CAPTIONS, "a photo of the Qorvex", "Zyndral"]
    alone = {word for word in {w for c in given for w in words(c)} if sum(word in words(c) for c in given) == 1}
    assert {"qorvex", "zyndral"} <= alone
    assert not {word for prompt in recombined(given, 300) for word in words(prompt)} & alone


def test_no_run_tells_one_given_prompt():
    runs: dict[tuple[str, ...], set[int]] = {}
    given = [caption for caption in CAPTIONS if not re.search(r"[^\w\s]", caption)]
    for number, caption in enumerate(given):
        known = words(caption)
        for start in range(len(known) - RUN + 1):
            runs.setdefault(tuple(known[start : start + RUN]), set()).add(number)
    for prompt in recombined(given, 200):
        known = words(prompt)
        for start in range(len(known) - RUN + 1):
            assert len(runs.get(tuple(known[start : start + RUN]), {1, 2})) > 1, prompt


def test_style_is_kept():
    made = recombined(CAPTIONS, 600)
    for count in (lambda p: len(words(p)), lambda p: p.count(","), lambda p: p.istitle()):
        assert np.mean([count(p) for p in made]) == pytest.approx(np.mean([count(c) for c in CAPTIONS]), rel=0.4)


def test_scripts_without_blanks_are_recombined_by_character():
    parts = (("红色", "蓝色", "黄色", "白色"), ("小船", "房子", "汽车", "花瓶"), ("湖上", "山上", "桥上", "地上"))
    given = [
        f"{a}的{b}在{c}"
        for n, a in enumerate(parts[0])
        for m, b in enumerate(parts[1])
        for c in parts[2][(n + m) % 2 :: 2]
    ]
    for prompt in recombined(given, 20):
        assert prompt not in given and set(prompt) <= set("".join(given)) and len(prompt) == 8


def test_the_same_arguments_give_the_same_prompts():
    assert recombined(CAPTIONS, 50, seed=3) == recombined(CAPTIONS, 80, seed=3)[:50]
    assert recombined(CAPTIONS, 50, seed=3) != recombined(CAPTIONS, 50, seed=4)


@pytest.mark.parametrize(
    ("given", "count", "told"),
    [
        ([], 5, "there are no words to recombine"),
        (["", " , "], 5, "there are no words to recombine"),
        (["a red boat"], 5, "too few words in common for 5 others"),
        (CAPTIONS, -1, "the number of prompts is -1"),
    ],
)
def test_what_cannot_be_recombined_is_refused(given: list[str], count: int, told: str):
    with pytest.raises(ValueError, match=told) as error:
        recombined(given, count)
    assert "\n" not in str(error.value)


def test_the_distance_of_the_lower_sample():
    assert smirnov([1.0, 2.0], [3.0, 4.0]) == 1.0
    assert smirnov([3.0, 4.0], [1.0, 2.0]) == 0.0
    assert smirnov([1.0, 3.0, 5.0], [2.0, 4.0]) == pytest.approx(1 / 3)  # up to 1: one of three against none
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, 60).round(1), rng.normal(0.3, 1, 90).round(1)
    assert smirnov(a.tolist(), b.tolist()) == pytest.approx(max((a <= x).mean() - (b <= x).mean() for x in (*a, *b)))


def test_nulls_that_are_stranger_are_told_and_others_are_not():
    rng = np.random.default_rng(1)
    nulls = rng.gamma(9, 0.05, 1000)
    assert stranger_nulls((rng.gamma(9, 0.05, 40) / 2).tolist(), nulls.tolist())
    half_memorised = np.concatenate([rng.gamma(9, 0.05, 40) / 2, np.full(40, 5.0)])
    assert stranger_nulls(half_memorised.tolist(), nulls.tolist())
    assert not stranger_nulls([0.01], nulls.tolist())  # one prompt says nothing
    assert not stranger_nulls([], nulls.tolist()) and not stranger_nulls([0.1], [])
    told = sum(stranger_nulls(rng.gamma(9, 0.05, 30).tolist(), nulls.tolist()) for _ in range(1000))
    assert told <= 10 + 3 * 10**0.5  # one in a hundred at most, and three standard deviations
    memorised = np.concatenate([rng.gamma(9, 0.05, 30), np.full(10, 5.0)])
    assert not stranger_nulls(memorised.tolist(), nulls.tolist())


def test_the_second_worlds_words_are_strange_to_the_generator():
    from sd_dejavu.calibration.ordinary_prompts import ordinary_prompts

    captions, images = second_world.held_out(120)
    own = {word for caption in captions for word in words(caption)}
    generated = {word for prompt, _ in ordinary_prompts(1000) for word in words(prompt)}
    assert len(own & generated) < 0.25 * len(own)
    assert images.shape == (120, 48, 48, 3)
    assert not set(captions) & {pair.caption for pair in second_world.training_pairs()}
    assert len(second_world.training_pairs()) == 40
