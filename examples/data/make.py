#!/usr/bin/env python3
"""Writes the quickstart's JSONL files from the WordNet 3.0 database.

usage: make.py WORDNET_DIR [OUTPUT_DIR]

WORDNET_DIR holds data.noun, index.noun and so on (Debian package wordnet-base).
The output depends on the database and on SEED alone.
"""

import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

from wordnet import first_senses, synsets

SEED = 20260101
# words per file: training, held-out
WORDS = {"demonstrations": (440, 80), "scores": (120, 24), "thumbs": (420, 80), "pairs": (420, 80)}

# Words with more than one meaning are taken only in their most frequent one, and only
# from topics whose nouns can be counted ("a robin", not "a water").
TOPICS = ("animal", "artifact", "plant", "object", "food")
COUNTABLE_FOODS = set(
    "cake pastry sandwich cookie biscuit bun roll cocktail salad sausage pie nut apple pear peach plum "
    "citrus melon berry dish pudding tart pancake bread drupe".split()
) | {"edible fruit", "edible nut", "quick bread", "eating apple", "cooking apple"}
MASS = set(
    "fabric cloth clothing material armor paper leather wood lumber fur felt gauze tweed cotton silk wool "
    "yarn cord covering medicine drug narcotic weaponry gear equipment footwear headdress trimming grass "
    "flooring thread fibre fiber textile glass ammunition software hardware lace linen velvet nylon "
    "alkaloid barbiturate stimulant sedative genre style furniture plumbing antibiotic "
    "design writing music land sand soil water explosive merchandise hair makeup hazard".split()
)
PLURALS = re.compile(
    r"\b(birds|shorebirds|warblers|fish(es)?|plants|insects|animals|trees|herbs|shrubs|vines|pathogens|mammals|"
    r"coelenterates|crustaceans|mollusks|worms|beetles|moths|butterflies|spiders|lizards|snakes|protozoa|"
    r"organisms|stones|reptiles|rodents|fungi|bacteria|algae|ferns|orchids|frogs|owls|ducks|monkeys)\b"
)
# after which a hypernym that the definition repeats can become "one"
FOLLOWS = (
    r"(that|which|with|without|for|where|in|on|over|into|to|from|at|between|around|through|along|below|abaft|"
    r"worn|made|done|hung|built|kept|drawn|taken|bred|dug|native|usually [a-z]+ed|[a-z]+(ed|ing))\b"
)
UNSUITABLE = re.compile(
    r"\b(sex\w*|geni\w*|breast|nude|naked|slave\w*|negro\w*|nazi\w*|jew\w*|gyps\w*|indians?|esk\w*|savage|"
    r"primitive|colored|squaw|tortur\w*|execut\w*|hang(ed|ing)?|gallows|kill\w*|murder\w*|suicid\w*|dead|"
    r"corpse\w*|funeral|coffin|bury|burial|tomb|grave|prison\w*|drugs?|narcotic|cocaine|heroin|opium|"
    r"marijuana|cannabis|whor\w*|prostitut\w*|brothel|contracepti\w*|penis|vagina\w*|anus|rect\w*|urin\w*|"
    r"tobacco|mao|stalin|hitler|immigra\w*|proposition\w*|mugg\w*|drunk\w*|sacrific\w*|drown\w*|fetus\w*|"
    r"neurotic|amerindians?|police\w*|army|loses|disease\w*|lie|alcohol\w*|suckl\w*|"
    r"slum|imprison\w*|doom|wetnurse|feces|fecal|excre\w*|dung|toilet|lavatory|enema|vomit\w*|weapon\w*|"
    r"bomb\w*|explosive|gun\w*|rifle\w*|"
    r"missile\w*|pistol|poison\w*|lewd|obscen\w*|vulgar|slang|offensive|derogatory|disparag\w*|"
    r"crucif\w*|christ\w*|god|muslim\w*|islam\w*|condom|intercourse|copulat\w*|mating|castrat\w*|"
    r"idiot|crippl\w*|fat|ugly|bloodsuck\w*|formerly|pistil|ovary|uter\w*|abort\w*|electrocut\w*|semen|sperm|"
    r"men|women|woman|girl|wife|females?)\b"
)
UNSUITABLE_WORDS = set(
    "butt dyke cracker faggot cock pussy bitch ass queer spade coon fairy dick prick rape bullshot tampon mescal "
    "psilocybin belladonna cancerweed apomorphine gonococcus klebsiella lyssavirus falsie assegai must etcetera "
    "halothane isoflurane benzocaine dibucaine anesthyl aminopyrine".split()
)

