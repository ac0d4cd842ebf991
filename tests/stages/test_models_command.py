"""`shellv models` and `shellv rollback` on real MLflow, with models made by hand."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from promotions import make_evaluation, make_model

from shellv_core.cli import main
from shellv_core.stages import promote
from shellv_core.stages.promote import PromoteConfig
from shellv_core.tracking.championship import ROLLED_BACK_TAG
from shellv_core.tracking.lineage import ENVIRONMENT
from shellv_core.tracking.registry import CHAMPION, ModelRegistry
from shellv_core.tracking.runs import open_client

pytestmark = pytest.mark.usefixtures("tracking_store")
NAME = "shellv-test"


@pytest.fixture(scope="module")
def made(tmp_path_factory, tracking_database):
    """A store and a registry, made once: 1 and 2 passed the gate, one after the other; 3 did not."""
    folder = tmp_path_factory.mktemp("registered")
    database = shutil.copyfile(tracking_database, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHELLV_HOME", str(folder))
        patch.setenv("KFP_RUN_ID", "5a1e")
        root = (folder / "store").as_uri()
        for name, num_right in {"one": 140, "two": 150, "bad": 110}.items():
            promoted(root, folder, name, num_right)
    shutil.copytree(folder / "store", folder / "pristine")
    return folder, database


@pytest.fixture
def store(made, tracking_store, monkeypatch):
    """The folder of that store, as it was; the registry is the test's own copy."""
    folder, database = made
    shutil.rmtree(folder / "store", ignore_errors=True)
    shutil.copytree(folder / "pristine", folder / "store")
    shutil.copyfile(database, tracking_store)
    monkeypatch.setenv("KFP_RUN_ID", "5a1e")
    return folder / "store"


@pytest.fixture
def root(store):
    return store.as_uri()


def promoted(root, folder, name, num_right, **settings):
    gate = folder / "gate.yaml"
    gate.write_text("gain_over_blind: {pope_random_accuracy: 0.1}\n")
    model_uri = make_model(root, name)
    evaluation_uri = f"{root}/evaluations/{name}-{num_right}-data"
    if not (folder / "store" / "evaluations" / f"{name}-{num_right}-data").exists():
        make_evaluation(root, model_uri, num_right)
    return promote.run(
        PromoteConfig(
            model_uri=model_uri,
            evaluation_uri=evaluation_uri,
            output_uri=f"{root}/promotions/{{fingerprint}}",
            registered_model=NAME,
            thresholds_uri=gate.as_uri(),
            **settings,
        )
    )


def shellv(capsys, *arguments):
    capsys.readouterr()
    code = main(arguments)
    said = capsys.readouterr()
    return code, said.out, said.err


def show(capsys, *arguments):
    code, out, err = shellv(capsys, "models", *arguments, "--json")
    assert not err.startswith("shellv: "), err
    return code, json.loads(out)


def test_tables(store, capsys):
    code, out, _ = shellv(capsys, "models")
    assert code == 0
    assert [cell.strip() for cell in out.splitlines()[2].split("|")][1:5] == [NAME, "3", "2", "3"]
    lines = shellv(capsys, "models", NAME)[1].splitlines()
    assert [line.split("|")[3].strip() for line in lines[2:]] == ["promoted", "promoted", "rejected"]
    assert "0.7500" in lines[3]
    assert "champion" in lines[3]
    rows = show(capsys, NAME)[1]
    assert [row["metrics"] for row in rows] == [{"pope_random_accuracy": value} for value in (0.7, 0.75, 0.55)]
    assert (rows[1]["took_over_from"], rows[1]["aliases"]) == ("1", ["champion"])


