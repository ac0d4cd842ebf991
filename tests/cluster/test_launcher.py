from __future__ import annotations

import os
import re
import signal
import threading
import time

import pytest
import yaml

from shellv_core.cluster import connection, launcher
from shellv_core.cluster.connection import Cluster
from shellv_core.cluster.following import follow
from shellv_core.cluster.launcher import delete_jobs, run_job
from shellv_core.cluster.train_job import job_name, train_job
from shellv_core.errors import ClusterError, Preempted, ShellVError, TrainingError
from tests.cluster.conftest import kubeconfig
from tests.cluster.kept_elsewhere import TrainJobsElsewhere
from tests.cluster.kubernetes_api import KubernetesApi

RUN = "3f2a9c1e-run"
NAME = job_name(RUN, "finetune", "0123456789abcdef")
NODE_LABELS = {
    "jobset.sigs.k8s.io/jobset-name": NAME,
    "jobset.sigs.k8s.io/replicatedjob-name": "node",
    "batch.kubernetes.io/job-completion-index": "0",
}


def manifest(**values):
    defaults = {
        "name": NAME,
        "run_id": RUN,
        "output_uri": "s3://shellv/out",
        "command": ["python", "-m", "torch.distributed.run"],
        "image": "shellv-train:1",
        "nodes": 2,
        "processes_per_node": 8,
        "resources": {},
        "runtime": "shellv-torch",
        "deadline_seconds": 3600,
    }
    return train_job(**{**defaults, **values})


NODES_READY = {"name": "node", "ready": 2, "active": 2, "succeeded": 0, "failed": 0, "suspended": 0}


def condition(kind, reason="", message="", status="True"):
    found = {"type": kind, "status": status, "reason": reason or kind, "message": message}
    return {"conditions": [found | {"lastTransitionTime": "2026-01-01T00:00:00Z"}]}


def pod(name=f"{NAME}-node-0-0-x", phase="Running", created=0, **status):
    meta = {"name": name, "labels": NODE_LABELS, "creationTimestamp": f"2026-01-01T00:00:{created:02d}Z"}
    return {"kind": "Pod", "metadata": meta, "status": {"phase": phase, **status}}


class Running:
    """`run_job` in a thread, so that the test can be everyone else."""

    def __init__(self, cluster, job=None):
        self.error = None
        self._thread = threading.Thread(target=self._run, args=(cluster, job or manifest()), daemon=True)
        self._thread.start()

    def _run(self, cluster, job):
        try:
            run_job(cluster, job)
        except (ShellVError, Preempted) as error:
            self.error = error

    def end(self):
        self._thread.join(60)
        assert not self._thread.is_alive(), "it hangs"
        if self.error:
            raise self.error


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.002)


def created(api, name=NAME):
    until(lambda: api.stored("trainjobs", name))


@pytest.fixture(params=["stand-in", pytest.param("apiserver", marks=pytest.mark.apiserver)])
def stand_in(request):
    """All of this file runs against the stand-in alone, and again with the TrainJobs of a real API server."""
    if request.param == "stand-in":
        yield KubernetesApi()
        return
    api = TrainJobsElsewhere(request.getfixturevalue("apiserver"))
    yield api
    for name in api.names("trainjobs"):
        api.remove("trainjobs", name)


@pytest.fixture(autouse=True)
def _log(caplog):
    caplog.set_level("DEBUG", "shellv_core")


