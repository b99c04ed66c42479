"""A small world told in simple English: a seeded grammar of stories, facts and talk.

The text is the project's own, so the checkpoint trained on it may be shipped and its output can be recognised as
language. Standard library only. `prompts(seed, n)` draws beginnings of such texts for a load generator.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

NAMES = [
    ("Mira", "she", "her"), ("Tom", "he", "his"), ("Ada", "she", "her"), ("Ben", "he", "his"), ("Lena", "she", "her"),
    ("Omar", "he", "his"), ("Ivy", "she", "her"), ("Max", "he", "his"), ("Nora", "she", "her"), ("Sam", "he", "his"),
    ("Rosa", "she", "her"), ("Felix", "he", "his"), ("Yuki", "she", "her"), ("Paul", "he", "his"),
]  # fmt: skip
ADJECTIVES = [
    "small",
    "old",
    "quiet",
    "brave",
    "tired",
    "clever",
    "happy",
    "careful",
    "young",
    "curious",
    "patient",
    "hungry",
    "gentle",
    "busy",
]
ANIMALS = ["dog", "cat", "horse", "fox", "goat", "rabbit", "duck", "owl", "hen", "donkey", "mouse", "bear"]
COLOURS = ["red", "blue", "green", "yellow", "white", "black", "brown", "grey", "silver", "golden"]
THINGS = [
    "lamp",
    "key",
    "boat",
    "kite",
    "basket",
    "bell",
    "book",
    "wheel",
    "coat",
    "drum",
    "ladder",
    "rope",
    "map",
    "clock",
    "cup",
    "box",
    "wagon",
    "flute",
]
PLACES = [
    "forest", "village", "harbour", "market", "garden", "mill", "valley", "castle", "school", "river", "bridge",
    "mountain", "farm", "lighthouse", "workshop", "library",
]  # fmt: skip
FOODS = ["bread", "soup", "cheese", "apples", "honey", "pears", "nuts", "fish", "milk", "berries"]
WEATHERS = ["sunny", "rainy", "windy", "cold", "warm", "foggy", "snowy", "stormy"]
TIMES = ["One morning", "One evening", "Late at night", "On a {weather} day", "In the spring", "After the long winter"]
JOBS = [
    "baker",
    "farmer",
    "teacher",
    "sailor",
    "miller",
    "smith",
    "doctor",
    "gardener",
    "painter",
    "tailor",
    "shepherd",
    "carpenter",
]
PARTS = ["handle", "door", "lid", "wheel", "string", "sail", "page", "roof", "step", "corner"]
FEELINGS = {"glad": "smiled", "sad": "cried", "afraid": "ran home", "proud": "laughed", "surprised": "stood still"}


@dataclass(frozen=True)
class Cast:
    """Who and what one text is about; the same from its first sentence to its last."""

    name: str
    he: str
    his: str
    friend: str
    job: str
    adjective: str
    animal: str
    colour: str
    thing: str
    place: str
    far_place: str
    food: str
    weather: str
    part: str
    feeling: str

    @property
    def did(self) -> str:
        return FEELINGS[self.feeling]


def cast(rng: random.Random) -> Cast:
    (name, he, his), (friend, _, _) = rng.sample(NAMES, 2)
    place, far_place = rng.sample(PLACES, 2)
    picks = (rng.choice(words) for words in (JOBS, ADJECTIVES, ANIMALS, COLOURS, THINGS))
    job, adjective, animal, colour, thing = picks
    food, weather, part = rng.choice(FOODS), rng.choice(WEATHERS), rng.choice(PARTS)
    feeling = rng.choice(list(FEELINGS))
    return Cast(
        name, he, his, friend, job, adjective, animal, colour, thing, place, far_place, food, weather, part, feeling
    )


OPENINGS = [
    "Once there was a {adjective} {job} called {name} who lived near the {place}.",
    "{name} was a {adjective} {job}. {He} lived in a house by the {place}.",
    "There was once a {adjective} {animal} in the {place}, and its best friend was {name}.",
    "{time}, {name} walked to the {place} with a {colour} {thing} under {his} arm.",
    "{time}, {name} found a {colour} {thing} near the {place}.",
    "{name} and {friend} were friends. They lived on two sides of the same {place}.",
]
WANTS = [
    "{name} had a {colour} {thing}, and {he} took it everywhere.",
    "More than anything, {name} wanted a {colour} {thing}.",
    "Every day {he} went to the {place} to look for {food}.",
    "{He} had heard of a {colour} {thing} that was hidden in the {far_place}.",
    "It was {weather}, and there was no {food} left in the house.",
    "{He} loved {food}, but {he} loved the {place} even more.",
]
TROUBLES = [
    "But the {part} of the {thing} was broken, and nobody knew how to mend it.",
    "Then the {thing} was gone. {name} looked under the table, behind the door and in the garden.",
    "On the way to the {far_place} it became very {weather}, and the path was hard to see.",
    "A {adjective} {animal} sat in the middle of the road and would not move.",
    "But {friend} said that the {far_place} was too far away for one day.",
    "That night somebody took the {thing} and left only a piece of {food}.",
]
TALKS = [
    '"Do not worry," said {friend}. "We will find the {thing} together."',
    '"Where are you going?" asked the {animal}. "To the {far_place}," said {name}.',
    '"I can help you," said {friend}, "if you give me some {food}."',
    '"Is this your {thing}?" asked the {job}. "Yes," said {name}, "it is mine."',
    '{name} asked, "Why is the {thing} {colour}?" but nobody could tell {him}.',
    '"First we eat the {food}," said {friend}, "and then we think."',
]
DEEDS = [
    "So they walked from the {place} to the {far_place}, and they talked all the way.",
    "{name} gave the {animal} some {food}, and it followed {him} to the {far_place}.",
    "{friend} held the {thing} while {name} mended the {part} with a piece of rope.",
    "They climbed up the hill, and from there they could see the {far_place}.",
    "The {animal} showed them a small door behind the {place}, and there was the {thing}.",
    "{name} worked until it was dark, and in the morning the {thing} was as good as new.",
]
ENDINGS = [
    "{name} was {feeling} and {did}. From that day on the {thing} stood by the window.",
    "In the end {name} and {friend} shared the {food} and went home happy.",
    "{He} put the {colour} {thing} on the table, and everybody in the {place} came to see it.",
    "And when it is {weather}, people at the {place} still tell the story of {name} and the {animal}.",
    "{name} never lost the {thing} again, and the {animal} never left {his} side.",
    '"Tomorrow we will go again," said {name}, and {friend} {did}.',
]
FACTS = [
    ("What does a {job} need?", "A {job} needs a good {thing}, some {food} and a lot of time."),
    ("Where is the {place}?", "The {place} is near the {far_place}. You can walk there in the morning."),
    ("What does the {animal} eat?", "The {animal} eats {food}, and when it is {weather} it stays at home."),
    ("Who is {name}?", "{name} is a {adjective} {job} who lives by the {place}."),
    ("What colour is the {thing}?", "The {thing} is {colour}, and its {part} is made of wood."),
    ("What do we do when it is {weather}?", "When it is {weather} we sit by the fire and eat {food}."),
    ("Why was {name} {feeling}?", "{name} was {feeling} because {he} found {his} {thing} at the {far_place}."),
]
REQUESTS = [
    "Tell me a story about {name} and a {colour} {thing}.",
    "Can you tell a short story about the {place}?",
    "Please write about a {adjective} {animal}.",
]


def _say(template: str, who: Cast, rng: random.Random) -> str:
    time = rng.choice(TIMES).format(weather=who.weather)
    him = {"she": "her", "he": "him"}[who.he]
    fields = {field: getattr(who, field) for field in Cast.__dataclass_fields__}
    said = template.format(**fields, did=who.did, time=time, him=him, He=who.he.capitalize())
    for vowel in "aeiou":
        said = said.replace(f" a {vowel}", f" an {vowel}").replace(f"A {vowel}", f"An {vowel}")
    return said[0].upper() + said[1:]


def story(rng: random.Random, who: Cast) -> str:
    """Return one story of five to nine sentences about one cast."""
    middle = [rng.choice(group) for group in (WANTS, TROUBLES, TALKS, DEEDS)]
    more = rng.sample(TALKS + DEEDS, rng.randrange(4))
    lines = [rng.choice(OPENINGS), *middle, *(line for line in more if line not in middle), rng.choice(ENDINGS)]
    return " ".join(_say(line, who, rng) for line in lines)


def talk(rng: random.Random, who: Cast) -> list[tuple[str, str]]:
    """Return (question, answer) turns about one cast; the last may ask for a story."""
    turns = [(_say(q, who, rng), _say(a, who, rng)) for q, a in rng.sample(FACTS, rng.randrange(1, 3))]
    if rng.random() < 0.4:
        turns.append((_say(rng.choice(REQUESTS), who, rng), story(rng, who)))
    return turns


def texts(seed: int) -> Iterator[str | list[tuple[str, str]]]:
    """Yield texts for ever: stories, facts told in a row, and talk as a list of turns."""
    rng = random.Random(seed)
    while True:
        who, kind = cast(rng), rng.random()
        if kind < 0.6:
            yield story(rng, who)
        elif kind < 0.75:
            facts = rng.sample(FACTS, 4)
            yield " ".join(_say(answer, who, rng) for _, answer in facts)
        else:
            yield talk(rng, who)


def prompts(seed: int, n: int) -> list[str]:
    """Return n beginnings of 3 to about 60 words, cut at random, the same for the same seed."""
    rng = random.Random(seed)
    made = []
    for _ in range(n):
        words = story(rng, cast(rng)).split()
        made.append(" ".join(words[: rng.choice([3, 5, 8, 12, 20, 32, 48, 60])]))
    return made
