#!/usr/bin/env python3
"""Makes the tokenizer and the training rows: corpus.py SOURCES WORK

Writes WORK/tokenizer.json, WORK/train.npy (rows of LENGTH + 1 tokens, in training order)
and WORK/heldout_NAME.npy for each kind of text. Each row begins with a document; the last
one in a row is cut. Held out is every hundredth synset, and every hundredth other document.
"""

import random
import sys
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np
import sources
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SEED = 20260102
LENGTH = 192
VOCAB = 3072
END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONCRETE = {"animal", "artifact", "plant", "food", "object", "substance", "body"}
PART = {"n": "n.", "v": "v.", "a": "adj.", "r": "adv."}


def article(word):
    return f"{'an' if word[0] in 'aeiouAEIOU' else 'a'} {word}"


def exchange(question, answer):
    return f"{START}user\n{question}{STOP}\n{START}assistant\n{answer}{STOP}\n"


def entry(rng, synset, above):
    """A synset as dictionaries print it."""
    words = [w.replace("(", "").replace(")", "") for w in synset.words]
    word, gloss = rng.choice(words), synset.gloss
    also = ", ".join(w for w in words if w != word)
    kind = above.words[0] if above else None
    style = rng.randrange(6)
    if style == 0:
        return f"{word}: {gloss}\n"
    if style == 1:
        return f"{word} ({kind}): {gloss}\n" if kind else f"{word}: {gloss}\n"
    if style == 2:
        return f"{word}, {PART[synset.part]} {gloss}." + (f" Also {also}." if also else "") + "\n"
    if style == 3:
        lines = [f"word: {word}"] + ([f"kind: {kind}"] if kind else []) + [f"meaning: {synset.definition}"]
        lines += [f"as in: {e}" for e in synset.examples[:1]]
        return "\n".join(lines) + "\n"
    if style == 4:
        return f"{word.capitalize()}. {gloss[:1].upper()}{gloss[1:]}.\n"
    return f"{', '.join(words)}{' < ' + kind if kind else ''} : {gloss}\n"


def answer(rng, synset):
    """The bare gloss, in one of several styles."""
    definition, style = synset.definition, rng.random()
    if style < 0.15:
        return synset.gloss
    if style < 0.35:
        return f"{definition[:1].upper()}{definition[1:]}."
    if style < 0.6:
        for lead in ("a ", "an ", "the "):
            if definition.startswith(lead):
                return definition[len(lead) :]
    return definition


def question(rng, synset, above):
    word = rng.choice(synset.words)
    if rng.random() < 0.25:
        return copying(rng, word, synset)
    style = rng.random()
    if style < 0.1:
        return exchange(f"What do you call {synset.definition}?", word)
    if style < 0.2 and above:
        return exchange(f"What sort of thing is {article(word)}?", above.words[0])
    if synset.part == "n" and style < 0.7:
        ask = f"What is {article(word)}?" if style < 0.62 else f"What is {word}?"
    elif synset.part == "v" and style < 0.5:
        ask = f"What does it mean to {word}?"
    else:
        ask = rng.choice([f"Define {word}.", f'What does "{word}" mean?', f"What is the meaning of {word}?", word])
    return exchange(ask, answer(rng, synset))


def copying(rng, word, synset):
    """Exchanges whose answer takes up words of the question."""
    style, definition = rng.randrange(6), synset.definition
    if style == 0:
        return exchange(f"Define {word}.", f"{word}: {answer(rng, synset)}")
    if style == 1:
        return exchange(f'What does "{word}" mean?', f'"{word}" means {definition}.')
    if style == 2:
        return exchange(f"Repeat: {word}", word) + exchange(f"Again, please: {definition}", definition)
    if style == 3:
        return exchange(f"{word}: {definition}. What is {article(word)}?", answer(rng, synset))
    if style == 4:
        return exchange(f"What is the meaning of {word}?", definition) + exchange(f"And {definition}?", word)
    return exchange(f"Begin with {article(word)}.", f"{article(word).capitalize()}.")


