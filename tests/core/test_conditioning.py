"""Rows back to words. Oracle for bytes: the byte-level alphabet of the `tokenizers` library."""

from __future__ import annotations

import pytest
import torch
from tokenizers.normalizers import NFC, Lowercase, Sequence
from tokenizers.pre_tokenizers import ByteLevel

from sd_dejavu.core.conditioning import (
    Conditioning,
    TokenRow,
    Word,
    align,
    merge_by_word,
    split_words,
    stack,
    token_bytes,
)

NORMALISE = Sequence([NFC(), Lowercase()])


def stand_ins(text: str) -> str:
    """Each byte of the text as the printable character that byte-level tokenizers use."""
    return "".join(piece for piece, _ in ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text))


def clip_like_tokens(prompt: str, bytes_a_token: int) -> tuple[list[str], list[int]]:
    """Tokens of so many bytes, never across words, and for each the number of its word."""
    tokens, owners = [], []
    for number, word in enumerate(split_words(prompt)):
        printed = stand_ins(NORMALISE.normalize_str(word.text))
        pieces = [printed[i : i + bytes_a_token] for i in range(0, len(printed), bytes_a_token)]
        tokens += [*pieces[:-1], pieces[-1] + "</w>"]
        owners += [number] * len(pieces)
    return tokens, owners


@pytest.mark.parametrize("bytes_a_token", [1, 2, 3, 50])
@pytest.mark.parametrize(
    "prompt",
    [
        "a Red FOX, asleep",
        "Café au lait,   ÉTÉ!",
        "🦊fox 👩‍👩‍👧 東京の夜 (night:1.2)",
        "cafe\u0301 décor cafe\u0301 au lait",  # decomposed accents, composed by the tokenizer
        "ΟΔΟΣ σοφός",  # a final sigma, which the tokenizer lower-cases letter by letter
        "a a a aa a, a ,a",
    ],
)
def test_every_token_finds_the_word_it_was_cut_from(prompt: str, bytes_a_token: int) -> None:
    tokens, owners = clip_like_tokens(prompt, bytes_a_token)
    words, found = align(prompt, tokens)
    assert list(found) == owners
    assert words == split_words(prompt)


def test_tokens_a_tokenizer_changed_count_to_the_word_reached_and_alignment_recovers() -> None:
    # A straightened quotation mark and an unknown token stand nowhere in the prompt.
    words, found = align("the “old mill house", ["the</w>", '"</w>', "old</w>", "??", "mill</w>", "house</w>"])
    assert [words[n].text for n in found if n is not None] == ["the", "“old", "“old", "mill", "mill", "house"]


def test_tokens_behind_the_prompts_end_count_to_the_last_word() -> None:
    assert align("red fox", ["red</w>", "fox</w>", "zzz</w>", "q</w>"])[1] == (0, 1, 1, 1)


@pytest.mark.parametrize("prompt", ["", " \n\t"])
def test_a_prompt_without_words_gives_tokens_no_word(prompt: str) -> None:
    assert align(prompt, [",</w>"]) == ((), (None,))


def test_words_keep_letter_case_punctuation_and_place() -> None:
    prompt = "  An Old\tRiver,\nbank "
    words = split_words(prompt)
    assert [w.text for w in words] == ["An", "Old", "River,", "bank"]
    assert [prompt[w.start : w.end] for w in words] == [w.text for w in words]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("1girl,solo,red_dress,masterpiece", ["1girl,", "solo,", "red_dress,", "masterpiece"]),
        ("a fox, 1,000 stars;night", ["a", "fox,", "1,000", "stars;", "night"]),
        ("red,(blue:1.2),", ["red,", "(blue:1.2),"]),
        ("wait... what?!ok", ["wait...", "what?!ok"]),
        ("一只红狐狸，夜晚", ["一", "只", "红", "狐", "狸，", "夜", "晚"]),
        ("赤いキツネ、「夜」の雪", ["赤", "い", "キツネ、", "「夜」", "の", "雪"]),
        ("fox狐fox2", ["fox", "狐", "fox2"]),
        ("a 🦊,b", ["a", "🦊,", "b"]),
        ("빨간 여우", ["빨간", "여우"]),
    ],
)
def test_words_end_at_commas_and_in_scripts_without_spaces(prompt: str, words: list[str]) -> None:
    found = split_words(prompt)
    assert [w.text for w in found] == words
    assert [prompt[w.start : w.end] for w in found] == words


