"""What English words mean to each other: kinds of things, nearness of nouns, contradictions.

Two sources: a table derived from WordNet 3.0 (see `wordnet/derive.py`), and short lists of this project for what
WordNet does not know, such as which prepositions contradict each other in a picture.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from importlib.resources import files

from shellv_core.data.objects import COCO_SUPERCATEGORIES, find_mentions


def word_set(text: str) -> frozenset[str]:
    """The words of `text`."""
    return frozenset(text.split())


# WordNet words that head a kind of thing; whatever stands below the word is of that kind.
_KIND_HEADS = {
    "person": "person adult child worker athlete",
    "animal": "animal bird mammal",
    "vehicle": "vehicle craft boat ship aircraft carriage",
    "food": "food fruit vegetable dish dessert bread meat cheese pastry sandwich salad soup sauce fish pasta",
    "drink": "beverage drink alcohol",
    "furniture": "furniture seat table shelf cabinet rug curtain",
    "clothing": "clothing garment footwear headdress shoe hat glove",
    "building": "building house shop tower skyscraper church",
    "structure": "bridge fence wall gate pole sign monument statue fountain",
    "room": "room kitchen bathroom",
    "vessel": "vessel container pot cup plate bowl glass basket bag box dish tray tableware cutlery",
    "device": "device machine computer phone camera tool implement appliance instrument lamp television screen",
    "sport": "racket bat ball ski skateboard surfboard snowboard toy kite frisbee",
    "plant": "plant tree flower grass bush",
    "place": "land road street field beach mountain hill lake river ocean forest garden yard park lot path lawn track",
    "bedding": "pillow blanket towel mattress cloth",
    "paper": "book newspaper paper magazine card poster",
    "thing": "artifact",
}
# Kinds by words that WordNet files elsewhere or that captions use in their own sense.
_KIND_WORDS = {
    "person": "man woman boy girl kid lady guy person people child baby player catcher batter umpire pitcher skier"
    " surfer rider skater skateboarder snowboarder crowd officer policeman couple family team toddler gentleman",
    "animal": "cat dog horse cow sheep bird bear elephant zebra giraffe goat pig duck puppy kitten animal",
    "vehicle": "car bus train truck motorcycle bicycle bike motorbike airplane plane boat jet scooter van taxi tram"
    " helicopter tractor",
    "place": "street road beach field park snow grass sidewalk desert forest river lake ocean mountain slope runway"
    " court platform parking harbor yard garden hill",
    "room": "kitchen bathroom bedroom office",
    "food": "pizza sandwich cake banana apple orange broccoli carrot donut doughnut hotdog salad bread meat cheese"
    " fruit vegetable soup rice pasta chicken fries burger cookie egg tomato",
    "drink": "coffee wine beer milk juice tea water",
    "plant": "tree flower bush",
    "sport": "ball bat racket racquet surfboard snowboard frisbee kite skis",
}
_SUPERCATEGORY_KINDS = {
    "outdoor": "structure", "accessory": "accessory", "sports": "sport", "kitchen": "vessel", "electronic": "device",
    "appliance": "device", "indoor": "indoor",
}  # fmt: skip

# Words about the picture, its parts and amounts: no things that could be others.
NO_OBJECTS = word_set(
    "top front side back middle background foreground center centre edge corner end group couple bunch lot"
    " lots number pair pairs close view picture photo photograph image piece pieces kind type types kinds"
    " variety set row line part way one ones thing things something someone somebody anything other others each"
    " half body area scene shot time day night morning evening air game trick turn color colors style shape"
    " size pile stack slice slices head hand hands face eye eyes mouth arm arms leg legs foot feet hair tail"
    " ear ears nose neck finger fingers paw distance direction left right bottom rest series display assortment"
    " selection bit stuff item items object objects people's world place places point spot sort herd flock"
    " crowd team family collection array"
)

# After a preposition these tell no place.
NO_PLACES = word_set(
    "phone cellphone camera sun sunlight rain dark light shade air wind motion use sale fire love order"
    " addition charge hand lap mouth face arm leg foot head body back eye season weather display duty vacation"
    " fun pose action baseball tennis soccer football basketball video birthday dinner lunch breakfast sport"
    " competition match"
)

# Groups of which each word, applied to one thing, is contradicted by all words of the others in its line.
_CONTRARY_ADJECTIVES = (
    "white | black | red | blue,navy | green | yellow,golden,gold | brown,tan,beige | gray,grey,silver | pink"
    " | orange | purple",
    "large,big,huge,giant,massive,enormous | small,little,tiny,miniature",
    "young,little | old,elderly",
    "new,modern | old,vintage,antique,ancient",
    "tall | short",
    "high | low",
    "long | short",
    "wooden | metal,steel | brick | stone,marble | glass | plastic | concrete | leather | paper | ceramic | wicker",
    "open | closed",
    "empty | full,busy,crowded,packed",
    "clean | dirty,muddy,messy",
    "neat,tidy,organized | messy,cluttered,disorganized",
    "wet | dry",
    "sunny,clear | cloudy,overcast,stormy | rainy",
    "grassy | sandy | snowy | rocky | muddy | concrete | paved",
    "grass | sand | snow | dirt | gravel | concrete | asphalt",
    "bright | dark,dim",
    "hot | cold,frozen,icy",
    "wide | narrow",
    "thick | thin",
    "round | square | rectangular | triangular | oval",
    "striped | plaid | checkered | polka-dot | floral",
    "male | female",
    "fresh | rotten,stale,spoiled",
    "cooked,baked,fried,grilled | raw,uncooked",
    "sliced,cut,chopped | whole",
    "happy,smiling | sad,angry,crying",
    "fat | thin,skinny",
    "calm | rough,choppy",
    "shiny | rusty,dull",
    "flat | steep,hilly",
    "deep | shallow",
    "broken | intact,unbroken",
    "indoor | outdoor",
    "quiet,deserted | busy,crowded",
    "heavy | light",
    "colorful | plain,colorless,gray",
    "parked | moving,speeding",
    "sleeping | running,playing",
    "urban | rural",
    "lit | unlit",
    "snow-covered | grass-covered",
    "red | white | sparkling",
)
COLORS = word_set(
    "white black red blue navy green yellow golden gold brown tan beige gray grey silver pink orange purple"
)
# Adjectives that belong to a name.
FIXED_ADJECTIVES = word_set(
    "hot teddy polar remote cell living dining high same other many several various different few next own"
    " first second last such only double stuffed oven wild front back middle good ready able sure visible close"
    " full hydrant urinal semi mobile public semi-truck asian french single lone fashioned colored haired half"
)
FIXED_PHRASES = frozenset(
    {
        ("hot", "dog"), ("hot", "dogs"), ("teddy", "bear"), ("polar", "bear"), ("high", "chair"), ("wild", "animal"),
        ("double", "decker"), ("living", "room"), ("french", "fries"), ("remote", "control"), ("remote", "controls"),
        ("open", "mouth"), ("full", "size"), ("fast", "food"), ("high", "way"), ("ice", "cream"), ("red", "sox"),
        ("big", "ben"), ("white", "house"), ("orange", "juice"), ("red", "wine"), ("old", "fashioned"),
    }
)  # fmt: skip

NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
MANY = frozenset({"several", "many", "multiple", "numerous"})

# Preposition -> those that contradict it in a picture.
CONTRARY_PREPOSITIONS: dict[str, tuple[str, ...]] = {
    "on": ("under", "next to", "behind", "in front of", "above", "beside", "near", "in"),
    "on top of": ("under", "next to", "behind", "inside", "in front of", "beneath", "near", "beside"),
    "atop": ("under", "beside", "behind", "in"),
    "in": ("next to", "behind", "in front of", "outside", "under", "beside", "above", "near", "on"),
    "inside": ("outside", "on top of", "behind", "next to", "under", "in front of"),
    "inside of": ("outside of", "on top of", "behind", "next to", "in front of"),
    "outside": ("inside", "in"),
    "outside of": ("inside of", "inside", "in"),
    "under": ("on", "on top of", "next to", "behind", "in front of", "above", "over", "in"),
    "underneath": ("on top of", "on", "next to", "behind", "above"),
    "beneath": ("on top of", "on", "next to", "above"),
    "below": ("above", "on top of", "on", "over"),
    "above": ("below", "under", "on", "next to", "behind", "beneath"),
    "over": ("under", "behind", "next to", "below", "through", "in"),
    "behind": ("in front of", "on", "on top of", "under", "in", "inside"),
    "in front of": ("behind", "on top of", "inside", "under", "on", "in"),
    "next to": ("on top of", "on", "under", "in", "inside", "behind", "in front of", "far from"),
    "beside": ("on top of", "on", "under", "in", "behind", "in front of"),
    "near": ("on", "on top of", "under", "in", "inside", "far from"),
    "by": ("on", "under", "in", "inside", "far from"),
    "alongside": ("behind", "under", "on"),
    "close to": ("far from", "on", "in", "on top of"),
    "between": ("behind", "on top of", "in front of", "on", "under", "above"),
    "around": ("inside", "in", "on", "under", "away from"),
    "up": ("down",),
    "down": ("up",),
    "into": ("out of", "away from", "past"),
    "out of": ("into",),
    "onto": ("off", "off of"),
    "off": ("onto", "on"),
    "off of": ("onto", "on"),
    "through": ("around", "past", "over", "behind", "under"),
    "past": ("toward", "into", "behind"),
    "across": ("along", "under", "beside"),
    "along": ("across", "under", "away from"),
    "against": ("away from", "under", "on"),
    "towards": ("away from",),
    "toward": ("away from",),
    "away from": ("towards", "toward", "into"),
    "with": ("without", "on", "in", "behind", "under", "near"),
    "without": ("with",),
    "to the left of": ("to the right of",),
    "to the right of": ("to the left of",),
    "in the background": ("in the foreground",),
    "in the foreground": ("in the background",),
    "at the top of": ("at the bottom of",),
    "at the bottom of": ("at the top of",),
    "on the left": ("on the right",),
    "on the right": ("on the left",),
    "on the left side of": ("on the right side of",),
    "on the right side of": ("on the left side of",),
    "on the side of": ("in the middle of", "under"),
    "topped with": ("next to", "behind", "without"),
    "covered in": ("next to", "without", "behind"),
    "covered with": ("next to", "without", "behind"),
    "covered by": ("next to", "without"),
    "filled with": ("next to", "without", "behind"),
    "full of": ("next to", "without", "behind"),
    "made of": ("next to", "without"),
    "looking at": ("looking away from", "walking past", "standing behind"),
    "looks at": ("looks away from", "walks past", "stands behind"),
    "look at": ("look away from", "walk past", "stand behind"),
    "next to each other": ("far from each other", "on top of each other"),
    "next to one another": ("far from one another", "on top of one another"),
    "close to each other": ("far from each other", "on top of each other"),
    "side by side": ("far apart",),
    "along the side of": ("in the middle of", "far from"),
    "at the front of": ("at the back of", "behind"),
    "at the side of": ("in the middle of", "far from"),
    "close up of": ("distant view of",),
    "close-up of": ("distant view of",),
    "closeup of": ("distant view of",),
    "in the middle of": ("at the edge of", "on the side of", "next to", "outside"),
    "at the edge of": ("in the middle of",),
    "at the end of": ("in the middle of", "at the beginning of"),
    "in the back of": ("in the front of", "in front of", "under"),
    "in the front of": ("in the back of", "behind"),
    "in the corner of": ("in the middle of", "outside"),
    "on the back of": ("in front of", "next to", "behind"),
    "at": ("far from", "behind", "under"),
}
# Where both may hold at once or mean the same, an exchange of the two sides changes nothing.
SYMMETRIC = frozenset({"next to", "beside", "near", "by", "alongside", "close to", "with", "without", "and"})
ASYMMETRIC = frozenset(
    {"on", "on top of", "atop", "under", "underneath", "beneath", "below", "above", "over", "behind", "in front of",
     "inside", "in", "to the left of", "to the right of"}
)  # fmt: skip

# Relations that need no noun after them, or in which the words before it are part of the relation.
WHOLE_RELATIONS = frozenset(
    {"topped with", "covered in", "covered with", "covered by", "filled with", "full of", "made of", "looking at",
     "looks at", "look at", "next to each other", "next to one another", "close to each other", "side by side",
     "on the left", "on the right", "in the background", "in the foreground", "in the middle of", "on the side of",
     "along the side of", "at the front of", "at the side of", "close up of", "close-up of", "closeup of"}
)  # fmt: skip
# Phrases of amount that contradict each other.
AMOUNTS = (
    ("a couple of", "two"),
    ("a group of", "a bunch of", "a lot of", "lots of", "a crowd of", "a large group of", "dozens of", "many"),
)
PAIRED = word_set("scissors skis pants shoes glasses shorts jeans skates boots gloves socks pliers")
# What is true of a thing by its very nature, so that it can be said of it unseen.
INHERENT = {
    "furry": "dog cat bear kitten puppy rabbit squirrel monkey",
    "feathered": "bird duck owl chicken pigeon seagull goose swan parrot",
    "woolly": "sheep lamb",
    "striped": "zebra",
    "spotted": "giraffe",
    "gray": "elephant",
    "living": "man woman person boy girl child kid lady guy baby player skier surfer snowboarder skateboarder cow"
    " horse",
    "metal": "car bus train truck airplane plane motorcycle motorbike knife fork scissors oven refrigerator microwave"
    " jet bicycle bike stove hydrant",
    "edible": "pizza sandwich cake banana apple orange broccoli carrot donut doughnut salad hotdog burger bread soup"
    " food meal vegetable fruit",
    "indoor": "kitchen bathroom bedroom room office toilet sink couch sofa bed refrigerator bathtub",
    "outdoor": "street road beach field park mountain ocean river forest hill yard sidewalk lake slope runway highway"
    " intersection harbor",
    "man-made": "building tower bridge castle sign clock lamp chair table desk bench house fence vase bowl plate cup"
    " box light counter shelf mirror boat ship statue store wall tub cart bag umbrella suitcase kite frisbee surfboard"
    " skateboard snowboard racket bat ball laptop computer television tv phone",
}
NOT_INHERENT = {
    "furry": ("feathered", "metal", "man-made"), "feathered": ("furry", "woolly", "man-made"),
    "woolly": ("feathered", "striped", "spotted"), "striped": ("spotted", "woolly", "man-made"),
    "spotted": ("striped", "woolly", "feathered"), "gray": ("striped", "spotted", "feathered"),
    "living": ("man-made", "metal", "feathered"), "metal": ("living", "edible", "furry"),
    "edible": ("living", "metal", "man-made"), "indoor": ("outdoor",), "outdoor": ("indoor",),
    "man-made": ("living", "edible", "furry"),
}  # fmt: skip
# Where the ground and the sky are in any picture; the second of each is not so.
INHERENT_RELATIONS = (
    (", with the ground below", ", with the ground above"),
    (", with the sky above the ground", ", with the sky below the ground"),
)
# Of a thing that has another in or on it this is false.
INSTEAD_OF_HAVING = ("behind", "in front of", "without", "far from", "under", "next to")

# Postures and motions that exclude each other, each as one state of a person, an animal or a thing.
POSTURES = (
    "sit seat", "stand", "lie", "walk stroll", "run", "sleep", "kneel", "jump", "crouch", "swim", "fly",
)  # fmt: skip
# Nouns before "of" that count or gather what follows.
QUANTITIES = word_set(
    "group couple bunch number pair herd flock crowd lot lots row line pile stack set variety assortment"
    " collection series team family display picture photo photograph image selection"
)

# Verbs that one picture may well show at once; each line is a group.
_COMPATIBLE_VERBS = (
    "hold carry have use take grab get bring keep grip swing",
    "sit rest lay lie perch relax lounge sleep seat nap wait",
    "look watch stare face see view gaze observe peer",
    "walk go move travel come head stroll run pass cross",
    "stand wait pose look stop",
    "ride drive travel go move sit",
    "eat have enjoy taste bite chew graze feed consume",
    "make prepare cook cut fix do bake",
    "fly soar go move travel",
    "park stop sit stand wait",
    "play do perform practice enjoy",
    "talk speak chat use",
    "jump leap fly do perform",
    "throw pitch toss play",
    "hit swing play",
    "catch play reach try",
    "surf ride catch",
    "ski ride go slide race",
    "snowboard ride go",
    "skate skateboard ride",
    "smile pose laugh look",
    "fill cover top load stack contain",
    "hang mount attach display",
    "show display feature include contain have",
    "set place put sit rest lay serve arrange display",
    "brush clean wash",
    "put place set",
    "pull carry tow drag lead",
    "push move",
    "wear have don sport dress",
)
# Bearings of the body that go with most that one does.
_BEARINGS = word_set("sit stand lie lean rest perch wait pose seat squat crouch kneel gather")
# Whoever does these has another bearing, or none: they exclude the bearings and, save for what is listed, each other.
_MOTIONS = word_set(
    "walk run sleep jump fly swim ride drive travel ski surf snowboard skate skateboard float hang climb cross"
    " race slide fall roll chase"
)
# Verb -> verbs that may hold beside it.
_COMPATIBLE_WITH = {
    "hold": "eat drink use read cut feed carry swing play open fly brush take talk put prepare throw walk run ride lead"
    " serve pour sell wear pet hug cook catch hit kick raise lift kiss lick chew",
    "stand": "surf ski snowboard skate skateboard ride graze park float hang",
    "sit": "ride drive float park hang skate travel",
    "lie": "sleep float hang",
    "rest": "sleep float hang park graze",
    "perch": "hang ride",
    "wait": "walk ride sleep drive hang",
    "pose": "ride surf ski jump skate walk swim snowboard skateboard hang",
    "lean": "ride surf ski park skate",
    "walk": "carry lead graze pull push cross talk eat use drink climb chase feed play",
    "ride": "jump race surf ski skate climb cross chase travel fly",
    "run": "race chase cross play catch jump",
    "jump": "ski surf skate snowboard play catch fly skateboard throw hit race",
    "fly": "travel race cross hang play float",
    "travel": "drive cross run walk fly",
    "swim": "float play surf",
    "play": "throw catch hit swing kick jump run walk hold use",
    "eat": "graze feed chew cook serve share",
    "cook": "prepare cut stir serve bake make",
    "wear": "hold",
}
# States that a picture may show beside anything else: no events, and no relations that could be exchanged.
STATIVE = word_set(
    "be have wear look seem show feature include contain dress sport match appear consist say read name call"
    " make get do go come take use try let see need want like become keep fill cover line top light color"
)

_GAMES = word_set("baseball tennis soccer football basketball hockey golf volleyball cricket rugby")
_MEN = word_set("man men boy boys guy guys gentleman gentlemen male father son policeman groom")
_WOMEN = word_set("woman women girl girls lady ladies female mother daughter bride")
# Sexes and ages contradict each other; trades do too, but a man may be a player.
_GENDERED_GROUPS = (
    frozenset(["man", "guy", "gentleman"]),
    frozenset(["woman", "lady"]),
    frozenset({"boy"}),
    frozenset({"girl"}),
    frozenset(["child", "kid", "toddler"]),
    frozenset({"baby"}),
)
_PERSON_GENERIC = frozenset(["person", "people", "someone", "adult", "human", "individual", "pedestrian"])
# Words for a whole kind of things.
_GENERIC = frozenset(
    {"food", "meal", "dinner", "lunch", "animal", "vehicle", "furniture", "fruit", "vegetable", "dessert"}
)
_SAME_THINGS = (
    "street road roadway highway avenue lane", "plane airplane jet airliner aircraft jetliner",
    "bike bicycle motorcycle motorbike scooter moped cycle", "couch sofa loveseat", "tv television monitor screen",
    "sea ocean water beach shore wave lake river pond", "field grass pasture meadow lawn yard park grassland",
    "mountain hill slope hillside mountainside cliff snow", "table desk counter countertop", "plate dish platter tray",
    "cup mug glass", "picture photo painting", "room kitchen bathroom bedroom", "house building home tower store shop",
    "forest wood woods tree", "bag purse handbag suitcase luggage backpack", "meal food dinner lunch breakfast",
    "laptop computer", "phone cellphone", "sidewalk street road path walkway pavement", "bag backpack",
    "rock stone boulder", "floor ground", "doughnut donut pastry", "bath bathtub tub", "car vehicle taxi van suv",
    "truck vehicle van", "bus vehicle", "court field", "stand sign", "fence gate", "racket racquet",
    "chair seat bench stool", "hat cap helmet", "shirt jacket suit coat sweater top uniform", "door doorway window",
    "oven stove microwave", "sandwich burger hamburger", "pot pan", "ship boat", "track rail railroad tracks",
    "toilet urinal commode", "bread bun roll toast", "tree bush plant", "snowboard ski board", "area place spot",
)  # fmt: skip


class Lexicon:
    """Word relations. Nouns are looked up by lemma, in lower case; phrases by their last word."""

    def __init__(self) -> None:
        self._node: dict[str, str] = {}
        self._parent: dict[str, str] = {}
        self._antonyms: dict[str, frozenset[str]] = {}
        self._near: dict[str, frozenset[str]] = {}
        self._related_verbs: dict[str, frozenset[str]] = {}
        self._read()
        self._kind_heads = {
            self._node[word]: kind
            for kind, words in _KIND_HEADS.items()
            for word in words.split()
            if word in self._node
        }
        self._kind_words = {word: kind for kind, words in _KIND_WORDS.items() for word in words.split()}
        self._contrary = _contrary_adjectives()
        self._same = _groups(_SAME_THINGS)
        self._compatible = _groups(_COMPATIBLE_VERBS)

    def kind(self, noun: str) -> str:
        """The kind of thing that a noun or noun phrase names, "" where it names nothing that could be another thing."""
        last = noun.rsplit(" ", 1)[-1]
        if last in NO_OBJECTS:
            return ""
        if last in self._kind_words:
            return self._kind_words[last]
        category = self.category(noun)
        if category:
            supercategory = COCO_SUPERCATEGORIES[category]
            return _SUPERCATEGORY_KINDS.get(supercategory, supercategory)
        return next((self._kind_heads[node] for node in self._ancestors(last) if node in self._kind_heads), "")

    def is_verb(self, lemma: str) -> bool:
        """Whether WordNet has the word as a verb in common use."""
        return lemma in self._related_verbs

    def sure_kind(self, noun: str) -> str:
        """The kind where this project's own words or COCO's tell it, so that no rare sense of a word misleads."""
        if self._kind_words.get(noun.rsplit(" ", 1)[-1]) or self.category(noun):
            return self.kind(noun)
        return ""

    @lru_cache(maxsize=65536)  # noqa: B019 - one lexicon lives as long as the process
    def category(self, noun: str) -> str:
        """The COCO class that a whole noun phrase names, or ""."""
        mentions = find_mentions(noun)
        if mentions and mentions[-1].end == len(noun):
            return mentions[-1].category
        return ""

    @lru_cache(maxsize=262144)  # noqa: B019
    def may_be_same(self, noun: str, other: str) -> bool:
        """Whether one noun may name the same thing as the other: synonym, broader, narrower or of one COCO class."""
        if noun == other:
            return True
        first, second = noun.rsplit(" ", 1)[-1], other.rsplit(" ", 1)[-1]
        if first == second or self._same.get(first, frozenset()) & self._same.get(second, frozenset()):
            return True
        if {first, second} & _GENERIC and self.kind(noun) == self.kind(other):
            return True
        if self.kind(noun) == self.kind(other) == "person":
            return not _contrary_people(first, second)
        category = self.category(noun)
        if category and category == self.category(other):
            return True
        ancestors, other_ancestors = list(self._ancestors(first)), list(self._ancestors(second))
        return bool(
            ancestors and other_ancestors and (ancestors[0] in other_ancestors or other_ancestors[0] in ancestors)
        )

    @lru_cache(maxsize=262144)  # noqa: B019
    def nearness(self, noun: str, other: str) -> float:
        """1 for nouns under one WordNet parent, falling to 0 with their distance in the tree."""
        first = list(self._ancestors(noun.rsplit(" ", 1)[-1]))
        second = {node: depth for depth, node in enumerate(self._ancestors(other.rsplit(" ", 1)[-1]))}
        for depth, node in enumerate(first):
            if node in second:
                return 1.0 / max(depth + second[node] - 1, 1)
        return 0.0

    def siblings(self, noun: str) -> Iterator[str]:
        """Nouns under the same WordNet parent."""
        node = self._node.get(noun, "")
        parent = self._parent.get(node, "")
        if parent:
            yield from (word for child in self._children[parent] for word in self._words[child] if word != noun)

    def contrary_adjectives(self, adjective: str) -> frozenset[str]:
        """Adjectives that cannot hold of the same thing."""
        own = self._contrary.get(adjective, frozenset())
        found = self._antonyms.get(adjective, frozenset()) - self._near.get(adjective, frozenset())
        return own or found

    def is_listed(self, adjective: str) -> bool:
        """Whether this project's own list tells the word's contraries."""
        return adjective in self._contrary

    def are_alike(self, noun: str, other: str) -> bool:
        """Whether two nouns before a noun tell the same sort of thing about it, such as two games or two dishes."""
        if noun in _GAMES or other in _GAMES:
            return noun in _GAMES and other in _GAMES
        if self.kind(noun) or self.kind(other):
            return self.kind(noun) == self.kind(other)
        return self.nearness(noun, other) > 0.1

    def near_adjectives(self, adjective: str) -> frozenset[str]:
        """Adjectives of about the same meaning."""
        return self._near.get(adjective, frozenset())

    def contrary_verb(self, verb: str, other: str) -> bool:
        """Whether two verbs (lemmas) of one subject are unlikely to hold in the same picture."""
        if verb == other or other in self._related_verbs.get(verb, ()) or verb in self._related_verbs.get(other, ()):
            return False
        if other in _COMPATIBLE_WITH.get(verb, "").split() or verb in _COMPATIBLE_WITH.get(other, "").split():
            return False
        for first, second in ((verb, other), (other, verb)):
            if first in _BEARINGS and second not in _BEARINGS | _MOTIONS:
                return False
            if first == "watch":
                return False
        return not self._compatible.get(verb, frozenset()) & self._compatible.get(other, frozenset())

    def _ancestors(self, noun: str) -> Iterator[str]:
        node = self._node.get(noun, "")
        while node and node != "-":
            yield node
            node = self._parent.get(node, "")

    def _read(self) -> None:
        self._children: dict[str, list[str]] = defaultdict(list)
        self._words: dict[str, tuple[str, ...]] = {}
        text = files("shellv_core.data.hallucination.wordnet").joinpath("lexicon.txt").read_text(encoding="utf-8")
        for line in text.splitlines():
            sort, *parts = line.split(" ")
            if sort == "n":
                node, parent, words = parts
                self._parent[node] = parent
                self._words[node] = tuple(filter(None, words.split(",")))
                self._children[parent].append(node)
                self._node.update(dict.fromkeys(self._words[node], node))
            elif sort == "a":
                self._antonyms[parts[0]] = frozenset(parts[1].split(","))
                self._near[parts[0]] = frozenset(parts[2].split(",")) if len(parts) > 2 else frozenset()
            else:
                self._related_verbs[parts[0]] = frozenset(parts[1].split(","))


@lru_cache(maxsize=1)
def load_lexicon() -> Lexicon:
    """The one lexicon of the process; reading it takes a few tens of milliseconds."""
    return Lexicon()


def gender(noun: str) -> str:
    """ "m", "f" or "" where a noun does not tell."""
    last = noun.rsplit(" ", 1)[-1]
    return "m" if last in _MEN else "f" if last in _WOMEN else ""


def _contrary_people(first: str, second: str) -> bool:
    if first in _PERSON_GENERIC or second in _PERSON_GENERIC:
        return False
    if gender(first) and gender(second):
        return gender(first) != gender(second) or _age_group(first) != _age_group(second)
    groups = [_age_group(first), _age_group(second)]
    if groups[0] >= 0 and groups[1] >= 0:
        return groups[0] != groups[1] and not {"boy", "girl"} & {first, second}
    return groups[0] < 0 and groups[1] < 0 and not {"player", "athlete", "worker"} & {first, second}


def _age_group(noun: str) -> int:
    return next((index for index, group in enumerate(_GENDERED_GROUPS) if noun in group), -1)


def _contrary_adjectives() -> dict[str, frozenset[str]]:
    contrary: dict[str, set[str]] = defaultdict(set)
    for line in _CONTRARY_ADJECTIVES:
        groups = [[word.strip() for word in part.split(",")] for part in line.split("|")]
        for index, group in enumerate(groups):
            others = [word for other, words in enumerate(groups) if other != index for word in words]
            for word in group:
                contrary[word].update(others)
    return {word: frozenset(words - {word}) for word, words in contrary.items()}


def _groups(lines: tuple[str, ...]) -> dict[str, frozenset[int]]:
    members: dict[str, set[int]] = defaultdict(set)
    for index, line in enumerate(lines):
        for word in line.split():
            members[word].add(index)
    return {word: frozenset(indices) for word, indices in members.items()}