def test_a_job_is_queued_runs_and_is_gone_in_the_end(api, cluster, caplog, capfd):
    running = Running(cluster)
    created(api)
    assert api.stored("trainjobs", NAME)["metadata"]["labels"]["shellv.dev/run"] == RUN
    api.set_status("trainjobs", NAME, **condition("Suspended", "Suspended", "TrainJob is suspended"))
    until(lambda: "queued: TrainJob is suspended" in caplog.text)
    api.set_status("trainjobs", NAME, **condition("Suspended", "Resumed", "", "False"))
    until(lambda: f"TrainJob {NAME}: starting" in caplog.text)
    api.put("pods", pod())
    log = api.log(f"{NAME}-node-0-0-x", "node")
    log.add("step 1", "step 2")
    api.set_status("trainjobs", NAME, jobsStatus=[NODES_READY])
    until(lambda: f"TrainJob {NAME}: running" in caplog.text)
    api.set_status("trainjobs", NAME, trainerStatus={"progressPercentage": 40, "estimatedRemainingSeconds": 600})
    until(lambda: "40%, ETA 600 s" in caplog.text)
    log.add("step 3")
    log.closed = True
    api.put("pods", pod(phase="Succeeded"))
    api.set_status("trainjobs", NAME, **condition("Complete", "JobsCompleted"))
    running.end()
    assert capfd.readouterr().err.splitlines() == ["step 1", "step 2", "step 3"]
    assert api.stored("trainjobs", NAME) is None
    assert "failed" not in caplog.text


def test_the_log_comes_once_through_cuts_and_a_restarted_pod(api, cluster, capfd):
    api.put("pods", pod("first"))
    first = api.log("first", "node")
    first.add(*(f"first {number}" for number in range(30)))
    # The job's watch first, then the log: five lines, seven of those that come again, and so on.
    running = Running(cluster)
    created(api)
    until(lambda: api.asked["", "pods/log", "get"])
    api.cuts.extend([3, 20])
    first.add("first 30")
    first.closed = True
    until(lambda: api.asked["", "pods/log", "get"] >= 2 or not api.cuts)
    api.put("pods", pod("first", "Failed"))
    second = api.log("second", "node")
    second.add("second 0")
    api.put("pods", pod("second", created=9))
    until(lambda: api.asked["", "pods/log", "get"] >= 3)
    second.closed = True
    api.put("pods", pod("second", "Succeeded", created=9))
    api.set_status("trainjobs", NAME, **condition("Complete"))
    running.end()
    lines = capfd.readouterr().err.splitlines()
    assert lines == [*(f"first {number}" for number in range(31)), "second 0"]


def test_a_retry_takes_the_job_over(api, cluster, caplog):
    api.put("trainjobs", manifest())
    running = Running(cluster, manifest(tracking={"MLFLOW_RUN_ID": "the retry's own"}))
    until(lambda: "taking over" in caplog.text)
    api.set_status("trainjobs", NAME, **condition("Complete"))
    running.end()
    assert api.asked["trainer.kubeflow.org", "trainjobs", "create"] == 1


def test_another_job_of_this_name_is_refused_and_left_alone(api, cluster):
    api.put("trainjobs", manifest(image="shellv-train:2"))
    with pytest.raises(
        ClusterError, match=rf"there is a TrainJob {NAME} .* with another specification .*kubectl delete"
    ):
        run_job(cluster, manifest())
    assert api.stored("trainjobs", NAME)


def test_an_earlier_job_that_is_being_deleted_is_waited_for(api, cluster, caplog):
    old = manifest(image="shellv-train:2")
    old["metadata"]["finalizers"] = ["shellv.dev/test"]
    api.put("trainjobs", old)
    api.delete("trainjobs", NAME)
    running = Running(cluster)
    until(lambda: "waiting for an earlier one to be gone" in caplog.text)
    api.remove("trainjobs", NAME)
    until(lambda: "created in namespace shellv" in caplog.text)
    api.set_status("trainjobs", NAME, **condition("Complete"))
    running.end()


