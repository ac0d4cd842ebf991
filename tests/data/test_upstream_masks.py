"""Ids and masks beside those of upstream's algorithms, written anew here from what they do.

LLaVA and Shell-V split a text at ``<image>``, tokenize what is between, and count masks by tokenizing parts of the
text again (haotian-liu/LLaVA@c121f04 llava/train/train.py, WisdomShell/shell-v@2860966 shell_v/train/train.py).
CodeShell encodes each part alone (WisdomShell/codeshell@09d1adc finetune/finetune.py).
"""

import random

import numpy as np
import pytest

from shellv_core.data.conversation import IGNORE_INDEX, encode_conversation
from shellv_core.templates import IMAGE_TOKEN, TEMPLATES
from tests.data.tiny_tokenizers import KINDS

IMAGE = -200
TOKENIZERS = [kind for kind in ("codeshell", "byte_level", "bos") if kind in KINDS]
WORDS = ["the", "dog", "is", "on", "a", "12", "red", "ball,", "狗在左边。", "👍🏽", "it's", "(left)", "x = 1\n\n  y"]


def chunked(tokenizer, text):
    """Ids with -200 for each image; one begin-of-text in front, if the tokenizer puts it there."""
    chunks = [tokenizer(chunk)["input_ids"] for chunk in text.split(IMAGE_TOKEN)]
    bos = tokenizer.bos_token_id
    skip = int(bos is not None and bool(chunks[0]) and chunks[0][0] == bos)
    ids = chunks[0][:skip]
    for index, chunk in enumerate(chunks):
        ids = ids + [IMAGE] * bool(index) + chunk[skip:]
    return ids


def masked_by_rounds(tokenizer, text, sep, role, max_length=2048):
    """chatml (mpt) and Shell-V: rounds end with `sep`, the first holds the system prompt too."""
    ids = chunked(tokenizer, text)
    labels = np.array(ids)
    pieces = text.split(sep)
    rounds = [sep.join(pieces[:3]), *(sep.join(pieces[start : start + 2]) for start in range(3, len(pieces), 2))]
    position = 0
    for one in rounds:
        halves = one.split(sep + role)
        if not one or len(halves) != 2:
            break
        labels[position : position + len(chunked(tokenizer, halves[0] + sep + role))] = IGNORE_INDEX
        position += len(chunked(tokenizer, one)) + len(chunked(tokenizer, sep))
    labels[position:] = IGNORE_INDEX
    if position < max_length and position != len(ids):
        labels[:] = IGNORE_INDEX
    return ids, labels.tolist()


def masked_by_offsets(tokenizer, text, sep, end, max_length=2048):
    """v1 and llama_2: rounds end with `end`; one id of begin of text, and -2 for it and the space before an answer."""
    ids = chunked(tokenizer, text)
    labels = np.array(ids)
    position = 1
    labels[:position] = IGNORE_INDEX
    for one in text.split(end):
        halves = one.split(sep)
        if not one or len(halves) != 2:
            break
        labels[position : position + len(chunked(tokenizer, halves[0] + sep)) - 2] = IGNORE_INDEX
        position += len(chunked(tokenizer, one))
    labels[position:] = IGNORE_INDEX
    if position < max_length and position != sum(token != tokenizer.pad_token_id for token in ids):
        labels[:] = IGNORE_INDEX
    return ids, labels.tolist()


def masked_plain(tokenizer, caption):
    ids = chunked(tokenizer, f"{IMAGE_TOKEN}{caption}\n")
    known = len(chunked(tokenizer, IMAGE_TOKEN))
    return ids, [IGNORE_INDEX] * known + ids[known:]


def masked_by_parts(tokenizer, conversation):
    """CodeShell's finetuning; its values come without a picture."""

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    end = encode(" |<end>| ")
    ids = [tokenizer.eos_token_id]
    labels = [IGNORE_INDEX]
    for turn in conversation:
        value = encode(turn["value"])
        if turn["from"] == "human":
            new = encode("## human:") + value + end
            labels += [IGNORE_INDEX] * len(new)
        else:
            role = encode("## assistant:")
            new = role + value + end
            labels += [IGNORE_INDEX] * len(role) + value + end
        ids += new
    return ids, labels


def ours(tokenizer, name, conversation):
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    ids, labels = encode_conversation(tokenizer, conversation, image, 1, 2048, TEMPLATES[name])
    return [IMAGE if token == image else token for token in ids.tolist()], labels.tolist()


def text_of(tokenizer, name, conversation):
    return "".join(part.text for part in TEMPLATES[name].bound(tokenizer).render(conversation))


def conversations(image=True, rounds=3):
    rng = random.Random(1)
    for _ in range(30):
        turns = []
        for index in range(rng.randint(1, rounds)):
            question, answer = (" ".join(rng.choices(WORDS[:-2], k=rng.randint(1, 9))) + "." for _ in range(2))
            asked = f"{IMAGE_TOKEN}\n{question}" if image and not index else question
            turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": "The " + answer + WORDS[-1]}]
        yield turns


