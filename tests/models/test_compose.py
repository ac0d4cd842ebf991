import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor

from shellv_core.config import build_config
from shellv_core.errors import ConfigError, ModelError
from shellv_core.models.compose import build_model, calibrate_vision_tower, load_model, save_model
from shellv_core.models.config import LanguageModelConfig, ModelConfig, TokenizerConfig, VisionTowerConfig
from shellv_core.templates import IMAGE_TOKEN, TEMPLATES, special_tokens, template_of
from tests.data.tiny_tokenizers import REAL
from tests.training.tiny import CLIP, EFFICIENTNET, LANGUAGE_MODEL, tiny_model, tiny_model_config

FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
TIED = LANGUAGE_MODEL.model_copy(update={"tie_word_embeddings": True})
LLAMA = LANGUAGE_MODEL.model_copy(update={"model_type": "llama"})
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which color is it?"}]}]


def inputs(processor):
    text = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    return processor(images=Image.new("RGB", (50, 30), (200, 10, 10)), text=text, return_tensors="pt")


@pytest.mark.parametrize("language_model", [LANGUAGE_MODEL, TIED, LLAMA], ids=["untied", "tied", "llama"])
def test_files_have_the_names_that_vllm_reads(tmp_path, language_model):
    """However the model came: built, or loaded from files with or without "vision_model" in their names."""
    model, processor = tiny_model(CLIP, language_model)
    save_model(model, processor, tmp_path / "built")
    model.save_pretrained(tmp_path / "short", save_original_format=False)
    processor.save_pretrained(tmp_path / "short")
    weights = load_file(tmp_path / "built" / "model.safetensors")
    parts = {"language_model.model.", "language_model.lm_head.", "multi_modal_projector.", "vision_tower.vision_model."}
    found = {next(part for part in parts if name.startswith(part)) for name in weights}
    assert found == parts - ({"language_model.lm_head."} if language_model is TIED else set())
    assert not [name for name in load_file(tmp_path / "short" / "model.safetensors") if "vision_model" in name]
    for form in ("built", "short"):
        save_model(*load_model(tmp_path / form), tmp_path / "again" / form)
        again = load_file(tmp_path / "again" / form / "model.safetensors")
        assert again.keys() == weights.keys()
        assert all(torch.equal(again[name], weights[name]) for name in weights)


@pytest.mark.parametrize("language_model", [LANGUAGE_MODEL, TIED, LLAMA], ids=["untied", "tied", "llama"])
@pytest.mark.parametrize("vision_tower", [EFFICIENTNET, CLIP], ids=["efficientnet", "clip"])
def test_saved_model_comes_back_equal(tmp_path, vision_tower, language_model):
    model, processor = tiny_model(vision_tower, language_model)
    save_model(model, processor, tmp_path)
    own_source = {"efficientnet_lite.py"} if vision_tower is EFFICIENTNET else set()
    assert {path.name for path in tmp_path.iterdir()} == FILES | own_source

    loaded, loaded_processor = load_model(tmp_path)
    assert type(loaded).__name__ == "LlavaForConditionalGeneration"
    batch = inputs(processor)
    assert inputs(loaded_processor)["input_ids"].tolist() == batch["input_ids"].tolist()
    assert (inputs(loaded_processor)["input_ids"] == loaded.config.image_token_id).sum() == 4
    with torch.no_grad():
        logits = model(**batch).logits
        assert torch.equal(loaded(**batch).logits, logits)
    assert logits.std() > 0.01
    for config in (loaded.config, loaded.config.text_config):
        assert config.tie_word_embeddings == language_model.tie_word_embeddings
    tied = loaded.lm_head.weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()
    assert tied == language_model.tie_word_embeddings


