import io

import pytest
import torch
from PIL import Image

from shellv_core.data.conversation import encode_conversation
from shellv_core.errors import EvaluationError, ModelError
from shellv_core.evaluation.answers import Prompt
from shellv_core.evaluation.choosing import Sampling, TokenChooser
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


def answers_of(generator, prompts, images, answered=()):
    replies = {}
    for batch in generator.generate([prompts], images, answered):
        replies |= batch
    return [replies[prompt].text for prompt in prompts]


def single_answer(model, processor, image: bytes | None, text: str, max_new_tokens: int) -> str:
    picture_part = [] if image is None else [{"type": "image"}]
    messages = [{"role": "user", "content": [*picture_part, {"type": "text", "text": text}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    shown = None if image is None else Image.open(io.BytesIO(image)).convert("RGB")
    inputs = processor(images=shown, text=prompt, return_tensors="pt")
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_answers_equal_generate_on_single_prompts(llava, images, batch_size):
    prompts = [
        Prompt(name, text, limit) for name in images for text, limit in zip(QUESTIONS, (4, 4, 12, 4, 12), strict=True)
    ]
    answers = answers_of(LlavaGenerator(*llava, batch_size=batch_size), prompts, images)
    expected = [single_answer(*llava, images[each.image], each.text, each.max_new_tokens) for each in prompts]
    assert answers == expected
    assert len(set(expected)) > 6, "the tiny model must tell images and questions apart"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_questions_without_an_image_are_answered_beside_the_others(llava, images, batch_size):
    prompts = [Prompt(image, text, 8) for text in QUESTIONS for image in ("", "0.png")]
    answers = answers_of(LlavaGenerator(*llava, batch_size=batch_size), prompts, images)
    expected = [single_answer(*llava, images.get(each.image), each.text, 8) for each in prompts]
    assert answers == expected


def test_samples_depend_on_the_seed_and_not_on_the_batch(llava, images):
    prompts = [Prompt(name, text, 6) for name in images for text in QUESTIONS]

    def sampled(seed, batch_size, prompts=prompts, top_p=0.9):
        sampling = Sampling(temperature=1.5, top_p=top_p, seed=seed)
        return answers_of(LlavaGenerator(*llava, batch_size, sampling), prompts, images)

    first = sampled(1, 64)
    assert sampled(1, 1) == sampled(1, 4) == first
    assert sampled(1, 64, prompts[3:7]) == first[3:7]
    assert sum(a != b for a, b in zip(first, sampled(2, 64), strict=True)) > len(prompts) / 2
    greedy = answers_of(LlavaGenerator(*llava), prompts, images)
    assert sampled(1, 64, top_p=1e-6) == greedy
    assert first != greedy


def test_sampled_shares_are_those_of_the_model():
    logits = torch.log(torch.tensor([0.1, 0.2, 0.7]))
    prompts = [Prompt("", str(number), 1) for number in range(4000)]
    tokens = TokenChooser(Sampling(temperature=1.0), prompts)(logits.expand(len(prompts), -1))
    shares = torch.bincount(tokens, minlength=3) / len(prompts)
    assert torch.allclose(shares, logits.exp(), atol=0.03)
    kept = TokenChooser(Sampling(temperature=1.0, top_p=0.75), prompts)(logits.expand(len(prompts), -1))
    assert set(kept.tolist()) == {1, 2}


def test_what_is_answered_is_left_out_and_the_rest_stays_the_same(llava, images):
    prompts = [Prompt(name, text, 6) for name in images for text in QUESTIONS]
    whole = list(LlavaGenerator(*llava, batch_size=4).generate([prompts[:20], prompts[20:]], images))
    known = {prompt for batch in whole[:3] for prompt in batch} | {next(iter(whole[5]))}
    rest = list(LlavaGenerator(*llava, batch_size=4).generate([prompts[:20], prompts[20:]], images, known))
    assert rest == whole[3:], "a batch with a prompt to be answered runs whole"


def test_each_image_is_seen_once(llava, images):
    model, processor = llava
    seen = []
    handle = model.model.vision_tower.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    prompts = [Prompt(name, text, 2) for text in QUESTIONS for name in images]
    answers_of(LlavaGenerator(model, processor, batch_size=4), prompts, images)
    handle.remove()
    assert sum(seen) == len(images)


def test_image_token_in_a_question_is_refused(llava, images):
    with pytest.raises(EvaluationError, match="renders with 2 image tokens"):
        answers_of(LlavaGenerator(*llava), [Prompt("0.png", "is <image> there", 2)], images)


def test_broken_image_is_named(llava):
    with pytest.raises(EvaluationError, match=r"'x\.png' cannot be decoded"):
        answers_of(LlavaGenerator(*llava), [Prompt("x.png", "a", 2)], {"x.png": b"no picture"})


def test_weights_that_give_nan_are_refused(images):
    model, processor = build_tiny_llava()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        answers_of(LlavaGenerator(model, processor), [Prompt("0.png", "a", 2)], images)


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_begin_what_was_trained_and_answers_end_at_the_end_marker(name):
    config = tiny_model_config().model_copy(update={"template": name})
    model, processor = build_model(config, ["## human: ## assistant: |<end>| USER: [INST] a dog 12"] * 5, seed=0)
    generator = LlavaGenerator(model, processor)
    talk = [{"from": "human", "value": "<image>a dog ?"}, {"from": "gpt", "value": "/yes. a dog"}]
    ids, labels = encode_conversation(processor.tokenizer, talk, processor.image_token_id, 1, 2000, TEMPLATES[name])
    before, behind = generator._split(Prompt("0.png", "a dog ?", 2))
    answer = labels[labels >= 0].tolist()
    assert [*before, processor.image_token_id, *behind, *answer] == ids.tolist()
    assert generator._decode_tokens([*answer, *answer], set(generator.stop_ids.tolist())) == "/yes. a dog"
