from __future__ import annotations

import math

import pytest
import torch

from shellv_core.serving.engine import GenerationRequest
from shellv_core.serving.sampling import Sampler, choose

LOGITS = torch.tensor([0.1, 2.0, 1.9, -3.0])


def sampler(**options):
    return Sampler(GenerationRequest((), **options), prompt_ids=[3], end_ids=[1], vocabulary_size=4)


def draws(count=400, **options):
    one = sampler(seed=0, **options)
    return [choose(LOGITS[None], [one])[0].token_id for _ in range(count)]


def test_temperature_zero_is_greedy():
    assert set(draws(temperature=0)) == {1}


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


def adjusted(seen=(), **options):
    one = sampler(**options)
    for token_id in seen:
        one.note(token_id)
    return one.adjusted(LOGITS).tolist()


def test_the_repetition_penalty_counts_prompt_and_answer():
    assert adjusted([1], repetition_penalty=2.0) == pytest.approx([0.1, 1.0, 1.9, -6.0])


def test_frequency_and_presence_penalties_count_the_answer_alone():
    assert adjusted([1, 1, 2], frequency_penalty=0.5, presence_penalty=0.25) == pytest.approx([0.1, 0.75, 1.15, -3.0])


def test_bias_and_barred_ends():
    assert adjusted(logit_bias={0: 2.0}, min_tokens=1) == pytest.approx([2.1, -math.inf, 1.9, -3.0])
    assert adjusted([0], logit_bias={0: 2.0}, min_tokens=1) == pytest.approx([2.1, 2.0, 1.9, -3.0])


def test_top_k_and_min_p():
    assert set(draws(4000, temperature=1.0, top_k=2)) == {1, 2}
    # The third is about .07 / .48 as likely as the first.
    assert set(draws(4000, temperature=1.0, min_p=0.2)) == {1, 2}
    assert set(draws(4000, temperature=1.0, min_p=0.1)) == {0, 1, 2}


def test_a_batch_chooses_what_each_would_alone():
    rules = [
        {},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 2.0, "seed": 2, "top_p": 0.9, "logit_bias": {3: 4.0}},
        {"repetition_penalty": 1.5, "logprobs": True, "top_logprobs": 2},
        {"temperature": 0.7, "seed": 3, "top_k": 2, "frequency_penalty": 1.0},
    ]
    batch, alone = [sampler(**each) for each in rules], [sampler(**each) for each in rules]
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(50):
        together = choose(logits, batch)
        assert together == [choose(logits[index : index + 1], [each])[0] for index, each in enumerate(alone)]


def test_rows_that_are_not_finite_are_told_apart():
    logits = torch.stack([LOGITS, LOGITS * math.nan, LOGITS * math.inf])
    first, *others = choose(logits, [sampler(temperature=1.0, seed=0) for _ in range(3)])
    assert first is not None
    assert others == [None, None]