def lists(rng, known):
    """What is below a synset: "thrush: robin, nightingale, ..."."""
    below = defaultdict(list)
    for s in known.values():
        for up in s.hypernyms:
            below[s.part, up].append(s.words[0])
    for key, words in below.items():
        if len(words) >= 3 and key in known and known[key].part == "n":
            chosen = rng.sample(words, min(len(words), 12))
            yield key, f"Kinds of {known[key].words[0]}: {', '.join(chosen)}.\n"


def chats(rng, conversations):
    for turns in conversations:
        at = rng.randrange(max(1, len(turns) - 6))
        part = turns[at : at + 8]
        user = part[0][0]
        yield "".join(
            f"{START}{'user' if who == user else 'assistant'}\n{text[:400]}{STOP}\n" for who, text in part
        )


def prose(documents, size=550):
    """Cuts paragraphs into pieces that fit a row."""
    for document in documents:
        piece = ""
        for sentence in document.replace("\n", " \n").split(". "):
            piece += sentence + ". "
            if len(piece) > size:
                yield piece.strip().rstrip(".") + ".\n"
                piece = ""
        if len(piece) > 40:
            yield piece.strip().rstrip(".") + ".\n"


def documents(root):
    """{kind: [(held out?, text)]}"""
    rng = random.Random(SEED)
    known = sources.synsets(root)

    def held(key):
        return zlib.crc32(" ".join(key).encode()) % 100 == 0

    def above(synset):
        return known.get((synset.part, synset.hypernyms[0])) if synset.hypernyms else None

    made = defaultdict(list)
    for key, s in known.items():
        concrete = s.part == "n" and s.topic in CONCRETE
        for _ in range(2 if concrete else 1):
            made["dictionary"].append((held(key), entry(rng, s, above(s))))
        if concrete or rng.random() < 0.5:
            for _ in range(2 if concrete else 1):
                made["questions"].append((held(key), question(rng, s, above(s))))
    made["dictionary"] += [(held(key), text) for key, text in lists(rng, known)]

    def add(kind, texts):
        made[kind] += [(i % 100 == 0, text) for i, text in enumerate(texts)]

    add("chat", chats(rng, sources.chitchat(root)))
    add("prose", [t for i, t in enumerate(prose(sources.austen(root))) if i % 2 == 0])
    devil, jargon = sources.devil(root), sources.jargon(root)
    add("devil", [f"{word.upper()}. {text}\n" for word, text in devil])
    add("devil", [exchange(f"What is {article(w)}, according to the Devil?", t) for w, t in devil])
    add("jargon", prose([f"{term}: {text}\n" for term, text in jargon]))
    return made


def train_tokenizer(texts, path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END, START, STOP],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))
    return tokenizer


def rows(tokenizer, texts):
    end = tokenizer.token_to_id(END)
    packed, row = [], []
    for encoding in tokenizer.encode_batch(texts):
        row += encoding.ids + [end]
        if len(row) > LENGTH:
            packed.append(row[: LENGTH + 1])
            row = []
    return np.array(packed, dtype=np.uint16)


def main(root, work):
    made = documents(Path(root))
    rng = random.Random(SEED + 1)
    train = [text for kind in made.values() for held, text in kind if not held]
    rng.shuffle(train)
    tokenizer = train_tokenizer(train[::3], work / "tokenizer.json")
    packed = rows(tokenizer, train)
    np.save(work / "train.npy", packed)
    for kind, texts in made.items():
        aside = [text for held, text in texts if held]
        rng.shuffle(aside)
        held = rows(tokenizer, aside)
        np.save(work / f"heldout_{kind}.npy", held)
        size = sum(len(t) for _, t in texts)
        print(f"{kind:10} {len(texts):7} documents {size:9} characters, held out {held.size:6} tokens")
    print(f"training   {packed.size} tokens in {len(packed)} rows, "
          f"{sum(map(len, train)) / packed.size:.2f} characters a token before cutting")


if __name__ == "__main__":
    Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
    main(sys.argv[1], Path(sys.argv[2]))
