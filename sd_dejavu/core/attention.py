"""Cross-attention, token by token: scaled logits, dropped tokens, and how much of the attention each token gets.

In softmax(Q K^T / sqrt(d)) V the logit of token n is linear in its key row, so scaling that logit by f for every
query is scaling the key row by f. The keys are made by a linear layer without bias, ``attn2.to_k`` in the models
of all hosts; a forward hook there is enough, whatever computes the attention afterwards. A token is masked by
leaving its row out of the conditioning: the softmax over the rest is the same as with a logit of minus infinity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ATTENTION = "attn2"
KEYS, QUERIES = f"{ATTENTION}.to_k", f"{ATTENTION}.to_q"


@dataclass(frozen=True)
class AttentionRule:
    """What the prompt's pass does to its N tokens: ``factors`` [N] on their logits, ``keep`` [N] which stay at all.

    The pass without the prompt is not touched.
    """

    factors: Tensor
    keep: Tensor

    def __post_init__(self) -> None:
        if self.factors.ndim != 1 or self.factors.shape != self.keep.shape or self.keep.dtype != torch.bool:
            raise ValueError(
                "an attention rule takes one factor and one boolean a token, "
                f"not {list(self.factors.shape)} and {list(self.keep.shape)} ({self.keep.dtype})"
            )
        if not bool(self.keep.any()):
            raise ValueError("an attention rule must keep at least one token")

    def rows(self, rows: Tensor) -> Tensor:
        """The rows [B, N, D] of a conditioning that stay, [B, kept, D]: what the model is to be given."""
        return rows[:, self.keep.to(rows.device)]

    @property
    def kept_factors(self) -> Tensor:
        """The factors [kept] of those rows."""
        return self.factors[self.keep.to(self.factors.device)]


def every_row(batch: int) -> Tensor:
    """For a model that is asked with the prompt and without it separately: all rows are the prompt's."""
    return torch.ones(batch, dtype=torch.bool)


@contextmanager
def scaled_keys(
    network: nn.Module, rule: AttentionRule, conditional: Callable[[int], Tensor] = every_row
) -> Iterator[None]:
    """While open, every cross-attention below ``network`` scales the logits of the rule's kept tokens.

    ``conditional`` tells from the size of a batch which of its rows belong to the prompt, [B] booleans; the others
    stay as they are. The network must be given ``rule.rows(...)``, or a whole multiple of them (hosts repeat rows
    to a common length, which changes no softmax). Raises ValueError where the network has no cross-attention of
    this kind, or another number of tokens is seen.
    """
    factors = rule.kept_factors

    def scale(module: nn.Module, given: tuple[Tensor, ...], keys: Tensor) -> Tensor:
        prompts = conditional(keys.shape[0]).to(keys.device)
        if not bool(prompts.any()):
            return keys
        times, rest = divmod(keys.shape[1], len(factors))
        if rest or not times:
            raise ValueError(f"the attention rule is for {len(factors)} tokens, but {keys.shape[1]} are attended to")
        scaled = keys * factors.repeat(times).to(keys)[None, :, None]
        return torch.where(prompts[:, None, None], scaled, keys)

    layers = _layers(network, KEYS)
    if any(getattr(layer, "bias", None) is not None for layer in layers):
        raise ValueError("this model's cross-attention adds a bias to its keys, so scaling them does not scale logits")
    with _hooked(layers, [scale] * len(layers)):
        yield


@dataclass(frozen=True)
class AttentionMass:
    """``shares`` is filled while the network runs: [B, N] for each call of each layer."""

    shares: list[Tensor]

    def mean(self) -> Tensor:
        """[B, N], the mean over layers: each row sums to 1."""
        return torch.stack(self.shares).mean(0)


@contextmanager
def watched_attention(network: nn.Module) -> Iterator[AttentionMass]:
    """While open, notes what share of its cross-attention each token gets, averaged over heads and places.

    Raises ValueError where the network has no cross-attention of this kind.
    """
    found = AttentionMass([])
    attentions = [module for name, module in network.named_modules() if name.endswith(ATTENTION)]
    hooks = [_reader(int(attention.heads), found.shares) for attention in attentions]
    with (  # in all hosts' models the queries are made before the keys
        _hooked(_layers(network, QUERIES), [on_queries for on_queries, _ in hooks]),
        _hooked(_layers(network, KEYS), [on_keys for _, on_keys in hooks]),
    ):
        yield found


def _reader(heads: int, shares: list[Tensor]) -> tuple[Callable[..., None], Callable[..., None]]:
    """Hooks on one layer's queries and keys that note its attention in ``shares``."""
    queries: list[Tensor] = []

    def on_queries(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        queries[:] = [output]

    def on_keys(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        shares.append(_mass(queries.pop(), output, heads))

    return on_queries, on_keys


def _mass(queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    """queries [B, P, heads * d], keys [B, N, heads * d] -> attention [B, N], averaged over heads and places P."""
    q, k = (t.detach().float().unflatten(2, (heads, -1)).transpose(1, 2) for t in (queries, keys))
    mass: Tensor = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1).mean((1, 2))
    return mass


def _layers(network: nn.Module, ending: str) -> list[nn.Module]:
    found = [module for name, module in network.named_modules() if name.endswith(ending)]
    if not found:
        raise ValueError("this model has no separate cross-attention, so the attention of tokens cannot be changed")
    return found


@contextmanager
def _hooked(modules: Sequence[nn.Module], hooks: Sequence[Callable[..., Tensor | None]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, hook in zip(modules, hooks, strict=True):
            stack.callback(module.register_forward_hook(hook).remove)
        yield
