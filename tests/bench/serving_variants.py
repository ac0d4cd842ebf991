"""One random model served in four ways, each a process of its own.

    python -m tests.bench.serving_variants slots MODEL --port 8000 --slots 32 --threads 2

The same HTTP layer stands before all; `tests.bench.serving` starts and measures them.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from shellv_core.serving.detokenizer import Detokenizer
from shellv_core.serving.engine import (
    AdapterInfo,
    EngineHealth,
    EngineStats,
    GenerationRequest,
    Message,
    TokenEvent,
)
from shellv_core.serving.prompt import Prompt, PromptEncoder

VARIANTS = ("slots", "serial", "batches", "threads")
#: LLaVA's model worker: a semaphore before threads that all run `generate` on one model.
NUM_THREADS = 5
LARGEST_BATCH = 32
Told = Callable[[Sequence[int]], None]


class GenerateEngine:
    """An engine that answers with transformers' `generate`, greedily and in exact lengths; no more than is measured."""

    def __init__(self, model: Any, processor: Any) -> None:
        self._model, self._processor = model, processor
        self._encoder = PromptEncoder(processor)
        self._preparation = ThreadPoolExecutor(1)
        self.context_length = int(model.config.get_text_config().max_position_embeddings)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        loop = asyncio.get_running_loop()
        prompt = await loop.run_in_executor(self._preparation, self._encoder.encode, request.messages)
        length, prompt_tokens = request.max_tokens or 1, len(prompt.token_ids)
        yield TokenEvent("", prompt_tokens, 0)
        came: asyncio.Queue[Sequence[int]] = asyncio.Queue()
        work = asyncio.create_task(
            self.answer(prompt, length, lambda ids: loop.call_soon_threadsafe(came.put_nowait, ids))
        )
        detokenizer, count = Detokenizer(self._processor.tokenizer), 0
        try:
            while count < length:
                ids = await came.get()
                text = "".join(detokenizer.push(token_id) for token_id in ids)
                count += len(ids)
                text += detokenizer.finish() if count == length else ""
                yield TokenEvent(text, prompt_tokens, count, "length" if count == length else None, tuple(ids))
        finally:
            await work

    async def answer(self, prompt: Prompt, length: int, told: Told) -> None:
        """Compute `length` tokens and tell them as they come."""
        raise NotImplementedError

    async def count_tokens(self, messages: Sequence[Message]) -> int:
        return len(self._encoder.encode(tuple(messages)).token_ids)

    def adapters(self) -> tuple[AdapterInfo, ...]:
        return ()

    def health(self) -> EngineHealth:
        return EngineHealth(True, True)

    def stats(self) -> EngineStats:
        return EngineStats(0, 0)

    async def drain(self, deadline_seconds: float) -> None:
        """Nothing to wait for."""

    def generated(self, prompts: Sequence[Prompt], lengths: Sequence[int], streamer: Any = None) -> list[list[int]]:
        """Answers of one `generate`, prompts padded on the left, each cut to its length."""
        width, pad = max(len(prompt.token_ids) for prompt in prompts), self._processor.tokenizer.pad_token_id
        rows = [[pad] * (width - len(prompt.token_ids)) + prompt.token_ids for prompt in prompts]
        masks = [[0] * (width - len(prompt.token_ids)) + [1] * len(prompt.token_ids) for prompt in prompts]
        pixels = [each for prompt in prompts if (each := prompt.pixel_values) is not None]
        images = {"pixel_values": torch.cat(pixels)} if pixels else {}
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=torch.tensor(rows),
                attention_mask=torch.tensor(masks),
                max_new_tokens=max(lengths),
                min_new_tokens=max(lengths),
                do_sample=False,
                streamer=streamer,
                **images,
            )
        return [answer[:length] for answer, length in zip(output[:, width:].tolist(), lengths, strict=True)]


