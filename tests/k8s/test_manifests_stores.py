"""SeaweedFS and MLflow, started for real with the very arguments of their manifests."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.k8s.stores import KEYS, mlflow, object_store, services_at


def status(url: str, host: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Host": host}), timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_mlflow_keeps_artifacts_in_the_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    from shellv_core.storage import read_bytes, write_bytes

    with object_store(tmp_path / "s3") as store_port, mlflow(tmp_path / "mlflow", store_port, "127.0.0.1") as port:
        url = f"http://127.0.0.1:{port}"
        search = f"{url}/api/2.0/mlflow/experiments/search?max_results=1"
        assert status(f"{url}/health", "10.1.2.3:5000") == 200  # the kubelet's probe
        assert status(search, "mlflow.shellv.svc.cluster.local:5000") == 200
        assert status(search, "rebound.example.com") == 403

        client = MlflowClient(url)
        run = client.create_run(client.create_experiment("stores"))
        (tmp_path / "note.txt").write_text("kept")
        client.log_artifact(run.info.run_id, str(tmp_path / "note.txt"))
        for name, value in {**KEYS, **services_at(f"http://127.0.0.1:{store_port}", url)}.items():
            monkeypatch.setenv(name, value)
        run_prefix = f"s3://shellv/mlflow/{run.info.experiment_id}/{run.info.run_id}"
        assert read_bytes(f"{run_prefix}/artifacts/note.txt") == b"kept"
        # One bucket for pipeline and MLflow, as in the cluster.
        write_bytes("s3://shellv/pipelines/x", b"y")
        assert read_bytes("s3://shellv/pipelines/x") == b"y"


def test_the_object_store_refuses_strangers(tmp_path: Path) -> None:
    with object_store(tmp_path / "s3") as port:
        assert status(f"http://127.0.0.1:{port}/shellv/x", "seaweedfs.shellv.svc.cluster.local:8333") == 403
