"""``shellv calibrate``: what the hallucination view of one model is worth, and what it should mark."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shellv_core.serving.hallucination import Thresholds

DESCRIPTION = """\
Find the thresholds of a model's hallucination view on pictures whose content is known, and measure on others of them
how well the view finds what the model makes up:

  shellv calibrate --model models:/shellv-nano@champion --data s3://shellv/prepare_data/1f2e --output thresholds.json
  shellv serve --model models:/shellv-nano@champion --thresholds thresholds.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what is calibrated on what."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", required=True, metavar="REFERENCE", help="as in shellv serve")
    parser.add_argument(
        "--heads", metavar="REFERENCE", help="HACL heads (default: those that the model was trained with, if known)"
    )
    parser.add_argument(
        "--data", required=True, metavar="URI", help="output of prepare_data whose rows tell the objects in each image"
    )
    parser.add_argument("--split", default="validation", help="of the data (default: %(default)s)")
    parser.add_argument("--images", type=int, metavar="N", help="take so many (default: all)")
    parser.add_argument(
        "--max-tokens", type=int, default=96, metavar="N", help="of a description (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the halves and the bootstrap (0)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="thresholds for shellv serve --thresholds")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON instead of a table")


def main(args: argparse.Namespace) -> int:
    """Calibrate, write and print; returns the exit code.

    Raises:
        ShellVError: if the model or the data cannot be read, or too little is made up to fit anything.
    """
    thresholds, figures = run(args.model, args.data, args.heads, args.split, args.images, args.max_tokens, args.seed)
    if args.output:
        args.output.write_text(thresholds.model_dump_json(indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(figures, indent=1) + "\n" if args.json else "\n".join(table(figures)) + "\n")
    return 0


def run(
    model: str, data: str, heads: str | None, split: str, num_images: int | None, max_tokens: int, seed: int
) -> tuple[Thresholds, dict[str, Any]]:
    """Thresholds and figures of a model; the arguments are those of the command.

    Raises:
        ShellVError: as in `main`.
    """
    import contextlib
    import itertools

    from shellv_core.data.shards import read_shards
    from shellv_core.errors import EvaluationError
    from shellv_core.serving.heads import fetch_heads, find_heads
    from shellv_core.serving.reference import fetch_model
    from shellv_core.stages.calibration import calibrate
    from shellv_core.storage import InputDirectory
    from shellv_core.storage.seaweedfs import embedded_s3, external_s3_configured

    if num_images is not None and num_images < 4:
        raise EvaluationError(f"--images {num_images} leaves nothing to measure; give at least 4.")
    files = fetch_model(model)
    found = find_heads(model) if heads is None else fetch_heads(heads)
    embedded = data.startswith("s3://") and not external_s3_configured()
    with embedded_s3() if embedded else contextlib.nullcontext():
        known = (each for each in read_shards(InputDirectory(data), split) if each.image and each.objects)
        samples = list(itertools.islice(known, num_images))
    if len(samples) < 4:
        raise EvaluationError(
            f"{data} tells the objects of {len(samples)} pictures in its split {split!r}; 4 are needed."
        )
    seen = asyncio.run(_observe(files.path, found, samples, max_tokens))
    return calibrate(seen, files.revision, seed)


async def _observe(path: Path, heads: Path | None, samples: Any, max_tokens: int) -> Any:
    from shellv_core.models.hacl import load_heads
    from shellv_core.serving.inference.grounding import HeadsGrounding
    from shellv_core.serving.inference.loading import load_served
    from shellv_core.serving.transformers_engine import EngineConfig, TransformersEngine
    from shellv_core.stages.calibration import observe

    model, processor, adapters = load_served(path)
    config = EngineConfig()
    engine = TransformersEngine(model, processor, config, adapters)
    grounding = None if heads is None else HeadsGrounding(engine, model, processor, load_heads(heads))
    try:
        return await observe(engine, grounding, samples, max_tokens, config.slots)
    finally:
        await engine.drain(0)


def table(figures: dict[str, Any]) -> list[str]:
    """Lines for people: areas with their intervals, marks and calibration errors."""
    pictures = figures["pictures"]
    lines = [f"fitted on {pictures['fitting']} pictures, measured on {pictures['measuring']} others"]
    for kind in ("objects", "sentences"):
        found = figures[kind]
        lines += ["", f"{kind}: {found['false']} of {found['count']} made up; area under the ROC curve by"]
        for name, each in found["area"].items():
            lines.append(f"  {name:32} {each['value']:.3f} [{each['low']:.3f}, {each['high']:.3f}]")
        if "marked" in found:
            precision, recall = (
                "-" if found[each] is None else f"{100 * found[each]:.0f} %" for each in ("precision", "recall")
            )
            lines.append(f"  marked {found['marked']}: precision {precision}, recall {recall}")
            lines.append(f"  expected calibration error of the risk {found['calibration_error']:.3f}")
    if "captions" in figures:
        lines += ["", "hallucinated captions against true ones, by margin (by blank picture alone)"]
        for kind, each in figures["captions"].items():
            lines.append(
                f"  {kind:12} area {each['area']['value']:.3f} ({each['blind_area']['value']:.3f}), below its truth"
                f" {100 * each['lower_margin']:.0f} % ({100 * each['blind_lower']:.0f} %) of {each['pairs']}"
            )
    return lines
