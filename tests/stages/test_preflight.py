from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from shellv_core.errors import ConfigError, ShellVError
from shellv_core.stages import STAGE_NAMES
from shellv_core.stages.preflight import PreflightConfig, run, settings, table
from shellv_core.stages.presets import stage_config


def config(root_uri: str, **values: object) -> PreflightConfig:
    return PreflightConfig(root_uri=root_uri, preset="smoke", **values)


def test_all_is_well(store_uri: str, tracking_store: Path) -> None:
    findings = run(config(store_uri))
    assert [each.name for each in findings] == ["settings", "object store", "MLflow", "disk"]
    assert not [each for each in findings if each.fault]
    text = table(findings)
    assert text.count("\n") == 6
    assert store_uri in text


def test_all_faults_come_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, project_folder: Path, bucket_uri: str
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2, 2, 5e7))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    overrides = ["finetune.traning.max_steps=1", "evaluate.batch_size=0", "finetune.seed=1"]
    with pytest.raises(ShellVError) as caught:
        run(config("s3://no-such-bucket/x", overrides=overrides))
    lines = str(caught.value).splitlines()
    assert lines[0] == "4 fault(s), and nothing was started:"
    assert "did you mean 'training'" in lines[1]
    assert "evaluate.batch_size=0" in lines[1]
    assert "no-such-bucket" in lines[2]
    assert lines[3].startswith("MLflow: ")
    assert "secret" not in lines[3]
    assert "0.1 GB free" in lines[4]
    assert not isinstance(caught.value, ConfigError)


def test_wrong_settings_alone_are_a_config_error(tmp_path: Path, tracking_store: Path) -> None:
    # Each is right alone.
    overrides = ["finetune.training.global_batch_size=6", "finetune.training.micro_batch_size=4"]
    with pytest.raises(ConfigError, match="not a multiple"):
        run(config(tmp_path.as_uri(), overrides=overrides))
    with pytest.raises(ConfigError, match="'moon' is not a place to deploy to"):
        run(config(tmp_path.as_uri(), deploy_target="moon"))
    assert run(config(tmp_path.as_uri(), deploy_target="moon", stages=["evaluate"]))
    with pytest.raises(ConfigError, match="'tune' is no stage"):
        run(config(tmp_path.as_uri(), stages=["tune"]))


def test_a_wrong_password_is_a_fault(monkeypatch: pytest.MonkeyPatch, bucket_uri: str, tracking_store: Path) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(ShellVError, match=r"object store: .*access denied"):
        run(config(bucket_uri))


def test_only_an_evaluation_with_a_judge_is_never_taken_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFP_RUN_ID", "run-7")
    judged = ["evaluate.judge_uri=https://judge.example/v1"]
    assert settings(config("s3://x")).cache_salt == ""
    assert settings(config("s3://x", overrides=judged)).cache_salt == "run-7"
    assert settings(config("s3://x", overrides=judged, stages=["prepare_data"])).cache_salt == ""


def test_each_stage_gets_the_overrides_that_concern_it() -> None:
    overrides = ["finetune.hacl.weight=0.3", "seed=2", "evaluate.blind=false", "finetune.seed=3"]
    found = settings(config("s3://x", overrides=overrides))
    assert found.finetune == ["finetune.hacl.weight=0.3", "finetune.seed=2", "finetune.seed=3"]
    assert found.evaluate == ["evaluate.seed=2", "evaluate.blind=false"]
    assert found.deploy == ["deploy.seed=2"]
    for stage in STAGE_NAMES:
        alone = stage_config("smoke", stage, getattr(found, stage))
        assert alone == stage_config("smoke", stage, overrides)
