"""A person's attributes, and those that a photo hides → a caption in a domain's style, and the attributes it states."""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from irra_core.synthetic.pedestrian import COLOURS

Person = dict[str, str]

WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "colour": {name: (name,) for name in COLOURS}
    | {
        "grey": ("grey", "gray"),
        "light blue": ("light blue", "pale blue", "sky blue"),
        "navy": ("navy", "dark blue", "navy blue"),
        "purple": ("purple", "violet"),
        "beige": ("beige", "tan", "cream"),
        "blonde": ("blonde", "blond", "fair"),
    },
    "gender": {
        "man": ("man", "man", "man", "male pedestrian", "guy", "gentleman"),
        "woman": ("woman", "woman", "woman", "female pedestrian", "lady"),
        "": ("person", "pedestrian"),
    },
    "hair": {
        "short": ("short {} hair", "short-cut {} hair"),
        "long": ("long {} hair", "long loose {} hair"),
        "bob": ("chin-length {} hair", "a {} bob"),
        "ponytail": ("{} hair tied in a ponytail", "a {} ponytail"),
        "bun": ("{} hair in a bun", "a {} bun"),
        "bald": ("a bald head", "a shaved head"),
    },
    "pattern": {
        "striped": ("striped", "stripy"),
        "checked": ("checked", "plaid", "checkered"),
        "dotted": ("dotted", "polka-dot", "spotted"),
        "plain": ("plain",),
        "logo": ("with a logo", "with a print on the chest"),
    },
    "upper": {
        "t-shirt": ("t-shirt", "tee", "short-sleeved top"),
        "shirt": ("shirt", "button-up shirt"),
        "sweater": ("sweater", "jumper", "pullover"),
        "hoodie": ("hoodie", "hooded sweatshirt"),
        "jacket": ("jacket",),
        "coat": ("coat", "long coat", "overcoat"),
        "down jacket": ("down jacket", "puffer jacket", "padded jacket"),
        "dress": ("dress",),
        "": ("top",),
    },
    "worn": {"open": ("open", "unbuttoned"), "closed": ("closed", "buttoned-up")},
    "lower": {
        "trousers": ("trousers", "pants"),
        "jeans": ("jeans", "denim trousers"),
        "shorts": ("shorts",),
        "skirt": ("skirt", "knee-length skirt"),
    },
    "shoes": {
        "sneakers": ("sneakers", "trainers", "sports shoes"),
        "boots": ("boots",),
        "leather shoes": ("leather shoes", "dress shoes"),
        "": ("shoes",),
    },
    "bag": {
        "backpack": ("backpack", "rucksack"),
        "shoulder bag": ("shoulder bag", "crossbody bag", "messenger bag"),
        "handbag": ("handbag", "purse"),
        "": ("bag",),
    },
    "hat": {
        "cap": ("cap", "baseball cap"),
        "beanie": ("beanie", "woolly hat", "knit cap"),
        "brimmed hat": ("brimmed hat", "sun hat"),
        "": ("hat",),
    },
    "glasses": {"yes": ("dark glasses", "sunglasses")},
    "carried": {
        "phone": ("a phone", "a mobile phone", "a smartphone"),
        "bottle": ("a {} bottle",),
        "cup": ("a cup of coffee", "a paper cup"),
        "book": ("a {} book", "a {} folder"),
        "umbrella": ("a closed {} umbrella", "a folded {} umbrella"),
        "open umbrella": ("an open {} umbrella", "a {} umbrella overhead"),
        "shopping bag": ("a {} shopping bag", "a {} carrier bag"),
        "suitcase": ("a {} suitcase", "a {} trolley case"),
    },
}
SAID = {  # probability that a caption states a visible attribute; the data set's ceiling depends on these
    "gender": 0.9, "hair": 0.52, "upper": 0.97, "pattern": 0.88, "worn": 0.5, "inner_colour": 0.75, "lower": 0.92,
    "shoes": 0.58, "bag": 0.82, "hat": 0.86, "glasses": 0.5, "carried": 0.66, "type": 0.88, "colour": 0.94,
}  # fmt: skip
STYLES = {  # domain → sentence frame → weight
    "street": {"sentence": 5, "dressed": 3, "there": 1},
    "night": {"short": 5, "sentence": 2, "list": 1},
    "campus": {"there": 3, "list": 3, "dressed": 3},
}


