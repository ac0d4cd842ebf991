"""Trained tokens a second: packs against LLaVA's length-grouped batches and random ones, both padded.

    python -m tests.bench.packed_training --steps 6

The lengths are those of `tests.bench.packing`, all divided by `--scale` so that a small random model shows the ratios
on a CPU. Forward and backward, no optimizer, vision features given. A step is one batch or pack on each of `--ranks`
ranks; here they compute one after another, and a step takes as long as its slowest rank, since gradients are averaged
after each. The figures without waiting count all ranks' time.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from shellv_core.data.packing import plan_epoch
from shellv_core.training.attention import documents_apart
from shellv_core.training.batches import Batch
from shellv_core.training.packed import PackedRow, make_row
from tests.bench.models import EOS_TOKEN, IMAGE_TOKEN, VISION_WIDTH, random_module, random_pack
from tests.bench.packing import (
    IMAGE_TOKENS,
    MAX_TOKENS,
    length_grouped_batches,
    llava_lengths,
    padded_share,
    random_batches,
)

PACK_TOKENS, ROWS, LABELLED = 8192, 16, 0.5


def padded(row: PackedRow) -> Batch:
    """The documents of a row as right-padded rows of a batch."""
    borders = np.asarray(row.documents.borders)
    lengths = np.diff(borders)
    width = int(lengths.max())
    number = np.repeat(np.arange(len(lengths)), lengths)
    place = number * width + np.arange(borders[-1]) - borders[number]
    input_ids = np.zeros(len(lengths) * width, dtype=np.int64)
    input_ids[place] = row.input_ids.numpy()
    place = torch.from_numpy(place)
    return Batch(
        input_ids=torch.from_numpy(input_ids.reshape(len(lengths), width)),
        image_features=row.image_features,
        row_images=torch.arange(0 if row.image_features is None else len(row.image_features)),
        image_positions=place[row.image_positions],
        label_positions=place[row.label_positions],
        label_ids=row.label_ids,
        num_tokens=row.num_tokens,
        contrast=None,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--scale", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    scale, ranks, seed = options.scale, options.ranks, options.seed
    image_tokens = IMAGE_TOKENS // scale
    full, has_image = llava_lengths(seed, options.samples)
    lengths = np.maximum(full // scale, has_image * image_tokens + 4)
    plan = plan_epoch([np.arange(len(lengths) + 1)], lengths, PACK_TOKENS // scale, ranks, seed, 0)
    kinds = {
        "packed": [plan.pack(number) for number in range(plan.num_packs)],
        "padded, LLaVA's length groups": length_grouped_batches(lengths, has_image, ROWS, ranks, seed),
        "padded, random": random_batches(len(lengths), ROWS, seed),
    }
    module = random_module(
        options.hidden, options.layers, options.vocabulary, image_tokens, hacl=False, positions=MAX_TOKENS
    )
    seconds: dict[str, list[list[float]]] = {name: [] for name in kinds}
    tokens: dict[str, int] = dict.fromkeys(kinds, 0)
    slots: dict[str, int] = dict.fromkeys(kinds, 0)

    def batches(name: str, documents: list[np.ndarray]) -> Iterator[Batch | PackedRow]:
        for number, rows in enumerate(documents):
            texts = lengths[rows] - has_image[rows] * image_tokens
            pack = random_pack(texts, has_image[rows], image_tokens, options.vocabulary, LABELLED, seed=number)
            count = int(has_image[rows].sum())
            features = torch.randn(count, image_tokens, VISION_WIDTH) if count else None
            row = make_row(pack, features, IMAGE_TOKEN, EOS_TOKEN, num_slots=PACK_TOKENS // scale)
            yield row if name == "packed" else padded(row)

    def run(batch: Batch | PackedRow) -> float:
        module.zero_grad(set_to_none=True)
        begun = time.process_time()
        if isinstance(batch, PackedRow):
            with documents_apart(module.model.model.language_model):
                module(batch).generation_loss_sum.backward()
        else:
            module(batch).generation_loss_sum.backward()
        return time.process_time() - begun

    print(
        f"{options.layers} layers of {options.hidden}, lengths divided by {scale}, {ranks} ranks,"
        f" {options.steps} steps, load {os.getloadavg()[0]:.1f}\n"
    )
    for step in range(-1, options.steps):  # the first does not count
        for name, documents in kinds.items():
            first = (step + 1) * ranks
            times = []
            for batch in batches(name, documents[first : first + ranks]):
                times.append(run(batch))
                if step >= 0:
                    tokens[name] += batch.num_tokens
                    slots[name] += batch.num_slots
            if step >= 0:
                seconds[name].append(times)
    print(
        "| batches | useful tokens, of an epoch | of these steps | trained tokens/s, without waiting | packed is faster"
        " | with waiting for the slowest rank | packed is faster |\n" + "|---" * 7 + "|"
    )
    alone = {name: tokens[name] / sum(itertools.chain(*each)) for name, each in seconds.items()}
    together = {name: tokens[name] / sum(max(times) for times in each) for name, each in seconds.items()}
    for name, documents in kinds.items():
        faster = [rates["packed"] / rates[name] for rates in (alone, together)]
        room = len(documents) * PACK_TOKENS // scale
        share = lengths.sum() / room if name == "packed" else padded_share(lengths, documents)
        print(
            f"| {name} | {share:.3f} | {tokens[name] / slots[name]:.3f} | {alone[name]:.0f}"
            f" | {faster[0]:.2f} | {together[name]:.0f} | {faster[1]:.2f} |"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
