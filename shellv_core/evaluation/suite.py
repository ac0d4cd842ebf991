"""All benchmarks of a data set, asked of several models, scored beside their blind runs and compared."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shellv_core.errors import EvaluationError
from shellv_core.evaluation.answers import (
    Answered,
    AnswerGenerator,
    Prompt,
    Shard,
    answer_all,
    answers_to,
    derange,
    plan_prompts,
)
from shellv_core.evaluation.benchmark import Benchmark, Scores, name_of
from shellv_core.evaluation.benchmarks.chair import Chair
from shellv_core.evaluation.benchmarks.hal_eval import HalEval
from shellv_core.evaluation.benchmarks.pope import SPLITS, Pope
from shellv_core.evaluation.evidence import Answers, Evidence, compare, confusion, figures, questions_of
from shellv_core.evaluation.naming import BLIND, CANDIDATE
from shellv_core.evaluation.rows import read_rows

POPE_NAME = "benchmarks/pope/{split}.jsonl"
HAL_EVAL_NAME = "benchmarks/hal_eval/scenes.json"
CHAIR_NAME = "benchmarks/chair/scenes.jsonl"
# Details of a score that do not become metrics of their own.
_NOT_FLAT = frozenset({"author_rule", "parsed_only", "counts"})


@dataclass(frozen=True)
class ModelAnswers:
    """What one model said with the right images and with shuffled ones, and why it said nothing where it did not."""

    sighted: Answers
    blind: Answers  # empty where nothing was asked so
    missing: Answers = field(default_factory=dict)  # with the reasons as texts; "NAME_blind" of the blind runs

    def runs(self) -> dict[str, Answers]:
        """What was said in each run, by the suffix of its name: "" and, where there was one, ``_blind``."""
        return {"": self.sighted, **({f"_{BLIND}": self.blind} if self.blind else {})}


@dataclass(frozen=True)
class Limits:
    """How much of each benchmark is asked: the first so many rows of its file, None for all."""

    pope_questions: int | None = None
    hal_eval_items: int | None = None
    captions: int | None = None


def read_benchmarks(
    fetch: Callable[[str], Path],
    names: Iterable[str],
    limits: Limits,
    pope_suffix: str,
    hal_eval_prompt: str,
    caption_prompt: str,
    caption_tokens: int,
) -> list[Benchmark]:
    """The benchmarks that a prepare_data output holds.

    Args:
        fetch: gives a local path for a file name of the output.
        names: the file names that the output has.

    Raises:
        EvaluationError: if it holds none.
    """
    present = set(names)
    benchmarks: list[Benchmark] = []
    for split in SPLITS:
        name = POPE_NAME.format(split=split)
        if name in present:
            rows = read_rows(fetch(name))[: limits.pope_questions]
            benchmarks.append(Pope(rows, split, pope_suffix, source=name))
    if HAL_EVAL_NAME in present:
        rows = read_rows(fetch(HAL_EVAL_NAME))[: limits.hal_eval_items]
        benchmarks.append(HalEval(rows, hal_eval_prompt, source=HAL_EVAL_NAME))
    if CHAIR_NAME in present:
        rows = read_rows(fetch(CHAIR_NAME))[: limits.captions]
        benchmarks.append(Chair(rows, caption_prompt, caption_tokens, source=CHAIR_NAME))
    if not benchmarks:
        raise EvaluationError(
            "the data hold no benchmarks (benchmarks/pope/*.jsonl, benchmarks/hal_eval/scenes.json or"
            " benchmarks/chair/scenes.jsonl). Evaluate on an output of prepare_data that was made with scenes."
        )
    return benchmarks


def needed_images(benchmarks: Iterable[Benchmark]) -> set[str]:
    """Names of all images that are asked about."""
    return {question.image for benchmark in benchmarks for question in benchmark.questions if question.image}


def ask_models(
    generators: Mapping[str, AnswerGenerator],
    benchmarks: Sequence[Benchmark],
    images: Mapping[str, bytes],
    substitutes: Mapping[str, str] | None,
    log_paths: Mapping[str, Path],
    images_per_block: int,
    shard: Shard = Shard(),  # noqa: B008 - frozen
    known: Mapping[str, Mapping[Prompt, str]] | None = None,
) -> dict[str, ModelAnswers]:
    """All answers of several models, sighted and blind, side by side in a thread each.

    Continues the journals at `log_paths`. The first fault stops all models at their next answers.

    Args:
        shard: the part of the questions to be asked; the others count as missing, unless they are `known`.
        known: model name -> answers that other processes have.
    """
    prompts = plan_prompts(benchmarks, substitutes)
    stop = threading.Event()

    def ask(name: str) -> ModelAnswers:
        others = (known or {}).get(name, {})
        answered = answer_all(
            prompts, generators[name], images, log_paths[name], images_per_block, f"{name} answers", stop, shard, others
        )
        return _by_benchmark(benchmarks, answered, substitutes)

    with ThreadPoolExecutor(len(generators)) as pool:
        futures = {name: pool.submit(ask, name) for name in generators}
        try:
            done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
        for future in done:
            future.result()
        return {name: future.result() for name, future in futures.items()}


def count_missing(lacking: Mapping[str, Answers]) -> dict[str, Any]:
    """How many answers each model lacks, of the reasons by benchmark and question; models that lack none are left out.

    Returns:
        ``{"candidate": {"count": 3, "by_reason": {"HTTP 500": 3}, "benchmarks": {"pope_random": 3}}}``.
    """
    counts = {}
    for name, by_benchmark in lacking.items():
        reasons = Counter(reason for missing in by_benchmark.values() for reason in missing.values())
        if reasons:
            benchmarks = {key: len(missing) for key, missing in by_benchmark.items() if missing}
            counts[name] = {
                "count": reasons.total(),
                "by_reason": dict(sorted(reasons.items())),
                "benchmarks": benchmarks,
            }
    return counts


def shuffle_images(benchmarks: Iterable[Benchmark], seed: int) -> dict[str, str]:
    """What the blind run shows in each image's place."""
    return derange(needed_images(benchmarks), seed)