@pytest.mark.parametrize("name", TEMPLATES)
def test_model_directory_carries_its_conversation_template(tmp_path, name):
    config = tiny_model_config().model_copy(update={"template": name})
    model, processor = build_model(config, ["a dog", "USER: ## assistant: user\n"], seed=0)
    save_model(model, processor, tmp_path)

    plain = AutoProcessor.from_pretrained(tmp_path)
    assert template_of(plain) == TEMPLATES[name]
    text = plain.apply_chat_template(QUESTION, add_generation_prompt=True)
    asked = [{"from": "human", "value": "<image>Which color is it?"}, {"from": "gpt", "value": "red"}]
    template = TEMPLATES[name].bound(plain.tokenizer)
    assert text + template.answer_open + "red" + template.end == "".join(part.text for part in template.render(asked))
    ends = load_model(tmp_path)[0].generation_config.eos_token_id
    if name == "chatml":
        assert ends == [plain.tokenizer.eos_token_id, plain.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    else:
        assert ends == plain.tokenizer.eos_token_id


def test_same_seed_same_model_and_random_state_untouched():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = tiny_model()[0].state_dict()
    assert torch.equal(torch.rand(1), expected)
    second = tiny_model()[0].state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build_model(tiny_model_config(), ["text"], seed=1)[0].state_dict()
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_same_texts_same_tokenizer():
    programs = [
        "from shellv_core.models.tokenizer import train_tokenizer;"
        "print(train_tokenizer(['a dog and a cat'] * 5 + ['two dogs', 'cats'] * 3, 300).backend_tokenizer.to_str())"
    ] * 2
    root = Path(__file__).resolve().parents[2]
    outputs = {
        subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=root, check=True).stdout
        for program in programs
    }
    assert len(outputs) == 1


@pytest.mark.parametrize("name", ["linear", "mlp1x_gelu"])
def test_a_linear_projector_is_one_linear_layer(name):
    """As LLaVA's: in the stock class the second layer is the identity, and no training moves it."""
    from shellv_core.models.config import LoraConfig
    from shellv_core.models.lora import add_lora
    from shellv_core.training.config import TrainingConfig
    from shellv_core.training.loop import set_trainable
    from shellv_core.training.model import TrainingModel

    config = tiny_model_config().model_copy(update={"projector": name})
    model, _ = build_model(config, ["text"])
    projector = model.model.multi_modal_projector
    x = torch.randn(3, projector.linear_1.in_features)
    with torch.no_grad():
        assert torch.equal(projector(x), projector.linear_1(x))
    assert projector.linear_1.weight.std() > 0
    set_trainable(TrainingModel(model), TrainingConfig())
    trained = [each for each, parameter in projector.named_parameters() if parameter.requires_grad]
    assert trained == ["linear_1.weight", "linear_1.bias"]
    adapted = add_lora(model, LoraConfig())
    trained = {
        each for each, parameter in adapted.named_parameters() if parameter.requires_grad and "lora_" not in each
    }
    assert {each.split("default.")[1] for each in trained} == {"linear_1.weight", "linear_1.bias"}


SIGLIP = VisionTowerConfig(
    kind="siglip",
    pretrained=None,
    standardize=False,
    image_size=28,
    feature_layer=-2,
    options=CLIP.options,
)


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("layer", [-1, -3])
def test_any_layer_of_clip_with_and_without_its_class_token(tmp_path, layer, strategy):
    vision_tower = CLIP.model_copy(update={"feature_layer": layer, "select_strategy": strategy})
    model, processor = tiny_model(vision_tower)
    save_model(model, processor, tmp_path)
    model, processor = load_model(tmp_path)
    batch = inputs(processor)
    count = 4 + (strategy == "full")
    assert (batch["input_ids"] == model.config.image_token_id).sum() == count == model.config.image_seq_length
    tower = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True)
    expected = model.model.multi_modal_projector(tower.hidden_states[layer][:, strategy == "default" :])
    torch.testing.assert_close(torch.cat(model.get_image_features(batch["pixel_values"]).pooler_output), expected[0])
    assert model.generate(**batch, max_new_tokens=3).shape[1] == batch["input_ids"].shape[1] + 3


def test_siglip_has_no_class_token_and_its_own_pixels(tmp_path):
    model, processor = tiny_model(SIGLIP)
    save_model(model, processor, tmp_path)
    loaded, processor = load_model(tmp_path)
    assert type(loaded.model.vision_tower).__name__ == "SiglipVisionModel"
    assert list(processor.image_processor.image_mean) == list(processor.image_processor.image_std) == [0.5] * 3
    batch = inputs(processor)
    assert (batch["input_ids"] == loaded.config.image_token_id).sum() == 4
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    loaded.model.vision_tower.save_pretrained(tmp_path / "tower")
    again = SIGLIP.model_copy(update={"pretrained": str(tmp_path / "tower"), "options": {}})
    built, _ = tiny_model(again)
    expected = model.model.vision_tower.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in built.model.vision_tower.state_dict().items())


