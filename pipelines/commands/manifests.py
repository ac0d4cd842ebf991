"""``python -m pipelines manifests``: what `kubectl apply` takes, with the images of this registry and version."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

K8S = Path(__file__).parents[2] / "k8s"


def add_parser(commands: Any) -> None:
    """Add the command to argparse's sub-parsers."""
    parser = commands.add_parser("manifests", help="print an overlay of k8s/ for `kubectl apply -f -`")
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(roots())}")
    parser.add_argument(
        "--locked", action="store_true", help="images by digest, as `make images` has written them to its lock file"
    )


def run(options: argparse.Namespace) -> int:
    """Print the manifests of `options.name`.

    Raises:
        ConfigError: if there is no such overlay, no kubectl, or no lock file.
    """
    from components.images import LOCK_PATH

    print(rendered(options.name, LOCK_PATH if options.locked else None), end="")
    return 0


def roots() -> dict[str, Path]:
    """The folders that are applied, by name: overlays, and the administrator's cluster-wide ones."""
    return {path.parent.name: path.parent for path in sorted(K8S.glob("*/*/kustomization.yaml")) if _is_root(path)}


def rendered(name: str, lock: Path | None = None) -> str:
    """The YAML of overlay `name`, with images as `components.images.image` names them.

    Raises:
        ConfigError: if there is no such overlay, no kubectl, or no lock file, or kustomize refuses the overlay.
    """
    import os
    import subprocess
    import tempfile

    import yaml

    from shellv_core.config import nearest
    from shellv_core.errors import ConfigError

    folders = roots()
    if name not in folders:
        raise ConfigError(f"there is no overlay {name!r} in {K8S}; {nearest(name, folders)}")
    with tempfile.TemporaryDirectory() as folder:
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [os.path.relpath(folders[name], Path(folder).resolve())],
            "images": [_replacement(each, lock) for each in ("serve", "train")],
        }
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        try:
            done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise ConfigError("kubectl is not installed; every cluster's documentation tells how to get it.") from None
    if done.returncode:
        raise ConfigError(f"kubectl does not render {folders[name]}: {done.stderr.strip()}")
    return done.stdout


def _is_root(path: Path) -> bool:
    return path.parents[1].name in ("cluster", "overlays")


def _replacement(name: Any, lock: Path | None) -> dict[str, str]:
    """Kustomize's way to say which image stands for the one that the overlays name."""
    from components.images import DEFAULT_REGISTRY, image

    reference = image(name, lock)
    repository, at, digest = reference.partition("@")
    if at:
        return {"name": f"{DEFAULT_REGISTRY}/shellv-{name}", "newName": repository, "digest": digest}
    repository, _, tag = reference.rpartition(":")
    return {"name": f"{DEFAULT_REGISTRY}/shellv-{name}", "newName": repository, "newTag": tag}
