"""Attention over one row of many documents, none of which sees another.

An attention implementation of transformers under the name `ATTENTION_NAME`. Which tokens see each other comes with the
call, as `Documents`: transformers' own way of finding borders in position ids ends in silence where a mask or a cache
is given, and then documents see each other. This one refuses to run without its documents, or with a mask or a cache.

Shapes: N tokens of a row, H query heads and G key heads (H a multiple of G) of width W.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from shellv_core.errors import TrainingError

ATTENTION_NAME = "shellv_documents"
# Documents share a call where that adds at most this many tokens of padding to a row of it, or this share of them.
PADDING_TOKENS, PADDING_SHARE = 16, 0.05
FLASH_DTYPES = (torch.bfloat16, torch.float16)
FLASH_CAPABILITY = (8, 0)
FLASH_HEAD_WIDTH = 256
UNSUPPORTED = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True)
class Documents:
    """Which tokens of a row see each other: D documents one behind another, then R readout tokens.

    A token of a document sees itself and those before it in its document. A readout token sees the tokens of its span,
    then itself; no other token sees it.

    Attributes:
        borders: (D + 1,) rising, from 0 to the number of the documents' tokens.
        spans: (R,) start and stop (exclusive), within one document, of what a readout token sees.
    """

    borders: tuple[int, ...]
    spans: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.borders or self.borders[0] or any(b <= a for a, b in itertools.pairwise(self.borders)):
            raise TrainingError(f"borders of documents must rise from 0; they are {self.borders[:8]}...")

    @property
    def num_tokens(self) -> int:
        """N, readout tokens included."""
        return self.borders[-1] + len(self.spans)

    @functools.cached_property
    def lengths(self) -> list[int]:
        """(D,) tokens of each document."""
        return [stop - start for start, stop in itertools.pairwise(self.borders)]


@contextlib.contextmanager
def documents_apart(language_model: PreTrainedModel) -> Iterator[None]:
    """Within it, `language_model` runs on packed rows, and on nothing else; backward passes belong inside too."""
    usual = language_model.config._attn_implementation
    language_model.set_attn_implementation(ATTENTION_NAME)
    try:
        yield
    finally:
        language_model.set_attn_implementation(usual)


def documents_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    documents: Documents | None = None,
    use_cache: bool | None = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function, as transformers calls it.

    Args:
        query: (1, H, N, W); key, value: (1, G, N, W).
        sliding_window: a token sees at most this many, itself included; None for all.

    Returns:
        (1, N, H, W), and None for the weights.

    Raises:
        TrainingError: without documents, or with anything that they do not go together with.
    """
    if documents is None:
        raise TrainingError(
            f"attention {ATTENTION_NAME!r} needs the borders of the documents; give the language model"
            " documents=Documents(...), or use another implementation (set_attn_implementation) for padded batches."
        )
    if use_cache or key.shape[2] != query.shape[2]:
        raise TrainingError(
            f"attention {ATTENTION_NAME!r} has no cache: {query.shape[2]} tokens ask {key.shape[2]}. Call the language"
            " model with use_cache=False, and set another implementation for generation."
        )
    given = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if attention_mask is not None or given:
        raise TrainingError(
            f"attention {ATTENTION_NAME!r} takes neither a mask nor {', '.join(UNSUPPORTED)}, but got"
            f" {', '.join(given) or 'attention_mask'}; this language model cannot be trained with packing."
        )
    if query.shape[0] != 1 or query.shape[2] != documents.num_tokens:
        raise TrainingError(
            f"attention {ATTENTION_NAME!r} takes one row of {documents.num_tokens} tokens as its documents have, but"
            f" got {query.shape[0]} rows of {query.shape[2]}."
        )
    device = query.device
    # Under autocast the rotary embedding leaves queries and keys in float32, values not.
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else query.dtype
    # In bfloat16, torch's CPU kernel takes several times as long.
    compute_dtype = torch.promote_types(dtype, torch.float32) if device.type == "cpu" else dtype
    query_NHW, key_NGW, value_NGW = (each[0].transpose(0, 1).to(compute_dtype) for each in (query, key, value))
    kernel = _flash if _takes_flash(query_NHW, dropout) else _per_document
    with torch.autocast(device.type, enabled=False):
        result_NHW = kernel(query_NHW, key_NGW, value_NGW, documents, dropout, scaling, sliding_window)
    return result_NHW[None].to(dtype), None


def _takes_flash(query_NHW: torch.Tensor, dropout: float) -> bool:
    return (
        query_NHW.device.type == "cuda"
        and query_NHW.dtype in FLASH_DTYPES
        and query_NHW.shape[-1] <= FLASH_HEAD_WIDTH
        and not dropout  # torch's kernel has none
        and torch.cuda.get_device_capability(query_NHW.device) >= FLASH_CAPABILITY
    )


