import json
import threading
import time
from collections import Counter

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse

from shellv_core.data.hallucination.captions import Caption, RewriteCounts
from shellv_core.data.hallucination.config import HallucinationConfig, TransformersConfig
from shellv_core.data.hallucination.generator import build_generator
from shellv_core.data.hallucination.language_model import parse_answer, prompt_of
from shellv_core.data.samples import SampleObject
from shellv_core.endpoint.config import EndpointConfig
from shellv_core.errors import ConfigError, DataError, ModelError

TYPES = ("object", "attribute", "relation", "event")
CAPTION = Caption("A dog sits on a small red couch. ")
GOOD = {
    "object": {"text": "A cat sits on a small red couch."},
    "attribute": {"text": "A dog sits on a small blue couch."},
    "relation": {"text": "A dog sits under a small red couch."},
    "event": {
        "text": "A dog sits on a small red couch, barking at a mailman.",
        "truth": "A dog sits on a small red couch, resting on a seat.",
    },
}


def test_good_answer_is_read_with_its_changed_words():
    rewrites, faults = parse_answer(f"```json\n{json.dumps(GOOD)}\n```", CAPTION, TYPES)
    assert faults == {}
    assert rewrites["object"].hallucinated.text == "A cat sits on a small red couch. "
    assert (rewrites["object"].hallucinated.original, rewrites["object"].hallucinated.replacement) == ("dog", "cat")
    assert rewrites["object"].truth == CAPTION.text
    assert rewrites["event"].truth.endswith("resting on a seat. ")


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ("Sure! Here it is.", "no JSON"),
        ("[1]", "no JSON"),
        (json.dumps(GOOD)[:-5], "no JSON"),
        ("{}", "no such type"),
        (json.dumps({"object": "A cat."}), "malformed"),
        (json.dumps({"object": {"text": 3}}), "malformed"),
        (json.dumps({"object": {"text": "A cat.", "note": "x"}}), "malformed"),
    ],
)
def test_bad_answers_have_a_reason(answer, fault):
    rewrites, faults = parse_answer(answer, CAPTION, TYPES)
    assert rewrites == {}
    assert faults["object"] == fault


def test_prompt_tells_what_is_known():
    prompt = prompt_of(Caption("A bus.", (SampleObject("car"),), ("A car too.",)), TYPES)
    assert "Caption: A bus." in prompt
    assert "car" in prompt.split("Also in the picture")[1]
    assert "A car too." in prompt


class Server:
    """A chat server that fails as it is told: a list of status codes per caption, then good answers."""

    def __init__(self):
        self.requests = Counter()
        self.plans = {}
        self.answer = json.dumps(GOOD)
        app = FastAPI()

        @app.post("/v1/chat/completions")
        async def complete(request: Request):
            body = await request.json()
            caption = body["messages"][1]["content"].split("\n")[0].removeprefix("Caption: ")
            self.requests[caption] += 1
            plan = self.plans.get(caption, [])
            step = plan.pop(0) if plan else 200
            if step == "garbage":
                return PlainTextResponse("<html>", media_type="application/json")
            if step != 200:
                return JSONResponse({"error": {"message": "no"}}, step, {"retry-after": "0"} if step == 429 else {})
            message = {"role": "assistant", "content": self.answer}
            return {
                "id": "1", "object": "chat.completion", "created": 1, "model": body["model"],
                "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150},
            }  # fmt: skip

        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}/v1"

    def stop(self):
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture
def server():
    running = Server()
    yield running
    running.stop()


