from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from shellv_core.errors import ConfigError
from shellv_core.stages.presets import stage_config
from tests.bench import efficacy, efficacy_reasons
from tests.bench.efficacy import ALL, FIGURES, PLAIN, TRAINING_STAGES

HACL = "HACL in stage 2"
LONG = "plain, as long as HACL in stage 2"


def record(chair: float, recall: float, seconds: float = 10.0, steps: int = 100) -> dict:
    figures = {prefix + figure.metric: 0.5 for figure in FIGURES for prefix in ("", "blind_")}
    figures |= {"chair_instance_rate": chair, "chair_recall": recall}
    stages = {
        name: {"fingerprint": name, "steps": steps, "seconds": took, "metrics": {"generation_loss": took}}
        for name, took in zip(TRAINING_STAGES, (40.0, seconds), strict=True)
    }
    return {"overrides": ["a.b=1"], "stages": stages, "figures": figures}


def study() -> efficacy.Study:
    return {
        PLAIN: {"0": record(0.20, 0.40), "1": record(0.22, 0.40), "2": record(0.30, 0.41)},
        HACL: {"0": record(0.17, 0.43, 15.0), "1": record(0.19, 0.40, 15.0), "2": record(0.26, 0.39, 15.0)},
    }


def test_the_interval_is_students() -> None:
    mean, half = efficacy.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.3027 / math.sqrt(3), abs=1e-3)
    assert math.isnan(efficacy.interval([1.0])[1])


def test_differences_are_paired_by_seed_and_a_verdict_needs_an_interval_without_zero() -> None:
    runs = study()
    del runs[HACL]["1"]
    assert efficacy.differences(runs, HACL, PLAIN, "chair_instance_rate") == pytest.approx({"0": -3.0, "2": -4.0})
    # -3, -3, -4: the pairs differ less than the seeds do. Recall moves both ways.
    assert efficacy.verdict(study(), HACL, PLAIN) == "better: CHAIR i"
    assert efficacy.verdict(study(), PLAIN, HACL) == "worse: CHAIR i"
    assert efficacy.verdict(study(), PLAIN, PLAIN) == "no difference shown"


def test_two_seeds_that_agree_show_nothing() -> None:
    assert efficacy.shown([-0.2, -0.2, -0.2])
    assert not efficacy.shown([-0.2, -0.2])
    assert not efficacy.shown([-3.0])
    assert not efficacy.shown([-0.2, -0.1, 0.2])


def test_a_plain_run_as_long_gets_the_steps_of_the_slower_stage_alone() -> None:
    runs = study()
    overrides = efficacy.overrides_as_long(runs[PLAIN]["0"], runs[HACL]["0"])
    assert overrides == ("a.b=1", "finetune.training.max_steps=150")


def test_recipes_bring_along_what_they_are_compared_with() -> None:
    assert efficacy.chosen_recipes([LONG]) == [PLAIN, HACL, LONG]
    with pytest.raises(ConfigError, match="did you mean 'HACL in stage 2'"):
        efficacy.chosen_recipes(["HACL in stage2"])


@pytest.mark.parametrize("name", ALL)
def test_recipes_say_all_that_they_do_whatever_the_preset(name: str) -> None:
    overrides = ALL[name].overrides
    configs = {stage: stage_config("nano", stage, overrides) for stage in TRAINING_STAGES}
    switched = [configs["pretrain_projector"].hacl.weight, configs["finetune"].hacl.weight]
    assert [weight > 0 for weight in switched] == [
        ("HACL in stage 1" in name or "both" in name) and not name.startswith(PLAIN),
        ("HACL in stage 2" in name or "both" in name) and not name.startswith(PLAIN),
    ]
    assert (configs["finetune"].preference.weight > 0) == ("preference" in name)


def test_tables_name_every_recipe_and_mark_what_is_shown(tmp_path: Path) -> None:
    efficacy.write(tmp_path / "study", "nano", study())
    text = (tmp_path / "study.md").read_text()
    assert "| HACL in stage 2 - plain | +0.0 ± 0.0 |" in text
    assert "| **-3.3 ± 1.4** |" in text
    assert "| -3.0 -3.0 -4.0 |" in text
    assert json.loads((tmp_path / "study.json").read_text())["study"][HACL]["2"]["figures"]["chair_recall"] == 0.39


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_a_study_reuses_what_is_there_and_its_reasons_are_measured(
    tmp_path: Path, tracking_store: Path, capsys
) -> None:
    arguments = ["--preset", "smoke", "--seeds", "0", "--output", str(tmp_path / "study")]
    assert efficacy.main([*arguments, "--recipes", PLAIN]) == 0
    first = json.loads((tmp_path / "study.json").read_text())["study"]
    assert efficacy.main([*arguments, "--recipes", HACL]) == 0
    study = json.loads((tmp_path / "study.json").read_text())["study"]
    assert study[PLAIN] == first[PLAIN]
    plain, with_hacl = (study[name]["0"]["stages"] for name in (PLAIN, HACL))
    assert plain["pretrain_projector"] == with_hacl["pretrain_projector"]
    assert plain["finetune"]["fingerprint"] != with_hacl["finetune"]["fingerprint"]
    assert 0 <= with_hacl["finetune"]["metrics"]["hallucination_accuracy"] <= 1
    made = {path.parent.name for path in (tmp_path / "project-folder" / "efficacy").glob("*/*")}
    assert made == {"prepare_data", "pretrain_projector", "finetune", "merge_lora", "evaluate"}
    assert len(list((tmp_path / "project-folder" / "efficacy" / "finetune").iterdir())) == 2
    assert "| HACL in stage 2 - plain |" in capsys.readouterr().out
    reasons = ["--preset", "smoke", "--seed", "0", "--batches", "2", "--output", str(tmp_path / "reasons")]
    assert efficacy_reasons.main(reasons) == 0
    assert len(list((tmp_path / "project-folder" / "efficacy" / "finetune").iterdir())) == 2
    found = json.loads((tmp_path / "reasons.json").read_text())
    assert set(found["text_only"]) == {"object", "attribute", "relation", "event"}
    assert len(found["gradients"]) == 4
    for measured in found["gradients"]:
        for part in measured["parts"].values():
            assert part["generation"]["cosine"] == pytest.approx(1, abs=1e-3)
            assert part["contrast"]["norm"] > 0 < part["preference"]["norm"]
