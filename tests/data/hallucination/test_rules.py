import json
from concurrent.futures import ProcessPoolExecutor

import pytest

from shellv_core.data.hallucination.captions import Caption, RewriteCounts
from shellv_core.data.hallucination.config import HallucinationConfig, RulesConfig
from shellv_core.data.hallucination.generator import build_generator, quality_record
from shellv_core.data.hallucination.grammar import Parser
from shellv_core.data.hallucination.parsed import ParsedCaption
from shellv_core.data.hallucination.rule_generator import RewriterState
from shellv_core.data.hallucination.rules import Rules
from shellv_core.data.hallucination.statistics import CorpusStatistics
from shellv_core.data.samples import SampleObject
from shellv_core.errors import DataError
from tests.data.hallucination.corpus import captions

CONFIG = HallucinationConfig(seed=3, rules=RulesConfig(num_rounds=60))


@pytest.fixture(scope="module")
def parser():
    return Parser()


@pytest.fixture(scope="module")
def rules(parser):
    sample = captions()
    docs = parser.parse(caption.text.strip() for caption in sample)
    statistics = CorpusStatistics.of(map(ParsedCaption, sample, docs))
    return Rules(statistics, num_candidates=400, seed=0)


@pytest.fixture(scope="module")
def state():
    return build_generator(CONFIG).fit(captions())


def parse(parser, text, others=(), objects=()):
    caption = Caption(text, objects, tuple(others))
    docs = list(parser.parse([text, *others]))
    return ParsedCaption(caption, docs[0], tuple(map(ParsedCaption, map(Caption, others), docs[1:])))


def texts(rules, caption, kind, rule=None):
    return {item.text for item in rules.propose(caption, kind) if rule in (None, item.rule)}


def test_object_is_replaced_by_another_of_its_kind(rules, parser):
    found = texts(rules, parse(parser, "A dog is sitting on a wooden bench."), "object")
    assert "A cat is sitting on a wooden bench." in found
    assert not any("A puppy" in text or "A animal" in text for text in found)


@pytest.mark.parametrize(
    ("others", "objects"), [(["A cat and a dog."], ()), ([], (SampleObject("cat"),))], ids=["caption", "object"]
)
def test_object_that_is_known_to_be_there_is_not_proposed(rules, parser, others, objects):
    caption = parse(parser, "A dog is sitting on a wooden bench.", others, objects)
    assert "A cat is sitting on a wooden bench." not in texts(rules, caption, "object")


def test_article_follows_the_new_word(rules, parser):
    found = texts(rules, parse(parser, "A large building near a bench."), "attribute", "adjective")
    assert "A small building near a bench." in found
    assert "An old building near a bench." in texts(
        rules, parse(parser, "A young building near a bench."), "attribute", "adjective"
    )


@pytest.mark.parametrize(
    ("text", "expected", "rule"),
    [
        ("A red bus on a street.", "A blue bus on a street.", "adjective"),
        ("Two horses in a field.", "Three horses in a field.", "number"),
        ("Two horses are in a field.", "A horse is in a field.", "several to one"),
        ("A horse is in a field.", "Two horses are in a field.", "one to several"),
        ("A dog is sleeping on top of a bed.", "A dog is standing on top of a bed.", "posture"),
        ("A group of horses in a field.", "Two horses in a field.", "amount"),
    ],
)
def test_attribute_rules(rules, parser, text, expected, rule):
    assert expected in texts(rules, parse(parser, text), "attribute", rule)


def test_inserted_attribute_stands_against_a_truth_with_an_attribute(rules, parser):
    caption = parse(parser, "The bus.", objects=(SampleObject("bus", color="red"),))
    told = [item for item in rules.propose(caption, "attribute") if item.rule == "told color"]
    assert {item.truth for item in told} == {"The red bus."}
    assert "The green bus." in {item.text for item in told}
    assert all((item.original, item.replacement) == ("red", item.text.split()[1]) for item in told)


@pytest.mark.parametrize(
    ("text", "expected", "rule"),
    [
        ("A red bus parked in front of a building.", "A red bus parked behind a building.", "preposition"),
        ("A cat on top of a bed.", "A cat under a bed.", "preposition"),
        ("A dog chasing a cat.", "A cat chasing a dog.", "exchange"),
        ("A kitchen with a sink and a stove", "A kitchen with a sink without a stove", "separation"),
        ("A kitchen has a sink.", "A kitchen is without a sink.", "possession"),
        ("A woman is holding a red umbrella.", "A red umbrella is holding a woman.", "exchange"),
    ],
)
def test_relation_rules(rules, parser, text, expected, rule):
    assert expected in texts(rules, parse(parser, text), "relation", rule)


