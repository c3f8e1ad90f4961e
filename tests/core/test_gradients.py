"""Gradients image by image against one graph over all, their precision, and what they keep in memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from hand_made import LinearDenoiser, encoder
from torch import Tensor, nn

from sd_dejavu.core.conditioning import Conditioning
from sd_dejavu.core.denoiser import Predictions, denoised_from_output, seeded_noise
from sd_dejavu.core.gradients import (
    LossScale,
    recomputing,
    scaled_gradients,
    together,
    value_and_gradients,
    with_gradients,
)
from sd_dejavu.core.memory import OutOfMemory
from sd_dejavu.detectors.magnitude import magnitude
from sd_dejavu.mitigations import per_sample_noise

SHAPE = (2, 6, 6)


class Network(nn.Module):
    """Convolutions, with rows and a pooled vector that act in between. ``seen`` holds the batch size of each call."""

    prediction_type = "epsilon"

    def __init__(self, width: int = 8, depth: int = 3, dtype: torch.dtype = torch.float32, size: float = 1.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Conv2d(SHAPE[0], width, 3, padding=1)
            self.middle = nn.ModuleList(
                nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
                for _ in range(depth)
            )
            self.rows, self.pooled = nn.Linear(4, width), nn.Linear(3, width)
            self.last = nn.Conv2d(width, SHAPE[0], 3, padding=1)
        self.size = size
        self.to(dtype).requires_grad_(False)
        self.seen: list[int] = []

    def forward(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        self.seen.append(len(x))
        dtype = self.first.weight.dtype
        told = self.rows(conditioning.rows.to(dtype)).tanh().sum(1)
        told = told + self.pooled(conditioning.extras["pooled"].to(dtype))
        hidden = self.first((x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2).sqrt()).to(dtype)) + told[:, :, None, None]
        for block in self.middle:
            hidden = hidden + block(hidden)
        return denoised_from_output(self.size * self.last(hidden).float(), x, sigma, "epsilon")


def at(images: int) -> tuple[Tensor, Tensor]:
    return 2 * seeded_noise(SHAPE, 0, images), torch.linspace(2.0, 3.0, images)


def prompt(entries: int = 1) -> Conditioning:
    return Conditioning(seeded_noise((5, 4), 1, entries), {"pooled": seeded_noise((3,), 2, entries)})


def rebuild(leaves: Sequence[Tensor]) -> Conditioning:
    """A text encoder of two leaves: rows from both, the pooled vector from the second."""
    first, second = leaves
    rows = torch.tanh(torch.tril(torch.ones(5, 5)) @ (first + second**2))
    return Conditioning(rows[None], {"pooled": second[:1, :3].sin(), "sizes": torch.ones(1, 2)})


def leaves_of() -> list[Tensor]:
    return [seeded_noise((5, 4), seed, 1)[0].requires_grad_(True) for seed in (3, 4)]


@pytest.mark.parametrize("at_once", [1, 2, 3, None])
def test_images_in_turn_give_the_gradients_of_one_graph_over_all(at_once: int | None) -> None:
    network, (x, sigma), leaves = Network(), at(5), leaves_of()
    with torch.no_grad():
        base = network(x, sigma, prompt())
    expected = magnitude(Predictions(network(x, sigma, rebuild(leaves)), base, sigma))
    gradients = torch.autograd.grad(expected.mean(), leaves)
    network.seen.clear()
    with torch.no_grad():  # the caller may have switched them off
        found = value_and_gradients(network, x, sigma, base, rebuild, leaves, at_once)
    torch.testing.assert_close(found.magnitudes, expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(list(found.gradients), list(gradients), rtol=1e-5, atol=1e-7)
    assert found.loss == pytest.approx(float(expected.detach().mean()), rel=1e-6)
    assert max(network.seen) <= (at_once or 5) and sum(network.seen) == 5
    assert not found.conditioning.rows.requires_grad and not found.conditioning.extras["pooled"].requires_grad


def test_a_conditioning_of_its_own_for_each_image_goes_with_it() -> None:
    network, (x, sigma), given = Network(), at(3), prompt(3)
    rows = given.rows.clone().requires_grad_(True)
    with torch.no_grad():
        base = network(x, sigma, prompt())
    expected = magnitude(Predictions(network(x, sigma, given.with_rows(rows)), base, sigma))
    (gradient,) = torch.autograd.grad(expected.mean(), rows)
    found = value_and_gradients(network, x, sigma, base, lambda moved: given.with_rows(moved[0]), [rows], 1)
    torch.testing.assert_close(found.magnitudes, expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.gradients[0], gradient, rtol=1e-5, atol=1e-7)


def test_noise_is_optimised_the_same_however_few_images_share_a_pass() -> None:
    network, (x, _), settings = Network(), at(4), per_sample_noise.Settings(noise_iterations=3)
    sigma, found = torch.full((4,), 2.0), []
    for at_once in (4, 1):
        network.seen.clear()
        given = (network, prompt(4), prompt(), x, sigma, 1e-3, settings)
        found.append(per_sample_noise.optimise(*given, batch_size=at_once))
        assert set(network.seen) == {at_once}
    torch.testing.assert_close(found[0].x, found[1].x, rtol=0, atol=5e-4)  # a step is .02; Adam magnifies rounding
    torch.testing.assert_close(torch.tensor(found[0].magnitudes), torch.tensor(found[1].magnitudes), rtol=1e-5, atol=0)


def test_large_images_go_one_by_one_and_small_ones_together() -> None:
    assert together(torch.zeros(4, 4, 64, 64)) == 1  # SD1.5 at 512 x 512
    assert together(torch.zeros(4, 4, 128, 128)) == 1  # SDXL
    assert together(torch.zeros(4, 4, 16, 16)) >= 4  # the bundled model
    assert together(torch.zeros(4, 4, 16, 16), 2) == 2


# ----------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision_stays_so_and_agrees(dtype: torch.dtype) -> None:
    full, half, (x, sigma) = Network(), Network(dtype=dtype), at(3)
    with torch.no_grad():
        base = full(x, sigma, prompt())
    found = [value_and_gradients(n, x, sigma, base, rebuild, leaves_of()).gradients for n in (full, half)]
    assert half.first.weight.dtype == dtype
    for one, other in zip(*found, strict=True):
        assert other.dtype == torch.float32
        assert float(torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0)) > 0.99


class Chain(torch.autograd.Function):
    """y = w x, whose backward pass goes through a half-precision number, as a network's does."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return weight * x

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return (ctx.weight * gradient).half().float(), None


