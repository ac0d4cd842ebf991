from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shellv_core.data import conversation as module
from shellv_core.data.conversation import (
    IGNORE_INDEX,
    encode_captions,
    encode_conversation,
    encode_conversations,
    encode_prompt,
    preview,
)
from shellv_core.errors import DataError
from shellv_core.templates import TEMPLATES, add_template_tokens
from tests.data.tiny_tokenizers import KINDS, byte_level
from tests.training.tiny import tiny_model

CONVERSATION = [
    {"from": "human", "value": "<image>\nIs there a dog?"},
    {"from": "gpt", "value": "Yes, 7 dogs."},
    {"from": "human", "value": "Where?"},
    {"from": "gpt", "value": "(left)\nand right"},
]
MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a dog?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Yes, 7 dogs."}]},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "(left)\nand right"},
]
LITERALS = ("<image>", "</s>", "<s>", "<|endoftext|>", "<fim_pad>", "|<end>|", "<|im_end|>", "<unk>")
# CodeShell's vocabulary lacks the bytes of most control characters, and of the planes above, which are not assigned.
CHARACTERS = st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs", "Cc"], include_characters="\t\n\r")
TURN_TEXTS = st.lists(
    st.one_of(
        st.text(CHARACTERS, max_size=8),
        st.text(alphabet="狗在左边。，猫？", max_size=6),
        st.sampled_from(["👍🏽", "👩‍👩‍👧", " ", "\n", "\n\n", "\t", "  ", "://", "```", "## human:", "USER: "]),
        st.sampled_from(LITERALS),
        st.sampled_from(["é", "1234", "the dog is", " on the left.", "Yes", "no"]),
    ),
    max_size=6,
).map("".join)
ROUNDS = st.lists(st.tuples(TURN_TEXTS, TURN_TEXTS.filter(str.strip)), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def processor():
    return tiny_model()[1]


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return KINDS[request.param]()


def encode(processor, conversation, max_length=200):
    return encode_conversation(processor.tokenizer, conversation, processor.image_token_id, 4, max_length)


def encode_with(tokenizer, name, conversation, num_image_tokens=1, max_length=10_000):
    image = tokenizer.convert_tokens_to_ids("<image>")
    return encode_conversation(tokenizer, conversation, image, num_image_tokens, max_length, TEMPLATES[name])


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def turns(*texts):
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


def stretches(tokenizer, ids, labels):
    """The texts of trained and untrained stretches, in order."""
    runs = groupby(zip(ids, labels != IGNORE_INDEX, strict=True), key=lambda each: each[1])
    return [(bool(trained), decode(tokenizer, [token for token, _ in run])) for trained, run in runs]


def expected_stretches(template, conversation):
    runs = groupby(template.render(conversation), key=lambda part: part.trained)
    return [(trained, "".join(part.text for part in run)) for trained, run in runs]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("sentence_piece")])
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds=ROUNDS, name=st.sampled_from(sorted(TEMPLATES)), image=st.booleans())
def test_exactly_answers_and_end_markers_are_trained(kind, rounds, name, image):
    tokenizer, template = KINDS[kind](), TEMPLATES[name]
    rounds = rounds[:1] if template.caption_only else rounds
    conversation = turns(*(text for one in rounds for text in one))
    if image:
        conversation[0]["value"] = f"{conversation[0]['value']}<image>"
    ids, labels = encode_with(tokenizer, name, conversation)
    assert (labels[labels != IGNORE_INDEX] == ids[labels != IGNORE_INDEX]).all()
    expected = expected_stretches(template.bound(tokenizer), conversation)
    if kind == "bos":
        assert ids[0] == tokenizer.bos_token_id
        assert labels[0] == IGNORE_INDEX
        ids, labels = ids[1:], labels[1:]
    assert stretches(tokenizer, ids, labels) == expected
    # Of special tokens there are those of the template alone.
    markers = [part.text for part in template.bound(tokenizer).render(conversation) if not part.content]
    special = {tokenizer.convert_tokens_to_ids(token): token for token in module.special_tokens(tokenizer)}
    found = [special[token] for token in ids.tolist() if token in special]
    assert found == module._pattern(set(special.values())).findall("\0".join(markers))


