"""The contrastive loss against a naive loop over the formulas, and its gradients."""

import math

import pytest
import torch
from torch.nn import functional

from shellv_core.training.losses.hacl import ContrastFeatures, contrastive_loss  # noqa: F401


def oracle(v, t, h, temperature, mode, valid, h_valid, group, h_group):
    batch_size, num_hallucinated = h.shape[:2]
    i2t, t2i, correct, margins = [], [], [], []
    rows = [i for i in range(batch_size) if valid[i]]
    for i in rows:
        texts = [float(v[i] @ t[i])]
        images = [float(t[i] @ v[i])]
        for j in rows:
            if j != i and group[j] != group[i]:
                texts.append(float(v[i] @ t[j]))
                images.append(float(t[i] @ v[j]))
        for j in rows if mode == "batch" else [i]:
            for k in range(num_hallucinated):
                if h_valid[j][k] and h_group[j][k] != group[i]:
                    texts.append(float(v[i] @ h[j, k]))
        for k in range(num_hallucinated):
            if h_valid[i][k]:
                margins.append(float(v[i] @ t[i] - v[i] @ h[i, k]))
        i2t.append(-math.log(math.exp(texts[0] / temperature) / sum(math.exp(x / temperature) for x in texts)))
        t2i.append(-math.log(math.exp(images[0] / temperature) / sum(math.exp(x / temperature) for x in images)))
        correct.append(texts[0] >= max(texts))
    return (
        sum(i2t) / len(rows),
        sum(t2i) / len(rows),
        sum(correct) / len(rows),
        sum(margins) / len(margins) if margins else 0.0,
        sum(margin > 0 for margin in margins) / len(margins) if margins else 0.0,
    )


def embeddings(batch_size, num_hallucinated, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch_size, 5), (batch_size, 5), (batch_size, num_hallucinated, 5)]
    return [
        functional.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1) for shape in shapes
    ]


@pytest.mark.parametrize("mode", ["paired", "batch"])
@pytest.mark.parametrize("num_hallucinated", [0, 1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_naive_loop(mode, num_hallucinated, masked):
    batch_size = 6
    v, t, h = embeddings(batch_size, num_hallucinated)
    valid = torch.ones(batch_size, dtype=torch.bool)
    h_valid = torch.ones(batch_size, num_hallucinated, dtype=torch.bool)
    group = torch.arange(batch_size)
    h_group = 100 + torch.arange(batch_size * num_hallucinated).view(batch_size, num_hallucinated)
    if masked:
        valid[2] = False
        group[4] = group[1]
        if num_hallucinated:
            h_valid[3, 0] = False
            h_group[5, -1] = group[0]
    result = contrastive_loss(v, t, h, torch.tensor(0.07), mode, valid, h_valid, group, h_group)
    expected = oracle(v, t, h, 0.07, mode, valid, h_valid, group, h_group)
    found = (
        result.image_to_text,
        result.text_to_image,
        result.retrieval_accuracy,
        result.hallucination_margin,
        result.hallucination_accuracy,
    )
    assert [float(x) for x in found] == pytest.approx(expected, rel=1e-6)
    assert float(result.loss) == pytest.approx((expected[0] + expected[1]) / 2)


def test_gradients():
    v, t, h = (x.clone().requires_grad_() for x in embeddings(4, 2))
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([True, True, False, True])
    h_valid = torch.tensor([[True, True], [True, False], [True, True], [False, False]])

    for mode in ("paired", "batch"):

        def loss(v, t, h, temperature, mode=mode):
            return contrastive_loss(v, t, h, temperature, mode, valid, h_valid).loss

        assert torch.autograd.gradcheck(loss, (v, t, h, temperature))


def test_no_valid_row_gives_zero():
    v, t, h = embeddings(3, 1)
    v.requires_grad_()
    result = contrastive_loss(v, t, h, torch.tensor(0.07), "batch", torch.zeros(3, dtype=torch.bool))
    result.loss.backward()
    assert float(result.loss.detach()) == 0
    assert (v.grad == 0).all()


def test_hallucinated_captions_are_negatives_of_images_only():
    v, t, h = embeddings(5, 1)
    near = h.clone()
    near[0, 0] = v[0]
    plain = contrastive_loss(v, t, h, torch.tensor(0.07), "paired")
    fooled = contrastive_loss(v, t, near, torch.tensor(0.07), "paired")
    assert fooled.image_to_text > plain.image_to_text
    assert fooled.text_to_image == plain.text_to_image


def test_paired_mode_sees_only_an_images_own_hallucinations():
    v, t, h = embeddings(3, 1)
    changed = h.clone()
    changed[1, 0] = v[0]
    paired = [contrastive_loss(v, t, x, torch.tensor(0.07), "paired") for x in (h, changed)]
    only_first = torch.tensor([True, False, False])
    first = [contrastive_loss(v, t, x, torch.tensor(0.07), "paired", only_first).loss for x in (h, changed)]
    assert first[0] == first[1]
    assert paired[0].loss != paired[1].loss
