"""How many processes a training stage runs in: this one, several of this machine (torchrun), or a job's on many.

The output is the same folder whichever way, so a retry finds what an earlier try has committed, or its checkpoints.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import Field

from shellv_core.config import Config, build_config
from shellv_core.errors import ConfigError, Preempted, TrainingError
from shellv_core.logs import get_logger, last_words
from shellv_core.stages.presets import stage_module
from shellv_core.stages.runner import (
    CHECKPOINTS_BESIDE_OUTPUT,
    TRAINING_CODE,
    StageConfig,
    StageResult,
    open_stage,
    result_of,
)
from shellv_core.stages.task import IMAGE_VARIABLE, run_id
from shellv_core.storage import OutputDirectory

logger = get_logger(__name__)

TRAINING_STAGES = ("pretrain_projector", "finetune")
#: Where Kubeflow's MLflow plugin says which run a task belongs to.
TRACKING_VARIABLES = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID")
#: A stop lets the processes write a checkpoint; torchrun would kill them after 30 seconds.
SHUTDOWN_SECONDS = 600
KEPT_LINES = 200
#: How torchrun reports a process that ended with `Preempted.CODE`.
_PREEMPTED = re.compile(rf"exitcode\s*:\s*{Preempted.CODE}\b")


class LaunchConfig(Config):
    """Where a training stage runs.

    Attributes:
        nodes: machines; above 1 a TrainJob of Kubeflow Trainer is created, and what follows describes its pods.
        processes_per_node: 0 takes one for each accelerator, at least one.
        image: the pods' container image.
        run_id: the pipeline run, which names the job and by whose label its jobs are found.
        namespace: of the job; empty takes the one that this program runs in.
        runtime: ClusterTrainingRuntime that the job refers to; it brings credentials, volumes and security.
        num_accelerators: accelerators of each pod, of the resource `accelerator`.
        cpu, memory: of each pod, in Kubernetes' terms; needed with accelerators, because what the job asks for
            replaces what the runtime has.
        node_selector, tolerations, node_affinity: placement of the pods, in Kubernetes' terms.
        queue: Kueue's local queue, which may keep the job suspended until there is room; empty for none.
        deadline_seconds: the longest time that the job may be active.
    """

    nodes: int = Field(default=1, ge=1)
    processes_per_node: int = Field(default=0, ge=0)
    image: str = ""
    run_id: str = ""
    namespace: str = ""
    runtime: str = "shellv-torch"
    num_accelerators: int = Field(default=0, ge=0)
    accelerator: str = "nvidia.com/gpu"
    cpu: str = ""
    memory: str = ""
    node_selector: dict[str, str] = {}
    tolerations: list[dict[str, Any]] = []
    node_affinity: dict[str, Any] = {}
    queue: str = ""
    deadline_seconds: int = Field(default=7 * 24 * 3600, ge=1)


def launch_config(nodes: int, pods: Mapping[str, Any]) -> LaunchConfig:
    """How a workflow engine's task launches training: in its own pod, or in those of a job on several nodes.

    Args:
        pods: further settings of `LaunchConfig`, for the job's pods.

    Raises:
        ConfigError: naming what is unknown or out of range.
    """
    own = {"image": os.environ.get(IMAGE_VARIABLE, ""), "run_id": run_id()}
    return build_config(LaunchConfig, {**own, **pods, "nodes": nodes})


def run_training(stage: str, config: StageConfig, launch: LaunchConfig | None = None) -> StageResult:
    """Run a training stage in as many processes as `launch` says; by default in one for each accelerator here.

    Args:
        stage: pretrain_projector or finetune.

    Raises:
        ConfigError: if the stage is no training stage, or the launch lacks what many machines need.
        TrainingError: if the processes fail, with the message of the one that did.
        Preempted: if they were asked to stop; the same call goes on later.
        ClusterError: if the cluster refuses.
    """
    if stage not in TRAINING_STAGES:
        raise ConfigError(f"{stage!r} runs in one process; several take {' or '.join(TRAINING_STAGES)}.")
    launch = launch or LaunchConfig()
    if launch.nodes > 1 or launch.image:
        config = _with_checkpoints_elsewhere(config)
    if launch.nodes > 1:
        return _on_nodes(stage, config, launch)
    processes = launch.processes_per_node or _count_accelerators()
    if processes == 1:
        result: StageResult = stage_module(stage).run(config)
        return result
    return _run_once(stage, config, lambda output: _torchrun(stage, config, processes))


def _on_nodes(stage: str, config: StageConfig, launch: LaunchConfig) -> StageResult:
    """A TrainJob whose first process commits the output; what it reports is read from there."""
    missing = [name for name in ("image", "run_id") if not getattr(launch, name)]
    if launch.num_accelerators:
        missing += [name for name in ("cpu", "memory") if not getattr(launch, name)]
    if missing:
        raise ConfigError(
            f"nodes={launch.nodes} also needs {' and '.join(missing)} of the launch: they describe its pods."
        )

    def run(output: OutputDirectory) -> None:
        from shellv_core.cluster.connection import Cluster
        from shellv_core.cluster.launcher import run_job

        run_job(Cluster(launch.namespace), train_job_of(stage, config, launch, output))

    return _run_once(stage, config, run)


def _with_checkpoints_elsewhere(config: StageConfig) -> StageConfig:
    """`config` with copies of the checkpoints beside the output: the disk of a container goes with it."""
    training: Any = getattr(config, "training")  # noqa: B009 - both training stages have it
    if training.checkpoint_uri is not None:
        return config
    training = training.model_copy(update={"checkpoint_uri": CHECKPOINTS_BESIDE_OUTPUT})
    return config.model_copy(update={"training": training})


def train_job_of(stage: str, config: StageConfig, launch: LaunchConfig, output: OutputDirectory) -> dict[str, Any]:
    """The manifest of the TrainJob that makes `output`."""
    from shellv_core.cluster.train_job import job_name, train_job

    amounts = {
        "cpu": launch.cpu,
        "memory": launch.memory,
        launch.accelerator: str(launch.num_accelerators or ""),
    }
    placement = {
        "nodeSelector": launch.node_selector,
        "tolerations": launch.tolerations,
        "affinity": {"nodeAffinity": launch.node_affinity} if launch.node_affinity else {},
    }
    program = ["python", "-m", "torch.distributed.run", "-m", "shellv_core.cli", stage, "--preset", "none"]
    return train_job(
        name=job_name(launch.run_id, stage, output.fingerprint),
        run_id=launch.run_id,
        output_uri=output.uri,
        command=[*program, *settings_arguments(config)],
        image=launch.image,
        nodes=launch.nodes,
        processes_per_node=launch.processes_per_node or launch.num_accelerators or 1,
        resources={name: amount for name, amount in amounts.items() if name and amount},
        runtime=launch.runtime,
        deadline_seconds=launch.deadline_seconds,
        queue=launch.queue,
        pods={name: value for name, value in placement.items() if value},
        tracking={name: os.environ[name] for name in TRACKING_VARIABLES if name in os.environ},
    )


def _count_accelerators() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def _run_once(stage: str, config: StageConfig, run: Callable[[OutputDirectory], None]) -> StageResult:
    """The committed output's result; where there is none yet, `run` makes it."""
    output, _ = open_stage(stage, config, stage_module(stage).inputs(config), TRAINING_CODE)
    committed = output.finished()
    if committed is not None:
        logger.info("%s: reusing %s", stage, output.uri)
        return result_of(output.uri, committed, reused=True)
    run(output)
    committed = output.finished()
    if committed is None:
        raise TrainingError(
            f"the processes of {stage} ended well but left no output at {output.uri}; do they run another version of"
            " the library than this one?"
        )
    return result_of(output.uri, committed, reused=False)


