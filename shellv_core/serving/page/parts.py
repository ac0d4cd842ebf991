"""What the page's tabs are put together from."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shellv_core.endpoint.client import EndpointClient
from shellv_core.errors import ServingError
from shellv_core.serving.page.offline import gr
from shellv_core.serving.page.transcripts import Shares
from shellv_core.serving.page.visitors import Visitors
from shellv_core.serving.page.votes import VoteLog

NUM_EXAMPLES = 3
EXAMPLE_PIXELS = 384
EXAMPLE_QUESTIONS = (
    "Describe this image in one sentence.",
    "What is in this picture?",
    "Is there a dog in the image?",
)
CONCURRENT_ANSWERS = 32
PRIVATE: dict[str, Any] = {"api_visibility": "private"}  # programs use the API itself
QUICK: dict[str, Any] = {"queue": False, **PRIVATE}


@dataclass
class Site:
    """What every tab works with.

    Attributes:
        client: the API.
        words: the translations.
        votes, shares: where votes and shared conversations are.
        visitors: names voters.
        examples: pictures with questions.
        cards: the served models by id, as the API lists them, since the last `refresh`.
    """

    client: EndpointClient
    words: gr.I18n
    votes: VoteLog
    shares: Shares
    visitors: Visitors = field(default_factory=Visitors)
    examples: list[list[str]] = field(default_factory=list)
    cards: dict[str, dict[str, Any]] = field(default_factory=dict)

    async def refresh(self) -> list[str]:
        """The ids of the models that are served now."""
        self.cards = {card["id"]: card for card in await self.client.models()}
        return list(self.cards)

    def context_length(self, model: str) -> int:
        """How many tokens a conversation may have; 0 where that is unknown."""
        return int(self.cards.get(model, {}).get("context_length") or 0)


def example_pictures() -> list[list[str]]:
    """Synthetic scenes in a temporary folder that lives as long as this process, with a question each."""
    from shellv_core.data.scenes.config import ScenesConfig
    from shellv_core.data.scenes.rendering import render_jpeg
    from shellv_core.data.scenes.scene import sample_scene

    folder = Path(tempfile.mkdtemp(prefix="shellv-examples-"))
    rows = []
    for index, question in enumerate(EXAMPLE_QUESTIONS):
        path = folder / f"scene-{index}.jpg"
        path.write_bytes(render_jpeg(sample_scene(ScenesConfig(), 0, "validation", index), EXAMPLE_PIXELS, 90))
        rows.append([str(path), question])
    return rows


@dataclass(frozen=True)
class Parameters:
    """The components of the sampling parameters, in the order in which `options` takes their values."""

    components: tuple[Any, ...]

    @classmethod
    def build(cls, words: gr.I18n, compact: bool = False) -> Parameters:
        """Draw them, folded away."""

        def info(key: str) -> Any:
            return None if compact else words(key)

        with gr.Accordion(words("parameters"), open=False):
            return cls(
                (
                    gr.Slider(0, 2, 0, step=0.05, label=words("temperature"), info=info("temperature_info")),
                    gr.Slider(0.05, 1, 1, step=0.05, label=words("top_p"), info=info("top_p_info")),
                    gr.Slider(1, 2048, 128, step=1, label=words("max_tokens"), info=info("max_tokens_info")),
                    gr.Textbox(label=words("seed"), info=info("seed_info"), placeholder=words("random")),
                )
            )


def options(temperature: float, top_p: float, max_tokens: int, seed: str | None) -> dict[str, Any]:
    """The API's sampling parameters.

    Raises:
        ServingError: if the seed is not a whole number.
    """
    chosen: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "max_tokens": int(max_tokens)}
    if seed and seed.strip():
        try:
            chosen["seed"] = int(seed)
        except ValueError:
            raise ServingError(f"the seed {seed!r} is not a whole number; leave it empty for a random one.") from None
    return chosen


def picture_box(site: Site, height: int = 300) -> gr.Image:
    """A picture by upload, paste or webcam; its file goes on untouched, and undecoded."""
    return gr.Image(
        label=site.words("picture"),
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard", "webcam"],
        height=height,
    )


def example_row(site: Site, image: Any, question: Any) -> Any:
    """Pictures to try, each with a question."""
    return gr.Examples(
        site.examples,
        [image, question],
        label=site.words("examples"),
        visible_columns=[0],
        cache_examples=False,
        api_visibility="private",
    )


def chat_box(site: Site, name: str, label: Any, editable: bool = True, height: int = 420) -> gr.Chatbot:
    """A conversation."""
    placeholder: Any = site.words("placeholder")
    return gr.Chatbot(
        label=label,
        elem_id=name,
        elem_classes="talk",
        height=height,
        render_markdown=False,  # an answer's markup could load pictures from anywhere
        placeholder=placeholder,
        buttons=["copy", "copy_all"],
        editable="user" if editable else None,
        group_consecutive_messages=False,
        feedback_options=None,
    )


@dataclass(frozen=True)
class QuestionBar:
    """Where questions are typed and sent, with the button that stops their answers."""

    question: Any
    send: Any
    stop: Any

    @classmethod
    def build(cls, site: Site, name: str) -> QuestionBar:
        """Draw it."""
        with gr.Row(equal_height=True):
            question = gr.Textbox(
                placeholder=site.words("ask"),
                show_label=False,
                container=False,
                max_lines=6,
                scale=8,
                min_width=200,
                elem_id=f"{name}-question",
                autofocus=name == "chat",
            )
            send = gr.Button(site.words("send"), variant="primary", min_width=90, elem_id=f"{name}-send")
            stop = gr.Button(site.words("stop"), variant="stop", visible=False, min_width=90, elem_id=f"{name}-stop")
        return cls(question, send, stop)

    def working(self, on: bool) -> dict[Any, Any]:
        """Updates that show the one button or the other."""
        return {self.send: gr.Button(visible=not on), self.stop: gr.Button(visible=on)}

    @property
    def buttons(self) -> list[Any]:
        """What `working` updates."""
        return [self.send, self.stop]

    def run(self, start: Any, answer: Any, inputs: Sequence[Any], outputs: Sequence[Any]) -> tuple[Any, Any]:
        """Behind the event `start` let `answer` stream; returns that event, and the one that follows its good end."""
        event = start.then(lambda: self.working(True), None, self.buttons, **QUICK).then(
            answer,
            list(inputs),
            list(outputs),
            concurrency_limit=CONCURRENT_ANSWERS,
            show_progress="hidden",
            **PRIVATE,
        )
        ends = [
            each(lambda: self.working(False), None, self.buttons, **QUICK) for each in (event.success, event.failure)
        ]
        return event, ends[0]
