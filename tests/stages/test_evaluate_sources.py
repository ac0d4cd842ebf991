"""What can be evaluated beside a stage's output, on what, and by how many processes."""

import json
import random
import time

import pytest
import torch

from shellv_core.endpoint.config import EndpointAccess
from shellv_core.errors import ConfigError, EvaluationError
from shellv_core.evaluation.selection import BenchmarkFiles
from shellv_core.stages import evaluate
from shellv_core.stages.evaluate import EvaluateConfig
from shellv_core.storage import InputDirectory
from tests.endpoint.chat_server import UNREADABLE, chat_server
from tests.evaluation.tiny_llava import picture, save_tiny_llava
from tests.stages.evaluation_data import json_lines, make_data, make_model

pytestmark = pytest.mark.usefixtures("tracking_store")
NUM_IMAGES = 6
SMALL = {"max_caption_tokens": 6, "images_per_block": 2, "batch_size": 3, "num_sample_pictures": 1}
FAST = EndpointAccess(model="m", requests_per_minute=1e6, retry_seconds=0.01)


@pytest.fixture(scope="module")
def data_uri(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("data")
    return make_data(root.as_uri(), root)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    with chat_server() as running:
        running.answer = lambda prompt, body: "Yes, there is." if len(prompt) % 2 else "No."
        yield running


def own_pope(folder, name="pope.json"):
    folder.mkdir()
    for index in range(NUM_IMAGES):
        (folder / f"own-{index}.png").write_bytes(picture(index))
    rows = [
        {
            "question_id": index,
            "image": f"own-{index}.png",
            "text": "is there a dog ?",
            "label": ("yes", "no")[index % 2],
        }
        for index in range(NUM_IMAGES)
    ]
    (folder / name).write_bytes(json_lines(rows))
    return BenchmarkFiles(name="pope", questions=str(folder / name), images=str(folder), options={"split": "popular"})


def files_at(uri):
    output = InputDirectory(uri)
    return {entry.name: output.fetch(entry.name).read_bytes() for entry in output.files()}


def test_a_bad_endpoint_ends_within_its_bound_with_exact_counts(server, data_uri, tmp_path, monkeypatch):
    """20 % of calls fail, some questions always stall or are answered with what is no answer."""
    chance = random.Random(0)
    bad = {"is there a car ?": "stall", "is there a cat ?": "torn", "is there a bus ?": 500}

    def plan(prompt, attempt):
        if prompt in bad:
            return bad[prompt]
        fails = chance.random() < 0.2 and attempt < 2
        return chance.choice([500, 503, 429, "hang up", *UNREADABLE]) if fails else None

    server.plan = plan
    access = FAST.model_copy(update={"timeout_seconds": 1.5, "max_retries": 2, "total_seconds": 60.0})
    config = EvaluateConfig(
        data_uri=data_uri, model_uri=server.url, endpoint=access, output_uri=(tmp_path / "out").as_uri(), **SMALL
    )
    start = time.monotonic()
    # The first object of two pictures is a car, of two a cat, of one a bus: three splits, sighted and blind.
    with pytest.raises(EvaluationError, match="30 of 120 answers are missing") as fault:
        evaluate.run(config)
    assert time.monotonic() - start < 90
    for reason in ("candidate, timeout: 12", "candidate, unreadable answer: 12", "candidate, HTTP 500: 6"):
        assert reason in str(fault.value)
    output = InputDirectory((tmp_path / "out").as_uri())
    details = output.manifest.details
    assert (details["num_missing"], details["num_asked"]) == (30, 120)
    assert details["usage"]["model"]["requests"]["sent"] == sum(server.requests.values())
    results = json.loads(output.fetch("results.json").read_bytes())
    assert results["models"]["candidate"]["pope"]["random"]["num_missing"] == 5
    named = json.loads(output.fetch("missing.json").read_bytes())["candidate"]
    assert sorted(named["pope_random"].values()) == ["HTTP 500", *["timeout"] * 2, *["unreadable answer"] * 2]
    rows = output.fetch("answers/candidate-pope_random.jsonl").read_text().splitlines()
    assert len(rows) == 12 - 5
    assert "30 answers of candidate are missing, and they count as wrong" in output.fetch("report.html").read_text()
    content = b"".join(files_at(output.uri).values()) + output.manifest.model_dump_json().encode()
    assert b"secret-key" not in content

    server.plan = lambda prompt, attempt: None
    server.requests.clear()
    result = evaluate.run(config)
    assert set(server.requests) == set(bad), "what was answered comes from the cache"
    assert result.details["num_missing"] == 0
    assert "missing.json" not in files_at(result.output_uri)
    monkeypatch.delenv("OPENAI_API_KEY")
    assert evaluate.run(config).reused, "what is done needs no endpoint"


def test_a_share_of_missing_answers_can_be_allowed(server, data_uri, tmp_path):
    server.plan = lambda prompt, attempt: 404 if "cat ?" in prompt else None
    config = EvaluateConfig(
        data_uri=data_uri, model_uri=server.url, endpoint=FAST, output_uri=(tmp_path / "out").as_uri(), **SMALL
    )
    result = evaluate.run(config.model_copy(update={"max_missing_share": 0.1}))
    assert result.details["missing"]["candidate"] == {
        "count": 12, "by_reason": {"HTTP 404": 12},
        "benchmarks": {
            f"pope_{split}{side}": 2 for split in ("random", "popular", "adversarial") for side in ("", "_blind")
        },
    }  # fmt: skip


def test_a_model_directory_is_asked_the_users_own_benchmark(tmp_path):
    save_tiny_llava(tmp_path / "tiny")
    config = EvaluateConfig(
        model_uri=str(tmp_path / "tiny"),
        benchmarks=(own_pope(tmp_path / "own"),),
        output_uri=(tmp_path / "out").as_uri(),
    )
    result = evaluate.run(config)
    assert result.metrics["pope_popular_num_questions"] == NUM_IMAGES
    assert set(result.details["questions"]) == {"pope_popular"}
    inputs = InputDirectory(result.output_uri).manifest.inputs
    assert set(inputs) == {"model", "benchmarks"}
    assert evaluate.run(config).reused
    with (tmp_path / "own" / "pope.json").open("a") as file:
        file.write("\n")
    with pytest.raises(Exception, match="other settings or inputs"):
        evaluate.run(config)


def test_a_judge_reads_answers_and_its_failures_stay_unjudged(server, tmp_path):
    save_tiny_llava(tmp_path / "tiny")
    rows = [
        {
            "question": f"is there a dog ? {index}",
            "gt_answer": "yes",
            "image_content": ["dog"],
            "image_src": f"{index}.png",
        }
        for index in range(4)
    ]
    (tmp_path / "mmhal.json").write_text(json.dumps(rows))
    for index in range(4):
        (tmp_path / f"{index}.png").write_bytes(picture(index))
    server.answer = lambda prompt, body: "It is fine. Rating: 4"
    server.plan = lambda prompt, attempt: 400 if "dog ? 2" in prompt else None
    files = BenchmarkFiles(name="mmhal", questions=str(tmp_path / "mmhal.json"), images=str(tmp_path))
    config = EvaluateConfig(
        model_uri=str(tmp_path / "tiny"), benchmarks=(files,), output_uri=(tmp_path / "out").as_uri(),
        judge_uri=server.url, judge=FAST.model_copy(update={"input_price": 1.0}),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="mmhal needs a judge"):
        evaluate.run(config.model_copy(update={"judge_uri": None}))
    with pytest.raises(EvaluationError, match=r"2 of 16 answers are missing \(judge, HTTP 400: 2\)"):
        evaluate.run(config)
    result = evaluate.run(config.model_copy(update={"max_missing_share": 0.2}))
    assert result.reused
    assert result.details["missing"]["judge"]["benchmarks"] == {"candidate-mmhal": 1, "candidate-mmhal-blind": 1}
    assert result.metrics["mmhal_num_judged"] == 3
    assert result.metrics["mmhal_num_unjudged"] == 1
    assert result.metrics["mmhal_mean_score"] == 4.0
    judgments = [
        json.loads(line) for line in files_at(result.output_uri)["judgments/candidate-mmhal.jsonl"].splitlines()
    ]
    assert [row.get("text", row.get("fault")) for row in judgments] == [
        "It is fine. Rating: 4", "It is fine. Rating: 4", "HTTP 400", "It is fine. Rating: 4",
    ]  # fmt: skip
    assert result.details["usage"]["judge"]["cost"] > 0


def test_shards_give_the_bytes_of_one_run(data_uri, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    model_uri = make_model(tmp_path.as_uri(), tmp_path / "work", 0)
    config = EvaluateConfig(data_uri=data_uri, model_uri=model_uri, output_uri=(tmp_path / "one").as_uri(), **SMALL)
    whole = files_at(evaluate.run(config).output_uri)
    config = config.model_copy(update={"output_uri": (tmp_path / "many").as_uri()})
    for index in (2, 0):
        part = evaluate.run(config.model_copy(update={"shard": f"{index}/3"}))
        assert part.details["shard"] == f"{index}/3"
        assert not (tmp_path / "many" / "manifest.json").exists()
    asked = []
    from shellv_core.evaluation.generator import LlavaGenerator

    answer_batch = LlavaGenerator._continue

    def counted(self, states, rows, prompts):
        asked.extend(prompts)
        return answer_batch(self, states, rows, prompts)

    monkeypatch.setattr(LlavaGenerator, "_continue", counted)
    joined = files_at(evaluate.run(config).output_uri)
    assert joined == whole
    assert len({prompt.image for prompt in asked}) == 2, "only the block of the part that never came"
    assert not list((tmp_path / "many").rglob("*of3*"))
    with pytest.raises(ConfigError, match="INDEX/COUNT"):
        evaluate.run(config.model_copy(update={"shard": "3/3"}))


def test_the_first_rank_waits_for_the_others_and_ends_the_run(server, data_uri, tmp_path, monkeypatch):
    config = EvaluateConfig(
        data_uri=data_uri, model_uri=server.url, endpoint=FAST, output_uri=(tmp_path / "out").as_uri(), **SMALL
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "1")
    assert evaluate.run(config).details == {"shard": "1/2"}
    first = sum(server.requests.values())
    monkeypatch.setenv("RANK", "0")
    assert evaluate.run(config).details["num_missing"] == 0
    assert 0 < first < sum(server.requests.values()) == 42, "no prompt is asked twice"


def test_addresses_that_cannot_be_asked(data_uri, tmp_path, server):
    values = {"data_uri": data_uri, "output_uri": (tmp_path / "out").as_uri()}
    with pytest.raises(ConfigError, match="no model is named"):
        evaluate.run(EvaluateConfig(**values, model_uri=server.url))
    with pytest.raises(ConfigError, match="only the candidate and the judge"):
        evaluate.run(EvaluateConfig(**values, model_uri=server.url, endpoint=FAST, baseline_uri=server.url))
    missing = BenchmarkFiles(name="pope", questions=str(tmp_path / "none.json"))
    with pytest.raises(EvaluationError, match="published at"):
        evaluate.run(EvaluateConfig(**values, model_uri=server.url, endpoint=FAST, benchmarks=(missing,)))
    pope = own_pope(tmp_path / "own")
    (tmp_path / "own" / "own-3.png").unlink()
    with pytest.raises(EvaluationError, match=r"1 of 6 images of pope_popular are not there.*own-3\.png"):
        evaluate.run(EvaluateConfig(**values, model_uri=server.url, endpoint=FAST, benchmarks=(pope,)))
    unknown = pope.model_copy(update={"options": {"splitt": "x"}})
    with pytest.raises(ConfigError, match="did you mean 'split'"):
        evaluate.run(EvaluateConfig(**values, model_uri=server.url, endpoint=FAST, benchmarks=(unknown,)))
