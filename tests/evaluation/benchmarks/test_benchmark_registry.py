"""Every benchmark of the registry, through its entry: files in, scores out, whatever the files' order and encoding."""

import json
import subprocess
import sys
import time

import pytest

from shellv_core.cli import main
from shellv_core.errors import EvaluationError
from shellv_core.evaluation.benchmark import name_of
from shellv_core.evaluation.benchmarks import find, registry
from tests.evaluation.benchmarks.samples import SAMPLES


def score(sample, answers, folder, name="answers"):
    path = folder / name
    path.write_bytes(answers)
    questions = sample.questions(folder)
    command = ["score", sample.name, *(("--questions", str(questions)) if questions else ()), *sample.options(folder)]
    return main([*command, "--answers", str(path)])


def as_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def test_every_benchmark_has_a_sample():
    assert list(SAMPLES) == list(registry())


def test_an_unknown_name_lists_the_known(capsys):
    with pytest.raises(EvaluationError, match=r"no benchmark 'popp'; there are: amber, chair, .*vqav2"):
        find("popp")
    with pytest.raises(SystemExit):
        main(["score", "popp"])
    assert "'popp' (choose from amber, chair" in capsys.readouterr().err.replace("'amber', 'chair'", "amber, chair")


@pytest.mark.parametrize("name", SAMPLES)
def test_order_and_encoding_of_the_answers_change_nothing(name, tmp_path, capsys):
    sample = SAMPLES[name]
    rows = sample.rows
    seen = []
    for content in (
        as_lines(rows),
        as_lines(rows[::-1]),
        as_lines(rows).replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + as_lines(rows),
        json.dumps(rows, indent=2).encode(),
        json.dumps(rows[::-1], indent=1).encode().replace(b"\n", b"\r\n"),
        "\n".join(json.dumps(row, indent=1) for row in rows).encode(),
    ):
        assert score(sample, content, tmp_path) == 0, capsys.readouterr().err
        seen.append(json.loads(capsys.readouterr().out))
    assert all(each == seen[0] for each in seen)
    for path, expected in sample.expected.items():
        value = seen[0]
        for part in path.split("."):
            value = value[part]
        assert value == pytest.approx(expected), path


def counts_of_missing(scores):
    for key, value in scores.items():
        if isinstance(value, dict):
            yield from counts_of_missing(value)
        elif key in ("num_missing", "num_unjudged"):
            yield value


@pytest.mark.parametrize("name", SAMPLES)
def test_a_missing_row_is_counted_and_a_repeated_one_refused(name, tmp_path, capsys):
    sample = SAMPLES[name]
    assert score(sample, as_lines(sample.rows[:-1]), tmp_path) == 0, capsys.readouterr().err
    # Reviews without a question file are all there is.
    assert max(counts_of_missing(json.loads(capsys.readouterr().out))) == (name != "qa-review")
    assert score(sample, as_lines([*sample.rows, sample.rows[0]]), tmp_path) == 1
    message = capsys.readouterr().err
    assert f"row {len(sample.rows) + 1}: " in message
    assert "twice" in message or "two captions" in message


@pytest.mark.parametrize("name", SAMPLES)
def test_a_missing_file_says_where_it_is_published(name, tmp_path, capsys):
    sample = SAMPLES[name]
    (tmp_path / "a").write_text("{}")
    assert main(["score", name, "--questions", str(tmp_path / "gone.json"), "--answers", str(tmp_path / "a")]) == 1
    message = capsys.readouterr().err
    assert "gone.json" in message
    assert registry()[name].published in message
    questions = sample.questions(tmp_path)
    given = ["--questions", str(questions)] if questions else []
    assert main(["score", name, *given, *sample.options(tmp_path), "--answers", str(tmp_path / "gone.jsonl")]) == 1
    assert "gone.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("name", SAMPLES)
def test_help_describes_the_answers_in_two_lines_with_an_example(name, capsys):
    with pytest.raises(SystemExit):
        main(["score", name, "--help"])
    shown = capsys.readouterr().out
    first, example = registry()[name].answers.split("\n")
    assert f"{first}\n{example}\n" in shown
    start = example.index("{")
    assert isinstance(json.JSONDecoder().raw_decode(example, start)[0], dict)


@pytest.mark.parametrize("name", SAMPLES)
def test_questions_and_outcomes_fit_the_scores(name, tmp_path):
    sample, entry = SAMPLES[name], registry()[name]
    questions = sample.questions(tmp_path)
    options = {
        name.removeprefix("--").replace("-", "_"): tmp_path / value
        for name, value in zip(sample.options(tmp_path)[::2], sample.options(tmp_path)[1::2], strict=True)
    }
    benchmark = entry.open(questions, **options)
    ids = [question.question_id for question in benchmark.questions]
    assert len(set(ids)) == len(ids)
    assert all(question.prompt for question in benchmark.questions)
    assert benchmark.max_new_tokens > 0
    path = tmp_path / "answers"
    path.write_bytes(as_lines(sample.rows))
    outcomes = benchmark.outcomes(entry.read(benchmark, path))
    assert outcomes
    for metric, parts in outcomes.items():
        assert metric.startswith(name_of(benchmark).split("_")[0])
        assert all(isinstance(part, int) for pair in parts.values() for part in pair)
    for metric, expected in sample.outcomes.items():
        events, trials = map(sum, zip(*outcomes[metric].values(), strict=True))
        assert events / trials == pytest.approx(expected), metric


def test_questions_are_written_as_llava_reads_them(tmp_path, capsys):
    sample = SAMPLES["pope"]
    target = tmp_path / "out.jsonl"
    questions = sample.questions(tmp_path)
    assert main(["score", "pope", "--questions", str(questions), "--write-questions", str(target)]) == 0
    assert capsys.readouterr().out == ""
    first = json.loads(target.read_text().split("\n")[0])
    assert first == {"question_id": "1", "image": "a.jpg", "text": "Is there a dog in the image?"}


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys, time; start = time.process_time();"
        "from shellv_core.cli import _parser; _parser('score').format_help();"
        "heavy = {'torch', 'numpy', 'spacy', 'transformers', 'pydantic', 'mlflow'} & set(sys.modules);"
        "sys.exit(','.join(heavy) or int(time.process_time() - start > 0.5))"
    )
    start = time.monotonic()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert time.monotonic() - start < 10
