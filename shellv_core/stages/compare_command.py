"""``shellv compare``: two models on the same questions, paired.

A and B are outputs of evaluate, or two answer files of one benchmark.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shellv_core.errors import EvaluationError

if TYPE_CHECKING:
    from shellv_core.evaluation.evidence import Evidence

DESCRIPTION = """\
Compare two models on the same questions: for each metric both values, the difference with its 95 % interval, the
p-value and a verdict. A and B are outputs of evaluate (folders or addresses), or two answer files of one benchmark:

  shellv compare s3://shellv/evaluate/1f2e s3://shellv/evaluate/93ab --html comparison.html
  shellv compare a.jsonl b.jsonl --benchmark pope --questions coco_pope_random.json
"""
EPILOG = """\
Intervals: paired bootstrap over pictures. p: McNemar's exact test by picture for right and wrong answers, else paired
bootstrap; adjusted by Holm's method for all metrics. The verdict holds at p of at most 0.05.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what is compared and where it goes."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("first", metavar="A", help="output of evaluate, or an answer file")
    parser.add_argument("second", metavar="B", help="the same of the other model")
    parser.add_argument("--benchmark", metavar="NAME", help="whose answers the files hold, as in shellv score NAME")
    parser.add_argument("--questions", default="", metavar="FILE", help="the benchmark's question file")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a further file or setting of the benchmark, as in shellv score NAME --help",
    )
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="pictures for --html, by the questions' names")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the bootstrap (0)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write both side by side as one HTML file")


def main(args: argparse.Namespace) -> int:
    """Compare and print; returns the exit code.

    Raises:
        EvaluationError: if A or B cannot be read, or they were not asked the same questions.
    """
    from shellv_core.evaluation.evidence import compare, figures

    if args.benchmark:
        first, second, images = _answers(args)
    else:
        first, second, images = _evaluations(args)
    comparison = compare(first, second, args.seed)
    values = figures(first, args.seed), figures(second, args.seed)
    if args.html:
        from shellv_core.evaluation.report import render_comparison

        page = render_comparison((args.first, args.second), (first, second), values, comparison, images)
        _write(args.html, page)
    if args.json:
        metrics = {
            metric: {"first": values[0][metric], "second": values[1][metric], **each}
            for metric, each in comparison.items()
        }
        json.dump({"first": args.first, "second": args.second, "metrics": metrics}, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        from shellv_core.evaluation.table import render_comparison_table

        sys.stdout.write(render_comparison_table(values, comparison))
    return 0


def _answers(args: argparse.Namespace) -> tuple[Evidence, Evidence, Mapping[str, bytes]]:
    from shellv_core.evaluation.benchmark import name_of
    from shellv_core.evaluation.benchmarks import find
    from shellv_core.evaluation.evidence import Evidence, questions_of
    from shellv_core.evaluation.selection import BenchmarkFiles, open_benchmark

    pairs = [option.partition("=") for option in args.option]
    wrong = next((option for option, (_, equals, _) in zip(args.option, pairs, strict=True) if not equals), None)
    if wrong is not None:
        raise EvaluationError(f"--option {wrong!r} is not NAME=VALUE.")
    options = {name: value for name, _, value in pairs}
    selection = BenchmarkFiles(name=args.benchmark, questions=args.questions, options=options)
    benchmark = open_benchmark(selection)
    rows = []
    for path in (Path(args.first), Path(args.second)):
        if not path.exists():
            raise EvaluationError(f"cannot read {path}: No such file. It takes {find(args.benchmark).answers}")
        answers = find(args.benchmark).read(benchmark, path)
        rows.append(Evidence(questions_of([benchmark]), {name_of(benchmark): answers}, benchmark.outcomes(answers)))
    return rows[0], rows[1], _pictures(args.images, rows[0])


def _evaluations(args: argparse.Namespace) -> tuple[Evidence, Evidence, Mapping[str, bytes]]:
    from shellv_core.errors import StorageError
    from shellv_core.evaluation.evidence import read_evaluation, same_questions
    from shellv_core.storage import InputDirectory

    folders = []
    for address in (args.first, args.second):
        if "://" not in address and Path(address).is_file():
            raise EvaluationError(
                f"{address} is a file; to compare answer files, name what they answer with --benchmark and --questions."
            )
        uri = address if "://" in address else Path(address).absolute().as_uri()
        try:
            folders.append(InputDirectory(uri))
        except StorageError as error:
            raise EvaluationError(f"{address} is no output of evaluate: {error}") from None
    if not same_questions(*folders):
        raise EvaluationError(
            f"{args.first} and {args.second} are evaluations of different data or benchmarks, so that their questions"
            " cannot be paired. Evaluate both models on the same."
        )
    first, second = map(read_evaluation, folders)
    if args.images or not args.html:
        return first, second, _pictures(args.images, first)
    return first, second, _pictures_of_data(folders[0], first)


def _pictures(folder: Path | None, evidence: Evidence) -> Mapping[str, bytes]:
    from shellv_core.evaluation.selection import Images

    if folder is None:
        return {}
    names = {each.question.image for asked in evidence.questions.values() for each in asked.values()}
    return Images([{name: folder / name for name in names if name and (folder / name).is_file()}])


def _pictures_of_data(evaluation: Any, evidence: Evidence) -> Mapping[str, bytes]:
    """The pictures of the data that was evaluated, none where they are gone."""
    from shellv_core.errors import StorageError
    from shellv_core.logs import get_logger
    from shellv_core.stages.evaluate_asking import read_images
    from shellv_core.storage import InputDirectory

    data = evaluation.manifest.inputs.get("data")
    if data is None:
        return {}
    names = {each.question.image for asked in evidence.questions.values() for each in asked.values()}
    try:
        return read_images(InputDirectory(data.uri), names)
    except StorageError as error:
        get_logger(__name__).warning("compare: no pictures (%s)", error)
        return {}


def _write(path: Path, content: str) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(content, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise EvaluationError(f"cannot write {path}: {error.strerror}.") from None
