from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from kfp.components import load_component_from_file

from components import images
from components.images import ImageName, LockedImage
from containers.lock import write_lock
from pipelines.client import compiled, connection
from pipelines.client.compiled import CompiledPipeline
from pipelines.compile import compiled_yaml
from tests.pipelines.kfp_api_server import KfpServer, Snapshot
from tests.submit.conftest import ROOT, TOKEN, Command, pushed

REPOSITORY = Path(__file__).resolve().parents[2]


def only_run(kfp: KfpServer) -> dict:
    (run,) = kfp.runs.values()
    return run


def test_upload_names_a_version_by_its_content_and_uploads_it_once(kfp: KfpServer, command: Command) -> None:
    first = command("upload", "shellv")
    assert first.code == 0
    name = re.match(r"shellv (\S+): uploaded\n", first.out)[1]
    assert re.fullmatch(r"[0-9a-z.]+-[0-9a-f]{12}", name)
    (version,) = kfp.versions.values()
    assert version["name"] == version["display_name"] == name
    spec, platform = yaml.safe_load_all(pushed("shellv"))
    assert version["pipeline_spec"] == {"pipeline_spec": spec, "platform_spec": platform}
    ids = f"{version['pipeline_id']}/version/{version['pipeline_version_id']}"
    assert f"{kfp.url}/#/pipelines/details/{ids}" in first.out

    second = command("upload", "shellv")
    assert (second.code, second.out) == (0, first.out.replace("uploaded", "already there"))
    assert kfp.count("POST", "upload_version") == 1

    assert command("upload", "shellv", "--no-cache").out != first.out
    assert len(kfp.versions) == 2
    assert len(kfp.pipelines) == 1


def test_manifests_are_those_of_kfps_own_compiler(command: Command, tmp_path: Path) -> None:
    from kfp.compiler import Compiler
    from kfp.compiler.compiler_utils import KubernetesManifestOptions

    pipeline = CompiledPipeline("shellv", compiled_yaml("shellv"))
    (tmp_path / "pipeline.yaml").write_text(pipeline.text)
    component = load_component_from_file(str(tmp_path / "pipeline.yaml"))
    component.description = pipeline.description
    title = pipeline.documents[0]["pipelineInfo"]["displayName"]
    options = KubernetesManifestOptions(
        pipeline_display_name=title,
        pipeline_version_name=f"shellv-{pipeline.version}",
        pipeline_version_display_name=pipeline.version,
        include_pipeline_manifest=True,
    )
    options.set_pipeline_spec(component.pipeline_spec)
    Compiler().compile(
        component,
        str(tmp_path / "theirs.yaml"),
        kubernetes_manifest_options=options,
        kubernetes_manifest_format=True,
    )
    assert list(yaml.safe_load_all(pipeline.manifests())) == list(
        yaml.safe_load_all((tmp_path / "theirs.yaml").read_text())
    )
    said = command("upload", "shellv", "--manifests", str(tmp_path / "ours.yaml"))
    assert said.code == 0
    kinds = [each["kind"] for each in yaml.safe_load_all((tmp_path / "ours.yaml").read_text())]
    assert kinds == ["Pipeline", "PipelineVersion"]


