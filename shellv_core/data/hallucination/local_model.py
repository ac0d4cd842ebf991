"""Answers by a causal language model in a local directory; torch and transformers are imported inside functions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shellv_core.data.hallucination.captions import RewriteCounts
from shellv_core.data.hallucination.config import TransformersConfig
from shellv_core.data.hallucination.language_model import INSTRUCTION, chat_messages
from shellv_core.endpoint.asking import Reply
from shellv_core.errors import ModelError
from shellv_core.progress import Progress


class LocalModel:
    """Greedy answers in batches, with the tokenizer's chat template where it has one.

    Raises:
        ModelError: if the directory holds no causal language model with its tokenizer.
    """

    def __init__(self, config: TransformersConfig) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._config = config
        path = Path(config.path)
        if not config.path or not (path / "config.json").is_file():
            raise ModelError(
                f"transformers.path={config.path!r} is no model directory (it has no config.json); give the folder of "
                f"a causal language model with its tokenizer."
            )
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True, padding_side="left")
            model: Any = AutoModelForCausalLM.from_pretrained(
                path, local_files_only=True, dtype=getattr(torch, config.dtype)
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} does not hold a causal language model with its tokenizer: {error}") from None
        self._model: Any = model.to(config.device).eval()
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        if self._tokenizer.pad_token_id is None:
            raise ModelError(f"the tokenizer in {path} has neither a padding token nor an end token; add one.")

    def answer(self, prompts: Sequence[str], counts: RewriteCounts) -> list[Reply]:
        """One answer for each prompt; a prompt too long for the model has the fault "prompt too long"."""
        answers: list[Reply] = []
        with Progress(len(prompts), "language model", "captions") as progress:
            for start in range(0, len(prompts), self._config.batch_size):
                batch = prompts[start : start + self._config.batch_size]
                answers.extend(self._answer_batch(batch, counts))
                progress.update(len(batch))
        return answers

    def _answer_batch(self, prompts: Sequence[str], counts: RewriteCounts) -> list[Reply]:
        import torch

        texts = [self._templated(prompt) for prompt in prompts]
        encoded = self._tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not self._has_template)
        longest = encoded["input_ids"].shape[1] + self._config.max_new_tokens
        limit = getattr(self._model.config, "max_position_embeddings", None)
        if limit is not None and longest > limit:
            if len(prompts) == 1:
                return [Reply(fault="prompt too long")]
            return [answer for prompt in prompts for answer in self._answer_batch([prompt], counts)]
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=encoded["input_ids"].to(self._config.device),
                attention_mask=encoded["attention_mask"].to(self._config.device),
                max_new_tokens=self._config.max_new_tokens,
                do_sample=False,
                pad_token_id=self._tokenizer.pad_token_id,
            )
        answered = output[:, encoded["input_ids"].shape[1] :]
        counts.input_tokens += int(encoded["attention_mask"].sum())
        counts.output_tokens += int((answered != self._tokenizer.pad_token_id).sum())
        return [Reply(text) for text in self._tokenizer.batch_decode(answered, skip_special_tokens=True)]

    @property
    def _has_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def _templated(self, prompt: str) -> str:
        if self._has_template:
            return str(
                self._tokenizer.apply_chat_template(chat_messages(prompt), tokenize=False, add_generation_prompt=True)
            )
        return f"{INSTRUCTION}\n\n{prompt}\nJSON: "
