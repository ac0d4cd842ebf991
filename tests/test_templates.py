import random
from dataclasses import replace

import pytest

from shellv_core.config import build_config
from shellv_core.errors import ConfigError, DataError
from shellv_core.models.config import ModelConfig
from shellv_core.templates import (
    DEFAULT_TEMPLATE,
    TEMPLATES,
    add_template_tokens,
    special_tokens,
    template_named,
    template_of,
)
from tests.data.tiny_tokenizers import KINDS, byte_level

ROUNDS = [("What?", "A dog."), ("Where?", "Left.")]
TEXTS = {
    "v1_no_system": "USER: <image>\nWhat? ASSISTANT: A dog.</s>USER: Where? ASSISTANT: Left.</s>",
    "v1": "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful,"
    " detailed, and polite answers to the user's questions. USER: <image>\nWhat? ASSISTANT: A dog.</s>USER: Where?"
    " ASSISTANT: Left.</s>",
    "llama_2": "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the visual"
    " content that the user provides, and assist the user with a variety of tasks using natural language.\n<</SYS>>\n\n"
    "<image>\nWhat? [/INST] A dog. </s><s>[INST] Where? [/INST] Left. </s>",
    "mistral_instruct": "[INST] <image>\nWhat? [/INST] A dog. </s>[INST] Where? [/INST] Left. </s>",
    "chatml": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhat?<|im_end|>"
    "<|im_start|>assistant\nA dog.<|im_end|><|im_start|>user\nWhere?<|im_end|><|im_start|>assistant\nLeft.<|im_end|>",
    "plain": "<image>A dog.\n</s>",
    "shellv": "## system:You are a helpful assistant. Please ensure that your responses are helpful, detailed, and"
    " polite. \n </s>## huaman:<image>\nWhat?</s>## assistant:A dog.</s>## huaman:Where?</s>## assistant:Left.</s>",
    "codeshell_chat": "</s>## human:<image>\nWhat? |<end>| ## assistant:A dog. |<end>| ## human:Where? |<end>| "
    "## assistant:Left. |<end>| ",
}


def conversation(rounds, image=True):
    turns = []
    for index, (question, answer) in enumerate(rounds):
        asked = f"<image>\n{question}" if image and not index else question
        turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return turns


def messages(rounds, image=True):
    result = []
    for index, (question, answer) in enumerate(rounds):
        content = [{"type": "image"}] * (image and not index) + [{"type": "text", "text": question}]
        result += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return result


def text(template, turns):
    return "".join(part.text for part in template.render(turns))


@pytest.fixture(scope="module", params=TEMPLATES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer():
    return KINDS["bos"]()


def rounds_for(name, rounds=ROUNDS):
    return rounds[:1] if TEMPLATES[name].caption_only else rounds


def test_texts(name, tokenizer):
    assert set(TEXTS) == set(TEMPLATES)
    assert text(TEMPLATES[name].bound(tokenizer), conversation(rounds_for(name))) == TEXTS[name]


def test_chat_template_renders_the_training_text_and_its_prompt_begins_it(name, tokenizer):
    template = TEMPLATES[name].bound(tokenizer)
    chat_template = template.chat_template()
    rng = random.Random(0)
    alphabet = [
        *"ab .,'\"\\{}%#|<>\n\t:/-1",
        "狗",
        "👍🏽",
        "é",
        "</s>",
        "<s>",
        "|<end>|",
        "{{ x }}",
        "{eos}",
        "@name@",
        "\r",
    ]
    for _ in range(40):
        rounds = [
            ("".join(rng.choices(alphabet, k=rng.randrange(12))), "a" + "".join(rng.choices(alphabet, k=9)))
            for _ in range(rng.randint(1, 4))
        ]
        rounds, image = rounds_for(name, rounds), rng.random() < 0.5
        expected = text(template, conversation(rounds, image))
        chat = messages(rounds, image)
        render = {"chat_template": chat_template, "tokenize": False}
        assert tokenizer.apply_chat_template(chat, **render) == expected
        prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, **render)
        assert prompt + template.answer_open + rounds[-1][1].strip() + template.end == expected


