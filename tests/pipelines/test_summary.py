from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.local import LocalRun
from pipelines.summary import summary
from shellv_core.storage import Manifest

CURL = "curl -s http://127.0.0.1:8000/v1/chat/completions -d @/home/me/.shellv/deploy/request.json"


def local_run(champion_version: str) -> LocalRun:
    def manifest(stage: str, details: dict[str, Any]) -> Manifest:
        return Manifest(stage=stage, fingerprint="f" * 64, library_version="0", config={}, details=details)

    block = {"accuracy": 0.7, "accuracy_interval": [0.6, 0.8], "yes_ratio": 0.5, "num_questions": 9, "num_unparsed": 0}
    figure = {"value": 0.7, "low": 0.6, "high": 0.8}
    promotion = {
        "registered_model": "shellv-nano",
        "version": "2",
        "model_uri": "s3://shellv/merge_lora/abc",
        "decision": "promoted",
        "champion_version": champion_version,
    }
    deployment = {
        "model": "models:/shellv-nano@champion",
        "version": champion_version,
        "question": "What is in this picture?",
        "answer": "A dog.",
        "serve": "shellv serve --model models:/shellv-nano@champion",
        "curl": CURL,
    }
    return LocalRun(
        outputs={},
        results={
            "models": {"candidate": {"pope": {"random": block}, "pope_blind": {"random": block}}},
            "metrics": {row: {"pope_random_accuracy": figure} for row in ("candidate", "candidate_blind")},
        },
        promotion=manifest("promote", promotion),
        deployment=manifest("deploy", deployment),
        report_path=Path("/home/me/.shellv/report.html"),
        seconds={"prepare data": 10.0, "evaluate": 31.4},
    )


def test_a_newcomer_finds_results_report_model_answer_and_the_next_step() -> None:
    text = summary(local_run("2"))
    assert "POPE random" in text
    assert "/home/me/.shellv/report.html" in text.split()
    assert "shellv-nano version 2 @candidate @champion" in text
    assert "A dog." in text
    assert CURL in text
    assert "41 s: evaluate 31, prepare data 10" in text


@pytest.mark.parametrize("champion", ["1"])
def test_a_candidate_that_is_not_the_champion_is_not_called_so(champion: str) -> None:
    text = summary(local_run(champion))
    assert "shellv-nano version 2 @candidate, s3://" in text
    assert "served     models:/shellv-nano@champion version 1" in text
