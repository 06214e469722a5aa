#!/usr/bin/env python3
"""The plan of memory that `uft train` prints against the peak that the kernel measured (ru_maxrss).

    python3 tests/bench/memory.py --uft target/release/uft [--only NAME ...] [--keep DIR]

Runs examples/quickstart.toml and a random Llama of about 19 M parameters, which it makes, with short and long rows,
several micro_tokens, with and without recomputation, and with every gain switched off in turn. Prints a Markdown table,
and exits with 1 if a plan is off by more than a tenth. Needs nothing but Python and Linux; run it in the repository's root."""
import argparse
import array
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SHAPE = {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 10, "num_attention_heads": 6,
         "num_key_value_heads": 2}
ALLOWED = 0.10


def make_model(base, directory, dtype):
    """A Llama with random weights and the example model's tokenizer."""
    directory.mkdir(parents=True)
    for name in ["tokenizer.json", "tokenizer_config.json"]:
        shutil.copy(base / name, directory)
    v, h, i = SHAPE["vocab_size"], SHAPE["hidden_size"], SHAPE["intermediate_size"]
    k = h // SHAPE["num_attention_heads"] * SHAPE["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": [v, h], "model.norm.weight": [h]}
    for layer in range(SHAPE["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {at + "input_layernorm.weight": [h], at + "post_attention_layernorm.weight": [h]}
        shapes |= {at + f"self_attn.{p}_proj.weight": [k if p in "kv" else h, h] for p in "qkvo"}
        shapes |= {at + f"mlp.{p}_proj.weight": [h, i] if p == "down" else [i, h] for p in ["gate", "up", "down"]}
    draw = random.Random(1)
    block = array.array("f", (draw.gauss(0, 0.02) for _ in range(1 << 16))).tobytes()
    if dtype == "BF16":  # the upper half of each number
        block = b"".join(block[at + 2:at + 4] for at in range(0, len(block), 4))
    size = 4 if dtype == "F32" else 2
    header, end = {}, 0
    for name, shape in shapes.items():
        length = size * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + length]}
        end += length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (directory / "model.safetensors").open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for entry in header.values():
            first, last = entry["data_offsets"]
            repeats = -(-(last - first) // len(block))
            out.write((block * repeats)[:last - first])
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
              "tie_word_embeddings": True, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, **SHAPE}
    (directory / "config.json").write_text(json.dumps(config))


def make_data(source, path, prompt, response, rows):
    """Preference pairs with about so many words to a prompt and a response, from the words of the example data."""
    words = " ".join(row["text"] for row in source).split()
    draw = random.Random(prompt)

    def text(length):
        length = max(2, int(length * draw.uniform(0.5, 1.5)))
        start = draw.randrange(len(words) - length)
        return " ".join(words[start:start + length])

    lines = [{"prompt": text(prompt) + ":", "chosen": " " + text(response), "rejected": " " + text(response)} for _ in range(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def example_texts(path):
    """The answers of the example data."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{"text": json.dumps(row["chosen"]) if "chosen" in row else ""} for row in rows]


def run(uft, config, overrides, output):
    """What the plan says and what was measured, in MiB, and which layers were computed again."""
    command = [uft, "train", config, "--set", f"train.output={output}", "--set", f"train.reference_cache={output}/reference"]
    for override in overrides:
        command += ["--set", override]
    with tempfile.TemporaryFile() as stderr:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
        _, status, usage = os.wait4(child.pid, 0)
        stderr.seek(0)
        log = stderr.read().decode()
    if status:
        sys.exit(f"{' '.join(map(str, command))}\n{log}")
    parts = {name.strip(): float(mib) for name, mib in re.findall(r"│ ([a-z][a-z -]*?) +┆ +([0-9.]+) ┆", log)}
    again = re.search(r"(\d+ of \d+|no) layers? computed again", log)
    return parts, usage.ru_maxrss / 1024, again.group(1)


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--uft", required=True)
    options.add_argument("--only", nargs="*", help="configurations whose name contains one of these")
    options.add_argument("--keep", type=Path, help="where to make the models; a temporary directory by default")
    options.add_argument("--steps", type=int, default=2)
    a = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = a.keep or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        texts = example_texts(Path("examples/data/pairs.jsonl"))
        for dtype in ["F32", "BF16"]:
            if not (work / dtype).exists():
                make_model(Path("examples/base"), work / dtype, dtype)
        for name, prompt, response, batch in [("short", 15, 20, 24), ("long", 150, 75, 4)]:
            make_data(texts, work / f"{name}.jsonl", prompt, response, 60)
            (work / f"{name}.toml").write_text(
                f'[model]\npath = "{work}/F32"\n[lora]\nrank = 16\nalpha = 32\n[text]\nend_of_turn = "ignore"\n[[data]]\nname = "pairs"\n'
                f'files = ["{work}/{name}.jsonl"]\neval_fraction = 0.05\nadapter = "preferences"\n'
                f'objective = {{ plugin = "una-pairwise", beta = 0.1 }}\n[train]\nsteps = {a.steps}\nbatch = {batch}\nthreads = 2\nmax_length = 4096\n')
        # The same with thumbs on the chosen and the rejected response in turn, for mismatched completions.
        rows = [json.loads(line) for line in (work / "long.jsonl").read_text().splitlines()]
        thumbs = [{"prompt": r["prompt"], "completion": r["rejected" if i % 2 else "chosen"], "label": i % 2 == 0} for i, r in enumerate(rows)]
        (work / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in thumbs))
        labels = (work / "long.toml").read_text().replace("long.jsonl", "labels.jsonl").replace('"preferences"', '"labels"').replace("una-pairwise", "kto")
        (work / "labels.toml").write_text(labels.replace("batch = 4", "batch = 8"))
        short, long = work / "short.toml", work / "long.toml"
        cases = [("quickstart", "examples/quickstart.toml", ["train.steps=20"])]
        for name, config in [("short", short), ("long", long)]:
            for micro_tokens in [512, 2048]:
                for recompute in ["none", "all"]:
                    overrides = [f"train.micro_tokens={micro_tokens}", f"train.recompute={recompute}"]
                    cases.append((f"{name}, micro_tokens {micro_tokens}, recompute {recompute}", config, overrides))
        for gain in ["packing", "shared-prompts", "fused-log-probs", "skipped-gradients", "reference-cache"]:
            cases.append((f"long, without {gain}", long, [f'train.without=["{gain}"]']))
        for micro_tokens in [1024, 4096]:
            cases.append((f"labels, micro_tokens {micro_tokens}", work / "labels.toml", [f"train.micro_tokens={micro_tokens}"]))
        cases.append(("long, bf16 weights", long, [f'model.path={work}/BF16']))
        cases.append(("long, saving every step", long, ["train.save_every=1"]))
        cases.append(("long, the reference is the adapter before", long, ["train.reference=previous"]))
        print("| run | planned MiB | activations | measured MiB | planned / measured | layers computed again |\n| --- | ---: | ---: | ---: | ---: | --- |")
        worst = 0.0
        for name, config, overrides in cases:
            if a.only and not any(part in name for part in a.only):
                continue
            with tempfile.TemporaryDirectory() as output:
                parts, measured, again = run(a.uft, config, overrides, Path(output) / "run")
            off = parts["total"] / measured
            worst = max(worst, abs(off - 1))
            print(f"| {name} | {parts['total']:.1f} | {parts['activations']:.1f} | {measured:.1f} | {off:.3f} | {again} |", flush=True)
        if worst > ALLOWED:
            sys.exit(f"a plan is off by {worst:.1%}")


if __name__ == "__main__":
    main()
