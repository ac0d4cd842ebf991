"""Captions made from a grammar: enough of them, and varied enough, to learn a small state from."""

import random

from shellv_core.data.hallucination.captions import Caption

_DOERS = ["man", "woman", "boy", "girl", "dog", "cat", "horse", "child"]
_EVENTS = [
    "riding a bicycle down the street", "holding a red umbrella", "sitting on a wooden bench", "walking a small dog",
    "eating a large pizza", "standing next to a white car", "jumping over a tall fence", "lying on a blue couch",
    "playing with a yellow ball", "sleeping on top of a green bed",
]  # fmt: skip
_SCENES = [
    "A {color} bus parked in front of a {size} building.", "Two {animals} grazing in a {size} field.",
    "A plate of food next to a {color} cup on a table.", "A {size} kitchen with a sink and a {color} stove",
    "Three {animals} standing behind a {color} fence.", "A {color} train on a track near a {size} station.",
]  # fmt: skip


def captions(number: int = 300) -> list[Caption]:
    rng = random.Random(0)
    found = []
    for index in range(number):
        if index % 2:
            text = f"A {rng.choice(_DOERS)} is {rng.choice(_EVENTS)}."
        else:
            text = rng.choice(_SCENES).format(
                color=rng.choice(["red", "white", "blue", "green", "black"]),
                size=rng.choice(["large", "small", "tall", "old"]),
                animals=rng.choice(["sheep", "cows", "horses", "zebras", "giraffes"]),
            )
        found.append(Caption(text + " " * (index % 3 == 0)))
    return found