def gather(
    benchmarks: Sequence[Benchmark], models: Mapping[str, ModelAnswers], scored: Mapping[str, ModelAnswers]
) -> dict[str, Evidence]:
    """Row (``candidate``, ``candidate_blind``, ...) -> what it said and how right that was.

    Args:
        models: what the models said.
        scored: the same, of benchmarks that need a judge the judge's words.
    """
    questions = questions_of(benchmarks)
    rows = {}
    for name, answers in models.items():
        for suffix, said in answers.runs().items():
            words = scored[name].runs()[suffix]
            outcomes = {
                metric: parts
                for benchmark in benchmarks
                for metric, parts in benchmark.outcomes(words[name_of(benchmark)]).items()
            }
            rows[name + suffix] = Evidence(questions, said, outcomes)
    return rows


def judge(
    benchmarks: Sequence[Benchmark], scored: Mapping[str, ModelAnswers], rows: Mapping[str, Evidence], seed: int
) -> dict[str, Any]:
    """Results of all models: scores, headline metrics with intervals, and paired comparisons.

    Returns:
        ``{"models": {name: {"pope": {split: scores}, "pope_blind": ..., "hal_eval": {type: scores}, ...}},
        "metrics": {row: {metric: {"value", "low", "high"}}},
        "comparisons": {"candidate_blind": {metric: comparison}, "without_hacl": ...},
        "confusion": {row: counts}}``; a comparison is that of the candidate with its own blind run or with another
        model, its difference candidate minus other.
    """
    trees: dict[str, Scores] = {}
    for name, answers in scored.items():
        trees[name] = {}
        for benchmark in benchmarks:
            for suffix, said in answers.runs().items():
                _place(trees[name], benchmark.key, suffix, benchmark.score(said[name_of(benchmark)]))
    against = [row for row in rows if row == f"{CANDIDATE}_{BLIND}" or (row in scored and row != CANDIDATE)]
    return {
        "models": trees,
        "metrics": {row: figures(evidence, seed) for row, evidence in rows.items()},
        "comparisons": {row: compare(rows[CANDIDATE], rows[row], seed) for row in against},
        "confusion": {row: confusion(evidence) for row, evidence in rows.items()},
    }


def flat_metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of `judge`'s results by flat names, such as ``pope_random_accuracy`` for the candidate,
    ``blind_pope_random_accuracy`` for its blind run, and both again with ``without_hacl_`` in front."""
    flat: dict[str, float] = {}
    for name, tree in results["models"].items():
        prefix = "" if name == CANDIDATE else f"{name}_"
        for key, scores in tree.items():
            blind = key.endswith(f"_{BLIND}")
            start = prefix + (f"{BLIND}_{key.removesuffix(f'_{BLIND}')}" if blind else key)
            flat.update(_flatten(start, scores))
    for row, metrics in results["metrics"].items():
        model = row.removesuffix(f"_{BLIND}")
        prefix = ("" if model == CANDIDATE else f"{model}_") + ("" if model == row else f"{BLIND}_")
        for metric, figure in metrics.items():
            flat.setdefault(prefix + metric, figure["value"])
    return flat


def _by_benchmark(
    benchmarks: Sequence[Benchmark], answered: Answered, substitutes: Mapping[str, str] | None
) -> ModelAnswers:
    missing = {name_of(each): answers_to(each, answered.faults) for each in benchmarks}
    sighted = {name_of(each): answers_to(each, answered.texts) for each in benchmarks}
    if substitutes is None:
        return ModelAnswers(sighted, {}, missing)
    missing |= {f"{name_of(each)}_{BLIND}": answers_to(each, answered.faults, substitutes) for each in benchmarks}
    blind = {name_of(each): answers_to(each, answered.texts, substitutes) for each in benchmarks}
    return ModelAnswers(sighted, blind, missing)


def _place(tree: Scores, key: tuple[str, ...], suffix: str, scores: Scores) -> None:
    first, *rest = key
    level = tree if not rest else tree.setdefault(first + suffix, {})
    level[rest[0] if rest else first + suffix] = scores


def _flatten(prefix: str, scores: Mapping[str, Any]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in scores.items():
        if isinstance(value, Mapping):
            if key not in _NOT_FLAT:
                flat.update(_flatten(f"{prefix}_{key}", value))
        elif isinstance(value, int | float):
            flat[f"{prefix}_{key}"] = float(value)
    return flat
