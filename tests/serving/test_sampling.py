from __future__ import annotations

import torch

from shellv_core.serving.sampling import sample

LOGITS = torch.tensor([0.1, 2.0, 1.9, -3.0])


def draws(count=400, **options):
    generator = torch.Generator().manual_seed(0)
    return [sample(LOGITS, generator=generator, **options) for _ in range(count)]


def test_temperature_zero_is_greedy():
    assert sample(LOGITS, 0, 1.0, None) == 1


def test_a_tiny_temperature_is_all_but_greedy():
    assert set(draws(temperature=1e-6, top_p=1.0)) == {1}


def test_frequencies_follow_the_probabilities():
    counts = torch.bincount(torch.tensor(draws(4000, temperature=1.0, top_p=1.0)), minlength=4) / 4000
    assert torch.allclose(counts, LOGITS.softmax(0), atol=0.03)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    # Probabilities are about .07, .48, .44, .00.
    assert set(draws(temperature=1.0, top_p=0.4)) == {1}
    assert set(draws(temperature=1.0, top_p=0.6)) == {1, 2}
    assert set(draws(4000, temperature=1.0, top_p=0.95)) == {0, 1, 2}


def test_equal_seeds_draw_equal_tokens():
    assert draws(temperature=1.5, top_p=0.9) == draws(temperature=1.5, top_p=0.9)
