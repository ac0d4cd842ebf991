import io

import pytest
import torch
from PIL import Image

from shellv_core.data.conversation import encode_conversation
from shellv_core.errors import EvaluationError, ModelError
from shellv_core.evaluation.answers import Prompt
from shellv_core.evaluation.generator import LlavaGenerator
from shellv_core.models.compose import build_model
from shellv_core.templates import TEMPLATES
from tests.evaluation.tiny_llava import build_tiny_llava, picture
from tests.training.tiny import tiny_model_config

QUESTIONS = ["is there a dog in the image ?", "is there a cat ?", "describe this image .", "a", "there is a bus on it"]


@pytest.fixture(scope="module")
def llava():
    torch.set_num_threads(1)
    return build_tiny_llava()


@pytest.fixture(scope="module")
def images():
    return {f"{index}.png": picture(index) for index in range(6)}


def single_answer(model, processor, image: bytes, text: str, max_new_tokens: int) -> str:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(images=Image.open(io.BytesIO(image)).convert("RGB"), text=prompt, return_tensors="pt")
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_answers_equal_generate_on_single_prompts(llava, images, batch_size):
    prompts = [
        Prompt(name, text, limit) for name in images for text, limit in zip(QUESTIONS, (4, 4, 12, 4, 12), strict=True)
    ]
    answers = LlavaGenerator(*llava, batch_size=batch_size).generate(prompts, images)
    expected = [single_answer(*llava, images[each.image], each.text, each.max_new_tokens) for each in prompts]
    assert answers == expected
    assert len(set(expected)) > 6, "the tiny model must tell images and questions apart"


def test_each_image_is_seen_once(llava, images):
    model, processor = llava
    seen = []
    handle = model.model.vision_tower.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    prompts = [Prompt(name, text, 2) for text in QUESTIONS for name in images]
    LlavaGenerator(model, processor, batch_size=4).generate(prompts, images)
    handle.remove()
    assert sum(seen) == len(images)


def test_image_token_in_a_question_is_refused(llava, images):
    with pytest.raises(EvaluationError, match="renders with 2 image tokens"):
        LlavaGenerator(*llava).generate([Prompt("0.png", "is <image> there", 2)], images)


def test_broken_image_is_named(llava):
    with pytest.raises(EvaluationError, match=r"'x\.png' cannot be decoded"):
        LlavaGenerator(*llava).generate([Prompt("x.png", "a", 2)], {"x.png": b"no picture"})


def test_weights_that_give_nan_are_refused(images):
    model, processor = build_tiny_llava()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        LlavaGenerator(model, processor).generate([Prompt("0.png", "a", 2)], images)


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_begin_what_was_trained_and_answers_end_at_the_end_marker(name):
    config = tiny_model_config().model_copy(update={"template": name})
    model, processor = build_model(config, ["## human: ## assistant: |<end>| USER: [INST] a dog 12"] * 5, seed=0)
    generator = LlavaGenerator(model, processor)
    talk = [{"from": "human", "value": "<image>a dog ?"}, {"from": "gpt", "value": "/yes. a dog"}]
    ids, labels = encode_conversation(processor.tokenizer, talk, processor.image_token_id, 1, 2000, TEMPLATES[name])
    before, behind = generator._split("a dog ?")
    answer = labels[labels >= 0].tolist()
    assert [*before, processor.image_token_id, *behind, *answer] == ids.tolist()
    assert generator._decode_tokens([*answer, *answer], set(generator.stop_ids.tolist())) == "/yes. a dog"
