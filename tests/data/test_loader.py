from __future__ import annotations

import io
import itertools
import os
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shellv_core.data.decode import decode_image, normalize, padding_color
from shellv_core.data.encoder import ConversationEncoder
from shellv_core.data.lengths import IDENTITY_DETAIL, conversation_lengths
from shellv_core.data.loader import IGNORE_INDEX, NO_IMAGE, PackedBatch, PackedLoader, Source
from shellv_core.data.reader import SplitReader
from shellv_core.data.samples import Sample
from shellv_core.errors import ConfigError, DataError, IntegrityError
from shellv_core.models.compose import num_image_tokens
from shellv_core.storage import InputDirectory, Manifest
from tests.data.byte_tokenizer import byte_encoder
from tests.data.shard_folder import random_samples, shard_folder
from tests.storage.faulty_proxy import Faults, FaultyProxy
from tests.training.tiny import CLIP, tiny_model

SAMPLES = random_samples(90, seed=5)
OTHERS = random_samples(30, seed=6, prefix="o")
ENCODER = byte_encoder()
GRAY = (122, 116, 104)
IMAGE_TOKENS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    shard_folder((path / "main").as_uri(), path / "work", {"train": SAMPLES})
    shard_folder((path / "other").as_uri(), path / "work", {"train": OTHERS})
    return path


@pytest.fixture
def reader(folder: Path) -> Iterator[SplitReader]:
    with SplitReader(InputDirectory((folder / "main").as_uri()), "train") as reader:
        yield reader


@pytest.fixture
def other(folder: Path) -> Iterator[SplitReader]:
    with SplitReader(InputDirectory((folder / "other").as_uri()), "train") as reader:
        yield reader


def make_loader(*sources: SplitReader | Source, **options: object) -> PackedLoader:
    settings: dict[str, object] = {
        "num_image_tokens": IMAGE_TOKENS, "image_size": 16, "padding": GRAY, "max_length": 700, "global_batch": 4,
        "seed": 7,
    }  # fmt: skip
    wrapped = [source if isinstance(source, Source) else Source(source) for source in sources]
    return PackedLoader(wrapped, ENCODER, **(settings | options))


def equal(first: PackedBatch, second: PackedBatch) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in ((getattr(first, field.name), getattr(second, field.name)) for field in fields(PackedBatch))
    )


def test_an_epoch_holds_every_conversation_once_as_it_is_encoded(reader: SplitReader) -> None:
    loader = make_loader(reader)
    by_key = {sample.key: sample for sample in SAMPLES}
    seen: Counter[tuple[str, bytes]] = Counter()
    for packs in loader:
        for pack in packs:
            assert len(pack.input_ids) == pack.cu_seqlens[-1] <= 700
            for number, (start, stop) in enumerate(zip(pack.cu_seqlens[:-1], pack.cu_seqlens[1:], strict=True)):
                sample = by_key[pack.keys[number]]
                ids, labels = pack.input_ids[start:stop], pack.labels[start:stop]
                seen[sample.key, ids.numpy().tobytes()] += 1
                expected = {
                    one.astype(np.int64).tobytes(): two.astype(np.int64)
                    for one, two in ENCODER(ENCODER.conversations(sample), IMAGE_TOKENS)
                }[ids.numpy().tobytes()]
                expected[0] = IGNORE_INDEX
                assert (labels.numpy() == expected).all()
                assert pack.position_ids[start:stop].tolist() == list(range(stop - start))
                row = int(pack.image_index[number])
                if sample.image is None:
                    assert row == NO_IMAGE
                else:
                    assert torch.equal(pack.images[row], decode_image(sample.image, 16, GRAY))
                    assert pack.captions[row] == sample.caption
                    assert pack.hallucinated[row] == sample.hallucinated_captions
    expected_count = Counter(
        (sample.key, ids.astype(np.int64).tobytes())
        for sample in SAMPLES
        for ids, _ in ENCODER(ENCODER.conversations(sample), IMAGE_TOKENS)
    )
    assert seen == expected_count
    assert (loader.epoch, loader.step) == (1, 0)


def test_documents_share_the_image_of_their_sample(folder: Path, tmp_path: Path) -> None:
    several = [replace(SAMPLES[0], more_conversations=(SAMPLES[0].conversations,) * 2)]
    shard_folder((tmp_path / "one").as_uri(), tmp_path / "work", {"train": several})
    with SplitReader(InputDirectory((tmp_path / "one").as_uri()), "train") as reader:
        ((pack,),) = list(make_loader(reader, max_length=5000))
    assert pack.image_index.tolist() == [0, 0, 0]
    assert len(pack.images) == 1


