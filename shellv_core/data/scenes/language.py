"""Scenes in words: true captions and hallucinated ones of the four Hal-Eval types.

A caption is spoken from a small description. A hallucinated caption is the same sentence spoken from a description
with one thing changed, so it has the form of a true caption and differs in the changed words only.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from shellv_core.data.samples import HALLUCINATION_TYPES, HallucinatedCaption, HallucinationType, SampleObject
from shellv_core.data.scenes.scene import OPPOSITE, RelationName, Scene, draw
from shellv_core.data.scenes.vocabulary import CATEGORIES, COLORS, EVENTS, NUMBERS, PLACES, article

RELATION_WORDS: dict[RelationName, str] = {
    "left": "to the left of",
    "right": "to the right of",
    "above": "above",
    "below": "below",
}


@dataclass(frozen=True)
class Description:
    """What a detailed caption says: objects in the order spoken, the first ones' relation, one object's event."""

    objects: tuple[SampleObject, ...]
    relation: RelationName  # of the first object to the second; of a lone object to the middle of the image
    focus: int  # position in `objects` of the one that the event is about
    event: str  # a key of EVENTS
    template: int


_TEMPLATES = (
    "{objects}, and the {focus} is {event}.",
    "{objects}, where the {focus} is {event}.",
)


def phrase(item: SampleObject) -> str:
    """Return for example "a red car", "an apple" or "two dogs"."""
    category = CATEGORIES[item.category]
    color = f"{item.color} " if item.color else ""
    if item.count > 1:
        return f"{NUMBERS[item.count]} {color}{category.plural}"
    noun = f"{color}{category.name}"
    if category.name in ("skis", "scissors"):
        return f"a pair of {noun}"
    return f"{article(noun)} {noun}"


def enumeration(phrases: list[str]) -> str:
    """Join as in "a, b and c"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def capitalize(text: str) -> str:
    """Return `text` with its first letter large and all others as they are."""
    return text[0].upper() + text[1:]


def describe(scene: Scene, rng: random.Random) -> Description:
    """Choose what a detailed caption of `scene` says: two or three objects, with the event's among them."""
    template = rng.randrange(len(_TEMPLATES))
    if len(scene.objects) == 1:
        # A scene with one object has it clearly on one side.
        side: RelationName = scene.side(scene.focus) or "left"
        return Description(scene.objects, side, 0, scene.event, template)
    pairs = [
        (first, second, relation)
        for first in scene.objects
        for second in scene.objects
        if first is not second
        and (relation := scene.relation(first.category, second.category, "horizontal")) is not None
    ]
    with_focus = [pair for pair in pairs if scene.focus in (pair[0].category, pair[1].category)]
    first, second, relation = rng.choice(with_focus or pairs)
    spoken = [first, second]
    others = [item for item in scene.objects if item not in spoken]
    rng.shuffle(others)
    for item in others:
        attributed = any(_has_attribute(other) for other in spoken)
        needed = item.category == scene.focus or (_has_attribute(item) and not attributed)
        if needed or (attributed and len(spoken) == 2):
            spoken.append(item)
    focus = [item.category for item in spoken].index(scene.focus)
    return Description(tuple(spoken), relation, focus, scene.event, template)


def speak(description: Description) -> str:
    """Return the sentence of a description, about 10 to 20 words."""
    phrases = [phrase(item) for item in description.objects]
    if len(phrases) == 1:
        objects = f"{phrases[0]} on the {description.relation} side"
    else:
        objects = f"{phrases[0]} {RELATION_WORDS[description.relation]} {phrases[1]}"
        if len(phrases) > 2:
            objects = f"{objects}, with {enumeration(phrases[2:])}"
    focus = description.objects[description.focus].category
    template = _TEMPLATES[description.template]
    return capitalize(template.format(objects=objects, focus=focus, event=EVENTS[description.event]))


