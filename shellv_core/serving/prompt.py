"""A conversation to the model's inputs, by the model's own chat template.

What people type is text and only text: a special token's spelling inside it does not become that token, and
``<image>`` opens no image slot.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from shellv_core.serving.engine import ImagePart, Message, RequestError, TextPart
from shellv_core.templates import template_of

if TYPE_CHECKING:
    import torch
    from PIL import Image


@dataclass(frozen=True)
class PromptImage:
    """A picture as the model takes it.

    Attributes:
        pixel_values: [1, channels, height, width].
        num_tokens: image tokens that stand for it.
        sha256: of the pixel values' bytes.
    """

    pixel_values: torch.Tensor
    num_tokens: int
    sha256: str


@dataclass(frozen=True)
class Prompt:
    """Inputs of one sequence.

    Attributes:
        token_ids: the prompt, with one image token per image feature.
        images: the pictures, in the order of their tokens.
        image_token_id: the token that stands for image features, and for nothing else in a prompt.
    """

    token_ids: list[int]
    images: tuple[PromptImage, ...] = ()
    image_token_id: int = -1

    @property
    def pixel_values(self) -> torch.Tensor | None:
        """[num_images, channels, height, width], or None without pictures."""
        import torch

        return torch.cat([image.pixel_values for image in self.images]) if self.images else None


class PromptEncoder:
    """Encodes conversations for one model; to be called from one thread only, as a tokenizer's settings are shared.

    Args:
        processor: the model's processor, with tokenizer, image processor and chat template.
    """

    def __init__(self, processor: Any) -> None:
        self._processor, self._tokenizer = processor, processor.tokenizer
        self._image_token: str = processor.image_token
        special = [str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        tokens = {*special, *self._tokenizer.all_special_tokens, self._image_token}
        self._reserved = re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))
        self._reserved_ids = set(self._tokenizer.convert_tokens_to_ids(sorted(tokens)))
        self._template = template_of(processor).bound(self._tokenizer)
        self._seams = self._template.seams()

    def encode(self, messages: Iterable[Message]) -> Prompt:
        """The inputs with which the model answers the last message.

        Raises:
            RequestError: if the chat template refuses the conversation.
        """
        messages = tuple(messages)
        if messages[0].role == "text":
            text = "".join(part.text for part in messages[0].parts if isinstance(part, TextPart))
            start: list[int] = self._tokenizer("")["input_ids"]
            return Prompt([*start, *self._plain(text)])
        turns, texts, images = self._turns(messages)
        template = self._render(turns)
        prepared = tuple(self._prepare(image) for image in images)
        token_ids = self._token_ids(template, texts, [image.num_tokens for image in prepared])
        return Prompt(token_ids, prepared, self._processor.image_token_id)

    def _turns(self, messages: tuple[Message, ...]) -> tuple[list[Any], dict[str, str], list[Image.Image]]:
        """The template's view of the messages, with a placeholder for each text, what the placeholders stand for,
        and the pictures in order."""
        nonce = secrets.token_hex(8)
        turns: list[Any] = []
        texts: dict[str, str] = {}
        images: list[Image.Image] = []
        for message in messages:
            content: list[dict[str, str]] = []
            for part in message.parts:
                if isinstance(part, ImagePart):
                    images.append(part.image)
                    content.append({"type": "image"})
                else:
                    placeholder = f"[{nonce}:{len(texts)}]"
                    core = part.text.strip()
                    texts[placeholder] = core
                    # The white space around stays visible to the template, which may trim it.
                    text = part.text.replace(core, placeholder, 1) if core else part.text
                    content.append({"type": "text", "text": text})
            turns.append({"role": message.role, "content": content})
        return turns, texts, images

    def _render(self, turns: list[Any]) -> str:
        from jinja2 import TemplateError

        try:
            rendered: str = self._processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise RequestError(f"the model's chat template refuses this conversation: {error}", "messages") from None
        return rendered

    def _prepare(self, image: Image.Image) -> PromptImage:
        inputs = self._processor(text=[self._image_token], images=[image], return_tensors="pt")
        num_tokens = int((inputs["input_ids"] == self._processor.image_token_id).sum())
        pixel_values = inputs["pixel_values"].contiguous()
        digest = hashlib.sha256(f"{tuple(pixel_values.shape)}".encode() + pixel_values.numpy().tobytes())
        return PromptImage(pixel_values, num_tokens, digest.hexdigest())

    def _token_ids(self, template: str, texts: dict[str, str], num_image_tokens: list[int]) -> list[int]:
        slots = template.split(self._image_token)
        if len(slots) != len(num_image_tokens) + 1:
            raise RequestError(
                f"the model's chat template made {len(slots) - 1} image slots of {len(num_image_tokens)} pictures;"
                " put the pictures into user messages.",
                "messages",
            )
        expanded = slots[0]
        for slot, num_tokens in zip(slots[1:], num_image_tokens, strict=True):
            expanded += self._image_token * num_tokens + slot
        pieces = _split_at(expanded, texts)
        starts_itself = bool(self._tokenizer.bos_token) and expanded.startswith(self._tokenizer.bos_token)
        if self._must_cut(pieces, texts) or any(self._reserved.search(text) for text in texts.values()):
            return self._encode_in_runs(pieces, texts, starts_itself)
        # The usual case in one call, as in training, since tokens may span the border of template and text.
        whole = "".join(texts.get(piece, piece) for piece in pieces)
        token_ids: list[int] = self._tokenizer(whole, add_special_tokens=not starts_itself)["input_ids"]
        return token_ids

    def _must_cut(self, pieces: list[str], texts: dict[str, str]) -> bool:
        """Whether a token would reach across a seam, as none does in training."""
        if self._seams is None or self._template.parts_alone:
            return self._template.parts_alone
        opening = self._template.assistant_open
        answers = [
            texts[piece][:64] for before, piece in pairwise(pieces) if piece in texts and before.endswith(opening)
        ]
        return any(self._plain(opening + text) != self._plain(opening) + self._plain(text) for text in answers)

    def _encode_in_runs(self, pieces: list[str], texts: dict[str, str], starts_itself: bool) -> list[int]:
        """Encode the template's special tokens as such and everything else as plain text, cut at the seams."""
        runs: list[tuple[str, bool]] = []
        for piece in pieces:
            if piece in texts:
                runs.append((texts[piece], False))
                continue
            for index, part in enumerate(self._seams.split(piece) if self._seams else [piece]):
                position = 0
                if index:
                    runs.append(("", True))
                for match in self._reserved.finditer(part):
                    runs += [(part[position : match.start()], False), (match.group(), True)]
                    position = match.end()
                runs.append((part[position:], False))
        token_ids: list[int] = [] if starts_itself else list(self._tokenizer("")["input_ids"])
        plain = ""
        for text, reserved in runs:
            if reserved:
                token_ids += self._plain(plain)
                plain = ""
                if text:
                    token_ids.append(self._tokenizer.convert_tokens_to_ids(text))
            else:
                plain += text
        return token_ids + self._plain(plain)

    def _plain(self, text: str) -> list[int]:
        """Encode `text` with no part of it read as a reserved token.

        As in training, by the tokenizer's own means; where these leave one (slow tokenizers, and tokens that count as
        ordinary), each one's spelling is cut after its first character, which holds for every kind.
        """
        token_ids: list[int] = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if not self._reserved_ids.intersection(token_ids):
            return token_ids
        token_ids = []
        while text:
            match = self._reserved.search(text)
            end = match.start() + 1 if match and match.start() + 1 < len(text) else len(text)
            token_ids += self._tokenizer(text[:end], add_special_tokens=False)["input_ids"]
            text = text[end:]
        return token_ids


def _split_at(template: str, placeholders: Iterable[str]) -> list[str]:
    pattern = "|".join(map(re.escape, placeholders))
    return re.split(f"({pattern})", template) if pattern else [template]