def test_a_scaled_loss_saves_gradients_that_half_precision_would_round_to_zero() -> None:
    leaf = torch.ones(1, requires_grad=True)
    small = 1e-8  # half precision ends at 6e-8
    (plain,) = torch.autograd.grad(Chain.apply(leaf, small).sum(), leaf)
    assert float(plain) == 0
    values, (found,) = scaled_gradients(lambda: Chain.apply(leaf, small), [leaf], LossScale())
    assert float(found) == pytest.approx(small, rel=5e-3)
    assert float(values) == pytest.approx(small) and not values.requires_grad


def test_a_scale_that_overflows_is_lowered_for_good() -> None:
    leaf, scale, passes = torch.ones(1, requires_grad=True), LossScale(), []

    def values() -> Tensor:
        passes.append(scale.factor)
        return Chain.apply(leaf, 1000.0)  # 1000 * 2^10 is above half precision's 65504, 1000 * 2^6 is not

    for _ in range(2):
        _, (found,) = scaled_gradients(values, [leaf], scale)
        assert float(found) == pytest.approx(1000, rel=1e-3)
    assert passes == [2.0**10, 2.0**6, 2.0**6]


def test_gradients_that_no_scale_makes_finite_are_told() -> None:
    leaf = torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match=r"not finite .* use bfloat16 or float32"):
        scaled_gradients(lambda: Chain.apply(leaf, 1e8), [leaf], LossScale())


def test_an_encoder_in_half_precision_is_gone_back_through_at_a_scale_of_its_own() -> None:
    """Gradients of 1e-9 at its output, which half precision rounds to zero."""
    network, (x, sigma) = Network(size=1e-9), at(2)
    with torch.no_grad():
        base = network(x, sigma, prompt())
    leaf = seeded_noise((5, 4), 3, 1)[0].requires_grad_(True)

    def of_half(moved: Sequence[Tensor]) -> Conditioning:
        return prompt().with_rows(Chain.apply(moved[0], 1.0)[None])

    def of_full(moved: Sequence[Tensor]) -> Conditioning:
        return prompt().with_rows(moved[0][None])

    found = [value_and_gradients(network, x, sigma, base, way, [leaf]).gradients[0] for way in (of_full, of_half)]
    assert 0 < float(found[0].abs().max()) < 6e-8
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=float(found[0].abs().max()) * 1e-5)