@pytest.mark.parametrize("name", TEMPLATES)
def test_pieces_give_the_ids_of_the_whole_text(monkeypatch, tokenizer, name):
    """Without a literal special token and a token across a border, both ways of encoding agree."""
    if TEMPLATES[name].parts_alone:
        pytest.skip("always encoded part by part")
    conversation = turns("<image>\nWhere is the dog?  It's\n\n12", "The dog is on the left. 狗 👍🏽\n\n  ok 1")
    if not TEMPLATES[name].caption_only:
        conversation += turns("What color?", "red")
    whole = encode_with(tokenizer, name, conversation)
    calls = []
    monkeypatch.setattr(module, "_trained_tokens", lambda *_: calls.append(1))
    pieces = encode_with(tokenizer, name, conversation)
    assert calls
    assert [part.tolist() for part in pieces] == [part.tolist() for part in whole]


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_ids_begin_the_training_ids(tokenizer, name):
    template = TEMPLATES[name]
    for answer in ("The dog", "/root", "```py```", "狗", "**b**", "1", "(a)", "'s"):
        conversation = turns("<image>\nWhere is the dog?", answer)
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is the dog?"}]}]
        prompt = tokenizer.apply_chat_template(
            chat, chat_template=template.bound(tokenizer).chat_template(), tokenize=False, add_generation_prompt=True
        )
        ids, labels = encode_with(tokenizer, name, conversation)
        first = int((labels != IGNORE_INDEX).argmax())
        assert encode_prompt(tokenizer, prompt, template) == ids[:first].tolist()


def test_one_call_of_the_tokenizer_encodes_ordinary_conversations(monkeypatch):
    tokenizer = KINDS["byte_level"]()
    calls = []
    monkeypatch.setattr(module, "_encode_pieces", lambda _, rows: calls.append(list(rows)) or iter(()))
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert len(list(encode_conversations(tokenizer, [CONVERSATION] * 3, image, 4, 500))) == 3
    assert calls == [[]]


def test_answers_with_special_texts_are_trained_as_ordinary_tokens(tokenizer):
    for name, template in TEMPLATES.items():
        for literal in (*LITERALS, tokenizer.eos_token):
            ids, labels = encode_with(tokenizer, name, turns("What?", f"It is {literal} so."))
            (answer,) = [text for trained, text in stretches(tokenizer, ids, labels) if trained]
            assert answer.strip() == f"It is {literal} so.{template.bound(tokenizer).end}".strip()
            inner = labels[labels != IGNORE_INDEX].tolist()
            ends = inner.count(tokenizer.eos_token_id)
            assert ends == template.end.count("{eos}")


def test_captions_with_special_texts_are_ordinary_tokens(tokenizer):
    (ids,) = encode_captions(tokenizer, [f"A {tokenizer.eos_token} sign."], 50)
    assert ids.tolist().count(tokenizer.eos_token_id) == 1
    assert encode_captions(tokenizer, [], 50) == []


def test_preview_shows_each_token_and_whether_it_is_trained(tokenizer):
    for name in TEMPLATES:
        conversation = turns("<image>\nWhere?", "狗 👍🏽 </s> left")
        shown = preview(conversation, tokenizer, TEMPLATES[name])
        ids, _ = encode_with(tokenizer, name, conversation)
        assert "".join(text for text, _ in shown) == decode(tokenizer, ids)
        assert not any("\N{REPLACEMENT CHARACTER}" in text for text, _ in shown)
        trained = "".join(text for text, is_trained in shown if is_trained)
        assert trained.strip() == f"狗 👍🏽 </s> left{TEMPLATES[name].bound(tokenizer).end}".strip()
        assert ("<image>", False) in shown


def test_text_is_what_the_chat_template_renders(processor):
    parts = TEMPLATES["v1_no_system"].bound(processor.tokenizer).render(CONVERSATION)
    assert "".join(part.text for part in parts) == processor.apply_chat_template(MESSAGES)


def test_ids_are_what_the_processor_makes_of_it(processor):
    from PIL import Image

    text = processor.apply_chat_template(MESSAGES)
    expected = processor(images=Image.new("RGB", (64, 64)), text=text)["input_ids"][0]
    assert encode(processor, CONVERSATION)[0].tolist() == list(expected)


