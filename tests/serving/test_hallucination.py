import math

import httpx
import openai
import pytest

from shellv_core.errors import ServingError
from shellv_core.serving.engine import TokenLogprob
from shellv_core.serving.hallucination import (
    Threshold,
    Thresholds,
    make_view,
    place_tokens,
    read_thresholds,
    split_sentences,
)
from tests.serving.tiny_model import data_url, picture


def tokens(*pieces: tuple[str | bytes, float]) -> list[TokenLogprob]:
    spelled = [(each.encode() if isinstance(each, str) else each, chance) for each, chance in pieces]
    return [TokenLogprob(0, raw.decode(errors="replace"), raw, math.log(chance)) for raw, chance in spelled]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog. A cat!  Why?", ["A dog.", "A cat!", "Why?"]),
        ("It costs 3.5 dollars", ["It costs 3.5 dollars"]),
        ('He said "no." Then he left', ['He said "no."', "Then he left"]),
        ("一只狗。一只猫", ["一只狗。", "一只猫"]),
        ("- a dog\n- a cat\n", ["- a dog", "- a cat"]),
        ("", []),
        (" ... ", []),
        ("...well. Yes", ["...well.", "Yes"]),
    ],
)
def test_sentences(text, expected):
    assert [text[start:end] for start, end in split_sentences(text)] == expected


def test_an_objects_confidence_is_that_of_its_tokens():
    answer = tokens((" A", 0.9), (" hot", 0.5), (" dog", 0.2), (" and", 0.1), (" a", 1.0), (" cat", 0.8), (".", 1.0))
    view = make_view("A hot dog and a cat.", answer)
    assert [(each.name, each.text) for each in view.objects] == [("hot dog", "hot dog"), ("cat", "cat")]
    assert view.objects[0].probability == pytest.approx(0.5 * 0.2)
    assert view.objects[0].confidence == pytest.approx(math.sqrt(0.5 * 0.2))
    assert view.objects[1].confidence == pytest.approx(0.8)
    assert view.objects[1].marked is None
    assert view.objects[1].risk is None
    (sentence,) = view.sentences
    assert sentence.confidence == pytest.approx((0.9 * 0.5 * 0.2 * 0.1 * 0.8) ** (1 / 7))


def test_words_in_pieces_and_characters_in_bytes():
    cup = "é".encode()
    answer = tokens((" caf", 0.5), (cup[:1], 0.5), (cup[1:], 0.25), (" do", 0.5), ("gs", 0.1), (b"", 0.3))
    text = "café dogs"
    assert [(text[start:end], round(math.exp(each), 3)) for start, end, each in place_tokens(text, answer)] == [
        ("caf", 0.5),
        ("é", 0.5),
        ("é", 0.25),
        (" do", 0.5),
        ("gs", 0.1),
    ]
    assert make_view(text, answer).objects[0].probability == pytest.approx(0.5 * 0.1)


def test_what_a_stop_string_cut_off_counts_nowhere():
    answer = tokens(("A dog", 0.5), (" sat STOP and a cat", 0.1))
    assert [each.name for each in make_view("A dog sat", answer).objects] == ["dog"]


def test_marks_are_under_the_thresholds():
    thresholds = Thresholds(
        revision="0",
        object_confidence=Threshold(below=math.log(0.5), slope=-2, intercept=-1),
        sentence_margin=Threshold(below=0.1, slope=-10, intercept=1),
    )
    answer = tokens(("A dog", 0.4), (". A cat", 0.6), (".", 1.0))
    view = make_view("A dog. A cat.", answer, [0.2], thresholds)
    assert [each.marked for each in view.objects] == [True, False]
    assert view.objects[0].risk == pytest.approx(1 / (1 + math.exp(2 * math.log(0.4) + 1)))
    assert [(each.margin, each.marked) for each in view.sentences] == [(0.2, False), (None, None)]
    assert make_view("A dog. A cat.", answer, [0.0, 0.2], thresholds).sentences[0].marked


def test_a_file_of_thresholds(tmp_path):
    path = tmp_path / "thresholds.json"
    with pytest.raises(ServingError, match="cannot be read"):
        read_thresholds(path)
    path.write_text('{"revision": "0"}')
    with pytest.raises(ServingError, match="object_confidence"):
        read_thresholds(path)
    path.write_text("{")
    with pytest.raises(ServingError, match="no thresholds"):
        read_thresholds(path)


