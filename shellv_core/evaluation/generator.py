"""Greedy answers of a LLaVA model, fast for many short questions about few images.

The state (keys and values) of everything up to the image is computed once for each image and shared by all questions
about it; the rest runs in batches of similar length. The tokens are those of ``model.generate`` on single prompts.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import DynamicCache

from shellv_core.data.conversation import encode_prompt
from shellv_core.errors import EvaluationError, ModelError
from shellv_core.evaluation.answers import Prompt
from shellv_core.templates import template_of

LayerStates = list[tuple[torch.Tensor, torch.Tensor]]
"""For each layer: keys and values [images, heads, tokens, head_dim]."""


class LlavaGenerator:
    """An `AnswerGenerator` on a transformers LLaVA model and its processor.

    Args:
        model: ``LlavaForConditionalGeneration`` in evaluation mode.
        processor: with `tokenizer`, `image_processor` and a chat template.
        batch_size: prompts that run together.
    """

    def __init__(self, model: Any, processor: Any, batch_size: int = 128) -> None:
        self.model, self.processor, self.batch_size = model.eval(), processor, batch_size
        self.tokenizer = processor.tokenizer
        self.template = template_of(processor)
        self.image_token_id = int(model.config.image_token_id)
        configured = model.generation_config.eos_token_id
        eos = self.tokenizer.eos_token_id if configured is None else configured
        self.stop_ids = torch.tensor(eos if isinstance(eos, list) else [eos], device=model.device)
        self._tokens: dict[str, tuple[list[int], list[int]]] = {}

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], images: Mapping[str, bytes]) -> list[str]:
        """One answer for each prompt, in order; memory grows with the number of distinct images."""
        names = list(dict.fromkeys(prompt.image for prompt in prompts))
        features = self._image_features([images[name] for name in names], names)
        # Prompts whose text before the image differs cannot share a state; usually there is one group.
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, prompt in enumerate(prompts):
            groups[tuple(self._split(prompt.text)[0])].append(index)
        texts: dict[int, str] = {}
        for head, members in groups.items():
            states = self._image_states(list(head), features)
            members.sort(key=lambda index: (prompts[index].max_new_tokens, len(self._split(prompts[index].text)[1])))
            start = 0
            while start < len(members):
                limit = prompts[members[start]].max_new_tokens
                batch = [
                    index
                    for index in members[start : start + self.batch_size]
                    if prompts[index].max_new_tokens == limit
                ]
                rows = torch.tensor([names.index(prompts[index].image) for index in batch], device=self.model.device)
                tails = [self._split(prompts[index].text)[1] for index in batch]
                texts.update(zip(batch, self._continue(states, rows, tails, limit), strict=True))
                start += len(batch)
        return [texts[index] for index in range(len(prompts))]

    def _image_features(self, files: Sequence[bytes], names: Sequence[str]) -> torch.Tensor:
        """Projected features [images, tokens, hidden_size]."""
        parts = []
        for start in range(0, len(files), self.batch_size):
            pictures = [
                _decode(data, name)
                for data, name in zip(
                    files[start : start + self.batch_size], names[start : start + self.batch_size], strict=True
                )
            ]
            pixels = self.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
            outputs = self.model.get_image_features(
                pixel_values=pixels.to(self.model.device, self.model.dtype), return_dict=True
            )
            parts += list(outputs.pooler_output)
        return torch.stack(parts)

    def _split(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids before the image token and behind it."""
        if text not in self._tokens:
            content = [{"type": "image"}, {"type": "text", "text": text}]
            prompt = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            ids = encode_prompt(self.tokenizer, prompt, self.template)
            if ids.count(self.image_token_id) != 1:
                raise EvaluationError(
                    f"the prompt {text!r} renders with {ids.count(self.image_token_id)} image tokens, one is needed."
                    " Check the model's chat template, and that the question does not contain the image token itself."
                )
            place = ids.index(self.image_token_id)
            self._tokens[text] = (ids[:place], ids[place + 1 :])
        return self._tokens[text]

    def _image_states(self, head: list[int], features: torch.Tensor) -> LayerStates:
        """States of `head` and the image, for each image."""
        before = self._embed([head]).expand(len(features), -1, -1)
        embeds = torch.cat([before, features.to(before.dtype)], dim=1)
        parts: list[LayerStates] = []
        for rows in embeds.split(self.batch_size):
            cache = DynamicCache(config=self.model.config.get_text_config())
            self.model(inputs_embeds=rows, past_key_values=cache, use_cache=True, logits_to_keep=1)
            layers: list[Any] = cache.layers
            parts.append([(layer.keys, layer.values) for layer in layers])
        return [
            (torch.cat([part[layer][0] for part in parts]), torch.cat([part[layer][1] for part in parts]))
            for layer in range(len(parts[0]))
        ]

    def _continue(
        self, states: LayerStates, rows: torch.Tensor, tails: list[list[int]], max_new_tokens: int
    ) -> list[str]:
        """Greedy texts after the state of image ``rows[i]`` and the tokens ``tails[i]``."""
        cache = DynamicCache(config=self.model.config.get_text_config())
        for layer, (keys, values) in enumerate(states):
            cache.update(keys[rows], values[rows], layer)
        past, longest = states[0][0].shape[2], max(map(len, tails))
        pad = int(self.stop_ids[0])
        ids = torch.tensor([[pad] * (longest - len(tail)) + tail for tail in tails], device=rows.device)
        lengths = torch.tensor([len(tail) for tail in tails], device=rows.device)
        columns = torch.arange(longest, device=rows.device)
        real = columns[None] >= longest - lengths[:, None]
        mask = torch.cat([real.new_ones(len(tails), past), real], dim=1).long()
        positions = (past + columns[None] - (longest - lengths[:, None])).clamp(min=0)
        embeds = self._embed(ids)
        finished = torch.zeros(len(tails), dtype=torch.bool, device=rows.device)
        generated: list[torch.Tensor] = []
        for _ in range(max_new_tokens):
            logits = self.model(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            if not torch.isfinite(logits).all():
                raise ModelError("the model's logits are not finite (NaN or infinite); its weights are not usable.")
            tokens = logits.argmax(dim=-1).masked_fill(finished, pad)
            generated.append(tokens)
            finished = finished | torch.isin(tokens, self.stop_ids)
            if bool(finished.all()):
                break
            embeds = self._embed(tokens[:, None])
            mask = torch.cat([mask, mask.new_ones(len(tails), 1)], dim=1)
            positions = positions[:, -1:] + 1
        stops = set(self.stop_ids.tolist())
        return [self._decode_tokens(row, stops) for row in torch.stack(generated, dim=1).tolist()]

    def _decode_tokens(self, tokens: list[int], stops: set[int]) -> str:
        end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
        text: str = self.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        for stop in self.template.stop_strings:
            text = text.partition(stop)[0]
        return text.strip()

    def _embed(self, ids: torch.Tensor | list[list[int]]) -> torch.Tensor:
        tensor = torch.as_tensor(ids, dtype=torch.long, device=self.model.device)
        embeds: torch.Tensor = self.model.get_input_embeddings()(tensor)
        return embeds


def _decode(data: bytes, name: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except OSError as error:
        raise EvaluationError(f"image {name!r} cannot be decoded: {error}.") from None
