"""How full packs are beside padded batches, how fast they are made, and how well the order is shuffled.

    python -m tests.bench.packing --samples 665000

The lengths are modelled: the sub-sets and their counts are those of LLaVA-1.5's instruction data (its paper, table 7),
an image counts 576 tokens, the lengths of the texts are log-normal guesses, cut at 2048 tokens as in LLaVA.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np

from shellv_core.data.packing import EpochPlan, pack_windows, plan_epoch

IMAGE_TOKENS = 576
MAX_TOKENS = 2048
# Thousands of conversations, whether about an image, mean tokens of the text, spread of their logarithm.
MIX = {
    "LLaVA conversation": (58, True, 240, 0.5),
    "LLaVA detail": (23, True, 190, 0.3),
    "LLaVA complex reasoning": (77, True, 230, 0.35),
    "ShareGPT": (40, False, 1300, 0.9),
    "VQAv2": (83, True, 110, 0.35),
    "GQA": (72, True, 210, 0.5),
    "OKVQA": (9, True, 50, 0.3),
    "OCR-VQA": (80, True, 160, 0.2),
    "A-OKVQA": (66, True, 110, 0.4),
    "TextCaps": (22, True, 60, 0.2),
    "RefCOCO": (48, True, 280, 0.6),
    "Visual Genome": (86, True, 300, 0.5),
}


def llava_lengths(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Modelled tokens of `count` conversations, int64, and whether each is about an image."""
    generator = np.random.default_rng(seed)
    shares, has_image, means, spreads = (np.asarray(column) for column in zip(*MIX.values(), strict=True))
    kind = generator.choice(len(MIX), count, p=shares / shares.sum())
    spread = spreads[kind]
    text = np.exp(generator.normal(np.log(means[kind]) - spread**2 / 2, spread)).astype(np.int64) + 10
    return np.minimum(text + has_image[kind] * IMAGE_TOKENS, MAX_TOKENS), has_image[kind]


def padded_share(lengths: np.ndarray, batches: Sequence[np.ndarray]) -> float:
    """Tokens that are not padding where each batch is as wide as its longest row."""
    return sum(lengths[rows].sum() for rows in batches) / sum(lengths[rows].max() * len(rows) for rows in batches)


def random_batches(count: int, size: int, seed: int) -> list[np.ndarray]:
    """Rows of shuffled batches."""
    order = np.random.default_rng(seed).permutation(count)
    return [order[start : start + size] for start in range(0, count, size)]


def length_grouped_batches(
    lengths: np.ndarray, has_image: np.ndarray, size: int, world_size: int, seed: int
) -> list[np.ndarray]:
    """Batches as LLaVA's sampler groups them.

    Rows with and without image apart, each shuffled and cut into megabatches of `size` x `world_size` rows; a megabatch
    is sorted by length and dealt to the ranks so that their sums are even, longest first to the emptiest.
    """
    generator = np.random.default_rng(seed)
    megabatches: list[np.ndarray] = []
    for kind in (True, False):
        rows = generator.permutation(np.flatnonzero(has_image == kind))
        megabatches += [rows[at : at + size * world_size] for at in range(0, len(rows), size * world_size)]
    batches = []
    for index in generator.permutation(len(megabatches)):
        megabatch = megabatches[index]
        ranks: list[list[int]] = [[] for _ in range(world_size)]
        sums = np.zeros(world_size)
        limit = -(-len(megabatch) // world_size)
        for row in megabatch[np.argsort(-lengths[megabatch], kind="stable")]:
            rank = int(np.argmin(sums))
            ranks[rank].append(int(row))
            sums[rank] = sums[rank] + lengths[row] if len(ranks[rank]) < limit else np.inf
        batches += [np.asarray(rank) for rank in ranks if rank]
    return batches


def same_shard_pairs(plan: EpochPlan, samples_per_shard: int, steps: int) -> float:
    """Rate of pairs from one shard within `steps` neighbouring steps, relative to a full random permutation.

    Documents are taken for samples, numbered through the shards.
    """
    count = len(plan.documents)
    pack = np.repeat(np.arange(plan.num_packs), np.diff(plan.offsets))
    group = pack // (plan.global_batch * steps)
    shard = plan.documents // samples_per_shard
    together = np.unique(group * (shard.max() + 1) + shard, return_counts=True)[1]
    sizes = np.bincount(group)
    rate = (together * (together - 1)).sum() / (sizes * (sizes - 1)).sum()
    return float(rate / ((samples_per_shard - 1) / (count - 1)))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=665_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    count = options.samples
    lengths, has_image = llava_lengths(options.seed, count)
    print(f"{count} conversations, {lengths.mean():.0f} tokens on average, at most {lengths.max()}\n")
    print("| batches | share of tokens |\n|---|---|")
    print(f"| padded, random, 16 rows | {padded_share(lengths, random_batches(count, 16, options.seed)):.3f} |")
    grouped = length_grouped_batches(lengths, has_image, 16, 8, options.seed)
    print(f"| padded, LLaVA's length groups, 8 ranks x 16 rows | {padded_share(lengths, grouped):.3f} |")
    for window in (256, 1024):
        bounds = [(start, min(start + window, count)) for start in range(0, count, window)]
        packs = pack_windows(lengths, 8192, bounds)
        print(f"| best fit, 8192 tokens, windows of {window} as read | {lengths.sum() / len(packs) / 8192:.3f} |")
    print(
        "\n| plan | share of tokens | packs | seconds | packs/s | pairs of one shard: 1 step | 8 steps |\n"
        + "|---" * 7
        + "|"
    )
    for capacity, global_batch in ((4096, 32), (8192, 1), (8192, 8), (8192, 16), (16384, 8)):
        begun = time.process_time()
        plan = plan_epoch([np.arange(count + 1)], lengths, capacity, global_batch, options.seed, 0)
        seconds = time.process_time() - begun
        share = lengths.sum() / (plan.num_packs * capacity)
        pairs = [same_shard_pairs(plan, 400, steps) for steps in (1, 8)]
        print(
            f"| {global_batch} x {capacity} tokens | {share:.3f} | {plan.num_packs} | {seconds:.2f}"
            f" | {plan.num_packs / seconds:.0f} | {pairs[0]:.2f} | {pairs[1]:.2f} |"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
