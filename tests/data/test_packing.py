from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Starcoder2Config, Starcoder2ForCausalLM

from shellv_core.data.order import epoch_blocks, num_lanes, sample_counts, spread_documents
from shellv_core.data.packing import EpochPlan, document_layout, pack_windows, plan_epoch
from shellv_core.errors import ConfigError, DataError
from tests.bench.packing import llava_lengths, same_shard_pairs

LENGTHS = st.lists(st.integers(1, 50), max_size=200).map(lambda values: np.asarray(values, dtype=np.int64))


@given(LENGTHS, st.integers(1, 60))
def test_packs_hold_every_document_once_and_none_overflows(lengths: np.ndarray, window: int) -> None:
    bounds = [(start, min(start + window, len(lengths))) for start in range(0, len(lengths), window)]
    packs = pack_windows(lengths, 50, bounds)
    assert sorted(packs.documents.tolist()) == list(range(len(lengths)))
    sums = np.add.reduceat(lengths[packs.documents], packs.offsets[:-1]) if len(packs) else np.zeros(0)
    assert (sums <= 50).all()
    assert (np.diff(packs.offsets) > 0).all()
    assert (np.diff(packs.windows) >= 0).all()


@given(LENGTHS)
def test_best_fit_leaves_no_two_packs_half_empty(lengths: np.ndarray) -> None:
    packs = pack_windows(lengths, 50, [(0, len(lengths))])
    sums = np.add.reduceat(lengths[packs.documents], packs.offsets[:-1]) if len(packs) else np.zeros(0)
    assert (sums <= 25).sum() <= 1
    # 11/9 of the best possible and a bit is best-fit decreasing's bound.
    assert len(packs) <= 11 / 9 * np.ceil(lengths.sum() / 50 + (lengths > 25).sum()) + 4


def test_a_document_longer_than_a_pack_is_named() -> None:
    with pytest.raises(DataError, match=r"1 of 3 documents are longer than a pack of 50 tokens; .* 51 tokens"):
        pack_windows(np.array([1, 51, 2]), 50, [(0, 3)])


@given(LENGTHS)
def test_positions_begin_anew_in_each_document(lengths: np.ndarray) -> None:
    positions, borders = document_layout(lengths)
    assert positions.tolist() == [position for length in lengths for position in range(length)]
    assert borders.tolist() == [0, *np.cumsum(lengths).tolist()]
    assert borders.dtype == np.int32


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    global_batch=st.sampled_from([1, 2, 4, 6]),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
)
def test_a_plan_is_whole_on_any_number_of_ranks(sizes: list[int], global_batch: int, seed: int, epoch: int) -> None:
    generator = np.random.default_rng(seed)
    offsets, total = [], 0
    for size in sizes:
        counts = generator.integers(0, 3, size)
        counts[0] = 1
        offsets.append(total + np.concatenate([[0], np.cumsum(counts)]))
        total = int(offsets[-1][-1])
    lengths = generator.integers(1, 30, total)
    plan = plan_epoch(offsets, lengths, 40, global_batch, seed, epoch)
    assert sorted(plan.documents.tolist()) == list(range(total))
    assert plan.sha256() == plan_epoch(offsets, lengths, 40, global_batch, seed, epoch).sha256()
    for world_size in (number for number in range(1, global_batch + 1) if global_batch % number == 0):
        steps = [
            [n for rank in range(world_size) for n in plan.rank_packs(step, rank, world_size)]
            for step in range(plan.num_steps)
        ]
        assert [n for step in steps for n in sorted(step)] == list(range(plan.num_packs))
        assert all(len(step) == global_batch for step in steps[:-1])


def test_epochs_and_seeds_give_other_plans() -> None:
    offsets, lengths = [np.arange(501)], np.random.default_rng(0).integers(1, 30, 500)
    hashes = {plan_epoch(offsets, lengths, 40, 2, seed, epoch).sha256() for seed in (0, 1) for epoch in (0, 1)}
    assert len(hashes) == 4


def test_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(DataError, match="nothing to train on"):
        plan_epoch([np.array([0, 0, 0])], np.zeros(0, dtype=np.int64), 40, 2, 0, 0)
    with pytest.raises(ConfigError, match="without samples"):
        plan_epoch([np.array([0]), np.arange(4)], np.ones(3, dtype=np.int64), 40, 2, 0, 0, weights=[1, 1])


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    total=st.integers(1, 200),
    weights=st.lists(st.floats(0.1, 10), min_size=4, max_size=4),
)
def test_shares_of_sources_are_met_and_no_sample_comes_too_often(
    sizes: list[int], total: int, weights: list[float]
) -> None:
    weights = weights[: len(sizes)]
    counts = sample_counts(sizes, weights, total)
    assert sum(counts) == total
    assert all(abs(count - weight / sum(weights) * total) < 1 for count, weight in zip(counts, weights, strict=True))
    # Over epochs, each source is a row of whole passes.
    seen = [np.zeros(size, dtype=int) for size in sizes]
    for epoch in range(3):
        blocks = epoch_blocks(sizes, counts, seed=1, epoch=epoch)
        assert ((blocks.stop - blocks.start > 0) & (blocks.stop - blocks.start <= 16)).all()
        for source, start, stop in zip(blocks.source, blocks.start, blocks.stop, strict=True):
            seen[source][start:stop] += 1
        for source, count in enumerate(counts):
            passes = (epoch + 1) * count / sizes[source]
            assert seen[source].sum() == (epoch + 1) * count
            assert set(seen[source].tolist()) <= {int(np.floor(passes)), int(np.ceil(passes))}


