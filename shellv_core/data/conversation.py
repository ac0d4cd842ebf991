"""Conversations as token ids with labels.

A `Template` gives the text as parts that know whether they are trained, so labels follow from where parts begin and
end, never from the lengths of texts tokenized again. Usually the whole text is tokenized at once, many conversations
in one call. It is tokenized piece by piece instead, in a second call, where

- a token would reach across the start or the end of a trained span (``:/`` in ``## assistant:/root``). Pieces are cut
  there, so that the ids before an answer are those of the prompt by itself, as the model gets it when it answers;
- what was said contains the text of a special token. It becomes ordinary tokens: neither the special token, nor
  dropped;
- the template's origin encodes each part alone (`Template.parts_alone`).

A character that a tokenizer has no tokens for (most control characters, with CodeShell's) is left out by the tokenizer.

What LLaVA and Shell-V train is followed but for these corrections:

- a literal ``</s>`` or ``<|endoftext|>`` in a turn is text; upstream takes it for the end of a round and masks the
  whole conversation;
- masks do not come from lengths with offsets of -1 and -2, so no "tokenization mismatch" masks a conversation, and
  tokenizers without a begin of text are masked right;
- ``llama_2`` answers are trained; Shell-V looks for the wrong separator and masks all of them;
- no attention mask is derived from ids: where padding and end of text are one token, upstream hides every end of turn;
- a picture's tokens count for the maximum length, and a picture is never cut;
- a first turn that is not human, or an empty answer, is an error with its reason; upstream drops the one and trains on
  the end marker alone of the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from shellv_core.errors import DataError
from shellv_core.templates import (
    DEFAULT_TEMPLATE,
    IMAGE_TOKEN,
    TEMPLATES,
    Part,
    Template,
    special_tokens,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
Encoded = tuple[np.ndarray, np.ndarray]
"""Token ids (length,) int32, and which of them are trained (length,) bool."""


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    image_token_id: int,
    num_image_tokens: int,
    max_length: int,
    template: Template = TEMPLATES[DEFAULT_TEMPLATE],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Encode many conversations; each yields (input_ids, labels), int32 of shape (length,).

    The image token stands `num_image_tokens` times for each picture. Labels are the answers with their end markers,
    -100 elsewhere (not shifted). Longer conversations are cut at `max_length` tokens, image tokens included.

    Args:
        tokenizer: a fast one, to which the image token and the template's markers are special tokens
            (`add_template_tokens`).

    Raises:
        DataError: if a conversation cannot be rendered, has no label left within `max_length`, or a picture of it
            does not fit into `max_length`; if the tokenizer lacks a special token of the template.
    """
    bound = template.bound(tokenizer)
    rendered = [bound.render(turns) for turns in conversations]
    for parts, (ids, trained) in zip(rendered, _encode(tokenizer, rendered, bound), strict=True):
        repeats = np.where(ids == image_token_id, num_image_tokens, 1)
        input_ids = np.repeat(ids, repeats)
        labels = np.where(np.repeat(trained, repeats), input_ids, np.int32(IGNORE_INDEX))[:max_length]
        if (input_ids[max_length:] == image_token_id).any():
            raise DataError(
                f"a picture of {num_image_tokens} tokens does not fit: it ends at token"
                f" {np.flatnonzero(input_ids == image_token_id)[-1] + 1} of {len(input_ids)}, behind"
                f" max_length={max_length}, in {_beginning(parts)}. Raise max_length or shorten the text before it."
            )
        if not (labels != IGNORE_INDEX).any():
            raise DataError(
                f"a conversation of {len(input_ids)} tokens has no answer within max_length={max_length}:"
                f" {_beginning(parts)}. Raise max_length or shorten the question."
            )
        yield input_ids[:max_length], labels


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Mapping[str, str]],
    image_token_id: int,
    num_image_tokens: int,
    max_length: int,
    template: Template = TEMPLATES[DEFAULT_TEMPLATE],
) -> tuple[np.ndarray, np.ndarray]:
    """Encode one conversation; see `encode_conversations`."""
    return next(
        encode_conversations(tokenizer, [conversations], image_token_id, num_image_tokens, max_length, template)
    )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, template: Template) -> list[int]:
    """Ids of a prompt that the template's chat template rendered, as they begin a training text.

    Special tokens are read wherever their text stands.
    """
    starts_itself = bool(tokenizer.bos_token) and prompt.startswith(str(tokenizer.bos_token))
    seams = template.bound(tokenizer).seams()
    ids: list[int]
    if not template.parts_alone or seams is None:
        ids = tokenizer(prompt, add_special_tokens=not starts_itself)["input_ids"]
        return ids
    parts = [Part(text) for text in seams.split(prompt) if text]
    facts = _facts(tokenizer)
    pieces = _pieces(parts, facts.reserved, parts_alone=True)
    ids = next(_encode_pieces(tokenizer, [pieces]))[0].tolist()
    return ids if starts_itself else facts.before + ids


