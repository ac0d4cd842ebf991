"""The terminal chat: a loop of questions and streamed answers, also for scripts that write questions to its input."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import Any

from shellv_core.endpoint.client import EndpointClient, user_message
from shellv_core.errors import ServingError

HELP = """\
/image PATH  start again with another picture (png, jpeg, webp or gif)
/reset       start again with the same picture
/help        this list
/quit        leave; so does the end of the input (Ctrl-D)
Ctrl-C stops an answer; what came of it stays in the conversation."""


class Chat:
    """A conversation with an endpoint.

    Args:
        client: where the model answers.
        image: a picture for the first question.
        options: sampling parameters as in the API.

    Raises:
        ServingError: if `image` cannot be read.
    """

    def __init__(self, client: EndpointClient, image: Path | None, options: dict[str, Any]) -> None:
        self._client, self._options = client, options
        self._image = _read_image(image) if image else None
        self._messages: list[dict[str, Any]] = []
        self._interactive = sys.stdin.isatty()

    def run(self) -> int:
        """Read lines until the input ends; 0 if every question was answered, else 1.

        Raises:
            EndpointError: if nothing answers at the endpoint.
        """
        model = asyncio.run(self._client.model())
        if self._interactive:
            import readline  # noqa: F401  editing and history for input()

            print(f"{model['id']}, a context of {model['context_length']} tokens. /help lists the commands.")
        failed = False
        while (line := self._read_line()) is not None and line.split()[:1] != ["/quit"]:
            if not line:
                continue
            try:
                self._handle(line)
            except ServingError as error:
                failed = True
                print(f"shellv: {error}", file=sys.stderr)
        return int(failed and not self._interactive)

    def _read_line(self) -> str | None:
        while True:
            try:
                return input("> " if self._interactive else "").strip()
            except EOFError:
                return None
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                print()

    def _handle(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if command == "/image":
            self._image = _read_image(Path(argument.strip()).expanduser())
            self._messages = []
        elif command == "/reset":
            self._messages = []
        elif command == "/help":
            print(HELP)
        elif line.startswith("/"):
            raise ServingError(f"unknown command {command!r}; /help lists them.")
        else:
            self._ask(line)

    def _ask(self, question: str) -> None:
        message = user_message(question, None if self._messages else self._image)
        pieces: list[str] = []
        try:
            asyncio.run(self._print_answer([*self._messages, message], pieces))
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            print(" [stopped]")
        answer = "".join(pieces)
        if answer:
            self._messages += [message, {"role": "assistant", "content": answer}]

    async def _print_answer(self, messages: list[dict[str, Any]], pieces: list[str]) -> None:
        async with contextlib.aclosing(self._client.stream(messages, **self._options)) as stream:
            async for piece in stream:
                pieces.append(piece.text)
                print(piece.text, end="", flush=True)
        print(flush=True)


def _read_image(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ServingError(f"cannot read the picture {path}: {error.strerror}.") from None
