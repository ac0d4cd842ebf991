"""Answers of a model directory: ours, or any that transformers knows and that takes chat messages."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LogitsProcessor,
)

from shellv_core.data.ahead import map_ahead
from shellv_core.endpoint.asking import Reply
from shellv_core.errors import EvaluationError, ModelError
from shellv_core.evaluation.answers import AnswerGenerator, Prompt
from shellv_core.evaluation.choosing import Sampling, TokenChooser
from shellv_core.evaluation.generator import BLOCKS_AHEAD, LlavaGenerator, decode
from shellv_core.models.compose import load_model


def load_generator(
    directory: Path, device: torch.device, dtype: torch.dtype, batch_size: int, sampling: Sampling
) -> AnswerGenerator:
    """The generator of a model directory: the fast one for LLaVA, `TransformersGenerator` for everything else.

    Raises:
        ModelError: if there is no model in `directory`, or transformers cannot load it.
    """
    model: Any
    processor: Any
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} holds no model (config.json is missing); give a model directory.")
    if json.loads((directory / "config.json").read_text(encoding="utf-8")).get("model_type") == "llava":
        model, processor = load_model(directory, dtype)
        return LlavaGenerator(model.to(device), processor, batch_size, sampling)
    options: dict[str, Any] = {"local_files_only": True}
    try:
        try:
            model = AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype, **options)
            processor = AutoProcessor.from_pretrained(directory, **options)
        except ValueError:
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options)
            processor = AutoTokenizer.from_pretrained(directory, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"transformers cannot load the model in {directory}: {error} A LLaVA or Shell-V checkpoint of the original"
            " code is converted with `shellv model import`."
        ) from error
    return TransformersGenerator(model.to(device), processor, batch_size, sampling)


class TransformersGenerator:
    """An `AnswerGenerator` on ``generate`` of transformers, in batches of similar length, padded on the left.

    Args:
        model: with `generate`.
        processor: turns chat messages into inputs; a tokenizer for a model without images.
        batch_size: prompts that run together.
        sampling: how tokens are chosen; greedily by default.

    Raises:
        ModelError: if the processor has no chat template or the tokenizer neither a padding nor an end token.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        batch_size: int = 16,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    ) -> None:
        self.model, self.processor, self.batch_size, self.sampling = model.eval(), processor, batch_size, sampling
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.takes_images = processor is not self.tokenizer
        if not processor.chat_template:
            raise ModelError("the model has no chat template; put chat_template.jinja beside its config.json.")
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.tokenizer.pad_token is None:
            raise ModelError("the model's tokenizer has neither a padding token nor an end token; add one.")

    def generate(
        self, blocks: Iterable[Sequence[Prompt]], images: Mapping[str, bytes], answered: Container[Prompt] = ()
    ) -> Iterator[dict[Prompt, Reply]]:
        """Yield replies batch by batch; a batch that is answered whole is left out, any other runs whole."""

        def prepare(batch: list[Prompt]) -> tuple[list[Prompt], Any]:
            return batch, self._inputs(batch, images)

        batches = (batch for block in blocks for batch in self._batches(block))
        todo = (batch for batch in batches if any(prompt not in answered for prompt in batch))
        # One thread: not every processor can be used by two at once.
        with ThreadPoolExecutor(1) as pool:
            for batch, inputs in map_ahead(pool, prepare, todo, BLOCKS_AHEAD):
                yield {prompt: Reply(text) for prompt, text in zip(batch, self._texts(batch, inputs), strict=True)}

    def _batches(self, block: Sequence[Prompt]) -> Iterator[list[Prompt]]:
        groups: dict[tuple[int, bool], list[Prompt]] = {}
        for prompt in sorted(dict.fromkeys(block), key=lambda each: len(each.text)):
            groups.setdefault((prompt.max_new_tokens, bool(prompt.image)), []).append(prompt)
        for group in groups.values():
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size]

    def _inputs(self, batch: Sequence[Prompt], images: Mapping[str, bytes]) -> Any:
        return self.processor.apply_chat_template(
            [[{"role": "user", "content": self._content(prompt, images)}] for prompt in batch],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        )

    def _content(self, prompt: Prompt, images: Mapping[str, bytes]) -> Any:
        if not self.takes_images:
            if prompt.image:
                raise EvaluationError(f"the model takes no images, but {prompt.text!r} is about {prompt.image!r}.")
            return prompt.text
        picture = [{"type": "image", "image": decode(images[prompt.image], prompt.image)}] if prompt.image else []
        return [*picture, {"type": "text", "text": prompt.text}]

    @torch.inference_mode()
    def _texts(self, batch: Sequence[Prompt], inputs: Any) -> list[str]:
        inputs = inputs.to(self.model.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        output = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=batch[0].max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            logits_processor=[_Chosen(TokenChooser(self.sampling, batch))],
        )
        texts = self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]


class _Chosen(LogitsProcessor):
    """Leaves only the token that was chosen, so that greedy search takes it."""

    def __init__(self, choose: TokenChooser) -> None:
        self._choose = choose

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if not torch.isfinite(scores).any(dim=-1).all():
            raise ModelError("the model's logits are not finite (NaN or infinite); its weights are not usable.")
        chosen: Any = torch.full_like(scores, -torch.inf)
        return chosen.scatter_(-1, self._choose(scores)[:, None], 0.0)
