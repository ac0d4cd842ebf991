r"""Conversation templates: one description from which the training text and the chat template both follow.

A template renders a LLaVA conversation as parts that know whether they are trained, and the same text as a Jinja chat
template for the tokenizer or processor; the prompt of a generation is a prefix of the training text. What is trained
is each answer with its end marker.

=================  ===================================================================================================
``v1_no_system``   ``USER: <image>\nq ASSISTANT: a</s>USER: ...``, the default
``v1``             the same after the system prompt of LLaVA-1.5 (vicuna_v1)
``llama_2``        ``[INST] <<SYS>>\nsystem\n<</SYS>>\n\nq [/INST] a </s><s>[INST] q [/INST] a </s>`` (llava_llama_2)
``mistral_instruct``  ``[INST] q [/INST] a </s>[INST] ...``
``chatml``         ``<|im_start|>user\nq<|im_end|><|im_start|>assistant\na<|im_end|>`` (chatml_direct: no line feed
                   between turns)
``plain``          ``<image>caption\n</s>``: one round, its question dropped
``shellv``         ``## huaman:q<|endoftext|>## assistant:a<|endoftext|>``, spelled as Shell-V was trained
``codeshell_chat`` ``<|endoftext|>## human:q |<end>| ## assistant:a |<end>| ``, as CodeShell's finetuning spells it
=================  ===================================================================================================

Where these differ from LLaVA (haotian-liu/LLaVA@c121f04), Shell-V (WisdomShell/shell-v@2860966) and CodeShell
(WisdomShell/codeshell@09d1adc):

- ``</s>``, ``<s>`` and ``<|endoftext|>`` stand for the tokenizer's own end and begin of text. Upstream writes them
  literally, which is ordinary text to another tokenizer, so that generation does not learn to stop. Where begin and
  end of text are one token (CodeShell), or there is no begin of text, rounds follow each other without it.
- ``plain`` ends with an end-of-text token after upstream's line feed, so that generation stops.
- An answer that holds ``|<end>|`` under ``codeshell_chat`` is left as it is: the marker is ordinary tokens there, in
  the text and in training alike. The text stays what was said; a model that repeats it is cut at its first ``|<end>|``.
- CodeShell's own inference leaves the spaces around ``|<end>|`` out, and joins what training encodes part by part; the
  chat template here keeps to training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from shellv_core.config import nearest
from shellv_core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_TOKEN = "<image>"  # noqa: S105
ROLES = ("human", "gpt")


class Part(NamedTuple):
    """A stretch of text: `content` is what people or the model said, the rest is the template's."""

    text: str
    content: bool = False
    trained: bool = False