def test_sources_are_mixed_throughout_the_epoch() -> None:
    sizes = [20_000, 5_000]
    offsets = [np.arange(20_001), np.arange(20_000, 25_001)]
    plan = plan_epoch(offsets, np.full(25_000, 10), 100, 8, 0, 0, weights=[0.5, 0.5], samples_per_epoch=20_000)
    steps = plan.documents[: len(plan.documents) // 2000 * 2000].reshape(-1, 2000)
    shares = (steps >= sizes[0]).mean(axis=1)
    assert np.abs(shares - 0.5).max() < 0.15


def test_lanes_divide_the_batch_and_have_enough_to_read() -> None:
    assert num_lanes(10, 16) == 1
    assert num_lanes(1024 * 7, 16) == 4
    assert num_lanes(10**6, 1) == 16
    assert num_lanes(10**6, 12) == 24
    assert num_lanes(1024 * 13, 12) == 12
    assert num_lanes(10**6, 100) == 100


def test_memory_is_bounded_by_the_windows() -> None:
    """At any time the samples that were begun and not finished are few, and the lanes' windows do not end together."""
    count, global_batch = 100_000, 8
    lengths = np.full(count, 100)
    plan = plan_epoch([np.arange(count + 1)], lengths, 1000, global_batch, 0, 0)
    packs = np.arange(plan.num_packs)
    first, last = np.full(plan.units.max() + 1, plan.num_packs), np.zeros(plan.units.max() + 1, dtype=int)
    np.minimum.at(first, plan.units, packs)
    np.maximum.at(last, plan.units, packs)
    sizes = np.bincount(plan.units, np.diff(plan.offsets))
    open_documents = [sizes[(first <= pack) & (last >= pack)].sum() for pack in packs[:: global_batch * 5]]
    assert max(open_documents) < 1.1 * 16 * 1024
    begun = np.bincount(first // (global_batch * 5))[1:]
    assert begun.max() <= 3


def test_the_order_is_as_good_as_a_full_shuffle_within_a_batch() -> None:
    lengths = llava_lengths(0, 60_000)[0]
    plan = plan_epoch([np.arange(60_001)], lengths, 8192, 8, 0, 0)
    random_plan = EpochPlan(np.random.default_rng(0).permutation(60_000), plan.offsets, plan.units, 8)
    ours, perfect = (same_shard_pairs(each, samples_per_shard=400, steps=1) for each in (plan, random_plan))
    assert perfect == pytest.approx(1, abs=0.1)
    assert ours < 1.3
    # Blocks as they lie in the shards, to show that the measure sees it.
    plain = EpochPlan(np.arange(60_000), plan.offsets, plan.units, 8)
    assert same_shard_pairs(plain, samples_per_shard=400, steps=1) > 50


def test_more_than_95_percent_of_a_llava_like_mix_is_tokens() -> None:
    lengths = llava_lengths(1, 30_000)[0]
    plan = plan_epoch([np.arange(30_001)], lengths, 8192, 8, 0, 0)
    assert lengths.sum() / (plan.num_packs * 8192) > 0.95


def _models() -> list[PreTrainedModel]:
    sizes = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(0)
    return [Starcoder2ForCausalLM(Starcoder2Config(**sizes)).eval(), LlamaForCausalLM(LlamaConfig(**sizes)).eval()]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model", _models(), ids=lambda model: type(model).__name__)
def test_packed_documents_do_not_see_each_other(model: PreTrainedModel, attention: str) -> None:
    model.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(97, (length,), generator=generator) for length in (17, 1, 40, 23)]
    position_ids, _ = document_layout(np.asarray([len(document) for document in documents]))
    with torch.no_grad():
        alone = torch.cat([model(document[None]).logits[0] for document in documents])
        packed = model(
            torch.cat(documents)[None],
            position_ids=torch.from_numpy(position_ids)[None],
            attention_mask=None,
            use_cache=False,
        ).logits[0]
        leaking = model(torch.cat(documents)[None], use_cache=False).logits[0]
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=1e-4)
    assert (leaking - alone).abs().max() > 0.1


def test_blocks_are_read_by_one_lane() -> None:
    """What makes reading cheap: of each block, all documents come in one lane and one window of it."""
    offsets = [np.arange(20_001)]
    blocks = epoch_blocks([20_000], [20_000], 0, 0)
    order = spread_documents(blocks, offsets, 8, 0, 0)
    of_document = np.empty(20_000, dtype=int)
    for number, (start, stop) in enumerate(zip(blocks.start, blocks.stop, strict=True)):
        of_document[start:stop] = number
    pairs = np.unique(np.stack([of_document[order.documents], order.unit]), axis=1)
    assert pairs.shape[1] == len(blocks)
    assert (np.diff(order.unit) >= 0).all()
    assert len(set(zip(order.unit.tolist(), order.lane.tolist(), strict=True))) == order.unit.max() + 1
