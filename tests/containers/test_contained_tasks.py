"""Single containers: how they are kept from harm, and that their failures are reported."""

import json
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl, local

from pipelines.contained.hardening import hardened
from pipelines.contained.network import RunNetwork
from pipelines.contained.runner import docker_runner_remedied
from tests.containers.conftest import built

pytestmark = [pytest.mark.containers]

PROBE = """\
import json, os, pathlib
lines = pathlib.Path("/proc/self/status").read_text().splitlines()
status = dict(line.split(":\\t") for line in lines if ":\\t" in line)
programs = [path for path in pathlib.Path("/usr").rglob("*") if path.is_file()]
def writable(path):
    try:
        pathlib.Path(path, "probe").write_text("x")
    except OSError:
        return False
    return True
print(json.dumps({
    "user": [os.getuid(), os.getgid()],
    "capabilities": [status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
    "no_new_privileges": status["NoNewPrivs"],
    "writable": [path for path in ("/", "/opt/venv", "/etc", "/usr", "/var", "/home", "/tmp") if writable(path)],
    "setuid": [str(path) for path in programs if path.stat().st_mode & 0o6000],
    "home": os.environ["HOME"],
}))
"""


@pytest.mark.parametrize("name", ["control", "train", "serve"])
def test_a_container_has_no_privileges_and_a_read_only_root(engine: Any, network: RunNetwork, name: Any) -> None:
    command = ["python3", "-c", PROBE]
    output = engine.containers.run(built(name), command, network=network.name, remove=True, **hardened())
    assert json.loads(output) == {
        "user": [10001, 10001],
        "capabilities": ["0000000000000000"] * 5,
        "no_new_privileges": "1",
        "writable": ["/tmp"],
        "setuid": [],
        "home": "/tmp",
    }


@pytest.mark.parametrize("name", ["control", "train", "serve"])
def test_an_image_names_no_place_or_setting_of_the_machine_that_built_it(engine: Any, name: Any) -> None:
    config = engine.images.get(built(name)).attrs["Config"]
    assert config["User"] == "10001:10001"
    assert set(config["Labels"]) <= {
        *(f"org.opencontainers.image.{key}" for key in ("title", "version", "licenses", "base.name", "base.digest")),
        "dev.shellv.code-sha256",
        "io.buildah.version",
    }
    names = {variable.partition("=")[0] for variable in config["Env"]}
    assert not {each for each in names if "PROXY" in each.upper() or "PIP" in each or "CERT" in each or "KEY" in each}
    program = "import pathlib; print(*pathlib.Path('/mnt').iterdir(), *pathlib.Path('/opt').iterdir(), sep='\\n')"
    found = engine.containers.run(
        built(name), ["python3", "-c", program], remove=True, network_mode="none", **hardened()
    )
    assert sorted(found.decode().split()) == ["/opt/requirements.txt", "/opt/venv"]


def failing(code: int) -> None:
    """End with an exit code."""
    import sys

    print("about to fail", flush=True)
    sys.exit(code)


@pytest.mark.parametrize("code", [0, 3])
def test_a_failing_component_is_reported_as_failed(
    engine: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    from kfp.local.config import LocalExecutionConfig

    task = dsl.component(base_image=built("control"), install_kfp_package=False)(failing)
    tmp_path.chmod(0o777)
    local.init(local.DockerRunner(network_mode="none", **hardened()), pipeline_root=str(tmp_path))
    try:
        with docker_runner_remedied():
            if code:
                with pytest.raises(RuntimeError, match="FAILURE"):
                    task(code=code)
            else:
                task(code=code)
    finally:
        LocalExecutionConfig.instance = None
    assert "about to fail" in capsys.readouterr().out
    assert not engine.containers.list(all=True, filters={"ancestor": built("control"), "status": "exited"})