def test_question_ids_are_a_prefix_as_at_inference(processor):
    from PIL import Image

    prompt = processor.apply_chat_template(MESSAGES[:1], add_generation_prompt=True)
    prefix = list(processor(images=Image.new("RGB", (64, 64)), text=prompt)["input_ids"][0])
    assert encode(processor, CONVERSATION)[0][: len(prefix)].tolist() == prefix


def test_labels_are_exactly_the_answers_with_end_of_text(processor):
    input_ids, labels = encode(processor, CONVERSATION)
    assert input_ids.dtype == labels.dtype == np.int32
    labeled = labels != IGNORE_INDEX
    assert (labels[labeled] == input_ids[labeled]).all()
    assert processor.tokenizer.decode(labels[labeled]) == " Yes, 7 dogs.</s> (left)\nand right</s>"


def test_image_stands_first_wherever_it_was_written(processor):
    moved = [{"from": "human", "value": "Is there a dog?\n<image>"}, *CONVERSATION[1:]]
    assert encode(processor, moved)[0].tolist() == encode(processor, CONVERSATION)[0].tolist()


def test_tokens_around_the_image_stand_once():
    tokenizer = byte_level()
    template = replace(TEMPLATES["v1_no_system"], image_open="<im_start>", image_close="<im_end>")
    image = tokenizer.convert_tokens_to_ids("<image>")
    with pytest.raises(DataError, match="no special tokens <im_end>, <im_start>, which the template 'v1_no_system'"):
        encode_conversation(tokenizer, CONVERSATION, image, 3, 500, template)
    add_template_tokens(tokenizer, template)
    ids, _ = encode_conversation(tokenizer, CONVERSATION, image, 3, 500, template)
    assert decode(tokenizer, ids).startswith("USER: <im_start><image><image><image><im_end>\nIs there")


def test_long_conversation_is_cut(processor):
    whole, _ = encode(processor, CONVERSATION)
    cut, labels = encode(processor, CONVERSATION, max_length=len(whole) - 5)
    assert cut.tolist() == whole[:-5].tolist()
    assert len(labels) == len(cut)


def test_picture_is_never_cut(processor):
    whole, _ = encode(processor, CONVERSATION)
    end = int(np.flatnonzero(whole == processor.image_token_id)[-1]) + 1
    for max_length in (end - 1, end - 3, end - 4):
        with pytest.raises(DataError, match=f"picture of 4 tokens .* at token {end} of {len(whole)}, .*={max_length}"):
            encode(processor, CONVERSATION, max_length)


def test_conversation_without_an_answer_left_is_an_error(processor):
    with pytest.raises(DataError, match="no answer within max_length=12"):
        encode(processor, CONVERSATION, max_length=12)


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([], "0 turns"),
        (CONVERSATION[:1], "1 turns"),
        ([CONVERSATION[1], CONVERSATION[0]], "'human' is expected"),
        ([CONVERSATION[0], {"from": "gpt", "value": " "}], "turn 1, an answer, is empty"),
    ],
)
def test_broken_conversations_are_refused(processor, conversation, message):
    with pytest.raises(DataError, match=message):
        encode(processor, conversation)


@pytest.mark.parametrize("answer", ["Yes, 7 dogs.", "Yes </s>"])
def test_ids_that_the_tokenizer_puts_around_every_text_are_kept_and_not_trained(answer):
    from tokenizers.processors import TemplateProcessing

    tokenizer, plain = byte_level(), byte_level()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <unk>", special_tokens=[("<s>", 1), ("<unk>", 0)]
    )
    conversation = turns("Is it?", answer)
    plain_ids, plain_labels = encode_with(plain, "v1", conversation)
    ids, labels = encode_with(tokenizer, "v1", conversation)
    assert ids.tolist() == [1, *plain_ids, 0]
    assert labels.tolist() == [IGNORE_INDEX, *plain_labels, IGNORE_INDEX]


def test_captions_end_with_end_of_text_even_when_cut(processor):
    eos = processor.tokenizer.eos_token_id
    whole, cut = encode_captions(processor.tokenizer, [" A red picture. ", "A red picture with number 7."], 5)
    assert processor.tokenizer.decode(whole) == "A red picture.</s>"
    assert len(cut) == 5
    assert cut[-1] == eos
    assert eos not in cut[:-1]
