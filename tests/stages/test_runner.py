from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from shellv_core import storage
from shellv_core.errors import (
    ConfigError,
    DataError,
    DiskFullError,
    ObjectNotFoundError,
    OutputNotEmptyError,
    Preempted,
    ShellVError,
    TrackingError,
    TrainingError,
)
from shellv_core.stages.runner import StageConfig, StageResult, StageRun, code_digest, run_stage
from shellv_core.tracking.runs import open_client


class ToyConfig(StageConfig):
    data_uri: str = ""
    times: int = 2


def toy(config: ToyConfig, body=None, **options) -> StageResult:
    def default_body(run: StageRun[ToyConfig]) -> None:
        text = run.inputs["data"].fetch("in.txt").read_text() * run.config.times
        run.output.put_bytes(text.encode(), "out.txt")
        run.log_metrics({"loss": 1.5}, step=3)
        run.metrics["length"] = float(len(text))

    return run_stage("toy", config, body or default_body, inputs={"data": config.data_uri}, **options)


@pytest.fixture
def data_uri(store_uri: str) -> str:
    uri = f"{store_uri}/data"
    output = storage.OutputDirectory(uri, "data")
    output.begin()
    output.put_bytes(b"ab", "in.txt")
    output.commit(storage.Manifest(stage="d", fingerprint="data", library_version="0", config={}))
    return uri


def test_a_stage_commits_config_versions_and_inputs_and_tracks_them(
    data_uri: str, store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHELLV_COMMIT", "c0ffee")
    monkeypatch.setenv("KFP_RUN_ID", "5a1e")
    result = toy(ToyConfig(data_uri=data_uri, output_uri=f"{store_uri}/toy/{{fingerprint}}"))
    assert result.output_uri == f"{store_uri}/toy/{result.fingerprint[:16]}"
    assert result.metrics == {"length": 4.0}
    found = storage.InputDirectory(result.output_uri)
    assert found.fetch("out.txt").read_text() == "abab"
    assert found.manifest.config["times"] == 2
    assert found.manifest.inputs["data"].uri == data_uri
    assert {"python", "shellv_core", "torch"} <= set(found.manifest.versions)
    client = open_client()
    (run,) = client.search_runs([client.get_experiment_by_name("shellv").experiment_id])
    assert run.info.status == "FINISHED"
    assert found.manifest.origin == {
        "code_sha256": code_digest(["stages/toy.py"]),
        "mlflow_run": run.info.run_id,
        "commit": "c0ffee",
        "pipeline_run": "5a1e",
    }
    assert run.data.metrics == {"loss": 1.5, "length": 4.0}
    assert run.data.params["times"] == "2"
    assert run.data.tags["shellv.fingerprint"] == result.fingerprint
    assert run.data.tags["shellv.input.data"] == found.manifest.inputs["data"].content_sha256


def test_a_finished_stage_is_reused_and_a_changed_setting_is_not(data_uri: str, store_uri: str) -> None:
    uri = f"{store_uri}/toy/{{fingerprint}}"
    first = toy(ToyConfig(data_uri=data_uri, output_uri=uri))

    def fails(run: StageRun[ToyConfig]) -> None:
        raise AssertionError("the body must not run")

    again = toy(ToyConfig(data_uri=data_uri, output_uri=uri), fails)
    assert again.reused
    assert again.model_copy(update={"reused": False}) == first
    other = toy(ToyConfig(data_uri=data_uri, output_uri=uri, times=3))
    assert not other.reused
    assert other.output_uri != first.output_uri
    with pytest.raises(OutputNotEmptyError, match="other settings"):
        toy(ToyConfig(data_uri=data_uri, output_uri=first.output_uri, times=3))
    assert not toy(ToyConfig(data_uri=data_uri, output_uri=uri), reuse=lambda committed: False).reused


def test_a_user_fault_leaves_nothing_and_any_other_leaves_what_is_needed_to_go_on(
    data_uri: str, store_uri: str
) -> None:
    config = ToyConfig(data_uri=data_uri, output_uri=f"{store_uri}/toy")

    def bad_rows(run: StageRun[ToyConfig]) -> None:
        run.output.put_bytes(b"half", "half.txt")
        raise DataError("too many bad rows")

    with pytest.raises(DataError):
        toy(config, bad_rows)
    assert storage.list_uris(config.output_uri) == []

    def breaks(run: StageRun[ToyConfig]) -> None:
        run.output.put_bytes(b"half", "half.txt")
        (run.work / "state").write_text("1")
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError):
        toy(config, breaks)

    def goes_on(run: StageRun[ToyConfig]) -> None:
        assert "half.txt" in run.output.done_files()
        assert (run.work / "state").read_text() == "1"

    assert not toy(config, goes_on).reused


