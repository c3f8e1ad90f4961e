"""Mitigations on a denoiser whose every Adam step is known (see hand_made)."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from hand_made import LinearDenoiser, encoder, v_scale

from sd_dejavu import mitigations
from sd_dejavu.core.conditioning import Conditioning, EncoderInput, Reencoding, TokenRow
from sd_dejavu.core.denoiser import seeded_noise
from sd_dejavu.core.guidance import GuidedStep
from sd_dejavu.core.settings import options_of
from sd_dejavu.demo.reference import bundled_reference
from sd_dejavu.hosts.webui import controls
from sd_dejavu.mitigations import NEXT_RELEASE, Start, available, optimise_tokens, table
from sd_dejavu.mitigations.guard import Guard
from sd_dejavu.mitigations.optimise_conditioning import Settings, optimise
from sd_dejavu.mitigations.perturb_prompt import Perturbation, perturb
from sd_dejavu.mitigations.remove_trigger import Removed, remove_trigger
from sd_dejavu.mitigations.remove_trigger import Settings as RemoveSettings
from sd_dejavu.reference.features import Pixels
from sd_dejavu.run.monitoring import Monitoring

SIGMA = 2.0
TOKENS = (TokenRow("<s>", "start"), TokenRow("fox", "word", 0), TokenRow("</s>", "end"), TokenRow("pad", "end"))


def four_rows(value: float = 0.25, dtype: torch.dtype = torch.float32) -> Conditioning:
    """d = sum of rows = 4 * value in each of 4 numbers, so L = 2 * 4 * value."""
    return Conditioning(torch.full((1, 4, 4), value, dtype=dtype), tokens=TOKENS)


def optimised(denoiser, conditioning: Conditioning, target: float, images: int = 1, **settings):
    x, sigma = seeded_noise((1, 2, 2), 0, 1).repeat(images, 1, 1, 1), torch.full((images,), SIGMA)
    base = LinearDenoiser(prediction_type=denoiser.prediction_type)(x, sigma, Conditioning(torch.zeros(1, 1, 4)))
    return optimise(denoiser, x, sigma, conditioning, base, target, Settings(**settings))


# While d keeps its direction the gradient is constant, and Adam then moves every free number by exactly
# the learning rate: 3 free rows of weight 1 take 3 lr from each number of d, 6 lr from L.


@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_losses_fall_as_adam_moves_and_stop_at_the_target(prediction_type, images: int) -> None:
    k = v_scale(prediction_type, SIGMA)
    found = optimised(LinearDenoiser(prediction_type=prediction_type), four_rows(), 1.15 * k, images)
    # One norm over a batch of 4 equal images, as in the reference code, would be twice as large.
    assert found.losses == pytest.approx([k * v for v in (2.0, 1.7, 1.4, 1.1)], rel=1e-4)
    assert found.reached
    expected = torch.full((1, 4, 4), 0.25 - 3 * 0.05)
    expected[:, 0] = 0.25
    torch.testing.assert_close(found.conditioning.rows, expected, atol=1e-5, rtol=1e-4)
    # Three of four rows moved by .15 in each number of .25: sqrt(3 / 4) * .15 / .25.
    assert found.moved == pytest.approx(0.75**0.5 * 0.6, rel=1e-4)


def test_the_loss_is_the_mean_over_different_images() -> None:
    denoiser, x, sigma = LinearDenoiser(gain=0.5), seeded_noise((1, 2, 2), 0, 3), torch.full((3,), SIGMA)
    base = denoiser(x, sigma, Conditioning(torch.zeros(1, 4, 4)))
    found = optimise(denoiser, x, sigma, four_rows(), base, 1e-3, Settings(iterations=1))
    gains = [abs(1 + 0.5 * float(image.mean())) for image in x]
    assert found.losses[0] == pytest.approx(2 * sum(gains) / 3, rel=1e-4)


def test_a_conditioning_below_the_target_is_left_alone() -> None:
    denoiser = LinearDenoiser()
    found = optimised(denoiser, four_rows(), 2.5)
    assert found.losses == pytest.approx([2.0])
    assert found.moved == 0 and found.reached
    assert torch.equal(found.conditioning.rows, four_rows().rows)
    assert len(denoiser.calls) == 1


def test_iterations_count_updates() -> None:
    denoiser = LinearDenoiser()
    found = optimised(denoiser, four_rows(), 1e-6, iterations=4, learning_rate=0.01)
    assert found.losses == pytest.approx([2.0, 1.94, 1.88, 1.82, 1.76], rel=1e-4)
    assert not found.reached


def test_the_lowest_loss_is_returned_after_an_overshoot() -> None:
    # lr .2: d goes 1, .4, -.2. The gradient flips sign then, and the third step is (Kingma & Ba)
    # m = .1 * (.81 + .9 - 1) = .071, m / (1 - .9^3) = .26199, v / (1 - .999^3) = 1: d = -.2 - .6 * .26199.
    found = optimised(LinearDenoiser(), four_rows(), 1e-6, iterations=3, learning_rate=0.2)
    assert found.losses == pytest.approx([2.0, 0.8, 0.4, 2 * (0.2 + 0.6 * 0.071 / 0.271), 0.4], rel=1e-3)
    assert found.conditioning.rows[0, 1:].flatten().tolist() == pytest.approx([0.25 - 0.4] * 12, rel=1e-3)


def test_start_rows_stay_and_end_and_padding_rows_are_learned() -> None:
    chunks = (*TOKENS[:3], *TOKENS[:3])
    conditioning = Conditioning(torch.full((1, 6, 4), 0.25), tokens=chunks)
    moved = (optimised(LinearDenoiser(), conditioning, 1.0).conditioning.rows - 0.25).abs().amax(dim=(0, 2)) > 0.01
    assert moved.tolist() == [False, True, True, False, True, True]


def test_without_known_tokens_the_first_row_is_the_start() -> None:
    unknown = replace(four_rows(), tokens=())
    assert torch.equal(
        optimised(LinearDenoiser(), unknown, 1.0).conditioning.rows,
        optimised(LinearDenoiser(), four_rows(), 1.0).conditioning.rows,
    )


def test_the_model_is_called_once_an_iteration_and_never_without_the_prompt() -> None:
    denoiser = LinearDenoiser()
    found = optimised(denoiser, four_rows(), 1.15, images=2)
    assert len(denoiser.calls) == len(found.losses) == 4
    assert all(bool((c.rows[:, 0] == 0.25).all()) for _, c in denoiser.calls)  # the prompt's own start row


def test_half_precision_is_optimised_in_fp32_and_returned_as_it_came() -> None:
    # In half precision Adam's epsilon of 1e-8 is 0, and the start row's zero gradient gives 0 / 0.
    denoiser = LinearDenoiser()
    found = optimised(denoiser, four_rows(dtype=torch.float16), 1.15)
    assert found.conditioning.rows.dtype == torch.float16
    assert found.conditioning.rows.isfinite().all()
    assert found.losses == pytest.approx([2.0, 1.7, 1.4, 1.1], rel=1e-4)  # as in fp32
    assert {c.rows.dtype for _, c in denoiser.calls} == {torch.float32}


def test_prompt_and_extras_survive_and_the_way_back_does_not() -> None:
    extras = {"pooled": torch.ones(1, 2)}
    given = replace(encoder({"fox": 1.0})("red fox"), extras=extras)
    found = optimised(LinearDenoiser(), given, 1.0).conditioning
    assert (found.prompt, found.words, found.tokens, found.reencoding) == (
        given.prompt,
        given.words,
        given.tokens,
        None,
    )
    assert found.extras is extras
    assert not found.rows.requires_grad


def test_a_loss_that_is_not_finite_raises_with_its_iteration() -> None:
    class Breaks(LinearDenoiser):
        def __call__(self, x, sigma, conditioning):
            return super().__call__(x, sigma, conditioning) * (math.nan if len(self.calls) > 2 else 1)

    with pytest.raises(ValueError, match="loss became nan at iteration 2"):
        optimised(Breaks(), four_rows(), 0.1)
    with pytest.raises(ValueError, match="at iteration 0"):
        optimised(LinearDenoiser(), four_rows(math.nan), 0.1)


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan])
def test_the_target_must_be_positive(target: float) -> None:
    with pytest.raises(ValueError, match="target magnitude must be positive"):
        optimised(LinearDenoiser(), four_rows(), target)


# ------------------------------------------------------------------------- trigger removal

STRENGTHS = {"red": 0.5, "Zorblax": 3.0, "vase": 1.0, "a": 0.1}
PROMPT = "a red Zorblax vase"  # scores 2 * 4.6


def start(denoiser: LinearDenoiser, target: float, images: int = 2) -> Start:
    return Start.of(denoiser, seeded_noise((1, 2, 2), 0, images), SIGMA, encoder({})(""), target, seed=3)


def removed(target: float, max_words: int = 3, prompt: str = PROMPT, keep: float = 0.0) -> Removed:
    denoiser, encode = LinearDenoiser(), encoder(STRENGTHS)
    return remove_trigger(denoiser, encode, encode(prompt), start(denoiser, target), RemoveSettings(max_words, keep))


@pytest.mark.parametrize(
    ("target", "max_words", "words", "left"),
    [
        (9.5, 3, (), PROMPT),
        (3.3, 3, ("Zorblax",), "a red vase"),
        (1.5, 3, ("Zorblax", "vase"), "a red"),
        (1.5, 1, ("Zorblax",), "a red vase"),
        (0.01, 3, ("Zorblax", "vase", "red"), "a"),
        (0.01, 100, ("Zorblax", "vase", "red"), "a"),  # never the last word
    ],
)
def test_the_strongest_words_go_until_the_target_is_reached(target, max_words, words, left) -> None:
    found = removed(target, max_words)
    assert found.words == words
    assert found.conditioning.prompt == left
    remaining = [2 * sum(s for w, s in STRENGTHS.items() if w not in words[:n]) for n in range(len(words) + 1)]
    assert found.scores == pytest.approx(remaining, rel=1e-4)
    assert found.reached == (remaining[-1] <= target)


def test_a_prompt_is_never_emptied_down_to_its_separators() -> None:
    found = removed(0.01, prompt="Zorblax , -")
    assert (found.conditioning.prompt, found.words) == ("Zorblax , -", ())
    assert not found.reached


def test_only_one_of_two_equal_words_goes_at_a_time() -> None:
    found = removed(7.5, prompt="Zorblax red Zorblax")  # 2 * 6.5 before
    assert sorted(found.conditioning.prompt.split()) == ["Zorblax", "red"]
    assert found.scores == pytest.approx((13, 7), rel=1e-4)


@pytest.mark.parametrize(
    ("target", "prompt", "scores"),
    [
        (7.0, "a red (Zorblax:0.5) vase", (9.2, 6.2)),
        (5.5, "a red (Zorblax:0.5) (vase:0.5)", (9.2, 6.2, 5.2)),
        (0.1, "a (red:0.5) (Zorblax:0.5) (vase:0.5)", (9.2, 6.2, 5.2, 4.7)),  # never the last word
    ],
)
def test_words_that_keep_half_their_weight_lose_half_their_score_each_once(target, prompt, scores) -> None:
    # The empty prompt's rows are 0 here, so a row of weight 1/2 is half the row.
    found = removed(target, max_words=9, keep=0.5)
    assert found.conditioning.prompt == prompt
    assert found.scores == pytest.approx(scores, rel=1e-4)


def test_without_the_encoder_the_output_rows_decide() -> None:
    # Row weights by place: the third row (the second word) weighs most, whatever stands there.
    denoiser, encode = LinearDenoiser((1.0, 1.0, 5.0, 1.0, 1.0, 1.0)), encoder(STRENGTHS, reencodes=False)
    found = remove_trigger(denoiser, encode, encode(PROMPT), start(denoiser, 1e-3), RemoveSettings(2))
    assert found.words == ("red", "Zorblax")


# ------------------------------------------------------------------------- perturbations


@pytest.mark.parametrize("kind", ["random-word", "random-number", "repeat-word"])
def test_a_perturbed_prompt_holds_its_words_in_order_and_the_insertions(kind) -> None:
    words = ["An", "old", "River,", "bank"]
    made = set()
    for seed in range(20):
        new = perturb(" ".join(words), kind, 4, seed)
        assert new == perturb(" ".join(words), kind, 4, seed)
        assert len(new.split()) == 8
        rest = iter(new.split())
        assert all(word in rest for word in words)  # a subsequence
        added = list(new.split())
        for word in words:
            added.remove(word)
        if kind == "random-number":
            assert all(0 <= int(piece) <= 1_000_000 for piece in added)
        elif kind == "repeat-word":
            assert set(added) <= set(words)
        else:
            assert all(piece.isalpha() and piece.islower() for piece in added)
        made.add(new)
    assert len(made) > 10  # seeds differ


def test_perturbed_prompts_are_those_of_release_0_1() -> None:
    """SHA-256 of 300 of them, before the words were a data file."""
    found = [perturb("a red fox", kind, 8, seed) for seed in range(100) for kind in get_args(Perturbation)]
    digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()
    assert digest == "4504f661149af94fecf78f57f52eb648e43377f56f2fa589ffc357b94c455df6"


def test_no_insertions_change_nothing() -> None:
    assert perturb("An old River", "random-word", 0) == "An old River"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("a fox", "shuffle"), "'shuffle' is unknown: use one of random-word, random-number, repeat-word"),
        (("a fox", "random-word", -1), "not 'a fox' and -1"),
        ((" ", "random-word"), "a prompt with words"),
    ],
)
def test_impossible_perturbations_are_refused(arguments, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        perturb(*arguments)


# ------------------------------------------------------------- through the encoder's input


def test_token_embeddings_move_by_the_learning_rate_times_their_size() -> None:
    denoiser, encode = LinearDenoiser(), encoder(STRENGTHS)
    begin = start(denoiser, 7.4)
    found = optimise_tokens.optimise(denoiser, begin.x, begin.sigma, encode(PROMPT), begin.base, begin.target)
    # Embeddings of size 1, all gradients of one sign: Adam takes 0.1 from each number, so L falls by 9.2 / 10.
    assert found.losses == pytest.approx((9.2, 8.28, 7.36), rel=1e-4)
    assert found.reached
    assert float(begin.score(denoiser, found.conditioning)) == pytest.approx(7.36, rel=1e-4)
    assert found.moved == pytest.approx(0.2, rel=1e-4)
    assert found.conditioning.prompt == PROMPT and found.conditioning.reencoding is None


def test_the_start_token_keeps_its_embedding() -> None:
    embeddings = torch.full((4, 4), 2.0)
    way = Reencoding((EncoderInput(embeddings, TOKENS),), lambda given: (given[0][None], {"pooled": given[0][:1]}))
    given = replace(four_rows(2.0), extras={"pooled": embeddings[:1]}, reencoding=way)
    denoiser = LinearDenoiser()
    begin = start(denoiser, 1.0)
    settings = Settings(iterations=1, learning_rate=0.05)
    found = optimise_tokens.optimise(denoiser, begin.x, begin.sigma, given, begin.base, begin.target, settings)
    # Size 2: a step of 0.05 * 2 on three of four rows of weight 1; L = 2 * (sum of the rows).
    assert found.losses == pytest.approx((16.0, 15.4), rel=1e-4)
    torch.testing.assert_close(found.conditioning.rows[0, 0], torch.full((4,), 2.0))
    torch.testing.assert_close(found.conditioning.rows[0, 1:], torch.full((3, 4), 1.9), atol=1e-5, rtol=1e-4)
    assert not found.conditioning.rows.requires_grad
    assert not found.conditioning.extras["pooled"].requires_grad


def test_without_its_encoder_a_conditioning_is_refused() -> None:
    denoiser = LinearDenoiser()
    begin = start(denoiser, 1.0)
    with pytest.raises(ValueError, match="use optimise-conditioning"):
        optimise_tokens.optimise(denoiser, begin.x, begin.sigma, four_rows(), begin.base, begin.target)


# ------------------------------------------------------------------------- the register


def test_the_methods_of_release_0_1_come_first_in_its_order() -> None:
    assert list(available())[:12] == [
        "amg",
        "attenuate-tokens",
        "batch-wise-noise",
        "guidance-transition",
        "optimise-conditioning",
        "optimise-tokens",
        "per-sample-noise",
        "random-word",
        "random-number",
        "repeat-word",
        "remove-trigger",
        "start-token",
    ]


def test_saved_files_find_their_values_where_they_were() -> None:
    """Workflows hold widgets, and API clients arguments, by place: what release 0.1 had stays first, in its order."""

    def widgets(*touches: str) -> list[str]:
        classes = dict.fromkeys(m.settings for m in available().values() if m.touches in touches)
        return [known.name for settings in classes for known in options_of(settings)]

    monitor = ["without", "when_flagged", "remedy", "explain", "score", "alpha"]
    assert [known.id for known in options_of(Monitoring)][:6] == monitor
    assert [known.id for known in controls.OPTIONS][:9] == [*monitor, "perturb", "insertions", "references"]
    conditioning = ["attenuation", "outlier_deviations", "iterations", "learning_rate", "checkpointing", "insertions"]
    conditioning += ["max_words", "keep", "start_factor", "mask_padding"]
    assert widgets("prompt", "conditioning", "attention")[:10] == conditioning
    noise = ["noise_rounds", "noise_strength", "noise_radius", "guidance_from", "noise_iterations", "noise_rate"]
    assert widgets("noise")[:6] == noise


def test_a_new_method_stands_behind_the_older_ones(tmp_path, monkeypatch) -> None:
    (tmp_path / "aardvark.py").write_text(
        "from sd_dejavu.mitigations import Mitigation\n"
        "from sd_dejavu.mitigations.start_token import Settings\n"
        "MITIGATIONS = (Mitigation('aardvark', 'a new one', 'attention', 'nothing', Settings, print),)\n"
    )
    before = list(available())
    monkeypatch.setattr(mitigations, "__path__", [*mitigations.__path__, str(tmp_path)])
    try:
        assert list(available()) == [*before, "aardvark"]
    finally:
        sys.modules.pop("sd_dejavu.mitigations.aardvark", None)
        vars(mitigations).pop("aardvark", None)


@pytest.mark.parametrize("name", list(available()))
def test_outcomes_report_the_scores_that_measuring_again_gives(name: str) -> None:
    model, method = LinearDenoiser(), available()[name]
    model.encode = encoder(STRENGTHS)
    guard = Guard(Pixels(2), bundled_reference(Pixels(2)), ["a caption"] * 200)
    given, begin = model.encode(PROMPT), replace(start(model, 3.3), guard=guard)
    outcome = method.apply(model, given, begin, method.settings())
    unconditional = sum(size for size, c in model.calls if c.prompt == "")
    if method.touches != "noise":
        assert unconditional == 2  # the unconditional prediction, once for each of 2 noises
    assert outcome.score_before == pytest.approx(9.2, rel=1e-4)
    moved = begin if outcome.x is None else begin.moved(LinearDenoiser(), outcome.x)
    assert outcome.score_after == pytest.approx(moved.score(LinearDenoiser(), outcome.conditioning), rel=1e-4)
    assert (outcome.conditioning.prompt != PROMPT) == (method.touches == "prompt")
    assert (outcome.x is not None) == (method.touches == "noise")
    assert (outcome.attention is not None) == (method.touches == "attention")
    if method.touches == "guidance":
        assert outcome.rule is not None and outcome.rule() is not outcome.rule()  # a fresh one for each run
        assert torch.equal(outcome.conditioning.rows, given.rows)
    if name in ("optimise-conditioning", "optimise-tokens", "remove-trigger"):
        assert outcome.details["reached"] == (outcome.score_after <= 3.3)
        assert model.differentiable_opened == 1


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_a_start_scores_the_highest_magnitude_at_the_first_step(prediction_type) -> None:
    model, encode = LinearDenoiser(prediction_type=prediction_type, gain=0.5), encoder(STRENGTHS)
    begin = start(model, 1.0, images=3)
    stretch = 1 if prediction_type == "flow" else (1 + SIGMA**2) ** 0.5
    means = [stretch * float(image.mean()) for image in seeded_noise((1, 2, 2), 0, 3)]
    expected = v_scale(prediction_type, SIGMA) * max(9.2 * abs(1 + 0.5 * m) for m in means)
    assert begin.score(model, encode(PROMPT)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "name", ["attenuate-tokens", "batch-wise-noise", "guidance-transition", "per-sample-noise", "start-token"]
)
def test_an_ordinary_prompt_is_left_alone(name: str) -> None:
    model, method = LinearDenoiser(), available()[name]
    given = encoder(STRENGTHS)(PROMPT)
    outcome = method.apply(model, given, start(model, 9.3), method.settings())  # it scores 9.2
    assert outcome.conditioning is given
    assert (outcome.x, outcome.rule, outcome.attention) == (None, None, None)
    assert outcome.score_after == outcome.score_before == pytest.approx(9.2, rel=1e-4)


@pytest.mark.parametrize("name", [n for n in available() if n != "amg" and n not in get_args(Perturbation)])
def test_one_image_among_ordinary_ones_is_changed_and_counts(name: str) -> None:
    """Eight images that score 9.2 and seven times 0.92: their mean, 1.96, is below the target of 3.3."""
    model, method = LinearDenoiser(gain=1.0), available()[name]
    model.encode = encoder(STRENGTHS)
    place, level = 5, torch.full((8, 1, 1, 1), -0.9)
    level[place] = 0.0  # 1 + gain * mean is the factor
    stretch = (1 + SIGMA**2) ** 0.5
    begin = Start.of(model, (level / stretch).expand(8, 1, 2, 2).clone(), SIGMA, encoder({})(""), 3.3, seed=3)
    given = model.encode(PROMPT)
    expected = torch.full((8,), 0.92)
    expected[place] = 9.2
    torch.testing.assert_close(begin.scores(model, given), expected, atol=1e-4, rtol=1e-4)
    outcome = method.apply(model, given, begin, method.settings())
    assert outcome.score_before == pytest.approx(9.2, rel=1e-4)
    x = begin.x if outcome.x is None else outcome.x
    moved = begin if outcome.x is None else begin.moved(model, x)
    after = moved.scores(model, outcome.conditioning)
    assert outcome.score_after == pytest.approx(float(after.max()), rel=1e-4)
    if "reached" in outcome.details:
        assert outcome.details["reached"] == bool((after <= 3.3).all())
    others = [n for n in range(8) if n != place]
    assert torch.equal(x[others], begin.x[others])
    assert (method.touches == "noise") == (not torch.equal(x[place], begin.x[place]))
    if outcome.rule is not None:
        both = (torch.rand(8, 1, 2, 2, generator=torch.manual_seed(n)) for n in range(2))
        step = GuidedStep(x, begin.sigma, *both, 7.0, 0, model)
        found = outcome.rule()(step)
        assert torch.equal(found[others], step.plain[others])
        assert name != "guidance-transition" or torch.equal(found[place], step.unconditional[place])
    elif method.touches in ("prompt", "conditioning"):
        assert outcome.score_after <= 3.3


def test_methods_that_lack_what_they_need_say_so() -> None:
    model, given = LinearDenoiser(), encoder(STRENGTHS)(PROMPT)
    begin = start(model, 1.0)
    with pytest.raises(ValueError, match="name a reference set"):
        available()["amg"].apply(model, given, begin, available()["amg"].settings())
    for name in ("batch-wise-noise", "per-sample-noise"):
        with pytest.raises(ValueError, match="conditioning without the prompt is not at hand"):
            available()[name].apply(model, given, replace(begin, unconditional=None), available()[name].settings())


# ----------------------------------------------------------------- which models they are made for

KINDS = ("epsilon", "v_prediction", "flow")
REFUSED = {("guidance-transition", "flow"), ("guidance-transition", "distilled"), ("batch-wise-noise", "distilled")}


def test_the_documented_table_is_what_the_methods_declare() -> None:
    page = (Path(__file__).parents[2] / "docs" / "mitigations.md").read_text(encoding="utf-8")
    assert table() in page
    header, _, *lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table().splitlines()]
    assert header[1:5] == ["epsilon", "v-prediction", "flow", "distilled (guidance scale 1)"]
    assert [line[0] for line in lines] == [name for name, m in available().items() if m.release != NEXT_RELEASE]
    for name, *cells in lines:
        refused = [(name, kind) in REFUSED for kind in (*KINDS, "distilled")]
        assert [cell == "refused" for cell in cells[:4]] == refused
        assert not any(refused[:3]) or cells[4]  # a reason


@pytest.mark.parametrize("kind", [*KINDS, "distilled"])
@pytest.mark.parametrize("name", list(available()))
def test_a_method_is_right_on_a_kind_of_model_or_refuses_it(name: str, kind: str) -> None:
    """Right: both scores are k || sum_n f_n r_n || over the rows it goes on with (see hand_made)."""
    prediction_type = "epsilon" if kind == "distilled" else kind
    model, method = LinearDenoiser(prediction_type=prediction_type), available()[name]
    model.encode = encoder(STRENGTHS)
    k = v_scale(prediction_type, SIGMA)
    guard = Guard(Pixels(2), bundled_reference(Pixels(2)), ["a caption"] * 200)
    begin = replace(start(model, 3.3 * k), guard=guard, guided=kind != "distilled")
    if (name, kind) in REFUSED:
        with pytest.raises(ValueError, match=f"{name} .*choose another method"):
            method.apply(model, model.encode(PROMPT), begin, method.settings())
        return
    outcome = method.apply(model, model.encode(PROMPT), begin, method.settings())
    assert outcome.score_before == pytest.approx(9.2 * k, rel=1e-4)
    rows, rule = outcome.conditioning.rows[0], outcome.attention
    left = rows if rule is None else rows * (rule.factors * rule.keep)[:, None]
    assert outcome.score_after == pytest.approx(k * float(left.sum(0).norm()), rel=1e-4)
    if name in ("optimise-conditioning", "optimise-tokens", "remove-trigger"):
        assert outcome.score_after <= 3.3 * k