def test_a_model_sees_in_a_pack_what_it_sees_alone(folder: Path) -> None:
    """Logits of a real LLaVA model with packed documents and their images are those of each document by itself."""
    model, processor = tiny_model(CLIP, samples=SAMPLES)
    model.eval()
    tokenizer, settings = processor.tokenizer, processor.image_processor
    encoder = ConversationEncoder(tokenizer, model.config.image_token_id)
    with SplitReader(InputDirectory((folder / "main").as_uri()), "train") as reader, torch.no_grad():
        loader = PackedLoader(
            [Source(reader)], encoder, num_image_tokens=num_image_tokens(model), image_size=28,
            padding=padding_color(settings.image_mean), max_length=250, global_batch=4, seed=0, too_long="leave_out",
        )  # fmt: skip
        pack = next(pack for packs in loader for pack in packs if 2 <= len(pack.images) < len(pack.keys))
        values = normalize(pack.images, settings.image_mean, settings.image_std)
        packed = model(
            input_ids=pack.input_ids[None],
            pixel_values=values[pack.image_index[pack.image_index != NO_IMAGE]],
            position_ids=pack.position_ids[None],
            use_cache=False,
        ).logits[0]
        by_key = {sample.key: sample for sample in SAMPLES}
        for number, (start, stop) in enumerate(itertools.pairwise(pack.cu_seqlens.tolist())):
            image = by_key[pack.keys[number]].image
            pictures = None
            if image is not None:
                picture = Image.open(io.BytesIO(image)).convert("RGB")
                pictures = settings(images=[picture], return_tensors="pt")["pixel_values"]
            alone = model(input_ids=pack.input_ids[None, start:stop], pixel_values=pictures, use_cache=False).logits[0]
            # The picture's decoding differs by a rounding here and there.
            assert (packed[start:stop] - alone).abs().max() < 0.02 * alone.std()
            assert (packed[start:stop].argmax(-1) == alone.argmax(-1)).float().mean() > 0.95


def test_what_comes_out_does_not_depend_on_workers(reader: SplitReader) -> None:
    one, *others = (list(make_loader(reader, num_workers=number)) for number in (1, 4, 40))
    assert len(one) > 3
    for other in others:
        for first, second in zip(one, other, strict=True):
            assert all(equal(a, b) for a, b in zip(first, second, strict=True))


def test_stopped_anywhere_twenty_times_the_epochs_are_whole(reader: SplitReader) -> None:
    """Each stop changes the number of ranks; what all of them saw together is each epoch exactly once."""
    whole = make_loader(reader, max_length=500)
    assert whole.num_steps(0) > 8
    plain = [[pack.documents.tolist() for pack in packs] for _ in range(3) for packs in whole]
    draw = random.Random(0)
    seen: list[list[list[int]]] = []
    state = make_loader(reader, max_length=500).state_dict()
    stops = 0
    while len(seen) < len(plain):
        world_size = draw.choice([1, 2, 4])
        ranks = [make_loader(reader, max_length=500, rank=rank, world_size=world_size) for rank in range(world_size)]
        for loader in ranks:
            loader.load_state_dict(state)
        steps = draw.randint(1, max(1, len(plain) // 15))
        for packs in zip(*ranks, strict=True):
            merged: list[list[int]] = [[]] * sum(len(mine) for mine in packs)
            for rank, mine in enumerate(packs):
                merged[rank::world_size] = [pack.documents.tolist() for pack in mine]
            seen.append(merged)
            steps -= 1
            if not steps:
                stops += 1
                break
        states = [loader.state_dict() for loader in ranks]
        assert all(each == states[0] for each in states)
        state = states[0]
    assert stops >= 20
    assert seen[: len(plain)] == plain
    num_documents = sum(1 + len(sample.more_conversations) for sample in SAMPLES)
    steps_of = [whole.num_steps(epoch) for epoch in range(3)]
    for epoch in range(3):
        steps = plain[sum(steps_of[:epoch]) : sum(steps_of[: epoch + 1])]
        assert sorted(document for step in steps for pack in step for document in pack) == list(range(num_documents))
    assert plain[: steps_of[0]] != plain[steps_of[0] : 2 * steps_of[0]]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_resumed_batches_are_those_of_an_uninterrupted_run(reader: SplitReader, world_size: int) -> None:
    draw = random.Random(world_size)
    for rank in range(world_size):
        whole = list(make_loader(reader, rank=rank, world_size=world_size))
        for _ in range(3):
            stop = draw.randrange(1, len(whole))
            first = make_loader(reader, rank=rank, world_size=world_size)
            taken = list(islice(first, stop))
            second = make_loader(reader, rank=rank, world_size=world_size)
            second.load_state_dict(first.state_dict())
            for expected, packs in zip(whole, taken + list(second), strict=True):
                assert len(expected) == len(packs)
                assert all(equal(a, b) for a, b in zip(expected, packs, strict=True))


def test_threads_do_not_disturb_each_others_tokens() -> None:
    """Texts that name a special token are encoded with another setting of the tokenizer than those that do not."""
    turns = [{"from": "human", "value": "What is </s>?"}, {"from": "gpt", "value": "The end, </s>."}]
    work = [[turns], [SAMPLES[0].conversations]] * 200
    expected = [ENCODER(conversations, IMAGE_TOKENS)[0][0].tobytes() for conversations in work]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda conversations: ENCODER(conversations, IMAGE_TOKENS)[0][0].tobytes(), work))
    assert found == expected


