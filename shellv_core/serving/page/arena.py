"""The arena: two models that are drawn by chance answer without their names; a vote tells them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shellv_core.errors import ServingError
from shellv_core.serving.page import turns
from shellv_core.serving.page.asking import Asked, ask_all
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
from shellv_core.serving.page.ratings import VERDICTS, Verdict, rate
from shellv_core.serving.page.texts import CHINESE, ENGLISH
from shellv_core.serving.page.votes import Side, Vote, image_name, now

SIDES = ("A", "B")


@dataclass(frozen=True)
class Round:
    """A battle, kept by the server, so that what is voted on is what was said, whatever the browser sends.

    Attributes:
        models: ids as they are shown, left and right.
        revisions: theirs.
        histories: what was said.
        image: the picture's file.
        sampling: parameters of the last answers.
        answered: whether both have answered the last question.
        voted: whether it is over.
    """

    models: tuple[str, str]
    revisions: tuple[str, str]
    histories: tuple[turns.History, turns.History] = ([], [])
    image: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    answered: bool = False
    voted: bool = False


class Arena:
    """The tab's content. Draws itself into the open Gradio context."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self._draw()
        self._wire()

    def _draw(self) -> None:
        words = self.site.words
        gr.Markdown(words("arena_note"), elem_classes="note")
        self.lone = gr.Markdown(words("arena_lone"), visible=False)
        self.round = gr.State(None)
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                self.image = picture_box(self.site, 240)
                place = gr.Column()
                self.parameters = Parameters.build(words)
            with gr.Column(scale=5, min_width=320):
                self.chats, self.figures = [], []
                with gr.Row(equal_height=False):
                    for side in SIDES:
                        with gr.Column(min_width=260):
                            self.chats.append(
                                chat_box(self.site, f"arena-talk-{side}", side, editable=False, height=380)
                            )
                            self.figures.append(gr.HTML("", elem_classes="figures", elem_id=f"arena-figures-{side}"))
                with gr.Row(elem_classes="actions"):
                    self.verdicts = [
                        gr.Button(
                            words(each), interactive=False, min_width=96, elem_id=f"vote-{each}", elem_classes="verdict"
                        )
                        for each in VERDICTS
                    ]
                self.reveal = gr.Markdown(words("vote_first"), elem_id="reveal")
                self.bar = QuestionBar.build(self.site, "arena")
                with gr.Row(elem_classes="actions"):
                    self.new = gr.Button(words("new_round"), size="sm", elem_id="arena-new")
                gr.Markdown(words("consent"), elem_classes="note")
        with place:
            example_row(self.site, self.image, self.bar.question)

    def _wire(self) -> None:
        bar, chats = self.bar, self.chats
        everything = [self.round, *chats, *self.figures, *self.verdicts, self.reveal]
        start = gr.on(
            [bar.question.submit, bar.send.click],
            self._begun,
            [bar.question, self.round],
            [bar.question, *everything],
            **QUICK,
        )
        inputs = [self.round, self.image, *self.parameters.components]
        self.run, _ = bar.run(start, self._answered, inputs, everything)
        stop = bar.stop.click(lambda: bar.working(False), None, bar.buttons, cancels=[self.run], **QUICK)
        stop.then(self._stopped, self.round, [self.round, *self.verdicts], **QUICK)
        for verdict, button in zip(VERDICTS, self.verdicts, strict=True):
            button.click(self._voting(verdict), self.round, everything, **QUICK)
        gr.on(
            [self.new.click, self.image.input, self.image.clear, *(chat.clear for chat in chats)],
            lambda: {**self._fresh(), **bar.working(False)},
            None,
            [*everything, *bar.buttons],
            cancels=[self.run],
            **QUICK,
        )

    def _fresh(self) -> dict[Any, Any]:
        blank: dict[Any, Any] = {each: [] for each in self.chats} | dict.fromkeys(self.figures, "")
        return {**blank, self.round: None, self.reveal: self.site.words("vote_first"), **self._may_vote(False)}

    def _may_vote(self, on: bool) -> dict[Any, Any]:
        return {button: gr.Button(interactive=on) for button in self.verdicts}

    async def _begun(self, question: str, battle: Round | None) -> dict[Any, Any]:
        """A question to the models of this round, or of a new one."""
        if not question.strip():
            return {self.bar.question: question}
        update: dict[Any, Any] = {}
        if battle is None or battle.voted:
            try:
                names = await self.site.refresh()
            except ServingError as error:
                raise gr.Error(str(error), print_exception=False) from None
            if len(names) < 2:
                raise gr.Error("The arena needs two models; this server has one.", print_exception=False)
            first, second = random.sample(names, 2)
            battle = Round((first, second), (self._revision(first), self._revision(second)))
            update = self._fresh()
        left, right = (turns.add_question(history, question) for history in battle.histories)
        battle = replace(battle, histories=(left, right), answered=False)
        asked = dict(zip(self.chats, battle.histories, strict=True))
        return {**update, **asked, **self._may_vote(False), self.round: battle, self.bar.question: ""}

    def _revision(self, model: str) -> str:
        return str(self.site.cards[model].get("revision") or "")

    async def _answered(self, battle: Round | None, image: str | None, *chosen: Any) -> AsyncGenerator[Any, None]:
        if battle is None or not all(history and history[-1]["role"] == "user" for history in battle.histories):
            yield {self.round: battle}
            return
        histories = list(battle.histories)
        try:
            battle = replace(battle, image=image, sampling=options(*chosen))
            asked = {
                index: Asked(turns.to_messages(history, image), {"model": battle.models[index], **battle.sampling})
                for index, history in enumerate(histories)
            }
        except ServingError as error:
            raise gr.Error(str(error), print_exception=False) from None
        async with aclosing(ask_all(self.site.client, asked)) as answers:
            async for index, step in answers:
                # The pace could give a name away.
                update: dict[Any, Any] = {self.figures[index]: figures(replace(step, **_BLIND)) if step.note else ""}
                if step.text:
                    question = turns.without_answer(histories[index])
                    histories[index] = [*question, {"role": "assistant", "content": step.text}]
                    update[self.chats[index]] = histories[index]
                battle = replace(battle, histories=(histories[0], histories[1]))
                yield {**update, self.round: battle}
        yield self._stopped(battle)

    def _stopped(self, battle: Round | None) -> dict[Any, Any]:
        """Answers that were cut short can be voted on where both sides have said something."""
        if battle is None or battle.voted:
            return {self.round: battle}
        ready = all(history and history[-1]["role"] == "assistant" for history in battle.histories)
        return {self.round: replace(battle, answered=ready), **self._may_vote(ready)}

    def _voting(self, verdict: Verdict) -> Callable[..., dict[Any, Any]]:
        def vote(request: gr.Request, battle: Round | None) -> dict[Any, Any]:
            if battle is None or battle.voted or not battle.answered:
                return {self.round: battle}
            address = request.client.host if request.client else ""
            picture = Path(battle.image).read_bytes() if battle.image else None
            try:
                self.site.votes.add(_ballot(battle, verdict, self.site.visitors.name(address), picture), picture)
            except ServingError as error:
                raise gr.Error(str(error), print_exception=False) from None
            names = " · ".join(f"**{side}** = `{model}`" for side, model in zip(SIDES, battle.models, strict=True))
            return {self.round: replace(battle, voted=True), self.reveal: f"✔ {names}", **self._may_vote(False)}

        return vote