def test_a_failed_job_says_why_and_is_deleted(api, cluster):
    out = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    api.put("pods", pod(containerStatuses=[{"name": "node", "state": {}, "lastState": out}]))
    log = api.log(f"{NAME}-node-0-0-x", "node")
    log.add("step 7", "shellv: training cannot go on")
    log.closed = True
    api.log(f"{NAME}-node-0-0-x", "node", previous=True).add("allocating 90 GB")
    event = {"metadata": {"name": "e"}, "type": "Warning", "reason": "Evicted", "message": "the node was low on memory"}
    api.put("events", event | {"involvedObject": {"name": f"{NAME}-node-0-0-x"}})
    running = Running(cluster)
    created(api)
    until(lambda: api.asked["", "pods/log", "get"])
    api.set_status("trainjobs", NAME, **condition("Failed", "DeadlineExceeded", "longer than 3600 s"))
    with pytest.raises(TrainingError) as caught:
        running.end()
    said = str(caught.value)
    assert f"the TrainJob {NAME} failed (DeadlineExceeded: longer than 3600 s)" in said
    assert "OOMKilled (it needs more memory than its limit)" in said
    assert "event: Evicted: the node was low on memory" in said
    assert "log: allocating 90 GB" in said
    assert said.endswith("Its log: training cannot go on")
    assert api.stored("trainjobs", NAME) is None


def test_a_job_that_someone_deletes(api, cluster):
    running = Running(cluster)
    created(api)
    api.remove("trainjobs", NAME)
    with pytest.raises(TrainingError, match="was deleted while it ran"):
        running.end()


def test_cut_watches_an_expired_version_and_a_restarting_server(api, cluster, caplog):
    running = Running(cluster)
    created(api)
    for number in range(6):
        api.cuts.extend([0, 1, 0])
        api.faults.extend([503, "reset"])
        api.set_status("trainjobs", NAME, trainerStatus={"progressPercentage": number})
        until(lambda number=number: f"{number}%" in caplog.text)
    api.faults.extend([500, 429, "reset"])
    api.set_status("trainjobs", NAME, **condition("Complete"))
    running.end()
    assert "was cut off" in caplog.text
    assert "Attempt 1 of" in caplog.text


def test_a_watch_whose_version_is_too_old_begins_anew(api, cluster, caplog):
    api.put("trainjobs", manifest())
    old = cluster.get(launcher.TRAIN_JOBS, NAME)
    api.set_status("trainjobs", NAME, trainerStatus={"progressPercentage": 1})
    api.expire()
    asked = []

    def stale_once(resource, name):
        asked.append(name)
        return old if len(asked) == 1 else Cluster.get(cluster, resource, name)

    cluster.get = stale_once
    states = follow(cluster, launcher.TRAIN_JOBS, NAME, 30)
    assert "status" not in next(states)
    assert next(states)["status"]["trainerStatus"]["progressPercentage"] == 1
    assert "(410)\nReason: Expired: " in caplog.text


def test_a_lost_server_leaves_the_job_to_the_next_try(api, cluster):
    api.cuts.extend([0] * 100)
    running = Running(cluster)
    until(lambda: api.asked["trainer.kubeflow.org", "trainjobs", "watch"])
    api.faults.extend(["reset"] * 100)
    api.set_status("trainjobs", NAME, trainerStatus={"progressPercentage": 1})
    with pytest.raises(ClusterError, match="does not answer"):
        running.end()
    assert api.stored("trainjobs", NAME)


def test_the_answer_to_a_creation_is_lost(api, cluster):
    # The connection breaks after the server has stored the object, so that the second try finds it.
    api.faults.append("lost")
    running = Running(cluster)
    created(api)
    api.set_status("trainjobs", NAME, **condition("Complete"))
    running.end()
    assert api.asked["trainer.kubeflow.org", "trainjobs", "create"] == 2


def test_sigterm_deletes_the_job_and_asks_for_a_rerun(api, cluster):
    before = signal.getsignal(signal.SIGTERM)

    def terminate():
        created(api)
        until(lambda: api.asked["trainer.kubeflow.org", "trainjobs", "watch"])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    with pytest.raises(Preempted) as caught:
        run_job(cluster, manifest())
    assert caught.value.code == 143
    assert api.stored("trainjobs", NAME) is None
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_jobs_of_a_run_are_deleted_and_no_others(api, cluster):
    other = manifest(name="sv-other", run_id="other")
    for job in (manifest(), manifest(name="sv-second"), other):
        api.put("trainjobs", job)
    assert sorted(delete_jobs(RUN)) == sorted([NAME, "sv-second"])
    assert api.names("trainjobs") == {"sv-other"}
    assert delete_jobs(RUN) == []


