from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shellv_core.storage import InputDirectory, list_uris
from tests.e2e.conftest import Project

# The first of them pays for the whole run.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def registry(project: Project, monkeypatch: pytest.MonkeyPatch):
    from shellv_core.tracking.runs import open_client

    monkeypatch.setenv("SHELLV_HOME", str(project.home))
    return open_client()


def outputs(stage: str) -> list[str]:
    """Addresses of the committed outputs of `stage` in the project's store."""
    names = list_uris(f"s3://shellv/{stage}")
    return sorted({name.removesuffix("/manifest.json") for name in names if re.search(r"/[0-9a-f]{16}/manifest", name)})


def test_the_end_of_the_run_tells_a_newcomer_everything(project: Project) -> None:
    for benchmark in ("random", "popular", "adversarial", "CHAIR", "Hal-Eval"):
        assert benchmark.lower() in project.output.lower(), project.output
    report = next(Path(word) for word in project.output.split() if word.endswith("report.html"))
    assert report.is_file()
    assert re.search(r"version\s+1\b", project.output)
    assert "@candidate" in project.output or "candidate" in project.output
    assert "curl " in project.output
    assert re.search(r"pretrain_projector, part by part:\n(.*\n)*? +vision tower .*frozen\n", project.output)


@pytest.mark.usefixtures("project_s3")
def test_every_stage_committed_its_settings_versions_and_inputs(project: Project) -> None:
    expected = {"prepare_data": 1, "pretrain_projector": 1, "finetune": 2, "merge_lora": 2, "evaluate": 1, "promote": 1}
    assert {stage: len(outputs(stage)) for stage in expected} == expected
    for stage in expected:
        for uri in outputs(stage):
            manifest = InputDirectory(uri).manifest
            assert manifest.stage == stage
            assert manifest.config["output_uri"].endswith("{fingerprint}")
            assert manifest.versions["torch"]
            assert (stage == "prepare_data") == (not manifest.inputs)


@pytest.mark.usefixtures("project_s3")
def test_the_model_is_registered_by_reference_with_aliases(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    client = registry(project, monkeypatch)
    version = client.get_model_version_by_alias("shellv-smoke", "candidate")
    assert str(version.version) == "1"
    assert version.source in {f"{uri}" for uri in outputs("merge_lora")} | {
        f"{uri}/model" for uri in outputs("merge_lora")
    }
    stages = {run.data.tags["shellv.stage"] for run in client.search_runs(["1"])}
    assert {"prepare_data", "pretrain_projector", "finetune", "merge_lora", "evaluate", "promote", "deploy"} <= stages


def test_the_lineage_leads_back_to_the_data_and_every_byte_holds(project: Project) -> None:
    done = project.run("shellv_core.cli", "models", "shellv-smoke", "candidate", "--verify", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(done.stdout)
    assert [made["stage"] for made in record["lineage"]] == [
        "prepare_data",
        "pretrain_projector",
        "finetune",
        "merge_lora",
    ]
    assert all(len(made["mlflow_run"]) == 32 and len(made["code_sha256"]) == 64 for made in record["lineage"])
    assert (record["evaluation"]["stage"], record["every_byte_verified"]) == ("evaluate", True)
    assert record["tags"]["shellv.data_uri"] == record["lineage"][0]["uri"]


def test_a_second_run_changes_nothing(project: Project, monkeypatch: pytest.MonkeyPatch, project_s3: None) -> None:
    before = {stage: outputs(stage) for stage in ("prepare_data", "finetune", "merge_lora", "evaluate", "promote")}
    again = project.run("pipelines", "run", "--preset", "smoke")
    assert again.returncode == 0, again.stdout + again.stderr
    assert {stage: outputs(stage) for stage in before} == before
    client = registry(project, monkeypatch)
    assert [str(each.version) for each in client.search_model_versions("name='shellv-smoke'")] == ["1"]

    def table(text: str) -> list[str]:
        return [line for line in text.splitlines() if "POPE" in line or "CHAIR" in line]

    assert table(again.stdout) == table(project.output)


@pytest.mark.usefixtures("project_s3")
def test_the_report_and_the_scorer_agree(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELLV_HOME", str(project.home))
    evaluation = InputDirectory(outputs("evaluate")[0])
    data = InputDirectory(outputs("prepare_data")[0])
    results = json.loads(evaluation.fetch("results.json").read_bytes())
    answers = next(
        entry.name
        for entry in evaluation.files("answers/")
        if re.search(r"candidate.*pope.*random", entry.name) and "blind" not in entry.name
    )
    done = project.run(
        "shellv_core.cli", "score", "pope",
        "--questions", str(data.fetch("benchmarks/pope/random.jsonl")),
        "--answers", str(evaluation.fetch(answers)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    scored = json.loads(done.stdout)
    reported = results["models"]["candidate"]["pope"]["random"]
    for name in ("accuracy", "precision", "recall", "f1", "yes_ratio", "num_unparsed", "num_missing"):
        assert scored[name] == pytest.approx(reported[name]), name


@pytest.mark.usefixtures("project_s3")
def test_the_model_answers_where_this_project_is_not_installed(project: Project, tmp_path: Path) -> None:
    manifest_uri = outputs("merge_lora")[0]
    model = InputDirectory(manifest_uri).fetch_tree("model")
    data = InputDirectory(outputs("prepare_data")[0])
    picture = tmp_path / "picture.jpg"
    picture.write_bytes(_first_picture(data))
    program = (
        "import sys\n"
        "sys.modules['shellv_core'] = None\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import efficientnet_lite\n"
        "from PIL import Image\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])\n"
        "processor = AutoProcessor.from_pretrained(sys.argv[1])\n"
        "question = {'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'Describe the image.'}]}\n"
        "prompt = processor.apply_chat_template([question], add_generation_prompt=True)\n"
        "inputs = processor(images=Image.open(sys.argv[2]), text=prompt, return_tensors='pt')\n"
        "answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)\n"
        "print(processor.decode(answer[0, inputs['input_ids'].shape[1]:], skip_special_tokens=True))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(model), str(picture)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def _first_picture(data: InputDirectory) -> bytes:
    from shellv_core.data.shards import read_shards

    sample = next(iter(read_shards(data, "validation")))
    assert sample.image is not None
    return sample.image