def short_caption(scene: Scene, rng: random.Random) -> str:
    """Return a caption that names every object from left to right."""
    objects = enumeration([phrase(item) for item in scene.objects])
    verb = "is" if scene.objects[0].count == 1 else "are"
    template = rng.choice(("{objects} {place}.", "There {verb} {objects} {place}.", "An image of {objects}."))
    return capitalize(template.format(objects=objects, verb=verb, place=PLACES[scene.place]))


def hallucinate(
    scene: Scene, description: Description, company: Mapping[str, Mapping[str, float]], rng: random.Random
) -> list[HallucinatedCaption]:
    """Return one false caption for each of the four types.

    Args:
        scene: The ground truth.
        description: What the true caption says.
        company: How often each category is seen with each other one; absent objects are drawn by it.
        rng: Source of all choices.
    """
    true_text = speak(description)
    changed: dict[HallucinationType, Description] = {
        "object": replace(description, objects=_other_object(scene, description, company, rng)),
        "attribute": replace(description, objects=_other_attribute(description.objects, rng)),
        "relation": replace(description, relation=OPPOSITE[description.relation]),
        "event": replace(description, event=rng.choice([event for event in EVENTS if event != description.event])),
    }
    captions = []
    for kind in HALLUCINATION_TYPES:
        text = speak(changed[kind])
        original, replacement = changed_words(true_text, text)
        captions.append(HallucinatedCaption(kind, text, original, replacement))
    return captions


def changed_words(true_text: str, false_text: str) -> tuple[str, str]:
    """Return the differing middle parts of two sentences, cut at word borders."""
    a, b = true_text.split(), false_text.split()
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    end = 0
    while end < min(len(a), len(b)) - start and a[-1 - end] == b[-1 - end]:
        end += 1
    return " ".join(a[start : len(a) - end]), " ".join(b[start : len(b) - end])


def absent_weights(
    present: Sequence[str], company: Mapping[str, Mapping[str, float]], suggesting: Sequence[str] = ()
) -> dict[str, float]:
    """Return for each absent category how strongly those in `suggesting` (by default all present) suggest it."""
    return {
        name: 0.01 + sum(company[other].get(name, 0.0) for other in suggesting or present)
        for name in CATEGORIES
        if name not in present
    }


def _other_object(
    scene: Scene, description: Description, company: Mapping[str, Mapping[str, float]], rng: random.Random
) -> tuple[SampleObject, ...]:
    index = rng.randrange(len(description.objects))
    item = description.objects[index]
    # Drawn to suit what else the sentence names, so that the lie is no odder than the truth.
    company_kept = [other.category for other in description.objects if other is not item] or [item.category]
    fitting = {
        name: weight
        for name, weight in absent_weights(scene.categories, company, company_kept).items()
        if (not item.color or CATEGORIES[name].tintable)
        and (item.count == 1 or CATEGORIES[name].countable)
        and (index != description.focus or CATEGORIES[name].directed)
    }
    return _with(description.objects, index, replace(item, category=draw(rng, fitting)))


def _other_attribute(objects: tuple[SampleObject, ...], rng: random.Random) -> tuple[SampleObject, ...]:
    choices = [(index, "color") for index, item in enumerate(objects) if item.color]
    choices += [(index, "count") for index, item in enumerate(objects) if item.count > 1]
    index, attribute = rng.choice(choices)
    item = objects[index]
    if attribute == "color":
        changed = replace(item, color=rng.choice([color for color in COLORS if color != item.color]))
    else:
        changed = replace(item, count=rng.choice([count for count in (2, 3) if count != item.count]))
    return _with(objects, index, changed)


def _has_attribute(item: SampleObject) -> bool:
    return item.color is not None or item.count > 1


def _with(objects: tuple[SampleObject, ...], index: int, item: SampleObject) -> tuple[SampleObject, ...]:
    return (*objects[:index], item, *objects[index + 1 :])