def test_submit_starts_a_run_of_the_pinned_version_with_all_that_was_asked_for(
    kfp: KfpServer, command: Command, tmp_path: Path
) -> None:
    params = tmp_path / "a100.yaml"
    params.write_text("root_uri: s3://elsewhere\npreset: smoke\nk8s_node_selector: {pool: a100}\noverrides: []\n")
    said = command(
        "submit",
        "shellv",
        ROOT,
        "overrides=[finetune.hacl.weight=0.5]",
        "k8s_training_accelerators=8",
        *("--params", str(params), "--experiment", "hacl", "--run-name", "first try"),
        *("--service-account", "pipeline-runner", "--pipeline-root", "s3://bucket/kfp", "--mlflow-experiment", "vlm"),
    )
    assert said.code == 0, said.err
    run = only_run(kfp)
    assert run["display_name"] == "first try"
    assert run["runtime_config"] == {
        "pipeline_root": "s3://bucket/kfp",
        "parameters": {
            "root_uri": "s3://bucket/prefix",
            "preset": "smoke",
            "k8s_node_selector": {"pool": "a100"},
            "overrides": ["finetune.hacl.weight=0.5"],
            "k8s_training_accelerators": "8",
        },
    }
    assert run["service_account"] == "pipeline-runner"
    assert run["plugins_input"] == {"mlflow": {"experiment_name": "vlm"}}
    (version,) = kfp.versions.values()
    assert run["pipeline_version_reference"]["pipeline_version_id"] == version["pipeline_version_id"]
    assert kfp.experiments[run["experiment_id"]]["display_name"] == "hacl"
    assert f"{kfp.url}/#/runs/details/{run['run_id']}" in said.out
    assert f"python -m pipelines wait {run['run_id']}" in said.out

    assert command("submit", "shellv", ROOT, "--experiment", "hacl").code == 0
    assert (len(kfp.experiments), len(kfp.versions), len(kfp.runs)) == (1, 1, 2)