@pytest.fixture
def config(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    endpoint = EndpointConfig(
        base_url=server.url, model="m", cache_path=str(tmp_path / "cache"), requests_per_minute=60_000,
        retry_seconds=0.01, max_retries=2, input_price=2.0, output_price=10.0,
    )  # fmt: skip
    return HallucinationConfig(generator="endpoint", endpoint=endpoint)


def test_endpoint_retries_counts_and_caches(server, config):
    captions = [CAPTION, Caption("A dog sits on a couch.")]
    server.plans["A dog sits on a small red couch."] = [429, 500]
    counts = RewriteCounts()
    first = list(build_generator(config).rewrite(captions[:1], b"", counts))
    assert [item.hallucinated.type for item in first[0].rewrites] == list(TYPES)
    assert counts.requests == {"sent": 3, "retried": 2}
    assert (counts.input_tokens, counts.output_tokens) == (100, 50)
    assert counts.cost == pytest.approx((100 * 2 + 50 * 10) / 1e6)

    again = RewriteCounts()
    assert list(build_generator(config).rewrite(captions[:1], b"", again)) == first
    assert again.requests == {"cached": 1}
    assert again.cost == 0
    assert server.requests["A dog sits on a small red couch."] == 3


@pytest.mark.parametrize(
    ("plan", "reason", "sent"),
    [
        ([500] * 9, "HTTP 500", 3),
        ([429] * 9, "HTTP 429", 3),
        ([401], "HTTP 401", 1),
        (["garbage"] * 9, "unreadable answer", None),
    ],
)
def test_faults_leave_the_caption_without_rewrites(server, config, plan, reason, sent):
    server.plans["A dog sits on a small red couch."] = plan
    counts = RewriteCounts()
    (done,) = build_generator(config).rewrite([CAPTION], b"", counts)
    assert done.rewrites == ()
    assert counts.missing == {f"{kind}: {reason}": 1 for kind in TYPES}
    assert counts.requests["failed"] == 1
    assert sent is None or counts.requests["sent"] == sent
    server.plans.clear()
    (done,) = build_generator(config).rewrite([CAPTION], b"", RewriteCounts())
    assert len(done.rewrites) == 4  # a fault is not cached


def test_unparsable_text_is_counted_and_the_order_is_kept(server, config):
    server.answer = "I would rather not."
    counts = RewriteCounts()
    captions = [Caption(f"A dog and {index} cats.") for index in range(20)]
    done = list(build_generator(config).rewrite(captions, b"", counts))
    assert [item.caption for item in done] == captions
    assert counts.missing == {f"{kind}: no JSON": 20 for kind in TYPES}


def test_requests_are_spaced(server, config):
    paced = config.model_copy(update={"endpoint": config.endpoint.model_copy(update={"requests_per_minute": 1200.0})})
    start = time.monotonic()
    list(build_generator(paced).rewrite([Caption(f"Dog {index}.") for index in range(7)], b"", RewriteCounts()))
    assert time.monotonic() - start >= 6 * 60 / 1200


def test_no_server_and_no_key(config, monkeypatch):
    unreachable = config.endpoint.model_copy(update={"base_url": "http://127.0.0.1:9/v1", "cache_path": ""})
    counts = RewriteCounts()
    list(build_generator(config.model_copy(update={"endpoint": unreachable})).rewrite([CAPTION], b"", counts))
    assert counts.missing["object: no connection"] == 1
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
        build_generator(config)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=2048, pad_token_id=0, eos_token_id=1,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.parametrize("template", ["", "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"])
def test_a_random_model_is_rejected_and_counted(tiny_model, template):
    path = tiny_model / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | ({"chat_template": template} if template else {})))
    config = HallucinationConfig(
        generator="transformers",
        transformers=TransformersConfig(path=str(tiny_model), batch_size=2, max_new_tokens=16),
    )
    counts = RewriteCounts()
    long = Caption("A dog. " * 400)
    done = list(build_generator(config).rewrite([CAPTION, long, CAPTION], b"", counts))
    path.write_text(json.dumps(settings))
    assert [item.rewrites for item in done] == [(), (), ()]
    assert counts.missing["object: no JSON"] == 2
    assert counts.missing["object: prompt too long"] == 1
    assert counts.output_tokens > 0


def test_no_model_and_a_needless_state():
    config = HallucinationConfig(generator="transformers")
    with pytest.raises(ModelError, match="no model directory"):
        build_generator(config)


def test_a_state_is_refused_where_none_is_learnt(config):
    with pytest.raises(DataError, match="only the rules learn one"):
        list(build_generator(config).rewrite([CAPTION], b"{}", RewriteCounts()))
