import json

import pytest
import torch

from shellv_core.errors import EvaluationError, ModelError
from shellv_core.evaluation.answers import Prompt
from shellv_core.evaluation.choosing import Sampling
from shellv_core.evaluation.generator import LlavaGenerator
from shellv_core.evaluation.transformers_generator import TransformersGenerator, load_generator
from tests.evaluation.test_generator import QUESTIONS, answers_of
from tests.evaluation.tiny_llava import build_tiny_llava, picture, save_tiny_llava

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llava():
    torch.set_num_threads(1)
    return build_tiny_llava()


@pytest.fixture(scope="module")
def images():
    return {f"{index}.png": picture(index) for index in range(4)}


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.3, top_p=0.95, seed=3)])
def test_any_batch_says_what_the_fast_generator_says(llava, images, sampling):
    prompts = [Prompt(image, text, limit) for image in ("", *images) for text in QUESTIONS for limit in (3, 7)]
    expected = answers_of(LlavaGenerator(*llava, sampling=sampling), prompts, images)
    for batch_size in (1, 4):
        assert answers_of(TransformersGenerator(*llava, batch_size, sampling), prompts, images) == expected
    assert len(set(expected)) > 8


def test_what_is_answered_is_left_out(llava, images):
    prompts = [Prompt("0.png", text, 3) for text in QUESTIONS]
    whole = list(TransformersGenerator(*llava, 2).generate([prompts], images))
    rest = list(TransformersGenerator(*llava, 2).generate([prompts], images, set(whole[0]) | {next(iter(whole[1]))}))
    assert rest == whole[1:]


def save_text_model(folder, template="{% for m in messages %}{{ m['content'] }} {% endfor %}"):
    from transformers import LlamaConfig, LlamaForCausalLM

    _, processor = build_tiny_llava()
    tokenizer = processor.tokenizer
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.5, eos_token_id=2, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def test_a_language_model_answers_without_pictures(tmp_path):
    save_text_model(tmp_path)
    generator = load_generator(tmp_path, CPU, torch.float32, 3, Sampling())
    prompts = [Prompt("", text, 5) for text in QUESTIONS]
    answers = answers_of(generator, prompts, {})
    assert answers == answers_of(load_generator(tmp_path, CPU, torch.float32, 1, Sampling()), prompts, {})
    assert len(set(answers)) > 2
    with pytest.raises(EvaluationError, match="takes no images"):
        answers_of(generator, [Prompt("0.png", "a", 2)], {"0.png": b""})


def test_directories(tmp_path):
    save_tiny_llava(tmp_path / "llava")
    assert isinstance(load_generator(tmp_path / "llava", CPU, torch.float32, 3, Sampling()), LlavaGenerator)
    with pytest.raises(ModelError, match="holds no model"):
        load_generator(tmp_path, CPU, torch.float32, 3, Sampling())
    save_text_model(tmp_path / "text", template=None)
    with pytest.raises(ModelError, match="no chat template"):
        load_generator(tmp_path / "text", CPU, torch.float32, 3, Sampling())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_llama"}))
    with pytest.raises(ModelError, match="shellv model import"):
        load_generator(tmp_path, CPU, torch.float32, 3, Sampling())