def test_lineage_back_to_the_data(root, capsys):
    code, record = show(capsys, NAME, "champion", "--verify")
    assert (code, record["sound"], record["version"]) == (0, True, "2")
    stages = [made["stage"] for made in record["lineage"]]
    assert stages == ["prepare_data", "pretrain_projector", "finetune", "merge_lora"]
    assert record["lineage"][0]["uri"] == f"{root}/data"
    assert [made["mlflow_run"] for made in record["lineage"]] == [f"run of {stage}" for stage in stages]
    assert record["evaluation"]["metrics"]["pope_random_accuracy"] == 0.75
    tags = record["tags"]
    assert tags["shellv.data_uri"] == f"{root}/data"
    assert tags["shellv.data_sha256"] == record["lineage"][0]["content_sha256"]
    assert (tags["shellv.commit"], tags["shellv.image"]) == ("c0ffee", "r/merge_lora@sha256:1")
    assert json.loads(tags["shellv.lineage.finetune"]) == record["lineage"][2]
    assert [(move["before"], move["after"], move["by"]) for move in record["moves"]] == [
        ("", "1", "pipeline run 5a1e"),
        ("1", "2", "pipeline run 5a1e"),
    ]
    text = shellv(capsys, "models", NAME, "2")[1]
    for expected in (
        "shellv-test version 2 (champion)",
        "took over from    version 1",
        f"prepare_data        {root}/data",
        "commit c0ffee, image r/finetune@sha256:1, MLflow run run of finetune",
        "judged by:",
        "all manifests are as recorded",
    ):
        assert expected in text, text


@pytest.mark.parametrize(
    ("spoil", "every_byte", "stage", "problem"),
    [
        (lambda store: shutil.rmtree(store / "data"), False, "unknown", "it is gone"),
        (lambda store: change_manifest(store / "base"), False, "pretrain_projector", "has changed since it was used"),
        (lambda store: (store / "adapters/two/model/weights").write_text("twO"), True, "finetune", "SHA-256"),
        (lambda store: (store / "models/two/model/weights").unlink(), True, "merge_lora", "missing"),
        (lambda store: (store / "data/manifest.json").write_text("{}"), False, "unknown", "is not a manifest"),
        (lambda store: change_manifest(store / "evaluations/two-150-data"), False, "evaluate", "has changed since"),
    ],
)
def test_what_is_not_as_recorded_is_told(store, capsys, spoil, every_byte, stage, problem):
    spoil(store)
    verify = ["--verify"] if every_byte else []
    code, record = show(capsys, NAME, "2", *verify)
    assert (code, record["sound"]) == (1, False)
    outputs = [*record["lineage"], record["evaluation"]]
    found = [(made["stage"], made["problem"]) for made in outputs if "problem" in made]
    assert [each[0] for each in found] == [stage]
    assert problem in found[0][1]
    text = shellv(capsys, "models", NAME, "2", *verify)[1]
    assert "PROBLEM: " in text
    assert text.endswith("NOT as recorded: see the problems above\n")


def change_manifest(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("models", "shellv-tset"), "no model 'shellv-tset' is registered; did you mean 'shellv-test'?"),
        (("models", NAME, "9"), "'shellv-test' has no version '9'; it has"),
        (("models", NAME, "--verify"), "--verify is of one version"),
        (("rollback", "shellv-tset"), "'shellv-tset' has no champion"),
        (("rollback", NAME, "--to", "9"), "has no version '9'; it has 1, 2, 3"),
    ],
)
def test_mistakes(store, capsys, arguments, message):
    code, out, err = shellv(capsys, *arguments)
    assert (code, out) == (1, "")
    assert message in err


def test_nothing_is_registered(capsys):
    assert shellv(capsys, "models")[:2] == (0, "No model is registered; run promote first.\n")
    assert "there is none: run promote first" in shellv(capsys, "models", "x")[2]


def test_a_version_that_others_registered(store, capsys):
    open_client().create_model_version(NAME, source="s3://elsewhere/model")
    assert shellv(capsys, "models", NAME)[0] == 0
    assert "version 4 of 'shellv-test' was not registered by promote" in shellv(capsys, "models", NAME, "4")[2]