def _flash(
    query_NHW: torch.Tensor,
    key_NGW: torch.Tensor,
    value_NGW: torch.Tensor,
    documents: Documents,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """One call of torch's kernel for ragged sequences, and a small one for the readout tokens."""
    from torch.nn.attention import varlen

    varlen_attn: Any = varlen.varlen_attn
    options: Any = {"scale": scaling, "enable_gqa": query_NHW.shape[1] != key_NGW.shape[1]}
    layout = _flash_layout(documents, window, query_NHW.device)
    end, longest = documents.borders[-1], max(documents.lengths)
    result: torch.Tensor = varlen_attn(
        query_NHW[:end], key_NGW[:end], value_NGW[:end], layout.borders, layout.borders, longest, longest,
        window_size=(-1 if window is None else window - 1, 0), **options,
    )  # fmt: skip
    if not documents.spans:
        return result
    seen = layout.seen
    readouts: torch.Tensor = varlen_attn(
        query_NHW[end:], key_NGW[seen], value_NGW[seen], layout.readout_borders, layout.seen_borders, 1,
        layout.most_seen, **options,
    )  # fmt: skip
    return torch.cat([result, readouts])


@dataclass(frozen=True)
class _FlashLayout:
    """`borders` of documents; what all readout tokens see, one behind another, and where each one's begins: int32."""

    borders: torch.Tensor
    seen: torch.Tensor
    seen_borders: torch.Tensor
    readout_borders: torch.Tensor
    most_seen: int


# The layers of a pass ask for the same; copying to a GPU once is enough.
@functools.lru_cache(maxsize=4)
def _flash_layout(documents: Documents, window: int | None, device: torch.device) -> _FlashLayout:
    def on_device(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    seen = [torch.tensor(each) for each in _readout_keys(documents, window)]
    counts = [len(each) for each in seen]
    return _FlashLayout(
        on_device(documents.borders),
        torch.cat(seen).to(device) if seen else torch.zeros(0, dtype=torch.int64, device=device),
        on_device([0, *itertools.accumulate(counts)]),
        on_device(range(len(seen) + 1)),
        max(counts, default=0),
    )


def _per_document(
    query_NHW: torch.Tensor,
    key_NGW: torch.Tensor,
    value_NGW: torch.Tensor,
    documents: Documents,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """SDPA for each group of documents of about one length, padded at their ends, where causality makes it harmless."""
    gqa = query_NHW.shape[1] != key_NGW.shape[1]

    def attend(query_nLHW: torch.Tensor, keys: torch.Tensor | slice, causal: bool) -> torch.Tensor:
        key_nLGW, value_nLGW = key_NGW[keys], value_NGW[keys]
        if isinstance(keys, slice):
            key_nLGW, value_nLGW = key_nLGW[None], value_nLGW[None]
        mask = None
        if causal and window is not None and window < query_nLHW.shape[1]:
            mask, causal = _band(query_nLHW.shape[1], window, query_nLHW.device), False
        return functional.scaled_dot_product_attention(
            query_nLHW.transpose(1, 2), key_nLGW.transpose(1, 2), value_nLGW.transpose(1, 2),
            mask, dropout, is_causal=causal, scale=scaling, enable_gqa=gqa,
        ).transpose(1, 2)  # fmt: skip

    layout = _sdpa_layout(documents, window, query_NHW.device)
    parts = []
    for rows, kept in layout.groups:
        if isinstance(rows, slice):
            parts.append(attend(query_NHW[rows][None], rows, True)[0])
        else:
            parts.append(attend(query_NHW[rows], rows, True).flatten(0, 1)[kept])
    for positions, keys in layout.readouts:
        parts.append(attend(query_NHW[positions][:, None], keys, False)[:, 0])
    return torch.cat(parts)[layout.order]


@dataclass(frozen=True)
class _SdpaLayout:
    """Index tensors of what is computed together.

    Attributes:
        groups: a document's slice; or for n documents of up to L tokens their tokens (n, L), and which of the n * L
            are none of padding.
        readouts: for m readout tokens that see S others their positions (m,) and what they see, themselves last:
            (m, S + 1).
        order: (N,) where the results of all groups, one behind another, have each token of the row.
    """

    groups: list[tuple[torch.Tensor | slice, torch.Tensor | slice]]
    readouts: list[tuple[torch.Tensor, torch.Tensor]]
    order: torch.Tensor


@functools.lru_cache(maxsize=4)
def _sdpa_layout(documents: Documents, window: int | None, device: torch.device) -> _SdpaLayout:
    groups: list[tuple[torch.Tensor | slice, torch.Tensor | slice]] = []
    computed: list[torch.Tensor] = []
    for group in _alike(documents.lengths):
        starts = torch.tensor([documents.borders[number] for number in group])
        lengths = torch.tensor([documents.lengths[number] for number in group])
        if len(group) == 1:
            rows = slice(int(starts), int(starts + lengths))
            groups.append((rows, slice(None)))
            computed.append(torch.arange(rows.start, rows.stop))
            continue
        columns = torch.arange(int(lengths.max()))[None]
        inside = columns < lengths[:, None]
        tokens = starts[:, None] + torch.where(inside, columns, 0)
        groups.append((tokens.to(device), inside.flatten().nonzero()[:, 0].to(device)))
        computed.append(tokens[inside])
    keys = _readout_keys(documents, window)
    readouts = []
    for _, same in itertools.groupby(sorted(range(len(keys)), key=lambda r: len(keys[r])), lambda r: len(keys[r])):
        seen = torch.tensor([list(keys[number]) for number in same])
        readouts.append((seen[:, -1].to(device), seen.to(device)))
        computed.append(seen[:, -1])
    return _SdpaLayout(groups, readouts, torch.argsort(torch.cat(computed)).to(device))


def _alike(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Groups of documents, longest first, that waste little when padded to one length."""
    group: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        longest = lengths[group[0]] if group else 0
        if group and longest - lengths[number] > max(PADDING_TOKENS, PADDING_SHARE * longest):
            yield group
            group = []
        group.append(number)
    yield group


def _readout_keys(documents: Documents, window: int | None) -> list[list[int]]:
    """For each readout token what it sees, itself last."""
    end = documents.borders[-1]
    return [
        [*range(start if window is None else max(start, stop + 1 - window), stop), end + number]
        for number, (start, stop) in enumerate(documents.spans)
    ]


def _band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """Causal mask (length, length) of a sliding window."""
    everywhere = torch.ones(length, length, dtype=torch.bool, device=device)
    return everywhere.tril() & everywhere.triu(1 - window)


AttentionInterface.register(ATTENTION_NAME, documents_attention)
