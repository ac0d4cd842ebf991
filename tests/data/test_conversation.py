import numpy as np
import pytest

from shellv_core.data.conversation import (
    IGNORE_INDEX,
    encode_captions,
    encode_conversation,
    render_conversation,
)
from shellv_core.errors import DataError
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


@pytest.fixture(scope="module")
def processor():
    return tiny_model()[1]


def encode(processor, conversation, max_length=200):
    return encode_conversation(processor.tokenizer, conversation, processor.image_token_id, 4, max_length)


def test_text_is_what_the_chat_template_renders(processor):
    rendered = render_conversation(CONVERSATION, processor.tokenizer.eos_token)
    assert rendered.text == processor.apply_chat_template(MESSAGES)
    assert rendered.text == (
        "USER: <image>\nIs there a dog? ASSISTANT: Yes, 7 dogs.</s>USER: Where? ASSISTANT: (left)\nand right</s>"
    )


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


def test_long_conversation_is_cut(processor):
    whole, _ = encode(processor, CONVERSATION)
    cut, labels = encode(processor, CONVERSATION, max_length=len(whole) - 5)
    assert cut.tolist() == whole[:-5].tolist()
    assert len(labels) == len(cut)


def test_conversation_without_an_answer_left_is_an_error(processor):
    with pytest.raises(DataError, match="no answer within max_length=6"):
        encode(processor, CONVERSATION, max_length=6)


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


def test_begin_of_text_of_the_tokenizer_is_kept(processor):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_model()[1].tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", tokenizer.pad_token_id)]
    )
    input_ids, labels = encode_conversation(tokenizer, CONVERSATION, processor.image_token_id, 4, 200)
    plain_ids, plain_labels = encode(processor, CONVERSATION)
    assert input_ids.tolist() == [tokenizer.pad_token_id, *plain_ids]
    assert labels.tolist() == [IGNORE_INDEX, *plain_labels]


def test_captions_end_with_end_of_text_even_when_cut(processor):
    eos = processor.tokenizer.eos_token_id
    whole, cut = encode_captions(processor.tokenizer, [" A red picture. ", "A red picture with number 7."], 5)
    assert processor.tokenizer.decode(whole) == "A red picture.</s>"
    assert len(cut) == 5
    assert cut[-1] == eos
    assert eos not in cut[:-1]
