"""What HACL costs: one step in one packed pass against four padded passes, and against a step without HACL.

    python -m tests.bench.hacl_step --rounds 7

A random Starcoder2 Shell-V; forward and backward, no optimizer, vision features given to all.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from shellv_core.training.attention import documents_apart
from shellv_core.training.packed import make_row
from shellv_core.training.pairs import ContrastBatch
from tests.bench.models import (
    EOS_TOKEN,
    FIRST_TEXT_TOKEN,
    IMAGE_TOKEN,
    VISION_WIDTH,
    interleaved_seconds,
    random_module,
    random_pack,
)
from tests.training.packs import padded_passes

PROMPT_TOKENS = 8


def random_contrast(captions: Sequence[int], vocabulary: int, seed: int = 0) -> ContrastBatch:
    """A caption of each length, and for each a hallucinated one that is two tokens longer."""
    generator = np.random.default_rng(seed)
    lengths = np.asarray([*captions, *(length + 2 for length in captions)])
    text_ids = generator.integers(FIRST_TEXT_TOKEN, vocabulary, (len(lengths), lengths.max()))
    text_ids[np.arange(len(lengths)), lengths - 1] = EOS_TOKEN
    count = len(captions)
    return ContrastBatch(
        images=torch.arange(count),
        text_ids=torch.from_numpy(text_ids),
        text_ends=torch.from_numpy(lengths - 1),
        caption_groups=torch.arange(count),
        hallucinated_groups=torch.arange(count)[:, None] + count,
        hallucinated_valid=torch.ones(count, 1, dtype=torch.bool),
        hallucinated_types=torch.zeros(count, 1, dtype=torch.int64),
        truth_slots=torch.zeros(0, dtype=torch.int64),
        truth_valid=torch.zeros(count, 1, dtype=torch.bool),
        truth_groups=torch.zeros(count, 1, dtype=torch.int64),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--image-tokens", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    generator = np.random.default_rng(0)
    captions = generator.integers(10, 20, options.batch).tolist()
    contrast = random_contrast(captions, options.vocabulary)
    pack = random_pack(
        [PROMPT_TOKENS + caption for caption in captions], [True] * options.batch, options.image_tokens,
        options.vocabulary, labelled=0.6,
    )  # fmt: skip
    features = torch.randn(options.batch, options.image_tokens, VISION_WIDTH)
    load = os.getloadavg()[0]
    print(
        f"{options.layers} layers of {options.hidden}, {options.batch} images of {options.image_tokens} tokens,"
        f" captions of {np.mean(captions):.0f} tokens, {options.threads} threads, load {load:.1f}\n"
    )
    print(
        "| learns | pass | CPU seconds | times as fast as four padded | times a plain packed step |\n"
        + "|---" * 5
        + "|"
    )
    for learns in ("all", "projector and heads"):
        module = random_module(options.hidden, options.layers, options.vocabulary, options.image_tokens)
        if learns != "all":
            module.model.model.language_model.requires_grad_(False)
            module.model.lm_head.requires_grad_(False)
        with_hacl, without = (make_row(pack, features, IMAGE_TOKEN, EOS_TOKEN, each) for each in (contrast, None))
        losses = {}

        def padded(name, contrast, module=module, losses=losses):
            module.zero_grad(set_to_none=True)
            loss, result = padded_passes(module, pack, features, contrast)
            loss = loss if result is None else loss + result.objective(0.5)
            loss.backward()
            losses[name] = float(loss.detach())

        def packed(name, row, module=module, losses=losses):
            module.zero_grad(set_to_none=True)
            with documents_apart(module.model.model.language_model):
                output = module(row)
                loss = output.generation_loss_sum
                loss = loss if output.contrast is None else loss + output.contrast.objective(0.5)
                loss.backward()
            losses[name] = float(loss.detach())

        steps = {
            "four padded": partial(padded, "four padded", contrast),
            "one packed": partial(packed, "one packed", with_hacl),
            "plain, padded": partial(padded, "plain, padded", None),
            "plain, packed": partial(packed, "plain, packed", without),
        }
        seconds = interleaved_seconds(steps, options.rounds)
        for name, each in seconds.items():
            faster, plain = seconds["four padded"] / each, each / seconds["plain, packed"]
            print(f"| {learns} | {name} | {each:.3f} | {faster:.2f} | {plain:.2f} |")
        difference = abs(losses["one packed"] - losses["four padded"]) / losses["four padded"]
        print(f"| | difference of the losses, relative | {difference:.1e} | | |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
