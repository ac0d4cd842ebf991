"""Small tokenizers of three kinds, and the real one of CodeShell."""

from __future__ import annotations

import json
from functools import cache

from tests.conftest import SHARED

TEXTS = (
    "A chat between a curious user and an artificial intelligence assistant. USER: Where is the dog? ASSISTANT: The"
    " dog is on the left. [INST] <<SYS>> You are <</SYS>> What color? [/INST] It is red, 12 of them.",
    "## huaman: ## human:\n## assistant: |<end>| :/root ```py``` 狗在左边。 猫 👍🏽 user\n system assistant\n",
) * 8
REAL = SHARED / "tokenizers" / "codeshell"


def byte_level(texts=TEXTS, bos=False, vocab_size=420):
    """GPT-2's kind; with `bos`, one that puts <s> before every text as LLaMA's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrapped(backend, bos_token="<s>") if bos else _wrapped(backend)


def sentence_piece(legacy=True):
    """LLaMA's kind: spaces are letters, one is put before every text, bytes where there is no letter; the older kind
    puts one behind every special token as well."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(
        [word for text in TEXTS for word in text.replace("\n", " ").split(" ")],
        trainers.BpeTrainer(vocab_size=560, special_tokens=special, show_progress=False),
    )
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    backend = Tokenizer.from_str(json.dumps(state))
    if not legacy:
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrapped(backend, bos_token="<s>")


def _wrapped(backend, **options):
    from transformers import PreTrainedTokenizerFast

    return _with_markers(
        PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="<unk>", **options
        )
    )


def _with_markers(tokenizer):
    from shellv_core.templates import TEMPLATES, add_template_tokens

    for template in TEMPLATES.values():
        add_template_tokens(tokenizer, template)
    return tokenizer


@cache
def codeshell():
    from transformers import AutoTokenizer

    return _with_markers(AutoTokenizer.from_pretrained(REAL))


KINDS = {
    "byte_level": cache(byte_level),
    "bos": cache(lambda: byte_level(bos=True)),
    "sentence_piece": cache(sentence_piece),
    "sentence_piece_first": cache(lambda: sentence_piece(legacy=False)),
    **({"codeshell": codeshell} if REAL.is_dir() else {}),
}
