"""Reads the WordNet 3.0 database files (data.noun, index.noun, ...)."""

import re
from dataclasses import dataclass
from pathlib import Path

PARTS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
LEXNAMES = {
    4: "act", 5: "animal", 6: "artifact", 7: "attribute", 8: "body", 9: "cognition",
    10: "communication", 13: "food", 14: "group", 15: "location", 17: "object",
    18: "person", 20: "plant", 27: "substance",
}


@dataclass(frozen=True)
class Synset:
    part: str  # n, v, a or r
    offset: str
    topic: str  # lexicographer's file, such as "animal"
    words: tuple
    hypernyms: tuple  # offsets within the same part of speech
    definition: str  # first definition, without examples and remarks
    gloss: str  # the whole gloss as printed
    examples: tuple


def clean(word):
    return re.sub(r"\([a-z]+\)$", "", word).replace("_", " ")


def parse(line, part):
    head, _, gloss = line.partition(" | ")
    field = head.split()
    count = int(field[3], 16)
    words = tuple(clean(w) for w in field[4 : 4 + 2 * count : 2])
    at = 4 + 2 * count
    pointers = int(field[at])
    hypernyms = []
    for i in range(pointers):
        kind, offset, of = field[at + 1 + 4 * i : at + 4 + 4 * i]
        if kind == "@" and of == part:
            hypernyms.append(offset)
    gloss = " ".join(gloss.split())
    examples = tuple(re.findall(r'"([^"]+)"', gloss))
    definition = gloss.split('; "')[0].split("; ")[0]
    return Synset(
        part, field[0], LEXNAMES.get(int(field[1]), "other"), words, tuple(hypernyms),
        definition.strip(" ;:,"), gloss, examples,
    )


def synsets(root):
    """All synsets by (part, offset), in the order of the files."""
    found = {}
    for name, part in PARTS.items():
        for line in (Path(root) / f"data.{name}").open(encoding="latin-1"):
            if not line.startswith("  "):
                synset = parse(line, part)
                found[part, synset.offset] = synset
    return found


def first_senses(root):
    """Noun -> offset of its most frequent sense, and the number of senses."""
    senses = {}
    for line in (Path(root) / "index.noun").open(encoding="latin-1"):
        if line.startswith("  "):
            continue
        field = line.split()
        count = int(field[2])
        senses[field[0].replace("_", " ")] = (field[-count], count)
    return senses
