"""A stage as a TrainJob whose command really runs, on two machines that are processes of this one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from shellv_core.cluster.train_job import TRAIN_JOBS
from shellv_core.errors import ConfigError, TrainingError
from shellv_core.stages.launch import LaunchConfig, run_training
from shellv_core.stages.pretrain_projector import PretrainProjectorConfig
from tests.stages.training_data import MODEL, TRAINING, write_data

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = LaunchConfig(nodes=2, image="shellv-train:1", run_id="run-1")


class Trainer:
    """What Kubeflow Trainer and JobSet make of a TrainJob: a pod for each node, with its place among the others."""

    def __init__(self, api, home: Path) -> None:
        self.api, self.home, self.jobs = api, home, []
        api.changed = self._changed

    def _changed(self, key: tuple[str, str]) -> None:
        if key[0] == "trainjobs" and key[1] not in self.jobs:
            self.jobs.append(key[1])
            threading.Thread(
                target=self._run, args=(key[1], self.api.objects[key]["spec"]["trainer"]), daemon=True
            ).start()

    def _run(self, name: str, trainer: dict) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable if each == "python" else each for each in trainer["command"]]
        nodes = []
        for rank in range(trainer["numNodes"]):
            place = {
                "PET_NNODES": trainer["numNodes"],
                "PET_NPROC_PER_NODE": trainer["numProcPerNode"],
                "PET_NODE_RANK": rank,
                "PET_MASTER_ADDR": "127.0.0.1",
                "PET_MASTER_PORT": port,
            }
            environment = os.environ | {each["name"]: each["value"] for each in trainer["env"]}
            environment |= {key: str(value) for key, value in place.items()}
            environment |= {
                "SHELLV_HOME": str(self.home / f"node-{rank}"),
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
            }
            with (self.home / f"node-{rank}.log").open("w") as file:
                streams = {"stdout": file if rank else subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
                nodes.append(subprocess.Popen(command, env=environment, cwd=self.home, **streams))
        self._put_pod(name, "Running")
        log = self.api.log(f"{name}-node-0-0-x", "node")
        for line in nodes[0].stdout:
            log.add(line.rstrip("\n"))
        codes = [node.wait() for node in nodes]
        log.closed = True
        self._put_pod(name, "Failed" if any(codes) else "Succeeded")
        end = {
            "type": "Failed" if any(codes) else "Complete",
            "status": "True",
            "reason": "JobsEnded",
            "message": f"codes {codes}; the second node: {(self.home / 'node-1.log').read_text()[-3000:]}",
        }
        self.api.set_status("trainjobs", name, conditions=[end])

    def _put_pod(self, name: str, phase: str) -> None:
        labels = {
            "jobset.sigs.k8s.io/jobset-name": name,
            "jobset.sigs.k8s.io/replicatedjob-name": "node",
            "batch.kubernetes.io/job-completion-index": "0",
        }
        meta = {"name": f"{name}-node-0-0-x", "labels": labels}
        self.api.put("pods", {"kind": "Pod", "metadata": meta, "status": {"phase": phase}})


@pytest.fixture
def config(tmp_path: Path) -> PretrainProjectorConfig:
    write_data((tmp_path / "data").as_uri())
    return PretrainProjectorConfig(
        data_uri=(tmp_path / "data").as_uri(),
        output_uri=f"{tmp_path.as_uri()}/model/{{fingerprint}}",
        model=MODEL,
        training=TRAINING.model_copy(update={"max_steps": 2}),
    )


@pytest.mark.slow
def test_two_nodes_train_one_model_and_its_metrics_come_home(api, config, tmp_path, tracking_store, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tracking_store}")
    trainer = Trainer(api, tmp_path)
    result = run_training("pretrain_projector", config, LAUNCH)
    assert result.details["num_processes"] == 2
    assert result.metrics["loss"] > 0
    assert not result.reused
    said = capfd.readouterr().err
    assert said.count("pretrain_projector: writing file://") == 1
    assert not [key for key in api.objects if key[0] == TRAIN_JOBS.plural]
    assert run_training("pretrain_projector", config, LAUNCH).reused
    # The identity does not depend on where it ran.
    assert run_training("pretrain_projector", config, LaunchConfig(processes_per_node=1)).reused
    assert len(trainer.jobs) == 1


def test_a_job_that_ends_well_and_leaves_nothing_is_an_error(api, config):
    def complete(key: tuple[str, str]) -> None:
        if key[0] == "trainjobs" and "status" not in api.objects[key]:
            api.set_status("trainjobs", key[1], conditions=[{"type": "Complete", "status": "True"}])

    api.changed = complete
    with pytest.raises(
        TrainingError, match=r"ended well but left no output at file://.*another version of the library"
    ):
        run_training("pretrain_projector", config, LAUNCH)


def test_what_a_job_needs_is_asked_for_before_anything_starts(api, config):
    with pytest.raises(ConfigError, match="nodes=2 also needs image and run_id"):
        run_training("pretrain_projector", config, LaunchConfig(nodes=2))
    with pytest.raises(ConfigError, match="nodes=2 also needs cpu and memory"):
        run_training("pretrain_projector", config, LAUNCH.model_copy(update={"num_accelerators": 8}))
    assert not api.asked