def test_rolled_back_and_promoted_again_by_decision_alone(root, store, capsys):
    code, out, _ = shellv(capsys, "rollback", NAME, "--reason", "it stutters")
    assert code == 0
    assert "version 1 of shellv-test is champion instead of version 2 (by pipeline run 5a1e: it stutters)" in out
    assert show(capsys, NAME)[1][1]["rolled_back"].endswith("by pipeline run 5a1e: it stutters")
    # The same pipeline, run again, does not undo it.
    again = promoted(root, store.parent, "two", 150)
    assert (again.reused, again.details["decision"], again.details["champion_version"]) == (False, "rejected", "1")
    assert "version 2 was rolled back" in again.details["reasons"][0]
    assert promoted(root, store.parent, "two", 150).reused
    decided = promoted(root, store.parent, "two", 150, override_reason="the prompt was at fault")
    assert (decided.details["promoted"], decided.details["overridden"]) == (True, True)
    version = ModelRegistry(NAME).find(CHAMPION)
    assert version.version == "2"
    assert ROLLED_BACK_TAG not in version.tags
    row = show(capsys, NAME)[1][1]
    assert row["override"] == "the prompt was at fault"
    assert "promoted against the gate" in shellv(capsys, "models", NAME)[1]
    assert show(capsys, NAME, "2")[1]["moves"][-1]["kind"] == "override"


def test_a_failed_gate_is_overridden_with_what_it_failed_on_record(root, store):
    result = promoted(root, store.parent, "bad", 110, override_reason="only to look at it")
    assert (result.metrics["promoted"], result.details["overridden"]) == (1, True)
    assert "gain +0.0500" in result.details["reasons"][0]
    assert ModelRegistry(NAME).find(CHAMPION).version == "3"
    # Where the gate is passed there is nothing to override.
    assert not promoted(root, store.parent, "one", 140, override_reason="whatever").details["overridden"]


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda folder: shutil.rmtree(folder), "it is gone"),
        (lambda folder: (folder / "model/weights").write_text("onE"), "SHA-256"),
        (lambda folder: change_manifest(folder), "has changed since it was used"),
    ],
)
def test_a_version_whose_model_is_not_what_it_was_stays_away(store, capsys, spoil, problem):
    spoil(store / "models" / "one")
    code, _, err = shellv(capsys, "rollback", NAME)
    assert code == 1
    assert "version 1 of 'shellv-test' cannot be champion again" in err
    assert problem in err
    assert ModelRegistry(NAME).find(CHAMPION).version == "2"


DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "registry.md").read_text(encoding="utf-8")


def test_every_command_of_the_document_works(root, store, capsys):
    bad = ModelRegistry(NAME).get("3")
    lines = re.findall(r"^shellv .*$", DOCUMENT, re.MULTILINE)
    assert [line.split()[1] for line in lines] == ["models"] * 4 + ["rollback", "promote"]
    for line in lines:
        _, *arguments = shlex.split(line.replace("shellv-nano", NAME))
        uris = {"model_uri=URI": bad.model_uri, "evaluation_uri=URI": bad.tags["shellv.evaluation_uri"]}
        arguments = [f"{each.partition('=')[0]}={uris[each]}" if each in uris else each for each in arguments]
        if arguments[0] == "promote":
            arguments += [f"output_uri={root}/forced", f"thresholds_uri={(store.parent / 'gate.yaml').as_uri()}"]
        code, _, err = shellv(capsys, *arguments)
        assert code == 0, (line, err)
    assert ModelRegistry(NAME).find(CHAMPION).version == "3"


def test_the_document_names_every_tag_and_variable(store, root, capsys):
    shellv(capsys, "rollback", NAME)
    promoted(root, store.parent, "bad", 110, override_reason="why not")
    registry = ModelRegistry(NAME)
    tags = {tag for each in registry.versions() for tag in each.tags} | set(registry.model_tags())
    assert len(tags) > 15
    for tag in tags:
        general = re.sub(r"^(shellv\.)(lineage|metric|move)\..*", r"\1\2.", tag)
        assert f"`{general}" in DOCUMENT, tag
    for variable in ENVIRONMENT.values():
        assert f"| `{variable}` |" in DOCUMENT
    for path in re.findall(r"\]\((?!http)([^)]+)\)", DOCUMENT):
        assert (Path(__file__).resolve().parents[2] / "docs" / path).exists(), path
