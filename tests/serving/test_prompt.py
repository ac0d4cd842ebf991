from __future__ import annotations

from functools import cache

import pytest
from PIL import Image

from shellv_core.data.conversation import IGNORE_INDEX, encode_conversation
from shellv_core.serving.engine import ImagePart, Message, RequestError, TextPart
from shellv_core.serving.prompt import PromptEncoder
from shellv_core.templates import TEMPLATES
from tests.training.tiny import tiny_model_config

RED = Image.new("RGB", (50, 40), "red")


def user(*parts):
    return Message("user", tuple(TextPart(part) if isinstance(part, str) else ImagePart(part) for part in parts))


@cache
def processor_with(name):
    """A processor with the template `name`, and tokens such as ``:/`` and ``</`` that reach across what is joined."""
    from shellv_core.models.compose import build_model

    config = tiny_model_config().model_copy(update={"template": name})
    texts = ["## human: ## assistant:/root |<end>| USER: [INST] a dog 12 </p> </b> x</i>"] * 5
    return build_model(config, texts, seed=0)[1]


def reference(processor, conversation, images):
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    return processor(text=text, images=images or None, return_tensors="pt")


@pytest.mark.parametrize(
    "text", ["what is in this picture ?", "  spaces around \n", "{{ 7 * 7 }} {% raw %}", "你好 🐈"]
)
def test_ordinary_text_is_encoded_as_the_processor_does(processor, text):
    prompt = PromptEncoder(processor).encode([user(RED, text)])
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    expected = reference(processor, conversation, [RED])
    assert prompt.token_ids == expected["input_ids"][0].tolist()
    assert prompt.pixel_values.equal(expected["pixel_values"])


def test_several_turns_and_pictures_keep_their_order(processor):
    blue = Image.new("RGB", (60, 60), "blue")
    messages = [user(RED, "one"), Message("assistant", (TextPart("a cat"),)), user("two", blue)]
    conversation = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "one"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
        {"role": "user", "content": [{"type": "text", "text": "two"}, {"type": "image"}]},
    ]
    expected = reference(processor, conversation, [RED, blue])
    prompt = PromptEncoder(processor).encode(messages)
    assert prompt.token_ids == expected["input_ids"][0].tolist()
    assert prompt.pixel_values.equal(expected["pixel_values"])


@pytest.mark.parametrize(
    "text", ["</s>", "<image>", "a <image> b </s> USER: <s>", "<image>" * 50, "<ima<image>ge>", "<", "</s"]
)
@pytest.mark.parametrize("images", [[], [RED]])
def test_special_tokens_in_text_are_text(processor, text, images):
    tokenizer = processor.tokenizer
    encoder = PromptEncoder(processor)
    token_ids = encoder.encode([user(*images, text)]).token_ids
    harmless = encoder.encode([user(*images, "x")]).token_ids

    def special(ids):
        return [each for each in ids if each in tokenizer.all_special_ids]

    assert special(token_ids) == special(harmless)
    assert tokenizer.decode([each for each in token_ids if each not in special(token_ids)]).count(text) == 1


def test_a_conversation_that_the_template_refuses(processor):
    with pytest.raises(RequestError, match="no system messages"):
        PromptEncoder(processor).encode([Message("system", (TextPart("be kind"),)), user("hello")])


@pytest.mark.parametrize("tower", ["EFFICIENTNET", "CLIP"])
def test_prompts_are_what_the_model_was_trained_on(tower):
    import numpy as np

    from shellv_core.data.conversation import encode_conversation
    from shellv_core.models.compose import num_image_tokens
    from tests.training import tiny

    model, processor = tiny.tiny_model(getattr(tiny, tower))
    question = "What is in this picture?"
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "A red square."}]
    token_id, count = model.config.image_token_index, num_image_tokens(model)
    input_ids, labels = encode_conversation(processor.tokenizer, turns, token_id, count, 256)
    prompt = PromptEncoder(processor).encode([user(RED, question)])
    assert prompt.token_ids == input_ids[: np.argmax(labels != -100)].tolist()
    assert prompt.token_ids.count(token_id) == count


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("question", ["Where is it? ", "/root </s> |<end>| <image>", "狗 👍🏽"])
@pytest.mark.parametrize("answer", ["yes </s> it is", "/root", "yes"])
def test_prompt_begins_what_was_trained(name, question, answer):
    """Prompts, with special tokens' texts and a turn before, are the ids up to the answer of a training example."""
    processor = processor_with(name)
    template = TEMPLATES[name]
    image, num_image_tokens = processor.image_token_id, 4
    asked = question.replace("<image>", "<image >")  # in training data this is the picture
    talk = [{"from": "human", "value": f"<image>{asked}"}, {"from": "gpt", "value": answer}]
    messages = [user(RED, asked)]
    if not template.caption_only:
        talk += [{"from": "human", "value": asked}, {"from": "gpt", "value": "yes"}]
        messages += [Message("assistant", (TextPart(answer),)), user(asked)]
    ids, labels = encode_conversation(processor.tokenizer, talk, image, num_image_tokens, 2000, template)
    trained = labels != IGNORE_INDEX
    (*_, last_answer) = (trained[1:] & ~trained[:-1]).nonzero()[0] + 1
    assert PromptEncoder(processor).encode(messages).token_ids == ids[:last_answer].tolist()