def test_values_may_stand_before_and_after_flags(
    kfp: KfpServer, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("submit", "shellv", ROOT, "--run-name", "a", "preset=smoke", "--no-cache", "overrides=[]").code == 0
    assert set(only_run(kfp)["runtime_config"]["parameters"]) == {"root_uri", "preset", "overrides"}
    for wrong in ("--no-such-flag=1", "loose"):
        with pytest.raises(SystemExit, match="2"):
            command("submit", "shellv", ROOT, "--run-name", "a", wrong)
        assert f"unrecognized arguments: {wrong}" in capsys.readouterr().err


def test_no_cache_runs_a_version_in_which_no_task_is_cached(kfp: KfpServer, command: Command) -> None:
    assert command("submit", "shellv", ROOT, "--no-cache").code == 0
    (version,) = kfp.versions.values()
    ours, theirs = version["pipeline_spec"]["pipeline_spec"], next(yaml.safe_load_all(pushed("shellv")))
    cached = [task.pop("cachingOptions") for task in tasks_of(theirs)]
    assert [task.pop("cachingOptions") for task in tasks_of(ours)] == [{}] * len(cached)
    assert {"enableCache": True} in cached
    assert ours == theirs


def tasks_of(spec: dict) -> list[dict]:
    """The tasks of a pipeline, also those in groups."""
    graphs = [spec["root"]["dag"], *(each["dag"] for each in spec["components"].values() if "dag" in each)]
    return [task for graph in graphs for task in graph["tasks"].values() if "cachingOptions" in task]


def test_profiles_and_locked_images_are_versions_of_their_own(
    kfp: KfpServer, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(images, "LOCK_PATH", tmp_path / "images.lock.yaml")
    said = command("upload", "shellv", "--locked")
    assert said.code == 2
    assert "make images" in said.err
    said = command("upload", "shellv", "--profile", "a100-8")
    assert said.code == 2
    assert "a100-8" in said.err
    assert kfp.requests == []
    digest = "sha256:" + "a" * 64
    locked = {name: LockedImage(reference=f"registry/{name}:1", digest=digest) for name in get_args(ImageName)}
    monkeypatch.setattr("containers.lock.LOCK_PATH", images.LOCK_PATH)
    write_lock(locked)
    for arguments in ([], ["--profile", "a100-80"], ["--profile", "a100-80", "--locked"]):
        assert command("upload", "shellv", *arguments).code == 0
    cpu, large, pinned = (version["pipeline_spec"] for version in kfp.versions.values())
    assert cpu != large
    executors = pinned["pipeline_spec"]["deploymentSpec"]["executors"].values()
    used = {each["container"]["image"] for each in executors}
    assert used == {f"registry/control@{digest}", f"registry/train@{digest}"}
    assert pinned["platform_spec"] == large["platform_spec"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shelv", ROOT], "unknown pipeline 'shelv'; did you mean 'shellv'?"),
        (["shellv"], "missing parameter root_uri"),
        (["shellv", ROOT, "presett=nano"], "unknown parameter 'presett'; did you mean 'preset'?"),
        (["shellv", ROOT, "preset=nanno"], "parameter preset is 'nanno'; did you mean 'nano'?"),
        (["shellv", ROOT, "overrides=5"], "parameter overrides is 5; it must be a list."),
        (["shellv", ROOT, "overrides=[1]"], "parameter overrides holds 1; each must be text"),
        (["shellv", ROOT, "overrides=[finetune.max_step=5]"], "max_step"),
        (["shellv", ROOT, "k8s_node_selector=[a]"], "parameter k8s_node_selector is ['a']; it must be a mapping."),
        (["shellv", ROOT, "preset"], "parameter 'preset': write it as name=value."),
    ],
)
def test_wrong_parameters_are_told_before_any_request(
    kfp: KfpServer, command: Command, arguments: list[str], message: str
) -> None:
    said = command("submit", *arguments)
    assert said.code == 2
    assert message in said.err
    assert said.err.count("\n") == 1
    assert kfp.requests == []


def test_a_number_for_a_text_in_a_file_says_to_quote_it(kfp: KfpServer, command: Command, tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    params.write_text("root_uri: s3://b\nk8s_training_accelerators: 8\n")
    said = command("submit", "shellv", "--params", str(params))
    assert said.code == 2
    assert (
        "k8s_training_accelerators is 8; it must be text. Put it in quotes: k8s_training_accelerators: '8'." in said.err
    )
    assert kfp.requests == []


@pytest.mark.parametrize("status", [500, 503])
@pytest.mark.parametrize("path", ["/healthz", "/pipelines$", "/upload_version", "/experiments", "/runs$"])
def test_a_server_that_fails_twice_and_then_works_is_asked_again(
    kfp: KfpServer, command: Command, path: str, status: int
) -> None:
    kfp.fail("GET", path, status, count=2)
    kfp.fail("POST", path, status, count=2)
    said = command("submit", "shellv", ROOT)
    assert said.code == 0, said.err
    assert (len(kfp.pipelines), len(kfp.versions), len(kfp.experiments), len(kfp.runs)) == (1, 1, 1, 1)


@pytest.mark.parametrize("status", [0, 500])
@pytest.mark.parametrize("path", ["/pipelines$", "/upload_version", "/experiments", "/runs$"])
def test_what_a_server_did_before_its_answer_was_lost_is_not_done_again(
    kfp: KfpServer, command: Command, path: str, status: int
) -> None:
    kfp.fail("POST", path, status, after=True)
    command_line = ("submit", "shellv", ROOT, "--run-name", "same name")
    said = command(*command_line)
    assert said.code == 0, said.err
    assert (len(kfp.pipelines), len(kfp.versions), len(kfp.experiments), len(kfp.runs)) == (1, 1, 1, 1)
    # A run of that name exists now; the next submission is another run all the same.
    kfp.fail("POST", "/runs$", status, after=True)
    assert command(*command_line).code == 0
    assert len(kfp.runs) == 2


@pytest.mark.parametrize("path", ["/pipelines$", "/upload_version", "/experiments"])
def test_what_somebody_else_created_in_the_meantime_is_taken(kfp: KfpServer, command: Command, path: str) -> None:
    kfp.fail("POST", path, 409, after=True)
    assert command("submit", "shellv", ROOT).code == 0
    assert (len(kfp.pipelines), len(kfp.versions), len(kfp.experiments), len(kfp.runs)) == (1, 1, 1, 1)


def test_a_server_that_goes_on_failing_ends_the_command(kfp: KfpServer, command: Command) -> None:
    kfp.fail("POST", "/runs$", 500, count=100)
    said = command("submit", "shellv", ROOT)
    assert said.code == 1
    assert "has a fault of its own (500: Internal Server Error: database is locked)" in said.err
    assert said.err.count("\n") == 1
    assert kfp.count("POST", "/runs$") == 4


def test_what_the_server_refuses_is_told_in_its_words_and_not_tried_again(kfp: KfpServer, command: Command) -> None:
    kfp.fail("POST", "/runs$", 400)
    said = command("submit", "shellv", ROOT)
    assert said.code == 1
    assert "refused the request (400: Internal Server Error: database is locked)" in said.err
    assert kfp.count("POST", "/runs$") == 1


def test_no_server(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    said = command("submit", "shellv", ROOT)
    assert said.code == 2
    assert "set KF_PIPELINES_ENDPOINT" in said.err
    said = command("submit", "shellv", ROOT, "--endpoint", "localhost:8888")
    assert said.code == 2
    assert "--endpoint is 'localhost:8888'; it must be an address" in said.err
    said = command("submit", "shellv", ROOT, "--endpoint", "http://127.0.0.1:9")
    assert said.code == 1
    assert "http://127.0.0.1:9 does not answer (" in said.err
    assert "kubectl port-forward" in said.err
    assert said.err.count("\n") == 1


def test_a_server_that_takes_requests_and_never_answers(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "READ_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        said = command("submit", "shellv", ROOT, "--endpoint", f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert said.code == 1
    assert "does not answer (Read timed out. (read timeout=0.05))" in said.err


def test_a_proxy_of_the_environment_is_used(kfp: KfpServer, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    # A proxy is asked for whole addresses; the stand-in answers for every host.
    monkeypatch.setenv("http_proxy", kfp.url)
    monkeypatch.setenv("no_proxy", "elsewhere.example")
    assert command("status", "--endpoint", "http://kubeflow.example/pipeline").code == 1
    assert kfp.requests == [("GET", "/pipeline/apis/v2beta1/healthz")]
    assert command("status", "--endpoint", "http://kubeflow.example").code == 0
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert command("status").code == 0


def test_submit_and_wait_says_how_the_run_ended(kfp: KfpServer, command: Command) -> None:
    kfp.script = [
        Snapshot("PENDING"),
        Snapshot("RUNNING", {"prepare-data": "RUNNING"}),
        Snapshot("SUCCEEDED", {"prepare-data": "SUCCEEDED"}),
    ]
    said = command("submit", "shellv", ROOT, "--wait")
    assert said.code == 0
    assert re.search(r"prepare data: running\n.*prepare data: succeeded after 0:00:0\d\n.*the run succeeded", said.out)
    kfp.script = [Snapshot("FAILED", {"finetune": "FAILED"}, {"finetune": "Pod lifecycle failure: OOMKilled"})]
    said = command("submit", "shellv", ROOT, "--wait")
    assert said.code == 3
    assert "the run failed" in said.out
    assert "finetune with HACL: Pod lifecycle failure: OOMKilled" in said.out


def test_images_of_this_machine_alone_are_pointed_out(
    kfp: KfpServer, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "note:" not in command("upload", "shellv").err
    monkeypatch.setattr(compiled, "compiled_yaml", compiled_yaml)
    assert "only a cluster whose nodes have these images" in command("upload", "shellv").err


def test_help_of_every_command_needs_no_library_that_takes_time() -> None:
    program = (
        "import sys\n"
        "from pipelines.__main__ import _parser\n"
        "_parser().format_help()\n"
        "print(sorted({'kfp', 'kubernetes', 'requests', 'boto3', 'mlflow', 'torch', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_token_goes_to_the_server_and_nowhere_else(kfp: KfpServer, command: Command) -> None:
    assert command("submit", "shellv", ROOT).code == 0
    assert {each["authorization"] for each in kfp.headers} == {f"Bearer {TOKEN}"}
