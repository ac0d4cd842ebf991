"""The evaluate stage on a tiny random model: everything but good answers."""

import json

import pytest

from shellv_core.errors import EvaluationError
from shellv_core.evaluation.table import render_table
from shellv_core.stages import evaluate
from shellv_core.stages.evaluate import EvaluateConfig
from shellv_core.storage import InputDirectory
from tests.stages.evaluation_data import make_data, make_model

pytestmark = pytest.mark.usefixtures("tracking_store")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    import torch

    torch.set_num_threads(1)
    root, work = tmp_path_factory.mktemp("inputs"), tmp_path_factory.mktemp("work")
    return {
        "data_uri": make_data(root.as_uri(), work),
        "model_uri": make_model(root.as_uri(), work, 0),
        "baseline_uri": make_model(root.as_uri(), work, 1),
    }


def config_for(tmp_path, inputs, **values):
    output_uri = (tmp_path / "evaluations").as_uri() + "/{fingerprint}"
    return EvaluateConfig(
        output_uri=output_uri, max_caption_tokens=6, images_per_block=2, num_sample_pictures=2, **inputs, **values
    )


def test_results_metrics_answers_and_report(tmp_path, inputs):
    result = evaluate.run(config_for(tmp_path, inputs))
    output = InputDirectory(result.output_uri)
    results = json.loads(output.fetch("results.json").read_bytes())
    assert set(results["models"]) == {"candidate", "without_hacl"}
    for tree in results["models"].values():
        assert set(tree) == {"pope", "pope_blind", "hal_eval", "hal_eval_blind", "chair", "chair_blind"}
        assert set(tree["pope"]) == {"random", "popular", "adversarial"}
        assert tree["pope"]["random"]["num_questions"] == 12
        assert tree["pope"]["random"]["num_missing"] == 0
        assert set(tree["hal_eval"]) == {"object", "event"}
    assert set(results["comparisons"]) == {"candidate_blind", "without_hacl"}
    for prefix in ("", "blind_", "without_hacl_", "without_hacl_blind_"):
        for metric in ("pope_random_accuracy", "hal_eval_object_f1", "chair_instance_rate", "pope_popular_yes_ratio"):
            assert f"{prefix}{metric}" in result.metrics

    rows = [json.loads(line) for line in output.fetch("answers/candidate-pope_random-blind.jsonl").open()]
    assert len(rows) == 12
    assert all(row["shown_image"] != row["image"] for row in rows)
    report = output.fetch("report.html").read_text()
    assert 'src="http' not in report
    assert report.count("data:image/jpeg;base64,") >= 2
    assert "without HACL" in report
    assert output.fetch("summary.md").read_text().endswith(render_table(results))
    questions = [json.loads(line) for line in output.fetch("questions/pope_random.jsonl").open()]
    assert questions[0] == {
        "question_id": "1",
        "image": "v0.png",
        "prompt": "is there a dog ?",
        "expected": "yes",
    }
    table = render_table(results).splitlines()
    assert [name.strip() for name in table[0].split("|")[1:-1]] == [
        "%", "candidate", "blind", "without HACL", "blind"
    ]  # fmt: skip
    assert any(line.startswith("| POPE adversarial") for line in table)
    assert len({len(line) for line in table}) == 1

    again = evaluate.run(config_for(tmp_path, inputs))
    assert again.reused
    assert again.metrics == result.metrics


def test_a_run_that_was_killed_ends_with_the_same_bytes(tmp_path, inputs, monkeypatch):
    from shellv_core.evaluation.generator import LlavaGenerator

    whole = InputDirectory(evaluate.run(config_for(tmp_path / "a", inputs)).output_uri).content_sha256
    calls = []
    answer_batch = LlavaGenerator._continue

    def answer_until_killed(self, states, rows, prompts):
        calls.append(len(prompts))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return answer_batch(self, states, rows, prompts)

    monkeypatch.setattr(LlavaGenerator, "_continue", answer_until_killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(config_for(tmp_path / "b", inputs))
    result = evaluate.run(config_for(tmp_path / "b", inputs))
    assert len(calls) == 12 + 1, "2 batches of each of 3 blocks for each of 2 models, and one that was killed"
    assert InputDirectory(result.output_uri).content_sha256 == whole


def test_without_baseline_and_with_limits(tmp_path, inputs):
    config = config_for(tmp_path, inputs, max_pope_questions=4, max_hal_eval_items=2, max_captions=3)
    result = evaluate.run(config.model_copy(update={"baseline_uri": None}))
    assert result.details["questions"] == {
        "pope_random": 4,
        "pope_popular": 4,
        "pope_adversarial": 4,
        "hal_eval": 6,
        "chair": 3,
    }
    assert not any(name.startswith("without_hacl") for name in result.metrics)


def test_without_blind_run(tmp_path, inputs):
    config = config_for(tmp_path, inputs, blind=False, max_pope_questions=4, max_hal_eval_items=2, max_captions=3)
    result = evaluate.run(config)
    output = InputDirectory(result.output_uri)
    results = json.loads(output.fetch("results.json").read_bytes())
    assert list(results["metrics"]) == ["candidate", "without_hacl"]
    assert list(results["comparisons"]) == ["without_hacl"]
    assert result.details["num_asked"] == 2 * (3 * 4 + 6 + 3)
    assert not any("blind" in name for name in (*result.metrics, *(entry.name for entry in output.files())))
    page = output.fetch("report.html").read_text().partition("<footer>")[0].partition("</style>")[2]
    assert "blind" not in page.lower()


def test_data_without_benchmarks_or_images_are_refused(tmp_path, inputs):
    no_benchmarks = config_for(tmp_path, {**inputs, "data_uri": inputs["model_uri"]})
    with pytest.raises(EvaluationError, match="the data hold no benchmarks"):
        evaluate.run(no_benchmarks)
    lacking = make_data((tmp_path / "lacking").as_uri(), tmp_path / "work", with_images=False)
    with pytest.raises(EvaluationError, match="5 images of the benchmarks are not in the data"):
        evaluate.run(config_for(tmp_path, {**inputs, "data_uri": lacking}))
