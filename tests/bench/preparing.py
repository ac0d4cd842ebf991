"""How fast pairs become shards, beside a plain tar of the same files and beside webdataset's own writer in a loop.

Run ``python -m tests.bench.preparing [--pairs 100000] [--rows 1000000]``. All sides run one after another, each in a
process of its own, on the same files in the page cache; ratios are to be trusted, absolute figures are this machine's.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SIDE = 96
IMAGES_A_FOLDER = 1000
SAMPLES_PER_SHARD = 2048


def make_pairs(folder: Path, number: int) -> None:
    """Write `number` small JPEGs, all different, and the LLaVA list that describes them."""
    with multiprocessing.Pool(2) as pool:
        pool.starmap(_make_images, [(folder, first, min(first + 1000, number)) for first in range(0, number, 1000)])
    write_rows(folder, number, number, folder / "rows.json")


def _make_images(folder: Path, first: int, stop: int) -> None:
    from PIL import Image

    generator = np.random.default_rng(first)
    for index in range(first, stop):
        path = image_path(folder, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        small = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=85)
        path.write_bytes(buffer.getvalue())


def image_path(folder: Path, index: int) -> Path:
    """Where image `index` lies."""
    return folder / "images" / f"{index // IMAGES_A_FOLDER:04d}" / f"{index:07d}.jpg"


def write_rows(folder: Path, rows: int, images: int, path: Path) -> None:
    """Write a LLaVA list of `rows` rows about `images` images."""
    with path.open("w") as file:
        for index in range(rows):
            name = image_path(folder, index % images).relative_to(folder / "images").as_posix()
            row = {
                "id": f"{index:09d}",
                "image": name,
                "conversations": [
                    {"from": "human", "value": "<image>\nDescribe the picture in one sentence."},
                    {"from": "gpt", "value": f"A blurred pattern of colours, number {index}, seen from very near."},
                ],
            }
            file.write(("[\n" if index == 0 else ",\n") + json.dumps(row))
        file.write("\n]\n")


def plain_tar(folder: Path, out: Path) -> None:
    """GNU tar over the image folder and the list."""
    subprocess.run(["tar", "-cf", str(out / "plain.tar"), "-C", str(folder), "images", "rows.json"], check=True)


def python_tar(folder: Path, out: Path) -> None:
    """Python's tarfile over the same."""
    with tarfile.open(out / "python.tar", "w") as tar:
        tar.add(folder / "images", "images")
        tar.add(folder / "rows.json", "rows.json")


def shard_writer(folder: Path, out: Path) -> None:
    """The loop that webdataset's documentation shows."""
    import webdataset

    rows = json.loads((folder / "rows.json").read_text())
    with webdataset.ShardWriter(str(out / "loop-%06d.tar"), maxcount=SAMPLES_PER_SHARD, verbose=0) as sink:
        for row in rows:
            image = (folder / "images" / row["image"]).read_bytes()
            sink.write({"__key__": row["id"], "jpg": image, "json": row})


def ours(folder: Path, out: Path, num_workers: int, rows: str = "rows.json") -> None:
    """prepare_data's plan, units and index: rows parsed, images verified, everything hashed."""
    from shellv_core.data.config import DataConfig
    from shellv_core.data.preparation import finish, plan_data, write_units
    from shellv_core.storage import Manifest, OutputDirectory

    settings = DataConfig.model_validate(
        {
            "llava": {"annotations": str(folder / rows), "images": str(folder / "images")},
            "samples_per_shard": SAMPLES_PER_SHARD,
        }
    )
    output = OutputDirectory((out / "ours").as_uri(), "bench")
    output.begin()
    plan = plan_data(settings)
    write_units(settings, 0, plan, output, out / "work", num_workers=num_workers)
    prepared = finish(settings, 0, plan, output, out / "work")
    output.commit(
        Manifest(stage="bench", fingerprint="bench", library_version="0", config={}, details=prepared.details)
    )


def measured(function: Callable[..., None], folder: Path, *arguments: Any) -> tuple[float, float]:
    """Run ``function(folder, OUT, *arguments)`` in a new process; seconds and the largest process' peak memory (MB)."""
    out = Path(tempfile.mkdtemp(dir=folder))
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(
        target=_timed, args=(sender, function, folder, out, *arguments)
    )
    process.start()
    process.join()
    shutil.rmtree(out)
    if process.exitcode:
        raise SystemExit(f"{function.__name__} failed")
    seconds, peak = receiver.recv()
    return seconds, peak


def _timed(sender: Any, function: Callable[..., None], folder: Path, out: Path, *arguments: Any) -> None:
    start = time.perf_counter()
    function(folder, out, *arguments)
    seconds = time.perf_counter() - start
    usages = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    sender.send((seconds, max(usages) / 1000))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the memory test, 0 to leave it out")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="preparing-") as name:
        folder = Path(name)
        make_pairs(folder, options.pairs)
        size = sum(path.stat().st_size for path in folder.rglob("*.jpg")) / options.pairs
        print(f"{options.pairs} pairs, JPEGs of {size:.0f} bytes on average, {os.cpu_count()} cores")
        sides: dict[str, tuple[Any, ...]] = {
            "plain tar (GNU tar)": (plain_tar,),
            "plain tar (Python)": (python_tar,),
            "webdataset.ShardWriter loop": (shard_writer,),
            "ours, 1 worker": (ours, 1),
            "ours, 2 workers": (ours, 2),
        }
        rounds = [
            {side: measured(function, folder, *rest) for side, (function, *rest) in sides.items()}
            for _ in range(options.rounds)
        ]
        median = {side: float(np.median([each[side][0] for each in rounds])) for side in sides}
        beside = ["plain tar (GNU tar)", "plain tar (Python)", "webdataset.ShardWriter loop"]
        print(f"\n{'':28} samples/s   of GNU tar   of Python's tar   of ShardWriter   peak MB/process")
        for side, seconds in median.items():
            gnu, python, loop = (median[each] / seconds for each in beside)
            peak = max(each[side][1] for each in rounds)
            rate = options.pairs / seconds
            print(f"{side:28} {rate:9.0f}   {gnu:10.2f}   {python:15.2f}   {loop:14.2f}   {peak:15.0f}")
        if options.rows:
            write_rows(folder, options.rows, options.pairs, folder / "many.json")
            seconds, peak = measured(ours, folder, 2, "many.json")
            print(f"\n{options.rows} rows: {options.rows / seconds:.0f} samples/s, peak {peak:.0f} MB in one process")


if __name__ == "__main__":
    main()
