"""Answers of any server of the OpenAI chat protocol."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import closing

from shellv_core.endpoint.asking import ChatRequest, Endpoint, Reply, Usage
from shellv_core.endpoint.client import user_message
from shellv_core.evaluation.answers import Prompt


class EndpointGenerator:
    """An `AnswerGenerator` on a chat endpoint.

    Args:
        endpoint: what is asked.
        seed: of sampled answers; each prompt is sent its own.

    Attributes:
        usage: what was sent, and what it cost.
    """

    def __init__(self, endpoint: Endpoint, seed: int = 0) -> None:
        self._endpoint, self._seed = endpoint, seed
        self.usage = Usage()

    def generate(
        self, blocks: Iterable[Sequence[Prompt]], images: Mapping[str, bytes], answered: Container[Prompt] = ()
    ) -> Iterator[dict[Prompt, Reply]]:
        """Yield each reply as it comes; a prompt that the endpoint fails has its reason in the reply."""
        todo = [prompt for block in blocks for prompt in dict.fromkeys(block) if prompt not in answered]
        requests = (
            ChatRequest(
                [user_message(prompt.text, images[prompt.image] if prompt.image else None)],
                prompt.max_new_tokens,
                prompt.seed(self._seed),
            )
            for prompt in todo
        )
        with closing(self._endpoint.ask(requests, self.usage)) as replies:
            for index, reply in replies:
                yield {todo[index]: reply}
