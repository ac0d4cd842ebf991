"""Two models' evaluations, or two answer files, against each other."""

import json
import subprocess
import sys

import pytest

from shellv_core.cli import main
from shellv_core.storage import InputDirectory, Manifest, OutputDirectory
from shellv_core.storage.directories import InputReference
from tests.evaluation.tiny_llava import picture

OBJECTS = ("dog", "cat", "cup", "bus", "car")


def pope_rows(num_images=20):
    return [
        {"question_id": 2 * image + place, "image": f"{image}.png", "text": f"Is there a {word}?", "label": label}
        for image in range(num_images)
        for place, (word, label) in enumerate([(OBJECTS[image % 5], "yes"), ("of", "no")])
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    """A question file; A is right about all, B wrong about both questions of the first twelve images."""
    rows = pope_rows()
    right = [{"question_id": row["question_id"], "text": row["label"]} for row in rows]
    wrong = [
        {"question_id": row["question_id"], "text": row["label"] if number >= 24 else "It is a blue cloud, maybe"}
        for number, row in enumerate(rows)
    ]
    return {
        "questions": write(tmp_path / "coco_pope_random.json", rows),
        "a": write(tmp_path / "a.jsonl", right),
        "b": write(tmp_path / "b.jsonl", wrong[::-1]),
    }


def test_two_answer_files(files, capsys):
    command = ["compare", files["a"], files["b"], "--benchmark", "pope", "--questions", files["questions"]]
    assert main(command) == 0
    header, _, line = capsys.readouterr().out.splitlines()
    assert [each.strip() for each in header.split("|")[1:-1]] == [
        "%", "A", "B", "A - B", "95 % interval", "p", "p, Holm", "verdict"
    ]  # fmt: skip
    cells = [each.strip() for each in line.split("|")[1:-1]]
    # Twelve images of which A alone is right twice: p = 2 / 2**12.
    assert [*cells[:4], *cells[5:]] == [
        "POPE random accuracy", "100.0", "40.0", "+60.0", "0.00049", "0.00049", "A is better"
    ]  # fmt: skip
    assert main([*command[:1], files["b"], files["a"], *command[3:], "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    metric = document["metrics"]["pope_random_accuracy"]
    assert metric["verdict"] == "worse"
    assert metric["difference"] == -0.6
    assert (metric["num_pairs"], metric["num_clusters"], metric["only_second"]) == (40, 20, 24)
    assert metric["first"]["value"] == 0.4


def test_side_by_side_page_with_pictures(files, tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    for number in range(10):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(picture(number))
    page = tmp_path / "comparison.html"
    command = ["compare", files["a"], files["b"], "--benchmark", "pope", "--questions", files["questions"]]
    assert main([*command, "--images", str(tmp_path / "pictures"), "--html", str(page)]) == 0
    content = page.read_text()
    assert content.count('src="data:image/jpeg;base64,') == content.count("<img ") > 1
    assert '<mark class="other">It is a blue cloud, maybe</mark>' in content
    assert "http://" not in content.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in content


def make_evaluation(tmp_path, name, texts, data="data"):
    """An output of evaluate with POPE's answers."""
    output = OutputDirectory((tmp_path / name).as_uri(), name)
    output.begin()
    rows = pope_rows()
    outcomes = {str(row["question_id"]): (int(texts(row) == row["label"]), 1) for row in rows}
    output.put_bytes(json.dumps({"candidate": {"pope_random_accuracy": outcomes}}).encode(), "outcomes.json")
    asked = [
        {"question_id": str(row["question_id"]), "image": row["image"], "prompt": row["text"], "expected": row["label"]}
        for row in rows
    ]
    said = [{"question_id": str(row["question_id"]), "text": texts(row)} for row in rows]
    for file, content in (("questions/pope_random.jsonl", asked), ("answers/candidate-pope_random.jsonl", said)):
        output.put_bytes("".join(json.dumps(row) + "\n" for row in content).encode(), file)
    inputs = {"data": InputReference(uri="file:///gone", content_sha256=data)}
    output.commit(
        Manifest(stage="evaluate", fingerprint=name, library_version="0", config={}, inputs=inputs, metrics={})
    )
    return output.uri


def test_two_evaluations(tmp_path, capsys):
    right = make_evaluation(tmp_path, "right", lambda row: row["label"])
    yes = make_evaluation(tmp_path, "yes", lambda row: "yes")
    page = tmp_path / "page.html"
    assert main(["compare", right, str(tmp_path / "yes"), "--json", "--html", str(page)]) == 0
    metric = json.loads(capsys.readouterr().out)["metrics"]["pope_random_accuracy"]
    # B is wrong about one question of each of twenty images.
    assert (metric["difference"], metric["p_value"]) == (0.5, pytest.approx(2 / 2**20))
    assert "Is there a of?" in page.read_text(), "without pictures, as the data are gone"
    assert InputDirectory(yes).files("answers/")


def test_what_cannot_be_compared(tmp_path, files, capsys):
    one = make_evaluation(tmp_path, "one", lambda row: "yes")
    other = make_evaluation(tmp_path, "other", lambda row: "yes", data="other")
    assert main(["compare", one, other]) == 1
    assert "are evaluations of different data or benchmarks" in capsys.readouterr().err
    assert main(["compare", files["a"], files["b"]]) == 1
    assert "name what they answer with --benchmark" in capsys.readouterr().err
    assert main(["compare", one, str(tmp_path / "nothing")]) == 1
    assert "nothing is no output of evaluate" in capsys.readouterr().err
    assert main(["compare", files["a"], "gone.jsonl", "--benchmark", "pope", "--questions", files["questions"]]) == 1
    assert "cannot read gone.jsonl" in capsys.readouterr().err
    command = ["compare", files["a"], files["b"], "--benchmark", "pope", "--questions", files["questions"]]
    assert main([*command, "--option", "splt=random"]) == 2
    assert "did you mean 'split'" in capsys.readouterr().err
    assert main([*command, "--option", "split"]) == 1
    assert "is not NAME=VALUE" in capsys.readouterr().err


def test_help_needs_nothing_heavy():
    heavy = "import sys; import shellv_core.cli as c; print(c._parser('compare').format_help()); print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout.splitlines()
    assert not {"torch", "transformers", "numpy", "scipy", "mlflow", "jinja2"} & set(said[-1].split())
