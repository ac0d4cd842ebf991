import json

import pytest

from shellv_core.errors import EvaluationError
from shellv_core.evaluation.rows import check_overlap, index_answers, parse_rows, read_rows


def test_lines_and_array_are_read_alike(tmp_path):
    rows = [{"question_id": 1, "text": "yes\u2028"}, {"question_id": 2, "text": "no"}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", "utf-8")
    (tmp_path / "b.json").write_text("\n " + json.dumps(rows, indent=2), "utf-8")
    (tmp_path / "c.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.jsonl").read_bytes())
    for name in ("a.jsonl", "b.json", "c.jsonl"):
        assert read_rows(tmp_path / name) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question_id": 1}\n{"question_id": 2', "line 2 is not valid JSON"),
        ("[1, 2]", "row 1: 1 is not a JSON object"),
        ("[{}", "not a valid JSON array"),
    ],
)
def test_broken_files_name_the_place(content, message):
    with pytest.raises(EvaluationError, match=message):
        parse_rows(content, "f.jsonl")


def test_unreadable_file(tmp_path):
    with pytest.raises(EvaluationError, match=r"cannot read .*missing\.jsonl: No such file"):
        read_rows(tmp_path / "missing.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EvaluationError, match="not UTF-8"):
        read_rows(tmp_path / "binary")


def test_answers_are_indexed_by_id_as_text():
    assert index_answers([{"question_id": 7, "text": "yes"}, {"question_id": "8", "answer": "no"}]) == {
        "7": "yes",
        "8": "no",
    }


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "Is there a dog?", "answer": "yes"}], "row 1: no 'question_id' .*by position"),
        (
            [{"question_id": 1, "text": "a"}, {"question_id": "1", "text": "b"}],
            "row 2: question_id '1' is answered twice",
        ),
        ([{"question_id": 1, "text": None}], "needs a string under 'text', 'answer' or 'response', got None"),
    ],
)
def test_answers_that_cannot_be_joined(rows, message):
    with pytest.raises(EvaluationError, match=message):
        index_answers(rows)


def test_overlap():
    assert check_overlap(["1", "2"], {"2": "", "3": ""}) == 1
    assert check_overlap(["1"], {}) == 0
    with pytest.raises(EvaluationError, match=r"none of the 1 answers .* ids like 'x', the questions like '1'"):
        check_overlap(["1"], {"x": ""})
