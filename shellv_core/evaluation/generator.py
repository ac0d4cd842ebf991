"""Answers of a LLaVA model, fast for many short questions about few images.

The state (keys and values) of everything up to the image is computed once for each image and shared by all questions
about it; the rest runs in batches of similar length, while threads decode the next block's images. Greedy tokens are
those of ``model.generate`` on single prompts; sampled ones depend on the prompt's own seed, not on its batch.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image
from transformers import DynamicCache

from shellv_core.data.ahead import map_ahead
from shellv_core.data.conversation import encode_prompt
from shellv_core.endpoint.asking import Reply
from shellv_core.errors import EvaluationError, ModelError
from shellv_core.evaluation.answers import Prompt
from shellv_core.evaluation.choosing import Sampling, TokenChooser
from shellv_core.templates import template_of

LayerStates = list[tuple[torch.Tensor, torch.Tensor]]
"""For each layer: keys and values [images, heads, tokens, head_dim]."""
BLOCKS_AHEAD = 2


class LlavaGenerator:
    """An `AnswerGenerator` on a transformers LLaVA model and its processor.

    Args:
        model: ``LlavaForConditionalGeneration`` in evaluation mode.
        processor: with `tokenizer`, `image_processor` and a chat template.
        batch_size: prompts that run together.
        sampling: how tokens are chosen; greedily by default.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        batch_size: int = 128,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    ) -> None:
        self.model, self.processor, self.batch_size, self.sampling = model.eval(), processor, batch_size, sampling
        self.tokenizer = processor.tokenizer
        self.template = template_of(processor)
        self.image_token_id = int(model.config.image_token_id)
        configured = model.generation_config.eos_token_id
        eos = self.tokenizer.eos_token_id if configured is None else configured
        self.stop_ids = torch.tensor(eos if isinstance(eos, list) else [eos], device=model.device)
        self._tokens: dict[tuple[str, bool], tuple[list[int], list[int]]] = {}

    def generate(
        self, blocks: Iterable[Sequence[Prompt]], images: Mapping[str, bytes], answered: Container[Prompt] = ()
    ) -> Iterator[dict[Prompt, Reply]]:
        """Yield replies batch by batch; memory grows with the number of distinct images of a block.

        A batch that is answered whole is left out, any other runs whole: what a prompt is answered depends on its block
        alone.
        """

        def prepare(block: Sequence[Prompt]) -> tuple[Sequence[Prompt], list[torch.Tensor]]:
            return block, self._pixel_values(block, images)

        todo = (block for block in blocks if any(prompt not in answered for prompt in block))
        with ThreadPoolExecutor(BLOCKS_AHEAD) as pool:
            for block, pixel_values in map_ahead(pool, prepare, todo, BLOCKS_AHEAD):
                yield from self._answer(block, pixel_values, answered)

    def _answer(
        self, block: Sequence[Prompt], pixel_values: list[torch.Tensor], answered: Container[Prompt]
    ) -> Iterator[dict[Prompt, Reply]]:
        place = {name: index for index, name in enumerate(_images_of(block))}
        features = self._image_features(pixel_values)
        # Prompts whose text before the image differs cannot share a state; usually there is one group.
        groups: dict[tuple[int, ...] | None, list[Prompt]] = defaultdict(list)
        for prompt in dict.fromkeys(block):
            groups[tuple(self._split(prompt)[0]) if prompt.image else None].append(prompt)
        for head, members in groups.items():
            batches = [batch for batch in self._batches(members) if any(prompt not in answered for prompt in batch)]
            if not batches:
                continue
            states = None if head is None or features is None else self._image_states(list(head), features)
            for batch in batches:
                rows = torch.tensor([place.get(prompt.image, 0) for prompt in batch], device=self.model.device)
                texts = self._continue(states, rows, batch)
                yield {prompt: Reply(text) for prompt, text in zip(batch, texts, strict=True)}

    def _batches(self, prompts: Iterable[Prompt]) -> Iterator[list[Prompt]]:
        """Prompts of one limit and similar length together."""
        batch: list[Prompt] = []
        for prompt in sorted(prompts, key=lambda each: (each.max_new_tokens, len(self._split(each)[1]))):
            if batch and (len(batch) == self.batch_size or prompt.max_new_tokens != batch[0].max_new_tokens):
                yield batch
                batch = []
            batch.append(prompt)
        if batch:
            yield batch

    def _pixel_values(self, block: Sequence[Prompt], images: Mapping[str, bytes]) -> list[torch.Tensor]:
        """Batches [images, 3, height, width] of the block's images."""
        names = _images_of(block)
        return [
            self.processor.image_processor(
                images=[decode(images[name], name) for name in names[start : start + self.batch_size]],
                return_tensors="pt",
            )["pixel_values"]
            for start in range(0, len(names), self.batch_size)
        ]

    @torch.inference_mode()
    def _image_features(self, pixel_values: Iterable[torch.Tensor]) -> torch.Tensor | None:
        """Projected features [images, tokens, hidden_size]; None of no images."""
        parts: list[torch.Tensor] = []
        for batch in pixel_values:
            outputs = self.model.get_image_features(
                pixel_values=batch.to(self.model.device, self.model.dtype), return_dict=True
            )
            parts += list(outputs.pooler_output)
        return torch.stack(parts) if parts else None

    def _split(self, prompt: Prompt) -> tuple[list[int], list[int]]:
        """Token ids before the image token and behind it; without an image, all are behind."""
        key = prompt.text, bool(prompt.image)
        if key not in self._tokens:
            picture = [{"type": "image"}] if prompt.image else []
            rendered = self.processor.apply_chat_template(
                [{"role": "user", "content": [*picture, {"type": "text", "text": prompt.text}]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            ids = encode_prompt(self.tokenizer, rendered, self.template)
            if ids.count(self.image_token_id) != len(picture):
                raise EvaluationError(
                    f"the prompt {prompt.text!r} renders with {ids.count(self.image_token_id)} image tokens,"
                    f" {len(picture)} are needed. Check the model's chat template, and that the question does not"
                    " contain the image token itself."
                )
            place = ids.index(self.image_token_id) if picture else -1
            self._tokens[key] = (ids[: max(place, 0)], ids[place + 1 :])
        return self._tokens[key]

    @torch.inference_mode()
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

    @torch.inference_mode()
    def _continue(self, states: LayerStates | None, rows: torch.Tensor, prompts: Sequence[Prompt]) -> list[str]:
        """Texts after the state of image ``rows[i]`` and what is behind the image in ``prompts[i]``."""
        cache = DynamicCache(config=self.model.config.get_text_config())
        for layer, (keys, values) in enumerate(states or ()):
            cache.update(keys[rows], values[rows], layer)
        tails = [self._split(prompt)[1] for prompt in prompts]
        past, longest = states[0][0].shape[2] if states else 0, max(map(len, tails))
        pad = int(self.stop_ids[0])
        ids = torch.tensor([[pad] * (longest - len(tail)) + tail for tail in tails], device=rows.device)
        lengths = torch.tensor([len(tail) for tail in tails], device=rows.device)
        columns = torch.arange(longest, device=rows.device)
        real = columns[None] >= longest - lengths[:, None]
        mask = torch.cat([real.new_ones(len(tails), past), real], dim=1).long()
        positions = (past + columns[None] - (longest - lengths[:, None])).clamp(min=0)
        choose = TokenChooser(self.sampling, prompts)
        embeds = self._embed(ids)
        finished = torch.zeros(len(tails), dtype=torch.bool, device=rows.device)
        generated: list[torch.Tensor] = []
        for _ in range(prompts[0].max_new_tokens):
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
            tokens = choose(logits).masked_fill(finished, pad)
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


def decode(data: bytes, name: str) -> Image.Image:
    """The picture in an image file's bytes, as RGB.

    Raises:
        EvaluationError: naming the image, if there is none in them.
    """
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except OSError as error:
        raise EvaluationError(f"image {name!r} cannot be decoded: {error}.") from None


def _images_of(block: Sequence[Prompt]) -> list[str]:
    return list(dict.fromkeys(prompt.image for prompt in block if prompt.image))