# -------------------------------------------------------------------------------------- memory


@contextmanager
def kept() -> Iterator[Callable[[], int]]:
    """What autograd keeps for backward passes, in bytes: the most at any time while open."""
    storages: dict[int, list[int]] = {}
    most = [0]

    def forget(place: int) -> None:
        storages[place][1] -= 1
        if not storages[place][1]:
            del storages[place]

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            place = tensor.untyped_storage().data_ptr()
            known = storages.setdefault(place, [tensor.untyped_storage().nbytes(), 0])
            known[1] += 1
            weakref.finalize(self, forget, place)
            most[0] = max(most[0], sum(size for size, _ in storages.values()))

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        yield lambda: most[0]


def kept_by(network: Network, images: int, at_once: int | None = None) -> int:
    x, sigma = at(images)
    with torch.no_grad():
        base = network(x, sigma, prompt())
    with kept() as most:
        value_and_gradients(network, x, sigma, base, rebuild, leaves_of(), at_once)
    return most()


def test_eight_images_keep_no_more_than_one_and_half_precision_keeps_half() -> None:
    weights = sum(p.nbytes for p in Network().parameters())
    one, eight, all_at_once = kept_by(Network(), 1), kept_by(Network(), 8, 1), kept_by(Network(), 8, 8)
    assert eight <= 1.05 * one
    assert all_at_once - weights > 4 * (one - weights)
    half = kept_by(Network(dtype=torch.float16), 8, 1)
    assert half <= 0.6 * eight


def test_recomputed_blocks_keep_their_inputs_only_and_change_no_gradient() -> None:
    network, (x, sigma) = Network(width=16, depth=6), at(2)
    with torch.no_grad():
        base = network(x, sigma, prompt())
    plain = value_and_gradients(network, x, sigma, base, rebuild, leaves_of()).gradients
    usual = kept_by(network, 2)
    with recomputing(network.middle):
        again = value_and_gradients(network, x, sigma, base, rebuild, leaves_of()).gradients
        fewer = kept_by(network, 2)
        with torch.no_grad():
            assert torch.equal(network(x, sigma, prompt()), base)
    torch.testing.assert_close(list(again), list(plain), rtol=1e-6, atol=0)
    assert fewer < 0.75 * usual
    assert not any("forward" in vars(block) for block in network.middle)


def test_a_forward_of_the_modules_own_is_put_back_even_after_a_fault() -> None:
    block = nn.Linear(2, 2)
    own = block.forward
    block.forward = own
    with pytest.raises(KeyError), recomputing([block]):
        raise KeyError
    assert vars(block)["forward"] is own


def test_a_pass_that_does_not_fit_is_made_in_halves() -> None:
    class Small(Network):
        def forward(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
            found = super().forward(x, sigma, conditioning)
            if len(x) > 2:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return found

    (x, sigma), network = at(8), Small()
    base = torch.zeros_like(x)
    found = value_and_gradients(network, x, sigma, base, rebuild, leaves_of(), 8)
    expected = value_and_gradients(Network(), x, sigma, base, rebuild, leaves_of(), 8)
    assert network.seen == [8, 4, 2, 2, 2, 2]
    torch.testing.assert_close(list(found.gradients), list(expected.gradients), rtol=1e-5, atol=1e-7)


def test_where_one_image_does_not_fit_activations_are_recomputed_and_then_a_sentence_says_so() -> None:
    class Tight(LinearDenoiser):
        needs = 2

        def __init__(self) -> None:
            super().__init__()
            self.tries: list[bool] = []

        @contextmanager
        def differentiable(self, checkpointing: bool = False) -> Iterator[None]:
            self.tries.append(checkpointing)
            yield

        def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
            if len(self.tries) < self.needs:
                raise RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")
            return super().__call__(x, sigma, conditioning)

    model, given = Tight(), encoder({"fox": 1.0})("fox")
    x, sigma = seeded_noise((1, 2, 2), 0, 2), torch.full((2,), 2.0)

    def work() -> Tensor:
        rows = given.rows.clone().requires_grad_(True)
        return value_and_gradients(model, x, sigma, x, lambda moved: given.with_rows(moved[0]), [rows]).magnitudes

    assert with_gradients(model, work).shape == (2,)
    assert model.tries == [False, True]
    model = Tight()
    model.needs = 9
    with pytest.raises(OutOfMemory, match=r"not enough memory, even for one image at a time .*half precision"):
        with_gradients(model, work)
    assert model.tries == [False, True]
