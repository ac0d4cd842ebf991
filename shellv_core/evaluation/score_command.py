"""``shellv score``: score anyone's answer file, as JSON on standard output."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ANSWERS_HELP = 'JSON Lines or a JSON array of {"question_id": ..., "text": ...}, in any order'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmarks and their files."""
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    pope = benchmarks.add_parser("pope", help="POPE yes/no questions about objects")
    pope.add_argument("--questions", type=Path, required=True, help="POPE question file (JSON Lines or a JSON array)")
    pope.add_argument("--answers", type=Path, required=True, help=ANSWERS_HELP)
    hal_eval = benchmarks.add_parser(
        "hal-eval",
        help="Hal-Eval discriminative questions, by hallucination type",
        description="Question ids are ITEM/KIND: the item's key, or else its image as written in the question file"
        " (#2 behind it for a second item of that name), and gt, object, attribute, relation or event. For example"
        " val2014/COCO_val2014_000000462565.jpg/gt",
    )
    hal_eval.add_argument("--questions", type=Path, required=True, help="Hal-Eval file, as its authors publish it")
    hal_eval.add_argument("--answers", type=Path, required=True, help=ANSWERS_HELP)


def main(args: argparse.Namespace) -> int:
    """Score the files and print one JSON object; returns the exit code.

    Raises:
        EvaluationError: if a file cannot be scored.
    """
    from shellv_core.evaluation.benchmark import Benchmark
    from shellv_core.evaluation.hal_eval import HalEval
    from shellv_core.evaluation.pope import Pope
    from shellv_core.evaluation.rows import index_answers, read_rows

    rows = read_rows(args.questions)
    benchmark: Benchmark
    if args.benchmark == "pope":
        benchmark = Pope(rows, source=str(args.questions))
    else:
        benchmark = HalEval(rows, source=str(args.questions))
    answers = index_answers(read_rows(args.answers), source=str(args.answers))
    json.dump(benchmark.score(answers), sys.stdout, indent=1)
    sys.stdout.write("\n")
    return 0
