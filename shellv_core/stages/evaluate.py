"""Judges a model: POPE, Hal-Eval, CHAIR and others, beside its own blind run and beside the model trained without HACL.

A model is a stage's output, a registered version (``models:/NAME@ALIAS``), a Hugging Face directory, or a server of the
OpenAI chat protocol (``https://HOST/v1``). Several processes can share the questions: each is given a part (``shard``,
or its rank under torchrun), and a run without one takes what they have answered, asks the rest and ends it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from shellv_core.endpoint.config import EndpointAccess
from shellv_core.evaluation.benchmarks.chair import DEFAULT_PROMPT
from shellv_core.evaluation.benchmarks.hal_eval import OFFICIAL_PROMPT
from shellv_core.evaluation.selection import BenchmarkFiles
from shellv_core.stages.runner import StageConfig, StageResult, StageRun, open_stage, run_stage, work_folder

if TYPE_CHECKING:
    from shellv_core.endpoint.asking import Endpoint
    from shellv_core.evaluation.answers import AnswerGenerator, Prompt, Shard
    from shellv_core.evaluation.benchmark import Benchmark
    from shellv_core.evaluation.suite import ModelAnswers
    from shellv_core.storage import InputDirectory, InputReference, Manifest, OutputDirectory

MODEL_PREFIX = "model"
CODE = ("endpoint", "evaluation", "models")
PART_NAME = "parts/{name}-{index}of{count}.jsonl"


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

    task = _Task(config)
    launch = launched()
    shard = Shard.parse(config.shard) if config.shard else Shard(launch.rank, launch.size)
    if shard.count > 1:
        partial = _answer_shard(task, shard)
        if config.shard or shard.index:
            return partial
        _await_shards(task, shard)
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


class _Task:
    """What is asked of whom, checked before anything is loaded.

    Attributes:
        inputs: input name -> URI of a committed folder, None where there is none.
        references: the inputs that are none: model directories and the user's benchmarks.
        folders: model name -> model directory.
        remote: those of "model" and "judge" that are endpoints.
        benchmarks: the user's.
        images: image name -> file, of the user's benchmarks.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        from shellv_core.errors import ConfigError
        from shellv_core.evaluation.selection import read_selected
        from shellv_core.serving.reference import find_registered
        from shellv_core.storage import InputReference

        self.references: dict[str, InputReference] = {}
        self.folders: dict[str, Path] = {}
        selected = read_selected(config.benchmarks)
        self.benchmarks, self.images = selected.benchmarks, selected.images
        if self.benchmarks:
            self.references["benchmarks"] = InputReference(uri="benchmarks", content_sha256=selected.content_sha256)
        self.inputs: dict[str, str | None] = {"data": config.data_uri or (None if self.benchmarks else "")}
        addresses = {"model": config.model_uri, "baseline": config.baseline_uri or None, "judge": config.judge_uri}
        for name, uri in addresses.items():
            if uri is None or (_is_endpoint(uri) and name != "baseline"):
                continue
            if uri.startswith("models:"):
                uri = find_registered(uri).uri
            folder = _model_folder(uri)
            if folder is None:
                self.inputs[name] = uri
            else:
                self.folders[name] = folder
                self.references[name] = InputReference(uri=folder.as_uri(), content_sha256=_content_of(folder))
        if _is_endpoint(config.baseline_uri):
            raise ConfigError(
                f"baseline_uri={config.baseline_uri!r}: only the candidate and the judge can be endpoints."
            )
        judged = [each for each in self.benchmarks if hasattr(each, "judge_questions")]
        if judged and not config.judge_uri:
            raise ConfigError(
                f"the benchmark {'_'.join(judged[0].key)} needs a judge; give judge_uri=https://HOST/v1 with"
                " judge.model, or a model directory."
            )
        self.config = config
        self.remote = [name for name in ("model", "judge") if _is_endpoint(addresses[name])]

    def is_whole(self, committed: Manifest) -> bool:
        """Whether an evaluation lacks no more answers than allowed."""
        missing, asked = committed.details.get("num_missing", 0), committed.details.get("num_asked", 0)
        return bool(missing <= self.config.max_missing_share * asked)

    def check_missing(self, result: StageResult) -> None:
        """Raise `EvaluationError` if more answers are missing than allowed."""
        from shellv_core.errors import EvaluationError
        from shellv_core.evaluation.answers import told

        missing, asked = result.details.get("num_missing", 0), result.details.get("num_asked", 0)
        if missing > self.config.max_missing_share * asked:
            reasons = {
                f"{name}, {reason}": count
                for name, counts in result.details["missing"].items()
                for reason, count in counts["by_reason"].items()
            }
            raise EvaluationError(
                f"{missing} of {asked} answers are missing ({told(reasons)}). The results at {result.output_uri} count"
                " them as missing, and missing.json names them. Run again to ask these once more, or allow for them"
                " with max_missing_share."
            )

    def open_endpoint(self, name: str) -> Endpoint:
        """The endpoint "model" or "judge", its access checked."""
        from shellv_core.endpoint.asking import Endpoint
        from shellv_core.endpoint.config import EndpointConfig
        from shellv_core.storage import home

        config = self.config
        is_judge = name == "judge"
        access = config.judge if is_judge else config.endpoint
        values = access.model_dump() | {"cache_path": access.cache_path or str(home() / "cache" / "endpoint")}
        if not is_judge and config.top_p < 1:
            values["body"] = {"top_p": config.top_p, **values["body"]}
        endpoint = Endpoint(
            EndpointConfig(
                **values,
                base_url=str(config.judge_uri if is_judge else config.model_uri),
                temperature=0.0 if is_judge else config.temperature,
                max_tokens=config.max_judgment_tokens,
            )
        )
        endpoint.check_access()
        return endpoint


