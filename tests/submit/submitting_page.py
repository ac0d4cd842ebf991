"""What the commands of docs/submitting.md print against the stand-in: ``python -m tests.submit.submitting_page``.

The commands run in the order of the page. Ids of runs differ each time: the page's own stand for those of this time.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from pipelines.__main__ import main
from pipelines.client import compiled, connection, doctor, waiting
from tests.pipelines.kfp_api_server import KfpServer, Snapshot, serving
from tests.submit.conftest import TOKEN, pushed

PAGE = Path(__file__).resolve().parents[2] / "docs" / "submitting.md"
ADDRESS, BUCKET = "https://kubeflow.example.com/pipeline", "s3://models/shellv"
CONSOLE = re.compile(r"(?<=^```console\n).*?(?=^```)", re.MULTILINE | re.DOTALL)
YAML = re.compile(r"(?<=^```yaml\n).*?(?=^```)", re.MULTILINE | re.DOTALL)
ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
#: Versions, times, durations and the widths of columns differ too.
VARIES = (r"\d+\.\d+\.\d+\S*-[0-9a-f]{12}", r"\d{4}-\d\d-\d\d \d\d:\d\d(?::\d\d)?", r"\d:\d\d:\d\d", r"(?<=\S)  +")
WRONG = "presett"
#: One run that ends well, one that fails, one that goes on.
SCRIPTS = [
    [
        Snapshot("PENDING"),
        Snapshot("RUNNING", {"prepare-data": "RUNNING"}),
        Snapshot("RUNNING", {"prepare-data": "SUCCEEDED", "pretrain-projector": "RUNNING"}),
        Snapshot("SUCCEEDED", {"pretrain-projector": "SUCCEEDED"}),
    ],
    [
        Snapshot("RUNNING", {"prepare-data": "SUCCEEDED", "finetune": "RUNNING"}),
        Snapshot("FAILED", {"finetune": "FAILED"}, {"finetune": "Pod lifecycle failure: OOMKilled"}),
    ],
    [Snapshot("RUNNING", {"prepare-data": "RUNNING"})],
]


def render(page: str, kfp: KfpServer, bucket_uri: str) -> str:
    """The page with what its commands print now, from a folder with its ``params.yaml``."""
    scripts = iter(SCRIPTS)
    ids: dict[str, str] = {}

    def printed(line: str) -> str:
        arguments = shlex.split(line.removeprefix("python -m pipelines "))
        if arguments[0] == "submit" and WRONG not in line:
            kfp.script = next(scripts)
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            main([bucket_uri if each == BUCKET else ids.get(each, each) for each in arguments])
        return output.getvalue().replace(kfp.url, ADDRESS).replace(bucket_uri, BUCKET)

    def block(found: re.Match[str]) -> str:
        text = ""
        for part in found[0].split("$ ")[1:]:
            line, _, before = part.partition("\n")
            output = printed(line)
            ids.update(zip(ID.findall(before), ID.findall(output), strict=False))
            text += f"$ {ID.sub(lambda each: ids.get(each[0], each[0]), line)}\n{output}"
        return text

    return CONSOLE.sub(block, page)


def comparable(page: str) -> str:
    """The page without what differs each time."""
    numbers: dict[str, str] = {}
    page = ID.sub(lambda each: numbers.setdefault(each[0], f"<{len(numbers)}>"), page)
    for number, pattern in enumerate(VARIES):
        page = re.sub(pattern, f"<{['version', 'time', 'span', '', ''][number]}>", page)
    return page


@contextlib.contextmanager
def surroundings(folder: Path) -> Iterator[None]:
    """A machine without Kubernetes and lock file, the page's parameters file in its working folder."""
    (folder / "params.yaml").write_text(YAML.search(PAGE.read_text(encoding="utf-8"))[0])
    with (
        contextlib.chdir(folder),
        mock.patch.object(compiled, "compiled_yaml", pushed),
        mock.patch.object(connection, "BACKOFF_SECONDS", 0.0),
        mock.patch.object(waiting, "POLL_SECONDS", 0.0),
        mock.patch.object(doctor, "LOCK_PATH", folder / "containers" / "images.lock.yaml"),
        mock.patch.dict(os.environ, KUBECONFIG=str(folder / "kubeconfig")),
    ):
        yield


if __name__ == "__main__":
    from shellv_core.storage.seaweedfs import embedded_s3

    with tempfile.TemporaryDirectory() as name, embedded_s3(Path(name) / "s3"), serving(KfpServer(TOKEN)) as server:
        os.environ.update(KF_PIPELINES_ENDPOINT=server.url, KF_PIPELINES_TOKEN=TOKEN, SHELLV_HOME=name)
        with surroundings(Path(name)):
            before = PAGE.read_text(encoding="utf-8")
            now = render(before, server, "s3://shellv/page")
            if comparable(now) != comparable(before):
                PAGE.write_text(now, encoding="utf-8")
