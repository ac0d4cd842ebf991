"""The terminal chat: a loop of questions and streamed answers, also for scripts that write questions to its input."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from shellv_core.config import nearest
from shellv_core.endpoint.client import EndpointClient, EndpointError, user_message
from shellv_core.errors import ServingError
from shellv_core.serving.page.transcripts import Talk, Transcript

HELP = """\
/image PATH|URL   start again with another picture (png, jpeg, webp or gif)
/adapter [NAME]   let another adapter or model answer from now on; alone: list them
/compare NAME...  ask the last question once more, of several of them; the conversation stays as it is
/params [K=V...]  set sampling parameters, K= back to its default; alone: show them
/save FILE        write the conversation, as Markdown if FILE ends in .md, else as JSON
/reset            start again with the same picture
/help             this list
/quit             leave; so does the end of the input (Ctrl-D)
Ctrl-C stops an answer; what came of it stays in the conversation."""
PARAMETERS: dict[str, Callable[[str], Any]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "max_tokens": int,
    "min_tokens": int,
    "seed": int,
    "presence_penalty": float,
    "frequency_penalty": float,
    "repetition_penalty": float,
}
MAX_IMAGE_BYTES = 10 << 20
BUSY_TRIES = 5


class Chat:
    """A conversation with an endpoint.

    Args:
        client: where the models answer.
        image: path or https address of a picture for the first question.
        options: sampling parameters as in the API.

    Raises:
        ServingError: if `image` cannot be read or fetched.
    """

    def __init__(self, client: EndpointClient, image: str | None, options: dict[str, Any]) -> None:
        self._client, self._options = client, options
        self._image_name = image
        self._image = read_image(image) if image else None
        self._messages: list[dict[str, Any]] = []
        self._texts: list[dict[str, str]] = []
        self._model = ""
        self._interactive = sys.stdin.isatty()
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._take_image,
            "/adapter": self._choose,
            "/compare": self._compare,
            "/params": self._set_parameters,
            "/save": self._save,
            "/reset": lambda _: self._reset(),
            "/help": lambda _: print(HELP),
        }

    def run(self) -> int:
        """Read lines until the input ends; 0 if every question was answered, else 1.

        Raises:
            EndpointError: if nothing answers at the endpoint.
        """
        card = asyncio.run(self._client.model())
        self._model = card["id"]
        if self._interactive:
            import readline  # noqa: F401  editing and history for input()

            length = f", a context of {card['context_length']} tokens" if card.get("context_length") else ""
            print(f"{self._model}{length}. /help lists the commands.")
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
        if not line.startswith("/"):
            self._ask(line)
        elif command in self._commands:
            self._commands[command](argument.strip())
        else:
            raise ServingError(f"unknown command {command!r}; /help lists them.")

    def _ask(self, question: str) -> None:
        message = user_message(question, None if self._messages else self._image)
        answer = self._answer([*self._messages, message], self._model)
        if answer:
            self._messages += [message, {"role": "assistant", "content": answer}]
            self._texts += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def _answer(self, messages: list[dict[str, Any]], model: str) -> str:
        """Print the answer as it comes, and return what came before its end or Ctrl-C."""
        pieces: list[str] = []
        try:
            asyncio.run(self._print_answer(messages, model, pieces))
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            print(" [stopped]")
        return "".join(pieces)

    async def _print_answer(self, messages: list[dict[str, Any]], model: str, pieces: list[str]) -> None:
        for left in reversed(range(BUSY_TRIES)):
            try:
                async with contextlib.aclosing(self._client.stream(messages, **self._options, model=model)) as stream:
                    async for piece in stream:
                        pieces.append(piece.text)
                        print(piece.text, end="", flush=True)
                break
            except EndpointError as error:
                if pieces:
                    print(flush=True)  # ends the half line
                if error.status not in (429, 503) or pieces or not left:
                    raise
                wait = min(error.retry_after_seconds or 1.0, 60.0)
                print(f"shellv: {error} Trying again in {wait:g} s.", file=sys.stderr)
                await asyncio.sleep(wait)
        print(flush=True)

    def _take_image(self, argument: str) -> None:
        if not argument:
            raise ServingError("/image needs the path or https address of a picture, for example /image photo.jpg")
        self._image, self._image_name = read_image(argument), argument
        self._reset()

    def _reset(self) -> None:
        self._messages, self._texts = [], []

    def _choose(self, argument: str) -> None:
        names = self._names()
        if not argument:
            print("\n".join(f"{'*' if name == self._model else ' '} {name}" for name in names))
            return
        self._model = _known(argument, names)

    def _compare(self, argument: str) -> None:
        names = self._names()
        chosen = [_known(name, names) for name in argument.split()]
        if not chosen:
            raise ServingError(f"/compare needs names of what should answer; served are {', '.join(names)}.")
        if not self._messages:
            raise ServingError("/compare asks the last question once more, and there is none yet.")
        for name in chosen:
            print(f"--- {name}")
            self._answer(self._messages[:-1], name)

    def _names(self) -> list[str]:
        return [card["id"] for card in asyncio.run(self._client.models())]

    def _set_parameters(self, argument: str) -> None:
        changed = dict(self._options)
        for pair in argument.split():
            name, separator, value = pair.partition("=")
            if name not in PARAMETERS or not separator:
                raise ServingError(f"{pair!r} is no NAME=VALUE of a parameter; {nearest(name, PARAMETERS)}")
            if not value:
                changed.pop(name, None)
                continue
            try:
                changed[name] = PARAMETERS[name](value)
            except ValueError:
                kind = "whole number" if PARAMETERS[name] is int else "number"
                raise ServingError(f"{name}={value} is not a {kind}.") from None
        self._options = changed
        if not argument:
            print(" ".join(f"{name}={value}" for name, value in changed.items()) or "all by default")

    def _save(self, argument: str) -> None:
        if not argument:
            raise ServingError("/save needs the file to write, for example /save talk.md")
        path = Path(argument).expanduser()
        transcript = Transcript(talks=(Talk.of(self._model, self._options, self._texts),), image=self._image_name)
        try:
            path.write_text(
                transcript.to_markdown() if path.suffix == ".md" else transcript.to_json(), encoding="utf-8"
            )
        except OSError as error:
            raise ServingError(f"cannot write {path}: {error.strerror}.") from None


def read_image(source: str) -> bytes:
    """The bytes of a picture file at a path or an https address.

    An address is fetched with the server's own fences: from its host alone, at public addresses, without redirects.

    Raises:
        ServingError: if it cannot be read or fetched.
    """
    if "://" in source:
        return _fetch(source)
    path = Path(source).expanduser()
    try:
        return path.read_bytes()
    except OSError as error:
        raise ServingError(f"cannot read the picture {path}: {error.strerror}.") from None


def _fetch(url: str) -> bytes:
    from shellv_core.serving.remote_images import HOST, RemoteImageConfig, RemoteImages

    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        host = ""
    if not url.startswith("https://") or HOST.fullmatch(host) is None:
        raise ServingError(
            f"{url[:80]!r} is not https://HOST/PATH with the name of a host; save the picture to a file."
        )
    remote = RemoteImages(RemoteImageConfig(hosts=(host,)), MAX_IMAGE_BYTES)
    return asyncio.run(remote.fetch(url, "image"))[0]


def _known(name: str, names: list[str]) -> str:
    if name not in names:
        raise ServingError(f"{name!r} is not served here; {nearest(name, names)}")
    return name
