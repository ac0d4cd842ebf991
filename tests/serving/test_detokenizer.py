from __future__ import annotations

import pytest

from shellv_core.serving.detokenizer import Detokenizer

TEXTS = ["hello world", "two apples, three cats.", "Zwölf Ärzte 你好 🐈🐕 fin", "a\n\nb  c", "!\ufffd"]


def feed(processor, text, stop=()):
    tokenizer = processor.tokenizer
    detokenizer = Detokenizer(tokenizer, stop)
    pieces = []
    for token_id in tokenizer(text, add_special_tokens=False)["input_ids"]:
        pieces.append(detokenizer.push(token_id))
        if detokenizer.stopped:
            break
    return [*pieces, detokenizer.finish()], detokenizer.stopped


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_to_the_text(processor, text):
    pieces, _ = feed(processor, text)
    assert "".join(pieces) == text


def test_unfinished_characters_are_held_back(processor):
    pieces, _ = feed(processor, "a 🐈 b")
    assert not any("\ufffd" in piece for piece in pieces)


def test_leading_white_space_is_left_out(processor):
    assert "".join(feed(processor, " \n hello world")[0]) == "hello world"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["world"], "hello "),
        (["lo w"], "hel"),
        (["zzz"], "hello world"),
        (["world!"], "hello world"),
        (["d", "e"], "h"),
    ],
)
def test_text_ends_before_the_first_stop_string(processor, stop, expected):
    pieces, stopped = feed(processor, "hello world", stop)
    assert "".join(pieces) == expected
    assert stopped == (expected != "hello world")


def test_what_may_become_a_stop_string_is_not_shown(processor):
    pieces, _ = feed(processor, "hello wor", ["world"])
    assert "w" not in "".join(pieces[:-1])
    assert "".join(pieces) == "hello wor"


def test_special_tokens_leave_no_text(processor):
    detokenizer = Detokenizer(processor.tokenizer)
    assert detokenizer.push(processor.tokenizer.eos_token_id) + detokenizer.finish() == ""