def encode_captions(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], max_length: int) -> list[np.ndarray]:
    """Encode captions for the contrastive objective: the text alone, then the end-of-text token.

    Returns int32 arrays of shape (length,), each ending with the end-of-text token even where a text was cut. A
    special token's text in a caption becomes ordinary tokens.
    """
    encoded = _encode_texts(tokenizer, [caption.strip() for caption in captions])
    return [np.asarray([*ids[: max_length - 1], tokenizer.eos_token_id], dtype=np.int32) for ids in encoded]


def preview(
    conversation: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, template: Template
) -> list[tuple[str, bool]]:
    """The tokens of a conversation as (text, whether it is trained), in order; a picture is one ``<image>``.

    Tokens that hold one character between them (an emoji of several bytes) come as one text. Joined, the texts are
    what the tokenizer decodes from all ids.
    """
    parts = template.bound(tokenizer).render(conversation)
    (ids, trained), *_ = _encode(tokenizer, [parts], template)
    result: list[tuple[str, bool]] = []
    # Decoded behind the text before, since some decoders drop the space that leads a sequence.
    start = before = 0
    for index, is_trained in enumerate(trained.tolist()):
        known, text = (_decode(tokenizer, ids[before:end].tolist()) for end in (start, index + 1))
        is_last = index + 1 == len(ids) or trained[index + 1] != is_trained
        if is_last or not text.endswith("\N{REPLACEMENT CHARACTER}"):
            result.append((text[len(known) :], is_trained))
            before, start = start, index + 1
    return result


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text: Any = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)


class _Piece(NamedTuple):
    """Text to be encoded by itself, or a special token (`marker`); `behind` is what precedes it."""

    text: str
    trained: bool
    marker: bool
    behind: Literal["nothing", "marker", "text"]


def _encode(
    tokenizer: PreTrainedTokenizerBase, rendered: Sequence[Sequence[Part]], template: Template
) -> list[Encoded]:
    facts = _facts(tokenizer)
    missing = {IMAGE_TOKEN, *template.special_tokens} - facts.special_tokens
    if missing:
        raise DataError(
            f"the tokenizer has no special tokens {', '.join(sorted(missing))}, which the template {template.name!r}"
            " needs; add them with shellv_core.templates.add_template_tokens."
        )
    pattern, before, after = facts.reserved, facts.before, facts.after
    results: list[Encoded | None] = [None] * len(rendered)
    whole = [
        index
        for index, parts in enumerate(rendered)
        if not template.parts_alone and not any(part.content and pattern.search(part.text) for part in parts)
    ]
    if whole:
        texts = ["".join(part.text for part in rendered[index]) for index in whole]
        encoding = tokenizer(texts, return_offsets_mapping=True, return_attention_mask=False)
        for index, ids, offsets in zip(whole, encoding["input_ids"], encoding["offset_mapping"], strict=True):
            inner = slice(len(before), len(ids) - len(after))
            trained = _trained_tokens(rendered[index], np.asarray(offsets, dtype=np.int64)[inner, 1])
            if trained is not None:
                results[index] = np.asarray(ids, dtype=np.int32), _padded(trained, before, after)
    others = [index for index, result in enumerate(results) if result is None]
    pieces = [_pieces(rendered[index], pattern, template.parts_alone) for index in others]
    for index, (ids, trained) in zip(others, _encode_pieces(tokenizer, pieces), strict=True):
        whole_ids = np.concatenate([before, ids, after]).astype(np.int32)
        results[index] = whole_ids, _padded(trained, before, after)
    return [result for result in results if result is not None]


def _padded(trained: np.ndarray, before: list[int], after: list[int]) -> np.ndarray:
    return np.pad(trained, (len(before), len(after))) if before or after else trained


def _pattern(texts: set[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)))