def test_relation_that_stays_true_is_not_proposed(rules, parser):
    assert "A table next to a cup" not in texts(rules, parse(parser, "A cup next to a table"), "relation")


def test_event_in_its_place_keeps_the_style_of_its_truth(rules, parser):
    found = [
        item
        for item in rules.propose(parse(parser, "A man is riding a bicycle down the street."), "event")
        if item.rule == "event in its place"
    ]
    assert found
    for item in found:
        assert item.original == "riding a bicycle down the street"
        assert item.truth.replace(item.original, item.replacement) == item.text


def test_second_event_is_taken_from_the_other_caption(rules, parser):
    caption = parse(parser, "A man in a park.", ["A boy is eating a large pizza."])
    found = [item for item in rules.propose(caption, "event") if item.rule == "second event"]
    assert {item.truth for item in found} == {"A man in a park, while a boy is eating a large pizza."}
    assert all(item.text.startswith("A man in a park, while ") and "eating" not in item.text for item in found)


def test_event_of_a_caption_without_verb_has_a_true_counterpart(rules, parser):
    found = rules.propose(parse(parser, "A red bus near a building."), "event")
    assert {item.rule for item in found} == {"onlooker"}
    for item in found:
        assert item.text != item.truth
        assert item.truth.startswith("A red bus near a building, ")
        assert item.truth.rstrip(".").rsplit(" ", 1)[1] in ("vehicle", "buildings")


def test_state_survives_json_and_equal_fits_are_equal_bytes(state):
    assert RewriterState.from_json(state).to_json() == state
    assert build_generator(CONFIG).fit(captions()) == state


def test_foreign_and_outdated_states_are_refused(state):
    generator = build_generator(CONFIG)
    with pytest.raises(DataError, match="no state of the caption rewriter"):
        list(generator.rewrite(captions(5), b"{}", RewriteCounts()))
    with pytest.raises(DataError, match="format 0"):
        RewriterState.from_json(json.dumps({"format": 0}).encode())
    with pytest.raises(DataError, match="other settings"):
        list(build_generator(HallucinationConfig()).rewrite(captions(5), state, RewriteCounts()))


def rewrite(part, state, config=CONFIG):
    return list(build_generator(config).rewrite(part, state, RewriteCounts()))


def test_a_batch_gets_the_same_lies_from_any_worker(state):
    everything = captions()
    batches = [everything[:37], everything[37:41], everything[41:]]
    with ProcessPoolExecutor(2) as pool:
        assert list(pool.map(rewrite, batches, [state] * 3)) == [rewrite(batch, state) for batch in batches]


def test_without_batch_rounds_a_caption_gets_its_lies_whatever_is_beside_it():
    config = CONFIG.model_copy(update={"rules": CONFIG.rules.model_copy(update={"num_batch_rounds": 0})})
    state = build_generator(config).fit(captions())
    everything = captions()
    parts = [rewrite(part, state, config) for part in (everything[:37], everything[37:])]
    assert [item for part in parts for item in part] == rewrite(everything, state, config)


def test_lies_are_complete_marked_and_measured(state):
    counts = RewriteCounts()
    done = list(build_generator(CONFIG).rewrite(captions(), state, counts))
    assert sum(len(item.rewrites) == 4 for item in done) >= 0.95 * len(done)
    for item in done:
        kinds = [rewrite.hallucinated.type for rewrite in item.rewrites]
        assert kinds == sorted(kinds, key=CONFIG.types.index)
        for rewrite in item.rewrites:
            lie = rewrite.hallucinated
            assert lie.text != item.caption.text
            assert lie.original in rewrite.truth
            assert lie.replacement in lie.text
            assert lie.text.endswith(" ") == rewrite.truth.endswith(" ") == item.caption.text.endswith(" ")
    assert sum(counts.kept.values()) == sum(len(item.rewrites) for item in done)
    assert sum(counts.kept.values()) + sum(counts.missing.values()) == 4 * len(done)
    record = json.loads(json.dumps(quality_record(done, counts, CONFIG)))
    assert set(record["text_only_pair_accuracy"]) == set(CONFIG.types)


def test_an_empty_corpus_cannot_be_learnt():
    with pytest.raises(DataError, match="no caption to learn from"):
        build_generator(CONFIG).fit([])
