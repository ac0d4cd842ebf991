"""docs/components.md: one component rerun alone, in each of the three ways, on outputs of an earlier run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from components.metadata import component_names, load, metadata
from pipelines.compile import PIPELINES
from shellv_core.stages import STAGE_NAMES
from shellv_core.storage import delete_prefix, read_manifest
from tests.e2e.conftest import REPOSITORY, Project
from tests.e2e.test_pipeline import outputs

# The first of them pays for the whole run.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

DOCUMENT = (REPOSITORY / "docs" / "components.md").read_text(encoding="utf-8")
SHELL, SINGLE, SINGLE_FOR_A_CLUSTER, WHOLE, COMPILE = (
    next(line for line in DOCUMENT.splitlines() if line.startswith(start))
    for start in (
        "shellv merge_lora",
        "python -m pipelines component merge_lora --run",
        "python -m pipelines component merge_lora --profile",
        "python -m pipelines run",
        "python -m pipelines compile",
    )
)
# With `kfp.local`'s cache, which has the same rules as a cluster's: equal inputs of an equal component.
CACHED_RUNS = """
import sys, yaml
from kfp import components, local
from pipelines.compile import compiled_yaml

document = next(yaml.safe_load_all(compiled_yaml("shellv-align")))
for executor in document["deploymentSpec"]["executors"].values():
    executor["container"]["env"] = []
root, *overrides = sys.argv[1:]
local.init(local.SubprocessRunner(use_venv=False), pipeline_root=root, enable_caching=True)
pipeline = components.load_component_from_text(yaml.safe_dump(document))
for override in overrides:
    print("RUN", override, flush=True)
    pipeline(root_uri="s3://shellv", preset="smoke", overrides=[override])
"""


def run(project: Project, line: str) -> subprocess.CompletedProcess[str]:
    words = shlex.split(line)
    module = "shellv_core.cli" if words[0] == "shellv" else words[2]
    done = project.run(module, *words[1 if words[0] == "shellv" else 3 :])
    assert done.returncode == 0, (line, done.stdout + done.stderr)
    return done


@pytest.fixture
def nothing_is_left(project_s3: None) -> Iterator[None]:
    """What a test adds to the run's outputs goes again, since others count them."""
    before = {uri for stage in STAGE_NAMES for uri in outputs(stage)}
    yield
    for uri in {uri for stage in STAGE_NAMES for uri in outputs(stage)} - before:
        delete_prefix(uri)


@pytest.mark.usefixtures("nothing_is_left")
def test_from_the_command_line_and_as_a_pipeline_of_one_task(project: Project, tmp_path: Path) -> None:
    before, adapter = outputs("merge_lora"), outputs("finetune")[0]
    hash_of_adapter = adapter.rpartition("/")[2]
    run(project, SHELL.replace("HASH", hash_of_adapter))
    done = run(project, SINGLE.replace("HASH", hash_of_adapter))
    made = sorted(set(outputs("merge_lora")) - set(before))
    assert sorted(read_manifest(uri).config["seed"] for uri in made) == [1, 2]
    assert {read_manifest(uri).inputs["adapter"].uri for uri in made} == {adapter}
    assert done.stdout.splitlines()[-1] in made
    path = tmp_path / "merge_lora.yaml"
    run(project, SINGLE_FOR_A_CLUSTER.replace("/tmp/shellv-demo/merge_lora.yaml", str(path)))
    assert next(yaml.safe_load_all(path.read_text()))["pipelineInfo"]["name"] == "shellv-merge-lora"


@pytest.mark.slow
def test_in_the_whole_pipeline_everything_before_it_is_reused(project: Project) -> None:
    output = run(project, WHOLE).stdout
    for stage in ("prepare_data", "pretrain_projector", "finetune"):
        assert f"{stage}: reusing " in output
        assert f"{stage}: writing " not in output
    assert output.count("merge_lora: writing ") == 2


@pytest.mark.usefixtures("nothing_is_left")
def test_another_stage_s_override_leaves_a_task_in_the_cache(project: Project, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(CACHED_RUNS)
    # What concerns the stage itself, and what does not.
    overrides = ["evaluate.seed=1", "evaluate.seed=2", "pretrain_projector.training.log_every_steps=5"]
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "kfp"), *overrides],
        cwd=tmp_path,
        env=project.environment({"PYTHONPATH": str(REPOSITORY)}) | s3_environment(),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = re.split(r"^RUN ", done.stdout, flags=re.MULTILINE)[1:]
    worked = [re.search(r"pretrain_projector: (reusing|writing) ", each) is not None for each in runs]
    assert worked == [True, False, True], done.stdout


def s3_environment() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "MLFLOW_S3"))}


def test_a_cluster_s_files_are_compiled(project: Project, tmp_path: Path) -> None:
    run(project, COMPILE.replace("/tmp/shellv-demo/compiled", str(tmp_path)))
    assert len(list(tmp_path.glob("*-a100-80.yaml"))) == len(PIPELINES)


def test_the_tables_are_complete() -> None:
    of_components, _, of_pipelines = DOCUMENT.partition("## Pipelines")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", of_components, re.MULTILINE))
    assert set(rows) == set(component_names())
    for name, row in rows.items():
        kind, image, cached, link = row.split(" | ")
        assert kind == metadata(name).kind
        assert f"shellv-{image}:" in load(name).component_spec.implementation.container.image
        assert cached.startswith("yes") == metadata(name).cached
        assert (REPOSITORY / "docs" / re.search(r"\((.*)\)", link)[1]).resolve().is_file()
    assert re.findall(r"^\| `([a-z-]+)` \|", of_pipelines, re.MULTILINE) == list(PIPELINES)
