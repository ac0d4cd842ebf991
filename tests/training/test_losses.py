"""The objectives against values worked out by hand, naive loops, gradcheck and deliberate faults in their own code."""

from __future__ import annotations

import inspect
import math
import sys
import types

import pytest
import torch
from torch.nn import functional

from shellv_core.training.losses import hacl, preference, queue
from shellv_core.training.losses.hacl import ContrastFeatures, contrastive_loss
from shellv_core.training.losses.preference import AnswerLogProbabilities, preference_loss
from shellv_core.training.losses.queue import NegativeQueue
from shellv_core.training.losses.schedule import weight_factor
from tests.training import golden


@pytest.mark.parametrize("name", golden.CASES)
def test_contrast_equals_the_values_worked_out_by_hand(name):
    golden.check_hacl(name)


def test_queue_is_first_in_first_out_and_empty_at_the_start():
    golden.check_queue()


def test_preference_equals_the_values_worked_out_by_hand():
    golden.check_preference()


def oracle(f, temperature, mode, queued_texts=(), queued_images=()):
    """Loops over the formulas of the module; the queue is a list of (vector, group)."""
    num_rows, num_slots = f.hallucinated.shape[:2]

    def score(a, b):
        return float(a @ b) / temperature

    def true_of(i):
        told = {int(f.truth_group[i, k]) for k in range(num_slots) if f.truth_valid[i, k]}
        return {int(f.caption_group[i])} | told

    rows = [i for i in range(num_rows) if f.valid[i]]
    i2t, t2i, truths, correct, margins = [], [], [], [], []
    for i in rows:
        texts = [score(f.image[i], f.caption[i])]
        images = [score(f.caption[i], f.image[i])]
        for j in rows:
            if j != i and int(f.caption_group[j]) not in true_of(i):
                texts.append(score(f.image[i], f.caption[j]))
            if j != i and int(f.caption_group[i]) not in true_of(j):
                images.append(score(f.caption[i], f.image[j]))
        for j in rows if mode == "batch" else [i]:
            for k in range(num_slots):
                told = f.hallucinated_valid[j, k] and not f.truth_valid[j, k]
                if told and int(f.hallucinated_group[j, k]) not in true_of(i):
                    texts.append(score(f.image[i], f.hallucinated[j, k]))
        texts += [score(f.image[i], vector) for vector, group in queued_texts if group not in true_of(i)]
        images += [score(f.caption[i], vector) for vector, group in queued_images if group != int(f.caption_group[i])]
        for k in range(num_slots):
            if f.hallucinated_valid[i, k]:
                right, group = f.caption[i], int(f.caption_group[i])
                if f.truth_valid[i, k]:
                    right, group = f.truth[i, k], int(f.truth_group[i, k])
                if group != int(f.hallucinated_group[i, k]):
                    margins.append((score(f.image[i], right) - score(f.image[i], f.hallucinated[i, k])) * temperature)
                    if f.truth_valid[i, k]:
                        truths.append(math.log1p(math.exp(-margins[-1] / temperature)))
        i2t.append(math.log(sum(map(math.exp, texts))) - texts[0])
        t2i.append(math.log(sum(map(math.exp, images))) - images[0])
        correct.append(texts[0] >= max(texts))

    def mean(values):
        return sum(values) / len(values) if values else 0.0

    return {
        "image_to_text": mean(i2t),
        "text_to_image": mean(t2i),
        "truth": mean(truths),
        "retrieval_accuracy": mean(correct),
        "hallucination_margin": mean(margins),
        "hallucination_accuracy": mean([margin > 0 for margin in margins]),
    }


def random_features(num_rows, num_slots, seed=0, masked=False, truths=False, width=5):
    generator = torch.Generator().manual_seed(seed)

    def vectors(*shape):
        return functional.normalize(torch.randn(*shape, width, generator=generator, dtype=torch.float64), dim=-1)

    f = ContrastFeatures.of(
        vectors(num_rows),
        vectors(num_rows),
        vectors(num_rows, num_slots),
        caption_group=torch.arange(num_rows) + 100 * seed,
        hallucinated_group=torch.arange(num_rows * num_slots).view(num_rows, num_slots) + 100 * seed + 50,
        truth=vectors(num_rows, num_slots) if truths else None,
        truth_valid=torch.rand(num_rows, num_slots, generator=generator) < 0.5 if truths else None,
    )
    if masked:
        f.valid[2] = False
        f.caption_group[4] = f.caption_group[1]
        if num_slots:
            f.hallucinated_valid[3, 0] = False
            f.truth_valid[3, 0] = False
            f.hallucinated_group[5, -1] = f.caption_group[0]
            f.hallucinated_group[1, 0] = f.caption_group[1]
        if truths and num_slots:
            f.truth_group[0, 0] = f.caption_group[3]
            f.truth_valid[0, 0] = True
            f.hallucinated_group[5, 0] = f.truth_group[0, 0]
    return f