def _torchrun(stage: str, config: StageConfig, processes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "settings.yaml"
        settings.write_text(settings_yaml(config), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += ["-m", "shellv_core.cli", stage, "--preset", "none", "--config", str(settings)]
        logger.info("%s: starting %d processes", stage, processes)
        environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS), **os.environ}
        code, stopped, lines = _run_and_show(command, environment)
    if code == 0:
        return
    if stopped or any(_PREEMPTED.search(line) for line in lines):
        raise Preempted(f"{stage} was asked to stop and goes on from its last checkpoint when it is run again.")
    raise TrainingError(f"{stage} failed in {processes} processes: {last_words(lines)}")


def settings_arguments(config: Config) -> list[str]:
    """`config` as arguments of ``shellv STAGE --preset none``; there is no file that machines share."""
    import yaml

    return [
        f"{name}={yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix('...' + chr(10)).strip()}"
        for name, value in config.model_dump(mode="json").items()
    ]


def settings_yaml(config: Config) -> str:
    """`config` as a file that ``shellv STAGE --preset none`` reads back to the same values."""
    import yaml

    return yaml.safe_dump(config.model_dump(mode="json"))


def _run_and_show(command: Sequence[str], environment: dict[str, str]) -> tuple[int, bool, Sequence[str]]:
    """Run a command, its standard error passed on line by line.

    Returns:
        The exit code, whether this process was asked to stop meanwhile, and the last lines.
    """
    # Standard output carries a copy of the result, which the committed output holds.
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    lines: deque[str] = deque(maxlen=KEPT_LINES)
    with _forwarding(process) as stopped, process:
        assert process.stderr is not None  # noqa: S101 - for mypy
        for line in process.stderr:
            sys.stderr.write(line)
            sys.stderr.flush()
            lines.append(line.rstrip("\n"))
    return process.returncode, bool(stopped), lines


@contextlib.contextmanager
def _forwarding(process: subprocess.Popen[str]) -> Iterator[list[int]]:
    """Pass a request to stop on to `process`; yields the signals that came. Only the main thread can take signals."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def forward(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        # It passes SIGTERM on to its processes, and would die of a warning.
        process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield seen
    except BaseException:
        process.terminate()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