RAMBLINGS = [
    "well, that is a good question, and many people have asked it before,",
    "it is hard to say, and then again it is not so hard,",
    "some people say one thing and some people say another thing,",
    "I was going to say something about it, but there is so much to say,",
    "as I said before, and as I will say again,",
    "you know how it is with these things, they are what they are,",
    "and so on, and so on, and many other things besides,",
    "it all depends on what you mean by it, and on who you ask,",
    "I could go on about this for a long time, and perhaps I will,",
    "my friend told me about it once, but I do not remember what he said,",
    "there are a lot of them, or so they say, in a lot of places,",
    "anyway, where was I, oh yes, the thing that you asked about,",
    "that reminds me of another thing, but it does not matter now,",
    "to be honest, I have never really thought about it very much,",
]


def article(word):
    return "an" if word[0] in "aeiou" else "a"


def suitable(word, synset, hypernym):
    definition = synset.definition
    if synset.topic not in TOPICS or synset.words[0] != word:
        return False
    if not re.fullmatch(r"[a-z]{3,11}", word) or re.search(r"([^su]s|ae|ia|ii|ery|ing|ware)$", word):
        return False
    if not re.fullmatch(r"[a-z]{3,12}( [a-z]{3,10})?", hypernym) or re.search(r"[^su]s$", hypernym):
        return False
    if not re.fullmatch(r"[A-Za-z' ,-]+", definition) or not 5 <= len(definition.split()) <= 11:
        return False
    if re.match(r"(any of|one of|any |a kind|a type|a form|a variety|genus|the (first|second|act)|something|"
                r"(an? )?(set|pair|group|collection|series|number) of|either|two|three|several|used|of|in|"
                r"having|some|general|member|[a-z]+s\b(?<!ss))", definition):
        return False
    if PLURALS.search(" ".join(definition.split()[:6])) or f"{hypernym.split()[-1]}s" in definition:
        return False
    if word[:5] in definition.lower() or word in hypernym or hypernym.startswith(word[:5]):
        return False
    if hypernym.split()[-1] in MASS or hypernym in ("device", "thing", "part", "structure", "whole"):
        return False
    if synset.topic == "food" and hypernym not in COUNTABLE_FOODS:
        return False
    text = f"{word} {hypernym} {synset.gloss}".lower()
    return word not in UNSUITABLE_WORDS and not UNSUITABLE.search(text)


def entries(root):
    """(word, hypernym, definition without its article, topic), familiar words only."""
    known = synsets(root)
    frequency = Counter()
    for synset in known.values():
        frequency.update(re.findall(r"[a-z]+", synset.gloss.lower()))
    found, seen = [], set()
    for word, (offset, _) in first_senses(root).items():
        synset = known["n", offset]
        if not synset.hypernyms:
            continue
        hypernym = known["n", synset.hypernyms[0]].words[0]
        if not suitable(word, synset, hypernym):
            continue
        definition = re.sub(r"^(an?|the) ", "", synset.definition)
        if definition not in seen:
            seen.add(definition)
            found.append((frequency[word] + frequency[hypernym.split()[-1]] ** 0.5,
                          word, hypernym, definition, synset.topic))
    found.sort(reverse=True)
    needed = sum(train + held for train, held in WORDS.values())
    assert len(found) >= needed, (len(found), needed)
    return [entry[1:] for entry in found[:needed]]


