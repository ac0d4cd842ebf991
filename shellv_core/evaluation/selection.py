"""The benchmarks that a user selects and has the files of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shellv_core.config import fingerprint, nearest
from shellv_core.errors import EvaluationError
from shellv_core.evaluation.benchmark import Benchmark, name_of
from shellv_core.evaluation.benchmarks.chair import Chair
from shellv_core.evaluation.benchmarks.hal_eval import HalEval
from shellv_core.evaluation.benchmarks.pope import Pope
from shellv_core.evaluation.rows import read_rows
from shellv_core.storage import sha256_of


class Selection(Protocol):
    """A benchmark by name and its files."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def questions(self) -> str: ...  # noqa: D102
    @property
    def images(self) -> str: ...  # noqa: D102
    @property
    def options(self) -> Mapping[str, str]: ...  # noqa: D102


@dataclass(frozen=True)
class Selected:
    """Benchmarks, the files of their images by name, and the SHA-256 over the contents of all that was read."""

    benchmarks: list[Benchmark]
    images: dict[str, Path]
    content_sha256: str


class FileImages(Mapping[str, bytes]):
    """Image name -> content, read when asked for."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self._paths = paths

    def __getitem__(self, name: str) -> bytes:
        return self._paths[name].read_bytes()

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def read_selected(selections: Sequence[Selection]) -> Selected:
    """Read the selected benchmarks and find their images.

    Raises:
        EvaluationError: if a benchmark is unknown or chosen twice, a file cannot be read, or images are missing or have
            the same name in two folders.
    """
    benchmarks: list[Benchmark] = []
    images: dict[str, Path] = {}
    contents: list[object] = []
    for selection in selections:
        benchmark = _open(selection.name, Path(selection.questions), selection.options)
        if any(benchmark.key == other.key for other in benchmarks):
            raise EvaluationError(
                f"two of the selected benchmarks are called {name_of(benchmark)}; give them options that tell them"
                " apart (POPE: split), or evaluate them in two runs."
            )
        benchmarks.append(benchmark)
        paths = _find_images(benchmark, Path(selection.images))
        for name, path in paths.items():
            if images.setdefault(name, path) != path:
                raise EvaluationError(
                    f"the image {name!r} is in {images[name].parent} and in {path.parent}, for different benchmarks;"
                    " evaluate them in two runs."
                )
        contents.append([selection.name, sha256_of(Path(selection.questions)), dict(selection.options)])
    contents += [[name, sha256_of(path)] for name, path in sorted(images.items())]
    return Selected(benchmarks, images, fingerprint(contents))


def _open(name: str, questions: Path, options: Mapping[str, str]) -> Benchmark:
    known = {"pope": Pope, "hal-eval": HalEval, "chair": Chair}
    if name not in known:
        raise EvaluationError(f"unknown benchmark {name!r}; {nearest(name, known)}")
    opened: Benchmark = known[name](read_rows(questions), source=str(questions), **options)
    return opened


def _find_images(benchmark: Benchmark, folder: Path) -> dict[str, Path]:
    names = dict.fromkeys(question.image for question in benchmark.questions if question.image)
    paths = {name: (folder / name).absolute() for name in names}
    missing = [path for path in paths.values() if not path.is_file()]
    if missing:
        raise EvaluationError(
            f"{len(missing)} of {len(paths)} images of {name_of(benchmark)} are not there, for example {missing[0]};"
            " give the folder that the question file's image names are relative to as its images."
        )
    return paths
