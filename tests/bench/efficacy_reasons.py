"""Why objectives help or do not: what text alone gives away, and where their gradients reach.

    python -m tests.bench.efficacy_reasons --preset nano --seed 0 --output docs/efficacy-reasons

Works on the stages that `tests.bench.efficacy` has made below SHELLV_HOME, and makes those that are missing. Gradients
are those of a whole language model and projector, at the model that finetuning starts from and at the one that it ends
with, of the sum over the same batches for all objectives.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shellv_core.data.hallucination.measurement import measure
from shellv_core.data.shards import read_shards
from shellv_core.models.compose import load_model, num_image_tokens, projector_layers
from shellv_core.models.hacl import load_heads
from shellv_core.stages.finetune import FinetuneConfig
from shellv_core.stages.heads import HEADS, start_heads
from shellv_core.stages.presets import stage_config
from shellv_core.storage import InputDirectory, home
from shellv_core.templates import template_of
from shellv_core.training.batches import Batch, batch_images, count_label_tokens, make_batch, plan_epoch
from shellv_core.training.examples import TYPES, Examples, image_bytes, tokenize_samples
from shellv_core.training.features import CachedFeatures, cached_features
from shellv_core.training.fit import TrainingData
from shellv_core.training.model import TrainingModel, frozen_copy
from tests.bench.efficacy import RECIPES, markdown_table, preference, run_stages

RECIPE = "HACL in stage 2"
PARTS = ("projector", "language model")
OBJECTIVES = ("generation", "contrast", "preference")
NUM_PAIRS, NUM_TOLD, BATCH_TO_TELL = 4000, 2048, 64


@dataclass(frozen=True)
class Telling:
    """How the contrast's embeddings tell a caption from its hallucinated caption of one type.

    Attributes:
        text_distance: mean cosine distance of the two texts' embeddings.
        margin: mean of cos(image, caption) - cos(image, hallucinated caption).
        right, blind: shares of pairs with a positive margin, with their own image and with another one.
    """

    text_distance: float
    margin: float
    right: float
    blind: float


@dataclass(frozen=True)
class Gradient:
    """One objective's gradient in one part: its norm, the cosine with generation's, and how equal batches are.

    Attributes:
        agreement: norm of the batches' mean by the mean of their norms; 1 if all batches say the same, and
            1 / sqrt(batches) if they have nothing in common.
    """

    norm: float
    cosine: float
    agreement: float


def text_only(data: InputDirectory, seed: int) -> dict[str, Any]:
    """Pair accuracy by type of a classifier that sees no image."""
    pairs: dict[str, list[tuple[str, str]]] = {}
    for sample in read_shards(data, "train"):
        for lie in sample.hallucinated_captions:
            of_kind = pairs.setdefault(lie.type, [])
            if len(of_kind) < NUM_PAIRS:
                of_kind.append((lie.truth or sample.caption or "", lie.text))
    return {kind: asdict(value) for kind, value in measure(pairs, seed).items()}


def load(config: FinetuneConfig, model: InputDirectory, heads: InputDirectory | None, seed: int) -> tuple[Any, Any]:
    """A training model, all of whose parts require gradients, and its processor."""
    llava, processor = load_model(model.fetch_tree("model/"))
    started = start_heads(config.hacl, llava, seed) if heads is None else load_heads(heads.fetch(HEADS))
    module = TrainingModel(llava, started, config.hacl, config.preference)
    module.requires_grad_(False)
    for layer in (*projector_layers(llava), llava.model.language_model, llava.lm_head):
        layer.requires_grad_(True)
    module.reference = frozen_copy(llava)
    return module.eval(), processor


def batches(
    config: FinetuneConfig, module: TrainingModel, examples: Examples, features: CachedFeatures, size: int, number: int
) -> Iterator[tuple[Batch, int]]:
    """The first batches of an epoch, and how many tokens each learns."""
    for turn, rows in enumerate(plan_epoch(examples.input_ids.lengths, size, config.seed, 0)[:number], start=1):
        images = batch_images(examples, rows)
        batch = make_batch(
            examples, rows, features.gather(images).float(), module.model.config.image_token_id,
            module.model.generation_config.pad_token_id, config.hacl.num_hallucinated, turn, True, True,
        )  # fmt: skip
        yield batch, count_label_tokens(examples, rows)


def gradients(
    config: FinetuneConfig, module: TrainingModel, parts: Iterator[tuple[Batch, int]]
) -> tuple[dict[str, dict[str, Gradient]], dict[str, float]]:
    """Part -> objective -> gradient, and the contrast's mean figures."""
    inner = module.model
    weights = {
        PARTS[0]: [each for layer in projector_layers(inner) for each in layer.parameters()],
        PARTS[1]: list(inner.model.language_model.parameters()),
    }
    everything = [each for group in weights.values() for each in group]
    sums = {(part, name): None for part in PARTS for name in OBJECTIVES}
    norms: dict[tuple[str, str], list[float]] = {key: [] for key in sums}
    figures: dict[str, list[float]] = {}
    for batch, num_labels in parts:
        output = module(batch)
        contrast, told = output.contrast, output.preference
        losses = {
            "generation": output.generation_loss_sum / num_labels,
            "contrast": contrast.objective(config.hacl.truth_weight, config.hacl.text_margin_weight),
            "preference": told.objective(config.preference.image_weight, config.preference.anchor_weight),
        }
        for name in ("retrieval_accuracy", "hallucination_accuracy"):
            figures.setdefault(name, []).append(float(getattr(contrast, name)))
        for name, loss in losses.items():
            found = dict(
                zip(
                    everything, torch.autograd.grad(loss, everything, retain_graph=True, allow_unused=True), strict=True
                )
            )
            for part, group in weights.items():
                flat = torch.cat([(torch.zeros_like(w) if found[w] is None else found[w]).flatten() for w in group])
                norms[part, name].append(float(flat.norm()))
                sums[part, name] = flat if sums[part, name] is None else sums[part, name] + flat
    result: dict[str, dict[str, Gradient]] = {}
    for (part, name), total in sums.items():
        base = sums[part, "generation"]
        result.setdefault(part, {})[name] = Gradient(
            norm=float(np.mean(norms[part, name])),
            cosine=float(torch.nn.functional.cosine_similarity(total, base, dim=0)),
            agreement=float(total.norm()) / sum(norms[part, name]),
        )
    return result, {name: float(np.mean(values)) for name, values in figures.items()}


