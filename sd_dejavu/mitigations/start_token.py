"""Start-token re-weighting: more attention to the start token, none to padding.

Ren et al.: *Unveiling and Mitigating Memorization in Text-to-image Diffusion Models through Cross Attention*, ECCV
2024. A memorised prompt's attention sits on a few tokens that carry the memory,
often end and padding tokens, which have read the whole prompt. With s_n the cross-attention logit of token n,

    s_start <- c s_start (c = 1.25),   s_n <- -inf for padding,

at every layer and step of the pass with the prompt. The end token itself stays, padding is what comes after it.
The published code multiplies the logit, whatever its sign; so does this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..core.attention import AttentionRule
from ..core.conditioning import Conditioning, TokenRow
from ..core.denoiser import Model
from ..core.settings import Checked, option
from . import Mitigation, Outcome, Start


@dataclass(frozen=True)
class Settings(Checked):
    start_factor: float = option(1.25, "factor on the start token's attention logits", minimum=0, maximum=100)
    mask_padding: bool = option(True, "leave padding out of the attention")


def is_padding(tokens: Sequence[TokenRow]) -> list[bool]:
    """Which tokens come after the end token of their chunk.

    >>> is_padding([TokenRow("a</w>", "word", 0), TokenRow("<end>", "end"), TokenRow("<end>", "end")])
    [False, False, True]
    """
    found, ended = [], False
    for token in tokens:
        found.append(token.role == "end" and ended)
        ended = token.role == "end"
    return found


def attention_rule(conditioning: Conditioning, settings: Settings = Settings()) -> AttentionRule:
    """Raises ValueError when the tokens are unknown."""
    starts = conditioning.row_mask("start")
    factors = torch.where(starts, settings.start_factor, 1.0)
    padding = torch.tensor(is_padding(conditioning.tokens), device=starts.device)
    return AttentionRule(factors, ~padding if settings.mask_padding else torch.ones_like(starts))


def _apply(model: Model, conditioning: Conditioning, start: Start, settings: Settings) -> Outcome:
    score = start.score(model, conditioning)
    if score <= start.acceptable:
        return Outcome.unchanged(conditioning, score)
    changed = replace(conditioning, attention=attention_rule(conditioning, settings))
    return Outcome(changed, score, start.score(model, changed))


MITIGATIONS = (
    Mitigation(
        "start-token",
        "more attention to the start token, none to padding",
        touches="attention",
        cost="two evaluations",
        settings=Settings,
        work=_apply,
        release=(0, 1),
        remark="needs cross-attention of its own, which most flow models lack: they are refused",
    ),
)
