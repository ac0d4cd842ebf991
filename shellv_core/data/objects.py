"""Mentions of COCO's 80 object classes in English text.

The classes are COCO's; the other words for them are this project's own list (people by age and trade, breeds, vehicles
by make, and so on). A mention is found by its longest phrase, so that a hot dog is no dog and a train track no train.
Every phrase counts in its singular and plural.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Class -> other words for it. Class names stand for themselves.
_SYNONYMS: dict[str, str] = {
    "person": "people, man, men, woman, women, child, children, kid, boy, girl, baby, toddler, infant, teenager, adult,"
    " guy, lady, gentleman, gentlemen, male, female, mother, father, sister, brother, son, daughter, bride, groom,"
    " student, worker, player, pitcher, batter, catcher, umpire, rider, biker, cyclist, bicyclist, motorcyclist,"
    " skier, snowboarder, skater, skateboarder, surfer, swimmer, walker, pedestrian, passenger, traveler, tourist,"
    " driver, officer, policeman, policemen, cop, fireman, firefighter, soldier, cowboy, farmer, chef, baker,"
    " waiter, waitress, doctor, nurse, patient, customer, shopper, hunter, camper, politician, spectator",
    "bicycle": "bike, pushbike, tricycle, unicycle, mountain bike",
    "car": "automobile, sedan, coupe, hatchback, suv, jeep, van, minivan, cab, taxi, taxicab, limo, limousine,"
    " convertible, passenger car",
    "motorcycle": "motorbike, motor bike, motor cycle, dirt bike, scooter, moped, vespa",
    "airplane": "plane, air plane, aeroplane, aircraft, jet, jetliner, jumbo jet, passenger jet, passenger plane,"
    " airliner, biplane, monoplane, seaplane, airbus",
    "bus": "minibus, double decker, trolley bus, coach bus, school bus",
    "train": "locomotive, tram, tramway, subway train, passenger train, freight train, caboose, rail car, railcar",
    "truck": "lorry, pickup, pickup truck, firetruck, fire truck, tow truck, dump truck, semi truck, hauler",
    "boat": "ship, sailboat, sail boat, rowboat, row boat, motorboat, motor boat, speedboat, canoe, kayak, dinghy,"
    " yacht, ferry, ferryboat, barge, gondola, tugboat, catamaran, houseboat, vessel, schooner",
    "traffic light": "traffic signal, stoplight, stop light, street light, streetlight",
    "fire hydrant": "hydrant",
    "stop sign": "",
    "parking meter": "",
    "bench": "pew",
    "bird": "pigeon, seagull, gull, duck, goose, geese, swan, parrot, owl, eagle, hawk, falcon, crow, raven, sparrow,"
    " robin, finch, penguin, ostrich, peacock, heron, stork, pelican, flamingo, hen, rooster, chicken, turkey, dove",
    "cat": "kitten, kitty, tabby",
    "dog": "puppy, pup, puppies, poodle, beagle, terrier, retriever, labrador, bulldog, collie, dachshund, dalmatian,"
    " chihuahua, pug, spaniel, husky, corgi, hound",
    "horse": "pony, ponies, foal, colt, mare, stallion, mustang, racehorse",
    "sheep": "lamb, ewe",
    "cow": "cattle, bull, calf, calves, ox, oxen, heifer, bison",
    "elephant": "",
    "bear": "grizzly, grizzly bear, polar bear, panda, black bear, brown bear",
    "zebra": "",
    "giraffe": "",
    "backpack": "knapsack, rucksack, back pack",
    "umbrella": "parasol",
    "handbag": "purse, hand bag, wallet, clutch bag",
    "tie": "necktie, neck tie, bow tie, bowtie",
    "suitcase": "suit case, luggage, briefcase",
    "frisbee": "flying disc, flying disk",
    "skis": "ski",
    "snowboard": "snow board",
    "sports ball": "ball, basketball, football, soccer ball, tennis ball, baseball, volleyball, softball, beach ball",
    "kite": "",
    "baseball bat": "",
    "baseball glove": "catcher's mitt, baseball mitt, mitt",
    "skateboard": "skate board",
    "surfboard": "surf board, longboard, paddleboard",
    "tennis racket": "tennis racquet, racket, racquet",
    "bottle": "",
    "wine glass": "wineglass, goblet",
    "cup": "mug, teacup, tea cup, coffee cup",
    "fork": "",
    "knife": "knives, pocketknife",
    "spoon": "teaspoon, tablespoon",
    "bowl": "",
    "banana": "",
    "apple": "",
    "sandwich": "burger, hamburger, cheeseburger, panini",
    "orange": "tangerine, clementine, mandarin",
    "broccoli": "",
    "carrot": "",
    "hot dog": "hotdog, frankfurter",
    "pizza": "",
    "donut": "doughnut, dough nut",
    "cake": "cupcake, cheesecake, shortcake, birthday cake",
    "chair": "seat, stool, armchair, high chair, recliner, rocking chair",
    "couch": "sofa, settee, futon, loveseat, love seat",
    "potted plant": "houseplant, house plant, flowerpot, bonsai",
    "bed": "bunk bed, cot, crib, mattress",
    "dining table": "table, desk, coffee table",
    "toilet": "commode, urinal, toilet seat",
    "tv": "television, tv set, television set, tv monitor, flat screen",
    "laptop": "notebook computer, laptop computer, netbook, macbook",
    "mouse": "computer mouse, mice",
    "remote": "remote control, tv remote, controller, clicker",
    "keyboard": "computer keyboard",
    "cell phone": "cellphone, mobile phone, phone, smartphone, smart phone, telephone, iphone",
    "microwave": "microwave oven",
    "oven": "stove, stovetop oven, stove top oven, cooker, range oven",
    "toaster": "toaster oven",
    "sink": "washbasin, wash basin, basin",
    "refrigerator": "fridge, freezer",
    "book": "novel, textbook, magazine",
    "clock": "alarm clock, wall clock, wristwatch",
    "vase": "urn",
    "scissors": "scissor, shears",
    "teddy bear": "teddy, teddybear, stuffed bear, stuffed animal",
    "hair drier": "hair dryer, hairdryer, blow dryer",
    "toothbrush": "tooth brush",
}
COCO_CLASSES: tuple[str, ...] = tuple(_SYNONYMS)

# COCO's supercategory of each class.
COCO_SUPERCATEGORIES: dict[str, str] = {
    name.strip(): supercategory
    for supercategory, names in {
        "person": "person",
        "vehicle": "bicycle, car, motorcycle, airplane, bus, train, truck, boat",
        "outdoor": "traffic light, fire hydrant, stop sign, parking meter, bench",
        "animal": "bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe",
        "accessory": "backpack, umbrella, handbag, tie, suitcase",
        "sports": "frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,"
        " tennis racket",
        "kitchen": "bottle, wine glass, cup, fork, knife, spoon, bowl",
        "food": "banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake",
        "furniture": "chair, couch, potted plant, bed, dining table, toilet",
        "electronic": "tv, laptop, mouse, remote, keyboard, cell phone",
        "appliance": "microwave, oven, toaster, sink, refrigerator",
        "indoor": "book, clock, vase, scissors, teddy bear, hair drier, toothbrush",
    }.items()
    for name in names.split(",")
}

_YOUNG_OR_GROWN = (
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "lion",
    "animal",
)
# Phrases that hold a class's word and do not mean it.
_NO_OBJECT = (
    "train track", "train station", "bus stop", "bus station", "home plate", "car park", "boat house", "bird house",
    "dog house", "cake stand", "book shelf", "horse shoe", "bed room",
    "phone booth", "cat fish", "sea horse",
)  # fmt: skip
_NO_CLASS = ""
_ADJECTIVES = frozenset({"orange"})
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")


@dataclass(frozen=True)
class Mention:
    """One mention of a class: its text is ``text[start:end]``."""

    category: str
    start: int
    end: int


def find_mentions(text: str) -> list[Mention]:
    """All mentions of COCO classes in `text`, in order and not made unique.

    "orange" right before another mention is read as its color, and a seat in a text about a toilet is the toilet's.
    """
    words = [(match.group(), match.start(), match.end()) for match in _WORD.finditer(text.lower())]
    mentions: list[Mention] = []
    position = 0
    while position < len(words):
        size, category = _longest(words, position)
        if category and not (_is_adjective(words, position, size)):
            mentions.append(Mention(category, words[position][1], words[position + size - 1][2]))
        position += size
    if any(mention.category == "toilet" for mention in mentions):
        mentions = [
            mention for mention in mentions if text[mention.start : mention.end].lower() not in ("seat", "seats")
        ]
    return mentions


def _longest(words: list[tuple[str, int, int]], position: int) -> tuple[int, str]:
    for size in range(min(_MAX_WORDS, len(words) - position), 0, -1):
        phrase = " ".join(word for word, _, _ in words[position : position + size])
        category = _PHRASES.get(phrase)
        if category is not None:
            return size, category
    return 1, _NO_CLASS


def _is_adjective(words: list[tuple[str, int, int]], position: int, size: int) -> bool:
    following = position + size
    if words[position][0] not in _ADJECTIVES or following >= len(words):
        return False
    return _longest(words, following)[1] != _NO_CLASS


def _plural(phrase: str) -> str:
    if phrase.endswith(("s", "x", "ch", "sh")):
        return phrase + "es"
    if phrase.endswith("y") and phrase[-2] not in "aeiou":
        return phrase[:-1] + "ies"
    return phrase + "s"


def _build_phrases() -> dict[str, str]:
    phrases: dict[str, str] = {}
    for category, line in _SYNONYMS.items():
        for phrase in [category, *filter(None, (part.strip() for part in line.split(",")))]:
            phrases[phrase] = category
            phrases.setdefault(_plural(phrase), category)
    for animal in _YOUNG_OR_GROWN:
        for age in ("baby", "adult"):
            for form in (animal, _plural(animal)):
                phrases[f"{age} {form}"] = phrases.get(animal, _NO_CLASS)
    for phrase in _NO_OBJECT:
        phrases[phrase] = phrases[_plural(phrase)] = _NO_CLASS
    return phrases


_PHRASES = _build_phrases()
# Every word or phrase that names a COCO class, in singular and plural.
COCO_PHRASES: frozenset[str] = frozenset(phrase for phrase, category in _PHRASES.items() if category != _NO_CLASS)
_MAX_WORDS = max(phrase.count(" ") for phrase in _PHRASES) + 1