def weighted(weights: dict[str, int | float], rng: np.random.Generator, without: Sequence[str] = ()) -> str:
    """A name, drawn with a probability proportional to its weight."""
    names = [name for name in weights if name not in without]
    steps = np.cumsum([weights[name] for name in names])
    return names[int(np.searchsorted(steps, rng.random() * steps[-1], side="right"))]


class Teller:
    """Writes phrases about the visible attributes of one person, and records the attributes that they state."""

    def __init__(self, person: Person, hidden: set[str], rng: np.random.Generator):
        self.person, self.hidden, self.rng = person, hidden, rng
        self.stated: Person = {}

    def says(self, slot: str) -> bool:
        return self.rng.random() < SAID[slot]

    def word(self, slot: str, value: str, states: str = "") -> str:
        """A random synonym of the value, which is recorded as the value of the attribute `states`, if given."""
        if states:
            self.stated[states] = value
        choices = WORDS[slot][value]
        return choices[int(self.rng.integers(len(choices)))]

    def colour(self, key: str) -> str:
        """A word for the colour; empty if there is no colour or the caption omits it."""
        if key not in self.person or not self.says("colour"):
            return ""
        return self.word("colour", self.person[key], key)

    def kind(self, slot: str) -> str:
        """A word for the kind of thing, or a general word (as `bag` for a backpack) if there is one."""
        precise = "" not in WORDS[slot] or self.says("type")
        return self.word(slot, self.person[slot], slot) if precise else self.word(slot, "")

    def thing(self, slot: str) -> str:
        """Colour and kind, as `blue jeans`."""
        return " ".join(
            filter(None, (self.colour({"shoes": "shoe_colour"}.get(slot, f"{slot}_colour")), self.kind(slot)))
        )

    def parts(self) -> dict[str, str]:
        """A phrase for every slot that is visible and that the caption does not omit."""
        person, found = self.person, {}
        for slot in ("hair", "upper", "lower", "shoes", "bag", "hat", "glasses", "carried"):
            absent = person.get(slot, "none") in ("none", "no", "nothing") or slot in self.hidden
            if not absent and self.says(slot):
                found[slot] = getattr(self, f"_{slot}", lambda slot=slot: _one(self.thing(slot)))()
        return found

    def _hair(self) -> str:
        phrase = self.word("hair", self.person["hair"], "hair")
        return _one(" ".join(phrase.format(self.colour("hair_colour") if "{}" in phrase else "").split()), given=True)

    def _upper(self) -> str:
        colour, kind, person = self.colour("upper_colour"), self.kind("upper"), self.person
        pattern, after = person.get("pattern", "plain"), ""
        if pattern == "plain":
            pattern = (
                self.word("pattern", "plain", "pattern") if "pattern" in person and self.rng.random() < 0.15 else ""
            )
        elif pattern == "logo":
            shown = "logo" not in self.hidden and self.says("pattern")
            pattern, after = "", f" {self.word('pattern', 'logo', 'pattern')}" if shown else ""
        else:
            pattern = self.word("pattern", pattern, "pattern") if self.says("pattern") else ""
        worn = ""
        if "worn" in person and "worn" not in self.hidden and "upper" in self.stated:
            if self.says("worn"):
                worn = self.word("worn", person["worn"], "worn")
            if person["worn"] == "open" and self.says("inner_colour"):
                after = f" over a {self.word('colour', person['inner_colour'], 'inner_colour')} top"
                after = after.replace("a orange", "an orange")
        words = [worn, colour, pattern] if self.rng.random() < 0.6 else [worn, pattern, colour]
        return _one(" ".join([*filter(None, words), kind])) + after

    def _lower(self) -> str:
        phrase = self.thing("lower")
        if self.person["lower"] == "skirt":
            return _one(phrase)
        return f"a pair of {phrase}" if self.rng.random() < 0.15 else phrase

    def _shoes(self) -> str:
        return self.thing("shoes")

    def _glasses(self) -> str:
        return self.word("glasses", "yes", "glasses")

    def _carried(self) -> str:
        phrase = self.word("carried", self.person["carried"], "carried")
        if "{}" in phrase:
            phrase = " ".join(phrase.format(self.colour("carried_colour")).split())
        return phrase.replace("a orange", "an orange").replace("an open orange", "an open orange")


