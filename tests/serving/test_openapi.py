"""The API's description is true: schemathesis asks what it allows and what it does not, and compares."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shellv_core.serving.http.config import ApiConfig, KeyLimits, RequestLimits
from shellv_core.serving.http.keys import Keys, new_key
from shellv_core.serving.images import ImageLimits
from shellv_core.serving.transformers_engine import EngineConfig

CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
    "ignored_auth",
]

LONG = [pytest.mark.fuzz, pytest.mark.timeout(3 * 3600)]


@pytest.mark.parametrize(
    ("rounds", "examples", "phases", "least"),
    [
        pytest.param(1, 25, "fuzzing", 70),
        # Rounds of a seed each: a long one comes to spend its time on not making a request twice.
        pytest.param(6, 300, "examples,coverage,fuzzing,stateful", 20_000, marks=LONG),
    ],
)
def test_no_answer_is_undocumented(start_endpoint, tmp_path, rounds, examples, phases, least):
    secret, key = new_key("schemathesis", frozenset({"chat"}))
    keys = tmp_path / "keys"
    keys.write_text(key.line() + "\n")
    api = ApiConfig(
        keys=KeyLimits(requests_per_minute=1e9, burst=10**9, max_running=64),
        request=RequestLimits(images=ImageLimits(decode_processes=1)),
    )
    # Answers of two tokens where a request names no length: there is nothing to learn from longer ones.
    engine = EngineConfig(default_max_tokens=2, max_waiting=64)
    generated = 0
    with start_endpoint(api, engine, keys=Keys(keys)) as endpoint:
        for seed in range(1, rounds + 1):
            report = tmp_path / f"report{seed}.json"
            command = [str(Path(sys.executable).parent / "st"), "--no-color", "run", f"{endpoint.url}/openapi.json"]
            command += ["--checks", ",".join(CHECKS), "--max-examples", str(examples), "--seed", str(seed)]
            command += ["--header", f"Authorization: Bearer {secret}", "--request-timeout", "120", "--no-shrink"]
            command += ["--suppress-health-check", "all", "--warnings", "off", "--continue-on-failure"]
            command += ["--report", "json", "--report-json-path", str(report), "--phases", phases]
            environment = {**os.environ, "COLUMNS": "160"}
            run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            print(run.stdout[-2000:])
            assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-3000:]
            cases = json.loads(report.read_text())["test_cases"]
            assert cases["with_failures"] == cases["errored"] == 0
            generated += cases["generated"]
        stats = endpoint.engine.stats()
    print(f"{generated} cases")
    assert stats.running + stats.waiting == 0
    assert generated >= least
