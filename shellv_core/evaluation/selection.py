"""The benchmarks that a user selects and has the files of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shellv_core.config import Config, fingerprint, nearest
from shellv_core.errors import ConfigError, EvaluationError
from shellv_core.evaluation.benchmark import Benchmark, Entry, name_of
from shellv_core.evaluation.benchmarks import find
from shellv_core.storage import sha256_of


class BenchmarkFiles(Config):
    """A benchmark whose files the user has."""

    name: str  # as in `shellv score NAME`
    questions: str = ""  # path of its question file
    images: str = ""  # folder that the questions' image names are relative to
    options: dict[str, str] = {}  # further files and settings of the benchmark, as in `shellv score NAME --help`


class Images(Mapping[str, bytes]):
    """Image name -> encoded file, of several sources: contents in memory, or files that are read when asked for."""

    def __init__(self, sources: Sequence[Mapping[str, bytes | Path]]) -> None:
        self._sources = {name: source for names in sources for name, source in names.items()}

    def __getitem__(self, name: str) -> bytes:
        source = self._sources[name]
        return source.read_bytes() if isinstance(source, Path) else source

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


@dataclass(frozen=True)
class Selected:
    """Benchmarks, their images by name, and the SHA-256 over the contents of all that was read."""

    benchmarks: list[Benchmark]
    images: dict[str, bytes | Path]
    content_sha256: str


def read_selected(selections: Sequence[BenchmarkFiles]) -> Selected:
    """Read the selected benchmarks and find their images.

    Raises:
        ConfigError: if a benchmark has no such option.
        EvaluationError: if a benchmark is unknown or chosen twice, a file is missing or cannot be read, or images are
            missing or differ under one name.
    """
    benchmarks: list[Benchmark] = []
    images: dict[str, bytes | Path] = {}
    contents: list[object] = []
    for selection in selections:
        files = _files(find(selection.name), selection)
        benchmark = open_benchmark(selection)
        if any(benchmark.key == other.key for other in benchmarks):
            raise EvaluationError(
                f"two of the selected benchmarks are called {name_of(benchmark)}; give them options that tell them"
                " apart (POPE: split), or evaluate them in two runs."
            )
        benchmarks.append(benchmark)
        for name, image in _find_images(benchmark, Path(selection.images)).items():
            if images.setdefault(name, image) != image:
                raise EvaluationError(
                    f"two of the selected benchmarks have different images called {name!r}; evaluate them in two runs."
                )
        contents.append([selection.name, *(_content(files | {"questions": selection.questions}))])
    # What an image file holds counts by its questions' file and its own bytes.
    contents += [[name, sha256_of(image)] for name, image in sorted(images.items()) if isinstance(image, Path)]
    return Selected(benchmarks, images, fingerprint(contents))


def open_benchmark(selection: BenchmarkFiles) -> Benchmark:
    """The selected benchmark, without its images.

    Raises:
        ConfigError: if it has no such option.
        EvaluationError: if it is unknown, or a file is missing or cannot be read.
    """
    entry = find(selection.name)
    files = _files(entry, selection)
    return entry.open(files.pop("questions", None), **files)


def _files(entry: Entry, selection: BenchmarkFiles) -> dict[str, Any]:
    """The arguments of `Entry.open` by name."""
    known = {option.name: option for option in entry.options}
    for name, value in selection.options.items():
        if name not in known:
            raise ConfigError(f"the benchmark {entry.name!r} has no option {name!r}; {nearest(name, known)}")
        if known[name].choices and value not in known[name].choices:
            raise ConfigError(f"{entry.name}: {name}={value!r}; allowed: {', '.join(known[name].choices)}.")
    lacking = [name for name, option in known.items() if option.required and name not in selection.options]
    if lacking or (entry.questions_required and not selection.questions):
        raise ConfigError(f"the benchmark {entry.name!r} needs {', '.join(lacking or ['questions'])} too.")
    defaults = {name: option.choices[0] for name, option in known.items() if option.choices}
    given = {
        name: value if known[name].choices else Path(value) for name, value in {**defaults, **selection.options}.items()
    }
    files = ({"questions": Path(selection.questions)} if selection.questions else {}) | given
    for path in files.values():
        if isinstance(path, Path) and not path.exists():
            raise EvaluationError(f"cannot read {path}: No such file. {entry.name} is published at {entry.published}")
    return files


def _content(files: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, value in sorted(files.items()):
        path = Path(value)
        if path.is_dir():
            yield [name, *(sha256_of(each) for each in sorted(path.rglob("*")) if each.is_file())]
        else:
            yield [name, sha256_of(path) if path.is_file() else str(value)]


def _find_images(benchmark: Benchmark, folder: Path) -> dict[str, bytes | Path]:
    names = dict.fromkeys(question.image for question in benchmark.questions if question.image)
    held: Callable[[str], bytes] | None = getattr(benchmark, "image", None)
    if held is not None:
        return {name: held(name) for name in names}
    paths = {name: (folder / name).absolute() for name in names}
    missing = [path for path in paths.values() if not path.is_file()]
    if missing:
        raise EvaluationError(
            f"{len(missing)} of {len(paths)} images of {name_of(benchmark)} are not there, for example {missing[0]};"
            " give the folder that the question file's image names are relative to as its images."
        )
    return dict(paths)
