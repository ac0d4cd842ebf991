"""How answers are written: as chat completions and as plain completions, whole and in pieces."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict
from typing import Any, Protocol

from shellv_core.serving.engine import TokenChance, TokenLogprob
from shellv_core.serving.hallucination import HallucinationView
from shellv_core.serving.http.answers import Answers, Collected
from shellv_core.serving.http.stream import event
from shellv_core.serving.models import ServedModel

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON has no word for."""

Json = dict[str, Any]
Viewer = Callable[[Collected], Awaitable[HallucinationView]]


class Format(Protocol):
    """The shape of one endpoint's answers."""

    prefix: str
    whole_object: str
    piece_object: str

    def whole(self, answer: Collected) -> Json:
        """A choice, less what all formats share."""
        ...

    def opening(self) -> Json | None:
        """What a stream of one choice begins with."""
        ...

    def piece(self, answer: Collected, offset: int) -> Json | None:
        """A step of a choice that begins at character `offset`, less what all formats share; None where it adds
        nothing."""
        ...

    def closing(self) -> Json:
        """What a stream of one choice ends with."""
        ...


class ChatFormat:
    """Chat completions.

    Args:
        logprobs: whether they were asked for.
    """

    prefix, whole_object, piece_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, logprobs: bool) -> None:
        self._logprobs = logprobs

    def whole(self, answer: Collected) -> Json:
        """See `Format.whole`."""
        message = {"role": "assistant", "content": "".join(answer.texts)}
        return {"message": message, "logprobs": self._chances(answer.logprobs)}

    def opening(self) -> Json | None:
        """See `Format.opening`."""
        return {"delta": {"role": "assistant", "content": ""}}

    def piece(self, answer: Collected, offset: int) -> Json | None:
        """See `Format.piece`."""
        text = "".join(answer.texts)
        if not text and not (self._logprobs and answer.logprobs):
            return None
        logprobs = {"logprobs": self._chances(answer.logprobs)} if self._logprobs else {}
        return {"delta": {"content": text}, **logprobs}

    def closing(self) -> Json:
        """See `Format.closing`."""
        return {"delta": {}}

    def _chances(self, logprobs: Sequence[TokenLogprob]) -> Json | None:
        if not self._logprobs:
            return None
        content = [{**_chance(each), "top_logprobs": [_chance(top) for top in each.top]} for each in logprobs]
        return {"content": content, "refusal": None}


class CompletionFormat:
    """Plain completions.

    Args:
        logprobs: whether they were asked for.
    """

    prefix, whole_object, piece_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, logprobs: bool) -> None:
        self._logprobs = logprobs

    def whole(self, answer: Collected) -> Json:
        """See `Format.whole`."""
        return {"text": "".join(answer.texts), "logprobs": self._chances(answer.logprobs, 0)}

    def opening(self) -> Json | None:
        """See `Format.opening`."""
        return None

    def piece(self, answer: Collected, offset: int) -> Json | None:
        """See `Format.piece`."""
        text = "".join(answer.texts)
        if not text and not (self._logprobs and answer.logprobs):
            return None
        return {"text": text, "logprobs": self._chances(answer.logprobs, offset)}

    def closing(self) -> Json:
        """See `Format.closing`."""
        return {"text": "", "logprobs": None}

    def _chances(self, logprobs: Sequence[TokenLogprob], offset: int) -> Json | None:
        if not self._logprobs:
            return None
        offsets = []
        for each in logprobs:
            offsets.append(offset)
            offset += len(each.token)
        return {
            "tokens": [each.token for each in logprobs],
            "token_logprobs": [_finite(each.logprob) for each in logprobs],
            "top_logprobs": [{top.token: _finite(top.logprob) for top in each.top} for each in logprobs],
            "text_offset": offsets,
        }


class Writer:
    """Writes the answers to one request.

    Args:
        shape: how one choice looks.
        model: who answers.
        token_ids: whether each choice gives its token ids.
        viewer: tells what in a whole answer may be made up, where that is asked for.
    """

    def __init__(self, shape: Format, model: ServedModel, token_ids: bool, viewer: Viewer | None = None) -> None:
        self._shape, self._token_ids, self._viewer = shape, token_ids, viewer
        self._prompt_tokens: int | None = None
        self._head = {
            "id": f"{shape.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": model.revision[:16],
        }

    async def whole(self, answers: Answers) -> Json:
        """The body of a response that is no stream."""
        choices = [
            {
                "index": index,
                **self._shape.whole(answer),
                "finish_reason": answer.finish_reason,
                **await self._extensions(answer, answer),
            }
            for index, answer in enumerate(await answers.collect())
        ]
        return {**self._head, "object": self._shape.whole_object, "choices": choices, "usage": _usage(answers)}

    async def stream(
        self, answers: Answers, count: int, include_usage: bool, continuous_usage: bool = False
    ) -> AsyncGenerator[bytes, None]:
        """The events of a stream but ``[DONE]``.

        Args:
            include_usage: give the request's token counts at the end.
            continuous_usage: give each choice's own in each of its pieces, of which the first comes with its turn.
        """
        if continuous_usage:
            self._prompt_tokens = answers.prompt_tokens
        if opening := self._shape.opening() or (self._shape.closing() if continuous_usage else None):
            for index in range(count):
                yield self._piece(index, opening, 0)
        offsets = [0] * count
        wholes = [Collected() for _ in range(count)]
        async with aclosing(answers.steps()) as steps:
            async for index, step in steps:
                answer = Collected()
                answer.add(step)
                if self._viewer:
                    wholes[index].add(step)
                extensions = await self._extensions(answer)
                piece = self._shape.piece(answer, offsets[index])
                offsets[index] += len(step.text)
                if piece is not None or extensions:
                    content = {**(piece or self._shape.closing()), **extensions}
                    yield self._piece(index, content, step.completion_tokens)
                if step.finish_reason is not None:
                    last = {**self._shape.closing(), **await self._extensions(None, wholes[index])}
                    yield self._piece(index, last, step.completion_tokens, step.finish_reason)
        if include_usage:
            yield event({**self._head, "object": self._shape.piece_object, "choices": [], "usage": _usage(answers)})

    def _piece(self, index: int, content: Json, tokens: int, finish_reason: str | None = None) -> bytes:
        choice = {"index": index, **content, "finish_reason": finish_reason}
        usage = {} if self._prompt_tokens is None else {"usage": _counts(self._prompt_tokens, tokens)}
        return event({**self._head, "object": self._shape.piece_object, "choices": [choice], **usage})

    async def _extensions(self, new: Collected | None, whole: Collected | None = None) -> Json:
        """The choice's `shellv` object, where it was asked for: of what is new, and of the whole answer at its end."""
        found: Json = {}
        if self._token_ids and new is not None and new.token_ids:
            found["token_ids"] = new.token_ids
        if self._viewer is not None and whole is not None:
            found["hallucination"] = asdict(await self._viewer(whole))
        return {"shellv": found} if found else {}


def _usage(answers: Answers) -> Json:
    return _counts(answers.prompt_tokens, answers.completion_tokens)


def _counts(prompt: int, completion: int) -> Json:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _chance(chance: TokenChance) -> Json:
    return {"token": chance.token, "bytes": list(chance.bytes), "logprob": _finite(chance.logprob)}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
