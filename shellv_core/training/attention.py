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
    """Which tokens of a row see each other: D documents one behind another, then R branches.

    A token of a document sees itself and those before it in its document. A token of a branch sees the tokens of the
    branch's span, then itself and those before it in its branch; no other token sees it. So documents that begin alike
    have the beginning once. A branch of one token is a readout.

    Attributes:
        borders: (D + 1,) rising, from 0 to the number of the documents' tokens.
        spans: (R,) start and stop (exclusive), within one document, of what a branch sees.
        branches: (R,) tokens of each branch; without it, each has one.
    """

    borders: tuple[int, ...]
    spans: tuple[tuple[int, int], ...] = ()
    branches: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.borders or self.borders[0] or any(b <= a for a, b in itertools.pairwise(self.borders)):
            raise TrainingError(f"borders of documents must rise from 0; they are {self.borders[:8]}...")

    @property
    def num_tokens(self) -> int:
        """N, branches included."""
        return self.borders[-1] + sum(self.branch_lengths)

    @property
    def branch_lengths(self) -> tuple[int, ...]:
        """(R,) tokens of each branch."""
        return (1,) * len(self.spans) if self.branches is None else self.branches

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
    """One call of torch's kernel for ragged sequences, and one for the branches."""
    from torch.nn.attention import varlen

    varlen_attn: Any = varlen.varlen_attn
    options: Any = {"scale": scaling, "enable_gqa": query_NHW.shape[1] != key_NGW.shape[1]}
    layout = _flash_layout(documents, query_NHW.device)
    options["window_size"] = (-1 if window is None else window - 1, 0)
    end, longest = documents.borders[-1], max(documents.lengths)
    result: torch.Tensor = varlen_attn(
        query_NHW[:end], key_NGW[:end], value_NGW[:end], layout.borders, layout.borders, longest, longest, **options,
    )  # fmt: skip
    if not documents.spans:
        return result
    seen = layout.seen
    # The kernel's causality is that of the ends: the last query sees the last key.
    branches: torch.Tensor = varlen_attn(
        query_NHW[end:], key_NGW[seen], value_NGW[seen], layout.branch_borders, layout.seen_borders,
        max(documents.branch_lengths), layout.most_seen, **options,
    )  # fmt: skip
    return torch.cat([result, branches])


@dataclass(frozen=True)
class _FlashLayout:
    """`borders` of documents and of branches, what all branches see, and where each one's begins: int32."""

    borders: torch.Tensor
    seen: torch.Tensor
    seen_borders: torch.Tensor
    branch_borders: torch.Tensor
    most_seen: int


# The layers of a pass ask for the same; copying to a GPU once is enough.
@functools.lru_cache(maxsize=4)
def _flash_layout(documents: Documents, device: torch.device) -> _FlashLayout:
    def on_device(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    seen = [torch.tensor(each) for each in _branch_keys(documents)]
    counts = [len(each) for each in seen]
    return _FlashLayout(
        on_device(documents.borders),
        torch.cat(seen).to(device) if seen else torch.zeros(0, dtype=torch.int64, device=device),
        on_device([0, *itertools.accumulate(counts)]),
        on_device([0, *itertools.accumulate(documents.branch_lengths)]),
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

    def attend(query_nLHW: torch.Tensor, keys: torch.Tensor | slice) -> torch.Tensor:
        key_nLGW, value_nLGW = key_NGW[keys], value_NGW[keys]
        if isinstance(keys, slice):
            key_nLGW, value_nLGW = key_nLGW[None], value_nLGW[None]
        queries, seen, mask = query_nLHW.shape[1], key_nLGW.shape[1], None
        causal = queries == seen
        if (queries != 1 and not causal) or (window is not None and window < seen):
            mask, causal = _band(queries, seen, window, query_nLHW.device), False
        return functional.scaled_dot_product_attention(
            query_nLHW.transpose(1, 2), key_nLGW.transpose(1, 2), value_nLGW.transpose(1, 2),
            mask, dropout, is_causal=causal, scale=scaling, enable_gqa=gqa,
        ).transpose(1, 2)  # fmt: skip

    layout = _sdpa_layout(documents, query_NHW.device)
    parts = []
    for rows, kept in layout.groups:
        if isinstance(rows, slice):
            parts.append(attend(query_NHW[rows][None], rows)[0])
        else:
            parts.append(attend(query_NHW[rows], rows).flatten(0, 1)[kept])
    for tokens, keys in layout.branches:
        parts.append(attend(query_NHW[tokens], keys).flatten(0, 1))
    return torch.cat(parts)[layout.order]


@dataclass(frozen=True)
class _SdpaLayout:
    """Index tensors of what is computed together.

    Attributes:
        groups: a document's slice; or for n documents of up to L tokens their tokens (n, L), and which of the n * L
            are none of padding.
        branches: for m branches of L tokens that see S others their positions (m, L) and what they see, themselves
            last: (m, S + L).
        order: (N,) where the results of all groups, one behind another, have each token of the row.
    """

    groups: list[tuple[torch.Tensor | slice, torch.Tensor | slice]]
    branches: list[tuple[torch.Tensor, torch.Tensor]]
    order: torch.Tensor


@functools.lru_cache(maxsize=4)
def _sdpa_layout(documents: Documents, device: torch.device) -> _SdpaLayout:
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
    alike: dict[tuple[int, int], list[list[int]]] = {}
    for length, keys in zip(documents.branch_lengths, _branch_keys(documents), strict=True):
        alike.setdefault((length, len(keys)), []).append(keys)
    branches = []
    for (length, _), rows_of_keys in alike.items():
        seen = torch.tensor(rows_of_keys)
        tokens = seen[:, -length:]
        branches.append((tokens.to(device), seen.to(device)))
        computed.append(tokens.flatten())
    return _SdpaLayout(groups, branches, torch.argsort(torch.cat(computed)).to(device))


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


def _branch_keys(documents: Documents) -> list[list[int]]:
    """For each branch what its last token sees without a window: the span, then the branch."""
    borders = itertools.accumulate(documents.branch_lengths, initial=documents.borders[-1])
    return [
        [*range(*span), *range(*branch)]
        for span, branch in zip(documents.spans, itertools.pairwise(borders), strict=True)
    ]


def _band(queries: int, seen: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Causal mask (queries, seen) of the last `queries` of `seen` tokens, within a sliding window if there is one."""
    everywhere = torch.ones(queries, seen, dtype=torch.bool, device=device)
    mask = everywhere.tril(seen - queries)
    return mask if window is None else mask & everywhere.triu(seen - queries + 1 - window)


AttentionInterface.register(ATTENTION_NAME, documents_attention)