def test_a_log_that_may_not_be_read_is_said_once_and_the_job_goes_on(api, cluster, caplog):
    api.forbidden.add(("get", "pods/log"))
    api.put("pods", pod())
    running = Running(cluster)
    created(api)
    until(lambda: "its log cannot be shown" in caplog.text)
    api.set_status("trainjobs", NAME, **condition("Complete"))
    running.end()
    assert api.asked["", "pods/log", "get"] == 1


def test_refusals_in_one_line(api, cluster, monkeypatch, tmp_path):
    api.forbidden.add(("create", "trainjobs"))
    with pytest.raises(
        ClusterError, match=r"refused POST .*/trainjobs \(403\): .*cannot create.*permissions\.py"
    ) as caught:
        run_job(cluster, manifest())
    assert "\n" not in str(caught.value)
    (tmp_path / "wrong").write_text(yaml.safe_dump(kubeconfig(cluster.host, "wrong")))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "wrong"))
    with pytest.raises(ClusterError, match=r"\(401\): Unauthorized\. Its credentials"):
        run_job(Cluster(), manifest())
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(ClusterError, match=r"no credentials for a cluster .*KUBECONFIG"):
        Cluster()


def test_a_cluster_without_kubeflow_trainer(api, cluster):
    api.absent.add("trainjobs")
    with pytest.raises(ClusterError, match=r"could not find the requested resource.* Is Kubeflow Trainer installed"):
        run_job(cluster, manifest())


def test_a_name_that_the_api_refuses_is_told(api, cluster):
    with pytest.raises(ClusterError, match=r"\(422\): .*metadata.name"):
        run_job(cluster, manifest(name="Not_A_Name"))


def test_a_field_that_the_cluster_s_trainer_lacks_is_refused_and_not_dropped(api, cluster):
    job = manifest()
    job["spec"]["trainer"]["noSuchField"] = 1
    with pytest.raises(ClusterError, match=r'\(400\): .* as a TrainJob: .*unknown field "spec\.trainer\.noSuchField"'):
        Running(cluster, job).end()
    assert api.stored("trainjobs", NAME) is None


def test_a_job_keeps_its_runtime(api, cluster):
    api.put("trainjobs", manifest())
    change = {"spec": {"runtimeRef": {"name": "another"}}}
    path = launcher.TRAIN_JOBS.path(cluster.namespace, NAME)
    with pytest.raises(ClusterError, match=r"\(422\): .*spec\.runtimeRef: .*field is immutable"):
        cluster.request("PATCH", path, change, content_type="application/merge-patch+json")
    api.asked.clear()  # No pipeline task may do this.


@pytest.mark.parametrize("run", ["3f2a9c1e-77aa-4b0c-9d0e-1c2d3e4f5a6b", "Nightly Run #7 (main)", "x" * 300, "7"])
def test_names(run):
    names = {
        job_name(run, stage, identity)
        for stage in ("pretrain_projector", "finetune")
        for identity in ("ab" * 8, "cd" * 8)
    }
    assert len(names) == 4
    for name in names:
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
        assert len(f"{name}-node-0-0") <= 63
    label = manifest(run_id=run)["metadata"]["labels"]["shellv.dev/run"]
    assert re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?", label)
    assert len(label) <= 63


def test_attempts_are_bounded(api, cluster, monkeypatch):
    monkeypatch.setattr(connection, "ATTEMPTS", 3)
    api.faults.extend([503] * 3)
    with pytest.raises(ClusterError, match=r"\(503\)"):
        cluster.get(launcher.TRAIN_JOBS, NAME)
    assert not api.faults
