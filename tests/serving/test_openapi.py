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


@pytest.mark.parametrize(
    ("examples", "phases", "least"),
    [
        pytest.param(25, "fuzzing", 70),
        pytest.param(
            5000, "examples,coverage,fuzzing,stateful", 20_000, marks=[pytest.mark.fuzz, pytest.mark.timeout(3 * 3600)]
        ),
    ],
)
def test_no_answer_is_undocumented(start_endpoint, tmp_path, examples, phases, least):
    secret, key = new_key("schemathesis", frozenset({"chat"}))
    keys = tmp_path / "keys"
    keys.write_text(key.line() + "\n")
    api = ApiConfig(
        keys=KeyLimits(requests_per_minute=1e9, burst=10**9, max_running=64),
        request=RequestLimits(images=ImageLimits(decode_processes=1)),
    )
    # Answers of two tokens where a request names no length: there is nothing to learn from longer ones.
    engine = EngineConfig(default_max_tokens=2, max_waiting=64)
    report = tmp_path / "report.json"
    with start_endpoint(api, engine, keys=Keys(keys)) as endpoint:
        command = [str(Path(sys.executable).parent / "st"), "--no-color", "run", f"{endpoint.url}/openapi.json"]
        command += ["--checks", ",".join(CHECKS), "--max-examples", str(examples), "--seed", "1"]
        command += ["--header", f"Authorization: Bearer {secret}", "--request-timeout", "120", "--no-shrink"]
        command += ["--suppress-health-check", "all", "--warnings", "off", "--continue-on-failure"]
        command += ["--report", "json", "--report-json-path", str(report), "--phases", phases]
        environment = {**os.environ, "COLUMNS": "160"}
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        print(run.stdout[-2000:])
        assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-3000:]
        stats = endpoint.engine.stats()
    assert stats.running + stats.waiting == 0
    cases = json.loads(report.read_text())["test_cases"]
    assert cases["generated"] >= least
    assert cases["with_failures"] == cases["errored"] == 0
