"""Committed outputs that evaluate takes: data of a few pictures with their benchmarks, and tiny random models."""

import json

from shellv_core.data.samples import Sample, SampleObject
from shellv_core.data.shards import write_shard
from shellv_core.storage import Manifest, OutputDirectory
from tests.evaluation.tiny_llava import picture, save_tiny_llava

OBJECTS = (["dog"], ["cat", "dog"], ["car"], ["bus"], ["cat"], ["car", "bus"])


def commit(output, stage, **details):
    manifest = Manifest(stage=stage, fingerprint=output.fingerprint, library_version="0", config={}, details=details)
    output.commit(manifest)
    return output.uri


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def make_data(root, work, with_images=True, num_images=6):
    output = OutputDirectory(f"{root}/data-{with_images}", "data")
    output.begin()
    samples = [
        Sample(
            f"v{index}",
            f"v{index}",
            [],
            "test",
            picture(index),
            "png",
            objects=(SampleObject(OBJECTS[index % len(OBJECTS)][0]),),
        )
        for index in range(num_images if with_images else 1)
    ]
    shard = write_shard(samples, output, "validation/validation-000000.tar", work)
    names = [f"v{index}.png" for index in range(num_images)]
    pope = [
        {"question_id": 1 + 2 * index + place, "image": name, "text": f"is there a {word} ?", "label": label}
        for index, name in enumerate(names)
        for place, (word, label) in enumerate([(OBJECTS[index % len(OBJECTS)][0], "yes"), ("of", "no")])
    ]
    for split in ("random", "popular", "adversarial"):
        output.put_bytes(json_lines(pope), f"benchmarks/pope/{split}.jsonl")
    hal_eval = [
        {
            "image": name,
            "caption": "a dog",
            "hal_caption": [{"type": kind, "caption": f"a cat {kind}"} for kind in ("object", "event")],
        }
        for name in names
    ]
    output.put_bytes(json.dumps(hal_eval).encode(), "benchmarks/hal_eval/scenes.json")
    chair = [
        {"image": name, "objects": OBJECTS[index % len(OBJECTS)], "captions": []} for index, name in enumerate(names)
    ]
    output.put_bytes(json_lines(chair), "benchmarks/chair/scenes.jsonl")
    shards = [{"name": shard.name, "num_samples": shard.num_samples, "bytes": shard.bytes, "sha256": shard.sha256}]
    splits = {"validation": {"num_samples": shard.num_samples, "shards": shards}}
    return commit(output, "prepare_data", splits=splits)


def make_model(root, work, seed):
    save_tiny_llava(work / f"model-{seed}", seed)
    output = OutputDirectory(f"{root}/model-{seed}", f"model-{seed}")
    output.begin()
    output.put_tree(work / f"model-{seed}", "model")
    return commit(output, "merge_lora")
