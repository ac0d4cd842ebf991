from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shellv_core.cli import COMMANDS, STAGE_HELP
from shellv_core.stages import STAGE_NAMES

HEAVY = (
    "torch", "transformers", "mlflow", "gradio", "fastapi", "kfp", "boto3", "numpy", "PIL", "scipy", "pyarrow", "spacy",
    "sklearn", "simplejpeg", "httpx",
)  # fmt: skip
SMALL_DATA = ("--preset", "smoke", "scenes.num_train=24", "scenes.num_validation=24", "scenes.benchmark_images=8")


def shellv(*arguments: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Run the program; variables given as None are taken out of its environment."""
    variables = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-m", "shellv_core.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={name: value for name, value in variables.items() if value is not None},
        check=False,
    )


def one_paragraph(done: subprocess.CompletedProcess[str]) -> str:
    """The error message, if it is the single paragraph that users get."""
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("shellv: ")]
    return message


def test_the_verbs_are_frozen() -> None:
    assert set(STAGE_HELP) == set(STAGE_NAMES)
    assert set(COMMANDS) == {
        "data",
        "model",
        "models",
        "estimate",
        "score",
        "compare",
        "rollback",
        "serve",
        "key",
        "bench",
        "calibrate",
        "chat",
        "votes",
    }


@pytest.mark.parametrize("verb", [*STAGE_NAMES, *COMMANDS])
def test_help_imports_nothing_heavy(verb: str) -> None:
    program = (
        "import sys\n"
        "from shellv_core.cli import main\n"
        "try:\n    main([sys.argv[1], '--help'])\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, verb], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"
    assert "usage: shellv" in done.stdout
    assert len(done.stdout) > 200


def test_a_stage_runs_alone_and_prints_its_result(tmp_path: Path) -> None:
    uri = (tmp_path / "data").as_uri()
    first = shellv("prepare_data", *SMALL_DATA, f"output_uri={uri}")
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout)
    assert result["output_uri"] == uri
    assert not result["reused"]
    assert json.loads(shellv("prepare_data", *SMALL_DATA, f"output_uri={uri}").stdout)["reused"]


def test_s3_without_any_setting_means_the_embedded_server(tmp_path: Path) -> None:
    uri = "s3://shellv/alone/{fingerprint}"
    bare = dict.fromkeys(("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ENDPOINT_URL_S3"))
    done = shellv("prepare_data", *SMALL_DATA, f"output_uri={uri}", **bare)
    assert done.returncode == 0, done.stderr
    again = shellv("prepare_data", *SMALL_DATA, f"output_uri={uri}", **bare)
    assert json.loads(again.stdout) == {**json.loads(done.stdout), "reused": True}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare_data", "scenes.num_trian=5"], "num_trian.*did you mean 'num_train'"),
        (["prepare_data", "--preset", "nanno"], "unknown preset 'nanno'; did you mean 'nano'"),
        (["prepare_data", "seed=x"], "seed='x'"),
        (["prepare_data"], "output_uri=URI"),
        (["finetune", "output_uri=file:///tmp/x"], "data_uri=URI, model_uri=URI"),
        (["prepare_data", "--config", "/nowhere.yaml"], "cannot read the config file /nowhere.yaml"),
        (["prepare_data", "output_uri=ftp://x"], "s3://BUCKET/KEY or file:///ABSOLUTE/PATH"),
    ],
)
def test_wrong_settings(arguments: list[str], message: str) -> None:
    import re

    done = shellv(*arguments)
    assert done.returncode == 2
    assert re.search(message, one_paragraph(done))


def test_an_unreachable_store(s3_server: dict[str, str]) -> None:
    environment = {**s3_server, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    message = one_paragraph(shellv("prepare_data", *SMALL_DATA, "output_uri=s3://shellv/x", **environment))
    assert "127.0.0.1:9" in message
    assert "AWS_ENDPOINT_URL" in message


def test_a_wrong_secret(s3_server: dict[str, str]) -> None:
    environment = {**s3_server, "AWS_SECRET_ACCESS_KEY": "wrong"}
    message = one_paragraph(shellv("prepare_data", *SMALL_DATA, "output_uri=s3://shellv/x", **environment))
    assert "AWS_SECRET_ACCESS_KEY" in message


def test_an_unknown_profile() -> None:
    done = shellv("prepare_data", *SMALL_DATA, "output_uri=s3://shellv/x", AWS_PROFILE="nobody")
    assert "AWS_PROFILE" in one_paragraph(done)


def test_a_missing_bucket(s3_server: dict[str, str]) -> None:
    message = one_paragraph(shellv("prepare_data", *SMALL_DATA, "output_uri=s3://missing/x", **s3_server))
    assert "'missing' does not exist" in message


def test_a_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "letter.txt").write_text("mine")
    done = shellv("prepare_data", *SMALL_DATA, f"output_uri={(tmp_path / 'data').as_uri()}")
    assert "letter.txt" in one_paragraph(done)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["letter.txt"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(small)], check=False).returncode:
        pytest.skip("this machine does not allow mounts")
    try:
        done = shellv("prepare_data", *SMALL_DATA, f"output_uri={(small / 'data').as_uri()}")
        assert "Free some space" in one_paragraph(done)
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_reader_that_has_seen_enough_is_no_fault(tmp_path: Path) -> None:
    row = {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"}
    (tmp_path / "questions.json").write_text(json.dumps(row))
    (tmp_path / "answers.jsonl").write_text(json.dumps({"question_id": 1, "text": "yes"}))
    arguments = ["score", "pope", "--questions", "questions.json", "--answers", "answers.jsonl"]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as output:
        done = subprocess.run(
            [sys.executable, "-m", "shellv_core.cli", *arguments],
            cwd=tmp_path,
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "")
