"""Attention of packed documents against a dense mask, on both of its ways."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.attention import varlen

from shellv_core.errors import TrainingError
from shellv_core.training import attention
from shellv_core.training.attention import Documents, documents_attention

HEADS, KEY_HEADS, WIDTH = 4, 2, 8
CASES = {
    "one": Documents((0, 7)),
    "mixed": Documents((0, 40, 41, 43, 60, 61, 100, 140), ((0, 30), (60, 61), (100, 130), (61, 99))),
    "branches": Documents(
        (0, 40, 41, 60, 100), ((0, 30), (0, 30), (40, 41), (60, 100), (0, 30), (41, 59)), (5, 5, 12, 1, 20, 5)
    ),
    "alike": Documents((0, 5, 10, 15, 40, 64), ((0, 3), (5, 8))),
}


def tensors(num_tokens, key_heads=KEY_HEADS, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, heads, num_tokens, WIDTH, generator=generator, dtype=dtype).requires_grad_()
        for heads in (HEADS, key_heads, key_heads)
    ]


def visible(documents, window):
    """Who sees whom, (N, N) bool, said token by token."""
    size = documents.num_tokens
    mask = torch.zeros(size, size, dtype=torch.bool)
    for start, stop in itertools.pairwise(documents.borders):
        for token in range(start, stop):
            mask[token, start : token + 1] = True
            if window:
                mask[token, : max(token + 1 - window, 0)] = False
    begun = documents.borders[-1]
    for (start, stop), length in zip(documents.spans, documents.branches or (1,) * len(documents.spans), strict=True):
        for number in range(length):
            seen = [*range(start, stop), *range(begun, begun + number + 1)]
            mask[begun + number, seen[-window:] if window else seen] = True
        begun += length
    return mask


def dense(query, key, value, mask, scaling):
    key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~mask, float("-inf"))
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)


def varlen_by_hand(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """What torch documents of `varlen_attn`, which itself runs on CUDA alone."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (query.shape[1] != key.shape[1]) == enable_gqa
    parts = []
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True):
        assert q1 - q0 <= max_q
        assert k1 - k0 <= max_k
        rows, columns = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0), torch.arange(k1 - k0)[None]
        mask = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
        left, right = window_size
        if right >= 0:
            mask &= columns <= rows + right
        if left >= 0:
            mask &= columns >= rows - left
        part = (each.transpose(0, 1)[None] for each in (query[q0:q1], key[k0:k1], value[k0:k1]))
        parts.append(dense(*part, mask, scale)[0])
    return torch.cat(parts)


@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", ["flash", "per document"])
@pytest.mark.parametrize("key_heads", [1, HEADS])
def test_equals_a_dense_mask(way, case, window, key_heads, monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", varlen_by_hand)
    monkeypatch.setattr(attention, "_takes_flash", lambda query_NHW, dropout: way == "flash")
    documents, scaling = CASES[case], 0.3
    inputs = tensors(documents.num_tokens, key_heads, torch.float32)
    result, weights = documents_attention(
        torch.nn.Identity(), *inputs, None, scaling=scaling, sliding_window=window, documents=documents
    )
    assert weights is None
    expected = dense(*inputs, visible(documents, window), scaling)
    torch.testing.assert_close(result, expected, atol=2e-6, rtol=1e-5)
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    mine = torch.autograd.grad((result * direction).sum(), inputs)
    theirs = torch.autograd.grad((expected * direction).sum(), inputs)
    for first, second in zip(mine, theirs, strict=True):
        torch.testing.assert_close(first, second, atol=5e-6, rtol=1e-4)


def test_bfloat16_on_cpu_stays_bfloat16():
    documents = CASES["mixed"]
    inputs = tensors(documents.num_tokens, dtype=torch.bfloat16)
    result, _ = documents_attention(torch.nn.Identity(), *inputs, None, scaling=0.3, documents=documents)
    assert result.dtype == torch.bfloat16
    expected = dense(*(each.float() for each in inputs), visible(documents, None), 0.3)
    torch.testing.assert_close(result.float(), expected, atol=2e-2, rtol=2e-2)


def test_autocast_computes_in_float32_on_cpu_and_returns_bfloat16():
    """Values come in bfloat16, queries and keys in float32, as the rotary embedding leaves them."""
    documents = CASES["mixed"]
    query, key, value = tensors(documents.num_tokens, dtype=torch.float32)
    value = value.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        result, _ = documents_attention(torch.nn.Identity(), query, key, value, None, scaling=0.3, documents=documents)
    assert result.dtype == torch.bfloat16
    expected = dense(query, key, value.float(), visible(documents, None), 0.3)
    torch.testing.assert_close(result, expected.bfloat16(), atol=0, rtol=2**-7)


def test_dropout_is_applied():
    inputs = tensors(CASES["alike"].num_tokens, dtype=torch.float32)
    results = [
        documents_attention(torch.nn.Identity(), *inputs, None, dropout, documents=CASES["alike"])[0]
        for dropout in (0.5, 0.0)
    ]
    assert not torch.allclose(*results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": None}, "needs the borders"),
        ({"use_cache": True}, "has no cache"),
        ({"longer": 3}, "has no cache: 64 tokens ask 67"),
        ({"mask": torch.ones(1, 1, 64, 64)}, "takes neither a mask.*got attention_mask"),
        ({"softcap": 30.0}, "got softcap"),
        ({"documents": Documents((0, 63))}, "one row of 63 tokens.*got 1 rows of 64"),
        ({"rows": 2}, "got 2 rows"),
    ],
)
def test_what_cannot_be_done_is_refused(change, message):
    options = {"documents": Documents((0, 64)), **change}
    query, key, value = tensors(64, dtype=torch.float32)
    if longer := options.pop("longer", 0):
        key, value = (torch.cat([each[:, :, :longer], each], dim=2) for each in (key, value))
    rows = options.pop("rows", 1)
    query, key, value = (each.expand(rows, -1, -1, -1) for each in (query, key, value))
    with pytest.raises(TrainingError, match=message):
        documents_attention(torch.nn.Identity(), query, key, value, options.pop("mask", None), **options)


@pytest.mark.parametrize("borders", [(), (1, 2), (0, 3, 3), (0, 4, 2)])
def test_borders_rise_from_zero(borders):
    with pytest.raises(TrainingError, match="must rise from 0"):
        Documents(borders)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's varlen attention runs on CUDA alone")
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("case", CASES)
def test_cuda_kernel_equals_a_dense_mask(case, window):
    documents = CASES[case]
    inputs = [
        torch.randn(1, heads, documents.num_tokens, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]
    assert attention._takes_flash(inputs[0][0].transpose(0, 1), 0.0)
    result, _ = documents_attention(
        torch.nn.Identity(), *inputs, None, scaling=0.125, sliding_window=window, documents=documents
    )
    expected = dense(*(each.float() for each in inputs), visible(documents, window).cuda(), 0.125)
    torch.testing.assert_close(result.float(), expected, atol=2e-2, rtol=2e-2)
    mine = torch.autograd.grad(result.float().square().sum(), inputs)
    theirs = torch.autograd.grad(expected.square().sum(), inputs)
    for first, second in zip(mine, theirs, strict=True):
        torch.testing.assert_close(first.float(), second.float(), atol=5e-2, rtol=5e-2)
