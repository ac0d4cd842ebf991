"""A packed and a padded step of the same conversations: the same losses and gradients, whatever the objectives."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from shellv_core.data.samples import HallucinatedCaption
from shellv_core.models.config import LoraConfig
from shellv_core.models.hacl import HaclHeads
from shellv_core.models.lora import add_lora
from shellv_core.templates import TEMPLATES, add_template_tokens
from shellv_core.training import pairs
from shellv_core.training.attention import documents_apart
from shellv_core.training.batches import batch_images, make_batch
from shellv_core.training.config import HaclConfig, PreferenceConfig, TrainingConfig
from shellv_core.training.examples import encode_answers, tokenize_samples
from shellv_core.training.loop import set_trainable
from shellv_core.training.model import TrainingModel, frozen_copy
from shellv_core.training.packed import make_row, pack_examples
from shellv_core.training.pairs import make_contrast, make_preference
from tests.training.packs import pack_of
from tests.training.test_losses import mutated
from tests.training.test_packed import assert_same_gradients, gradients, relative
from tests.training.tiny import CLIP, LANGUAGE_MODEL, tiny_model, tiny_samples

PROMPT = "What is seen?"
WINDOW = LANGUAGE_MODEL.model_copy(update={"options": {**LANGUAGE_MODEL.options, "sliding_window": 9}})
#: Two conversations about each image, of one round; of the images, 4 has no caption, 5 no hallucinated one.
ALL, TWO, TEXT, NO_LIES = range(8), (0, 1), (8,), (5, 4)


@pytest.fixture(scope="module")
def built():
    return tiny_model(CLIP)


def samples(chosen, rounds):
    given = [replace(each, conversations=each.conversations[:2]) for each in tiny_samples(8)]
    event = HallucinatedCaption("event", "A red picture. A man sings.", truth="A red picture. Nobody is there.")
    given[0] = replace(given[0], hallucinated_captions=(event, *given[0].hallucinated_captions))
    given[5] = replace(given[5], hallucinated_captions=())
    if rounds:
        # More before the image than elsewhere, in the first of its conversations.
        greeting = [{"from": "human", "value": "Say hello."}, {"from": "gpt", "value": "Hello."}]
        given[1] = replace(given[1], conversations=[*greeting, *given[1].conversations])
    return [given[index] for index in chosen]


class Step:
    """A module, and the same step for it in both forms."""

    def __init__(self, built, chosen=ALL, template="v1", hacl=True, preference=True, lora=True):
        torch.manual_seed(0)
        model, processor = copy.deepcopy(built)
        self.tokenizer, layout = processor.tokenizer, TEMPLATES[template]
        add_template_tokens(self.tokenizer, layout)
        model.resize_token_embeddings(len(self.tokenizer))
        self.image_token_id = image_token_id = processor.image_token_id
        self.module = module = TrainingModel(
            model,
            HaclHeads(32) if hacl else None,
            HaclConfig(weight=1.0, num_hallucinated=2),
            PreferenceConfig(weight=1.0, prompt=PROMPT, beta=0.3, anchor=0.2) if preference else None,
        )
        set_trainable(module, TrainingConfig(trainable=("projector", "language_model")))
        if lora:
            add_lora(model, LoraConfig(r=2, dropout=0.0))
        else:
            module.reference = frozen_copy(model)
        # So that the model is not its reference.
        with torch.no_grad():
            for parameter in module.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape))
        count = model.config.image_seq_length
        options = {"max_length": 256, "template": layout, "prompt": PROMPT}
        given = samples(chosen, rounds=template == "v1")
        self.examples = tokenize_samples(given, self.tokenizer, image_token_id, count, **options)
        self.pack = pack_of(given, self.examples)
        rows = np.arange(len(self.examples))
        images = batch_images(self.examples, rows)
        features = torch.randn(len(images), count, model.config.vision_config.hidden_size) if len(images) else None
        # Padding has the id of a token that means something.
        self.batch = make_batch(
            self.examples, rows, features, image_token_id, self.tokenizer.eos_token_id, 2 if hacl else None, turn=1,
            truths=True, preference=preference, loss_chunk=7,
        )  # fmt: skip
        encode = partial(
            encode_answers, tokenizer=self.tokenizer, image_token_id=image_token_id, num_image_tokens=count, **options
        )
        mine = pack_examples(self.pack, self.tokenizer, encode)
        contrast = make_contrast(mine, images, 0, 2, 1, True) if hacl else None
        pairs_batch = make_preference(mine, images, image_token_id, 0, 1) if preference else None
        self.row = make_row(
            self.pack, features, image_token_id, module.eos_token_id, contrast, loss_chunk=5, preference=pairs_batch
        )

    def run(self, packed, backward=True):
        """Losses by name, and gradients."""
        language_model = self.module.model.model.language_model
        with documents_apart(language_model) if packed else torch.enable_grad():
            output = self.module(self.row if packed else self.batch)
            losses = {"generation": output.generation_loss_sum}
            for objective in (output.contrast, output.preference):
                losses |= {} if objective is None else vars(objective)
            losses = {name: value for name, value in losses.items() if value is not None}
            total = output.generation_loss_sum
            total = total if output.contrast is None else total + output.contrast.objective(0.5, 0.5)
            total = total if output.preference is None else total + output.preference.objective(0.7, 0.4)
            if backward:
                total.backward()
        return {name: value.detach().double() for name, value in losses.items()}, gradients(self.module)


def check_equal(step, limit=1e-5):
    losses, mine = step.run(packed=True)
    expected_losses, expected = step.run(packed=False)
    assert losses.keys() == expected_losses.keys()
    worst = {name: relative(losses[name], expected_losses[name]) for name in losses if "margin" not in name}
    assert max(worst.values()) < limit, worst
    # Differences of large sums.
    margins = {name: float(abs(losses[name] - expected_losses[name]).max()) for name in losses if name not in worst}
    assert max(margins.values(), default=0) < limit, margins
    assert_same_gradients(mine, expected, limit)
    return losses


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("hacl", [True, False])
@pytest.mark.parametrize("template", ["v1", "plain"])
def test_packed_equals_padded(built, template, hacl, lora):
    step = Step(built, template=template, hacl=hacl, lora=lora)
    # A system prompt stands before the image, or nothing at all.
    begins = step.row.input_ids.tolist().index(step.image_token_id)
    assert begins > 10 if template == "v1" else begins <= 1
    losses = check_equal(step)
    assert ("image_to_text" in losses) == hacl
    assert abs(losses["reward_margin"]) > 1e-3
    assert losses["image"] > 0


@pytest.mark.parametrize(
    ("chosen", "contrasts", "prefers", "elsewhere"),
    [(TWO, True, True, 2), ((1,), True, True, 0), (TEXT, False, False, 0), (NO_LIES, True, False, 0)],
    ids=["two images", "no other image", "text alone", "no hallucinated captions"],
)
def test_packs_that_lack_something(built, chosen, contrasts, prefers, elsewhere):
    step = Step(built, chosen)
    assert (step.row.contrast is not None) == contrasts
    assert (step.row.preference is not None) == prefers
    assert not prefers or len(step.row.preference.elsewhere) == elsewhere
    check_equal(step)


@pytest.mark.parametrize("template", ["v1", "plain"])
def test_exact_but_for_rounding(built, template):
    step = Step(built, template=template, hacl=False)
    step.module.double()
    check_equal(step, 1e-11)


def test_a_sliding_window(project_folder):
    check_equal(Step(tiny_model(CLIP, WINDOW), (0, 1, 2)))


def answer_values(step, row):
    """Log-probabilities of the answers' tokens, and the embeddings that they come from."""
    seen = {}
    hooks = [
        step.module.label_loss.register_forward_hook(lambda *call: seen.setdefault("losses", []).append(call[-1])),
        step.module.model.get_input_embeddings().register_forward_hook(
            lambda *call: seen.setdefault("embeddings", []).append(call[-1])
        ),
    ]
    with documents_apart(step.module.model.model.language_model):
        step.module(row)
    for hook in hooks:
        hook.remove()
    # The pack's own pass, the answers', the reference's.
    return seen["losses"][1], seen["embeddings"][1]


