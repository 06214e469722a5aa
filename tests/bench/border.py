#!/usr/bin/env python3
"""What the border between host and plugins costs: one step of about 64k tokens with all kinds of feedback mixed.

    python border.py --base DIR --uft BIN [--model bench-20m] [--steps 3] [--threads 2]

`--base` is as for cpu.py. Demonstrations, scores, thumbs, pairs and groups of four scored responses, each with an objective of
its own, are one step. `uft train` tells the time for the objectives at RUST_LOG=debug: batches built for them, the calls through
the ABI, checks of what comes back. Prints it for every step beside the step's time, and what share it is of this step and of
one of the same tokens at 20,000 tokens a second."""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# Name: rows in a step, adapter, objective.
SOURCES = {
    "demonstrations": (34, "demonstrations", "uft-sft"),
    "scores": (34, "scores", "una-score"),
    "thumbs": (34, "labels", "kto"),
    "pairs": (22, "preferences", "una-pairwise"),
    "groups": (11, "scores", "nca"),
}
FILES = {"demonstrations": "bench_pc", "scores": "bench_score", "thumbs": "bench_kto", "pairs": "bench_pref"}
GPU = 20_000


def rows_of(a, name, count):
    read = lambda file: [json.loads(line) for line in (a.base / f"data/{file}.jsonl").read_text().splitlines()]
    if name != "groups":
        return read(FILES[name])[:count]
    # Rows that the scores don't take, four responses to the first one's prompt.
    fours = zip(*[iter(read("bench_score")[-4 * count:])] * 4)
    of = lambda four, key: [row[key] for row in four]
    return [{"prompt": four[0]["prompt"], "completions": of(four, "response"), "scores": of(four, "score")} for four in fours]


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--base", type=Path, required=True)
    options.add_argument("--uft", required=True)
    options.add_argument("--model", default="bench-20m")
    options.add_argument("--steps", type=int, default=3)
    options.add_argument("--threads", type=int, default=2)
    a = options.parse_args()
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        text = f'[model]\npath = "{a.base.resolve()}/models/{a.model}"\n'
        for name, (count, adapter, objective) in SOURCES.items():
            data = work / f"{name}.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in rows_of(a, name, count)))
            text += f'[[data]]\nname = "{name}"\nfiles = ["{data}"]\nadapter = "{adapter}"\nobjective = "{objective}"\n'
        batch = sum(count for count, _, _ in SOURCES.values())
        text += (f'[train]\noutput = "{work}/out"\nreference_cache = "{work}/out/reference"\nsteps = {a.steps}\nbatch = {batch}\n'
                 f'lr = 1e-4\nmax_length = 1024\nthreads = {a.threads}\n')
        (work / "run.toml").write_text(text)
        ran = subprocess.run([a.uft, "train", str(work / "run.toml")], capture_output=True, text=True,
                             env={**os.environ, "RUST_LOG": "uft=debug"})
        if ran.returncode:
            sys.exit(ran.stderr)
        lines = [json.loads(line) for line in (work / "out/metrics.jsonl").read_text().splitlines()]
    times = [(float(ours), float(step)) for ours, step in re.findall(r"([\d.]+) of (\d+) ms in the objectives", ran.stderr)]
    assert len(times) == len(lines) == a.steps, ran.stderr
    print("| step | tokens | of them trained | objectives ms | step ms | share | share at 20,000 tokens/s |\n"
          "| --- | --- | --- | --- | --- | --- | --- |")
    for line, (ours, step) in zip(lines, times):
        missing = [name for name in SOURCES if f"{name}/loss" not in line]
        assert not missing, f"no {missing} in step {line['step']}"
        gpu = line["tokens"] / GPU * 1000
        print(f"| {line['step']} | {line['tokens']:,} | {line['trained_tokens']:,} | {ours:.2f} | {step:,.0f} "
              f"| {100 * ours / step:.3f} % | {100 * ours / gpu:.2f} % |")


if __name__ == "__main__":
    main()
