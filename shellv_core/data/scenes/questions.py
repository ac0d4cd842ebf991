"""Conversations about a scene, every answer of which follows from its ground truth."""

from __future__ import annotations

import random
from collections.abc import Mapping

from shellv_core.data.samples import IMAGE_TOKEN, Conversation, HallucinatedCaption
from shellv_core.data.scenes.config import ScenesConfig
from shellv_core.data.scenes.language import RELATION_WORDS, absent_weights, capitalize
from shellv_core.data.scenes.scene import AXES, OPPOSITE, Scene, draw
from shellv_core.data.scenes.vocabulary import CATEGORIES, COLORS, EVENTS, NUMBERS, article

Question = tuple[str, str]  # question, answer

DESCRIBE = "Describe the image."
DESCRIBE_IN_DETAIL = "Describe the image in detail."
LIST_OBJECTS = "What objects are in the image?"
NAME_FIRST = "Name it first."
YES_NO = {True: "yes", False: "no"}

EXISTENCE, NAMED, CHECKLIST, DESCRIPTION, DETAIL, LIST, ATTRIBUTES, MATCH = TASKS = (
    "existence",
    "named",
    "checklist",
    "description",
    "detail",
    "list",
    "attributes",
    "match",
)


def existence_question(category: str) -> str:
    """Return POPE's question about a category."""
    return f"Is there {article(category)} {category} in the image?"


def match_question(caption: str) -> str:
    """Return Hal-Eval's discriminative question about a caption."""
    return (
        f"```{caption}```. Does the caption delimited by triple backticks match the image exactly? "
        'If so, return "yes". If not, return "no".'
    )


def conversation(questions: list[Question]) -> Conversation:
    """Return LLaVA turns; the first question carries the image token."""
    turns = []
    for number, (question, answer) in enumerate(questions):
        turns.append({"from": "human", "value": question if number else f"{IMAGE_TOKEN}\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    return turns


def scene_conversations(
    config: ScenesConfig,
    scene: Scene,
    caption: str,
    short_caption: str,
    hallucinated: list[HallucinatedCaption],
    frequency: Mapping[str, float],
    company: Mapping[str, Mapping[str, float]],
    rng: random.Random,
) -> list[tuple[str, Conversation]]:
    """Return the conversations about one scene, each with its task.

    They are separate because an answer to one would give another away: who has read the description needs no eyes to
    say whether there is a dog.
    """
    result = []
    for _ in range(config.existence_conversations):
        questions = [
            (existence_question(name), "Yes" if present else "No")
            for name, present in existence(config, scene, frequency, company, rng)
        ]
        result.append((EXISTENCE, conversation(questions)))
    for _ in range(config.named_conversations):
        questions = [
            (f"{NAME_FIRST} {existence_question(name)}", f"{name} {YES_NO[present]}")
            for name, present in existence(config, scene, frequency, company, rng)
        ]
        result.append((NAMED, conversation(questions)))
    for _ in range(config.checklists):
        result.append((CHECKLIST, conversation([checklist(existence(config, scene, frequency, company, rng))])))
    result.append((DESCRIPTION, conversation([(DESCRIBE, short_caption)])))
    result.append((DETAIL, conversation([(DESCRIBE_IN_DETAIL, caption)])))
    result.append((LIST, conversation([(LIST_OBJECTS, listing(scene))])))
    attributes = attribute_questions(scene, rng)[: config.attribute_questions]
    if attributes:
        result.append((ATTRIBUTES, conversation(attributes)))
    for _ in range(config.match_questions):
        true = rng.random() < 0.5
        asked = caption if true else rng.choice(hallucinated).text
        result.append((MATCH, conversation([(match_question(asked), "Yes" if true else "No")])))
    return result


def listing(scene: Scene) -> str:
    """Return the names of the categories present, from left to right, as in "Car, dog, cup."."""
    return f"{capitalize(', '.join(scene.categories))}."


def existence(
    config: ScenesConfig,
    scene: Scene,
    frequency: Mapping[str, float],
    company: Mapping[str, Mapping[str, float]],
    rng: random.Random,
) -> list[tuple[str, bool]]:
    """Return categories to ask about and whether they are present; what came before says nothing about the next.

    Every turn is a fair coin: heads asks about a present category, tails about an absent one, none of them twice. The
    list ends when no present category is left, before the next toss. Balancing yes and no within a list instead would
    teach counting: after many yeses comes a no.
    """
    suggested = absent_weights(scene.categories, company)
    common = {name: frequency[name] + 1e-3 for name in suggested}
    left = rng.sample(scene.categories, len(scene.categories))
    asked: dict[str, bool] = {}
    while left and len(asked) < config.existence_turns:
        if rng.random() < 0.5:
            asked[left.pop()] = True
        else:
            weights = suggested if rng.random() < config.hard_negative_share else common
            asked[draw(rng, {name: weight for name, weight in weights.items() if name not in asked})] = False
    return list(asked.items())


def checklist(items: list[tuple[str, bool]]) -> Question:
    """Return one question about many categories, whose answer names each before it says yes or no."""
    names = ", ".join(name for name, _ in items)
    answers = ", ".join(f"{name} {YES_NO[present]}" for name, present in items)
    return f"Check the image for: {names}.", f"{answers}."


def attribute_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Return questions about colors, counts, relations and the event, in random order; yes and no are balanced."""
    questions: list[Question] = []
    for item in scene.objects:
        nouns = CATEGORIES[item.category].plural if item.count > 1 else item.category
        verb = "are" if item.count > 1 else "is"
        questions.append((f"How many {CATEGORIES[item.category].plural} are there?", f"{NUMBERS[item.count]}."))
        if item.color is not None:
            questions.append((f"What color {verb} the {nouns}?", f"{item.color}."))
            true = rng.random() < 0.5
            color = item.color if true else rng.choice([name for name in COLORS if name != item.color])
            questions.append((f"{verb.capitalize()} the {nouns} {color}?", "Yes" if true else "No"))
    questions += _relation_questions(scene, rng)
    true = rng.random() < 0.5
    event = scene.event if true else rng.choice([name for name in EVENTS if name != scene.event])
    questions.append((f"Is the {scene.focus} {EVENTS[event]}?", "Yes" if true else "No"))
    rng.shuffle(questions)
    return [(question, answer.capitalize()) for question, answer in questions]


def _relation_questions(scene: Scene, rng: random.Random) -> list[Question]:
    questions = []
    single = [item.category for item in scene.objects if item.count == 1]
    for first in single:
        for second in single:
            if first == second:
                continue
            for axis in AXES:
                relation = scene.relation(first, second, axis)
                if relation is None:
                    continue
                true = rng.random() < 0.5
                asked = relation if true else OPPOSITE[relation]
                questions.append((f"Is the {first} {RELATION_WORDS[asked]} the {second}?", "Yes" if true else "No"))
    return rng.sample(questions, min(2, len(questions)))
