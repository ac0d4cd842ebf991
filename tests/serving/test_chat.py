from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from tests.serving.tiny_model import picture

CHAT = [sys.executable, "-m", "shellv_core.cli", "chat"]


def chat(*arguments, lines):
    return subprocess.run([*CHAT, *arguments], input=lines, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def red(tmp_path):
    (tmp_path / "red.png").write_bytes(picture("red"))
    return tmp_path / "red.png"


def test_a_script_of_questions(endpoint, red):
    done = chat("--url", endpoint.url, "--image", str(red), "--max-tokens", "8", lines="hello\nand ?\n/reset\nhello\n")
    assert done.returncode == 0, done.stderr
    first, second, again = done.stdout.splitlines()
    assert first == again != second


def test_another_picture_gives_another_answer(endpoint, red, tmp_path):
    blue = tmp_path / "blue one.png"
    blue.write_bytes(picture("blue"))
    done = chat("--url", endpoint.url, "--image", str(red), "--max-tokens", "8", lines=f"hello\n/image {blue}\nhello\n")
    first, second = done.stdout.splitlines()
    assert first != second


def test_faults_are_told_and_counted(endpoint, tmp_path):
    (tmp_path / "not.png").write_text("hello")
    lines = (
        f"/nonsense\n/image {tmp_path / 'none.png'}\n/image {tmp_path / 'not.png'}\nhello\n/reset\n/help\n/quit\nno\n"
    )
    done = chat("--url", endpoint.url, lines=lines)
    assert done.returncode == 1
    assert "unknown command '/nonsense'" in done.stderr
    assert "cannot read the picture" in done.stderr
    assert "not a picture that can be sent" in done.stderr
    assert "/image PATH" in done.stdout


def test_commands_of_a_script(endpoint, tmp_path):
    lines = [
        "/params max_tokens=4",
        "hello",
        f"/save {tmp_path}/talk.json",
        f"/save {tmp_path}/talk.md",
        "/compare tiny tiny",
        "/adapter tiny",
        "/adapter",
        "/params max_tokens= seed=3",
        "/params",
    ]
    done = chat("--url", endpoint.url, "--max-tokens", "8", lines="\n".join(lines))
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert rest == ["--- tiny", first, "--- tiny", first, "* tiny", "temperature=0.0 top_p=1.0 seed=3"]
    talk = json.loads((tmp_path / "talk.json").read_text())["talks"][0]
    assert talk["turns"] == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": first}]
    assert talk["options"]["max_tokens"] == 4
    assert first in (tmp_path / "talk.md").read_text()


def test_commands_that_cannot_be_done(endpoint):
    faults = {
        "/adapter tyni": "did you mean",
        "/params heat=1": "is no NAME=VALUE",
        "/params seed=x": "is not a whole number",
        "/compare tiny": "there is none yet",
        "/save /nowhere/talk.md": "cannot write",
        "/image http://example.org/a.png": "is not https://HOST/PATH",
        "/image https://127.0.0.1/a.png": "is not https://HOST/PATH",
        "/image https://localhost.localdomain/a.png": "the picture at localhost.localdomain",
    }
    done = chat("--url", endpoint.url, lines="\n".join(faults))
    assert done.returncode == 1
    said = done.stderr.splitlines()
    assert len(said) == len(faults), done.stderr
    for line, text in zip(said, faults.values(), strict=True):
        assert text in line


def test_what_loads_a_model_is_not_for_an_endpoint(endpoint):
    done = chat("--url", endpoint.url, "--quantization", "nf4", lines="")
    assert done.returncode == 2
    assert "--quantization says how --model is loaded" in done.stderr


def test_no_endpoint():
    done = chat("--url", "http://127.0.0.1:9", lines="hello\n")
    assert done.returncode == 1
    assert "does not answer" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_of_its_own(model_path):
    done = chat("--model", str(model_path), "--max-tokens", "4", lines="hello\n")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_control_c_stops_the_answer_and_not_the_program(endpoint):
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [*CHAT, "--url", endpoint.url, "--max-tokens", "3000"], stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    try:
        os.write(controller, b"hello\n")
        deadline = time.monotonic() + 60
        while not endpoint.engine.stats().running:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        while endpoint.engine.stats().running:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert process.poll() is None
        os.write(controller, b"/quit\n")
        assert process.wait(20) == 0
    finally:
        process.kill()
        os.close(controller)
