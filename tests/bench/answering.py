"""How much faster than one question at a time an evaluation is answered, and whether with the same answers.

    python -m tests.bench.answering --threads 2

The nano preset's model on scenes: POPE's three splits and Hal-Eval. Without ``--model`` its weights are random, wide
enough for answers to differ from picture to picture; speed does not depend on what they are. The two ways take turns,
part by part, so that another program's load falls on both.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from shellv_core.config import build_config
from shellv_core.data.conversation import encode_prompt
from shellv_core.data.shards import read_shards
from shellv_core.evaluation.answers import Prompt, answer_all
from shellv_core.evaluation.generator import LlavaGenerator
from shellv_core.models.compose import build_model, load_model
from shellv_core.stages import prepare_data
from shellv_core.stages.evaluate import EvaluateConfig
from shellv_core.stages.presets import preset
from shellv_core.storage import InputDirectory
from shellv_core.templates import template_of


def make_data(folder: Path, num_images: int) -> InputDirectory:
    """The nano preset's scenes, no more of them than are asked about."""
    full = preset("nano").prepare_data.model_dump()
    full["scenes"] |= {"num_train": 200, "num_validation": 2 * num_images, "benchmark_images": num_images}
    config = build_config(prepare_data.PrepareDataConfig, full | {"output_uri": (folder / "data").as_uri()})
    return InputDirectory(prepare_data.run(config).output_uri)


def make_model(data: InputDirectory, directory: Path | None) -> tuple[Any, Any]:
    """The model in `directory`, or one of the nano preset with random weights."""
    if directory is not None:
        return load_model(directory)
    texts = [turn["value"] for sample in read_shards(data, "train") for turn in sample.conversations]
    model, processor = build_model(preset("nano").pretrain_projector.model, texts, seed=0)
    with torch.no_grad():
        for parameter in [*model.model.multi_modal_projector.parameters(), *model.model.language_model.parameters()]:
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model, processor


def questions_of(data: InputDirectory, num_questions: int) -> list[Prompt]:
    """Questions of POPE and Hal-Eval, image by image."""
    from shellv_core.stages.evaluate_asking import read_benchmarks_of

    benchmarks = [each for each in read_benchmarks_of(EvaluateConfig(), data) if each.key[0] in ("pope", "hal_eval")]
    prompts = [
        Prompt(question.image, question.prompt, benchmark.max_new_tokens)
        for benchmark in benchmarks
        for question in benchmark.questions
    ]
    order = {image: number for number, image in enumerate(dict.fromkeys(prompt.image for prompt in prompts))}
    return sorted(prompts, key=lambda prompt: order[prompt.image])[:num_questions]


def one_at_a_time(model: Any, processor: Any, prompt: Prompt, image: bytes) -> str:
    """What anyone would write: one picture, one question, ``generate``."""
    content = [{"type": "image"}, {"type": "text", "text": prompt.text}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    picture = Image.open(io.BytesIO(image)).convert("RGB")
    pixel_values = processor.image_processor(images=[picture], return_tensors="pt")["pixel_values"]
    ids = encode_prompt(processor.tokenizer, text, template_of(processor))
    token = model.config.image_token_id
    place = ids.index(token)
    ids = torch.tensor([[*ids[:place], *[token] * model.config.image_seq_length, *ids[place + 1 :]]])
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixel_values,
            do_sample=False,
            max_new_tokens=prompt.max_new_tokens,
        )
    return str(processor.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def main(argv: Sequence[str] | None = None) -> int:
    """Print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model directory, such as that of a nano run")
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--parts", type=int, default=4, help="so many turns")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["SHELLV_HOME"] = str(folder / "home")
        data = make_data(folder, -(-options.questions // 20))
        model, processor = make_model(data, options.model)
        images = {
            str(sample.image_name): sample.image
            for sample in read_shards(data, "validation")
            if sample.image is not None
        }
        prompts = questions_of(data, options.questions)
        seconds = {"one at a time": 0.0, "batched": 0.0}
        same, texts = 0, set()
        size = -(-len(prompts) // options.parts)
        for start in range(0, len(prompts), size):
            part = prompts[start : start + size]
            begin = time.perf_counter()
            single = [one_at_a_time(model, processor, prompt, images[prompt.image]) for prompt in part]
            middle = time.perf_counter()
            generator = LlavaGenerator(model, processor)
            answered = answer_all(list(dict.fromkeys(part)), generator, images, folder / f"log-{start}").texts
            seconds["one at a time"] += middle - begin
            seconds["batched"] += time.perf_counter() - middle
            same += sum(answered[prompt] == text for prompt, text in zip(part, single, strict=True))
            texts.update(single)
            print(
                f"{start + len(part)} questions: {seconds['one at a time'] / seconds['batched']:.1f} times", flush=True
            )
    print(
        f"\n{len(prompts)} questions ({len(set(prompts))} distinct), {len({each.image for each in prompts})} images,"
        f" {options.threads} threads, load {os.getloadavg()[0]:.1f}\n"
        f"one at a time {seconds['one at a time']:.1f} s, batched {seconds['batched']:.1f} s:"
        f" {seconds['one at a time'] / seconds['batched']:.1f} times as fast\n"
        f"the same answer to {same} of {len(prompts)} questions; {len(texts)} different answers"
    )
    return 0 if same == len(prompts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
