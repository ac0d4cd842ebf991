"""Writes a data set by its plan, and goes on where an interrupted try ended.

`write_units` writes any of the plan's units, in worker processes; `finish` joins what they have left: the index, the
rejected rows and the benchmarks. On one machine one call follows the other; on a cluster pods share the units.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shellv_core.data.config import DataConfig, TokensConfig
from shellv_core.data.conversation import encode_conversations
from shellv_core.data.index import index_name, write_index
from shellv_core.data.lengths import IDENTITY_DETAIL
from shellv_core.data.plan import SCENES, SPLITS, Plan, Split, Unit, make_plan
from shellv_core.data.sources.base import RejectedRow, Source
from shellv_core.data.sources.opening import faults, is_remote, open_source
from shellv_core.data.units import UnitResult, UnitWriter, part_name
from shellv_core.errors import ConfigError, DataError
from shellv_core.progress import Progress
from shellv_core.storage import Group, OutputDirectory

if TYPE_CHECKING:
    from shellv_core.data.encoder import ConversationEncoder

PLAN_NAME = "plan.json"
LEARNED_NAME = "hallucination.json"
REJECTED_NAME = "rejected.jsonl"

_NUM_ADDRESSES = 5  # bad rows named in an error
_LISTED_ROWS = 100  # bad rows in the manifest; all of them are in REJECTED_NAME
_FETCHES = 16


@dataclass(frozen=True)
class Prepared:
    """What was written and what was left out: the manifest's details, and the counts to track."""

    details: dict[str, Any]
    metrics: dict[str, float]


def open_sources(settings: DataConfig) -> dict[str, Source]:
    """Open the row sources.

    Raises:
        ConfigError: naming every address that cannot be used.
    """
    found = [fault for name, config in settings.row_sources() for fault in faults(config, name)]
    if found:
        raise ConfigError(f"{'; '.join(found)}.")
    opened: dict[str, Source] = {}
    for name, config in settings.row_sources():
        opened[name] = open_source(config)
        opened[name].remote = is_remote(config)
    return opened


def plan_data(settings: DataConfig) -> Plan:
    """Check the sources and pass over them once.

    Raises:
        ConfigError: naming every address that cannot be used.
        DataError: if a source cannot be read.
    """
    return make_plan(settings, open_sources(settings))


def learn_captions(settings: DataConfig, plan: Plan) -> bytes:
    """What the making of hallucinated captions needs to know of all captions; b"" where none are asked for.

    Raises:
        DataError: if there is no caption to learn from.
    """
    if settings.hallucination is None:
        return b""
    from shellv_core.data.rewriting import learn

    return learn(settings.hallucination, plan, open_sources(settings))


def token_encoder(config: TokensConfig) -> ConversationEncoder:
    """The encoder whose tokens the index counts.

    Raises:
        ConfigError: if the tokenizer cannot be loaded or the template does not exist.
    """
    from shellv_core.data.encoder import ConversationEncoder, load_tokenizer
    from shellv_core.templates import IMAGE_TOKEN, template_named

    template = template_named(config.template)
    tokenizer = load_tokenizer(config.tokenizer, "tokens.tokenizer", template)
    encode = partial(encode_conversations, template=template)
    image_token_id: Any = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return ConversationEncoder(tokenizer, image_token_id, encode=encode)


def write_units(
    settings: DataConfig,
    seed: int,
    plan: Plan,
    output: OutputDirectory,
    work: Path,
    units: Sequence[Unit] | None = None,
    num_workers: int | None = None,
    learned: bytes = b"",
) -> None:
    """Write those of `units` (by default all of the plan) that are not written yet.

    Args:
        settings: Those that the plan was made with.
        seed: Seed of the scenes.
        plan: The plan.
        output: Where the files go; begun.
        work: Local scratch folder.
        units: Some of the plan's.
        num_workers: Processes; by default one for each core. The result does not depend on it.
        learned: What `learn` has learnt of the captions, where hallucinated ones are asked for.

    Raises:
        DataError: if more rows are bad than allowed, or a worker process died.
    """
    chosen = plan.units if units is None else units
    done = output.done_groups()
    todo = [unit for unit in chosen if unit.group not in done]
    ledger = _Ledger(settings, plan)
    with Progress(sum(unit.count for unit in chosen), "writing shards", "rows") as progress:
        for unit in chosen:
            if unit.group in done:
                ledger.add(unit, done[unit.group])
                progress.update(unit.count)
        setup = _Setup(settings, seed, len(plan.units), learned, output.uri, output.fingerprint, work)
        for unit, group in _written(setup, todo, num_workers or num_cores()):
            output.adopt(group)
            ledger.add(unit, group)
            progress.update(unit.count)