class _Facts:
    """What is asked of a tokenizer again and again."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.num_tokens = len(tokenizer)
        self.special_tokens = special_tokens(tokenizer)
        self.reserved = _pattern(self.special_tokens)
        self.before, self.after = _special_ids_around(tokenizer)
        self.lead = _lead(tokenizer)


_known_facts: WeakKeyDictionary[PreTrainedTokenizerBase, _Facts] = WeakKeyDictionary()


def _facts(tokenizer: PreTrainedTokenizerBase) -> _Facts:
    facts = _known_facts.get(tokenizer)
    # A token may have been added since.
    if facts is None or facts.num_tokens != len(tokenizer):
        facts = _known_facts[tokenizer] = _Facts(tokenizer)
    return facts


def _trained_tokens(parts: Sequence[Part], ends: np.ndarray) -> np.ndarray | None:
    """Which tokens are trained, given the end of each in characters; None if one reaches across a span's border."""
    # Tokens of one character, and those whose offsets leave white space out, may stand in the way of a rising order.
    ends = np.maximum.accumulate(ends)
    trained = np.zeros(len(ends), dtype=bool)
    position = 0
    for is_trained, group in groupby(parts, key=lambda part: part.trained):
        start, position = position, position + sum(len(part.text) for part in group)
        first, last = np.searchsorted(ends, (start, position), side="right")
        if not last or ends[last - 1] != position:
            return None
        trained[first:last] = is_trained
    return trained


def _pieces(parts: Sequence[Part], reserved: re.Pattern[str], parts_alone: bool) -> list[_Piece]:
    pieces: list[_Piece] = []
    text = ""

    def cut(trained: bool) -> None:
        nonlocal text
        if text:
            add(text, trained, marker=False)
        text = ""

    def add(text: str, trained: bool, marker: bool) -> None:
        pieces.append(
            _Piece(text, trained, marker, ("marker" if pieces[-1].marker else "text") if pieces else "nothing")
        )

    for index, part in enumerate(parts):
        position = 0
        for match in () if part.content else reserved.finditer(part.text):
            text += part.text[position : match.start()]
            cut(part.trained)
            add(match.group(), part.trained, marker=True)
            position = match.end()
        text += part.text[position:]
        if parts_alone or index + 1 == len(parts) or parts[index + 1].trained != part.trained:
            cut(part.trained)
    return pieces


def _encode_pieces(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[_Piece]]) -> Iterator[Encoded]:
    lead, led = _facts(tokenizer).lead
    texts = [
        (lead if piece.behind in led else "") + piece.text for pieces in rows for piece in pieces if not piece.marker
    ]
    (lead_ids,) = _encode_texts(tokenizer, [lead])
    encoded = iter(_encode_texts(tokenizer, texts))
    for pieces in rows:
        ids: list[int] = []
        trained: list[bool] = []
        for piece in pieces:
            new: Any
            if piece.marker:
                new = [tokenizer.convert_tokens_to_ids(piece.text)]
            else:
                new = next(encoded)
                if piece.behind in led:
                    if new[: len(lead_ids)] != lead_ids:
                        raise DataError(
                            f"the tokenizer does not encode {piece.text[:40]!r} apart from the text before it; use a"
                            " tokenizer with byte-level or sentence-piece tokens, or another template."
                        )
                    new = new[len(lead_ids) :]
            ids += new
            trained += [piece.trained] * len(new)
        yield np.asarray(ids, dtype=np.int32), np.asarray(trained, dtype=bool)


def _lead(tokenizer: PreTrainedTokenizerBase) -> tuple[str, set[str]]:
    """What to encode before a piece that does not begin a text, and behind what, for tokenizers that put a space
    before every text (and some before all that follows a special token)."""
    null, letter, both = _encode_texts(tokenizer, ["\0", "A", "\0A"])
    if both == null + letter or not null or both[: len(null)] != null:
        return "", set()
    behind_marker = tokenizer(f"{tokenizer.eos_token}A", add_special_tokens=False)["input_ids"][1:]
    return "\0", {"text"} if behind_marker == letter else {"text", "marker"}


def _encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts in which no special token is read."""
    if not texts:
        return []
    encoding = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, split_special_tokens=True)
    ids: list[list[int]] = encoding["input_ids"]
    return ids


def _special_ids_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and behind every text."""
    encoding = tokenizer("A", return_special_tokens_mask=True)
    ids: list[int] = encoding["input_ids"]
    mask: list[int] = encoding["special_tokens_mask"]
    first, last = mask.index(0), len(mask) - mask[::-1].index(0)
    return ids[:first], ids[last:]


def _beginning(parts: Sequence[Part]) -> str:
    return f"{''.join(part.text for part in parts)[:80]!r}..."
