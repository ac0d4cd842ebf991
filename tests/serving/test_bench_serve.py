import asyncio
import json
import math

import pytest

from shellv_core.cli import main
from shellv_core.config import build_config
from shellv_core.errors import ConfigError
from shellv_core.serving.bench.client import Answer, Load, LoadClient, arrivals, closed_loop, open_loop
from shellv_core.serving.bench.figures import compare, figures_of, table
from shellv_core.serving.bench.workload import Workload, make_requests
from shellv_core.serving.transformers_engine import EngineConfig


@pytest.fixture(scope="module")
def server(start_endpoint):
    """Room for two, so that a third is told to come back."""
    with start_endpoint(engine_config=EngineConfig(slots=2, max_waiting=0)) as endpoint:
        yield endpoint.url


def test_requests_are_seeded_and_each_round_has_its_own():
    workload = Workload(requests=8, lengths="8-40", image_share=0.5, image_size=32, seed=3)
    first, again, other = (make_requests(workload, number, "tiny") for number in (0, 0, 1))
    assert first == again
    assert first != other
    assert sum(isinstance(each.body["messages"][0]["content"], list) for each in first) == 4
    urls = [
        each.body["messages"][0]["content"][0]["image_url"]["url"]
        for each in first
        if isinstance(each.body["messages"][0]["content"], list)
    ]
    assert len(set(urls)) == 4
    assert all(8 <= each.tokens <= 40 for each in first)
    assert len({each.tokens for each in first}) > 1


@pytest.mark.parametrize("lengths", ["", "0", "9-8", "4-", "many"])
def test_lengths_that_are_none(lengths):
    with pytest.raises(ValueError, match="number of tokens"):
        Workload(lengths=lengths)


def test_arrivals_are_poisson():
    moments = arrivals(rate=5, seed=0)
    times = [next(moments) for _ in range(4000)]
    gaps = [after - before for before, after in zip([0, *times], times, strict=False)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.2, rel=0.05)
    # As wide as they are long: what a metronome is not.
    assert math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) == pytest.approx(mean, rel=0.1)


async def load_of(url, workload, loop):
    async with LoadClient(url, "", 60) as client:
        return await loop(client, make_requests(workload, 0, "tiny"), lambda: None)


def test_a_closed_loop_gets_answers_of_exact_lengths(server):
    workload = Workload(requests=6, lengths="3-9", prompt_words=4, image_share=0.5, image_size=32)
    load = asyncio.run(load_of(server, workload, lambda client, wanted, done: closed_loop(client, wanted, 2, done)))
    assert [each.status for each in load.answers] == ["200"] * 6
    assert sorted(each.tokens for each in load.answers) == sorted(
        each.tokens for each in make_requests(workload, 0, "tiny")
    )
    for each in load.answers:
        assert each.due <= each.sent <= each.pieces[0] <= each.pieces[-1] <= each.ended
    assert load.cpu_seconds > 0


def test_an_open_loop_counts_those_that_were_refused(server):
    workload = Workload(requests=16, lengths="40", prompt_words=4)
    load = asyncio.run(load_of(server, workload, lambda client, wanted, done: open_loop(client, wanted, 500, 0, done)))
    found = figures_of([load])
    assert set(found["by_status"]) == {"200", "429"}
    assert found["by_status"]["429"] >= 1
    assert "queue_full" in found["errors"]["429"]
    assert found["tokens"] == 40 * found["by_status"]["200"]
    assert found["first_token"]["p50"] <= found["whole"]["p50"]


def test_what_is_no_server_is_counted():
    async def ask():
        async with LoadClient("http://127.0.0.1:9", "", 5) as client:
            return await client.ask(make_requests(Workload(requests=1), 0, "tiny")[0])

    answer = asyncio.run(ask())
    assert answer.status == "no connection"
    found = figures_of([Load([answer], 1.0, 0.0, [])])
    assert found["tokens"] == 0
    assert found["first_token"] == {}


def made_load(speed, count=40):
    answers = [
        Answer(
            0.0, 0.0, [index / speed + 0.1 / speed, index / speed + 0.2 / speed], index / speed + 0.3 / speed, 2, "200"
        )
        for index in range(1, count)
    ]
    return Load(answers, count / speed, 0.5, [0.001])


def test_ratios_and_their_intervals():
    ratios = compare([made_load(4), made_load(4)], [made_load(1), made_load(1)])
    assert ratios["tokens_per_second"] == pytest.approx({"ratio": 4, "low": 4, "high": 4})
    assert ratios["first_token_p50"]["low"] < 0.25 < ratios["first_token_p50"]["high"]
    even = compare([made_load(1)], [made_load(1)])["whole_p50"]
    assert even["ratio"] == pytest.approx(1)
    assert even["low"] < 1 < even["high"]


def test_figures_of_known_answers():
    found = figures_of([made_load(1, 100)])
    assert found["tokens_per_second"] == pytest.approx(2 * 99 / 100)
    assert found["between_pieces"]["p50"] == pytest.approx(0.1)
    assert found["per_token"]["p99"] == pytest.approx(0.1)
    assert found["first_token"]["p50"] == pytest.approx(50.1)
    assert found["client"]["cpu_share"] == pytest.approx(0.005)
    assert any(line.startswith("tokens/s") for line in table({"a": found}))


def test_the_command_compares_two(server, tmp_path, capsys):
    path = tmp_path / "figures.json"
    arguments = ["--requests", "3", "--rounds", "2", "--lengths", "4", "--clients", "2", "--prompt-words", "4"]
    assert main(["bench", "serve", server, "--compare", f"{server}/v1", *arguments, "--json", str(path)]) == 0
    told = capsys.readouterr().out
    assert "first token p99" in told
    assert "loop lag" in told
    record = json.loads(path.read_text())
    assert [each["tokens"] for each in record["servers"].values()] == [24, 24]
    assert record["ratios"]["tokens_per_second"]["low"] > 0
    assert main(["bench", "serve", server, "--rate", "-1"]) == 2
    assert main(["bench", "serve", "http://127.0.0.1:9"]) == 1
    with pytest.raises(ConfigError, match="lengths"):
        build_config(Workload, {"lengths": "x"})
