"""Builds a Kubernetes API server for custom resources, and etcd, of Debian's packages: `make test-apiserver`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from containers.commands import CommandError, run
from shellv_core.errors import ShellVError
from tests.cluster.apiserver.running import PROGRAMS

SUITE = "sid"
PACKAGES = ("ca-certificates", "etcd-server", "golang-go", "golang-k8s-apiextensions-apiserver-dev")
LEFT_OUT = ("/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/man/*")
GO = {"GOPATH": "/usr/share/gocode", "GO111MODULE": "off", "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "HOME": "/build"}
SOURCE = Path(__file__).with_name("main.go")


def main() -> None:
    """Build what is missing or of another source; needs root, 6 GB of disk for a while, and Debian's archive."""
    server, etcd, built_from = (PROGRAMS / name for name in ("apiserver", "etcd", SOURCE.name))
    # The copy of the source is written last.
    if built_from.is_file() and built_from.read_bytes() == SOURCE.read_bytes():
        return
    if shutil.which("mmdebstrap") is None:
        raise CommandError("mmdebstrap is not installed; `make podman` installs it on Debian and Ubuntu.")
    if os.geteuid() != 0:
        raise CommandError("building the API server changes its root folder, which takes root; run it as root.")
    PROGRAMS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=PROGRAMS) as folder:
        root = Path(folder, "root")
        run(bootstrap_command(root))
        (root / "build").mkdir()
        shutil.copy(SOURCE, root / "build")
        run(build_command(root))
        shutil.copy(root / "usr/bin/etcd", folder)
        Path(folder, "etcd").replace(etcd)
        (root / "build/apiserver").replace(server)
    shutil.copy(SOURCE, built_from)
    print(f"built {server} and {etcd}")


def bootstrap_command(root: Path) -> list[str]:
    """The arguments that install Go, the server's library and etcd below `root`."""
    return [
        # What it mounts below `root` is never seen from here, whatever ends it, when the folder is deleted.
        "unshare",
        "--mount",
        "mmdebstrap",
        "--variant=essential",
        f"--include={','.join(PACKAGES)}",
        # Mirrors of the unstable suite may lag behind; what is signed is checked all the same.
        '--aptopt=Acquire::Check-Valid-Until "false"',
        # Nobody keeps what is installed here.
        "--dpkgopt=force-unsafe-io",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT),
        SUITE,
        str(root),
    ]


def build_command(root: Path) -> list[str]:
    """The arguments that compile the server below `root`."""
    # Go finds its own folder through /proc, which is not there.
    [folder] = root.glob("usr/lib/go-*")
    settings = GO | {"GOROOT": f"/{folder.relative_to(root)}"}
    variables = [f"{name}={value}" for name, value in settings.items()]
    command = ["/usr/bin/go", "build", "-o", "/build/apiserver", "/build/main.go"]
    return ["chroot", str(root), "/usr/bin/env", *variables, *command]


if __name__ == "__main__":
    try:
        main()
    except ShellVError as error:
        sys.exit(f"test-apiserver: {error}")
