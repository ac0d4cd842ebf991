"""Judges a model: POPE, Hal-Eval and CHAIR, beside its own blind run and beside the model trained without HACL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from shellv_core.evaluation.benchmarks.chair import DEFAULT_PROMPT
from shellv_core.evaluation.benchmarks.hal_eval import OFFICIAL_PROMPT
from shellv_core.stages.runner import StageConfig, StageResult, StageRun, run_stage

if TYPE_CHECKING:
    from shellv_core.evaluation.benchmark import Benchmark
    from shellv_core.evaluation.suite import ModelAnswers

MODEL_PREFIX = "model"


class EvaluateConfig(StageConfig):
    """Settings of evaluate."""

    data_uri: str = ""  # output of prepare_data
    model_uri: str = ""  # output of merge_lora: the candidate
    baseline_uri: str | None = None  # the same trained without HACL
    max_pope_questions: int | None = Field(default=None, ge=2)  # of each split, from the file's start; null for all
    max_hal_eval_items: int | None = Field(default=None, ge=1)
    max_captions: int | None = Field(default=None, ge=1)
    pope_suffix: str = ""  # appended to POPE's questions, for models that were trained to expect it
    hal_eval_prompt: str = OFFICIAL_PROMPT
    caption_prompt: str = DEFAULT_PROMPT
    max_caption_tokens: int = Field(default=48, ge=1)
    batch_size: int = Field(default=128, ge=1)  # prompts that run together
    images_per_block: int = Field(default=64, ge=1)  # images whose states are in memory at once; a block is saved whole
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    num_sample_pictures: int = Field(default=8, ge=0)  # in the report


def run(config: EvaluateConfig) -> StageResult:
    """Answer, score, compare and report.

    Output: ``report.html``, ``results.json``, ``outcomes.json`` (per question, for paired tests with later models) and
    ``answers/*.jsonl``. Metrics are flat: ``pope_random_accuracy`` is the candidate's, ``blind_...`` its blind run's,
    ``without_hacl_...`` and ``without_hacl_blind_...`` the baseline's.

    Raises:
        EvaluationError: if the data hold no benchmarks or not their images.
        ModelError: if a model cannot be loaded or gives no usable numbers.
    """
    inputs = {"data": config.data_uri, "model": config.model_uri, "baseline": config.baseline_uri}
    return run_stage("evaluate", config, _body, inputs=inputs, code=("evaluation", "models"))


def _body(run: StageRun[EvaluateConfig]) -> None:
    import json

    from shellv_core.evaluation.answers import answer_rows
    from shellv_core.evaluation.benchmark import name_of
    from shellv_core.evaluation.report import render_report
    from shellv_core.evaluation.suite import flat_metrics, judge, needed_images, outcomes_of, shuffle_images

    config = run.config
    benchmarks = _read_benchmarks(run)
    images = _read_images(run, needed_images(benchmarks))
    substitutes = shuffle_images(benchmarks, config.seed)
    models = _ask_models(run, benchmarks, images, substitutes)
    results = judge(benchmarks, models, config.seed)
    run.metrics.update(flat_metrics(results))

    for name, answers in models.items():
        for benchmark in benchmarks:
            key = name_of(benchmark)
            _put_rows(run, f"answers/{name}-{key}.jsonl", answer_rows(benchmark, answers.sighted[key]))
            blind = answer_rows(benchmark, answers.blind[key], substitutes)
            _put_rows(run, f"answers/{name}-{key}-blind.jsonl", blind)
    run.output.put_bytes(_json(results), "results.json")
    run.output.put_bytes(json.dumps(outcomes_of(benchmarks, models)).encode(), "outcomes.json")
    report = render_report(results, benchmarks, models, images, _lineage(run), config.num_sample_pictures)
    run.output.put_bytes(report.encode(), "report.html")
    run.details["questions"] = {name_of(benchmark): len(benchmark.questions) for benchmark in benchmarks}


def _read_benchmarks(run: StageRun[EvaluateConfig]) -> list[Benchmark]:
    from shellv_core.evaluation.suite import Limits, read_benchmarks

    config, data = run.config, run.inputs["data"]
    return read_benchmarks(
        data.fetch,
        [entry.name for entry in data.files("benchmarks/")],
        Limits(config.max_pope_questions, config.max_hal_eval_items, config.max_captions),
        config.pope_suffix,
        config.hal_eval_prompt,
        config.caption_prompt,
        config.max_caption_tokens,
    )


def _read_images(run: StageRun[EvaluateConfig], names: set[str]) -> dict[str, bytes]:
    from shellv_core.data.shards import read_shards

    samples = read_shards(run.inputs["data"], "validation")
    return {
        sample.image_name: sample.image
        for sample in samples
        if sample.image is not None and sample.image_name in names and sample.image_name is not None
    }


def _ask_models(
    run: StageRun[EvaluateConfig],
    benchmarks: list[Benchmark],
    images: Mapping[str, bytes],
    substitutes: Mapping[str, str],
) -> dict[str, ModelAnswers]:
    import torch

    from shellv_core.evaluation.generator import LlavaGenerator
    from shellv_core.evaluation.suite import BASELINE, CANDIDATE, ask_models
    from shellv_core.models.compose import load_model

    config = run.config
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = {CANDIDATE: "model", BASELINE: "baseline"}
    names = {name: key for name, key in names.items() if key in run.inputs}

    def load(name: str) -> LlavaGenerator:
        path = run.inputs[names[name]].fetch_tree(MODEL_PREFIX)
        loaded, processor = load_model(path, getattr(torch, config.dtype))
        model: torch.nn.Module = loaded
        return LlavaGenerator(model.to(device), processor, config.batch_size)

    def ask(generators: Mapping[str, LlavaGenerator]) -> dict[str, ModelAnswers]:
        return ask_models(generators, benchmarks, images, substitutes, run.work, config.images_per_block)

    if device == "cuda":
        # One after the other, so that two models need not fit.
        return {name: answers for each in names for name, answers in ask({each: load(each)}).items()}
    # Small models gain little from several cores each; side by side they use them all.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(max(1, num_threads // len(names)))
    try:
        return ask({name: load(name) for name in names})
    finally:
        torch.set_num_threads(num_threads)


def _lineage(run: StageRun[EvaluateConfig]) -> Any:
    import shellv_core
    from shellv_core.evaluation.report import Lineage

    # No time of this run: the same inputs give the same report, byte for byte.
    candidate = run.inputs["model"].manifest
    return Lineage(
        title=f"model {candidate.fingerprint[:12]}",
        sections={
            "Inputs": {
                key: f"{directory.uri} (content {directory.content_sha256[:16]})"
                for key, directory in run.inputs.items()
            },
            "Settings": run.config.model_dump(exclude={"data_uri", "model_uri", "baseline_uri", "output_uri"}),
            "Run": {"fingerprint": run.fingerprint, "library version": shellv_core.__version__},
        },
    )


def _put_rows(run: StageRun[EvaluateConfig], name: str, rows: list[dict[str, Any]]) -> None:
    import json

    run.output.put_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(), name)


def _json(value: Any) -> bytes:
    import json

    return (json.dumps(value, indent=1) + "\n").encode()
