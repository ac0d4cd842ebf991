"""``shellv data``: look into a data set that prepare_data made, and check it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from shellv_core.errors import ConfigError, DataError, ShellVError

if TYPE_CHECKING:
    from shellv_core.data.samples import Sample
    from shellv_core.storage import InputDirectory

_TRAINED, _SOFT, _RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the three verbs."""
    verbs = parser.add_subparsers(dest="data_verb", metavar="VERB", required=True)
    stats = verbs.add_parser("stats", help="counts, lengths, sources and rejected rows")
    stats.add_argument("--json", action="store_true", help="print JSON instead of text")
    show = verbs.add_parser("show", help="samples as text, or as an HTML page with their images")
    show.add_argument("--split", default="train", help="train (default) or validation")
    show.add_argument("--key", action="append", default=[], help="a sample's key; may be given several times")
    show.add_argument("--start", type=int, default=0, help="position of the first sample (0)")
    show.add_argument("--count", type=int, help="how many samples (1; 60 with --html)")
    show.add_argument("--tokenizer", metavar="DIR", help="a tokenizer's directory or hub id: show what is trained on")
    show.add_argument("--template", default="v1_no_system", help="conversation template for --tokenizer")
    show.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="color of trained text")
    show.add_argument("--html", type=Path, metavar="FILE", help="write a page with the images instead")
    verify = verbs.add_parser("verify", help="compare every byte with the manifest; exit code 1 if anything differs")
    for sub in (stats, show, verify):
        sub.add_argument("uri", metavar="URI", help="output of prepare_data, s3:// or file://")


def main(args: argparse.Namespace) -> int:
    """Run a verb; returns the exit code.

    Raises:
        ShellVError: if there is no such data set or sample.
    """
    import contextlib

    from shellv_core.storage import InputDirectory
    from shellv_core.storage.seaweedfs import embedded_s3, external_s3_configured

    own_store = args.uri.startswith("s3://") and not external_s3_configured()
    with embedded_s3() if own_store else contextlib.nullcontext():
        source = InputDirectory(args.uri)
        if not source.manifest.details.get("splits"):
            raise DataError(f"{args.uri} is an output of {source.manifest.stage!r}, not a data set of prepare_data.")
        return {"stats": _stats, "show": _show, "verify": _verify}[args.data_verb](args, source)


def _stats(args: argparse.Namespace, source: InputDirectory) -> int:
    from shellv_core.data.statistics import render_statistics, statistics_record

    print(json.dumps(statistics_record(source), indent=1) if args.json else render_statistics(source))
    return 0


def _verify(args: argparse.Namespace, source: InputDirectory) -> int:
    from shellv_core.data.verification import verify

    damaged = verify(source)
    for damage in damaged:
        print(damage)
    files = source.files()
    total = sum(entry.bytes for entry in files)
    print(f"{len(files)} files, {total:,} bytes: {f'{len(damaged)} damaged' if damaged else 'all as recorded'}")
    return 1 if damaged else 0


def _show(args: argparse.Namespace, source: InputDirectory) -> int:
    samples = _chosen(args, source)
    if args.html:
        from shellv_core.data.gallery import render_gallery

        try:
            args.html.write_text(render_gallery(source, args.split, samples), encoding="utf-8")
        except OSError as error:
            raise ShellVError(f"cannot write {args.html}: {error.strerror}.") from None
        print(args.html)
        return 0
    colored = args.color == "always" or (args.color == "auto" and sys.stdout.isatty())
    print("\n\n".join(_text(sample, args, colored) for sample in samples))
    return 0


def _chosen(args: argparse.Namespace, source: InputDirectory) -> list[Sample]:
    from shellv_core.config import nearest
    from shellv_core.data.index import index_column
    from shellv_core.data.reader import SplitReader

    with SplitReader(source, args.split) as reader:
        if args.key:
            positions = {key: number for number, key in enumerate(index_column(reader.index_path, "key"))}
            missing = [key for key in args.key if key not in positions]
            if missing:
                hint = nearest(missing[0], positions)
                raise ConfigError(f"the split {args.split!r} of {args.uri} has no sample {missing[0]!r}; {hint}")
            return reader.read([positions[key] for key in args.key])
        count = args.count or (60 if args.html else 1)
        if not 0 <= args.start < len(reader) or count < 1:
            raise ConfigError(
                f"--start={args.start} --count={count}: the split {args.split!r} has samples 0 to {len(reader) - 1}."
            )
        return reader.read(range(args.start, min(args.start + count, len(reader))))


def _text(sample: Sample, args: argparse.Namespace, colored: bool) -> str:
    image = f"{sample.image_name}, {sample.width}x{sample.height}" if sample.image is not None else "no image"
    lines = [f"{sample.key}  id {sample.id}", f"  from {sample.source}", f"  {image}"]
    if sample.image_source:
        lines[-1] += f" ({sample.image_source})"
    if sample.caption:
        lines.append(f"  caption: {sample.caption}")
    lines += [f"  {item.type} hallucination: {item.text}" for item in sample.hallucinated_captions]
    conversations = [sample.conversations, *sample.more_conversations]
    if args.tokenizer:
        lines += ["", *_previews(conversations, args, colored)]
    else:
        for conversation in conversations:
            lines += ["", *(f"  {turn['from']}: {turn['value']}" for turn in conversation)]
    return "\n".join(lines)


def _previews(conversations: Sequence[list[dict[str, str]]], args: argparse.Namespace, colored: bool) -> list[str]:
    from shellv_core.data.conversation import preview
    from shellv_core.data.encoder import load_tokenizer
    from shellv_core.templates import template_named

    template = template_named(args.template)
    tokenizer = load_tokenizer(args.tokenizer, "--tokenizer", template)
    shown = []
    for conversation in conversations:
        tokens = preview(conversation, tokenizer, template)
        trained = sum(is_trained for _, is_trained in tokens)
        # Without color, what is trained stands in brackets.
        marks = {True: (_TRAINED, _RESET), False: (_SOFT, _RESET)} if colored else {True: ("[", "]"), False: ("", "")}
        spans = groupby(tokens, key=lambda token: token[1])
        text = "".join(marks[key][0] + "".join(token for token, _ in span) + marks[key][1] for key, span in spans)
        shown += [f"{len(tokens)} tokens, the image counting as one; {trained} trained on:", text]
    return shown
