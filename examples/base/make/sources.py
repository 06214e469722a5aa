"""Documents from the five sources, as lists of plain strings.

Whatever names a living person's contact, or is crude, is left out here.
"""

import gzip
import json
import re
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))
import wordnet  # noqa: E402

CRUDE = re.compile(
    r"\b(offensive|derogatory|disparag\w*|ethnic slur|obscen\w*|vulgar|coitus|copulat\w*|fuck\w*|shit\w*|bitch\w*|"
    r"nigg\w*|faggot\w*|cunt\w*|whor\w*|slut\w*|rap(e|ed|ist)|porn\w*|prostitut\w*|penis|vagina\w*|dick|pussy|"
    r"sex\w*|suicid\w*|masturbat\w*|retard(ed)?|nazi\w*|negro\w*|gay|lesbian\w*|damn\w*|naked|ass|asshole|boob\w*)\b",
    re.IGNORECASE,
)
CONTACT = re.compile(r"@|https?:|www\.|\d[\d() -]{5,}\d")


def fit(text):
    return not CRUDE.search(text) and not CONTACT.search(text)


def reflow(block):
    return " ".join(block.split())


def austen(root):
    """The six novels from R's lazy-load file: zlib blocks of serialised strings."""
    data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    documents, at = [], 0
    while at < len(data):
        stream = zlib.decompressobj()
        block = stream.decompress(data[at + 4 :])
        at = len(data) - len(stream.unused_data)
        lines = [m for m in strings(block)]
        text = "\n".join(lines)
        paragraphs = [reflow(p) for p in re.split(r"\n\s*\n", text)]
        paragraphs = [p for p in paragraphs if p and not re.match(r"(CHAPTER|Chapter|VOLUME)\b", p)]
        # about 1,500 characters a document, whole paragraphs
        piece = ""
        for paragraph in paragraphs:
            piece += paragraph + "\n"
            if len(piece) > 1500:
                documents.append(piece)
                piece = ""
        if piece:
            documents.append(piece)
    return documents


def strings(block):
    """The CHARSXP items (type 9) of a block in R's XDR serialisation."""
    at = 0
    while True:
        at = block.find(b"\x00\x04\x00\x09", at)
        if at < 0:
            return
        size = int.from_bytes(block[at + 4 : at + 8], "big")
        yield block[at + 8 : at + 8 + size].decode("utf-8", "replace")
        at += 8 + size


def devil(root):
    """(word, definition) of the Devil's Dictionary's prose entries, verses dropped."""
    text = gzip.open(root / "usr/share/dictd/devil.dict.dz").read().decode("latin-1")
    entries = []
    for block in re.split(r"\n(?=[A-Z][A-Z' -]+, (?:n|adj|v|adv|pp|x)\.)", text):
        head = re.match(r"([A-Z][A-Z' -]+), [a-z.]+\s+", block)
        if not head:
            continue
        body = re.split(r"\n\s*\n", block[head.end() :])[0]
        body = reflow(body)
        if 20 <= len(body) <= 600 and fit(body):
            entries.append((head.group(1).lower(), body))
    return entries


def jargon(root):
    """(term, text) of the Jargon File, without cross-reference braces."""
    text = gzip.open(root / "usr/share/dictd/jargon.dict.dz").read().decode("utf-8", "replace")
    entries = []
    for block in re.split(r"\n(?=\S)", text):
        term, _, body = block.partition("\n")
        paragraphs = [reflow(p) for p in re.split(r"\n\s*\n", body)]
        paragraphs = [re.sub(r"[{}]", "", p) for p in paragraphs if len(p) > 30]
        paragraphs = [re.sub(r"\s+([,.])", r"\1", p) for p in paragraphs if fit(p)]
        if paragraphs and len(term) < 40 and fit(term):
            entries.append((term.strip(), "\n".join(paragraphs[:4])))
    return entries


def chitchat(root):
    """Conversations as lists of (speaker 0 or 1, text)."""
    data = json.loads((root / "chitchat_dataset/dataset.json").read_text(encoding="utf-8"))
    conversations = []
    for item in data.values():
        turns, speakers = [], {}
        for group in item["messages"]:
            text = reflow(" ".join(m["text"] for m in group))
            sender = speakers.setdefault(group[0]["sender"], len(speakers))
            if text:
                turns.append((sender, text))
        if len(speakers) == 2 and len(turns) >= 4 and all(fit(t) for _, t in turns):
            conversations.append(turns)
    return conversations


def synsets(root):
    """WordNet's synsets by (part, offset), crude ones left out."""
    known = wordnet.synsets(root / "usr/share/wordnet")
    return {key: s for key, s in known.items() if fit(s.gloss) and fit(" ".join(s.words))}
