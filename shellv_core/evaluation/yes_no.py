"""Reading yes or no from an answer, and the scores of yes/no questions.

Two kinds of rule are kept apart: the *strict* rule of this project, under which an answer that says neither is
`None` (unparsed), and the rules of the benchmarks' authors, kept for comparison with published figures.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from statistics import NormalDist

from shellv_core.evaluation.benchmark import Scores

Label = bool | None
"""True for yes, False for no, None for an answer that says neither."""

_YES = frozenset({"yes", "yeah", "yep"})
_NO = frozenset({"no", "nope"})
_NEGATED_STATEMENT = re.compile(r"\bthere(?:'s| is| are| was| were)(?:n't| not)\b|\bthere's no\b")
_WORD = re.compile(r"[a-z']+")


def parse_strict(text: str) -> Label:
    """Yes or no where the answer says so, None otherwise.

    The first word decides if it is a yes or a no; else a single kind of them anywhere, or "there is not" for no.
    Empty, evasive and contradictory answers are None.
    """
    lowered = text.lower().replace("\u2019", "'")
    words = _WORD.findall(lowered)
    if not words:
        return None
    if words[0] in _YES:
        return True
    if words[0] in _NO:
        return False
    says_yes = not _YES.isdisjoint(words)
    says_no = not _NO.isdisjoint(words) or _NEGATED_STATEMENT.search(lowered) is not None
    return says_yes if says_yes != says_no else None


def parse_pope_author(text: str) -> Label:
    """POPE's own rule: the first sentence holds the word No, no or not -> no; everything else, even nothing -> yes.

    Source: RUCAIBox/POPE, evaluate.py.
    """
    sentence = text.split(".", 1)[0].replace(",", "")
    return not {"No", "no", "not"} & set(sentence.split(" "))


def parse_hal_eval_author(text: str) -> Label:
    """Hal-Eval's own rule on the text before the first comma: contains "no" -> no, "yes" or "match" -> yes, else None.

    It looks for substrings, so that "I know it matches" is a no. Source: WisdomShell/hal-eval, 5k_code.py.
    """
    head = text.split(",", 1)[0].lower()
    if "no" in head:
        return False
    return True if "yes" in head or "match" in head else None


def score_yes_no(truth: Mapping[str, bool], answered: Mapping[str, Label]) -> Scores:
    """Scores of yes/no questions; yes is the positive class.

    Args:
        truth: question id -> whether yes is right.
        answered: question id -> parsed answer; ids not in `truth` are ignored.

    Returns:
        accuracy, precision, recall, f1 and yes_ratio over *all* questions (an unparsed or missing answer is wrong and
        is not a yes), the 95 % Wilson interval of the accuracy, the counts, and under `parsed_only` accuracy,
        precision, recall and f1 over the parsed answers alone. A ratio over nothing is 0.
    """
    true_positives = false_positives = true_negatives = false_negatives = unparsed = missing = 0
    for question_id, right in truth.items():
        if question_id not in answered:
            missing += 1
            continue
        label = answered[question_id]
        if label is None:
            unparsed += 1
        elif label:
            true_positives += right
            false_positives += not right
        else:
            true_negatives += not right
            false_negatives += right
    count = len(truth)
    parsed = count - unparsed - missing
    correct = true_positives + true_negatives
    positives = sum(truth.values())
    said_yes = true_positives + false_positives
    precision = _ratio(true_positives, said_yes)
    recall = _ratio(true_positives, positives)
    parsed_recall = _ratio(true_positives, true_positives + false_negatives)
    return {
        "accuracy": _ratio(correct, count),
        "accuracy_interval": list(wilson_interval(correct, count)),
        "precision": precision,
        "recall": recall,
        "f1": _f1(precision, recall),
        "yes_ratio": _ratio(said_yes, count),
        "unparsed_share": _ratio(unparsed, count),
        "num_questions": count,
        "num_correct": correct,
        "num_unparsed": unparsed,
        "num_missing": missing,
        "counts": {
            "true_positives": true_positives,
            "false_positives": false_positives,
            "true_negatives": true_negatives,
            "false_negatives": false_negatives,
        },
        "parsed_only": {
            "accuracy": _ratio(correct, parsed),
            "precision": precision,
            "recall": parsed_recall,
            "f1": _f1(precision, parsed_recall),
        },
    }


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share; (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / trials
    center = share + z * z / (2 * trials)
    margin = z * ((share * (1 - share) + z * z / (4 * trials)) / trials) ** 0.5
    scale = 1 + z * z / trials
    return max(0.0, (center - margin) / scale), min(1.0, (center + margin) / scale)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