def test_start_and_end_tokens_around_an_image(tmp_path):
    config = tiny_model_config(CLIP).model_copy(update={"image_start_end": True})
    model, processor = build_model(config, ["a dog"], seed=0)
    save_model(model, processor, tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert template_of(processor) == config.conversation_template
    ids = inputs(processor)["input_ids"][0].tolist()
    start = ids.index(processor.tokenizer.convert_tokens_to_ids("<im_start>"))
    assert ids[start + 1 : start + 5] == [model.config.image_token_id] * 4
    assert ids[start + 5] == processor.tokenizer.convert_tokens_to_ids("<im_end>")
    assert len(model.get_input_embeddings().weight) == len(processor.tokenizer)


def test_missing_and_extra_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model, processor = tiny_model()
    save_model(model, processor, tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    name = next(key for key in weights if key.endswith("multi_modal_projector.linear_1.weight"))
    save_file({key: value for key, value in weights.items() if key != name}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing_keys.*linear_1"):
        load_model(tmp_path)
    save_file({**weights, "stray.weight": torch.zeros(1)}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"unexpected_keys.*stray"):
        load_model(tmp_path)
    save_file({**weights, name: torch.zeros(3, 3)}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="linear_1"):
        load_model(tmp_path)


def test_no_model_there(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"language_model": LanguageModelConfig(model_type="starcoder3")}, "did you mean 'starcoder2'"),
        ({"language_model": LanguageModelConfig(options={"hiden_size": 8})}, "did you mean 'hidden_size'"),
        ({"language_model": LanguageModelConfig(options={"hidden_size": "big"})}, "hidden_size"),
        ({"language_model": LanguageModelConfig(model_type="clip_vision_model")}, "unknown|no causal language model"),
        ({"vision_tower": VisionTowerConfig(pretrained=None, options={"feature_stages": [9]})}, "feature_stages"),
        ({"vision_tower": VisionTowerConfig(pretrained=None, image_size=100)}, "multiple of 32"),
        (
            {
                "language_model": LanguageModelConfig(model_type="llama", pretrained="/nowhere"),
                "tokenizer": TokenizerConfig(pretrained="/nowhere"),
            },
            "tokenizer '/nowhere' is not available here",
        ),
        (
            {"vision_tower": VisionTowerConfig(kind="clip", pretrained="/nowhere", standardize=False)},
            "vision tower '/nowhere' is not available here",
        ),
    ],
)
def test_impossible_models_are_refused(part, message):
    config = tiny_model_config().model_copy(update=part)
    with pytest.raises(ModelError, match=message):
        build_model(config, ["text"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vision_tower": {"kind": "clip", "standardize": False}}, "imagenet"),
        ({"vision_tower": {"kind": "clip", "pretrained": None}}, "standardize"),
        ({"vision_tower": {"select_strategy": "default"}}, "no class token"),
        ({"language_model": {"pretrained": "x"}}, "needs its tokenizer"),
        ({"language_model": {"pretrained": "x", "options": {"a": 1}}, "tokenizer": {"pretrained": "x"}}, "options"),
        ({"vision_tower": {"knd": "clip"}}, "did you mean 'kind'"),
        (
            {
                "vision_tower": {
                    "kind": "siglip",
                    "pretrained": None,
                    "standardize": False,
                    "select_strategy": "default",
                }
            },
            "siglip tower has no class token",
        ),
        ({"projector": "mlp3x_gelu"}, "two linear layers.*linear, mlp1x_gelu, mlp2x_gelu"),
        ({"projector": "mlp2_gelu"}, "did you mean 'mlp2x_gelu'"),
    ],
)
def test_contradicting_settings_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        build_config(ModelConfig, values)


