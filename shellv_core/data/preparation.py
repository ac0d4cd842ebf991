"""Writes the shards of all sources into one output folder, and goes on where an interrupted try ended.

The rows of a shard are known in advance (scenes by index, LLaVA rows by position in their list), so a finished shard
is skipped without making the ones before it again, and a rerun gives the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from shellv_core.data.config import LlavaSource, ScenesSource
from shellv_core.data.llava import (
    ImageFolder,
    RejectedRow,
    content_stamp,
    iterate_json_list,
    read_row,
    row_identity,
    split_of,
)
from shellv_core.data.samples import Sample
from shellv_core.data.shards import Shard, shard_name, write_shard
from shellv_core.errors import ConfigError, DataError, ShellVError
from shellv_core.progress import Progress
from shellv_core.storage import OutputDirectory, check_access, download, home, local_path

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

_NUM_ADDRESSES = 5  # bad rows named in an error
_MIN_SCENES_FOR_PROCESSES = 1000  # below it, starting worker processes costs more than it saves


@dataclass
class Prepared:
    """What was written and what was left out."""

    shards: dict[Split, list[Shard]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    rejected: list[RejectedRow] = field(default_factory=list)
    num_rows: int = 0

    def num_samples(self, split: Split) -> int:
        """Return how many samples were written for a split."""
        return sum(shard.num_samples for shard in self.shards[split])

    def details(self) -> dict[str, Any]:
        """Return the manifest's details."""
        return {
            "splits": {
                split: {"num_samples": self.num_samples(split), "shards": [asdict(shard) for shard in shards]}
                for split, shards in self.shards.items()
                if shards
            },
            "rejected": [asdict(row) for row in self.rejected],
            "rejected_counts": dict(sorted(Counter(row.reason for row in self.rejected).items())),
            "num_rows": self.num_rows,
        }

    def metrics(self) -> dict[str, float]:
        """Return the counts to track."""
        return {
            "num_train_samples": self.num_samples("train"),
            "num_validation_samples": self.num_samples("validation"),
            "num_rejected_rows": len(self.rejected),
        }


def prepare(
    scenes: ScenesSource | None,
    llava: LlavaSource | None,
    samples_per_shard: int,
    seed: int,
    output: OutputDirectory,
    work: Path,
) -> Prepared:
    """Write all sources' shards and benchmarks to `output`.

    Args:
        scenes: Settings of the synthetic scenes, or None.
        llava: Settings of the LLaVA-format data, or None.
        samples_per_shard: Rows to a shard.
        seed: Seed of the scenes.
        output: Where the files go; those it has already are not written again.
        work: Local scratch folder that survives a kill.

    Raises:
        DataError: if more rows are bad than allowed, or none is good.
    """
    prepared = Prepared()
    if scenes is not None:
        _write_scenes(scenes, samples_per_shard, seed, output, work, prepared)
    if llava is not None:
        _write_llava(llava, samples_per_shard, output, work, prepared)
    return prepared


def with_content_stamp(source: LlavaSource) -> LlavaSource:
    """Check that the rows and the image folder are there, and return `source` with the stamp of what they hold.

    Raises:
        ConfigError: naming every address that cannot be used.
        DataError: if the annotations are not a JSON list.
    """
    faults = []
    try:
        annotations = _local_annotations(source.annotations)
        if not annotations.is_file():
            faults.append(f"llava.annotations={source.annotations!r} is not a file; give the path of a JSON list")
    except ShellVError as error:
        faults.append(f"llava.annotations={source.annotations!r}: {error}")
    folder = _local(source.image_folder)
    if folder is None:
        try:
            check_access(source.image_folder)
        except ShellVError as error:
            faults.append(f"llava.image_folder={source.image_folder!r}: {error}")
    elif not folder.is_dir():
        faults.append(
            f"llava.image_folder={source.image_folder!r} is not a folder; give the one that the rows' image paths"
            " are relative to"
        )
    if faults:
        raise ConfigError("; ".join(faults))
    return source.model_copy(update={"content_stamp": content_stamp(annotations, _image_folder(source))})


def _write_scenes(
    source: ScenesSource, samples_per_shard: int, seed: int, output: OutputDirectory, work: Path, prepared: Prepared
) -> None:
    from shellv_core.data.scenes.benchmarks import benchmark_files
    from shellv_core.data.scenes.generate import SceneRequest, scene_record, scene_samples
    from shellv_core.data.scenes.statistics import training_company

    validation = SceneRequest(source.scenes, seed, "validation", source.num_train)
    records = [scene_record(validation, index)[1] for index in range(source.num_validation)]
    company = training_company(source.scenes, seed, source.num_train)
    files = benchmark_files(records, company, source.benchmark_images, source.pope_questions, seed)
    done = output.done_files()
    for name, content in files.items():
        if name not in done:
            output.put_bytes(content, name)

    numbers: dict[Split, int] = {"train": source.num_train, "validation": source.num_validation}
    with Progress(sum(numbers.values()), "scenes", "images") as progress:
        for split, number in numbers.items():
            request = SceneRequest(source.scenes, seed, split, source.num_train)
            starts = range(0, number, samples_per_shard)
            sizes = [min(samples_per_shard, number - start) for start in starts]
            names = [shard_name(split, position) for position in range(len(starts))]
            finished = list(itertools.takewhile(done.__contains__, names))
            for name, size in zip(finished, sizes, strict=False):
                prepared.shards[split].append(Shard.of(done[name], size))
                progress.update(size)
            workers = _num_cores() if number >= _MIN_SCENES_FOR_PROCESSES else 1
            made = scene_samples(request, len(finished) * samples_per_shard, number, workers)
            samples = _counted((Sample.from_record(row["id"], row, image) for image, row in made), progress)
            for name, size in zip(names[len(finished) :], sizes[len(finished) :], strict=True):
                shard = write_shard(itertools.islice(samples, size), output, name, work)
                prepared.shards[split].append(shard)


