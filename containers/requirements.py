"""The pinned packages of each image: all that its extras need, at the versions of ``constraints.txt``.

Which package needs which is read from the packages installed here, so that writing the files needs no network.
"""

from __future__ import annotations

import importlib.metadata
import tomllib
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from containers.catalogue import REPOSITORY, Image
from shellv_core.errors import ConfigError

HEADER = "# Made by `python -m containers requirements` from pyproject.toml and constraints.txt.\n"


def requirements_text(image: Image) -> str:
    """The content of the image's requirements file: one ``name==version`` a line, sorted.

    Raises:
        ConfigError: if a package is not installed here, or has no version in ``constraints.txt``.
    """
    pins = _pins()
    names = _closure(_roots(image))
    if image.with_kfp:
        names.add("kfp")
    missing = sorted(names - pins.keys())
    if missing:
        raise ConfigError(f"constraints.txt gives no version of {', '.join(missing)}; add what `pip freeze` says.")
    return HEADER + "".join(f"{name}=={pins[name]}\n" for name in sorted(names))


def _roots(image: Image) -> Iterator[Requirement]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = list(project["dependencies"])
    for extra in image.extras:
        lines += project["optional-dependencies"][extra]
    for requirement in map(Requirement, lines):
        # An extra that includes another names this project; the catalogue lists both.
        if requirement.name != project["name"]:
            yield requirement


def _closure(roots: Iterator[Requirement]) -> set[str]:
    seen: dict[str, set[str]] = {}
    waiting = list(roots)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        extras = {"", *requirement.extras}
        new = extras - seen.get(name, set())
        if not new:
            continue
        seen.setdefault(name, set()).update(extras)
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            raise ConfigError(f"the package {name} is not installed here; run `make install` first.") from None
        for each in map(Requirement, needed):
            if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in new):
                waiting.append(each)
    return set(seen)


def _pins() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = (line.partition("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, _, version in pins}
