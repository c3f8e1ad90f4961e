"""Attenuation of outlying tokens: the tokens that draw unusual cross-attention get smaller logits.

The cross-attention attenuation of GUARD (2026): memorised prompts have tokens whose attention lies far from that of
the others; their logits are multiplied by 0.3 at every layer and step of the pass with the prompt.

The outlier rule here: m_n is token n's share of the cross-attention at the first step, averaged over images,
layers, heads and places. Among the prompt's tokens but the start token (which takes most of the attention in every
prompt) and padding, n is outlying when

    m_n > median + k * 1.4826 * median | m - median |,   k = 3

(Iglewicz & Hoaglin's modified z-score; 1.4826 makes the median deviation a normal law's standard deviation). Where
no token is, the one with the largest share is taken, unless all have the same. Padding has read the whole prompt
and holds its memory too: the padding tokens are judged together, by the mean of their shares, as one token, and
are attenuated together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.attention import AttentionRule
from ..core.conditioning import Conditioning
from ..core.denoiser import Model
from ..core.settings import Checked, option
from . import Mitigation, Outcome, Start
from .start_token import is_padding


@dataclass(frozen=True)
class Settings(Checked):
    attenuation: float = option(0.3, "factor on an outlying token's attention logits", minimum=0, maximum=1)
    outlier_deviations: float = option(
        3.0, "a token is outlying this many robust standard deviations above the median", minimum=0, maximum=100
    )


def outlying(mass: Tensor, conditioning: Conditioning, deviations: float = 3.0) -> Tensor:
    """[N] booleans from attention shares [N]. Raises ValueError when the tokens are unknown."""
    padding = torch.tensor(is_padding(conditioning.tokens), device=mass.device)
    single = ~conditioning.row_mask("start").to(mass.device) & ~padding
    judged = mass[single]
    if bool(padding.any()):
        judged = torch.cat([judged, mass[padding].mean()[None]])
    median = judged.quantile(0.5)
    spread = 1.4826 * (judged - median).abs().quantile(0.5)
    limit = torch.minimum(median + deviations * spread, judged.max())
    chosen = (judged >= limit) & (judged > median)
    found = torch.zeros_like(padding)
    found[single] = chosen[: int(single.sum())]
    found[padding] = chosen[-1]
    return found


def _apply(model: Model, conditioning: Conditioning, start: Start, settings: Settings) -> Outcome:
    score = start.score(model, conditioning)
    if score <= start.acceptable:
        return Outcome.unchanged(conditioning, score)
    mass = model.attention_mass(start.x, start.sigma, conditioning).mean(0)
    chosen = outlying(mass, conditioning, settings.outlier_deviations)
    factors = torch.where(chosen, settings.attenuation, 1.0)
    changed = replace(conditioning, attention=AttentionRule(factors, torch.ones_like(chosen)))
    padding = is_padding(conditioning.tokens)
    words = [
        token.text
        for token, is_one, pad in zip(conditioning.tokens, chosen.tolist(), padding, strict=True)
        if is_one and not pad
    ]
    details = {"tokens": tuple(words), "padding": bool(chosen[torch.tensor(padding)].any())}
    return Outcome(changed, score, start.score(model, changed), details)


MITIGATIONS = (
    Mitigation(
        "attenuate-tokens",
        "less attention to the tokens that draw unusually much of it",
        touches="attention",
        cost="three evaluations",
        settings=Settings,
        work=_apply,
        release=(0, 1),
        remark="needs cross-attention of its own, which most flow models lack: they are refused",
    ),
)
