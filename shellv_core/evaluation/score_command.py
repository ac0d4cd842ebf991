"""``shellv score``: score anyone's answer file, as JSON on standard output."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from shellv_core.errors import EvaluationError
from shellv_core.evaluation.benchmarks import find, registry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmarks and their files."""
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, entry in registry().items():
        sub = benchmarks.add_parser(
            name,
            help=entry.summary,
            description=f"{entry.summary}\n\nScored: {entry.metrics}\n\nanswers:\n{entry.answers}",
            epilog=f"The questions are published at {entry.published}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument(
            "--questions", type=Path, metavar="FILE", required=entry.questions_required, help=entry.questions
        )
        group = sub.add_mutually_exclusive_group(required=True)
        group.add_argument("--answers", type=Path, metavar="FILE", help="what is scored; see above")
        group.add_argument(
            "--write-questions", type=Path, metavar="FILE", help="score nothing; write question_id, image and text rows"
        )
        for option in entry.options:
            sub.add_argument(
                "--" + option.name.replace("_", "-"),
                help=option.help,
                required=option.required,
                **(
                    {"choices": option.choices, "default": option.choices[0]}
                    if option.choices
                    else {"type": Path, "metavar": "FILE"}
                ),
            )
        if entry.upload is not None:
            sub.add_argument(
                "--upload", type=Path, metavar="FILE", help="also write the answers as the test server takes them"
            )


def main(args: argparse.Namespace) -> int:
    """Score the files and print one JSON object; returns the exit code.

    Raises:
        EvaluationError: if a file cannot be scored.
    """
    entry = find(args.benchmark)
    options = {option.name: getattr(args, option.name) for option in entry.options}
    options = {name: value for name, value in options.items() if value is not None}
    for path in (args.questions, *options.values()):
        if isinstance(path, Path) and not path.exists():
            raise EvaluationError(f"cannot read {path}: No such file. {entry.name} is published at {entry.published}")
    benchmark = entry.open(args.questions, **options)
    if args.write_questions is not None:
        rows = [
            {"question_id": question.question_id, "image": question.image, "text": question.prompt}
            for question in benchmark.questions
        ]
        _write(args.write_questions, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        return 0
    if not args.answers.exists():
        example = entry.answers.replace("\n", " ")
        raise EvaluationError(f"cannot read {args.answers}: No such file. --answers takes {example}")
    answers = entry.read(benchmark, args.answers)
    scores = benchmark.score(answers)
    if entry.upload is not None and args.upload is not None:
        _write(args.upload, entry.upload(benchmark, answers))
    json.dump(scores, sys.stdout, indent=1)
    sys.stdout.write("\n")
    return 0


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise EvaluationError(f"cannot write {path}: {error.strerror}.") from None
