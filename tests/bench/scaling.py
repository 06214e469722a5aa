#!/usr/bin/env python3
"""How the CPU backend's cost grows: with tokens, rows of data, the vocabulary, and the format of the weights.

    python scaling.py --base DIR --uft BIN [--model bench-20m] [--threads 2]

`--base` is as for cpu.py. Every case runs `--reps` times in turn with the others of its table, and the best run counts.
Needs numpy and safetensors besides what the standard library has."""
import argparse
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from process import finish
from safetensors.numpy import load_file, save_file

VOCABULARY = 151_936


def train(a, model, data, work, batch, steps, extra=""):
    """Seconds per thousand rows of tokens without the first step, and peak memory in MB."""
    out = Path(tempfile.mkdtemp(dir=work))
    run = work / "run.toml"
    run.write_text(f'[model]\npath = "{model}"\n[[data]]\nname = "d"\nfiles = ["{data}"]\nadapter = "demonstrations"\nobjective = "sft"\n[train]\n'
                   f'output = "{out}"\nsteps = {steps}\nbatch = {batch}\nmax_length = 8192\nthreads = {a.threads}\nshuffle = false\n{extra}\n')
    child = subprocess.Popen([a.uft, "train", str(run)], stdout=subprocess.DEVNULL, env={**os.environ, "RUST_LOG": "error"})
    peak = finish(child)
    if child.returncode:
        raise SystemExit(f"uft: exit code {child.returncode}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]
    tokens, seconds = sum(x["tokens"] for x in lines), sum(x["tokens"] / x["tokens_per_second"] for x in lines)
    shutil.rmtree(out)
    return dict(seconds=1000 * seconds / tokens, peak=peak, wall=seconds)


def table(a, title, cases):
    """Runs the cases in turn and prints what each takes, against the first."""
    best = {}
    for _ in range(a.reps):
        for name, run in cases:
            result = run()
            if name not in best or result["seconds"] < best[name]["seconds"]:
                best[name] = result
    first = next(iter(best.values()))
    print(f"\n| {title} | s / 1000 tokens | relative | peak MB | more than the first |\n| --- | --- | --- | --- | --- |")
    for name, result in best.items():
        print(f"| {name} | {result['seconds']:.3f} | {result['seconds'] / first['seconds']:.2f} | {result['peak']:.0f} | {result['peak'] - first['peak']:+.0f} |", flush=True)


def repeated(work, source, rows, name):
    lines = source.read_text().splitlines()[:64]
    path = work / name
    path.write_text("\n".join(lines[i % len(lines)] for i in range(rows)) + "\n")
    return path


def long_rows(work, source, turns):
    """Each row with the text of its response so many times over."""
    path = work / f"long-{turns}.jsonl"
    out = []
    for line in source.read_text().splitlines()[:32]:
        row = json.loads(line)
        for message in row["completion"] if isinstance(row["completion"], list) else [row]:
            key = "content" if "content" in message else "completion"
            message[key] = " ".join([message[key]] * turns)
        out.append(json.dumps(row))
    path.write_text("\n".join(out) + "\n")
    return path


def with_vocabulary(work, model, vocabulary):
    """The model with rows of its embedding and head added."""
    to = work / f"vocabulary-{vocabulary}"
    shutil.copytree(model, to)
    config = json.loads((to / "config.json").read_text())
    weights = load_file(to / "model.safetensors")
    rng = np.random.default_rng(0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            more = rng.standard_normal((vocabulary - weights[name].shape[0], weights[name].shape[1]), dtype=np.float32) * 0.02
            weights[name] = np.concatenate([weights[name], more])
    config["vocab_size"] = vocabulary
    (to / "config.json").write_text(json.dumps(config))
    save_file(weights, to / "model.safetensors", {"format": "pt"})
    return to


def in_bf16(work, model, aligned):
    """The model in bf16; not aligned, its tensors begin at odd places of the file, where they cannot be mapped: uft widens
    them when it loads the model."""
    to = work / f"bf16-{aligned}"
    shutil.copytree(model, to)
    weights = load_file(to / "model.safetensors")
    header, blob, at = {"__metadata__": {"format": "pt"}}, [], 0
    for name, w in weights.items():
        bits = w.view(np.uint32)
        half = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        header[name] = {"dtype": "BF16", "shape": list(w.shape), "data_offsets": [at, at + half.nbytes]}
        blob.append(half.tobytes())
        at += half.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + (0 if aligned else 1))
    (to / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blob))
    return to


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--base", type=Path, required=True)
    options.add_argument("--uft", required=True)
    options.add_argument("--model", default="bench-20m")
    options.add_argument("--reps", type=int, default=2)
    options.add_argument("--threads", type=int, default=2)
    a = options.parse_args()
    model, source = a.base.resolve() / "models" / a.model, a.base.resolve() / "data/bench_pc.jsonl"
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        rows = repeated(work, source, 64, "rows")
        table(a, "groups in a step", [(f"{batch}", lambda batch=batch: train(a, model, rows, work, batch, max(3, 64 // batch))) for batch in (8, 16, 32, 64)])
        table(a, "length of responses", [(f"{turns} x", lambda turns=turns: train(a, model, long_rows(work, source, turns), work, 8, 3)) for turns in (1, 2, 4)])
        table(a, "rows of data", [(f"{n}", lambda n=n: train(a, model, repeated(work, source, n, f"rows-{n}"), work, 8, 8)) for n in (64, 6_400, 64_000)])
        large = with_vocabulary(work, model, VOCABULARY)
        added = ((large / "model.safetensors").stat().st_size - (model / "model.safetensors").stat().st_size) / 2**20
        table(a, f"vocabulary ({added:.0f} MB more of weights)", [(m.name, lambda m=m: train(a, m, rows, work, 8, 8)) for m in (model, large)])
        kinds = [("f32, mapped", model), ("bf16, widened in panels", in_bf16(work, model, True)), ("bf16, widened when loaded", in_bf16(work, model, False))]
        table(a, "weights", [(name, lambda m=m: train(a, m, rows, work, 8, 8)) for name, m in kinds])


if __name__ == "__main__":
    main()