def test_the_last_step_may_leave_ranks_without_packs(reader: SplitReader) -> None:
    loaders = [make_loader(reader, global_batch=32, max_length=3000, rank=rank, world_size=32) for rank in range(32)]
    num_packs = loaders[0].plan(0).num_packs
    assert num_packs < 32
    counts = [[len(packs) for packs in loader] for loader in loaders]
    assert counts == [[1]] * num_packs + [[0]] * (32 - num_packs)


def test_another_plan_is_refused(reader: SplitReader, other: SplitReader) -> None:
    state = make_loader(reader).state_dict()
    for changed in (
        make_loader(reader, seed=8),
        make_loader(reader, max_length=701),
        make_loader(reader, global_batch=8),
        make_loader(reader, num_image_tokens=6),
        make_loader(reader, samples_per_epoch=91),
        make_loader(other),
        make_loader(Source(reader, 1.0), Source(other, 1.0)),
    ):
        with pytest.raises(ConfigError, match="belongs to another plan"):
            changed.load_state_dict(state)
    with pytest.raises(ConfigError, match="step 10000 of epoch 0, does not exist"):
        make_loader(reader).load_state_dict(state | {"step": 10_000})


def test_sources_mix_by_weight(reader: SplitReader, other: SplitReader) -> None:
    loader = make_loader(Source(reader, 1.0), Source(other, 3.0), samples_per_epoch=100, max_length=2000)
    num_documents = sum(1 + len(sample.more_conversations) for sample in SAMPLES)
    epochs = []
    for _ in range(3):
        samples: Counter[str] = Counter()
        for packs in loader:
            for pack in packs:
                samples.update(pack.keys)
                assert [key[0] == "o" for key in pack.keys] == (pack.documents >= num_documents).tolist()
        by_key = {sample.key: 1 + len(sample.more_conversations) for sample in [*SAMPLES, *OTHERS]}
        assert all(count % by_key[key] == 0 for key, count in samples.items())
        epochs.append(Counter({key: count // by_key[key] for key, count in samples.items()}))
    for epoch in epochs:
        # 25 of 90 and 75 of 30: two whole passes and a half.
        assert sum(count for key, count in epoch.items() if key[0] == "s") == 25
        assert sorted({count for key, count in epoch.items() if key[0] == "o"}) == [2, 3]
    # The large source goes on where the epoch before left it.
    assert len({key for epoch in epochs for key in epoch if key[0] == "s"}) == 75


def test_long_conversations_are_never_lost_in_silence(reader: SplitReader, caplog: pytest.LogCaptureFixture) -> None:
    lengths = conversation_lengths(reader, ENCODER).with_images(IMAGE_TOKENS)
    limit = int(np.quantile(lengths, 0.9))
    count = int((lengths > limit).sum())
    with pytest.raises(DataError, match=rf"{count} of {len(lengths)} documents are longer than a pack of {limit}"):
        make_loader(reader, max_length=limit)
    with caplog.at_level("WARNING"):
        cut = make_loader(reader, max_length=limit, too_long="cut")
        left_out = make_loader(reader, max_length=limit, too_long="leave_out")
    assert cut.num_too_long == left_out.num_too_long == count
    assert f"{count} of {len(lengths)} conversations have more than {limit} tokens" in caplog.text
    for loader, expected in ((cut, range(len(lengths))), (left_out, np.flatnonzero(lengths <= limit))):
        packs = [pack for step in loader for pack in step]
        assert sorted(document for pack in packs for document in pack.documents.tolist()) == list(expected)
        for pack in packs:
            sizes = np.diff(pack.cu_seqlens.numpy())
            assert (sizes == np.minimum(lengths[pack.documents.numpy()], limit)).all()


def test_lengths_are_counted_once_and_kept(reader: SplitReader, monkeypatch: pytest.MonkeyPatch) -> None:
    first = conversation_lengths(reader, ENCODER)
    monkeypatch.setattr(SplitReader, "samples", None)
    second = conversation_lengths(reader, ENCODER)
    assert (first.num_tokens == second.num_tokens).all()
    assert (first.offsets == second.offsets).all()


def test_lengths_of_the_index_are_believed_only_for_their_tokenizer(tmp_path: Path) -> None:
    num_tokens = {
        sample.key: tuple(len(ids) for ids, _ in ENCODER(ENCODER.conversations(sample), 1)) for sample in SAMPLES
    }
    uri = (tmp_path / "data").as_uri()
    source = shard_folder(uri, tmp_path / "work", {"train": SAMPLES}, num_tokens=num_tokens)
    details = source.manifest.details | {IDENTITY_DETAIL: ENCODER.identity}
    manifest: Manifest = source.manifest.model_copy(update={"details": details})
    (tmp_path / "data" / "manifest.json").write_text(manifest.model_dump_json())
    with SplitReader(InputDirectory(uri), "train") as reader:
        from_index = conversation_lengths(reader, ENCODER)
        assert not (Path(os.environ["SHELLV_HOME"]) / "cache" / "lengths").exists()
        counted = conversation_lengths(reader, byte_encoder(tasks=("none",)))
        assert (Path(os.environ["SHELLV_HOME"]) / "cache" / "lengths").exists()
    assert (from_index.num_tokens == counted.num_tokens).all()
    assert (from_index.offsets == counted.offsets).all()
    assert (from_index.has_image == counted.has_image).all()


def test_a_bad_conversation_and_a_bad_image_have_an_address(tmp_path: Path) -> None:
    def loader_of(changed: Sample) -> PackedLoader:
        name = f"data-{len(list(tmp_path.iterdir()))}"
        samples = [*SAMPLES[:2], changed, *SAMPLES[3:6]]
        source = shard_folder((tmp_path / name).as_uri(), tmp_path / "work", {"train": samples})
        return make_loader(SplitReader(source, "train"))

    with pytest.raises(DataError, match=r"train-000000.tar: sample 's-000002' \(bytes .*turn 0"):
        loader_of(replace(SAMPLES[2], conversations=[{"from": "gpt", "value": "x"}] * 2, more_conversations=()))
    with pytest.raises(DataError, match="sample 's-000002': an image of 9 bytes cannot be decoded"):
        list(loader_of(replace(SAMPLES[2], image=b"\xff\xd8garbage")))
    without = [{"from": "human", "value": "no picture?"}, {"from": "gpt", "value": "no"}]
    with pytest.raises(DataError, match=r"'s-000002' \(bytes .* holds 0 image tokens, 1 are expected"):
        loader_of(replace(SAMPLES[2], conversations=without, more_conversations=()))


def test_a_damaged_shard_stops_iteration_by_name(tmp_path: Path) -> None:
    source = shard_folder((tmp_path / "data").as_uri(), tmp_path / "work", {"train": SAMPLES})
    with SplitReader(source, "train") as reader:
        loader = make_loader(reader)
        path = tmp_path / "data" / "train" / "train-000002.tar"
        path.write_bytes(path.read_bytes()[: int(reader.index.offset[70])])
        with pytest.raises(IntegrityError, match=r"train-000002.tar: sample 's-0000\d\d' .* is damaged in store"):
            list(loader)


def test_iteration_can_be_left_and_taken_up(reader: SplitReader) -> None:
    loader = make_loader(reader)
    steps = iter(loader)
    first = next(steps)
    steps.close()
    assert loader.step == 1
    rest = list(loader)
    whole = list(make_loader(reader))
    assert [[pack.keys for pack in packs] for packs in [first, *rest]] == [
        [pack.keys for pack in packs] for packs in whole
    ]


def test_arguments_that_do_not_fit_are_all_named(reader: SplitReader) -> None:
    with pytest.raises(ConfigError) as caught:
        make_loader(Source(reader, 1.0), Source(reader), rank=3, world_size=3, num_workers=0, too_long="drop")
    for part in ("1 of 2 sources", "rank is 3", "num_workers is 0", "too_long is 'drop'"):
        assert part in str(caught.value)


def test_an_epoch_of_packs_through_a_faulty_network(
    bucket_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shard_folder(f"{bucket_uri}/data", tmp_path / "work", {"train": SAMPLES})
    with SplitReader(source, "train") as reader:
        conversation_lengths(reader, ENCODER)
    faults = Faults(reset=0.05, refused=0.05, cut=0.05, stalls=1, seed=2)
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"], faults) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with SplitReader(source, "train", range_bytes=1) as reader:
            keys = Counter(key for packs in make_loader(reader) for pack in packs for key in pack.keys)
            assert keys == Counter({sample.key: 1 + len(sample.more_conversations) for sample in SAMPLES})
            assert reader.statistics.retries >= 3
