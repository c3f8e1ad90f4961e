"""The trace: readings by hand, and what must be 'not measured' instead of a score."""

from __future__ import annotations

import math

import pytest
import torch

from sd_dejavu.core.denoiser import Predictions
from sd_dejavu.core.trace import NotMeasured, Trace

SHAPE = (2, 3, 3)


def step(norms: list[float], sigma: float = 2.0, baseline="empty prompt") -> Predictions:
    """Predictions whose image i has the magnitude ``norms[i]``: all of the difference in one element."""
    conditional = torch.zeros(len(norms), *SHAPE)
    conditional[:, 1, 2, 0] = torch.tensor(norms) * sigma
    return Predictions(conditional, torch.zeros_like(conditional), torch.full((len(norms),), sigma), baseline)


def traced(*steps: Predictions) -> Trace:
    trace = Trace()
    for one in steps:
        trace.record(one)
    return trace


def test_scores_average_the_asked_evaluations_for_each_image() -> None:
    trace = traced(step([3.0, 1.0], 4.0), step([5.0, 2.0], 2.0), step([10.0, 6.0], 1.0))
    assert trace.score().tolist() == pytest.approx([3, 1])
    assert trace.score(2).tolist() == pytest.approx([4, 1.5])
    assert trace.score(None).tolist() == pytest.approx([6, 3])
    assert [r.sigma for r in trace.readings] == [4, 2, 1]


@pytest.mark.parametrize("first", [1, 2, None])
def test_too_few_evaluations_are_not_a_score(first) -> None:
    with pytest.raises(NotMeasured, match=f"0 evaluations were seen, {first or 'at least 1'} are needed"):
        Trace().score(first)
    if first == 2:
        with pytest.raises(NotMeasured, match="1 evaluations were seen, 2 are needed"):
            traced(step([1.0])).score(2)


@pytest.mark.parametrize(
    ("norms", "reason"),
    [
        ([3.0, 0.0], "guidance was skipped"),
        ([3.0, 4e-5], "guidance was skipped"),  # 18 elements: up to 1e-5 * 18 ** .5 = 4.24e-5 it is rounding
        ([math.nan, 3.0], "not finite"),
        ([math.inf, 0.0], "not finite"),
    ],
)
def test_false_zeros_and_nan_are_not_measured(norms: list[float], reason: str) -> None:
    trace = traced(step([3.0, 3.0], 4.0), step(norms, 2.0), step([1.0, 1.0], 1.0))
    assert [r.values for r in trace.readings] == [(3, 3), None, (1, 1)]
    assert reason in (trace.readings[1].why or "")
    assert trace.score(1).tolist() == [3, 3]  # the first evaluation is whole
    for first in (2, None):
        with pytest.raises(NotMeasured, match=rf"evaluation 2 \(sigma 2\) was not measured: .*{reason}"):
            trace.score(first)


def test_a_skipped_evaluation_keeps_its_place_and_its_reason() -> None:
    trace = traced(step([3.0], 4.0))
    assert [r.values for r in trace.readings] == [(3,)]
    trace.skip(torch.tensor(2.0), "guidance scale 1")  # after a first look
    trace.record(step([1.0], 1.0))
    assert [r.values for r in trace.readings] == [(3,), None, (1,)]
    with pytest.raises(NotMeasured, match=r"evaluation 2 .*guidance scale 1"):
        trace.score(None)


def test_steps_measured_against_something_else_do_not_mix() -> None:
    trace = traced(step([3.0], 4.0), step([9.0], 2.0, "negative prompt"), step([1.0], 1.0))
    assert trace.baseline == "empty prompt"
    assert [r.values for r in trace.readings] == [(3,), None, (1,)]
    assert trace.readings[1].why == "this step was measured against the negative prompt"


def test_the_map_shows_where_the_last_evaluation_acted() -> None:
    expected = torch.zeros(1, 3, 3)
    expected[0, 2, 0] = 5**2 / 2  # one of two channels
    assert torch.allclose(traced(step([3.0], 4.0), step([5.0], 2.0)).where(), expected)
    with pytest.raises(NotMeasured, match="no guidance step"):
        Trace().where()


def test_recording_keeps_no_gradient_graph() -> None:
    one = step([3.0])
    one.conditional.requires_grad_(True)
    trace = traced(one)
    trace.skip(one.conditional.sum(), "guidance was off")
    parts = [vars(part) for part in (trace._map, *trace._evaluations)]
    held = [value for part in parts for value in (*part.values(), *part.get("_read", {}).values())]
    tensors = [value for value in held if isinstance(value, torch.Tensor)]
    assert len(tensors) == 4 and not any(value.requires_grad for value in tensors)
    assert not trace.where().requires_grad


def test_at_pure_noise_what_counts_as_rounding_is_smaller() -> None:
    """Zero terminal SNR: v-predictions apart by 1 are 1 / 4500 in the unit of the magnitude."""
    assert traced(step([4e-5], 4500.0)).score().tolist() == pytest.approx([4e-5], rel=1e-4)
    with pytest.raises(NotMeasured, match="guidance was skipped"):
        traced(step([1.3e-7], 4500.0)).score()  # up to 1e-5 * 18 ** .5 * 15 / 4500 = 1.41e-7
