"""Training data from shards in S3 to packed batches, beside raw requests and beside LLaVA's way of reading.

    python -m tests.bench.reading --samples 1500

All in one run, interleaved, on the same samples: photographs in the sizes of LLaVA's instruction data (the real ones
beside the project where they are, cropped and encoded anew, else pictures of that kind) in shards on a SeaweedFS
server, and for LLaVA's way as files in a local folder with one JSON list. CPU seconds are those of the reading process
alone.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from shellv_core.data.decode import decode_image, padding_color
from shellv_core.data.encoder import ConversationEncoder
from shellv_core.data.lengths import conversation_lengths
from shellv_core.data.loader import PackedLoader, Source
from shellv_core.data.order import BLOCK_SAMPLES
from shellv_core.data.packing import plan_epoch
from shellv_core.data.reader import SplitReader
from shellv_core.data.samples import IMAGE_TOKEN, Conversation, Sample
from shellv_core.storage import InputDirectory, open_store
from shellv_core.storage.seaweedfs import embedded_s3
from tests.bench.packing import MIX
from tests.data.byte_tokenizer import byte_tokenizer
from tests.data.photos import SHARED_IMAGES, photo_like_jpeg
from tests.data.shard_folder import WORDS, shard_folder

SIZE = 336
IMAGE_TOKENS = 576
MAX_TOKENS = 2048
CAPACITY = 8192
BATCH_ROWS = 16
# Width and height, and the share of the instruction data's images: COCO, GQA and Visual Genome, OCR-VQA, TextCaps.
PHOTO_SIZES = {(640, 480): 0.45, (480, 640): 0.12, (500, 375): 0.26, (333, 500): 0.13, (1024, 768): 0.04}
CODESHELL = SHARED_IMAGES.parent / "tokenizers" / "codeshell"


@dataclass
class Cost:
    """What a way of reading took for `tokens` real tokens."""

    wall: float
    cpu: float
    tokens: int
    learned: int


def make_samples(count: int, seed: int) -> list[Sample]:
    """Samples of the modelled mix."""
    generator = np.random.default_rng(seed)
    originals = [Image.open(path).convert("RGB") for path in sorted(SHARED_IMAGES.glob("*.jpg"))]
    originals = originals or [Image.open(io.BytesIO(photo_like_jpeg(n, (1200, 900)))) for n in range(3)]
    shares, has_image, means, _ = (np.asarray(column) for column in zip(*MIX.values(), strict=True))
    samples = []
    for number, kind in enumerate(generator.choice(len(MIX), count, p=shares / shares.sum())):
        image = _photo(originals[number % len(originals)], generator) if has_image[kind] else None
        words = max(8, int(generator.lognormal(np.log(means[kind] * 0.6), 0.4)))
        samples.append(
            Sample(
                key=f"bench-{number:06d}",
                id=str(number),
                conversations=_conversation(generator, min(words, 900), image is not None),
                source="bench",
                image=image,
            )
        )
    return samples


def _photo(original: Image.Image, generator: np.random.Generator) -> bytes:
    width, height = list(PHOTO_SIZES)[generator.choice(len(PHOTO_SIZES), p=list(PHOTO_SIZES.values()))]
    scale = generator.uniform(0.6, 1) * min(original.width / width, original.height / height)
    left = int(generator.uniform(0, original.width - width * scale))
    top = int(generator.uniform(0, original.height - height * scale))
    box = (left, top, left + width * scale, top + height * scale)
    buffer = io.BytesIO()
    original.resize((width, height), Image.Resampling.BICUBIC, box).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _conversation(generator: np.random.Generator, num_words: int, image: bool) -> Conversation:
    turns: Conversation = []
    while num_words > 0:
        question, answer = 8, int(min(num_words, generator.integers(4, 60)))
        text = " ".join(generator.choice(WORDS, question))
        turns.append({"from": "human", "value": f"{IMAGE_TOKEN}\n{text}" if image and not turns else text})
        turns.append({"from": "gpt", "value": " ".join(generator.choice(WORDS, answer))})
        num_words -= question + answer
    return turns


def make_encoder() -> ConversationEncoder:
    """CodeShell's real tokenizer where it is at hand, else one of bytes."""
    if not CODESHELL.is_dir():
        tokenizer = byte_tokenizer()
    else:
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(CODESHELL / "tokenizer.json"))
        tokenizer.add_special_tokens({"eos_token": "<|endoftext|>", "additional_special_tokens": [IMAGE_TOKEN]})
    return ConversationEncoder(tokenizer, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


def read_ours(source: InputDirectory, encoder: ConversationEncoder, workers: int, mean: Sequence[float]) -> Cost:
    """The loader, an epoch from the shards to packs."""
    with SplitReader(source, "train") as reader:
        loader = PackedLoader(
            [Source(reader)], encoder, num_image_tokens=IMAGE_TOKENS, image_size=SIZE, padding=padding_color(mean),
            max_length=CAPACITY, global_batch=4, seed=0, num_workers=workers,
        )  # fmt: skip
        loader.plan(0)

        def batches() -> Iterator[tuple[int, int]]:
            for packs in loader:
                for pack in packs:
                    yield len(pack.input_ids), int((pack.labels >= 0).sum())

        return _cost(batches())


def read_llava(folder: Path, encoder: ConversationEncoder, processor: object) -> Cost:
    """LLaVA's way: the list in memory, and for each row an image opened, squared, processed and a text tokenized.

    As there, the text is tokenized as a whole, and each turn once more for the mask; unlike there, by a fast tokenizer.
    """

    def batches() -> Iterator[tuple[int, int]]:
        rows = json.loads((folder / "rows.json").read_bytes())
        order = np.random.default_rng(0).permutation(len(rows))
        for start in range(0, len(rows), BATCH_ROWS):
            ids, labels, pictures = [], [], []
            for index in order[start : start + BATCH_ROWS]:
                row = rows[index]
                if "image" in row:
                    picture = Image.open(folder / row["image"]).convert("RGB")
                    picture = _squared(picture, padding_color(processor.image_mean))
                    pictures.append(processor.preprocess(picture, return_tensors="pt")["pixel_values"][0])
                one, two = _tokenized(encoder.tokenizer, row["conversations"])
                ids.append(one)
                labels.append(two)
            torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
            torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
            if pictures:
                torch.stack(pictures)
            tokens = sum(len(one) for one in ids) + len(pictures) * (IMAGE_TOKENS - 1)
            yield tokens, sum(int((one[1:] >= 0).sum()) for one in labels)

    return _cost(batches())


def _tokenized(tokenizer: PreTrainedTokenizerBase, turns: Conversation) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of the whole text, and labels from the lengths of its turns by themselves."""
    names = ("USER", " ASSISTANT")
    texts = [f"{names[number % 2]}: {turn['value']}" for number, turn in enumerate(turns)]
    ids = torch.tensor(tokenizer("".join(texts))["input_ids"][:MAX_TOKENS])
    labels = ids.clone()
    position = 0
    for number, text in enumerate(texts):
        length = len(tokenizer(text)["input_ids"])
        if number % 2 == 0:
            labels[position : position + length] = -100
        position += length
    return ids, labels


def _squared(picture: Image.Image, color: tuple[int, ...]) -> Image.Image:
    side = max(picture.size)
    square = Image.new("RGB", (side, side), color)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def read_raw(source: InputDirectory) -> Cost:
    """The shards' bytes in ranges of 8 MiB, four at a time, and nothing done with them."""
    store = open_store(source.uri)
    ranges = [
        (f"{source.uri}/{entry.name}", offset, min(8 << 20, entry.bytes - offset))
        for entry in source.files("train/")
        for offset in range(0, entry.bytes, 8 << 20)
    ]
    with ThreadPoolExecutor(4) as pool:
        return _cost((len(data), 0) for data in pool.map(lambda each: store.read_range(*each), ranges))


def _cost(batches: Iterator[tuple[int, int]]) -> Cost:
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = learned = 0
    for more, more_learned in batches:
        tokens += more
        learned += more_learned
    return Cost(time.perf_counter() - wall, time.process_time() - cpu, tokens, learned)


def stage_seconds(source: InputDirectory, encoder: ConversationEncoder, padding: tuple[int, ...]) -> dict[str, float]:
    """CPU seconds of each stage over an epoch, one after another on one thread."""
    seconds: dict[str, float] = {}

    def timed(name: str, work: Iterable[object]) -> None:
        begun = time.process_time()
        for _ in work:
            pass
        seconds[name] = time.process_time() - begun

    with SplitReader(source, "train", num_requests=1) as reader:
        index = reader.index
        lengths = conversation_lengths(reader, encoder)
        offsets = [lengths.offsets]
        tokens = lengths.with_images(IMAGE_TOKENS)
        timed("plan and pack", (plan_epoch(offsets, tokens, CAPACITY, 4, 0, epoch) for epoch in [0]))
        store = open_store(source.uri)
        order = np.random.default_rng(0).permutation(-(-len(reader) // BLOCK_SAMPLES)) * BLOCK_SAMPLES
        spans = [(first, min(first + BLOCK_SAMPLES, len(reader))) for first in order]

        ranges = [
            (f"{source.uri}/{index.shards[span.shard]}", span.offset, span.size)
            for first, stop in spans
            for span in reader._spans(np.arange(first, stop))
        ]
        timed("fetch", (store.read_range(*each) for each in ranges))
        blobs = [store.read_range(*each) for each in ranges]
        timed("verify", (hashlib.sha256(blob).digest() for blob in blobs))
        blobs.clear()
        timed("(as a stream: fetch, verify, parse)", reader.samples())
        samples = list(reader.samples())
    records = [sample.to_json() for sample in samples]
    timed("parse", (Sample.from_json("k", record, b"x") for record in records if b'"image":null' not in record))
    images = [sample.image for sample in samples if sample.image is not None]
    timed("decode", (_decode_only(image) for image in images))
    timed("decode, pad and resize", (decode_image(image, SIZE, padding) for image in images))
    conversations = [one for sample in samples for one in encoder.conversations(sample)]
    chunks = [conversations[start : start + 10] for start in range(0, len(conversations), 10)]
    timed("tokenize", (encoder(chunk, IMAGE_TOKENS) for chunk in chunks))
    seconds["pad and resize"] = seconds.pop("decode, pad and resize") - seconds["decode"]
    return seconds


def _decode_only(image: bytes) -> np.ndarray:
    import simplejpeg

    pixels: np.ndarray = simplejpeg.decode_jpeg(image, "RGB")
    return pixels


def main(argv: Sequence[str] | None = None) -> int:
    """Make the data, read it each way and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1500)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    encoder = make_encoder()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["SHELLV_HOME"] = str(folder / "home")
        samples = make_samples(options.samples, 0)
        _write_files(folder, samples)
        with embedded_s3(folder / "s3") as bucket:
            source = shard_folder(f"s3://{bucket}/bench", folder / "work", {"train": samples}, 400)
            with SplitReader(source, "train") as reader:
                conversation_lengths(reader, encoder)
            ways: dict[str, Callable[[], Cost]] = {
                "shards, packed (this project)": lambda: read_ours(
                    source, encoder, options.workers, processor.image_mean
                ),
                "LLaVA's way": lambda: read_llava(folder, encoder, processor),
                "raw ranges": lambda: read_raw(source),
            }
            costs: dict[str, list[Cost]] = {way: [] for way in ways}
            for _ in range(options.rounds):
                for way, read in ways.items():
                    costs[way].append(read())
            stages = stage_seconds(source, encoder, padding_color(processor.image_mean))
            num_bytes = sum(entry.bytes for entry in source.files("train/"))
    _print(costs, stages, num_bytes, samples)
    return 0


def _write_files(folder: Path, samples: Sequence[Sample]) -> None:
    rows = []
    for sample in samples:
        row: dict[str, object] = {"id": sample.id, "conversations": sample.conversations}
        if sample.image is not None and sample.image_name is not None:
            (folder / sample.image_name).write_bytes(sample.image)
            row["image"] = sample.image_name
        rows.append(row)
    (folder / "rows.json").write_text(json.dumps(rows))


def _print(costs: dict[str, list[Cost]], stages: dict[str, float], num_bytes: int, samples: Sequence[Sample]) -> None:
    images = [sample.image for sample in samples if sample.image is not None]
    mean_bytes = sum(map(len, images)) / len(images)
    print(
        f"{len(samples)} samples, {len(images)} with a photo of {mean_bytes / 1024:.0f} KiB, {num_bytes / 1e6:.0f} MB\n"
    )
    print("| way | tokens/s per core | learned tokens/s per core | samples/s per core | samples/s | MB/s |")
    print("|---" * 6 + "|")
    rates = {}
    for way, rounds in costs.items():
        cpu, wall = (statistics.median(getattr(cost, name) for cost in rounds) for name in ("cpu", "wall"))
        raw = way == "raw ranges"
        rates[way] = (rounds[0].tokens / cpu, num_bytes / wall / 1e6, num_bytes / cpu / 1e6, rounds[0].learned / cpu)
        tokens = "|  |" if raw else f"| {rates[way][0]:.0f} | {rates[way][3]:.0f}"
        print(f"| {way} {tokens} | {len(samples) / cpu:.0f} | {len(samples) / wall:.0f} | {rates[way][1]:.0f} |")
    ours, llava, raw_rate = rates.values()
    print(f"\nTrained tokens per second per core: {ours[0] / llava[0]:.1f} times LLaVA's way.")
    print(
        f"Share of the raw ranges' bandwidth: {ours[1] / raw_rate[1]:.3f} of the wall's,"
        f" {ours[2] / raw_rate[2]:.3f} of the core's."
    )
    print("\n| stage | ms per sample | share |\n|---|---|---|")
    total = sum(seconds for stage, seconds in stages.items() if stage[0] != "(")
    for stage, seconds in stages.items():
        share = "" if stage[0] == "(" else f"{seconds / total:.1%}"
        print(f"| {stage} | {1000 * seconds / len(samples):.3f} | {share} |")


if __name__ == "__main__":
    raise SystemExit(main())
