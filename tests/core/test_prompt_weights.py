"""Prompt weights, against values worked by hand."""

from __future__ import annotations

import pytest
import torch

from sd_dejavu.core.conditioning import Conditioning, EncoderInput, Reencoding, TokenRow, align
from sd_dejavu.core.prompt_weights import encode_weighted, parse
from sd_dejavu.explain.leave_one_out import drop_word


def weight_of(prompt, word):
    read = parse(prompt)
    at = read.text.index(word)
    (weight,) = {round(w, 9) for w in read.weights[at : at + len(word)]}
    return weight


@pytest.mark.parametrize(
    ("prompt", "text", "weight"),
    [
        ("a boat", "a boat", 1.0),
        ("a (boat)", "a boat", 1.1),
        ("a ((boat))", "a boat", 1.21),
        ("a [boat]", "a boat", round(1 / 1.1, 9)),
        ("a (boat:1.3)", "a boat", 1.3),
        ("a (red (boat:0.5):2)", "a red boat", 1.0),
        ("a (boat", "a boat", 1.1),
        ("a boat)", "a boat)", 1.0),
        (r"a \(boat\)", "a (boat)", 1.0),
        ("film: (boat)", "film: boat", 1.1),
    ],
)
def test_brackets_are_read_as_in_automatic1111(prompt, text, weight):
    assert parse(prompt).text == text
    assert weight_of(prompt, "boat") == weight


def test_a_prompt_of_brackets_is_read_in_no_time():
    """Group by group over the text within it would be billions of products; a weight without an end, of tries."""
    weights = parse("([" * 25_000 + "a" * 50_000).weights
    assert len(weights) == 50_000
    assert set(weights) == {weights[0]}
    assert weights[0] == pytest.approx((1.1 * (1 / 1.1)) ** 25_000)
    assert set(parse("(:" + "1" * 100_000).weights) == {1.1}


def encode(text):
    """One token a word; row = (number of letters, position); start and end rows are zeros."""
    words, _ = align(text, [])
    rows = torch.tensor([[0.0, 0.0], *[[float(len(w.text)), float(i + 1)] for i, w in enumerate(words)], [0.0, 0.0]])
    rows = torch.cat([rows, torch.zeros(6 - len(rows), 2)])[None]
    if not words:
        rows = rows + 1
    tokens = [TokenRow("<s>", "start"), *[TokenRow(w.text, "word", i) for i, w in enumerate(words)]]
    tokens += [TokenRow("</s>", "end")] * (6 - len(tokens))
    way = Reencoding((EncoderInput(rows[0], tuple(tokens)),), lambda leaves: (leaves[0][None], {}))
    return Conditioning(rows, {}, text, words, tuple(tokens), way)


def test_rows_move_away_from_the_empty_prompt_by_their_weight():
    weighted = encode_weighted(encode, "a (boat:1.5)")
    # boat: row (4, 2), empty row (1, 1): 1 + 1.5 * 3 = 5.5 and 1 + 1.5 * 1 = 2.5; 'a' stays (1, 1).
    assert weighted.rows[0, 2].tolist() == [5.5, 2.5]
    assert weighted.rows[0, 1].tolist() == [1.0, 1.0]
    again, _ = weighted.reencoding.encode([i.embeddings for i in weighted.reencoding.inputs])
    assert torch.equal(again, weighted.rows)


def test_words_keep_their_places_as_typed():
    prompt = "a (Red:1.5) [boat]"
    assert [prompt[w.start : w.end] for w in encode_weighted(encode, prompt).words] == ["a", "Red", "boat"]


def test_dropping_a_weighted_word_leaves_no_empty_brackets():
    conditioning = encode_weighted(encode, "a (red:1.5) boat")
    assert drop_word(conditioning.prompt, conditioning.words[1]) == "a boat"