QUESTION = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": data_url(picture("red"))}},
            {"type": "text", "text": "what is in this picture ?"},
        ],
    }
]


@pytest.fixture(scope="module")
def grounded(start_endpoint, model_path):
    """The tiny model with heads and thresholds; it is biased to speak of cats and dogs."""
    import torch

    from shellv_core.models.compose import load_model
    from shellv_core.models.hacl import HaclHeads
    from shellv_core.serving.inference.grounding import HeadsGrounding
    from shellv_core.serving.models import FixedModels, ServedModel

    torch.manual_seed(0)
    _model, processor = load_model(model_path)
    thresholds = Thresholds(
        revision="0" * 64,
        object_confidence=Threshold(below=-0.7, slope=-1, intercept=0),
        sentence_margin=Threshold(below=0.0, slope=-1, intercept=0),
    )

    def served(engine):
        grounding = HeadsGrounding(engine, engine._model, processor, HaclHeads(32))
        return FixedModels(ServedModel(engine, "tiny", "0" * 64, grounding=grounding, thresholds=thresholds))

    with start_endpoint(served=served) as endpoint:
        # A model behind another server has neither heads nor thresholds here.
        yield endpoint, processor, start_endpoint.func.__name__ == "running_endpoint"


def biased(processor):
    ids = [processor.tokenizer.encode(f" {word}", add_special_tokens=False) for word in ("dog", "cat", ".")]
    return {str(each[-1]): 12.0 for each in ids}