@dataclass(frozen=True)
class Template:
    """How a conversation is written. ``{bos}`` and ``{eos}`` in a text stand for the tokenizer's tokens until `bound`.

    Attributes:
        user_open, user_close: around a question; the image token comes first in it.
        assistant_open: what a generation prompt ends with; not trained.
        answer_open, end: around an answer, trained with it.
        start: before everything.
        between: before each question but the first.
        system: the system prompt of a conversation that brings none; None for no prompt.
        system_open, system_close: around a system prompt; None where a model knows no system prompts.
        system_opens_turn: `system_open` contains the next question's `user_open`.
        image_open, image_close: tokens around each image token, in no template by default: set them with
            ``dataclasses.replace(template, image_open="<im_start>", image_close="<im_end>")``.
        image_end: what parts an image from the text behind it.
        caption_only: exactly one round, whose question's text is dropped.
        parts_alone: every part is encoded by itself, as the template's origin does.
        markers: texts in the template that are to be special tokens.
        stop_strings: texts that end an answer beside the end-of-text token.
    """

    name: str
    user_open: str
    user_close: str
    assistant_open: str
    answer_open: str
    end: str
    start: str = ""
    between: str = ""
    system: str | None = None
    system_open: str | None = None
    system_close: str = ""
    system_opens_turn: bool = False
    image_open: str = ""
    image_close: str = ""
    image_end: str = "\n"
    caption_only: bool = False
    parts_alone: bool = False
    markers: tuple[str, ...] = ()
    stop_strings: tuple[str, ...] = ()

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Texts of this template that must be special tokens of the tokenizer, beside the image token."""
        return (*self.markers, *filter(None, (self.image_open, self.image_close)))

    def bound(self, tokenizer: PreTrainedTokenizerBase) -> Template:
        """This template with the begin- and end-of-text tokens of `tokenizer` in place."""
        eos, bos = str(tokenizer.eos_token), str(tokenizer.bos_token or "")
        return self._with_tokens("" if bos == eos else bos, eos)

    def _with_tokens(self, bos: str, eos: str) -> Template:
        texts: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str):
                texts[field.name] = value.replace("{bos}", bos).replace("{eos}", eos)
        return replace(self, **texts)

    def render(self, conversation: Sequence[Mapping[str, str]]) -> list[Part]:
        """The parts of LLaVA turns (``{"from": "human" | "gpt", "value": str}``); none is empty.

        As in LLaVA, the image comes first in its turn, wherever ``<image>`` stood in the question; a second
        ``<image>`` of a turn is dropped. In an answer ``<image>`` is text.

        Raises:
            DataError: if the turns do not alternate from human to gpt, or an answer is empty.
        """
        if not conversation or len(conversation) % 2:
            raise DataError(f"a conversation has {len(conversation)} turns; pairs of human and gpt turns are expected.")
        if self.caption_only and len(conversation) != 2:
            raise DataError(
                f"a conversation has {len(conversation)} turns; the template {self.name!r} takes one question and one"
                " answer. Use another template for conversations."
            )
        parts = [Part(self.start)]
        if self.system is not None:
            parts.append(Part(f"{self.system_open}{self.system}{self.system_close}"))
        for index, turn in enumerate(conversation):
            role, value = turn["from"], turn["value"]
            if role != ROLES[index % 2]:
                raise DataError(f"turn {index} is from {role!r}; {ROLES[index % 2]!r} is expected, as roles alternate.")
            if role == "human":
                opened = index == 0 and self.system is not None and self.system_opens_turn
                parts.append(Part((self.between if index else "") + ("" if opened else self.user_open)))
                if IMAGE_TOKEN in value:
                    parts.append(Part(f"{self.image_open}{IMAGE_TOKEN}{self.image_close}{self.image_end}"))
                if not self.caption_only:
                    parts.append(Part(value.replace(IMAGE_TOKEN, "").strip(), content=True))
                parts += [Part(self.user_close), Part(self.assistant_open)]
                continue
            text = value.strip()
            if not text:
                raise DataError(f"turn {index}, an answer, is empty; leave the row out or give a text.")
            parts += [Part(self.answer_open, trained=True), Part(text, True, True), Part(self.end, trained=True)]
        return [part for part in parts if part.text]

    def chat_template(self) -> str:
        """The Jinja chat template that renders the same text from chat messages.

        System messages replace the default system prompt. It names this template, for `template_of`.
        """
        images = f" {self.image_open} {self.image_close}" if self.image_open or self.image_close else ""
        source = _CHAT_TEMPLATE.replace("@record@", self.name + images)
        for field in fields(self):
            value = getattr(self, field.name)
            source = source.replace(f"@{field.name}@", "none" if value is None else json.dumps(value))
        return source

    def seams(self) -> re.Pattern[str] | None:
        """Splits a prompt's template text where tokens may not reach across; None where none can.

        That is around every text of the template where parts are encoded alone; else before an answer, which a token
        reaches into only where no space leads it.
        """
        if not self.parts_alone:
            leads = self.assistant_open and not self.answer_open
            return re.compile(f"(?<={re.escape(self.assistant_open)})") if leads else None
        texts = {self.user_open, self.user_close, self.assistant_open, self.answer_open, self.end} - {""}
        return re.compile("(" + "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) + ")")

    def learned_text(self, turn: Mapping[str, str]) -> str:
        """A turn as a new tokenizer should meet it: with the words of the template, without special tokens."""
        plain = self._with_tokens("", "")
        if turn["from"] == "human":
            before, text = plain.user_open, turn["value"].replace(IMAGE_TOKEN, "").strip()
        else:
            before, text = f"{plain.user_close}{plain.assistant_open}{plain.answer_open}", turn["value"].strip()
        for marker in self.special_tokens:
            before = before.replace(marker, "")
        return before + text


_CHAT_TEMPLATE = """\
{#- conversation template: @record@ -#}
{%- set turn = namespace(opened=false, answered=false) -%}
{{- @start@ -}}
{%- if @system@ is not none and not (messages and messages[0]['role'] == 'system') -%}
{{- @system_open@ + @system@ + @system_close@ -}}
{%- set turn.opened = @system_opens_turn@ -%}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] not in ('system', 'user', 'assistant') -%}
{{- raise_exception("role '" + message['role'] + "' is unknown: allowed are system, user, assistant") -}}
{%- endif -%}
{%- if message['content'] is string -%}
{%- set images = 0 -%}{%- set text = message['content'] -%}
{%- else -%}
{%- set images = message['content'] | selectattr('type', 'equalto', 'image') | list | length -%}
{%- set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') -%}
{%- endif -%}
{%- set text = text | trim -%}
{%- if message['role'] == 'assistant' -%}
{{- @assistant_open@ + @answer_open@ + text + @end@ -}}
{%- set turn.answered = true -%}
{%- elif message['role'] == 'user' -%}
{{- @between@ if turn.answered else '' -}}
{{- '' if turn.opened else @user_open@ -}}
{{- (@image_open@ + '<image>' + @image_close@ + @image_end@) * images -}}
{{- ('' if @caption_only@ else text) + @user_close@ -}}
{%- set turn.opened = false -%}
{%- elif @system_open@ is none -%}
{{- raise_exception("the conversation template " + @name@ + " has no system messages; put it into the question") -}}
{%- else -%}
{{- @system_open@ + text + @system_close@ -}}
{%- set turn.opened = @system_opens_turn@ -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- @assistant_open@ -}}{%- endif -%}
"""
_V1 = Template(
    "v1",
    user_open="USER: ",
    user_close=" ",
    assistant_open="ASSISTANT:",
    answer_open=" ",
    end="{eos}",
    system="A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful,"
    " detailed, and polite answers to the user's questions.",
    system_open="",
    system_close=" ",
)
_MISTRAL_INSTRUCT = Template(
    "mistral_instruct",
    user_open="[INST] ",
    user_close=" [/INST]",
    assistant_open="",
    answer_open=" ",
    end=" {eos}",
    system_open="[INST] <<SYS>>\n",
    system_close="\n<</SYS>>\n\n",
    system_opens_turn=True,
)
DEFAULT_TEMPLATE = "v1_no_system"
TEMPLATES = {
    template.name: template
    for template in (
        replace(_V1, name=DEFAULT_TEMPLATE, system=None),
        _V1,
        replace(
            _MISTRAL_INSTRUCT,
            name="llama_2",
            between="{bos}",
            system="You are a helpful language and vision assistant. You are able to understand the visual content that"
            " the user provides, and assist the user with a variety of tasks using natural language.",
        ),
        _MISTRAL_INSTRUCT,
        Template(
            "chatml",
            user_open="<|im_start|>user\n",
            user_close="<|im_end|>",
            assistant_open="<|im_start|>assistant\n",
            answer_open="",
            end="<|im_end|>",
            system="Answer the questions.",
            system_open="<|im_start|>system\n",
            system_close="<|im_end|>",
            markers=("<|im_start|>", "<|im_end|>"),
            stop_strings=("<|im_end|>",),
        ),
        Template(
            "plain",
            user_open="",
            user_close="",
            assistant_open="",
            answer_open="",
            end="\n{eos}",
            image_end="",
            caption_only=True,
        ),
        Template(
            "shellv",
            user_open="## huaman:",
            user_close="{eos}",
            assistant_open="## assistant:",
            answer_open="",
            end="{eos}",
            system="You are a helpful assistant. Please ensure that your responses are helpful, detailed, and polite.",
            system_open="## system:",
            system_close=" \n {eos}",
        ),
        Template(
            "codeshell_chat",
            start="{eos}",
            user_open="## human:",
            user_close=" |<end>| ",
            assistant_open="## assistant:",
            answer_open="",
            end=" |<end>| ",
            parts_alone=True,
            stop_strings=(" |<end>|", "|<end>|", "|end|", "## human"),
        ),
    )
}


def template_named(name: str) -> Template:
    """The template called `name`.

    Raises:
        ConfigError: if there is none, with the nearest name.
    """
    if name not in TEMPLATES:
        raise ConfigError(f"unknown conversation template {name!r}; {nearest(name, TEMPLATES)}")
    return TEMPLATES[name]


def template_of(processor: Any) -> Template:
    """The template of a model, as the chat template of its processor (or tokenizer) records it.

    A chat template without a record is taken for the default's.
    """
    record = re.match(r"\{#- conversation template: (\S+)(?: (\S*) (\S*))? -#\}", processor.chat_template or "")
    if record is None:
        return TEMPLATES[DEFAULT_TEMPLATE]
    name, image_open, image_close = record.groups(default="")
    return replace(template_named(name), image_open=image_open, image_close=image_close)


def add_template_tokens(tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    """Make the image token and the template's markers special tokens of `tokenizer`, in place."""
    tokens = [token for token in (IMAGE_TOKEN, *template.special_tokens) if token not in special_tokens(tokenizer)]
    if tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": tokens}, replace_extra_special_tokens=False)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The texts that `tokenizer` reads as special tokens."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)
