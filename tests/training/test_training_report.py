"""The history of a run and the report made of it."""

import re

from shellv_core.training.history import History, read_history
from shellv_core.training.report import render_training_report


def test_a_history_forgets_what_is_done_again_and_survives_a_cut_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    history = History(path)
    for step in (2, 4, 6):
        history.add(step, {"loss": 1 / step})
    with path.open("a") as file:
        file.write('{"step": 8, "lo')
    assert [step for step, _ in read_history(path)] == [2, 4, 6]
    resumed = History(path, first=4)
    resumed.add(6, {"loss": 0.5})
    assert read_history(path) == [(2, {"loss": 0.5}), (4, {"loss": 0.25}), (6, {"loss": 0.5})]
    History(path)
    assert read_history(path) == []


def test_a_report_shows_what_was_logged_and_needs_nothing_else():
    history = [
        (step, {"loss": 3.0 / step, "learning_rate": 1e-3, "mfu": 0.3, "hallucination_margin_object": float(step)})
        for step in (10, 20, 30)
    ]
    history[1][1]["loss"] = float("nan")
    page = render_training_report("finetune", history, "part  <b>", {"Settings": {"training.x": "<i>"}})
    assert re.findall(r"<figcaption>(.*?)</figcaption>", page) == [
        "Loss", "Hallucination margin by type", "Learning rate", "Shares",
    ]  # fmt: skip
    assert "30 optimizer steps" in page
    assert "&lt;b&gt;" in page
    assert "&lt;i&gt;" in page
    assert not re.search(r'(src|href)="|url\(|@import|nan', page)
    points = re.search(r'aria-label="Loss".*?<path d="M([^"]*)"', page).group(1).split("L")
    assert len(points) == 2
    assert float(points[0].split()[1]) < float(points[1].split()[1])
    assert render_training_report("finetune", history, "part  <b>", {"Settings": {"training.x": "<i>"}}) == page
    assert "Nothing was logged" in render_training_report("finetune", [], "", {})