def test_pretrained_parts_are_taken_over(tmp_path):
    source, processor = tiny_model(CLIP, LLAMA)
    from transformers import LlamaForCausalLM

    language_model = LlamaForCausalLM(source.config.text_config)
    language_model.save_pretrained(tmp_path / "language")
    processor.tokenizer.save_pretrained(tmp_path / "language")
    source.model.vision_tower.save_pretrained(tmp_path / "tower")
    config = ModelConfig(
        vision_tower=VisionTowerConfig(
            kind="clip",
            pretrained=str(tmp_path / "tower"),
            image_size=28,
            feature_layer=-2,
            select_strategy="default",
            standardize=False,
        ),
        language_model=LanguageModelConfig(model_type="llama", pretrained=str(tmp_path / "language")),
        tokenizer=TokenizerConfig(pretrained=str(tmp_path / "language")),
    )
    model, _ = build_model(config)
    for built, original in (
        (model.model.vision_tower, source.model.vision_tower),
        (model.model.language_model, language_model.model),
        (model.lm_head, language_model.lm_head),
    ):
        expected = original.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in built.state_dict().items())
    save_model(model, processor, tmp_path / "model")
    load_model(tmp_path / "model")
    wrong = config.model_copy(update={"language_model": LanguageModelConfig(pretrained=str(tmp_path / "language"))})
    with pytest.raises(ModelError, match=r"'starcoder2', but .* is a 'llama'"):
        build_model(wrong)


def test_calibration_standardizes_each_channel(tmp_path):
    model, processor = tiny_model(EFFICIENTNET.model_copy(update={"standardize": True}))
    pictures = torch.randn(6, 3, 64, 64)
    calibrate_vision_tower(model, [pictures[:4], pictures[4:]])
    tokens = model.model.vision_tower(pictures).last_hidden_state.flatten(0, 1)
    torch.testing.assert_close(tokens.mean(0), torch.zeros(tokens.shape[1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(tokens.std(0), torch.ones(tokens.shape[1]), atol=1e-3, rtol=0)
    save_model(model, processor, tmp_path)
    assert torch.equal(load_model(tmp_path)[0].model.vision_tower.feature_mean, model.model.vision_tower.feature_mean)
    with pytest.raises(ModelError, match="no training picture"):
        calibrate_vision_tower(model, [])
    with pytest.raises(ModelError, match="CLIPVisionModel cannot standardize"):
        calibrate_vision_tower(tiny_model(CLIP)[0], [pictures])


STRANGER = """
import json, sys
try:
    import shellv_core
    sys.exit("shellv_core can be imported here, so this shows nothing")
except ModuleNotFoundError:
    pass
directory, picture, registration = sys.argv[1:]
if registration:
    sys.path.insert(0, directory)
    import efficientnet_lite
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(directory)
processor = AutoProcessor.from_pretrained(directory)
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which color is it?"}]}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=Image.open(picture), text=text, return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1]:]
print(json.dumps(ids.tolist()))
"""


@pytest.mark.parametrize("vision_tower", [EFFICIENTNET, CLIP], ids=["efficientnet", "clip"])
def test_model_answers_in_a_process_without_this_project(tmp_path, vision_tower):
    model, processor = tiny_model(vision_tower)
    save_model(model, processor, tmp_path / "model")
    Image.new("RGB", (50, 30), (200, 10, 10)).save(tmp_path / "picture.png")
    batch = inputs(processor)
    expected = model.generate(**batch, max_new_tokens=8, do_sample=False)[0, batch["input_ids"].shape[1] :]
    registration = "yes" if vision_tower is EFFICIENTNET else ""
    # The site-packages of this interpreter without its .pth files, so that an editable install does not leak in.
    packages = json.dumps([path for path in sys.path if path.endswith("site-packages")])
    program = f"import sys; sys.path += {packages}\n{STRANGER}"
    result = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            program,
            str(tmp_path / "model"),
            str(tmp_path / "picture.png"),
            registration,
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == expected.tolist()


@pytest.mark.skipif(not REAL.is_dir(), reason="no tokenizer of CodeShell beside the project")
@pytest.mark.parametrize("name", ["shellv", "chatml"])
def test_pretrained_tokenizer_gets_the_templates_tokens_and_keeps_its_own(tmp_path, name):
    config = tiny_model_config().model_copy(
        update={"template": name, "tokenizer": TokenizerConfig(pretrained=str(REAL))}
    )
    model, processor = build_model(config, seed=0)
    save_model(model, processor, tmp_path)
    tokenizer = AutoProcessor.from_pretrained(tmp_path).tokenizer
    added = (IMAGE_TOKEN, *TEMPLATES[name].special_tokens)
    assert tokenizer.convert_tokens_to_ids(list(added)) == list(range(70020, 70020 + len(added)))
    assert special_tokens(tokenizer) >= {*added, "<|endoftext|>", "<fim_pad>", "<|end|>"}
    assert model.config.image_token_id == 70020
    assert len(model.get_input_embeddings().weight) == 70020 + len(added)
