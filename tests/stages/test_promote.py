"""The promote stage on real MLflow (SQLite), with evaluations made by hand."""

import json
import shutil

import pytest
from promotions import make_evaluation, make_model

from shellv_core.errors import PromotionError
from shellv_core.stages import promote
from shellv_core.stages.promote import PromoteConfig
from shellv_core.storage import InputDirectory
from shellv_core.tracking.registry import CANDIDATE, CHAMPION, ModelRegistry

pytestmark = pytest.mark.usefixtures("tracking_store")
NAME = "shellv-test"


@pytest.fixture
def root(tmp_path):
    return (tmp_path / "store").as_uri()


@pytest.fixture
def thresholds_uri(tmp_path):
    path = tmp_path / "gate.yaml"
    path.write_text(
        "gain_over_blind: {pope_random_accuracy: 0.1}\nnot_worse_than_champion: {pope_random_accuracy: 0.05}\n"
    )
    return path.as_uri()


def run(root, thresholds_uri, name, num_right, data="data"):
    model_uri = make_model(root, name) if name not in _made else _made[name]
    _made[name] = model_uri
    evaluation_uri = make_evaluation(root, model_uri, num_right, data)
    return rerun(root, thresholds_uri, model_uri, evaluation_uri)


def rerun(root, thresholds_uri, model_uri, evaluation_uri):
    return promote.run(
        PromoteConfig(
            output_uri=f"{root}/promotions/{{fingerprint}}",
            model_uri=model_uri,
            evaluation_uri=evaluation_uri,
            registered_model=NAME,
            thresholds_uri=thresholds_uri,
        )
    )


def rerun_champion(root, thresholds_uri):
    champion = ModelRegistry(NAME).find(CHAMPION)
    return rerun(root, thresholds_uri, champion.model_uri, champion.tags["shellv.evaluation_uri"])


_made: dict[str, str] = {}


@pytest.fixture(autouse=True)
def _forget_models():
    _made.clear()


def aliases():
    registry = ModelRegistry(NAME)
    found = {alias: registry.find(alias) for alias in (CANDIDATE, CHAMPION)}
    return {alias: version.version for alias, version in found.items() if version}


def test_first_model_that_passes_becomes_champion(root, thresholds_uri):
    result = run(root, thresholds_uri, "one", 140)
    assert result.metrics == {"promoted": 1, "version": 1}
    assert result.details["decision"] == "promoted"
    assert aliases() == {CANDIDATE: "1", CHAMPION: "1"}
    verdict = json.loads(InputDirectory(result.output_uri).fetch("verdict.json").read_bytes())
    assert verdict == result.details
    champion = ModelRegistry(NAME).find(CHAMPION)
    assert champion.model_uri == _made["one"]
    assert champion.tags["shellv.decision"] == "promoted"
    assert "gain +0.2000" in champion.tags["shellv.reasons"]


def test_running_again_changes_nothing(root, thresholds_uri):
    first = run(root, thresholds_uri, "one", 140)
    again = rerun_champion(root, thresholds_uri)
    assert again.reused
    assert (again.details, again.output_uri) == (first.details, first.output_uri)
    assert aliases() == {CANDIDATE: "1", CHAMPION: "1"}


def test_a_run_cut_off_before_its_commit_comes_to_the_same_verdict(root, thresholds_uri, tmp_path):
    run(root, thresholds_uri, "one", 140)
    first = run(root, thresholds_uri, "better", 150)
    shutil.rmtree(tmp_path / "store" / "promotions")
    again = rerun_champion(root, thresholds_uri)
    assert not again.reused
    assert again.details == first.details
    assert aliases() == {CANDIDATE: "2", CHAMPION: "2"}


def test_a_lost_registry_is_filled_again(root, thresholds_uri, tracking_store, tracking_database):
    run(root, thresholds_uri, "one", 140)
    evaluation_uri = ModelRegistry(NAME).find(CHAMPION).tags["shellv.evaluation_uri"]
    shutil.copyfile(tracking_database, tracking_store)
    assert aliases() == {}
    assert not rerun(root, thresholds_uri, _made["one"], evaluation_uri).reused
    assert aliases() == {CANDIDATE: "1", CHAMPION: "1"}