def _is_endpoint(uri: str | None) -> bool:
    return bool(uri) and str(uri).startswith(("http://", "https://"))


def _model_folder(uri: str) -> Path | None:
    """The directory at `uri` where it is a model's own, None where it is a stage's output or missing."""
    from shellv_core.storage import local_path

    path = Path(uri).absolute() if uri and "://" not in uri else local_path(uri) if uri.startswith("file:") else None
    return path if path is not None and (path / "config.json").is_file() else None


def _content_of(folder: Path) -> str:
    from shellv_core.config import fingerprint
    from shellv_core.storage import sha256_of

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return fingerprint([(path.relative_to(folder).as_posix(), sha256_of(path)) for path in files])


def _body(run: StageRun[EvaluateConfig], task: _Task) -> None:
    import json

    from shellv_core.evaluation.answers import answer_rows
    from shellv_core.evaluation.benchmark import name_of
    from shellv_core.evaluation.evidence import ANSWERS_NAME, OUTCOMES_NAME, QUESTIONS_NAME, question_rows
    from shellv_core.evaluation.naming import CANDIDATE
    from shellv_core.evaluation.report import marks_of, render_report, render_summary
    from shellv_core.evaluation.suite import count_missing, flat_metrics, gather, judge

    config = run.config
    asking = _Asking(task, run.inputs)
    benchmarks, images, substitutes = asking.benchmarks, asking.images, asking.substitutes
    models = asking.ask(run.work, _parts_at(run.output, run.work))
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


