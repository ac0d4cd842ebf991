"""Answers by any server of the OpenAI chat protocol."""

from __future__ import annotations

from collections.abc import Sequence

from shellv_core.data.hallucination.captions import RewriteCounts
from shellv_core.data.hallucination.language_model import chat_messages
from shellv_core.endpoint.asking import ChatRequest, Endpoint, Reply
from shellv_core.endpoint.config import EndpointConfig
from shellv_core.progress import Progress


class EndpointAnswerer:
    """A chat endpoint as an answerer.

    Raises:
        ConfigError: if no model is named or the key's environment variable is not set.
    """

    def __init__(self, config: EndpointConfig) -> None:
        self._endpoint = Endpoint(config)

    def answer(self, prompts: Sequence[str], counts: RewriteCounts) -> list[Reply]:
        """One answer for each prompt, in order."""
        replies: dict[int, Reply] = {}
        requests = (ChatRequest(chat_messages(prompt)) for prompt in prompts)
        with Progress(len(prompts), "endpoint", "captions") as progress:
            for index, reply in self._endpoint.ask(requests, counts):
                replies[index] = reply
                progress.update()
        return [replies[index] for index in range(len(prompts))]
