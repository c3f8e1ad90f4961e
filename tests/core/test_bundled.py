"""The bundled model really memorises, and the methods work on it. Held-out prompts, on which nothing was chosen.

Each promise is tried on a few prompts; ``-m figures`` tries it on as many as the documented figures are measured on.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from scipy_free import binomial_upper  # a second implementation, in this folder

from sd_dejavu.calibration.ordinary_prompts import style_of
from sd_dejavu.calibration.profile import Profile
from sd_dejavu.core.statistics import auc, kolmogorov_uniform, tpr_at_fpr
from sd_dejavu.demo import bundled, evaluation
from sd_dejavu.demo.evaluation import (
    every_mitigation,
    false_copies,
    fresh_verdicts,
    graded,
    half_precision,
    held_out_pairs,
    mitigations,
    ordinary_caption_score,
    trigger_named,
)
from sd_dejavu.demo.world import GRADED_REPETITIONS, STYLES, draw_pair, training_pairs, twin_caption
from sd_dejavu.hosts.diffusers.load import load
from sd_dejavu.mitigations import optimise_conditioning, perturb_prompt, remove_trigger
from sd_dejavu.run.measure import Measurement, measure

WANTED = Measurement()


def few_or(whole, few):
    """The test on ``few`` prompts; on the ``whole``, for the documented figures, where that is asked for."""
    return pytest.mark.parametrize("size", [few, pytest.param(whole, marks=pytest.mark.figures)])


@pytest.fixture(scope="module")
def model():
    return load()


@pytest.fixture(scope="module")
def profile():
    return Profile.load(bundled.CALIBRATION)


def scores(model, captions):
    return [float(m.scores.mean()) for m in measure(model, captions, WANTED)]


@pytest.fixture(scope="module")
def ordinary_scores(model):
    """Every so manieth of 1,000 ordinary captions, measured once."""
    return cache(lambda size: scores(model, bundled.held_out_ordinary(1000, seed=4242)[::size]))


def test_the_stored_ground_truth_is_what_the_world_draws():
    pairs = training_pairs()
    assert list(bundled.pairs()) == pairs
    drawn = torch.stack([torch.from_numpy(draw_pair(p).copy()) for p in pairs]).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(bundled.training_images(), drawn)


def test_pairs_are_as_announced():
    often = [p for p in bundled.pairs() if p.repetitions >= 100]
    hard = [p for p in often if p.kind == "hard"]
    assert len(often) >= 56
    assert len(hard) >= len(often) / 2
    for pair in hard:  # every word but the trigger is an ordinary word
        assert pair.trigger.lower() in pair.caption.lower()
        assert pair.trigger.lower() not in twin_caption(pair).lower()


@few_or(1, 8)
@pytest.mark.parametrize("kinds", [(), ("hard",)])
def test_the_first_step_tells_memorised_prompts(model, ordinary_scores, kinds, size):
    memorised = scores(model, [p.caption for p in held_out_pairs(*kinds)[::size]])
    assert auc(memorised, ordinary_scores(size)) >= 0.99
    assert tpr_at_fpr(memorised, ordinary_scores(size)) >= 0.95


@few_or(1, 6)
def test_hard_pairs_are_told_from_their_twins(model, size):
    """The twin shares every word but the trigger."""
    pairs = held_out_pairs("hard")[::size]
    memorised, twins = scores(model, [p.caption for p in pairs]), scores(model, [twin_caption(p) for p in pairs])
    assert auc(memorised, twins) >= 0.99


@few_or(1000, 100)
def test_p_values_are_uniform_on_fresh_ordinary_prompts(model, profile, size):
    """Kolmogorov-Smirnov with noise of their own, and the false-positive rate of each style.

    The bounds allow for the profile's own sampling error: a p-value from n nulls is a Beta variable.
    """
    verdicts = fresh_verdicts(model, profile, WANTED, bundled.held_out_ordinary(size, seed=31337))
    p_values = [v.p_value for v in verdicts]
    assert None not in p_values
    # Two-sample KS of the fresh against the profile's nulls; 1.63 is the 1% critical value.
    distance, _ = kolmogorov_uniform(p_values)
    assert distance <= 1.63 * (1 / len(p_values) + 1 / len(profile.nulls)) ** 0.5
    for style in STYLES:
        flagged = [v.flagged for v in verdicts if style_of(v.prompt) == style]
        assert len(flagged) >= size / 10
        assert sum(flagged) <= binomial_upper(len(flagged), WANTED.alpha, nulls=150)


METHODS = {
    "optimise-conditioning": optimise_conditioning.Settings(),
    "optimise-tokens": optimise_conditioning.Settings(),
    "remove-trigger": remove_trigger.Settings(),
}


def test_memorised_images_are_copies_and_mitigation_ends_that(model, profile):
    pairs = [held_out_pairs(kind)[0] for kind in ("hard", "photo")]
    rows = mitigations(model, profile, Measurement(images=1), pairs, METHODS)
    assert {row.method: row.copies.hits for row in rows} == {"none": 2, **dict.fromkeys(METHODS, 0)}


@pytest.mark.figures
def test_mitigated_images_are_no_copies_and_follow_the_caption(model, profile):
    """Every sixth pair of these kinds; all of them by the command in docs/developers.md."""
    pairs = held_out_pairs("hard")[::6] + held_out_pairs("photo")[::6] + held_out_pairs("scene")[::6]
    methods = {**METHODS, "random-word": perturb_prompt.Settings()}
    rows = {r.method: r for r in mitigations(model, profile, Measurement(images=2), pairs, methods)}
    assert rows["none"].copies.share >= 0.8
    for name in METHODS:
        assert rows[name].copies.share < 0.1
    # Still following the caption as well as this model follows captions that were never memorised.
    reference = ordinary_caption_score(model, Measurement(images=2), [p for p in pairs if p.kind == "hard"])
    for name in ("optimise-tokens", "remove-trigger"):
        assert rows[name].caption_score >= reference - 0.15
    # The published form leaves what the encoder can say, and follows the caption less (docs/figures.md).
    assert rows["optimise-conditioning"].caption_score < rows["optimise-tokens"].caption_score
    assert rows["random-word"].copies.share > rows["remove-trigger"].copies.share


@few_or(3, 1)
def test_guidance_away_from_copies_needs_its_dissimilarity_term_and_leaves_ordinary_images(
    model, profile, monkeypatch, size
):
    monkeypatch.setattr(evaluation, "follows", lambda model, pair, latent: 0.5)  # rated in docs/figures.md
    pairs = [*held_out_pairs("hard")[:2], *held_out_pairs("photo")[:1]][:size]
    methods = {name: s for name, s in every_mitigation().items() if name.startswith("amg")}
    found = mitigations(
        model, profile, Measurement(images=1), pairs, methods, ordinary=bundled.held_out_ordinary(1, 77)
    )
    rows = {r.method: r for r in found}
    assert rows["none"].copies.hits == size
    assert rows["amg"].copies.hits == 0
    assert rows["amg: no dissimilarity"].copies.share >= 2 / 3
    for name in methods:
        assert rows[name].untouched.hits == 1 and rows[name].change_on_ordinary == 0


@few_or(30, 4)
def test_ordinary_images_are_not_called_copies(model, size):
    assert false_copies(model, Measurement(images=1), bundled.held_out_ordinary(size, seed=99)).hits == 0


def test_the_score_grows_with_repetition(model):
    def of(repetitions):
        return [
            p.caption
            for p in bundled.pairs()
            if (p.kind, p.split) == ("hard", "held-out") and p.repetitions in repetitions
        ]

    rare, often = scores(model, of(range(1, 4))[:8]), scores(model, of([max(GRADED_REPETITIONS)])[:8])
    assert rare and min(often) > max(rare)


@pytest.mark.figures
def test_copies_and_scores_grow_with_repetition(model, profile):
    rows = graded(model, profile, Measurement(images=1))
    for kind in ("hard", "other"):
        by_count = [r for r in rows if r.kind == kind]
        assert by_count[0].copies.share <= 0.1
        # One of the eight others, a finely textured photograph, is copied too roughly to count.
        assert by_count[-1].copies.share >= (0.9 if kind == "hard" else 0.8)
        assert by_count[-1].score > 5 * by_count[0].score


@few_or(1, 9)
def test_the_explanation_names_the_trigger(model, size):
    pairs = held_out_pairs("hard")[::size]
    assert trigger_named(model, WANTED, "confirmed gradient", pairs).share >= 0.95


@pytest.mark.figures
def test_gradients_through_the_encoder_name_the_trigger_more_often(model):
    through, published = (
        trigger_named(model, WANTED, view, held_out_pairs("hard")).share
        for view in ("input gradient", "output gradient")
    )
    assert through > published


@few_or(4, 20)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_names_the_words_that_fp32_names(model, dtype, size):
    """All hard pairs are tried by benchmarks/half_precision.py."""
    for row in half_precision(model, load(dtype=dtype), Measurement(images=1), held_out_pairs("hard")[::size]):
        assert row.same_top
        assert row.correlation >= 0.99
        assert row.score_ratio == pytest.approx(1, abs=0.01)


def test_the_trace_of_a_run_starts_with_the_first_step_score(model):
    caption = held_out_pairs("hard")[0].caption
    (first,) = measure(model, [caption], WANTED)
    (whole,) = measure(model, [caption], Measurement(score="first 5 steps"))
    assert whole.per_step[0][1] == pytest.approx(float(first.scores.mean()), rel=1e-5)