def assert_equals_oracle(result, expected):
    for key, value in expected.items():
        if key != "truth" or result.truth is not None:
            assert float(getattr(result, key)) == pytest.approx(value, rel=1e-6), key


@pytest.mark.parametrize("mode", ["paired", "batch"])
@pytest.mark.parametrize("num_slots", [0, 1, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("truths", [False, True])
def test_equals_the_naive_loop(mode, num_slots, masked, truths):
    f = random_features(6, num_slots, masked=masked, truths=truths)
    result = contrastive_loss(f, torch.tensor(0.07), mode)
    expected = oracle(f, 0.07, mode)
    assert_equals_oracle(result, expected)
    objective = (expected["image_to_text"] + expected["text_to_image"]) / 2 + 0.3 * expected["truth"]
    assert float(result.objective(truth_weight=0.3)) == pytest.approx(objective)


@pytest.mark.parametrize("mode", ["paired", "batch"])
def test_queue_over_steps_equals_a_list(mode):
    """Steps of different sizes, with left out rows, lies and truths, beyond the queue's size and round again."""
    size = 9
    ring = NegativeQueue(size, 5).double()
    texts, images = [], []
    for step, (num_rows, num_slots, truths) in enumerate(
        [(6, 1, False), (6, 2, True), (1, 0, False), (6, 3, False), (2, 1, True), (6, 1, False)]
    ):
        f = random_features(num_rows, num_slots, seed=step, masked=num_rows == 6, truths=truths)
        if step:
            # Two texts of the step before come again; they are no negatives of what says the same.
            f.caption_group[0], f.caption_group[-1] = texts[-1][1], images[-1][1]
        result = contrastive_loss(f, torch.tensor(0.07), mode, ring.contents())
        assert_equals_oracle(result, oracle(f, 0.07, mode, texts, images))
        ring.push(f)
        rows = [i for i in range(num_rows) if f.valid[i]]
        texts += [(f.caption[i], int(f.caption_group[i])) for i in rows]
        texts += [
            (f.hallucinated[i, k], int(f.hallucinated_group[i, k]))
            for i in rows
            for k in range(num_slots)
            if f.hallucinated_valid[i, k] and not f.truth_valid[i, k]
        ]
        images += [(f.image[i], int(f.caption_group[i])) for i in rows]
        texts, images = texts[-size:], images[-size:]
        assert ring.fill() == len(texts) / size
    assert len(texts) == len(images) == size


@pytest.mark.parametrize("name", [*golden.CASES, "all"])
def test_gradients(name):
    """Of every input in every case, and of all features of the loss at once."""
    if name == "all":
        f, options = random_features(6, 2, masked=True, truths=True), {"mode": "batch", "text_margin": 1.3}
        ring = NegativeQueue(4, 5).double()
        ring.push(random_features(1, 2, seed=1))
        options["queue"] = ring.contents()
    else:
        f, options = golden.arguments(name)
    names = [key for key in ("image", "caption", "hallucinated", "truth") if getattr(f, key) is not None]
    leaves = [getattr(f, key).clone().requires_grad_() for key in names]
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def losses(temperature, *values):
        features = ContrastFeatures(**{**vars(f), **dict(zip(names, values, strict=True))})
        result = contrastive_loss(features, temperature, **options)
        each = [result.image_to_text, result.text_to_image, result.truth, result.text_margin]
        return [loss for loss in each if loss is not None and loss.requires_grad]

    assert torch.autograd.gradcheck(losses, (temperature, *leaves))


def test_queue_gets_no_gradient():
    f = random_features(2, 1)
    learning = ContrastFeatures(**{**vars(f), "image": f.image.clone().requires_grad_()})
    ring = NegativeQueue(4, 5).double()
    ring.push(learning)
    assert not ring.contents().text.requires_grad
    assert not ring.contents().image.requires_grad


def test_no_valid_row_gives_zero():
    f = random_features(3, 1)
    v = f.image.clone().requires_grad_()
    f = ContrastFeatures(**{**vars(f), "image": v, "valid": torch.zeros(3, dtype=torch.bool)})
    result = contrastive_loss(f, torch.tensor(0.07), "batch")
    result.objective().backward()
    assert float(result.objective().detach()) == 0
    assert (v.grad == 0).all()


def test_margins_by_type():
    f = random_features(3, 2)
    kinds = torch.tensor([[0, 3], [0, 0], [4, 1]])
    f = ContrastFeatures(**{**vars(f), "hallucinated_type": kinds})
    f.hallucinated_valid[1, 1] = False
    result = contrastive_loss(f, torch.tensor(0.07), "paired")
    assert result.margin_counts.tolist() == [2, 1, 0, 1, 1]
    expected = [float(f.image[i] @ f.caption[i] - f.image[i] @ f.hallucinated[i, 0]) for i in (0, 1)]
    assert float(result.margin_sums[0]) == pytest.approx(sum(expected))
    total = float(result.margin_sums.sum() / result.margin_counts.sum())
    assert float(result.hallucination_margin) == pytest.approx(total)


def test_hallucinated_captions_are_negatives_of_images_only():
    f = random_features(5, 1)
    near = f.hallucinated.clone()
    near[0, 0] = f.image[0]
    plain = contrastive_loss(f, torch.tensor(0.07), "paired")
    fooled = contrastive_loss(ContrastFeatures(**{**vars(f), "hallucinated": near}), torch.tensor(0.07), "paired")
    assert fooled.image_to_text > plain.image_to_text
    assert fooled.text_to_image == plain.text_to_image


def test_an_image_is_drawn_to_the_truth_and_away_from_its_lie():
    f = random_features(4, 1, truths=True)
    f.truth_valid[:] = True
    v = f.image.clone().requires_grad_()
    contrastive_loss(ContrastFeatures(**{**vars(f), "image": v}), torch.tensor(0.07), "batch").truth.backward()
    moved = f.image - 1e-3 * v.grad
    before, after = (((image[:, None] * (f.truth - f.hallucinated)).sum(-1)) for image in (f.image, moved))
    assert (after > before).all()


def test_preference_gradients_reach_the_policy_alone():
    policy = [torch.tensor(each, dtype=torch.float64, requires_grad=True) for each in golden.POLICY]
    reference = [torch.tensor(each, dtype=torch.float64, requires_grad=True) for each in golden.REFERENCE]
    known = torch.tensor([True, False])

    def losses(*policy):
        result = preference_loss(AnswerLogProbabilities(*policy), AnswerLogProbabilities(*reference), known, 0.5, 0.1)
        return result.answer, result.image, result.anchor

    assert torch.autograd.gradcheck(losses, policy)
    sum(losses(*policy)).backward()
    assert all(each.grad is None for each in reference)
    assert (policy[0].grad < 0).all()
    assert (policy[1].grad > 0).all()
    assert policy[2].grad[0] > 0
    assert policy[2].grad[1] == 0


def test_weights_rise_and_fall():
    def factors(*arguments):
        return [weight_factor(step, 10, *arguments) for step in range(1, 11)]

    assert factors("constant", 0.0) == [1.0] * 10
    assert factors("linear", 0.4) == [0.25, 0.5, 0.75] + [1.0] * 7
    cosine = factors("cosine", 0.2)
    assert cosine[:2] == [0.5, 1.0]
    # 0.5 * (1 + cos(pi * (step - 2) / 8)): halfway at step 6, nothing in step 10.
    assert cosine[5] == pytest.approx(0.5)
    assert cosine[9] == pytest.approx(0.0)
    assert cosine[1:] == sorted(cosine[1:], reverse=True)


FAULTS = {
    "targets without the rank's offset": (
        hacl,
        "torch.arange(start, stop, device=device)",
        "torch.arange(stop - start)",
    ),
    "lies dropped where a queue is on": (hacl, "& ~features.truth_valid\n", "& (queue is None)\n"),
    "lies as negatives of others in paired mode": (hacl, 'if mode == "paired":', "if False:"),
    "lies of nobody but oneself in batch mode": (hacl, 'if mode == "paired":', "if True:"),
    "slots of the queue that were never filled": (hacl, "[start:stop] & queue.text_valid", "[start:stop]"),
    "images of the queue that were never filled": (
        hacl,
        "!= queue.image_group) & queue.image_valid",
        "!= queue.image_group)",
    ),
    "what the queue says again": (hacl, "~_true_of(features, queue.text_group)[start:stop] &", ""),
    "images of the queue that are the same": (
        hacl,
        "(features.caption_group[start:stop, None] != queue.image_group) &",
        "",
    ),
    "duplicates as negatives": (hacl, "text_allowed_RN = (~true_NN &", "text_allowed_RN = (True &"),
    "duplicates as negatives of captions": (hacl, "image_allowed_RN = (~true_NN.T &", "image_allowed_RN = (True &"),
    "rows that do not count": (hacl, "~true_NN & features.valid |", "~true_NN |"),
    "lies that do not count": (hacl, "told_NK = features.hallucinated_valid &", "told_NK ="),
    "lies that are true by chance": (
        hacl,
        "~_true_of(features, features.hallucinated_group)[start:stop] & told_NK",
        "told_NK",
    ),
    "lies that equal a truth": (hacl, "same = same | told.any(dim=1)", "pass"),
    "truths that do not count": (hacl, "== flat) & features.truth_valid[:, :, None]", "== flat)"),
    "lies that the truth tells, told twice": (hacl, "& told_NK & ~features.truth_valid", "& told_NK"),
    "truth and lie exchanged": (hacl, "(own_lies_RK - truth_cosines_RK)", "(truth_cosines_RK - own_lies_RK)"),
    "margins against the caption only": (hacl, "true_RK = torch.where(", "torch.where("),
    "text margins against the caption only": (hacl, "true_texts_RKD = torch.where(", "torch.where("),
    "a margin of similarity": (hacl, "(text_margin - (1 - text_cosines_RK))", "(text_margin - text_cosines_RK)"),
    "temperature of the lies": (hacl, "lie_cosines_RNK / temperature", "lie_cosines_RNK"),
    "this process's mean for the whole batch's": (hacl, "return total * num_ranks if", "return total if"),
    "t2i with texts for images": (
        hacl,
        "cosines_NN[:, start:stop].T / temperature",
        "cosines_NN[start:stop] / temperature",
    ),
    "images never queued": (queue, "self.images.push(", "self.texts.push("),
    "lies never queued": (
        queue,
        "torch.cat([features.caption[valid], features.hallucinated[lies]])",
        "features.caption[valid]",
    ),
    "lies with truths queued": (queue, "& ~features.truth_valid", ""),
    "last in, first out": (queue, "(self.position + len(groups)) % size", "self.position * 0"),
    "counted as full": (queue, "device=self.groups.device) < self.count", "device=self.groups.device) >= 0"),
    "a reference left out": (preference, "policy.rejected - reference.rejected.detach()", "policy.rejected"),
    "beta left out": (preference, "chosen = beta *", "chosen ="),
    "the lie preferred": (preference, "chosen - rejected, chosen - elsewhere", "rejected - chosen, chosen - elsewhere"),
    "the other image preferred": (
        preference,
        "chosen - rejected, chosen - elsewhere",
        "chosen - rejected, elsewhere - chosen",
    ),
    "pairs without another image": (
        preference,
        "logsigmoid(image_margin), has_elsewhere",
        "logsigmoid(image_margin), everywhere",
    ),
    "anchor left out": (preference, "chosen - anchor", "chosen"),
}


def mutated(module, old, new, monkeypatch):
    """`module` with one piece of its source replaced."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module.__name__}"
    result = types.ModuleType(f"{module.__name__}_mutated")
    monkeypatch.setitem(sys.modules, result.__name__, result)
    exec(compile(source.replace(old, new), result.__name__, "exec"), vars(result))
    return result


def golden_checks(module, kind):
    if kind is hacl:
        return [lambda name=name: golden.check_hacl(name, module) for name in golden.CASES]
    return [lambda: golden.check_queue(module)] if kind is queue else [lambda: golden.check_preference(module)]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_code_is_noticed(fault, monkeypatch):
    module, old, new = FAULTS[fault]
    noticed = 0
    for check in golden_checks(mutated(module, old, new, monkeypatch), module):
        try:
            check()
        except (AssertionError, RuntimeError):
            noticed += 1
    assert noticed, f"no value worked out by hand notices {fault}"


def test_code_without_a_fault_passes_as_its_own_copy(monkeypatch):
    for module in (hacl, queue, preference):
        for check in golden_checks(
            mutated(module, '"""\n\nfrom __future__', '"""\n\n\nfrom __future__', monkeypatch), module
        ):
            check()
