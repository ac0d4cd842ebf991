import asyncio
import json
import math

import pytest

from shellv_core.data.samples import HallucinatedCaption, Sample, SampleObject
from shellv_core.errors import EvaluationError
from shellv_core.serving.engine import TokenEvent, TokenLogprob
from shellv_core.serving.hallucination import Thresholds
from shellv_core.stages.calibrate_command import table
from shellv_core.stages.calibration import Observations, SeenSentence, calibrate, observe
from tests.serving.tiny_model import picture


class Witness:
    """Names a cat, which is always there, with confidence, and a dog, which is there in every fourth picture."""

    context_length = 64

    async def generate(self, request):
        assert request.logprobs
        said = [(" A", 0.9), (" cat", 0.8), (".", 1.0), (" A", 0.9), (" dog", 0.3), (".", 1.0)]
        yield TokenEvent("", 5, 0)
        for count, (text, chance) in enumerate(said, 1):
            logprob = TokenLogprob(count, text, text.encode(), math.log(chance))
            reason = "stop" if count == len(said) else None
            yield TokenEvent(text.lstrip() if count == 1 else text, 5, count, reason, (count,), (logprob,))


def samples(count=40):
    image = picture("red", (32, 32))
    return [
        Sample(
            key=f"image{index:02}",
            id=str(index),
            conversations=(),
            source="test",
            image=image,
            image_format="png",
            caption="A cat.",
            hallucinated_captions=(HallucinatedCaption("object", "A bus."),),
            objects=tuple(map(SampleObject, ["cat", "dog"] if index % 4 == 0 else ["cat"])),
        )
        for index in range(count)
    ]


def test_what_a_witness_says_is_judged_by_what_is_there():
    seen = asyncio.run(observe(Witness(), None, samples(), 16, 4))
    assert len(seen.objects) == 40 * 2 * 2
    assert {each.name for each in seen.objects if each.false} == {"dog"}
    assert sum(each.false for each in seen.objects) == 30 * 2
    assert [each.text for each in seen.sentences[:2]] == ["A cat.", "A dog."]
    assert sum(each.false for each in seen.sentences) == 60
    thresholds, figures = calibrate(seen, "0" * 64)
    assert math.log(0.3) < thresholds.object_confidence.below < math.log(0.8)
    assert thresholds.sentence_margin is None
    assert figures["objects"]["recall"] == 1
    assert figures["objects"]["area"]["confidence"]["value"] > 0.8
    assert "captions" not in figures
    assert thresholds.object_confidence.risk(math.log(0.3)) == pytest.approx(0.75, abs=0.12)
    assert Thresholds.model_validate_json(thresholds.model_dump_json()) == thresholds
    json.dumps(figures)
    assert any("precision" in line for line in table(figures))


def test_margins_are_measured_beside_the_blind_baseline():
    seen = asyncio.run(observe(Witness(), None, samples(), 16, 4))

    def told(each, similarity):
        return SeenSentence(each.image, each.text, each.false, each.kind, each.objects, similarity, 0.1)

    sentences = tuple(told(each, 0.0 if each.false else 0.5) for each in seen.sentences)
    captions = tuple(told(each, 0.2 if each.false else 0.4) for each in seen.captions)
    thresholds, figures = calibrate(Observations(seen.objects, sentences, captions, seen.present, True), "0" * 64)
    assert thresholds.sentence_margin is not None
    assert -0.1 < thresholds.sentence_margin.below < 0.4
    areas = figures["sentences"]["area"]
    assert areas["margin"]["value"] == 1
    assert areas["blind: blank picture"]["value"] == 0.5
    assert figures["captions"]["object"]["lower_margin"] == 1
    assert figures["captions"]["object"]["blind_lower"] == 0


def test_nothing_is_fitted_on_nothing():
    seen = asyncio.run(observe(Witness(), None, samples(4), 16, 4))
    with pytest.raises(EvaluationError, match="Raise --images"):
        calibrate(seen, "0" * 64)
