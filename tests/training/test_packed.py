"""One packed pass computes what padded passes compute, and documents do not see each other."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch

from shellv_core.data.decode import normalize
from shellv_core.errors import TrainingError
from shellv_core.models.config import LanguageModelConfig, LoraConfig
from shellv_core.models.hacl import HaclHeads
from shellv_core.models.lora import add_lora
from shellv_core.training import attention
from shellv_core.training.attention import Documents, documents_apart
from shellv_core.training.config import HaclConfig
from shellv_core.training.features import tower_features
from shellv_core.training.model import TrainingModel
from shellv_core.training.packed import make_row, pack_examples
from shellv_core.training.pairs import make_contrast
from tests.training.packs import padded_passes, random_pack
from tests.training.tiny import CLIP, LANGUAGE_MODEL, tiny_model

LLAMA = LanguageModelConfig(model_type="llama", options=LANGUAGE_MODEL.options)
WINDOW = LanguageModelConfig(options={**LANGUAGE_MODEL.options, "sliding_window": 6})
MODELS = {"starcoder2": LANGUAGE_MODEL, "llama": LLAMA, "starcoder2-window": WINDOW}


@pytest.fixture(scope="module", params=MODELS)
def built(request):
    return tiny_model(CLIP, MODELS[request.param])


@pytest.fixture(scope="module")
def starcoder():
    return tiny_model(CLIP)


def module_of(built, lora=False, hacl=True):
    """Everything that may learn, learns; adapters are not zero."""
    torch.manual_seed(0)
    model = copy.deepcopy(built[0])
    module = TrainingModel(model, HaclHeads(32) if hacl else None, HaclConfig(weight=1.0, num_hallucinated=2))
    module.requires_grad_(True)
    if lora:
        add_lora(model, LoraConfig(r=4, dropout=0.0))
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    module.model.model.vision_tower.requires_grad_(False)
    return module


def pack_of(module, processor, **options):
    config = module.model.config
    pack = random_pack(config.image_token_id, config.image_seq_length, config.text_config.vocab_size, **options)
    settings = processor.image_processor
    pixel_values = normalize(pack.images, settings.image_mean, settings.image_std)
    features = tower_features(module.model, pixel_values) if len(pack.images) else None
    contrast = pack_contrast(pack, processor.tokenizer, 2, turn=1, truths=True) if module.heads is not None else None
    row = make_row(pack, features, config.image_token_id, module.eos_token_id, contrast, loss_chunk=5)
    return pack, features, contrast, row


def pack_contrast(pack, tokenizer, num_hallucinated, turn, truths=False):
    examples = pack_examples(pack, tokenizer)
    return make_contrast(examples, np.arange(examples.num_images), 0, num_hallucinated, turn, truths)


def packed(module, row):
    with documents_apart(module.model.model.language_model):
        output = module(row)
        total = output.generation_loss_sum + (0 if output.contrast is None else output.contrast.objective(0.5))
        total.backward()
    return output, gradients(module)


def gradients(module):
    found = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


def relative(first, second):
    first, second = first.detach(), second.detach()
    return float((first - second).norm() / second.norm().clamp_min(1e-6))


def assert_same_gradients(mine, expected, limit):
    assert {name for name, grad in mine.items() if grad.any()} == {name for name in expected if expected[name].any()}
    worst = {name: relative(mine[name], expected[name]) for name in expected if expected[name].any()}
    assert max(worst.values()) < limit, worst


@pytest.mark.parametrize("lora", [False, True])
def test_one_packed_pass_equals_four_padded_passes(built, lora):
    module = module_of(built, lora)
    pack, features, contrast, row = pack_of(module, built[1])
    loss, result = padded_passes(module, pack, features, contrast)
    (loss + result.objective(0.5)).backward()
    expected = gradients(module)
    output, mine = packed(module, row)
    assert relative(output.generation_loss_sum, loss) < 1e-5
    for name in ("image_to_text", "text_to_image", "truth", "hallucination_margin"):
        assert relative(getattr(output.contrast, name), getattr(result, name)) < 1e-5, name
    assert_same_gradients(mine, expected, 1e-5)
    assert any("multi_modal_projector" in name for name in mine)
    assert any("text_projector" in name for name in mine)
    assert lora == any("lora_A" in name for name in mine)


@pytest.mark.parametrize("lora", [False, True])
def test_packed_training_without_contrast_equals_padded_training(built, lora):
    module = module_of(built, lora, hacl=False)
    pack, features, _, row = pack_of(module, built[1])
    loss, _ = padded_passes(module, pack, features)
    loss.backward()
    expected = gradients(module)
    output, mine = packed(module, row)
    assert output.contrast is None
    assert relative(output.generation_loss_sum, loss) < 1e-5
    assert_same_gradients(mine, expected, 1e-5)


def test_text_alone(built):
    module = module_of(built)
    pack, features, contrast, row = pack_of(
        module, built[1], lengths=((5, False), (30, False), (6, False)), shared=False
    )
    assert features is None
    assert contrast is None
    loss, _ = padded_passes(module, pack, None)
    loss.backward()
    expected = gradients(module)
    output, mine = packed(module, row)
    assert output.contrast is None
    assert relative(output.generation_loss_sum, loss) < 1e-5
    assert_same_gradients(mine, expected, 1e-5)


def test_gradient_checkpointing_keeps_documents_apart(starcoder):
    module = module_of(starcoder)
    _, _, _, row = pack_of(module, starcoder[1])
    module.train()
    expected_output, expected = packed(module, row)
    module.model.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    output, mine = packed(module, row)
    assert torch.equal(output.generation_loss_sum, expected_output.generation_loss_sum)
    assert_same_gradients(mine, expected, 1e-6)


def test_positions_begin_anew_in_every_document(starcoder):
    module = module_of(starcoder)
    _, _, contrast, row = pack_of(module, starcoder[1])
    documents = row.documents
    for start, stop in itertools.pairwise(documents.borders):
        assert row.position_ids[start:stop].tolist() == list(range(stop - start))
    ends = [stop - start for start, stop in documents.spans]
    assert row.position_ids[documents.borders[-1] :].tolist() == ends
    assert row.input_ids[documents.borders[-1] :].tolist() == [module.eos_token_id] * len(contrast.images)
    texts = [row.input_ids[start:stop].tolist() for start, stop in itertools.pairwise(documents.borders)][5:]
    assert [text[-1] for text in texts if len(text) > 1] == [module.eos_token_id] * 6
    assert [len(text) for text in texts].count(1) == 1, "an image without a second hallucinated caption has a stand-in"


def document_states(module, row):
    """Last hidden states of each document of the row, and of the readouts together."""
    seen = {}
    language_model = module.model.model.language_model
    hook = language_model.register_forward_hook(lambda *call: seen.update(states=call[-1].last_hidden_state[0]))
    with documents_apart(language_model), torch.no_grad():
        module(row)
    hook.remove()
    borders = row.documents.borders
    return [seen["states"][start:stop] for start, stop in itertools.pairwise((*borders, row.documents.num_tokens))]


def changed_documents(module, row, document):
    """Documents whose states are others once the ids of `document` are; readouts count as the last."""
    start, stop = (*row.documents.borders, row.documents.num_tokens)[document : document + 2]
    ids = row.input_ids.clone()
    positions = torch.arange(start, stop)
    texts = positions[~torch.isin(positions, row.image_positions)]
    ids[texts] = (ids[texts] + 7) % (module.model.config.text_config.vocab_size - 8) + 4
    before = document_states(module, row)
    after = document_states(module, dataclasses.replace(row, input_ids=ids))
    return {
        number
        for number, (first, second) in enumerate(zip(before, after, strict=True))
        if not torch.allclose(first, second, atol=1e-5, rtol=1e-5)
    }


def check_isolation(module, row, num_pack_documents):
    num_documents = len(row.documents.borders) - 1
    for document in range(num_documents + 1):
        changed = changed_documents(module, row, document)
        # Readouts see what stands before their image, in its first document.
        allowed = {document, num_documents} if document in (0, 2) else {document}
        assert changed == allowed, (document, changed)
    assert num_documents > num_pack_documents, "captions are documents too"


@pytest.mark.parametrize("training", [True, False])
def test_a_document_changes_no_other(built, training):
    module = module_of(built).train(training)
    pack, _, _, row = pack_of(module, built[1])
    check_isolation(module, row, len(pack.keys))


@pytest.mark.parametrize("fault", ["one document", "readouts in sight", "borders from position ids, with a mask"])
def test_the_leak_test_finds_leaks(starcoder, fault, monkeypatch):
    """With isolation switched off in one way or another, the check above must fail."""
    module = module_of(starcoder)
    pack, _, _, row = pack_of(module, starcoder[1])
    documents = row.documents
    original = attention.documents_attention

    def faulty(caller, query, key, value, mask, documents=None, **options):
        if fault == "one document":
            documents = Documents((0, documents.borders[-1]), documents.spans)
            return original(caller, query, key, value, mask, documents=documents, **options)
        if fault == "readouts in sight":
            documents = Documents((*documents.borders[:-1], documents.num_tokens))
            return original(caller, query, key, value, mask, documents=documents, **options)
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        ).transpose(1, 2), None  # fmt: skip

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.ATTENTION_NAME, faulty)
    with pytest.raises(AssertionError):
        check_isolation(module, row, len(pack.keys))
    assert documents == row.documents


def test_no_gradient_crosses_a_border(built):
    module = module_of(built)
    pack, _, _, row = pack_of(module, built[1])
    seen = {}
    embeddings = module.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda *call: seen.update(embeddings=call[-1]))
    for number, (start, stop) in enumerate(itertools.pairwise(pack.cu_seqlens.tolist())):
        inside = (row.label_positions >= start) & (row.label_positions < stop)
        part = dataclasses.replace(
            row, label_positions=row.label_positions[inside], label_ids=row.label_ids[inside], contrast=None
        )
        with documents_apart(module.model.model.language_model):
            loss = module(part).generation_loss_sum
            (gradient,) = torch.autograd.grad(loss, seen["embeddings"])
        reached = gradient.abs().sum(dim=1).nonzero()[:, 0]
        assert start <= reached.min() <= reached.max() < stop, number


def test_outside_of_its_context_a_row_is_refused(starcoder):
    module = module_of(starcoder)
    _, _, _, row = pack_of(module, starcoder[1])
    with pytest.raises(TrainingError, match=r"'sdpa', under which packed documents would see each other"):
        module(row)
    with documents_apart(module.model.model.language_model):
        module(row)
    assert module.model.model.language_model.config._attn_implementation == "sdpa"


def test_generation_with_the_packed_attention_is_refused(starcoder):
    model = copy.deepcopy(starcoder[0])
    with (
        documents_apart(model.model.language_model),
        pytest.raises(TrainingError, match="needs the borders of the documents"),
    ):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)


def test_lies_take_turns_and_images_without_caption_stay_out(starcoder):
    module = module_of(starcoder)
    pack, *_ = pack_of(module, starcoder[1])
    tokenizer = starcoder[1].tokenizer
    one, two, three = (pack_contrast(pack, tokenizer, 1, turn).text_ids for turn in range(3))
    assert not torch.equal(one, two)
    assert torch.equal(one, three)
    without = dataclasses.replace(pack, captions=(None, *pack.captions[1:]))
    assert pack_contrast(without, tokenizer, 1, 0).images.tolist() == [1]
    nothing = dataclasses.replace(pack, captions=(None,) * len(pack.captions))
    assert pack_contrast(nothing, tokenizer, 1, 0) is None
    no_lies = dataclasses.replace(pack, hallucinated=((),) * len(pack.captions))
    assert pack_contrast(no_lies, tokenizer, 1, 0).hallucinated_valid.any().item() is False
