"""The chat page at ``/ui``: a client of the API like any other.

It sends uploaded files as they are, so that the API's checks of pictures hold here too, and loads nothing from other
places.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shellv_core.endpoint.client import EndpointClient, user_message
from shellv_core.errors import ServingError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from shellv_core.serving.http.keys import Keys

PATH = "/ui"
MAX_FILE_SIZE = "10mb"
CONCURRENT_ANSWERS = 32
# A browser that redraws the conversation for every token of a quick model is too busy to take a click on Stop.
UPDATE_SECONDS = 0.1
SYSTEM_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
MONO_FONTS = ["ui-monospace", "Menlo", "Consolas", "monospace"]

CSS = """
.gradio-container {width: 100% !important; max-width: 1180px !important; margin: 0 auto !important;}
#title {padding: 6px 2px 2px;}
#title h1 {margin: 0; font-size: 1.5rem; letter-spacing: -0.01em;}
#title p {margin: 2px 0 0; color: var(--body-text-color-subdued);}
#figures {min-height: 1.4rem; color: var(--body-text-color-subdued); font-size: 0.85rem;}
#figures p {margin: 0;}
"""

History = list[dict[str, Any]]


def mount_ui(app: FastAPI, api_url: str, model_name: str, keys: Keys | None = None) -> None:
    """Mount the page into `app`; it asks the API at `api_url`.

    Args:
        keys: who may use the page: it asks for a name and, as the password, a key that opens ``chat``.
    """
    # Before the import: gradio reads it once, and would call home otherwise.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    theme = gr.themes.Soft(
        primary_hue="indigo", neutral_hue="slate", radius_size="lg", font=SYSTEM_FONTS, font_mono=MONO_FONTS
    )
    gr.mount_gradio_app(
        app,
        _page(EndpointClient(api_url, keys.add("page", frozenset({"chat"})) if keys else ""), model_name),
        path=PATH,
        theme=theme,
        css=CSS,
        ssr_mode=False,
        max_file_size=MAX_FILE_SIZE,
        footer_links=[],
        show_error=True,
        auth=_login(keys) if keys else None,
        auth_message="Your name, and your key as the password.",
    )


def _login(keys: Keys) -> Callable[[str, str], bool]:
    def may_use(name: str, secret: str) -> bool:
        key = keys.find(secret)
        return key is not None and "chat" in key.scopes

    return may_use


def _page(client: EndpointClient, model_name: str) -> Any:
    import gradio as gr

    with gr.Blocks(title=f"{model_name} - Shell-V", analytics_enabled=False) as page:
        gr.HTML(
            f"<h1>{model_name}</h1><p>Ask about a picture. A new picture starts a new conversation.</p>",
            elem_id="title",
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=320):
                image = gr.Image(
                    label="Picture",
                    type="filepath",
                    image_mode=None,  # the file goes on untouched, and undecoded
                    sources=["upload", "clipboard", "webcam"],
                    height=340,
                )
                with gr.Accordion("Parameters", open=False):
                    temperature = gr.Slider(
                        0, 2, 0, step=0.05, label="Temperature", info="0 always takes the likeliest token"
                    )
                    top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top p", info="share of likely tokens to draw from")
                    max_tokens = gr.Slider(1, 2048, 128, step=1, label="Longest answer", info="in tokens")
                    seed = gr.Textbox(
                        label="Seed", info="a whole number makes a drawn answer repeatable", placeholder="random"
                    )
            with gr.Column(scale=3, min_width=360):
                chat = gr.Chatbot(
                    label="Conversation",
                    height=480,
                    render_markdown=False,  # an answer's markup could load pictures from anywhere
                    placeholder="Choose a picture and ask, for example: What is in this picture?",
                    buttons=["copy", "copy_all"],
                )
                figures = gr.Markdown("", elem_id="figures")
                question = gr.Textbox(
                    placeholder="Ask about the picture, then press Enter", show_label=False, autofocus=True, max_lines=6
                )
                with gr.Row():
                    send = gr.Button("Send", variant="primary", elem_id="send")
                    stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop")
                    retry = gr.Button("Retry", elem_id="retry")
                    clear = gr.Button("Clear", elem_id="clear")

        async def answer(
            history: History, image_path: str | None, *parameters: Any
        ) -> AsyncGenerator[tuple[History, str], None]:
            yield history, ""
            if not history or history[-1]["role"] != "user":
                return
            try:
                messages, options = _messages(history, image_path), _options(*parameters)
                async for text, line in _answers(client, messages, options):
                    yield [*history, {"role": "assistant", "content": text}], line
            except ServingError as error:
                gr.Warning(str(error), title="No answer")

        def working(on: bool) -> tuple[Any, Any]:
            return gr.Button(visible=not on), gr.Button(visible=on)

        private: dict[str, Any] = {"api_visibility": "private"}  # programs use the API itself
        quick: dict[str, Any] = {"queue": False, **private}
        runs: list[Any] = []
        starts = [
            gr.on([question.submit, send.click], _add_question, [question, chat], [question, chat], **quick),
            retry.click(_drop_answer, chat, chat, **quick),
        ]
        for start in starts:
            run = start.then(lambda: working(True), None, [send, stop], **quick).then(
                answer,
                [chat, image, temperature, top_p, max_tokens, seed],
                [chat, figures],
                concurrency_limit=CONCURRENT_ANSWERS,
                show_progress="hidden",
                **private,
            )
            for end in (run.success, run.failure):
                end(lambda: working(False), None, [send, stop], **quick)
            runs.append(run)
        stop.click(lambda: working(False), None, [send, stop], cancels=runs, **quick)
        gr.on(
            [clear.click, image.input, image.clear],
            lambda: ([], "", *working(False)),
            None,
            [chat, figures, send, stop],
            cancels=runs,
            **quick,
        )
    return page


async def _answers(
    client: EndpointClient, messages: History, options: dict[str, Any]
) -> AsyncGenerator[tuple[str, str], None]:
    """The answer so far and a line of figures, a few times a second."""
    started, first, shown = time.monotonic(), 0.0, 0.0
    text, line = "", ""
    async with contextlib.aclosing(client.stream(messages, **options)) as pieces:
        async for piece in pieces:
            now = time.monotonic()
            if piece.text and not text:
                first = now - started
                line = f"first words after {first:.2f} s"
            text += piece.text
            if piece.usage:
                tokens = piece.usage["completion_tokens"]
                rate = tokens / max(now - started - first, 1e-3)
                line += f" · {tokens} tokens at {rate:.0f} per second · prompt of {piece.usage['prompt_tokens']} tokens"
            elif now - shown < UPDATE_SECONDS:
                continue
            shown = now
            yield text, line


def _options(temperature: float, top_p: float, max_tokens: int, seed: str | None) -> dict[str, Any]:
    """The API's parameters.

    Raises:
        ServingError: if the seed is not a whole number.
    """
    options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "max_tokens": int(max_tokens)}
    if seed and seed.strip():
        try:
            options["seed"] = int(seed)
        except ValueError:
            raise ServingError(f"the seed {seed!r} is not a whole number; leave it empty for a random one.") from None
    return options


def _add_question(question: str, history: History) -> tuple[str, History]:
    if not question.strip():
        return question, history
    return "", [*history, {"role": "user", "content": question}]


def _drop_answer(history: History) -> History:
    kept = list(history)
    while kept and kept[-1]["role"] == "assistant":
        kept.pop()
    return kept


def _messages(history: History, image_path: str | None) -> History:
    """The conversation as the API takes it; the picture belongs to the first question."""
    messages: History = [{"role": turn["role"], "content": _text(turn["content"])} for turn in history]
    if image_path is not None:
        messages[0] = user_message(messages[0]["content"], Path(image_path).read_bytes())
    return messages


def _text(content: Any) -> str:
    """The text of a turn, which the chat component returns as a string or as a list of parts."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("type") == "text")