def test_an_answer_sees_its_prompt_alone(built):
    step = Step(built, lora=False)
    batch, documents = step.row.preference, step.row.preference.documents
    values, embeddings = answer_values(step, step.row)
    borders = torch.tensor(documents.branches).cumsum(0) + documents.borders[-1]
    assert len(batch.lengths) == len(documents.branches) == 18
    for number, ((start, stop), length) in enumerate(zip(documents.spans, documents.branches, strict=True)):
        branch = range(int(borders[number]) - length, int(borders[number]))
        mine = batch.label_rows == number
        assert mine.sum() == length + 1
        (gradient,) = torch.autograd.grad(values[mine].sum(), embeddings, retain_graph=True)
        reached = gradient[0].abs().sum(dim=1).nonzero()[:, 0].tolist()
        text = [token for token in range(start, stop) if token not in batch.image_positions]
        assert reached == [*text, *branch]
        ids = batch.input_ids.clone()
        ids[0, branch] = (ids[0, branch] + 7) % 300
        others, _ = answer_values(step, replace(step.row, preference=replace(batch, input_ids=ids)))
        changed = (others - values).abs() > 1e-5
        assert changed[mine][1:].any()
        assert not changed[~mine].any()


def test_prompts_are_there_once(built):
    batch, padded = Step(built).row.preference, Step(built).batch.preference
    prompts = batch.documents.lengths
    assert set(prompts) == {padded.prompt_length}
    # Six pairs; the image without hallucinated captions is another image's other.
    assert len(prompts) == 7 < len(padded.lengths) == 18
    assert batch.documents.num_tokens == padded.lengths.sum() - 11 * padded.prompt_length - 18


@pytest.mark.parametrize(
    ("original", "fault"),
    [
        ("columns[answers]])[None]", "columns[answers] - 1])[None]"),
        ("(start, start + length) for", "(start, start + length - 1) for"),
        ("place.flatten()[self.label_positions]", "place.flatten()[self.label_positions] - 1"),
        ("prompts[:, None] * length + columns, behind", "columns, behind"),
        (
            "row_images=images,\n            image_positions=(",
            "row_images=images.flip(0),\n            image_positions=(",
        ),
        ("positions[:, 0] // width", "positions[:, 0] * 0"),
        ("ends = columns.max(axis=1) + 1", "ends = columns.max(axis=1)"),
    ],
)
def test_faults_are_noticed(built, monkeypatch, original, fault):
    faulty = mutated(pairs, original, fault, monkeypatch)
    monkeypatch.setattr(pairs.PreferenceBatch, "packed", faulty.PreferenceBatch.packed)
    monkeypatch.setattr("shellv_core.training.batches.make_readouts", faulty.make_readouts)
    with pytest.raises((AssertionError, IndexError)):
        check_equal(Step(built))
