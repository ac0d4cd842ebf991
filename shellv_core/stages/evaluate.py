"""Judges a model: POPE, Hal-Eval, CHAIR and others, beside its own blind run and beside the model trained without HACL.

A model is a stage's output, a registered version (``models:/NAME@ALIAS``), a Hugging Face directory, or a server of the
OpenAI chat protocol (``https://HOST/v1``). Several processes can share the questions: each is given a part (``shard``,
or its rank under torchrun), and a run without one takes what they have answered, asks the rest and ends it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from shellv_core.endpoint.config import EndpointAccess
from shellv_core.evaluation.benchmarks.chair import DEFAULT_PROMPT
from shellv_core.evaluation.benchmarks.hal_eval import OFFICIAL_PROMPT
from shellv_core.evaluation.selection import BenchmarkFiles
from shellv_core.stages.evaluate_asking import Asking
from shellv_core.stages.evaluate_shards import answer_shard, await_shards, parts_at
from shellv_core.stages.evaluate_task import CODE, Task
from shellv_core.stages.runner import StageConfig, StageResult, StageRun, run_stage

if TYPE_CHECKING:
    from shellv_core.evaluation.suite import ModelAnswers


class EvaluateConfig(StageConfig):
    """Settings of evaluate.

    Attributes:
        shard: INDEX/COUNT, such as 0/4: answer this part of the questions and leave the answers at the output, for a
            run without it to end.
    """

    without_effect: ClassVar[frozenset[str]] = frozenset({"shard", "max_missing_share"})

    data_uri: str = ""  # output of prepare_data; may be left out where benchmarks are given
    model_uri: str = ""  # the candidate: output of merge_lora, models:/NAME@ALIAS, model directory or https://HOST/v1
    baseline_uri: str | None = None  # the same trained without HACL, or any other model that is no endpoint
    endpoint: EndpointAccess = EndpointAccess()  # how model_uri is asked where it is an endpoint
    benchmarks: tuple[BenchmarkFiles, ...] = ()  # beside those in the data
    judge_uri: str | None = None  # the judge of benchmarks that need one: model directory or https://HOST/v1
    judge: EndpointAccess = EndpointAccess()  # how judge_uri is asked where it is an endpoint
    blind: bool = True  # ask all again about shuffled images
    max_judgment_tokens: int = Field(default=512, ge=1)
    max_pope_questions: int | None = Field(default=None, ge=2)  # of each split, from the file's start; null for all
    max_hal_eval_items: int | None = Field(default=None, ge=1)
    max_captions: int | None = Field(default=None, ge=1)
    pope_suffix: str = ""  # appended to POPE's questions, for models that were trained to expect it
    hal_eval_prompt: str = OFFICIAL_PROMPT
    caption_prompt: str = DEFAULT_PROMPT
    max_caption_tokens: int = Field(default=48, ge=1)
    temperature: float = Field(default=0.0, ge=0.0)  # 0 is greedy; else each question samples by a seed of its own
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    batch_size: int = Field(default=128, ge=1)  # prompts that run together
    images_per_block: int = Field(default=64, ge=1)  # images whose states are in memory at once
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    num_sample_pictures: int = Field(default=8, ge=0)  # in the report
    shard: str = ""
    max_missing_share: float = Field(default=0.0, ge=0.0, le=1.0)  # answers that an endpoint may fail to give


def run(config: EvaluateConfig) -> StageResult:
    """Answer, score, compare and report.

    Output: ``report.html``, ``summary.md``, ``results.json``, ``outcomes.json`` (per question, for paired tests with
    later models), ``questions/*.jsonl``, ``answers/*.jsonl``, and where there are any ``judgments/*.jsonl`` and
    ``missing.json``. Metrics are flat: ``pope_random_accuracy`` is the candidate's, ``blind_...`` its blind run's,
    ``without_hacl_...`` and ``without_hacl_blind_...`` the baseline's.

    An endpoint that fails leaves questions unanswered. They count as wrong and as missing, the output is written, and
    then the run fails if they are more than `max_missing_share` allows; the next run asks them again.

    Raises:
        ConfigError: if a model or a benchmark is not named as it must be.
        EndpointError: if an endpoint cannot be reached.
        EvaluationError: if the data hold no benchmarks or not their images, or too many answers are missing.
        ModelError: if a model cannot be loaded or gives no usable numbers.
    """
    from shellv_core.evaluation.answers import Shard
    from shellv_core.training.processes import alone, launched

    task = Task(config)
    launch = launched()
    shard = Shard.parse(config.shard) if config.shard else Shard(launch.rank, launch.size)
    if shard.count > 1:
        partial = answer_shard(task, shard)
        if config.shard or shard.index:
            return partial
        await_shards(task, shard)
    # The others have done their part and are gone.
    with alone():
        result = run_stage(
            "evaluate",
            task.config,
            lambda run: _body(run, task),
            task.inputs,
            CODE,
            task.is_whole,
            others=task.references,
        )
    task.check_missing(result)
    return result


def _body(run: StageRun[EvaluateConfig], task: Task) -> None:
    import json

    from shellv_core.evaluation.answers import answer_rows
    from shellv_core.evaluation.benchmark import name_of
    from shellv_core.evaluation.evidence import ANSWERS_NAME, OUTCOMES_NAME, QUESTIONS_NAME, question_rows
    from shellv_core.evaluation.naming import CANDIDATE
    from shellv_core.evaluation.report import marks_of, render_report, render_summary
    from shellv_core.evaluation.suite import count_missing, flat_metrics, gather, judge

    config = run.config
    asking = Asking(task, run.inputs)
    benchmarks, images, substitutes = asking.benchmarks, asking.images, asking.substitutes
    models = asking.ask(run.work, parts_at(run.output, run.work))
    scored, judgments = _judged(run, asking, models)
    rows = gather(benchmarks, models, scored)
    results = judge(benchmarks, scored, rows, config.seed)
    lacking = {name: answers.missing for name, answers in models.items()}
    if judgments:
        lacking["judge"] = {
            key: {row["question_id"]: row["fault"] for row in rows if "fault" in row} for key, rows in judgments.items()
        }
    missing = count_missing(lacking)
    if missing:
        results["missing"] = missing
        run.output.put_bytes(_json(lacking), "missing.json")
    run.metrics.update(flat_metrics(results))

    for name, answers in models.items():
        for benchmark in benchmarks:
            key = name_of(benchmark)
            sighted = answer_rows(benchmark, answers.sighted[key])
            _put_rows(run, ANSWERS_NAME.format(row=name, benchmark=key), sighted)
            if config.blind:
                blind = answer_rows(benchmark, answers.blind[key], substitutes)
                _put_rows(run, f"answers/{name}-{key}-blind.jsonl", blind)
    for key, asked in rows[CANDIDATE].questions.items():
        _put_rows(run, QUESTIONS_NAME.format(benchmark=key), question_rows(asked))
    run.output.put_bytes(_json(results), "results.json")
    outcomes = {row: evidence.outcomes for row, evidence in rows.items()}
    run.output.put_bytes(json.dumps(outcomes).encode(), OUTCOMES_NAME)
    report = render_report(results, rows, images, _lineage(run, task), config.num_sample_pictures, marks_of(benchmarks))
    run.output.put_bytes(report.encode(), "report.html")
    run.output.put_bytes(render_summary(results).encode(), "summary.md")
    questions = {name_of(benchmark): len(benchmark.questions) for benchmark in benchmarks}
    run.details.update(
        questions=questions,
        num_asked=len(rows) * sum(questions.values()) + sum(map(len, judgments.values())),
        num_missing=sum(each["count"] for each in missing.values()),
        missing=missing,
        usage=asking.usage(),
    )


def _judged(
    run: StageRun[EvaluateConfig], asking: Asking, models: Mapping[str, ModelAnswers]
) -> tuple[Mapping[str, ModelAnswers], dict[str, list[dict[str, Any]]]]:
    """The models' answers, of benchmarks that need a judge the judge's words about them; and all that it was asked."""
    from dataclasses import replace

    from shellv_core.evaluation.benchmark import name_of

    judged: list[Any] = [each for each in asking.benchmarks if hasattr(each, "judge_questions")]
    if not judged:
        return models, {}
    from shellv_core.evaluation.benchmark import judge_answers
    from shellv_core.evaluation.judges import Judge

    scored, asked = {}, {}
    for name, answers in models.items():
        sides = {}
        for side in ("sighted", "blind") if run.config.blind else ("sighted",):
            sides[side] = dict(getattr(answers, side))
            for benchmark in judged:
                key = name_of(benchmark)
                judge = Judge(
                    asking.generator("judge"),
                    asking.images,
                    run.work / f"judgments-{name}-{key}-{side}.jsonl",
                    run.config.max_judgment_tokens,
                )
                sides[side][key] = judge_answers(benchmark, sides[side][key], judge)
                suffix = "" if side == "sighted" else f"-{side}"
                asked[f"{name}-{key}{suffix}"] = judge.rows
                _put_rows(run, f"judgments/{name}-{key}{suffix}.jsonl", judge.rows)
        scored[name] = replace(answers, **sides)
    return scored, asked


def _lineage(run: StageRun[EvaluateConfig], task: Task) -> Any:
    import shellv_core
    from shellv_core.evaluation.report import Lineage

    # No time of this run: the same inputs give the same report, byte for byte.
    candidate = run.inputs.get("model")
    name = candidate.manifest.fingerprint[:12] if candidate else run.config.endpoint.model or task.folders["model"].name
    inputs = task.references | {key: directory.reference() for key, directory in run.inputs.items()}
    return Lineage(
        title=f"model {name}",
        sections={
            "Inputs": {
                key: f"{source.uri} (content {source.content_sha256[:16]})" for key, source in sorted(inputs.items())
            },
            "Settings": run.config.model_dump(
                exclude={f"{key}_uri" for key in (*inputs, "output")} | {"shard", "max_missing_share"}
            ),
            "Run": {"fingerprint": run.fingerprint, "library version": shellv_core.__version__},
        },
    )


def _put_rows(run: StageRun[EvaluateConfig], name: str, rows: list[dict[str, Any]]) -> None:
    import json

    run.output.put_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(), name)


def _json(value: Any) -> bytes:
    import json

    return (json.dumps(value, indent=1) + "\n").encode()
