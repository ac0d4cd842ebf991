"""The tokenizer of a new model, and the chat template that every model carries.

The template is LLaVA-1.5's (vicuna_v1 without its system prompt)::

    USER: <image>\n{question} ASSISTANT: {answer}</s>USER: ...

``shellv_core.data.conversation`` renders the same text from training records; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IMAGE_TOKEN = "<image>"  # noqa: S105
EOS_TOKEN = "</s>"  # noqa: S105
PAD_TOKEN = "<pad>"  # noqa: S105

_CHAT_TEMPLATE = """\
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
{{- 'ASSISTANT: ' + text + '@EOS@' -}}
{%- elif message['role'] == 'user' -%}
{{- 'USER: ' + '<image>\\n' * images + text + ' ' -}}
{%- else -%}
{{- text + ' ' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""


def chat_template(eos_token: str) -> str:
    """The Jinja chat template that ends each answer with `eos_token`."""
    return _CHAT_TEMPLATE.replace("@EOS@", eos_token)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most `vocab_size` entries; equal texts give an equal tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, EOS_TOKEN, IMAGE_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