class _Streamer:
    """Tells each token; the first call brings the prompt."""

    def __init__(self, told: Told) -> None:
        self._told, self._begun = told, False

    def put(self, value: Any) -> None:
        if self._begun:
            self._told(value.reshape(-1).tolist())
        self._begun = True

    def end(self) -> None:
        pass


class FiveThreads(GenerateEngine):
    """LLaVA's way: up to five answers at once, each `generate` in a thread."""

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor)
        self._places, self._pool = asyncio.Semaphore(NUM_THREADS), ThreadPoolExecutor(NUM_THREADS)

    async def answer(self, prompt: Prompt, length: int, told: Told) -> None:
        """See `GenerateEngine.answer`."""
        async with self._places:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._pool, self.generated, [prompt], [length], _Streamer(told))


class Batches(GenerateEngine):
    """Run to completion: takes all that waits and answers it together; nothing joins before the longest has ended.

    transformers streams no batch, so an answer's tokens come with its batch's end.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor)
        self._waiting: list[tuple[Prompt, int, Told, asyncio.Future[None]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def answer(self, prompt: Prompt, length: int, told: Told) -> None:
        """See `GenerateEngine.answer`."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((prompt, length, told, done))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        await done

    async def _work(self) -> None:
        while self._waiting:
            # Those that arrive together are let in together.
            await asyncio.sleep(0.02)
            batch, self._waiting = self._waiting[:LARGEST_BATCH], self._waiting[LARGEST_BATCH:]
            prompts, lengths = [each[0] for each in batch], [each[1] for each in batch]
            answers = await asyncio.to_thread(self.generated, prompts, lengths)
            for (_, _, told, done), answer in zip(batch, answers, strict=True):
                told(answer)
                done.set_result(None)


def build_bench_model(folder: Path) -> int:
    """Write a random Starcoder2 of 30 million parameters that sees 144 image tokens a picture, with its processor;
    parameters of its language model."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Starcoder2Config

    from tests.serving.tiny_model import build_processor

    processor = build_processor()
    processor.patch_size = 8
    processor.image_processor.size = {"shortest_edge": 96}
    processor.image_processor.crop_size = {"height": 96, "width": 96}
    torch.manual_seed(0)
    tokenizer = processor.tokenizer
    text = Starcoder2Config(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=8192,
        max_position_embeddings=1024,
        sliding_window=None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.08,
        tie_word_embeddings=False,
    )
    vision = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=96,
        patch_size=8,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        # Only tokens that the small tokenizer knows, and no end, so that lengths are those asked for.
        model.lm_head.weight[len(tokenizer) :] = 0
        model.lm_head.weight[tokenizer.eos_token_id] = 0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return sum(
        each.numel() for each in itertools.chain(model.model.language_model.parameters(), model.lm_head.parameters())
    )


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("model", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    from shellv_core.models.compose import load_model
    from shellv_core.serving.api import create_app
    from shellv_core.serving.http.config import ApiConfig, Timeouts
    from shellv_core.serving.http.server import Server, bind
    from shellv_core.serving.models import FixedModels, ServedModel
    from shellv_core.serving.transformers_engine import EngineConfig, TransformersEngine

    model, processor = load_model(args.model)
    # Who waits long is the slow variants' figure, not an error.
    patient = Timeouts(request_seconds=3600, first_token_seconds=3600, idle_seconds=3600)
    engine: Any
    if args.variant in ("slots", "serial"):
        config = EngineConfig(batching=args.variant, slots=args.slots, max_waiting=512, max_wait_seconds=3600)
        engine = TransformersEngine(model, processor, config)
    else:
        engine = {"batches": Batches, "threads": FiveThreads}[args.variant](model, processor)
    models = FixedModels(ServedModel(engine, args.variant, "0" * 64))
    api = ApiConfig(timeouts=patient)
    with bind("127.0.0.1", args.port) as listener:
        Server(create_app(models, api), models, api.connection).run(sockets=[listener])


if __name__ == "__main__":
    main()