@dataclass(frozen=True)
class _Setup:
    """What a process needs to write units."""

    settings: DataConfig
    seed: int
    num_units: int
    learned: bytes
    uri: str
    fingerprint: str
    work: Path

    def writer(self) -> UnitWriter:
        settings = self.settings
        rewriter = encoder = None
        if settings.hallucination is not None:
            from shellv_core.data.rewriting import Rewriter

            rewriter = Rewriter(settings.hallucination, self.learned)
        if settings.tokens is not None:
            encoder = token_encoder(settings.tokens)
        return UnitWriter(
            settings=settings,
            seed=self.seed,
            num_units=self.num_units,
            sources=open_sources(settings),
            rewriter=rewriter,
            encoder=encoder,
            output=OutputDirectory(self.uri, self.fingerprint),
            work=self.work,
        )


def _written(setup: _Setup, units: Sequence[Unit], num_workers: int) -> Iterator[tuple[Unit, Group]]:
    num_workers = min(num_workers, len(units))
    if num_workers <= 1:
        if units:
            writer = setup.writer()
            yield from ((unit, writer.write(unit)) for unit in units)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, _start_worker, (setup,)) as pool:
        waiting: dict[Future[Group], Unit] = {}
        remaining = iter(units)
        try:
            while True:
                # A few ahead of the workers, so that a failure does not leave a long queue behind it.
                for unit in itertools.islice(remaining, 2 * num_workers - len(waiting)):
                    waiting[pool.submit(_work, unit)] = unit
                if not waiting:
                    return
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(future), future.result()
        except BrokenProcessPool:
            raise DataError(
                f"a worker process died while it wrote shards (out of memory?). Lower samples_per_shard"
                f" ({setup.settings.samples_per_shard}) or the number of workers ({num_workers}), then rerun: what is"
                " written stays."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass
class _Ledger:
    """Counts bad rows against what is allowed."""

    settings: DataConfig
    plan: Plan

    def __post_init__(self) -> None:
        self.first: list[RejectedRow] = []
        self.counts: Counter[str] = Counter()
        self.num_checked = 0

    def add(self, unit: Unit, group: Group) -> None:
        """Count a unit's rows; raise `DataError` if more are bad than allowed of the whole."""
        rejected = UnitResult.of(group).rejected
        self.counts.update(row["reason"] for row in rejected)
        self.first += [RejectedRow(**row) for row in rejected[: _NUM_ADDRESSES - len(self.first)]]
        self.num_checked += 0 if unit.source == SCENES else unit.count
        limits = [("max_rejected_fraction", self.settings.max_rejected_fraction, self.counts.total())]
        for reason, limit in self.settings.max_rejected.items():
            limits.append((f"max_rejected[{reason}]", limit, self.counts[reason]))
        for name, limit, bad in limits:
            if bad > limit * self.plan.total_rows:
                raise DataError(self._message(name, limit, bad))

    def _message(self, name: str, limit: float, bad: int) -> str:
        total = self.plan.total_rows
        checked = "" if self.num_checked == total else f", after {self.num_checked} rows checked"
        reasons = ", ".join(f"{reason}: {count}" for reason, count in self.counts.most_common())
        return (
            f"{bad} of {total} rows ({bad / total:.1%}) are bad{checked}; allowed are {limit:.1%} ({name}={limit})."
            f" Reasons: {reasons}. First: {addresses(self.first, self.counts.total())}."
            f" Mend the rows, or raise {name.partition('[')[0]} to leave them out."
        )


def finish(settings: DataConfig, seed: int, plan: Plan, output: OutputDirectory, work: Path) -> Prepared:
    """Join what the units have left.

    Raises:
        DataError: if a unit is missing, or not one row is good.
    """
    groups = output.done_groups()
    missing = [unit.number for unit in plan.units if unit.group not in groups]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(plan.units)} units are not written, first number {missing[0]}. Write them (rerun"
            " prepare_data with the same settings), then finish."
        )
    results = [UnitResult.of(groups[unit.group]) for unit in plan.units]
    rejected = [RejectedRow(**row) for result in results for row in result.rejected]
    shards: dict[Split, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for result in results:
        for split, shard in result.shards.items():
            shards[split].append(shard)
    if not any(shards.values()):
        raise DataError(f"not one of {plan.total_rows} rows is good. First: {addresses(rejected, len(rejected))}")
    lines = "".join(json.dumps(row.__dict__, ensure_ascii=False) + "\n" for row in rejected)
    output.put_bytes(lines.encode(), REJECTED_NAME)
    for split in SPLITS:
        if shards[split]:
            _join_index(split, plan, groups, output, work)
    if settings.scenes is not None:
        _write_benchmarks(settings, seed, output)
    numbers = {split: sum(shard["num_samples"] for shard in shards[split]) for split in SPLITS}
    details = {
        "splits": {
            split: {"num_samples": numbers[split], "shards": shards[split]} for split in SPLITS if shards[split]
        },
        "num_rows": dict(sorted(plan.num_rows.items())),
        "rejected": [row.__dict__ for row in rejected[:_LISTED_ROWS]],
        "rejected_counts": dict(sorted(Counter(row.reason for row in rejected).items())),
    }
    if settings.tokens is not None:
        details[IDENTITY_DETAIL] = token_encoder(settings.tokens).identity
    if settings.hallucination is not None:
        from shellv_core.data.rewriting import quality

        records = [result.rewrites for result in results if result.rewrites is not None]
        pairs = [pair for result in results for pair in result.pairs]
        details["hallucination"] = quality(records, pairs, settings.hallucination)
    metrics = {
        "num_train_samples": numbers["train"],
        "num_validation_samples": numbers["validation"],
        "num_rejected_rows": len(rejected),
    }
    return Prepared(details, metrics)


def _join_index(split: Split, plan: Plan, groups: Mapping[str, Group], output: OutputDirectory, work: Path) -> None:
    folder = work / f"index-{split}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    parts = {part_name(split, unit): unit for unit in plan.units}
    entries = [entry for unit in plan.units for entry in groups[unit.group].scratch if entry.name in parts]
    paths = [folder / f"{parts[entry.name].number:06d}.parquet" for entry in entries]
    with ThreadPoolExecutor(_FETCHES) as pool:
        list(pool.map(output.fetch, entries, paths))
    joined = folder / "joined.parquet"
    write_index(paths, joined)
    output.put_file(joined, index_name(split))
    shutil.rmtree(folder)


def _write_benchmarks(settings: DataConfig, seed: int, output: OutputDirectory) -> None:
    from shellv_core.data.scenes.benchmarks import benchmark_files
    from shellv_core.data.scenes.generate import SceneRequest, scene_record
    from shellv_core.data.scenes.statistics import training_company

    source = settings.scenes
    if source is None:
        return
    validation = SceneRequest(source.scenes, seed, "validation", source.num_train)
    records = [scene_record(validation, index)[1] for index in range(source.num_validation)]
    company = training_company(source.scenes, seed, source.num_train)
    files = benchmark_files(records, company, source.benchmark_images, source.pope_questions, seed)
    for name, content in files.items():
        output.put_bytes(content, name)


def addresses(rejected: Sequence[RejectedRow], total: int) -> str:
    """The first bad rows, and how many more there are."""
    named = rejected[:_NUM_ADDRESSES]
    more = f"; and {total - len(named)} more" if total > len(named) else ""
    return "; ".join(map(str, named)) + more


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_unit_writer: UnitWriter | None = None  # of a worker process


def _start_worker(setup: _Setup) -> None:
    global _unit_writer
    _end_with_parent()
    _unit_writer = setup.writer()


def _work(unit: Unit) -> Group:
    if _unit_writer is None:
        raise RuntimeError("_start_worker did not run")
    return _unit_writer.write(unit)


def _end_with_parent() -> None:
    """Let a worker end when its parent was killed, which the pool itself does not do."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