class _Asking:
    """The questions with their images, and the models that they are put to."""

    def __init__(self, task: _Task, inputs: Mapping[str, InputDirectory]) -> None:
        from shellv_core.evaluation.selection import Images
        from shellv_core.evaluation.suite import needed_images, shuffle_images
        from shellv_core.training.processes import launched

        self.task, self.inputs, self.local_rank = task, inputs, launched().local_rank
        self.endpoints = {name: task.open_endpoint(name) for name in task.remote}
        data = inputs.get("data")
        own = [] if data is None else _read_benchmarks(task.config, data)
        self.benchmarks: list[Benchmark] = [*own, *task.benchmarks]
        of_data = {} if data is None else read_images(data, needed_images(own))
        _check_apart(task, of_data)
        self.images: Mapping[str, bytes] = Images([of_data, task.images])
        self.substitutes = shuffle_images(self.benchmarks, task.config.seed) if task.config.blind else None
        self.generators: dict[str, AnswerGenerator] = {}

    def ask(
        self, folder: Path, parts: Mapping[str, Mapping[Prompt, str]] | None = None, shard: Shard | None = None
    ) -> dict[str, ModelAnswers]:
        """What each model says, or said before into `folder`."""
        from shellv_core.evaluation.answers import Shard
        from shellv_core.evaluation.naming import BASELINE, CANDIDATE
        from shellv_core.evaluation.suite import ask_models

        shard = shard or Shard()
        sources = {CANDIDATE: "model", BASELINE: "baseline"}
        names = [name for name, source in sources.items() if self._has(source)]
        logs = {name: log_path(folder, name, shard) for name in names}

        def ask(names: Sequence[str]) -> dict[str, ModelAnswers]:
            generators = {name: self.generator(sources[name]) for name in names}
            return ask_models(
                generators,
                self.benchmarks,
                self.images,
                self.substitutes,
                logs,
                self.task.config.images_per_block,
                shard,
                parts,
            )

        local = [name for name in names if sources[name] not in self.endpoints]
        if not local:
            return ask(names)
        import torch

        if torch.cuda.is_available():
            # One after the other, so that two models need not fit.
            answers: dict[str, ModelAnswers] = {}
            for name in names:
                answers |= ask([name])
                if name in local:
                    del self.generators[sources[name]]
            return answers
        # Small models gain little from several cores each; side by side they use them all.
        num_threads = torch.get_num_threads()
        torch.set_num_threads(max(1, num_threads // len(local)))
        try:
            return ask(names)
        finally:
            torch.set_num_threads(num_threads)

    def generator(self, source: str) -> AnswerGenerator:
        """The model at input `source`, loaded once."""
        if source not in self.generators:
            self.generators[source] = self._open(source)
        return self.generators[source]

    def usage(self) -> dict[str, Any]:
        """What endpoints were sent and what it cost, by input."""
        return {
            source: generator.usage.to_record()
            for source, generator in self.generators.items()
            if hasattr(generator, "usage")
        }

    def _has(self, source: str) -> bool:
        return source in self.inputs or source in self.task.folders or source in self.endpoints

    def _open(self, source: str) -> AnswerGenerator:
        config = self.task.config
        if source in self.endpoints:
            from shellv_core.evaluation.endpoint_generator import EndpointGenerator

            return EndpointGenerator(self.endpoints[source], config.seed)
        import torch

        from shellv_core.evaluation.choosing import Sampling
        from shellv_core.evaluation.transformers_generator import load_generator

        folder = self.task.folders.get(source) or self.inputs[source].fetch_tree(MODEL_PREFIX)
        device = torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        sampling = Sampling() if source == "judge" else Sampling(config.temperature, config.top_p, config.seed)
        return load_generator(folder, device, getattr(torch, config.dtype), config.batch_size, sampling)


def log_path(folder: Path, name: str, shard: Shard) -> Path:
    """Where a process keeps its journal of model `name`."""
    part = f"-{shard.index}of{shard.count}" if shard.count > 1 else ""
    return folder / f"answers-{name}{part}.jsonl"


def _answer_shard(task: _Task, shard: Shard) -> StageResult:
    """Answer a part of the questions and leave the answers at the output."""
    output, inputs = _opened(task)
    if output.finished() is None:
        _begin(output)
        work = work_folder("evaluate", output)
        asking = _Asking(task, inputs)
        names = list(asking.ask(work, shard=shard))
        for name in names:
            part = PART_NAME.format(name=name, index=shard.index, count=shard.count)
            output.put_group(part, {}, {part: log_path(work, name, shard)}, {"model": name})
    return StageResult(
        stage="evaluate",
        output_uri=output.uri,
        fingerprint=output.fingerprint,
        reused=False,
        details={"shard": f"{shard.index}/{shard.count}"},
    )


def _await_shards(task: _Task, shard: Shard) -> None:
    """Wait until all parts are at the output. Whoever started the processes ends this one if another fails."""
    import time

    output, _ = _opened(task)
    while output.finished() is None:
        output.begin()
        whole = [
            all(
                PART_NAME.format(name=name, index=index, count=shard.count) in output.done_groups()
                for index in range(shard.count)
            )
            for name in {str(group.note["model"]) for group in _part_groups(output)}
        ]
        if whole and all(whole):
            return
        time.sleep(1)


def _opened(task: _Task) -> tuple[OutputDirectory, dict[str, InputDirectory]]:
    inputs = {key: uri for key, uri in task.inputs.items() if uri is not None}
    return open_stage("evaluate", task.config, inputs, CODE, others=task.references)


def _begin(output: OutputDirectory) -> None:
    import time

    from shellv_core.errors import OutputNotEmptyError

    try:
        output.begin()
    except OutputNotEmptyError:
        # Two that begin at once: the folder was empty for one of them, and by now holds its marker.
        time.sleep(1)
        output.begin()


def _part_groups(output: OutputDirectory) -> list[Any]:
    return [group for name, group in output.done_groups().items() if name.startswith("parts/")]


def _parts_at(output: OutputDirectory, work: Path) -> dict[str, dict[Prompt, str]]:
    """Model name -> what other processes have answered."""
    from shellv_core.evaluation.answers import read_answers

    parts: dict[str, dict[Prompt, str]] = {}
    for group in _part_groups(output):
        for entry in group.scratch:
            path = work / Path(entry.name).name
            output.fetch(entry, path)
            parts.setdefault(str(group.note["model"]), {}).update(read_answers(path))
    return parts


def _judged(
    run: StageRun[EvaluateConfig], asking: _Asking, models: Mapping[str, ModelAnswers]
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


def _check_apart(task: _Task, of_data: Mapping[str, bytes]) -> None:
    from shellv_core.errors import EvaluationError

    both = sorted(of_data.keys() & task.images.keys())
    if both:
        raise EvaluationError(
            f"{len(both)} images have the same name in the data and in your benchmarks' folders, for example"
            f" {both[0]!r}. Evaluate them in two runs."
        )


def _read_benchmarks(config: EvaluateConfig, data: InputDirectory) -> list[Benchmark]:
    from shellv_core.evaluation.suite import Limits, read_benchmarks

    return read_benchmarks(
        data.fetch,
        [entry.name for entry in data.files("benchmarks/")],
        Limits(config.max_pope_questions, config.max_hal_eval_items, config.max_captions),
        config.pope_suffix,
        config.hal_eval_prompt,
        config.caption_prompt,
        config.max_caption_tokens,
    )


def read_images(data: InputDirectory, names: set[str]) -> dict[str, bytes]:
    """Those of the validation images of prepare_data's output that are named."""
    from shellv_core.data.shards import read_shards

    return {
        sample.image_name: sample.image
        for sample in read_shards(data, "validation")
        if sample.image is not None and sample.image_name in names and sample.image_name is not None
    }


def _lineage(run: StageRun[EvaluateConfig], task: _Task) -> Any:
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
