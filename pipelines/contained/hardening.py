"""How every container of a run is kept from harm."""

from __future__ import annotations

import resource
from typing import Any

USER = "10001:10001"
#: Within what machines allow that run containers themselves; the engines' own defaults may be above.
MAX_OPEN_FILES, MAX_PROCESSES = 65536, 16384


def hardened() -> dict[str, Any]:
    """Arguments for docker-py: an unprivileged user, a read-only root, no capability, no way to gain any, limits."""
    from docker.types import Ulimit

    return {
        "user": USER,
        "read_only": True,
        "tmpfs": {"/tmp": "rw,exec,nosuid,nodev,mode=1777"},  # noqa: S108 - HOME of the images
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "ulimits": [Ulimit(name=name, soft=limit, hard=limit) for name, limit in limits().items()],
    }


def limits() -> dict[str, int]:
    """Limits of open files and processes: the project's, or this process's where they are lower."""

    def bounded(kind: int, wanted: int) -> int:
        hard = resource.getrlimit(kind)[1]
        return wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)

    return {
        "nofile": bounded(resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
        "nproc": bounded(resource.RLIMIT_NPROC, MAX_PROCESSES),
    }
