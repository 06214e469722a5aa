#!/usr/bin/env python3
"""A model of random bf16 weights in Hugging Face's layout, and data for it whose numbers of tokens are exact.

    python3 model.py DIR [mistral-7b|small]

Needs nothing but Python. Token i is the word `wi`, the end of a text `</s>`; so uft's tokens and the peers' are the same
without a tokenizer for the latter. Weights are normal with a deviation of 0.02, from a million drawn numbers that every tensor
repeats from another place on: neither a product's time nor a comparison of losses knows the difference."""
import array
import json
import math
import random
import struct
import sys
from pathlib import Path

END, DRAWN, DEVIATION = 2, 1 << 20, 0.02
SHAPES = {
    # Mistral-7B-v0.1; texts are no longer than its window.
    "mistral-7b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                       num_key_value_heads=8, head_dim=128, vocab_size=32000),
    "small": dict(hidden_size=64, intermediate_size=136, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                  head_dim=16, vocab_size=320),
}
# Tokens: of a text, of a pair's prompt and of each of its responses, the end of the text included.
LENGTHS = {"mistral-7b": dict(text=4096, prompt=2048, response=2048), "small": dict(text=48, prompt=16, response=16)}


def config(shape):
    return dict(SHAPES[shape], model_type="mistral", architectures=["MistralForCausalLM"], hidden_act="silu", rms_norm_eps=1e-5,
                rope_theta=10000.0, sliding_window=None, tie_word_embeddings=False, max_position_embeddings=32768,
                bos_token_id=1, eos_token_id=END, torch_dtype="bfloat16", use_cache=True, attention_dropout=0.0)


def tensors(c):
    """Name and shape of every tensor."""
    hidden, inner, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    queries, keys = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        for name, shape in [("q", (queries, hidden)), ("k", (keys, hidden)), ("v", (keys, hidden)), ("o", (hidden, queries))]:
            yield f"{layer}.self_attn.{name}_proj.weight", shape
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        for name, shape in [("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))]:
            yield f"{layer}.mlp.{name}_proj.weight", shape
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def bf16(numbers):
    """The upper halves of f32."""
    wide = array.array("f", numbers).tobytes()
    out = bytearray(len(wide) // 2)
    out[0::2], out[1::2] = wide[2::4], wide[3::4]
    return bytes(out)


def write_weights(path, c):
    draw = random.Random(1)
    block = bf16(draw.gauss(0.0, DEVIATION) for _ in range(DRAWN))
    head, end = {}, 0
    for name, shape in tensors(c):
        length = 2 * math.prod(shape)
        head[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + length]}
        end += length
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors(c):
            left = 2 * math.prod(shape)
            if name.endswith("norm.weight"):
                file.write(bf16([1.0] * shape[0]))
                continue
            while left:
                first = 2 * draw.randrange(DRAWN)
                piece = memoryview(block)[first:first + left]
                file.write(piece)
                left -= len(piece)


def write_tokenizer(folder, vocab):
    words = {("</s>" if i == END else f"w{i}"): i for i in range(vocab)}
    end = {"id": END, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None,
                 "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
                 "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}))


def write(folder, shape):
    """The whole model, unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    c = config(shape)
    text = json.dumps(c)
    if (folder / "config.json").exists() and (folder / "config.json").read_text() == text:
        return
    write_tokenizer(folder, c["vocab_size"])
    write_weights(folder / "model.safetensors", c)
    (folder / "config.json").write_text(text)


def words(draw, vocab, count):
    return " ".join(f"w{draw.randrange(3, vocab)}" for _ in range(count))


def write_data(folder, shape, rows):
    """texts.jsonl and pairs.jsonl, so many rows of each."""
    vocab, lengths, draw = SHAPES[shape]["vocab_size"], LENGTHS[shape], random.Random(2)
    with (folder / "texts.jsonl").open("w") as file:
        for _ in range(rows["texts"]):
            row = {"prompt": words(draw, vocab, 1), "completion": " " + words(draw, vocab, lengths["text"] - 2)}
            file.write(json.dumps(row) + "\n")
    with (folder / "pairs.jsonl").open("w") as file:
        for _ in range(rows["pairs"]):
            prompt, response = words(draw, vocab, lengths["prompt"]), lengths["response"] - 1
            chosen, rejected = (" " + words(draw, vocab, response) for _ in range(2))
            file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")


def ids(text):
    """The tokens of a text that ends."""
    return [int(word[1:]) for word in text.split()] + [END]


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    write(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) == 3 else "mistral-7b")
