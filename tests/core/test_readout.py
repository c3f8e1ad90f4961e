"""Numbers that leave the device without anybody waiting for them, and the counter that says so."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device_reads import DeviceReads
from hand_made import LinearDenoiser

from sd_dejavu.core.conditioning import Conditioning
from sd_dejavu.core.denoiser import Predictions
from sd_dejavu.core.readout import Readout
from sd_dejavu.core.sampling import first_step
from sd_dejavu.core.trace import Trace
from sd_dejavu.run.monitoring import Monitoring
from sd_dejavu.run.state import RunState


def test_it_holds_what_was_there_when_it_was_made() -> None:
    tensor = torch.tensor([1.0, 2.0])
    readout = Readout(tensor)
    tensor.zero_()
    assert readout.ready() and readout.wait().tolist() == [1.0, 2.0]


class Card:
    """What a Readout uses of a CUDA card: copies that are only there when the card comes to them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waited = self.done = 0
        self.launched: list[Any] = []
        plain = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *a, pin_memory, **k: self._pinned(plain(*a, **k), pin_memory))
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "Event", self._event)

    def tensor(self, values: list[float]) -> Any:
        held = torch.tensor(values)
        about = {"device": torch.device("cuda", 0), "shape": held.shape, "dtype": held.dtype, "held": held}
        return SimpleNamespace(**about, detach=lambda: SimpleNamespace(**about))

    def catch_up(self, place: int | None = None) -> None:
        for target, source in self.launched[self.done : place]:
            target.copy_(source)
        self.done = max(self.done, len(self.launched[:place]))

    def _pinned(self, memory: torch.Tensor, pin_memory: bool) -> Any:
        assert pin_memory
        memory.zero_()

        def copy(source: Any, non_blocking: bool) -> None:
            assert non_blocking
            self.launched.append((memory, source.held))

        return SimpleNamespace(copy_=copy, clone=memory.clone)

    def _event(self) -> Any:
        place = len(self.launched)  # the event is made behind the copy, and recorded at once

        def synchronize() -> None:
            self.waited += self.done < place
            self.catch_up(place)

        return SimpleNamespace(record=lambda: None, query=lambda: self.done >= place, synchronize=synchronize)


def test_on_a_card_only_who_needs_the_numbers_waits_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch)
    first, second = Readout(card.tensor([1.0, 2.0])), Readout(card.tensor([3.0]))
    assert not first.ready() and card.waited == 0
    card.catch_up()
    assert first.ready() and first.wait().tolist() == [1.0, 2.0]
    third = Readout(card.tensor([4.0]))
    assert not third.ready()
    assert third.wait().tolist() == [4.0] and third.ready()
    assert (second.wait().tolist(), third.wait().tolist()) == ([3.0], [4.0])
    assert card.waited == 1  # for the third alone, once


def predictions(gap: float, sigma: float) -> Predictions:
    base = torch.zeros(2, 4, 2, 2)
    return Predictions(base + gap * sigma / 4, base, torch.full((2,), sigma))


def test_nothing_in_a_sampling_loop_asks_the_device() -> None:
    watch = RunState(Monitoring())
    steps = [predictions(3.0, 4.0), predictions(2.0, 2.0), predictions(1.0, 1.0)]
    with DeviceReads() as reads:
        for step in steps:
            watch.trace.record(step)
            watch.trace.skip(step.sigma[0], "guidance was off")
            watch.trace.ready(1)
        seen = watch.so_far()
        watch.settle()
        # Judging reads what has come to the CPU, and nothing else.
        scores = [verdict.score for verdict in seen.verdicts()]
    assert reads.places == set()
    assert scores == pytest.approx([3.0, 3.0])


def test_the_counter_sees_who_does_ask() -> None:
    network = LinearDenoiser()
    prompt, empty = (Conditioning(torch.full((1, 2, 4), value)) for value in (1.0, 0.0))
    with DeviceReads() as reads:
        first_step(network, [prompt], empty, torch.ones(1, 4, 2, 2), 2.0)
    assert {place.split(":")[0] for place in reads.places} == {"core/sampling.py"} and len(reads.places) >= 2
    with DeviceReads() as reads:
        float(torch.ones(1))  # not of the core
    assert reads.places == set()


def test_a_snapshot_does_not_grow_and_keeps_its_map() -> None:
    trace = Trace()
    trace.record(predictions(3.0, 4.0))
    seen, expected = trace.so_far(), trace.where()
    trace.record(predictions(1.0, 2.0))
    trace.skip(1.0, "guidance was off")
    assert [r.values for r in seen.readings] == [pytest.approx((3.0, 3.0))] and torch.equal(seen.where(), expected)
    assert len(trace.readings) == 3 and not torch.equal(trace.where(), expected)
    assert [r.values for r in trace.first(1).readings] == [r.values for r in seen.readings] and len(
        trace.first(2).readings
    ) == 2


def test_parts_of_parts_are_of_the_right_images() -> None:
    trace = Trace()
    gaps = torch.arange(1.0, 7.0)
    base = torch.zeros(6, 4, 2, 2)
    trace.record(Predictions(base + gaps.view(6, 1, 1, 1) / 4, base, torch.ones(6)))
    part = trace.of_images(2, 6).of_images(1, 3)
    assert [r.values for r in part.readings] == [pytest.approx((4.0, 5.0))]
    assert torch.equal(part.where(), trace.where()[3:5])


def test_the_first_step_is_judged_without_waiting_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch)
    watch = RunState(Monitoring())
    # Numbers that are still on a card: what the loop has recorded of two steps.
    trace, steps = watch.trace, [predictions(3.0, 4.0), predictions(2.0, 2.0)]
    monkeypatch.setattr("sd_dejavu.core.trace.Readout", lambda tensor: Readout(card.tensor(tensor.tolist())))
    trace.record(steps[0])
    assert not trace.ready(1)
    card.catch_up()
    trace.record(steps[1])
    trace.settle()
    assert trace.ready(1) and not trace.ready(2)
    assert watch.is_flagged() is False and card.waited == 0 and not trace.ready(2)
    assert [r.values for r in trace.readings] == [
        pytest.approx((3.0, 3.0)),
        pytest.approx((2.0, 2.0)),
    ] and card.waited == 1