def _write_llava(
    source: LlavaSource, samples_per_shard: int, output: OutputDirectory, work: Path, prepared: Prepared
) -> None:
    annotations = _local_annotations(source.annotations)
    folder = _image_folder(source)
    done = output.done_files()
    total = sum(1 for _ in iterate_json_list(annotations))
    if not total:
        raise DataError(f"{source.annotations} holds no rows.")
    first_numbers = {split: len(prepared.shards[split]) for split in SPLITS}
    seen: set[bytes] = set()
    rejected: list[RejectedRow] = []
    num_good = 0
    rows = enumerate(iterate_json_list(annotations))
    with Progress(total, "rows", "rows") as progress, ThreadPoolExecutor(_num_cores()) as pool:
        for window in itertools.count():
            chunk = list(itertools.islice(rows, samples_per_shard))
            if not chunk:
                break
            duplicates = [_seen_before(row_identity(row), seen) for _, row in chunk]
            names = {split: shard_name(split, first_numbers[split] + window) for split in SPLITS}
            record_path = work / f"llava-window-{window:06d}.json"
            shards, bad = _finished_window(record_path, done) or (None, [])
            if shards is None:
                results = pool.map(
                    lambda item: read_row(item[0][1], item[0][0], source.annotations, folder, item[1]),
                    zip(chunk, duplicates, strict=True),
                )
                shards, bad = _write_window(results, chunk, names, source, output, work)
                record = {
                    "shards": {split: asdict(shard) for split, shard in shards.items()},
                    "rejected": [asdict(row) for row in bad],
                }
                record_path.write_text(json.dumps(record), encoding="utf-8")
            for split, shard in shards.items():
                prepared.shards[split].append(shard)
                num_good += shard.num_samples
            rejected += bad
            progress.update(len(chunk))
            if len(rejected) > source.max_rejected_fraction * total:
                raise DataError(_too_many(source, rejected, total, num_good + len(rejected)))
    if not num_good:
        raise DataError(f"{source.annotations}: not one of {total} rows is good. First: {_addresses(rejected)}")
    prepared.rejected += rejected
    prepared.num_rows += total


def _write_window(
    results: Iterable[Sample | RejectedRow],
    chunk: list[tuple[int, Any]],
    names: dict[Split, str],
    source: LlavaSource,
    output: OutputDirectory,
    work: Path,
) -> tuple[dict[Split, Shard], list[RejectedRow]]:
    by_split: dict[Split, list[Sample]] = {split: [] for split in SPLITS}
    bad = []
    for (_, row), result in zip(chunk, results, strict=True):
        if isinstance(result, RejectedRow):
            bad.append(result)
        else:
            by_split[split_of(result, row.get("image"), source.validation_fraction)].append(result)
    return {
        split: write_shard(samples, output, names[split], work) for split, samples in by_split.items() if samples
    }, bad


def _finished_window(record_path: Path, done: dict[str, Any]) -> tuple[dict[Split, Shard], list[RejectedRow]] | None:
    """Return what an interrupted try recorded of a window, if all its shards are still there."""
    try:
        record = json.loads(record_path.read_text("utf-8"))
        shards = {split: Shard(**record["shards"][split]) for split in SPLITS if split in record["shards"]}
        bad = [RejectedRow(**row) for row in record["rejected"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    stored = all(shard.name in done and done[shard.name].sha256 == shard.sha256 for shard in shards.values())
    return (shards, bad) if stored else None


def _seen_before(identity: bytes, seen: set[bytes]) -> bool:
    before = identity in seen
    seen.add(identity)
    return before


def _counted(samples: Iterable[Sample], progress: Progress) -> Iterator[Sample]:
    for sample in samples:
        yield sample
        progress.update()


def _too_many(source: LlavaSource, rejected: list[RejectedRow], total: int, num_checked: int) -> str:
    unchecked = "" if num_checked == total else f", after {num_checked} rows checked"
    return (
        f"{source.annotations}: {len(rejected)} of {total} rows ({len(rejected) / total:.1%}) are bad{unchecked};"
        f" allowed are {source.max_rejected_fraction:.1%} (llava.max_rejected_fraction={source.max_rejected_fraction})."
        f" First: {_addresses(rejected)}. Mend the rows, or raise llava.max_rejected_fraction to leave them out."
    )


def _addresses(rejected: list[RejectedRow]) -> str:
    more = f"; and {len(rejected) - _NUM_ADDRESSES} more" if len(rejected) > _NUM_ADDRESSES else ""
    return "; ".join(str(row) for row in rejected[:_NUM_ADDRESSES]) + more


def _local(address: str) -> Path | None:
    return local_path(address) if "://" in address else Path(address)


def _local_annotations(address: str) -> Path:
    """Return the annotation file's local path, fetched anew if it lies in an object store."""
    local = _local(address)
    if local is not None:
        return local
    copy = home() / "cache" / "annotations" / f"{hashlib.sha256(address.encode()).hexdigest()}.json"
    download(address, copy)
    return copy


def _image_folder(source: LlavaSource) -> ImageFolder:
    local = _local(source.image_folder)
    return ImageFolder(source.image_folder if local is None else str(local))


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