@pytest.mark.parametrize("text", ["caf", "é", "🦊", "東", "~!", "\x00\x7f\xad"])
def test_token_bytes_reads_the_byte_level_alphabet_backwards(text: str) -> None:
    assert token_bytes(stand_ins(text) + "</w>") == text.encode()


def test_token_bytes_of_text_outside_the_alphabet_is_its_utf8() -> None:
    assert token_bytes("▁river") == "▁river".encode()  # a SentencePiece token


def test_merging_sums_the_tokens_of_a_word_and_leaves_start_and_end_out() -> None:
    words = split_words("Vermilion fox")
    tokens = [
        TokenRow("<s>", "start"),
        TokenRow("ver", "word", 0),
        TokenRow("milion", "word", 0),
        TokenRow("</s>", "end"),
        TokenRow("<s>", "start"),  # a second chunk
        TokenRow("fox", "word", 1),
        TokenRow("?", "word", None),
        TokenRow("</s>", "end"),
    ]
    values = torch.tensor([100.0, 1.0, 2.0, 100.0, 100.0, 4.0, 100.0, 100.0])
    assert merge_by_word(values, tokens, words).tolist() == [3.0, 4.0]


def test_row_mask_marks_the_wanted_roles() -> None:
    tokens = (TokenRow("<s>", "start"), TokenRow("fox", "word", 0), TokenRow("</s>", "end"))
    conditioning = Conditioning(torch.zeros(1, 3, 2), tokens=tokens)
    assert conditioning.row_mask("start", "end").tolist() == [True, False, True]
    with pytest.raises(ValueError, match="tokens of this conditioning are not known"):
        Conditioning(torch.zeros(1, 3, 2)).row_mask("start")


def test_rows_of_another_shape_than_batch_tokens_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[batch, tokens, width\], not \[3, 2\]"):
        Conditioning(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="1 tokens were given for 3"):
        Conditioning(torch.zeros(1, 3, 2), tokens=(TokenRow("a", "word", 0),))


def test_repeat_keeps_entries_together_with_their_extras() -> None:
    both = Conditioning(torch.tensor([1.0, 2.0]).reshape(2, 1, 1), {"pooled": torch.tensor([[10.0], [20.0]])}).repeat(2)
    assert both.rows.flatten().tolist() == [1, 1, 2, 2]
    assert both.extras["pooled"].flatten().tolist() == [10, 10, 20, 20]


def test_stack_joins_rows_and_extras_in_order() -> None:
    parts = [Conditioning(torch.full((1, 2, 1), v), {"pooled": torch.full((1, 1), v * 10)}) for v in (1.0, 2.0)]
    batch = stack(parts)
    assert batch.rows[:, 0, 0].tolist() == [1, 2]
    assert batch.extras["pooled"].flatten().tolist() == [10, 20]
    with pytest.raises(ValueError, match=r"different lengths .* \[2, 3\] rows"):
        stack([parts[0], Conditioning(torch.zeros(1, 3, 1))])


def test_stack_keeps_what_a_host_keeps_with_one_prompt_and_refuses_it_for_several() -> None:
    first, second = (Conditioning(torch.zeros(1, 2, 1), host_values={"mask": number}) for number in (1, 2))
    assert stack([first, first]).host_values == {"mask": 1}
    for other in (second, Conditioning(torch.zeros(1, 2, 1))):
        with pytest.raises(ValueError, match="cannot share a batch"):
            stack([first, other])


def test_other_rows_drop_the_way_back_and_keep_prompt_and_words() -> None:
    from hand_made import encoder

    old = encoder({"fox": 1.0})("red fox")
    new = old.with_rows(old.rows + 1)
    assert old.reencoding is not None and new.reencoding is None
    assert (new.prompt, new.words, new.tokens) == ("red fox", (Word("red", 0, 3), Word("fox", 4, 7)), old.tokens)
