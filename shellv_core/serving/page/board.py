"""Conversations with one model or several beside each other, about one picture: the tabs "chat" and "side by side"."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

from shellv_core.errors import ServingError
from shellv_core.serving.page import turns
from shellv_core.serving.page.asking import Answer, Asked, ask_all
from shellv_core.serving.page.hallucination import COLORS, highlighted
from shellv_core.serving.page.look import figures
from shellv_core.serving.page.offline import gr
from shellv_core.serving.page.parts import (
    QUICK,
    Parameters,
    QuestionBar,
    Site,
    chat_box,
    example_row,
    options,
    picture_box,
)
from shellv_core.serving.page.transcripts import Talk, Transcript


class Board:
    """A tab's content. Draws itself into the open Gradio context.

    Args:
        site: what the page works with.
        name: begins the ids of its elements.
        columns: the most conversations beside each other.
    """

    def __init__(self, site: Site, name: str, columns: int) -> None:
        self.site, self.name = site, name
        self.models: list[Any] = []
        self.chats: list[Any] = []
        self.figures: list[Any] = []
        self.views: list[Any] = []
        self.parameters: list[Parameters] = []
        self._frames: list[Any] = []
        self._draw(columns)
        self._wire()

    def _draw(self, columns: int) -> None:
        words, alone = self.site.words, columns == 1
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                self.image = picture_box(self.site, 300 if alone else 240)
                place = gr.Column()
                if alone:
                    self.parameters.append(Parameters.build(words))
                self.doubts = gr.Checkbox(label=words("doubts"), elem_id=f"{self.name}-doubts")
                self.shown = gr.Radio([1] if alone else [2, 3, 4], value=1 if alone else 2, label=words("columns"),
                                      visible=not alone, elem_id=f"{self.name}-columns")  # fmt: skip
            with gr.Column(scale=4 if alone else 7, min_width=320):
                with gr.Row(equal_height=False):
                    for index in range(columns):
                        self._draw_column(index, alone)
                self.bar = QuestionBar.build(self.site, self.name)
                with gr.Row(elem_classes="actions"):
                    self.retry, self.undo, self.clear, self.export, self.share = (
                        gr.Button(words(key), size="sm", min_width=90, elem_id=f"{self.name}-{key}")
                        for key in ("regenerate", "undo", "clear", "export", "share")
                    )
                gr.Markdown(words("share_note"), elem_classes="note")
                self.files = gr.File(
                    label=words("files"), visible=False, file_count="multiple", elem_id=f"{self.name}-files"
                )
                self.address = gr.Textbox(
                    label=words("address"), visible=False, buttons=["copy"], elem_id=f"{self.name}-address"
                )
        with place:
            example_row(self.site, self.image, self.bar.question)

    def _draw_column(self, index: int, alone: bool) -> None:
        words = self.site.words
        with gr.Column(min_width=260, visible=index < 2) as frame:
            self.models.append(gr.Dropdown([], label=words("model"), elem_id=f"{self.name}-model-{index}"))
            if not alone:
                self.parameters.append(Parameters.build(words, compact=True))
            self.chats.append(
                chat_box(self.site, f"{self.name}-talk-{index}", words("conversation"), height=440 if alone else 380)
            )
            self.figures.append(gr.HTML("", elem_classes="figures", elem_id=f"{self.name}-figures-{index}"))
            self.views.append(
                gr.HighlightedText(
                    label=words("view"),
                    color_map=COLORS,
                    show_legend=True,
                    visible=False,
                    elem_id=f"{self.name}-view-{index}",
                )
            )
        self._frames.append(frame)

    def _wire(self) -> None:
        bar, chats = self.bar, self.chats
        flat = [component for each in self.parameters for component in each.components]
        inputs = [self.shown, self.doubts, self.image, *self.models, *flat, *chats]
        outputs = [*chats, *self.figures, *self.views]
        self.runs: list[Any] = []
        self.saves: list[Any] = []

        def begin(start: Any, only: int | None = None) -> None:
            run, end = bar.run(start, self._answering(only), inputs, outputs)
            self.runs.append(run)
            self.saves.append(end)

        begin(gr.on([bar.question.submit, bar.send.click], self._add, [bar.question, self.shown, *chats],
                    [bar.question, *chats], **QUICK))  # fmt: skip
        begin(self.retry.click(self._without_answers, chats, chats, **QUICK))
        for index, chat in enumerate(chats):
            begin(chat.retry(lambda history: turns.without_answer(turns.plain(history)), chat, chat, **QUICK), index)
            begin(chat.edit(self._edited, chats, chats, **QUICK))
            chat.undo(self._undone, chats, [bar.question, *chats], **QUICK)
        self.undo.click(self._undone, chats, [bar.question, *chats], **QUICK)
        bar.stop.click(lambda: bar.working(False), None, bar.buttons, cancels=self.runs, **QUICK)
        gr.on(
            [self.clear.click, self.image.input, self.image.clear, *(chat.clear for chat in chats)],
            self._cleared,
            None,
            [*outputs, *bar.buttons, self.files, self.address],
            cancels=self.runs,
            **QUICK,
        )
        self.shown.change(
            lambda shown: [gr.Column(visible=index < shown) for index in range(len(chats))],
            self.shown,
            self._frames,
            **QUICK,
        )
        self.export.click(self._exported, inputs, self.files, **QUICK)
        self.share.click(self._shared, inputs, self.address, **QUICK)

    def _answering(self, only: int | None) -> Callable[..., AsyncGenerator[dict[Any, Any], None]]:
        """An event's function that lets all columns answer, or the one."""

        async def answer(*values: Any) -> AsyncGenerator[dict[Any, Any], None]:
            histories, models, chosen, doubts, image = self._values(values)
            extensions = {"shellv": {"hallucination": True}} if doubts else {}
            asked: dict[int, Asked] = {}
            for index, history in enumerate(histories):
                if not history or history[-1]["role"] != "user" or only not in (None, index):
                    continue
                try:
                    sampling = {"model": models[index], **options(*chosen[index]), **extensions}
                    asked[index] = Asked(turns.to_messages(history, image), sampling)
                except ServingError as error:
                    raise gr.Error(str(error), print_exception=False) from None
            yield {each: gr.HighlightedText(visible=False) for each in self.views}
            async with aclosing(ask_all(self.site.client, asked)) as answers:
                async for index, step in answers:
                    yield self._update(index, histories[index], step, models[index])

        return answer

    def _update(self, index: int, history: turns.History, answer: Answer, model: str) -> dict[Any, Any]:
        update: dict[Any, Any] = {self.figures[index]: figures(answer, self.site.context_length(model))}
        if answer.hallucination is not None:
            spans: Any = highlighted(answer.text, answer.hallucination)
            update[self.views[index]] = gr.HighlightedText(spans, visible=True)
        if answer.text:
            update[self.chats[index]] = [*history, {"role": "assistant", "content": answer.text}]
        return update

    def _values(self, values: tuple[Any, ...]) -> tuple[list[turns.History], list[str], list[Any], bool, str | None]:
        """Histories, models and parameters of the columns that are shown, whether doubts are, and the picture, from an
        event's inputs."""
        shown, doubts, image, *rest = values
        columns = len(self.chats)
        models, rest = rest[:columns], rest[columns:]
        width = len(self.parameters[0].components)
        chosen = [rest[index * width : (index + 1) * width] for index in range(columns)]
        histories = [turns.plain(history) for history in rest[columns * width :]]
        return histories[:shown], models[:shown], chosen[:shown], doubts, image

    def _add(self, question: str, shown: int, *histories: turns.History) -> list[Any]:
        plain = [turns.plain(history) for history in histories]
        if not question.strip():
            return [question, *plain]
        return ["", *(turns.add_question(each, question) if index < shown else [] for index, each in enumerate(plain))]

    def _without_answers(self, *histories: turns.History) -> Any:
        return self._each([turns.without_answer(turns.plain(history)) for history in histories])

    def _undone(self, *histories: turns.History) -> list[Any]:
        left = [turns.without_exchange(turns.plain(history)) for history in histories]
        return [next((question for _, question in left if question), ""), *(history for history, _ in left)]

    def _edited(self, event: gr.EditData, *histories: turns.History) -> Any:
        index = event.index if isinstance(event.index, int) else event.index[0]
        plain = [turns.plain(history) for history in histories]
        number = turns.question_number(next((each for each in plain if len(each) > index), []), index)
        question = turns.plain([{"role": "user", "content": event.value}])[0]["content"]
        return self._each([turns.with_question(each, number, question) for each in plain])

    def _cleared(self) -> dict[Any, Any]:
        hidden = {self.files: gr.File(None, visible=False), self.address: gr.Textbox("", visible=False)}
        blank: dict[Any, Any] = {chat: [] for chat in self.chats} | dict.fromkeys(self.figures, "")
        blank |= {view: gr.HighlightedText(visible=False) for view in self.views}
        return {**blank, **hidden, **self.bar.working(False)}

    def _transcript(self, values: tuple[Any, ...]) -> Transcript:
        histories, models, chosen, _, image = self._values(values)
        talks = (
            Talk.of(model, options(*each), history)
            for model, each, history in zip(models, chosen, histories, strict=True)
        )
        return Transcript(talks=tuple(talks), image=image and Path(image).name)

    def _exported(self, *values: Any) -> Any:
        paths = self._checked(lambda: self._transcript(values).write(Path(tempfile.mkdtemp(prefix="shellv-export-"))))
        return gr.File(paths, visible=True)

    def _shared(self, request: gr.Request, *values: Any) -> Any:
        address = self._checked(lambda: self.site.shares.add(self._transcript(values)))
        # The browser knows under which address it reaches this page; a proxy may hide it from us.
        page = request.headers.get("referer", "").partition("?")[0]
        return gr.Textbox(f"{page}?share={address}", visible=True)

    @staticmethod
    def _checked(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except ServingError as error:
            raise gr.Error(str(error), print_exception=False) from None

    @staticmethod
    def _each(values: list[Any]) -> Any:
        """Several outputs, or the only one."""
        return values if len(values) > 1 else values[0]
