import pytest

from shellv_core.data.hallucination.captions import Caption, Rewrite
from shellv_core.data.hallucination.config import FilterConfig
from shellv_core.data.hallucination.filtering import changed_words, reject_reason
from shellv_core.data.hallucination.grammar import Parser, verify_model
from shellv_core.data.samples import HallucinatedCaption, SampleObject
from shellv_core.errors import IntegrityError

TRUTH = "A dog sits on a small red couch."


@pytest.fixture(scope="module")
def parser():
    return Parser()


@pytest.mark.parametrize(
    ("kind", "lie", "reason"),
    [
        ("object", "A cat sits on a small red couch.", None),
        ("attribute", "A dog sits on a small blue couch.", None),
        ("attribute", "Two dogs sit on a small red couch.", None),
        ("relation", "A dog sits under a small red couch.", None),
        ("event", "A dog sits on a small red couch, barking at a mailman.", None),
        ("object", "", "empty"),
        ("object", "a dog sits on a small red couch", "unchanged"),
        ("object", "There is a dog.", "equals another caption"),
        ("object", "A puppy sits on a small red couch.", "still true"),
        ("object", "An animal sits on a small red couch.", "still true"),
        ("object", "A dog sits on a small red sofa.", "still true"),
        ("attribute", "A dog sits on a little red couch.", "still true"),
        ("relation", "A dog sits upon a small red couch.", "still true"),
        ("object", "A lamp sits on a small red laptop.", "object is in the image"),
        ("object", "A cat sits on a small red couch that stands in the middle of the room.", "length"),
        ("attribute", "A dog sits on a orange red couch.", "article"),
        ("relation", "A dog sits on on a small red couch.", "doubled word"),
        ("attribute", "Two dog sits on a small red couch.", "agreement"),
        ("object", "A dog sits under a small red couch.", "wrong type"),
    ],
)
def test_reasons(parser, kind, lie, reason):
    caption = Caption(TRUTH, (SampleObject("laptop"),), ("There is a dog.",))
    truth_doc, lie_doc = parser.parse([TRUTH, lie])
    rewrite = Rewrite(HallucinatedCaption(kind, lie), TRUTH)
    assert reject_reason(caption, rewrite, FilterConfig(), truth_doc, lie_doc) == reason


def test_a_man_may_become_a_woman_although_a_person_is_known():
    caption = Caption("A man on a bench.", (SampleObject("person"),))
    rewrite = Rewrite(HallucinatedCaption("object", "A woman on a bench."), caption.text)
    assert reject_reason(caption, rewrite, FilterConfig()) is None


def test_changed_words_are_between_what_both_share():
    assert changed_words("A red bus on a street.", "A big blue bus on a street") == (["red"], ["big", "blue"])
    assert changed_words("A bus.", "A bus.") == ([], [])


def test_a_model_with_another_file_is_refused(tmp_path):
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"meta.json has SHA-256 44136f.*spacy download en_core_web_sm"):
        verify_model(tmp_path)
