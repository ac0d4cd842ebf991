"""The chat page at ``/ui``: a client of the API like any other.

It sends uploaded files as they are, so that the API's checks of pictures hold here too, and loads nothing from other
places. Votes and shared conversations lie in the project folder, below ``page/``.
"""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shellv_core.endpoint.client import EndpointClient, image_data_url
from shellv_core.errors import ServingError
from shellv_core.serving.page import turns
from shellv_core.serving.page.arena import Arena, RatingTable
from shellv_core.serving.page.board import Board
from shellv_core.serving.page.look import CSS, shared, theme
from shellv_core.serving.page.offline import gr
from shellv_core.serving.page.parts import PRIVATE, QUICK, Site, example_pictures
from shellv_core.serving.page.texts import translations
from shellv_core.serving.page.transcripts import Shares
from shellv_core.serving.page.votes import VoteLog, page_folder

if TYPE_CHECKING:
    from fastapi import FastAPI

    from shellv_core.serving.http.keys import Keys

PATH = "/ui"
MAX_FILE_SIZE = "10mb"
MAX_COLUMNS = 4
MAX_KEPT_BYTES = 2 << 20
"""Of a picture that the browser keeps with its conversation; its store takes five million characters."""


def mount_ui(app: FastAPI, api_url: str, model_name: str, keys: Keys | None = None, folder: Path | None = None) -> None:
    """Mount the page into `app`; it asks the API at `api_url`.

    Args:
        model_name: the model that is asked by default.
        keys: who may use the page: it asks for a name and, as the password, a key that opens ``chat``.
        folder: where votes and shared conversations are kept; None for `page_folder`.
    """
    folder = folder or page_folder()
    client = EndpointClient(api_url, keys.add("page", frozenset({"chat"})) if keys else "")
    site = Site(
        client, translations(), VoteLog(folder / "votes"), Shares(folder / "shared"), examples=example_pictures()
    )
    gr.mount_gradio_app(
        app,
        _page(site, model_name),
        path=PATH,
        root_path=PATH,  # without it, what unqueued events name is looked for outside the mount
        theme=theme(),
        css=CSS,
        i18n=site.words,
        ssr_mode=False,
        max_file_size=MAX_FILE_SIZE,
        footer_links=["settings"],  # language, and light or dark
        run_history=False,
        enable_monitoring=False,
        show_error=True,
        auth=_login(keys) if keys else None,
        auth_message="Your name, and your key as the password.",
    )


def _login(keys: Keys) -> Callable[[str, str], bool]:
    def may_use(name: str, secret: str) -> bool:
        key = keys.find(secret)
        return key is not None and "chat" in key.scopes

    return may_use


def _page(site: Site, model_name: str) -> Any:
    words = site.words
    with gr.Blocks(title=f"{model_name} - Shell-V", analytics_enabled=False) as page:
        gr.HTML("<h1>Shell-V</h1>", elem_id="title")
        with gr.Accordion(words("shared"), visible=False) as shared_frame:
            shared_text = gr.HTML("")
        with gr.Tabs():
            with gr.Tab(words("chat"), id="chat"):
                chat = Board(site, "chat", 1)
            with gr.Tab(words("compare"), id="compare"):
                compare = Board(site, "compare", MAX_COLUMNS)
            with gr.Tab(words("arena"), id="arena"):
                arena = Arena(site)
            with gr.Tab(words("ratings"), id="ratings") as ratings_tab:
                ratings = RatingTable(site)
        ratings_tab.select(ratings.rows, None, ratings.table, **PRIVATE)
        choices = [*chat.models, *compare.models]

        # Until the models are shown: the server may have none yet, and a browser that is still loading the words of
        # its language may lose the first update.
        until_shown = gr.Timer(2)

        async def models_now(*chosen: str | None) -> list[Any]:
            try:
                names = await site.refresh()
            except ServingError:
                return [gr.skip()] * (len(chosen) + 2)
            places = [0, *range(MAX_COLUMNS)]
            values = [
                each if each in names else names[place % len(names)] for each, place in zip(chosen, places, strict=True)
            ]
            drawn = [gr.Dropdown(choices=names, value=value) for value in values]
            return [*drawn, gr.Markdown(visible=len(names) < 2), gr.Timer(active=list(chosen) != values)]

        def shared_now(request: gr.Request) -> tuple[Any, str]:
            return _shared(site, request)

        for trigger in (page.load, until_shown.tick):
            trigger(models_now, choices, [*choices, arena.lone, until_shown], show_progress="hidden", **PRIVATE)
        page.load(shared_now, None, [shared_frame, shared_text], **PRIVATE)
        _keep(page, chat)
    return page


def _shared(site: Site, request: gr.Request) -> tuple[Any, str]:
    """The conversation that the page's address names, if it names one."""
    address = request.query_params.get("share")
    if not address:
        return gr.Accordion(visible=False), ""
    try:
        return gr.Accordion(visible=True), shared(site.shares.find(address))
    except ServingError as error:
        raise gr.Error(str(error), print_exception=False) from None


def _keep(page: Any, board: Board) -> None:
    """Let the browser keep the last conversation, and bring it back."""
    kept = gr.BrowserState(None, storage_key="shellv-chat")
    chat = board.chats[0]

    def keep(history: turns.History, image: str | None) -> dict[str, Any] | None:
        picture = Path(image).read_bytes() if image else b""
        if len(picture) > MAX_KEPT_BYTES:
            return None  # without its picture it would go on about another
        return {"turns": turns.plain(history), "image": image_data_url(picture) if picture else None}

    def bring_back(value: dict[str, Any] | None) -> tuple[turns.History, str | None]:
        if not value:
            return [], None
        return value["turns"], _file(value["image"]) if value["image"] else None

    page.load(bring_back, kept, [chat, board.image], **PRIVATE)
    for end in (*board.saves, board.bar.stop.click, board.clear.click, board.undo.click):
        then = end.then if hasattr(end, "then") else end
        then(keep, [chat, board.image], kept, **QUICK)


def _file(url: str) -> str:
    """A temporary file with the picture of a data URL."""
    head, _, data = url.partition(";base64,")
    kind = head.rpartition("/")[2]
    with tempfile.NamedTemporaryFile(prefix="shellv-", suffix=f".{kind}", delete=False) as file:
        file.write(base64.b64decode(data))
    return file.name