def test_changed_thresholds_are_applied(root, thresholds_uri, tmp_path):
    run(root, thresholds_uri, "one", 140)
    (tmp_path / "gate.yaml").write_text("minimum: {pope_random_accuracy: 0.9}")
    again = rerun_champion(root, thresholds_uri)
    assert again.details["decision"] == "rejected"
    assert aliases() == {CANDIDATE: "1", CHAMPION: "1"}, "a champion stays until another takes over"


def test_blind_model_is_rejected_and_nobody_is_champion(root, thresholds_uri):
    result = run(root, thresholds_uri, "blind", 101)
    assert (result.metrics["promoted"], result.details["decision"]) == (0, "rejected")
    assert "pope_random_accuracy is 0.5050, 0.5000 with shuffled pictures" in result.details["reasons"][0]
    assert result.details["champion_version"] is None
    assert aliases() == {CANDIDATE: "1"}


def test_worse_model_leaves_the_champion(root, thresholds_uri):
    run(root, thresholds_uri, "one", 160)
    result = run(root, thresholds_uri, "worse", 140)
    assert result.details["decision"] == "rejected"
    assert "on the same questions" in result.details["reasons"][0]
    assert (result.details["version"], result.details["champion_version"]) == ("2", "1")
    assert aliases() == {CANDIDATE: "2", CHAMPION: "1"}


def test_better_model_takes_over(root, thresholds_uri):
    run(root, thresholds_uri, "one", 140)
    result = run(root, thresholds_uri, "better", 150)
    assert (result.details["champion_version"], result.details["compared_with_version"]) == ("2", "1")
    assert aliases() == {CANDIDATE: "2", CHAMPION: "2"}


def test_other_questions_are_compared_by_value(root, thresholds_uri):
    run(root, thresholds_uri, "one", 140)
    result = run(root, thresholds_uri, "two", 135, data="other data")
    assert result.details["decision"] == "promoted"
    assert any("on other questions" in reason for reason in result.details["reasons"])


def test_evaluation_of_another_model_is_refused(root, thresholds_uri):
    evaluation_uri = make_evaluation(root, make_model(root, "one"), 140)
    with pytest.raises(PromotionError, match="is not an evaluation of the model at"):
        rerun(root, thresholds_uri, make_model(root, "two"), evaluation_uri)
    assert aliases() == {}


def test_unknown_metric_leaves_the_registry_as_it_was(root, tmp_path):
    (tmp_path / "bad.yaml").write_text("minimum: {pope_random_acuracy: 0.5}")
    with pytest.raises(PromotionError, match="did you mean 'pope_random_accuracy'"):
        run(root, (tmp_path / "bad.yaml").as_uri(), "one", 140)
    assert aliases() == {}


def test_champion_whose_evaluation_is_gone(root, thresholds_uri, tmp_path):
    run(root, thresholds_uri, "one", 140)
    shutil.rmtree(tmp_path / "store" / "evaluations")
    with pytest.raises(PromotionError, match=r"version 1 of 'shellv-test'.*no readable evaluation"):
        run(root, thresholds_uri, "two", 150)


def test_shipped_thresholds():
    assert "pope_random_accuracy" in promote._read_thresholds("default").gain_over_blind
    assert promote._read_thresholds("smoke").maximum == {"pope_random_unparsed_share": 1.0}
    with pytest.raises(PromotionError, match=r"thresholds_uri='smok' is neither.*did you mean 'smoke'"):
        promote._read_thresholds("smok")


@pytest.mark.parametrize(("num_right", "promoted"), [(150, 0), (165, 1), (120, 0)])
def test_a_significant_gain_on_the_same_questions_is_needed(root, tmp_path, num_right, promoted):
    path = tmp_path / "significant.yaml"
    path.write_text("require_gain: [pope_random_accuracy]\nno_loss: all\nalpha: 0.001\n")
    run(root, path.as_uri(), "one", 150)
    result = run(root, path.as_uri(), "two", num_right)
    assert result.metrics["promoted"] == promoted
    # 150 right to 165: 15 images more, none less, p = 2 / 2**15.
    assert any("by Holm's method" in reason for reason in result.details["reasons"])


def test_without_the_same_questions_no_gain_is_shown(root, tmp_path):
    path = tmp_path / "significant.yaml"
    path.write_text("require_gain: [pope_random_accuracy]\n")
    run(root, path.as_uri(), "one", 100)
    result = run(root, path.as_uri(), "two", 190, data="other data")
    assert result.details["decision"] == "rejected"
    assert "was not asked the same questions" in result.details["reasons"][0]
