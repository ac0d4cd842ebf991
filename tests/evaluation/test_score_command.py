import json
import subprocess
import sys
import time

import pytest

from shellv_core.cli import main
from tests.evaluation.benchmarks.test_hal_eval import item


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def pope_files(tmp_path):
    questions = [
        {"question_id": number, "image": "a.jpg", "text": "?", "label": "yes" if number % 2 else "no"}
        for number in range(10)
    ]
    answers = [{"question_id": row["question_id"], "text": row["label"].title() + "."} for row in questions]
    answers[1]["text"] = "I cannot tell"
    return write_rows(tmp_path / "q.jsonl", questions), write_rows(tmp_path / "a.jsonl", reversed(answers[:9]))


def test_pope(pope_files, capsys):
    questions, answers = pope_files
    assert main(["score", "pope", "--questions", questions, "--answers", answers]) == 0
    scores = json.loads(capsys.readouterr().out)
    wanted = ("accuracy", "precision", "recall", "f1", "yes_ratio", "num_unparsed", "num_missing")
    assert {key: scores[key] for key in wanted} == {
        "accuracy": 0.8,
        "precision": 1.0,
        "recall": 0.6,
        "f1": pytest.approx(0.75),
        "yes_ratio": 0.3,
        "num_unparsed": 1,
        "num_missing": 1,
    }


def test_hal_eval(tmp_path, capsys):
    questions = tmp_path / "q.json"
    questions.write_text(json.dumps([item()]))
    answers = [{"question_id": "a.jpg/gt", "text": "yes"}, {"question_id": "a.jpg/object", "text": "no"}]
    path = write_rows(tmp_path / "a.jsonl", answers)
    assert main(["score", "hal-eval", "--questions", str(questions), "--answers", path]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["object"]["accuracy"] == 1
    assert (scores["event"]["accuracy"], scores["event"]["num_missing"]) == (0.5, 1)


def test_faults_are_one_paragraph(pope_files, tmp_path, capsys):
    questions, _ = pope_files
    answers = write_rows(tmp_path / "b.jsonl", [{"image": "a.jpg", "answer": "yes"}])
    assert main(["score", "pope", "--questions", questions, "--answers", answers]) == 1
    assert "no 'question_id'" in capsys.readouterr().err


def test_help_is_quick_and_scoring_needs_no_torch(pope_files):
    questions, answers = pope_files
    start = time.monotonic()
    command = [sys.executable, "-m", "shellv_core.cli", "score", "hal-eval", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "ITEM/KIND" in shown.stdout
    assert time.monotonic() - start < 5
    code = (
        "import sys; from shellv_core.cli import main;"
        f"main(['score', 'pope', '--questions', {questions!r}, '--answers', {answers!r}]);"
        "sys.exit(','.join({'torch', 'numpy', 'scipy', 'transformers', 'mlflow'} & set(sys.modules)) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