def tables(content: Mapping[str, Any]) -> str:
    """The measurements as Markdown."""
    told = [
        [
            kind,
            f"{100 * each['value']:.1f} ({100 * each['low']:.1f} to {100 * each['high']:.1f})",
            str(each["num_pairs"]),
        ]
        for kind, each in content["text_only"].items()
    ]
    rows = []
    for measured in content["gradients"]:
        for part in PARTS:
            found = measured["parts"][part]
            base = found["generation"]["norm"]
            rows.append(
                [
                    measured["model"],
                    str(measured["batch_size"]),
                    part,
                    *(f"{found[name]['norm'] / base:.2f}" for name in OBJECTIVES[1:]),
                    *(f"{found[name]['cosine']:+.2f}" for name in OBJECTIVES[1:]),
                    *(f"{found[name]['agreement']:.2f}" for name in OBJECTIVES),
                    *(f"{100 * value:.1f}" for value in measured["figures"].values()),
                ]
            )
    head = ["model", "batch", "part", *(f"{name}: norm" for name in OBJECTIVES[1:])]
    head += [*(f"{name}: cosine" for name in OBJECTIVES[1:]), *(f"{name}: agreement" for name in OBJECTIVES)]
    head += ["retrieval accuracy", "hallucination accuracy"]
    return "\n\n".join(
        [
            f"Preset `{content['preset']}`, seed {content['seed']}. Made by `python -m tests.bench.efficacy_reasons`.",
            "## What text alone tells",
            "Share of held-out pairs of a caption and its hallucinated caption that a text classifier tells apart, in"
            " percent with its 95 % interval; 50 is chance.",
            markdown_table(["type", "pair accuracy", "pairs"], told),
            "## What the contrast's embeddings tell",
            "Mean cosine distance of a caption's and its hallucinated caption's embeddings, mean margin (the image's"
            " cosine with the caption less that with the hallucinated one), and shares of pairs with a positive margin,"
            " in percent, with the own image and with another one.",
            markdown_table(
                ["model", "type", "text distance", "margin", "right", "right with another image"],
                [
                    [
                        name,
                        kind,
                        f"{each['text_distance']:.3f}",
                        f"{each['margin']:+.3f}",
                        f"{100 * each['right']:.1f}",
                        f"{100 * each['blind']:.1f}",
                    ]
                    for name, told_by_type in content["telling"].items()
                    for kind, each in told_by_type.items()
                ],
            ),
            "## Where gradients reach",
            f"Of {content['batches']} batches. Norms as a multiple of the generation loss's, at weight 1; cosines with"
            " the generation loss's gradient, both summed over the batches; agreement is the norm of the sum by the sum"
            f" of the norms ({content['batches'] ** -0.5:.2f}, 1 / sqrt(batches), is noise). Accuracies in percent.",
            markdown_table(head, rows),
        ]
    )