def test_all_faults_of_access_are_told_at_once(store_uri: str, project_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"output_uri=URI, data_uri=URI"):
        toy(ToyConfig())
    with pytest.raises(ShellVError, match=r"ftp://a.*\| .*ftp://b|ftp://b.*\| .*ftp://a"):
        toy(ToyConfig(data_uri="ftp://a", output_uri="ftp://b"))
    with pytest.raises(ObjectNotFoundError, match="no finished output"):
        toy(ToyConfig(data_uri=f"{store_uri}/none", output_uri=f"{store_uri}/x"))
    assert not (project_folder / "mlflow.db").exists()


def test_an_unreachable_mlflow_is_told_within_seconds(
    data_uri: str, store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_URI"):
        toy(ToyConfig(data_uri=data_uri, output_uri=f"{store_uri}/toy"))
    assert storage.list_uris(f"{store_uri}/toy") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], check=False)
    if mounted.returncode != 0:
        pytest.skip("this machine does not allow mounts")
    try:

        def writes(run: StageRun[StageConfig]) -> None:
            run.output.put_bytes(b"x" * 1000, "first")
            run.output.put_bytes(b"x" * 1_000_000, "second")

        with pytest.raises(DiskFullError, match="Free some space"):
            run_stage("toy", StageConfig(output_uri=(small / "out").as_uri()), writes)
        assert not (small / "out").exists()
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("kind", ["output", "address"])
def test_copies_of_checkpoints_outlive_a_failure_and_go_with_success(
    data_uri: str, store_uri: str, kind: str, tracking_store: Path
) -> None:
    config = ToyConfig(data_uri=data_uri, output_uri=f"{store_uri}/toy")
    checkpoint_uri = "output" if kind == "output" else f"{store_uri}/kept/{{fingerprint}}"
    seen: list[str | None] = []

    def diverges(run: StageRun[ToyConfig]) -> None:
        seen.append(run.checkpoints)
        storage.write_bytes(f"{run.checkpoints}/step-1/manifest.json", b"{}")
        raise TrainingError("the loss explodes")

    with pytest.raises(TrainingError):
        toy(config, diverges, checkpoint_uri=checkpoint_uri)
    assert storage.list_uris(config.output_uri) == []
    assert storage.exists(f"{seen[0]}/step-1/manifest.json")
    result = toy(config, checkpoint_uri=checkpoint_uri)
    digits = result.fingerprint[:16]
    assert seen == [f"{store_uri}/toy.checkpoints-{digits}" if kind == "output" else f"{store_uri}/kept/{digits}"]
    assert storage.list_uris(str(seen[0])) == []
    storage.write_bytes(f"{seen[0]}/step-1/manifest.json", b"{}")
    assert toy(config, checkpoint_uri=checkpoint_uri).reused
    assert storage.list_uris(str(seen[0])) == [], "what a kill right after the commit left"


def test_a_bad_address_for_checkpoints_is_told_before_any_work(tmp_path: Path, data_uri: str) -> None:
    config = ToyConfig(data_uri=data_uri, output_uri=(tmp_path / "toy").as_uri())
    with pytest.raises(ConfigError, match="not a storage address"):
        toy(config, checkpoint_uri="bucket/{fingerprint}")
    assert not (tmp_path / "toy").exists()


def test_a_run_that_was_asked_to_stop_is_left_to_go_on(tmp_path: Path, data_uri: str, tracking_store: Path) -> None:
    config = ToyConfig(data_uri=data_uri, output_uri=(tmp_path / "toy").as_uri())

    def stops(run: StageRun[ToyConfig]) -> None:
        run.output.put_bytes(b"half", "first.txt")
        (run.work / "scratch").write_text("kept")
        raise Preempted("stopped at step 3 by SIGTERM")

    with pytest.raises(Preempted, match="step 3") as stopped:
        toy(config, stops)
    assert stopped.value.code == 143
    client = open_client()
    (run,) = client.search_runs([client.get_experiment_by_name("shellv").experiment_id])
    assert run.info.status == "KILLED"

    def goes_on(run: StageRun[ToyConfig]) -> None:
        assert (run.work / "scratch").read_text() == "kept"
        assert run.output.done_files().keys() == {"first.txt"}

    assert not toy(config, goes_on).reused


def test_code_digest_follows_the_source() -> None:
    assert code_digest(["storage"]) == code_digest(["storage"])
    assert code_digest(["storage"]) != code_digest(["tracking"])