def test_system_message_takes_the_place_of_the_default(name, tokenizer):
    template = TEMPLATES[name].bound(tokenizer)
    chat = [{"role": "system", "content": " Be kind. "}, *messages(ROUNDS[:1], image=False)]

    def render():
        return tokenizer.apply_chat_template(chat, chat_template=template.chat_template(), tokenize=False)

    if template.system_open is None:
        with pytest.raises(Exception, match=f"template {name} has no system messages"):
            render()
    else:
        assert render() == text(replace(template, system="Be kind."), conversation(ROUNDS[:1], image=False))


def test_unknown_role_is_refused(name, tokenizer):
    template = TEMPLATES[name].bound(tokenizer).chat_template()
    with pytest.raises(Exception, match="role 'robot' is unknown"):
        tokenizer.apply_chat_template([{"role": "robot", "content": "x"}], chat_template=template, tokenize=False)


def test_chat_template_names_its_template(name, tokenizer):
    class Processor:
        chat_template = TEMPLATES[name].bound(tokenizer).chat_template()

    assert template_of(Processor) == TEMPLATES[name]
    Processor.chat_template = replace(TEMPLATES[name], image_open="<im_start>", image_close="<im_end>").chat_template()
    assert template_of(Processor) == replace(TEMPLATES[name], image_open="<im_start>", image_close="<im_end>")


def test_chat_template_without_a_record_is_the_default():
    class Processor:
        chat_template = "{{ messages }}"

    assert template_of(Processor).name == DEFAULT_TEMPLATE
    Processor.chat_template = None
    assert template_of(Processor).name == DEFAULT_TEMPLATE


def test_unknown_template_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="unknown conversation template 'shelv'; did you mean 'shellv'"):
        template_named("shelv")
    with pytest.raises(ConfigError, match=r"template.*'v2'"):
        build_config(ModelConfig, {"template": "v2"})
    assert ModelConfig().template == DEFAULT_TEMPLATE == "v1_no_system"


def test_rounds_follow_each_other_where_begin_and_end_of_text_are_one():
    tokenizer = byte_level()
    tokenizer.bos_token = "</s>"
    assert "A dog. </s>[INST] Where?" in text(TEMPLATES["llama_2"].bound(tokenizer), conversation(ROUNDS))


def test_tokens_around_the_image():
    template = replace(TEMPLATES["v1_no_system"], image_open="<im_start>", image_close="<im_end>")
    assert text(template, conversation(ROUNDS[:1])).startswith("USER: <im_start><image><im_end>\nWhat?")
    assert template.special_tokens == ("<im_start>", "<im_end>")
    tokenizer = byte_level()
    size, before = len(tokenizer), special_tokens(tokenizer)
    add_template_tokens(tokenizer, template)
    add_template_tokens(tokenizer, template)
    assert special_tokens(tokenizer) - before == {"<im_start>", "<im_end>"}
    assert len(tokenizer) == size + 2


def test_plain_takes_one_round():
    with pytest.raises(DataError, match="4 turns; the template 'plain' takes one question and one answer"):
        TEMPLATES["plain"].render(conversation(ROUNDS))


def test_learned_texts_hold_the_words_of_the_template_and_no_special_token():
    turns = conversation(ROUNDS)
    assert [TEMPLATES["v1_no_system"].learned_text(turn) for turn in turns[:2]] == ["USER: What?", " ASSISTANT: A dog."]
    assert [TEMPLATES["chatml"].learned_text(turn) for turn in turns[:2]] == ["user\nWhat?", "assistant\nA dog."]
    assert TEMPLATES["shellv"].learned_text(turns[1]) == "## assistant:A dog."
