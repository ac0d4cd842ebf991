"""Puts the questions of an evaluation, with their images, to its models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shellv_core.evaluation.answers import AnswerGenerator, Prompt, Shard
    from shellv_core.evaluation.benchmark import Benchmark
    from shellv_core.evaluation.suite import ModelAnswers
    from shellv_core.stages.evaluate import EvaluateConfig
    from shellv_core.stages.evaluate_task import Task
    from shellv_core.storage import InputDirectory

MODEL_PREFIX = "model"


class Asking:
    """The questions with their images, and the models that they are put to."""

    def __init__(self, task: Task, inputs: Mapping[str, InputDirectory]) -> None:
        from shellv_core.evaluation.selection import Images
        from shellv_core.evaluation.suite import needed_images, shuffle_images
        from shellv_core.training.processes import launched

        self.task, self.inputs, self.local_rank = task, inputs, launched().local_rank
        self.endpoints = {name: task.open_endpoint(name) for name in task.remote}
        data = inputs.get("data")
        own = [] if data is None else read_benchmarks_of(task.config, data)
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


def _check_apart(task: Task, of_data: Mapping[str, bytes]) -> None:
    from shellv_core.errors import EvaluationError

    both = sorted(of_data.keys() & task.images.keys())
    if both:
        raise EvaluationError(
            f"{len(both)} images have the same name in the data and in your benchmarks' folders, for example"
            f" {both[0]!r}. Evaluate them in two runs."
        )


def read_benchmarks_of(config: EvaluateConfig, data: InputDirectory) -> list[Benchmark]:
    """The benchmarks of prepare_data's output, as `config` wants them."""
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