def _ballot(battle: Round, verdict: Verdict, voter: str, picture: bytes | None) -> Vote:
    left, right = (
        Side(model=model, revision=revision, options=battle.sampling, answers=_said(history, "assistant"))
        for model, revision, history in zip(battle.models, battle.revisions, battle.histories, strict=True)
    )
    return Vote(
        time=now(),
        voter=voter,
        verdict=verdict,
        image=image_name(picture) if picture else None,
        questions=_said(battle.histories[0], "user"),
        left=left,
        right=right,
    )


def _said(history: turns.History, role: str) -> tuple[str, ...]:
    return tuple(turn["content"] for turn in history if turn["role"] == role)


_BLIND: dict[str, Any] = {"first_seconds": 0.0, "tokens": 0}


class RatingTable:
    """The tab of ratings. Draws itself into the open Gradio context."""

    def __init__(self, site: Site) -> None:
        self.site, words = site, site.words
        gr.Markdown(words("ratings_note"), elem_classes="note")
        self.table = gr.Dataframe(
            headers=self._headers("en"),
            datatype=["number", "str", "number", "str", "number", "str"],
            interactive=False,
            elem_id="rating-table",
        )
        self.refresh = gr.Button(words("refresh"), size="sm", elem_id="refresh")
        self.refresh.click(self.rows, None, self.table, **QUICK)

    @staticmethod
    def _headers(language: str) -> list[str]:
        words = CHINESE if language.startswith("zh") else ENGLISH
        return [words[key] for key in ("rank", "model", "rating", "interval", "votes", "win_share")]

    async def rows(self, request: gr.Request) -> Any:
        """The table, best model first, with headers in the browser's language, for the page cannot translate them."""
        try:
            battles = [vote.battle for vote in self.site.votes.read()]
        except ServingError as error:
            raise gr.Error(str(error), print_exception=False) from None
        ratings = await asyncio.to_thread(rate, battles)
        rows = [
            [place, each.model, round(each.points), f"{each.low:.0f} - {each.high:.0f}", each.votes,
             f"{each.win_share:.0%}"]
            for place, each in enumerate(ratings, 1)
        ]  # fmt: skip
        return gr.Dataframe(rows, headers=self._headers(request.headers.get("accept-language", "")))