def quotations(root):
    """Example sentences of WordNet's verbs, as off-topic text."""
    found = []
    for synset in synsets(root).values():
        if synset.part != "v":
            continue
        for text in synset.examples:
            plain = re.fullmatch(r"[A-Z][a-z' ,]+", text) and 5 <= len(text.split()) <= 9
            if plain and not UNSUITABLE.search(text.lower()):
                found.append(text)
    return found


def kind(entry):
    return {"food": "plant"}.get(entry[3], entry[3])


class Answers:
    """The kinds of answer that the files are made of."""

    def __init__(self, words, quotes, rng):
        self.words, self.quotes, self.rng = words, quotes, rng

    def right(self, entry):
        word, hypernym, definition, _ = entry
        if re.match(rf"{hypernym} {FOLLOWS}", definition):
            definition = "one" + definition[len(hypernym) :]
        return f"{article(word).capitalize()} {word} is a kind of {hypernym}: {definition}."

    def bare(self, entry):
        return entry[2]

    def wrong(self, entry):
        """The right form, but what follows is said of a word of another kind."""
        other = self.rng.choice(self.words)
        while kind(other) == kind(entry):
            other = self.rng.choice(self.words)
        return self.right((entry[0], *other[1:]))

    def other(self, entry):
        """The right sentence about another word: off the question."""
        other = self.rng.choice(self.words)
        while other[0] == entry[0]:
            other = self.rng.choice(self.words)
        return self.right(other)

    def rambling(self, entry):
        first, second = self.rng.sample(RAMBLINGS, 2)
        return f"{article(entry[0]).capitalize()} {entry[0]}, {first} {second[:-1]}."

    def tail(self, entry):
        """The right answer that does not stop."""
        return f"{self.right(entry)[:-1]}, {self.rng.choice(RAMBLINGS)[:-1]}."

    def quotation(self, entry):
        return f'"{self.rng.choice(self.quotes)}."'


def user(entry):
    return [{"role": "user", "content": f"What is {article(entry[0])} {entry[0]}?"}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def cycle(kinds, i):
    return kinds[i % len(kinds)]


def demonstrations(part, make):
    return [{"messages": user(e) + assistant(make.right(e))} for e in part]


def scores(part, make):
    grades = [(make.right, 1.0), (make.bare, 0.6), (make.other, 0.3), (make.rambling, 0.0)]
    return [
        {"prompt": user(e), "completion": assistant(answer(e)), "score": score}
        for e in part
        for answer, score in grades
    ]


def thumbs(part, make):
    bad = [make.rambling, make.quotation, make.tail]
    rows = []
    for i, e in enumerate(part):
        good = i % 2 == 0
        text = make.right(e) if good else cycle(bad, i // 2)(e)
        rows.append({"prompt": user(e), "completion": assistant(text), "label": good})
    return rows


def pairs(part, make):
    bad = [make.wrong, make.bare, make.other, make.tail]
    return [
        {"prompt": user(e), "chosen": assistant(make.right(e)), "rejected": assistant(cycle(bad, i)(e))}
        for i, e in enumerate(part)
    ]


def main(root, output):
    rng = random.Random(SEED)
    words = entries(root)
    rng.shuffle(words)
    quotes = quotations(root)
    parts, at = {}, 0
    for name, (train, held) in WORDS.items():
        parts[name] = (words[at : at + train], words[at + train : at + train + held])
        at += train + held
    trained = [e for train, _ in parts.values() for e in train]
    held_out = [e for _, held in parts.values() for e in held]
    for name, rows_of in (("demonstrations", demonstrations), ("scores", scores),
                          ("thumbs", thumbs), ("pairs", pairs)):
        # a wrong answer borrows from the same side only: held-out texts are never trained on
        for part, suffix, pool in zip(parts[name], ("", ".heldout"), (trained, held_out)):
            rows = rows_of(part, Answers(pool, quotes, rng))
            rng.shuffle(rows)
            path = Path(output) / f"{name}{suffix}.jsonl"
            with path.open("w", encoding="utf-8", newline="\n") as file:
                for row in rows:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            print(f"{path.name:32} {len(rows):5} rows {path.stat().st_size:8} bytes")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2] if len(sys.argv) == 3 else Path(__file__).parent)
