"""Random requests, and what transformers' own `generate` answers to them."""

from __future__ import annotations

import random
from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from shellv_core.serving.engine import GenerationRequest, ImagePart, Message, TextPart
from tests.serving.tiny_model import WORDS

COLORS = ("red", "green", "blue", "white", "purple", "orange")


class _Additive(LogitsProcessor):
    """The penalties and the bias of OpenAI's API, and no end before the shortest length, one loop a token."""

    def __init__(self, request: GenerationRequest, prompt_length: int, end_ids: list[int]) -> None:
        self.request, self.prompt_length, self.end_ids = request, prompt_length, end_ids

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores, said = scores.clone(), input_ids[0, self.prompt_length :].tolist()
        for token_id in set(said):
            scores[0, token_id] -= self.request.frequency_penalty * said.count(token_id)
            scores[0, token_id] -= self.request.presence_penalty
        for token_id, bias in self.request.logit_bias.items():
            scores[0, token_id] += bias
        if len(said) < self.request.min_tokens:
            scores[0, self.end_ids] = -torch.inf
        return scores


def picture(rng: random.Random) -> Image.Image:
    image = Image.new("RGB", (rng.randint(20, 60), rng.randint(20, 60)), rng.choice(COLORS))
    image.paste(rng.choice(COLORS), (3, 3, rng.randint(6, 18), rng.randint(6, 18)))
    return image


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS[:-3]) for _ in range(count))


def random_requests(
    count: int, adapters: list[str | None], seed: int = 0, longest: int = 40
) -> list[GenerationRequest]:
    """Text and pictures, one turn to three, some sharing their beginning, every rule of sampling."""
    rng = random.Random(seed)
    pictures = [picture(rng) for _ in range(6)]
    openings = [words(rng, 30) for _ in range(3)]
    requests = []
    for _ in range(count):
        messages = []
        for turn in range(rng.choice([1, 1, 2])):
            if turn:
                messages.append(Message("assistant", (TextPart(words(rng, rng.randint(1, 10))),)))
            parts: list[Any] = [ImagePart(rng.choice(pictures)) for _ in range(rng.choice([0, 0, 1, 1, 2]))]
            opening = rng.choice([*openings, ""])
            messages.append(Message("user", (*parts, TextPart(f"{opening} {words(rng, rng.randint(1, 25))}".strip()))))
        options: dict[str, Any] = {"max_tokens": rng.randint(1, longest), "adapter": rng.choice(adapters)}
        if rng.random() < 0.6:
            options |= {"temperature": rng.choice([0.5, 0.8, 1.0, 1.3]), "seed": rng.randrange(2**31)}
            options |= rng.choice([{}, {"top_p": 0.8}, {"top_k": 20}, {"min_p": 0.05}, {"top_p": 0.9, "top_k": 50}])
        options |= rng.choice([{}, {"repetition_penalty": 1.2}, {"frequency_penalty": 0.7}, {"presence_penalty": 0.9}])
        if rng.random() < 0.2:
            options["logit_bias"] = {rng.randrange(4, 250): rng.choice([-100.0, 3.0]) for _ in range(3)}
        if rng.random() < 0.3:
            options["stop"] = tuple(rng.choice("aeiost") for _ in range(rng.randint(1, 2)))
        if rng.random() < 0.2:
            options["min_tokens"] = rng.randint(1, options["max_tokens"])
        if rng.random() < 0.2:
            options |= {"logprobs": True, "top_logprobs": 3}
        requests.append(GenerationRequest(tuple(messages), **options))
    return requests


def generate(model: Any, processor: Any, request: GenerationRequest) -> list[int]:
    """The tokens that transformers generates, stop strings left aside."""
    conversation = [
        {
            "role": message.role,
            "content": [
                {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
                for part in message.parts
            ],
        }
        for message in request.messages
    ]
    images = [part.image for message in request.messages for part in message.parts if isinstance(part, ImagePart)]
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
    inputs = processor(text=prompt, images=images or None, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    processors: list[LogitsProcessor] = []
    if request.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(request.repetition_penalty))
    processors.append(_Additive(request, length, [processor.tokenizer.eos_token_id]))
    options: dict[str, Any] = {"do_sample": False}
    if request.temperature > 0:
        options = {"do_sample": True, "temperature": request.temperature, "top_k": request.top_k}
        options |= {"top_p": request.top_p, "min_p": request.min_p or None}
        torch.manual_seed(request.seed)
    with torch.inference_mode():
        output = model.generate(
            **inputs, max_new_tokens=request.max_tokens, logits_processor=LogitsProcessorList(processors), **options
        )
    return output[0, length:].tolist()