@torch.no_grad()
def telling(module: TrainingModel, parts: Iterator[tuple[Batch, int]]) -> dict[str, Telling]:
    """Type -> how the embeddings of the contrast tell."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for batch, _ in parts:
        features = module(batch).features
        lies_ND, types = features.hallucinated[:, 0], features.hallucinated_type[:, 0].tolist()
        differences_ND = features.caption - lies_ND
        margins = (features.image * differences_ND).sum(-1).tolist()
        elsewhere = (features.image.roll(1, 0) * differences_ND).sum(-1).tolist()
        distances = (1 - (features.caption * lies_ND).sum(-1)).tolist()
        for kind, *values in zip(types, distances, margins, elsewhere, strict=True):
            found.setdefault(TYPES[kind], []).append(tuple(values))
    result = {}
    for kind in sorted(found, key=TYPES.index):
        distances_P, margins_P, elsewhere_P = np.array(found[kind]).T
        result[kind] = Telling(
            float(distances_P.mean()), float(margins_P.mean()), float((margins_P > 0).mean()),
            float((elsewhere_P > 0).mean()),
        )  # fmt: skip
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--output", type=Path, default=Path("docs/efficacy-reasons"))
    options = parser.parse_args(argv)
    from shellv_core.logs import setup_logging

    setup_logging()
    settings = [*RECIPES[RECIPE].overrides, *preference(), f"seed={options.seed}"]
    config = stage_config(options.preset, "finetune", settings)
    stages = run_stages(
        options.preset, options.seed, RECIPES[RECIPE].overrides, (home() / "efficacy").resolve().as_uri()
    )
    at = {name: InputDirectory(result.output_uri) for name, result in stages.items()}
    content: dict[str, Any] = {
        "preset": options.preset, "seed": options.seed, "batches": options.batches,
        "text_only": text_only(at["prepare_data"], options.seed),
    }  # fmt: skip
    points = {
        "before finetuning": (at["pretrain_projector"], None),
        "after finetuning with HACL": (at["merge_lora"], at["finetune"]),
    }
    data = TrainingData.of(at["prepare_data"], "train")
    examples, features = None, None
    for name, (model, heads) in points.items():
        module, processor = load(config, model, heads, options.seed)
        if examples is None:
            examples = tokenize_samples(
                data.read(), processor.tokenizer, module.model.config.image_token_id, num_image_tokens(module.model),
                config.training.max_length, config.training.tasks, lambda: None, template_of(processor),
                config.preference.prompt,
            )  # fmt: skip
            features = cached_features(
                lambda: image_bytes(data.read()), examples.num_images, data.identity, module.model, processor,
                torch.bfloat16 if config.training.precision == "bf16" else torch.float32,
            )  # fmt: skip
        told = telling(module, batches(config, module, examples, features, BATCH_TO_TELL, NUM_TOLD // BATCH_TO_TELL))
        content.setdefault("telling", {})[name] = {kind: asdict(each) for kind, each in told.items()}
        for size in (config.training.global_batch_size, 4 * config.training.global_batch_size):
            found, figures = gradients(
                config, module, batches(config, module, examples, features, size, options.batches)
            )
            content.setdefault("gradients", []).append(
                {
                    "model": name,
                    "batch_size": size,
                    "figures": figures,
                    "parts": {
                        part: {key: asdict(each) for key, each in of_part.items()} for part, of_part in found.items()
                    },
                }
            )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = tables(content)
    options.output.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
