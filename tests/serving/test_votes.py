"""Votes, what ratings are made of them, and that training reads them."""

from __future__ import annotations

import json
import multiprocessing
import re
import shlex
import stat
from pathlib import Path

import pytest

from shellv_core.cli import main
from shellv_core.errors import ServingError
from shellv_core.serving.page.preferences import export
from shellv_core.serving.page.ratings import Battle, rate
from shellv_core.serving.page.visitors import Visitors
from shellv_core.serving.page.votes import Side, Vote, VoteLog, image_name, now, votes_folder
from tests.serving.tiny_model import picture

DOCUMENT = Path(__file__).parents[2] / "docs" / "chat.md"


def vote(verdict="left", image=None, left=("a cat",), right=("a dog",), questions=("what is it ?",)):
    return Vote(
        time=now(),
        voter="0" * 16,
        verdict=verdict,
        image=image and image_name(image),
        questions=questions,
        left=Side(model="one", answers=left),
        right=Side(model="two", answers=right),
    )


def test_ratings_find_the_order_and_its_distances():
    # Out of 400 votes between neighbours the better one gets 300: odds of 3, 191 points.
    battles = []
    for better, worse in (("a", "b"), ("b", "c")):
        battles += [Battle(better, worse, "left")] * 150 + [Battle(worse, better, "right")] * 150
        battles += [Battle(better, worse, "right")] * 60 + [Battle(worse, better, "tie")] * 80
    ratings = rate(battles)
    assert [each.model for each in ratings] == ["a", "b", "c"]
    first, second, third = (each.points for each in ratings)
    # 300 wins and 80 ties out of 440 are 340 : 100.
    assert first - second == pytest.approx(400 * 0.5315, abs=8)
    assert second - third == pytest.approx(first - second, abs=4)
    assert all(each.low < each.points < each.high for each in ratings)
    assert ratings[0].low > ratings[1].high
    assert ratings[0].votes == 440
    assert ratings[0].win_share == pytest.approx(340 / 440)


def test_few_votes_are_uncertain_and_none_say_nothing():
    assert rate([]) == rate([Battle("a", "a", "left")]) == []
    one = rate([Battle("a", "b", "left")])
    assert one[0].model == "a"
    assert one[0].high - one[0].low > 300
    many = rate([Battle("a", "b", "left")] * 50)
    assert many[0].points > one[0].points
    both = rate([Battle("a", "b", "both_bad"), Battle("b", "a", "tie")])
    assert both[0].points == pytest.approx(both[1].points)


def test_votes_are_kept_rotated_and_read_again(tmp_path):
    log = VoteLog(tmp_path / "votes", max_bytes=700)
    red = picture("red")
    for number in range(9):
        log.add(vote(questions=(f"question {number} ?",), image=red), red)
    assert len(log.files()) > 2
    assert [each.questions for each in log.read()] == [(f"question {number} ?",) for number in range(9)]
    assert log.image(image_name(red)).read_bytes() == red
    assert stat.S_IMODE(log.files()[-1].stat().st_mode) == 0o600
    with log.files()[-1].open("a") as file:
        file.write('{"version": 1, "ti')  # a crash
    assert len(list(log.read())) == 9
    with log.files()[-1].open("a") as file:
        file.write("\n")
    with pytest.raises(ServingError, match=r"votes.jsonl:\d+ is no vote"):
        list(log.read())


def _add_many(folder):
    log = VoteLog(folder, max_bytes=4000)
    for _ in range(50):
        log.add(vote(left=("x" * 500,)))


def test_processes_share_a_log(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_add_many, args=[tmp_path]) for _ in range(3)]
    for each in writers:
        each.start()
    for each in writers:
        each.join(60)
    assert len(list(VoteLog(tmp_path).read())) == 150


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ServingError, match="cannot be stored"):
        VoteLog(tmp_path / "file").add(vote())


def test_visitors_are_one_within_a_day_and_nobody_after():
    days = ["2026-01-01"]
    visitors = Visitors(lambda: days[-1])
    first = visitors.name("203.0.113.7")
    assert first == visitors.name("203.0.113.7") != visitors.name("203.0.113.8")
    assert "203" not in first
    days.append("2026-01-02")
    assert visitors.name("203.0.113.7") != first
    assert Visitors(lambda: "2026-01-01").name("203.0.113.7") != first


def test_training_reads_the_exported_votes(tmp_path, monkeypatch, capsys, tracking_store):
    log = VoteLog(votes_folder())
    red, blue, gif = picture("red"), picture("blue", format="JPEG"), picture("red", format="GIF")
    log.add(vote("left", red, ("a red wall <image>",), ("a dog",), ("what is <image> it ?",)), red)
    log.add(vote("right", blue, ("no", "two cats"), ("yes", "a blue wall"), ("and ?", "so ?")), blue)
    for verdict in ("tie", "both_bad"):
        log.add(vote(verdict, red), red)
    log.add(vote("left"))
    log.add(vote("left", red, ("same",), ("same ",)), red)
    log.add(vote("left", gif), gif)
    monkeypatch.chdir(tmp_path)
    text = DOCUMENT.read_text(encoding="utf-8").replace("file:///tmp/shellv-demo", f"file://{tmp_path}/demo")
    show, write, prepare = re.findall(r"^shellv ((?:votes|prepare_data) .*)$", text, re.MULTILINE)
    assert main(shlex.split(write)) == 0
    said = capsys.readouterr().out
    assert "2  written" in said
    assert "2  no preference" in said
    assert "1  no picture" in said
    assert "1  equal or empty answers" in said
    assert "1  picture neither png nor jpeg" in said

    data = tmp_path / "demo" / "preferences"
    assert main(shlex.split(prepare)) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["metrics"]["num_train_samples"] == 2
    assert main(["data", "show", f"file://{data}", "--count", "2"]) == 0
    shown = capsys.readouterr().out
    for text in ("a red wall", "a dog", "a blue wall", "two cats"):
        assert text in shown
    with pytest.raises(ServingError, match="not empty"):
        export(log, tmp_path / "preferences")
    assert main(shlex.split(show)) == 0
    assert "two" in capsys.readouterr().out


def test_no_votes(tmp_path, capsys):
    assert main(["votes", "show", "--votes", str(tmp_path)]) == 1
    assert "there are no votes" in capsys.readouterr().err