@pytest.mark.parametrize("kind", [kind for kind in TOKENIZERS if kind != "bos"])
@pytest.mark.parametrize(
    ("name", "sep", "role"),
    [("shellv", "{eos}", "## assistant:"), ("chatml", "<|im_end|>", "<|im_start|>assistant\n")],
)
def test_shellv_and_chatml_are_upstreams(kind, name, sep, role):
    tokenizer = KINDS[kind]()
    sep = sep.replace("{eos}", tokenizer.eos_token)
    for image in (True, False):
        for conversation in conversations(image):
            text = text_of(tokenizer, name, conversation)
            assert ours(tokenizer, name, conversation) == masked_by_rounds(tokenizer, text, sep, role)


@pytest.mark.parametrize(("name", "sep"), [("v1", " ASSISTANT: "), ("llama_2", "[/INST] ")])
def test_v1_and_llama_2_are_upstreams_with_a_tokenizer_that_begins_texts(name, sep):
    tokenizer = KINDS["bos"]()
    for image in (True, False):
        for conversation in conversations(image):
            text = text_of(tokenizer, name, conversation)
            ids, labels = masked_by_offsets(tokenizer, text, sep, "</s>")
            assert any(label != IGNORE_INDEX for label in labels)
            assert ours(tokenizer, name, conversation) == (ids, labels)


def test_mistral_instruct_is_upstreams_with_a_tokenizer_that_begins_texts():
    tokenizer = KINDS["bos"]()
    for conversation in conversations():
        text = text_of(tokenizer, "mistral_instruct", conversation)
        expected = masked_by_offsets(tokenizer, text, "[/INST] ", "</s>")
        assert ours(tokenizer, "mistral_instruct", conversation) == expected


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_plain_is_upstreams_and_an_end_of_text(kind):
    tokenizer = KINDS[kind]()
    for conversation in conversations(rounds=1):
        ids, labels = masked_plain(tokenizer, conversation[1]["value"])
        eos = tokenizer.eos_token_id
        assert ours(tokenizer, "plain", conversation) == ([*ids, eos], [*labels, eos])


@pytest.mark.parametrize("kind", [kind for kind in TOKENIZERS if kind != "bos"])
def test_codeshell_chat_is_upstreams(kind):
    tokenizer = KINDS[kind]()
    for conversation in conversations(image=False):
        assert ours(tokenizer, "codeshell_chat", conversation) == masked_by_parts(tokenizer, conversation)
    punctuation = [{"from": "human", "value": "/x?"}, {"from": "gpt", "value": "```py\n:/root```"}]
    assert ours(tokenizer, "codeshell_chat", punctuation) == masked_by_parts(tokenizer, punctuation)


needs_codeshell = pytest.mark.skipif("codeshell" not in KINDS, reason="no tokenizer of CodeShell beside the project")


def trained_text(tokenizer, labels):
    return tokenizer.decode([label for label in labels if label != IGNORE_INDEX])


@needs_codeshell
def test_correction_answer_that_merges_with_the_role_is_trained_in_full():
    tokenizer = KINDS["codeshell"]()
    conversation = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "/root"}]
    text = text_of(tokenizer, "shellv", conversation)
    _, upstream = masked_by_rounds(tokenizer, text, tokenizer.eos_token, "## assistant:")
    assert trained_text(tokenizer, upstream) == "root<|endoftext|>"
    assert trained_text(tokenizer, ours(tokenizer, "shellv", conversation)[1]) == "/root<|endoftext|>"


@needs_codeshell
@pytest.mark.parametrize("name", ["shellv", "v1"])
def test_correction_special_text_in_an_answer_masks_nothing(name):
    tokenizer = KINDS["codeshell"]()
    conversation = [
        {"from": "human", "value": "What ends a text?"},
        {"from": "gpt", "value": "It is <|endoftext|> here."},
        *next(conversations(image=False, rounds=1)),
    ]
    text = text_of(tokenizer, "shellv", conversation)
    _, upstream = masked_by_rounds(tokenizer, text, tokenizer.eos_token, "## assistant:")
    assert set(upstream) == {IGNORE_INDEX}
    assert "It is <|endoftext|> here.<|endoftext|>" in trained_text(tokenizer, ours(tokenizer, name, conversation)[1])


@needs_codeshell
@pytest.mark.parametrize(("name", "sep"), [("v1", " ASSISTANT: "), ("llama_2", "## ")])
def test_correction_v1_and_llama_2_are_trained_with_a_tokenizer_without_begin_of_text(name, sep):
    """Upstream counts a begin of text that CodeShell does not write, and padding that is its end of text; Shell-V
    looks for ``## `` in llama_2."""
    tokenizer = KINDS["codeshell"]()
    conversation = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "On the left."}]
    text = text_of(tokenizer, name, conversation)
    _, upstream = masked_by_offsets(tokenizer, text, sep, tokenizer.eos_token)
    assert trained_text(tokenizer, upstream) != " On the left.<|endoftext|>"
    trained = trained_text(tokenizer, ours(tokenizer, name, conversation)[1])
    assert trained.replace(" <|", "<|") == " On the left.<|endoftext|>"
