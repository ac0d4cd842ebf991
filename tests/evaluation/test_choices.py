import pytest

from shellv_core.evaluation.choices import parse_choice

CHOICES = ("ant", "elephant", "A")


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("B", 1),
        (" B\n", 1),
        ("(B)", 1),
        ("(B) elephant", 1),
        ("B. elephant", 1),
        ("B: elephant", 1),
        ("B\nbecause of its trunk", 1),
        ("The answer is B.", 1),
        ("the answer is (B)", 1),
        ("Answer: B", 1),
        ("Option A", 0),
        ("elephant", 1),
        ("Elephant.", 1),
        # Beyond the choices, none, two, an article.
        ("D", None),
        ("", None),
        ("The answer is A. No, the answer is B.", None),
        ("A dog", None),
        ("The answer is a dog", None),
        ("The answer is A dog", None),
        ("I think so", None),
        ("b", None),
        ("it is an elephant", None),
    ],
)
def test_parse_choice(text, index):
    assert parse_choice(text, CHOICES) == index
