import subprocess
import sys

import pytest

from shellv_core.errors import TrackingError
from shellv_core.tracking import registry as module
from shellv_core.tracking.registry import CANDIDATE, CHAMPION, EVALUATION_TAG, ModelRegistry, registered_models
from shellv_core.tracking.runs import EXPERIMENT, open_client


@pytest.fixture
def registry(tracking_store):
    return ModelRegistry("shellv-test")


def test_versions_by_reference_and_aliases(registry):
    assert registry.find(CHAMPION) is None, "there is not even a model"
    first = registry.register("s3://b/one", "f1", "c1", {EVALUATION_TAG: "s3://b/e1"})
    second = registry.register("s3://b/two", "f2", "c2", {})
    assert (first.version, first.model_uri, first.tags[EVALUATION_TAG]) == ("1", "s3://b/one", "s3://b/e1")
    assert registry.find(CHAMPION) is None
    registry.set_alias(CHAMPION, first.version)
    registry.set_alias(CANDIDATE, second.version)
    assert registry.find(CHAMPION) == first
    assert registry.find(CANDIDATE) == second


def test_the_same_model_keeps_its_version(registry):
    first = registry.register("s3://b/one", "f1", "c1", {"note": "a"})
    again = registry.register("s3://b/one", "f1", "c1", {"note": "b"})
    assert (again.version, again.tags["note"]) == (first.version, "b")
    assert registry.register("s3://b/one", "f1", "other content", {}).version == "2"
    assert registry.register("s3://elsewhere/one", "f1", "c1", {}).version == "3"


@pytest.mark.parametrize(("count", "page"), [(7, 3), pytest.param(210, 100, marks=pytest.mark.slow)])
def test_every_page_is_read(registry, monkeypatch, count, page):
    monkeypatch.setattr(module, "_PAGE", page)
    for number in range(1, count + 1):
        registry.register(f"s3://b/{number}", "f", f"c{number}", {})
    assert [each.version for each in registry.versions()] == [str(number) for number in range(1, count + 1)]
    assert registry.register("s3://b/1", "f", "c1", {}).version == "1"


@pytest.mark.parametrize("name", ["it's", 'a "b"', "naïve ☃ 50%", "a b.c-d_e", "`x`"])
def test_odd_names(tracking_store, name):
    registry = ModelRegistry(name)
    version = registry.register("s3://b/it's", "f", "c", {})
    registry.set_alias(CHAMPION, version.version)
    assert registry.versions() == [version] == [registry.find(CHAMPION)]
    assert registered_models() == [name]


@pytest.mark.parametrize("name", ["a/b", "", "..", "a:b"])
def test_names_that_mlflow_refuses(tracking_store, name):
    with pytest.raises(TrackingError, match="refused an action on the model"):
        ModelRegistry(name).register("s3://b/1", "f", "c", {})


def test_refusals_are_mapped(registry):
    with pytest.raises(TrackingError, match="refused an action on the model 'shellv-test'"):
        registry.set_alias(CHAMPION, "9")


def test_unreachable_server_is_told(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:a-password@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match="does not answer") as error:
        ModelRegistry("shellv-test")
    assert "a-password" not in str(error.value)


TRACK = """
import sys
from shellv_core.tracking.runs import track

with track(sys.argv[1], {}, {}) as run:
    for step in range(20):
        run.log_metrics({"loss": 1.0}, step)
        run.flush()
"""


def test_first_runs_at_the_same_time_share_one_database(project_folder):
    processes = [subprocess.Popen([sys.executable, "-c", TRACK, name]) for name in ("one", "two", "three")]
    assert [process.wait(timeout=300) for process in processes] == [0, 0, 0]
    client = open_client()
    runs = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["one", "three", "two"]
    assert all(run.info.status == "FINISHED" for run in runs)
    assert [path.name for path in project_folder.glob(".mlflow.db*")] == []