def test_a_view_whole_and_streamed(grounded):
    endpoint, processor, with_heads = grounded
    body = {
        "model": "tiny",
        "messages": QUESTION,
        "max_tokens": 24,
        "n": 2,
        "temperature": 1.0,
        "seed": 3,
        "logit_bias": biased(processor),
        "extra_body": {"shellv": {"hallucination": True}},
    }
    with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0) as client:
        whole = client.chat.completions.create(**body)
        chunks = list(client.chat.completions.create(**body, stream=True))
    for choice in whole.choices:
        text, view = choice.message.content, choice.shellv["hallucination"]
        assert choice.logprobs is None
        assert view["objects"]
        assert {each["name"] for each in view["objects"]} <= {"dog", "cat"}
        for each in [*view["objects"], *view["sentences"]]:
            assert text[each["start"] : each["end"]] == each["text"]
            assert 0 < each["confidence"] <= 1
        if with_heads:
            assert all(-2 <= each["margin"] <= 2 for each in view["sentences"][:32])
            assert all(each["marked"] == (each["margin"] < 0) for each in view["sentences"][:32])
            assert all(each["marked"] == (math.log(each["confidence"]) < -0.7) for each in view["objects"])
        else:
            assert all(each["margin"] is each["marked"] is None for each in view["sentences"])
            assert all(each["marked"] is None for each in view["objects"])
        own = [each.choices[0] for each in chunks if each.choices and each.choices[0].index == choice.index]
        assert [getattr(each, "shellv", None) for each in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == "length"
        assert own[-1].logprobs is None
        streamed = own[-1].shellv["hallucination"]
        assert [(each["text"], each["marked"]) for each in streamed["objects"]] == [
            (each["text"], each["marked"]) for each in view["objects"]
        ]


def test_margins_are_cosines_of_what_training_embeds(grounded, model_path):
    """The picture behind its prefix and the sentence alone, each read at the end-of-text token."""
    import asyncio

    import torch
    from PIL import Image

    from shellv_core.models.compose import load_model
    from shellv_core.models.hacl import HaclHeads
    from shellv_core.serving.inference.grounding import HeadsGrounding
    from shellv_core.serving.transformers_engine import TransformersEngine

    model, processor = load_model(model_path)
    torch.manual_seed(1)
    heads = HaclHeads(32)
    engine = TransformersEngine(model, processor)
    grounding = HeadsGrounding(engine, model, processor, heads)
    red, blue = Image.new("RGB", (48, 40), "red"), Image.new("RGB", (48, 40), "blue")
    images, blank, texts = asyncio.run(grounding.embeddings([red, blue], ["a cat sits", "two dogs on the table ."]))
    margins = asyncio.run(grounding.margins([red, blue], ["a cat sits", "two dogs on the table ."]))
    expected = (texts @ images.T).amax(dim=1) - texts @ blank
    assert margins == pytest.approx(expected.tolist(), abs=1e-6)
    with torch.inference_mode():
        ids = [*processor.tokenizer.encode("a cat sits", add_special_tokens=False), processor.tokenizer.eos_token_id]
        state = model.model.language_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        assert torch.allclose(heads.embed_texts(state), texts[0], atol=1e-5)
        inputs = processor(text=["USER: <image>"], images=[red], return_tensors="pt")
        ids = torch.cat([inputs["input_ids"], torch.tensor([[processor.tokenizer.eos_token_id]])], dim=1)
        state = model.model(input_ids=ids, pixel_values=inputs["pixel_values"]).last_hidden_state[0, -1]
        assert torch.allclose(heads.embed_images(state), images[0], atol=1e-5)
    asyncio.run(engine.drain(1))
    from shellv_core.serving.engine import EngineStoppedError

    with pytest.raises(EngineStoppedError):
        asyncio.run(grounding.margins([red], ["a cat sits"]))


def test_without_heads_there_are_no_margins(endpoint):
    body = {"messages": QUESTION, "max_tokens": 8, "shellv": {"hallucination": True}}
    answer = httpx.post(f"{endpoint.url}/v1/chat/completions", json=body, timeout=60).json()
    view = answer["choices"][0]["shellv"]["hallucination"]
    assert all(each["margin"] is each["risk"] is each["marked"] is None for each in view["sentences"])
    body = {"prompt": "hello", "max_tokens": 8, "shellv": {"hallucination": True}}
    answer = httpx.post(f"{endpoint.url}/v1/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["logprobs"] is None
    assert "hallucination" in answer["choices"][0]["shellv"]


def test_heads_are_found_by_what_a_model_was_made_from(tmp_path):
    import torch

    from shellv_core.models.hacl import HaclHeads, save_heads
    from shellv_core.serving import heads as serving_heads
    from shellv_core.stages import heads as stage_heads

    assert serving_heads.HEADS == stage_heads.HEADS
    path = tmp_path / "finetune" / stage_heads.HEADS
    path.parent.mkdir(parents=True)
    torch.manual_seed(0)
    save_heads(HaclHeads(32), path)
    assert serving_heads.fetch_heads(str(path)) == path
    assert serving_heads.fetch_heads(str(tmp_path / "finetune")) == path
    with pytest.raises(ServingError, match="leads to no HACL heads"):
        serving_heads.fetch_heads(str(tmp_path))
    assert serving_heads.find_heads(str(tmp_path)) is None


def test_the_page_names_every_field():
    import re
    from pathlib import Path

    from shellv_core.serving.hallucination import HallucinationView, ObjectView, SentenceView
    from shellv_core.serving.http import bodies

    page = (Path(__file__).parents[2] / "docs" / "hallucination-view.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(?:\w+\[\]\.)?(\w+)(?:\[\])?`", page))
    for view, body in (
        (HallucinationView, bodies.Hallucination),
        (ObjectView, bodies.MentionedObject),
        (SentenceView, bodies.GroundedSentence),
    ):
        assert set(view.__dataclass_fields__) == set(body.model_fields)
        assert set(body.model_fields) <= named


def test_thresholds_of_another_revision_are_refused_unless_an_alias_moved(tmp_path):
    from shellv_core.serving.gateway.config import ModelEntry
    from shellv_core.serving.gateway.loading import _thresholds

    path = tmp_path / "thresholds.json"
    thresholds = Thresholds(revision="0" * 64, object_confidence=Threshold(below=-1, slope=-1, intercept=0))
    path.write_text(thresholds.model_dump_json())
    fixed = ModelEntry(id="m", model="/somewhere", thresholds=path)
    assert _thresholds(fixed, "0" * 64) == thresholds
    with pytest.raises(ServingError, match="shellv calibrate"):
        _thresholds(fixed, "1" * 64)
    followed = ModelEntry(id="m", model="models:/m@champion", thresholds=path)
    assert _thresholds(followed, "1" * 64) is None
    with pytest.raises(ValueError, match="belong to embedded"):
        ModelEntry(id="m", engine="http", urls=("http://127.0.0.1:1",), thresholds=path)
