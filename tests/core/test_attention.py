"""Attention rules against an explicit softmax: diffusers' UNet with a processor that knows factors and masks."""

from __future__ import annotations

import pytest
import torch
from hand_made import encoder
from miniatures import write_sd1
from torch import nn

from sd_dejavu.core.attention import AttentionRule, scaled_keys
from sd_dejavu.core.conditioning import Conditioning, TokenRow, stack
from sd_dejavu.hosts.diffusers.load import load
from sd_dejavu.mitigations.attenuate_tokens import outlying
from sd_dejavu.mitigations.start_token import Settings, attention_rule

TOKENS = (TokenRow("<s>", "start"), TokenRow("fox", "word", 0), *[TokenRow("</s>", "end")] * 3)


class Explicit:
    """softmax((Q K^T / sqrt(d)) * f, with -inf where masked) V in every cross-attention; notes the attention."""

    def __init__(self, factors: torch.Tensor, keep: torch.Tensor) -> None:
        self.factors, self.keep, self.seen = factors, keep, []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            layer(given).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for layer, given in ((attn.to_q, hidden_states), (attn.to_k, text), (attn.to_v, text))
        )
        logits = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        if encoder_hidden_states is not None:
            logits = (logits * self.factors).masked_fill(~self.keep, -torch.inf)
            self.seen.append(logits.softmax(-1).mean((1, 2)))
        out = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    return load(str(write_sd1(tmp_path_factory.mktemp("attention") / "sd1")))


@pytest.fixture
def inputs(model):
    return model.noise(0, 2) * 3, torch.full((2,), 2.5), model.encode("a red fox under the old oak")


def explicitly(model, inputs, rule: AttentionRule):
    """The prediction, and the attention [B, N], of the second implementation."""
    x, sigma, conditioning = inputs
    before, processor = model._unet.attn_processors, Explicit(rule.factors, rule.keep)
    try:
        model._unet.set_attn_processor(processor)
        with torch.no_grad():
            return model(x, sigma, conditioning), torch.stack(processor.seen).mean(0)
    finally:
        model._unet.set_attn_processor(before)


def hooks(model) -> int:
    return sum(len(module._forward_hooks) for module in model._unet.modules())


def test_scaled_keys_and_dropped_rows_are_scaled_and_masked_logits(model, inputs) -> None:
    x, sigma, conditioning = inputs
    count = conditioning.rows.shape[1]
    rule = AttentionRule(torch.linspace(0.3, 1.6, count), torch.arange(count) % 3 != 1)
    ruled = Conditioning(conditioning.rows, attention=rule)
    with torch.no_grad():
        found, plain = model(x, sigma, ruled), model(x, sigma, conditioning)
    expected, _ = explicitly(model, inputs, rule)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert float((found - plain).abs().max()) > 1e-3
    assert hooks(model) == 0
    with torch.no_grad():
        assert torch.equal(model(x, sigma, conditioning), plain)


def test_the_start_token_gets_more_and_padding_nothing(model, inputs) -> None:
    conditioning = inputs[2]
    rule = attention_rule(conditioning)
    # Start, seven words, end; then 68 of padding in a chunk of 77.
    assert rule.factors.tolist() == [1.25] + [1.0] * 76
    assert rule.keep.tolist() == [True] * 9 + [False] * 68
    assert attention_rule(conditioning, Settings(mask_padding=False)).keep.all()


def test_a_hosts_batch_of_both_passes_is_scaled_in_the_prompts_rows_only(model, inputs) -> None:
    x, sigma, conditioning = inputs
    empty, count = model.encode(""), conditioning.rows.shape[1]
    rule = AttentionRule(torch.linspace(0.3, 1.6, count), torch.ones(count, dtype=torch.bool))
    both = stack([Conditioning(c.rows) for c in (conditioning, empty)])
    rows_twice = Conditioning(both.rows.repeat(1, 2, 1))  # a host repeats rows to a common length
    for given in (both, rows_twice):
        with torch.no_grad(), scaled_keys(model._unet, rule, lambda batch: torch.tensor([True, False])):
            found = model(x[:1].repeat(2, 1, 1, 1), sigma, given)
        expected, _ = explicitly(model, (x[:1], sigma[:1], conditioning), rule)
        with torch.no_grad():
            plain = model(x[:1], sigma[:1], empty)
        torch.testing.assert_close(found, torch.cat([expected, plain]), atol=1e-4, rtol=1e-4)


def test_the_attention_that_tokens_get_is_what_the_softmax_says(model, inputs) -> None:
    count = inputs[2].rows.shape[1]
    _, expected = explicitly(model, inputs, AttentionRule(torch.ones(count), torch.ones(count, dtype=torch.bool)))
    found = model.attention_mass(*inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert hooks(model) == 0


def test_rules_that_do_not_fit_are_refused_and_nothing_is_left_behind(model, inputs) -> None:
    x, sigma, conditioning = inputs
    five = AttentionRule(torch.ones(5), torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="for 5 tokens, but 77 are attended to"), model.attending(five):
        model(x, sigma, conditioning)
    assert hooks(model) == 0
    with pytest.raises(ValueError, match="for 5 tokens was given for 77 rows"):
        Conditioning(conditioning.rows, attention=five)
    with pytest.raises(ValueError, match="one factor and one boolean a token"):
        AttentionRule(torch.ones(5), torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="keep at least one token"):
        AttentionRule(torch.ones(2), torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="no separate cross-attention"), scaled_keys(nn.Linear(2, 2), five):
        pass
    biased = nn.ModuleDict({"attn2": nn.ModuleDict({"to_k": nn.Linear(2, 2)})})
    with pytest.raises(ValueError, match="adds a bias"), scaled_keys(biased, five):
        pass
    ruled = Conditioning(torch.zeros(1, 5, 4), attention=five)
    with pytest.raises(ValueError, match="cannot share a batch"):
        stack([ruled, ruled])


@pytest.mark.parametrize(
    ("mass", "expected"),
    [
        # Words and end .1, .12, .11, .13, .5: median .12, deviations .02, 0, .01, .01, .38 of median .01.
        ([0.3, 0.10, 0.12, 0.11, 0.13, 0.5], [False] * 5 + [True]),
        # None beyond three deviations: the largest alone.
        ([0.3, 0.10, 0.12, 0.11, 0.13, 0.14], [False] * 5 + [True]),
        ([0.9, 0.10, 0.10, 0.10, 0.10, 0.10], [False] * 6),
    ],
)
def test_outlying_tokens_are_far_above_the_median(mass, expected) -> None:
    conditioning = encoder({})("a red fox here")  # start, four words, end
    assert outlying(torch.tensor(mass), conditioning).tolist() == expected


def test_padding_is_judged_as_one_token() -> None:
    conditioning = Conditioning(torch.zeros(1, 5, 4), tokens=TOKENS)  # start, word, end, two of padding
    # .1, .2 and the mean of .3 and .5: the largest is padding's.
    assert outlying(torch.tensor([0.9, 0.1, 0.2, 0.3, 0.5]), conditioning).tolist() == [False] * 3 + [True] * 2
    assert outlying(torch.tensor([0.9, 0.6, 0.2, 0.3, 0.5]), conditioning).tolist() == [False, True] + [False] * 3
