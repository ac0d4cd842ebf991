"""Derives `lexicon.txt` from the files of WordNet 3.0 (on Debian: the package ``wordnet-base``).

Run it as ``python -m shellv_core.data.hallucination.wordnet.derive /usr/share/wordnet``. Kept are single words: nouns
for things that a picture can show, adjectives with an antonym or with neighbours in meaning, and verbs that the tagged
texts of WordNet use, each with what tells whether a replacement is still true.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from shellv_core.data.objects import COCO_PHRASES

# Lexicographer files (WordNet's own numbering) of what can be seen.
_NOUN_FILES = {3: "top", 5: "animal", 6: "artifact", 8: "body", 13: "food", 17: "object", 18: "person", 20: "plant"}
_WORD = re.compile(r"[a-z]{3,13}")
_SHORT = 6  # letters up to which a noun that WordNet's texts do not use is likely in common use
_NEEDED = frozenset(word for phrase in COCO_PHRASES for word in phrase.split())


@dataclass
class _Synset:
    offset: str
    file: int
    words: list[str]
    parents: list[str] = field(default_factory=list)
    similar: list[str] = field(default_factory=list)
    antonyms: list[tuple[str, str]] = field(default_factory=list)  # (this synset's word, its antonym's synset#word)


def main(folder: Path) -> int:
    """Write the table beside this file and return its size in bytes."""
    counts = _tag_counts(folder / "cntlist.rev")
    lines = [
        *_nouns(_read(folder / "data.noun"), _senses(folder / "index.noun"), counts),
        *_adjectives(_read(folder / "data.adj"), _senses(folder / "index.adj"), counts),
        *_verbs(_read(folder / "data.verb"), _senses(folder / "index.verb"), counts),
    ]
    return (Path(__file__).parent / "lexicon.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _nouns(synsets: dict[str, _Synset], senses: dict[str, list[str]], counts: dict[tuple[str, int], int]) -> list[str]:
    """``n id parent words``: a tree, where a word stands at its first visible sense among its first two."""
    members: dict[str, list[str]] = defaultdict(list)
    for word, offsets in senses.items():
        if not _WORD.fullmatch(word):
            continue
        visible = [offset for offset in offsets[:2] if synsets[offset].file in _NOUN_FILES]
        if visible and (counts.get((word, 1), 0) > 0 or len(word) <= _SHORT or word in _NEEDED):
            members[visible[0]].append(word)
    parent_of: dict[str, str] = {}
    kept = set()
    for offset in members:
        node = offset
        while node and node not in kept:
            kept.add(node)
            parent_of[node] = next((item for item in synsets[node].parents), "")
            node = parent_of[node]
    children: dict[str, int] = defaultdict(int)
    for node in kept:
        children[parent_of[node]] += 1
    number = {offset: str(index) for index, offset in enumerate(sorted(kept))}

    def shown_parent(node: str) -> str:
        parent = parent_of[node]
        while parent and not members[parent] and children[parent] == 1:
            parent = parent_of[parent]
        return number.get(parent, "-")

    return [
        f"n {number[node]} {shown_parent(node)} {','.join(sorted(members[node]))}"
        for node in sorted(kept)
        if members[node] or children[node] > 1
    ]


def _adjectives(
    synsets: dict[str, _Synset], senses: dict[str, list[str]], counts: dict[tuple[str, int], int]
) -> list[str]:
    """``a word antonyms synonyms``; antonyms of the cluster's head count for its satellites."""
    lines = []
    used = {word for word in senses if _WORD.fullmatch(word) and any(counts.get((word, kind), 0) for kind in (3, 5))}
    for word in sorted(used):
        offsets = senses[word]
        antonyms: set[str] = set()
        synonyms: set[str] = set()
        for offset in offsets[:3]:
            synset = synsets[offset]
            synonyms.update(synset.words)
            synonyms.update(item for near in synset.similar for item in synsets[near].words)
            antonyms.update(found.split("#")[1] for own, found in synset.antonyms if own == word)
            for near in synset.similar:
                antonyms.update(found.split("#")[1] for _, found in synsets[near].antonyms)
        synonyms = (synonyms & used) - {word}
        antonyms = (antonyms & used) - synonyms - {word}
        if antonyms:
            lines.append(f"a {word} {','.join(sorted(antonyms))} {','.join(sorted(synonyms))}".rstrip())
    return lines


def _verbs(synsets: dict[str, _Synset], senses: dict[str, list[str]], counts: dict[tuple[str, int], int]) -> list[str]:
    """``v word related``: synonyms, hypernyms and hyponyms of the first three senses, which may be true beside it."""
    narrower: dict[str, list[str]] = defaultdict(list)
    for offset, synset in synsets.items():
        for parent in synset.parents:
            narrower[parent].append(offset)
    common = {word for word in senses if _WORD.fullmatch(word) and counts.get((word, 2), 0) >= 2}
    lines = []
    for word in sorted(common):
        related: set[str] = set()
        for offset in senses[word][:3]:
            for near in [offset, *synsets[offset].parents, *narrower[offset]]:
                related.update(synsets[near].words)
        related = (related & common) - {word}
        if related:
            lines.append(f"v {word} {','.join(sorted(related))}")
    return lines


def _read(path: Path) -> dict[str, _Synset]:
    synsets = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            continue
        parts = line.split(" | ")[0].split()
        num_words = int(parts[3], 16)
        words = [re.sub(r"\(.*\)", "", parts[4 + 2 * index]).lower() for index in range(num_words)]
        synset = _Synset(parts[0], int(parts[1]), words)
        start = 4 + 2 * num_words
        for index in range(int(parts[start])):
            symbol, target, kind, ends = parts[start + 1 + 4 * index : start + 5 + 4 * index]
            if symbol in ("@", "@i"):
                synset.parents.append(target)
            elif symbol == "&":
                synset.similar.append(target)
            elif symbol == "!" and kind in ("a", "s"):
                synset.antonyms.append((words[int(ends[:2], 16) - 1], f"{target}@{int(ends[2:], 16)}"))
        synsets[synset.offset] = synset
    for synset in synsets.values():
        synset.antonyms = [(own, _antonym(synsets, found)) for own, found in synset.antonyms]
    return synsets


def _antonym(synsets: dict[str, _Synset], address: str) -> str:
    offset, index = address.split("@")
    return f"{offset}#{synsets[offset].words[int(index) - 1]}"


def _senses(path: Path) -> dict[str, list[str]]:
    senses = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith(" "):
            parts = line.split()
            senses[parts[0]] = parts[-int(parts[2]) :]
    return senses


def _tag_counts(path: Path) -> dict[tuple[str, int], int]:
    """How often each (word, kind of word) is tagged in WordNet's texts."""
    counts: dict[tuple[str, int], int] = defaultdict(int)
    for line in path.read_text(encoding="utf-8").splitlines():
        key, _, count = line.split()
        word, _, rest = key.partition("%")
        counts[word, int(rest[0])] += int(count)
    return counts


if __name__ == "__main__":
    main(Path(sys.argv[1]))