def _one(phrase: str, given: bool = False) -> str:
    """The phrase with its article; if `given`, the phrase has its article already, and only `an` is corrected."""
    if given:
        return phrase.replace("a orange", "an orange")
    return f"{'an' if phrase[0] in 'aeio' else 'a'} {phrase}"


def _listed(phrases: Sequence[str]) -> str:
    """`a, b and c`."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def caption_of(person: Person, hidden: set[str], domain: str, rng: np.random.Generator) -> tuple[str, Person]:
    """A sentence about a photo and the attributes that it states."""
    teller = Teller(person, hidden, rng)
    named = teller.says("gender")
    noun = teller.word("gender", person["gender"], "gender") if named else teller.word("gender", "")
    parts = teller.parts()
    pronoun = {"man": "he", "woman": "she"}[person["gender"]] if named else "the person"
    style = weighted(STYLES[domain], rng)
    text = _FRAMES[style](noun, pronoun, parts, hidden, rng)
    text = " ".join(text.split())
    return text[0].upper() + text[1:], teller.stated


def _either(rng: np.random.Generator, *choices: str) -> str:
    return choices[int(rng.integers(len(choices)))]


def _clothes(parts: dict[str, str], rng: np.random.Generator) -> list[str]:
    """Phrases of the clothes, from the top down or in another order."""
    order = [["upper", "lower", "shoes", "hat"], ["hat", "upper", "lower", "shoes"], ["lower", "upper", "shoes", "hat"]]
    names = order[int(rng.integers(len(order)))]
    return [parts[name] for name in names if name in parts]


def _possessions(parts: dict[str, str], hidden: set[str], rng: np.random.Generator) -> str:
    """A verb phrase, without its subject, of what is carried; empty if nothing is."""
    found = []
    if "bag" in parts:
        if "bag's body" in hidden:
            found.append(
                _either(rng, "has the straps of {} over the shoulders", "carries {} on the back").format(parts["bag"])
            )
        else:
            found.append(_either(rng, "carries", "has", "is carrying") + f" {parts['bag']}")
    if "carried" in parts:
        found.append(_either(rng, "holds", "is holding", "has") + f" {parts['carried']}")
    if rng.random() < 0.4:
        found.reverse()
    return " and ".join(found)


def _sentence(noun, pronoun, parts, hidden, rng) -> str:
    clothes, things = _clothes(parts, rng), _possessions(parts, hidden, rng)
    head = [parts[name] for name in ("hair", "glasses") if name in parts]
    text = f"{_either(rng, 'a', 'the')} {noun} " + (f"with {_listed(head)} " if head else "")
    text += f"{_either(rng, 'is wearing', 'wears', 'is dressed in')} {_listed(clothes)}" if clothes else "is walking"
    if things and rng.random() < 0.5:
        return f"{text}, and {things}."
    return f"{text}." + (f" {pronoun[0].upper() + pronoun[1:]} {things}." if things else "")


def _dressed_first(noun, pronoun, parts, hidden, rng) -> str:
    clothes, things = _clothes(parts, rng), _possessions(parts, hidden, rng)
    head = [parts[name] for name in ("glasses", "hair") if name in parts]
    start = f"{_either(rng, 'wearing', 'dressed in')} {_listed(clothes)}, " if clothes else ""
    rest = f"has {_listed(head)}" if head else _either(rng, "walks along", "is on foot", "walks by")
    return f"{start}{_either(rng, 'this', 'the', 'a')} {noun} {rest}" + (f" and {things}." if things else ".")


def _short(noun, pronoun, parts, hidden, rng) -> str:
    sentences = []
    subject = pronoun[0].upper() + pronoun[1:]
    clothes = _clothes({k: v for k, v in parts.items() if k != "shoes"}, rng)
    if clothes:
        sentences.append(f"{subject} {_either(rng, 'wears', 'has on', 'is in')} {_listed(clothes)}.")
    if "shoes" in parts:
        sentences.append(f"{_either(rng, 'There are', 'On the feet are', 'Below are')} {parts['shoes']}.")
    if "glasses" in parts:
        sentences.append(f"{subject} wears {parts['glasses']}.")
    if things := _possessions(parts, hidden, rng):
        sentences.append(f"{subject} {things}.")
    sentences = [sentences[i] for i in rng.permutation(len(sentences))]
    hair = f" with {parts['hair']}" if "hair" in parts else ""
    return " ".join([f"{_either(rng, 'A', 'This is a')} {noun}{hair}.", *sentences])


def _list(noun, pronoun, parts, hidden, rng) -> str:
    rest = [parts[name] for name in ("hair", "glasses", "bag", "carried") if name in parts]
    items = _clothes(parts, rng) + rest if rng.random() < 0.5 else rest + _clothes(parts, rng)
    return f"{noun}, {', '.join(items)}." if items else f"a {noun}."


def _there(noun, pronoun, parts, hidden, rng) -> str:
    clothes, things = _clothes(parts, rng), _possessions(parts, hidden, rng)
    head = [parts[name] for name in ("hair", "glasses") if name in parts]
    text = f"{_either(rng, 'there is', 'we see', 'the photo shows')} a {noun}"
    text += f" in {_listed(clothes)}" if clothes else ""
    text += f", with {_listed(head)}" if head else ""
    return text + (f", who {things}." if things else ".")


_FRAMES = {"sentence": _sentence, "dressed": _dressed_first, "short": _short, "list": _list, "there": _there}


def hidden_in(view: str, person: Person, out_of_sight: Sequence[str], boxes: dict) -> set[str]:
    """The attributes that a photo does not show."""
    hidden = set(out_of_sight)
    for name in ("glasses", "hat", "bag", "carried", "hair", "logo", "upper", "lower", "shoes"):
        if name not in boxes:
            hidden.add(name)
    if view != "front":
        hidden |= {"worn"}
    if person.get("worn") == "open" and "inner" not in boxes:
        hidden.add("worn")
    if view == "front" and person["bag"] == "backpack":
        hidden.add("bag's body")
    if view == "back" and person["carried"] in ("phone", "cup", "book", "bottle"):
        hidden.add("carried")
    return hidden


class Named(NamedTuple):
    """Words of a caption about one thing that a photo shows."""

    thing: str  # hair, upper, inner, lower, shoes, bag, hat, glasses or carried: the name of its box
    kind: str  # "colour", or "noun" for what it is called
    places: list[int]  # indices of these words in the sentence


def things_named(words: Sequence[str]) -> list[Named]:
    """The things named in a caption of this grammar, from its words in lower case, with punctuation split off.

    A colour belongs to the noun that follows it directly or after a pattern: `a blue striped shirt`.
    """
    found, colours, place = [], [], 0
    while place < len(words):
        kind, size = _longest(words, place)
        places = list(range(place, place + size))
        if kind == "colour":
            colours.append(places)
        elif kind == "":
            colours = []
        elif kind != "pattern":
            first = colours[0][0] if colours else place
            inner = kind == "upper" and list(words[max(first - 2, 0) : first]) in (["over", "a"], ["over", "an"])
            thing = "inner" if inner else kind
            found += [Named(thing, "colour", spot) for spot in colours] + [Named(thing, "noun", places)]
            colours = []
        place += size
    return found


def _longest(words: Sequence[str], place: int) -> tuple[str, int]:
    """The longest name that begins at the word with index `place`: its kind ("" if none) and its number of words."""
    for size in range(min(4, len(words) - place), 0, -1):  # "knee - length skirt" has 4 words
        if kind := _names().get(tuple(words[place : place + size])):
            return kind, size
    return "", 1


@lru_cache(maxsize=1)
def _names() -> dict[tuple[str, ...], str]:
    """Every name of the grammar, split into words and punctuation → its kind: colour, pattern or a thing."""
    names = {}
    for kind in ("pattern", "upper", "lower", "shoes", "bag", "hat", "glasses", "carried", "colour"):
        for phrase in (phrase for synonyms in WORDS[kind].values() for phrase in synonyms):
            noun = phrase.split("{} ")[-1].removeprefix("a ").removesuffix(" overhead")
            names[tuple(re.findall(r"[a-z]+|[^\sa-z]+", noun))] = kind
    return names | {(noun,): "hair" for noun in ("hair", "bob", "ponytail", "bun")}
