#!/usr/bin/env python3
"""The CPU backend against TRL and a hand-written PyTorch loop: same files, same rows, same threads, in turn.

    python cpu.py --ruler DIR --base DIR --uft BIN [--models bench-20m ...] [--tasks sft pairs ...] [--reps 2]

`--ruler` holds peers.py, which runs the peers; `--base` the models/ and data/ that its makers wrote. For every model
and task, the peers and uft run one after the other, `--reps` times; the best run of each counts, because other work on
a machine only ever slows a run down. A rate is tokens per second as the ruler counts them: prompt and response of
every sequence, however often the prompt is computed, and no tokens of the reference. The first optimizer step of a run
is left out. uft runs two epochs, its reference pass included; the peers run one, since their epochs cost the same.
Prints a Markdown table, with the peak memory of each process, the seconds from uft's start to its first step, and uft's
share of the machine's rate of f32 matrix products, counting only operations that a step needs (flops.py)."""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from flops import Model, needed
from process import finish

LORA = 'rank = 16\nalpha = 32\ntargets = "all-linear"'
BETA = "beta = 0.1"
# task: its sources (data file, column names of the responses, rows per step, adapter, objective), TRL's configuration and
# the loop's. Mixed feedback has no peer but the loop of this folder, which also runs models that the ruler doesn't know.
TASKS = {
    "sft": ([("bench_pc", ["completion"], 8, "demonstrations", '"sft"')], "sft-trl-bs1x8", "sft-mini"),
    "pairs": ([("bench_pref", ["chosen", "rejected"], 4, "preferences", f'{{ plugin = "una-pairwise", {BETA} }}')], "dpo-trl-bs1x4", "dpo-mini"),
    "labels": ([("bench_kto", ["completion"], 8, "labels", f'{{ plugin = "kto", {BETA} }}')], "kto-trl-bs8", "kto-mini"),
    "scores": ([("bench_score", ["response"], 8, "scores", f'{{ plugin = "una-score", {BETA} }}')], None, "una-mini"),
    "mixed": ([("bench_pc", ["completion"], 2, "demonstrations", f'{{ plugin = "uft-sft", {BETA} }}'),
               ("bench_pref", ["chosen", "rejected"], 1, "preferences", f'{{ plugin = "una-pairwise", {BETA} }}'),
               ("bench_kto", ["completion"], 2, "labels", f'{{ plugin = "una-binary", {BETA} }}'),
               ("bench_score", ["response"], 2, "scores", f'{{ plugin = "una-score", {BETA} }}')], None, None),
}
# Of responses, in an epoch.
SEQUENCES = {"bench-20m": 64, "bench-110m": 32}
OTHER_MODEL = 16


def rows_of(a, model, task):
    """Of every source its rows in an epoch: none twice in a task."""
    from common import read_jsonl
    steps, used, out = a.sequences.get(model, OTHER_MODEL) // 8, 0, []
    for file, _, each, *_ in TASKS[task][0]:
        out.append(read_jsonl(a.base / "data" / f"{file}.jsonl")[used: used + each * steps])
        used += each * steps
    return out


def groups_of(a, model, task):
    """Prompt and response tokens of each row as the ruler counts them, step by step: (prompt, [responses])."""
    os.environ["BASELINE_DIR"] = str(a.base)
    sys.path.insert(0, str(a.ruler))
    from common import encode_pair
    from transformers import AutoTokenizer
    tok = AutoTokenizer.from_pretrained(a.base / "models" / model)
    groups = []
    for (_, columns, each, *_), rows in zip(TASKS[task][0], rows_of(a, model, task)):
        for index, row in enumerate(rows):
            pairs = [encode_pair(tok, row["prompt"], row[c]) for c in columns]
            groups.append((index // each, (len(pairs[0][0]), [len(r) for _, r, _ in pairs])))
    return [group for _, group in sorted(groups, key=lambda g: g[0])]


def run_uft(a, model, task, groups, work, extra=""):
    """Rate, operations a second, seconds a step, seconds from start to the first step, and peak memory of `uft train`."""
    sources, batch = "", sum(each for _, _, each, *_ in TASKS[task][0])
    for (file, _, _, adapter, objective), rows in zip(TASKS[task][0], rows_of(a, model, task)):
        data = work / f"{model}-{task}-{file}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources += f'[[data]]\nname = "{file}"\nfiles = ["{data}"]\nadapter = "{adapter}"\nobjective = {objective}\n'
    out = Path(tempfile.mkdtemp(dir=work))
    run = work / "run.toml"
    run.write_text(f'[model]\npath = "{a.base}/models/{model}"\n[lora]\n{LORA}\n{sources}'
                   f'[train]\noutput = "{out}"\nreference_cache = "{out}/reference"\n'
                   f'epochs = 2\nbatch = {batch}\nlr = 1e-4\nschedule = "constant"\nwarmup = 0.0\nshuffle = false\nmax_length = 1024\n'
                   f'threads = {a.threads}\nmicro_tokens = {a.micro_tokens}\n{extra}\n')
    log, metrics = work / "stderr", out / "metrics.jsonl"
    started, first = time.monotonic(), []

    def look():
        if not first and metrics.exists() and metrics.stat().st_size:
            first.append(time.monotonic() - started)

    with log.open("wb") as stderr:
        child = subprocess.Popen([a.uft, "train", str(run)], stdout=subprocess.DEVNULL, stderr=stderr, env={**os.environ, "RUST_LOG": "error"})
        peak = finish(child, look)
    if child.returncode:
        sys.exit(f"uft: {log.read_text()}")
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    seconds = [s["tokens"] / s["tokens_per_second"] for s in steps]
    lengths = [len(responses) * prompt + sum(responses) for prompt, responses in groups]
    tokens = 2 * sum(lengths) - sum(lengths[:batch])
    operations = sum(needed(Model(a.base / "models" / model), task, groups, 2)[batch:])
    return dict(rate=tokens / sum(seconds[1:]), flops=operations / sum(seconds[1:]), step=sum(seconds[1:]) / (len(seconds) - 1),
                start=first[0] - seconds[0], peak=peak, loss=steps[0]["loss"])


def ceiling(a):
    """The machine's rate of large f32 matrix products in operations a second: the better of uft's and torch's."""
    best = 0.0
    if a.bench:
        ran = subprocess.run([a.bench, "ceiling", "5"], capture_output=True, text=True, check=True, env={**os.environ, "RAYON_NUM_THREADS": str(a.threads)})
        best = float(ran.stdout.split()[-2]) * 1e9
    code = ("import sys, time, torch; torch.set_num_threads(int(sys.argv[1])); x, w = torch.randn(3000, 768), torch.randn(2304, 768)\n"
            "best = 1e9\nfor _ in range(20):\n  t = time.perf_counter(); x @ w.T; best = min(best, time.perf_counter() - t)\n"
            "print(2 * 3000 * 768 * 2304 / best)")
    ran = subprocess.run([sys.executable, "-c", code, str(a.threads)], capture_output=True, text=True, check=True)
    return max(best, float(ran.stdout))


def run_peer(a, model, task, config):
    """The same of one of the ruler's configurations, or of this folder's loop."""
    env = {**os.environ, "BASELINE_DIR": str(a.base), "BENCH_THREADS": str(a.threads), "OMP_NUM_THREADS": str(a.threads),
           "MKL_NUM_THREADS": str(a.threads), "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}
    if a.jemalloc:
        env |= {"THP_MEM_ALLOC_ENABLE": "1", "LD_PRELOAD": a.jemalloc, "MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1,thp:always"}
    command = [a.ruler / "peers.py", "run", "--model", model, "--config", config]
    if config is None or model not in a.sequences:
        rows = Path(tempfile.mkdtemp()) / "rows.json"
        rows.write_text(json.dumps(rows_of(a, model, task)))
        command = [Path(__file__).with_name("loop_peer.py"), a.ruler, a.base / "models" / model, task, rows]
    ran = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env)
    line = next((x for x in ran.stdout.splitlines() if x.startswith("RESULT ")), None)
    if line is None:
        sys.exit(f"{config}: {ran.stderr[-2000:]}")
    result = json.loads(line[7:])
    return dict(rate=result["tokens_per_s_all_steps"], step=result["s_per_step"], peak=result["peak_rss_mb"], loss=result["losses"][0])


def compare(a, work):
    """uft, TRL and the loop in turn; the best run of each."""
    print("| model | task | uft tok/s | TRL | loop | uft / TRL | uft / loop | of the product rate | start s | peak MB uft, TRL, loop | first loss uft, loop |\n"
          "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for model in a.models:
        for task in a.tasks:
            _, trl, loop = TASKS[task]
            groups = groups_of(a, model, task)
            best, top = {}, 0.0
            for _ in range(a.reps):
                runs = [("loop", lambda: run_peer(a, model, task, loop)), ("uft", lambda: run_uft(a, model, task, groups, work))]
                if trl and model in a.sequences and not a.no_trl:
                    runs.append(("trl", lambda: run_peer(a, model, task, trl)))
                for name, run in runs:
                    top = max(top, ceiling(a))
                    result = run()
                    print(f"{model} {task} {name} {result}", file=sys.stderr, flush=True)
                    if name not in best or result["rate"] > best[name]["rate"]:
                        best[name] = result
            uft, other, peer = best["uft"], best.get("trl"), best["loop"]
            ratio = f"{uft['rate'] / other['rate']:.2f}" if other else "–"
            shown = f"{other['rate']:.0f}" if other else "–"
            share = f"{100 * uft['flops'] / top:.0f} % of {top / 1e9:.0f} GFLOP/s"
            memory = f"{uft['peak']:.0f}, {other['peak'] if other else '–'}, {peer['peak']:.0f}"
            print(f"| {model} | {task} | {uft['rate']:.0f} | {shown} | {peer['rate']:.0f} | {ratio} | {uft['rate'] / peer['rate']:.2f} | {share} | "
                  f"{uft['start']:.2f} | {memory} | {uft['loss']:.4f}, {peer['loss']:.4f} |", flush=True)


# What is switched off, by a line for [train].
GAINS = {"packing": 'without = ["packing"]', "shared prompts": 'without = ["shared-prompts"]', "cached reference": 'without = ["reference-cache"]',
         "fused log-probs": 'without = ["fused-log-probs"]', "skipped gradients": 'without = ["skipped-gradients"]', "kept activations": 'recompute = "all"',
         "all of them": 'without = ["packing", "shared-prompts", "reference-cache", "fused-log-probs", "skipped-gradients"]\nrecompute = "all"'}


def gains(a, work):
    """uft with one gain after the other switched off, in turn with all of them on."""
    print("| model | task | without | tok/s | with / without | peak MB with, without |\n| --- | --- | --- | --- | --- | --- |", flush=True)
    for model in a.models:
        for task in a.tasks:
            groups = groups_of(a, model, task)
            for gain, line in GAINS.items():
                runs = [(run_uft(a, model, task, groups, work), run_uft(a, model, task, groups, work, line)) for _ in range(a.reps)]
                on, off = (max((pair[i] for pair in runs), key=lambda r: r["rate"]) for i in (0, 1))
                print(f"| {model} | {task} | {gain} | {off['rate']:.0f} | {on['rate'] / off['rate']:.2f} | {on['peak']:.0f}, {off['peak']:.0f} |", flush=True)


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--ruler", type=Path, required=True)
    options.add_argument("--base", type=Path, required=True)
    options.add_argument("--uft", required=True)
    options.add_argument("--bench", help="target/release/examples/bench, for the rate of matrix products")
    options.add_argument("--models", nargs="*", default=list(SEQUENCES))
    options.add_argument("--tasks", nargs="*", default=list(TASKS))
    options.add_argument("--reps", type=int, default=2)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--micro-tokens", type=int, default=4096)
    options.add_argument("--no-trl", action="store_true", help="leave TRL out, which takes minutes")
    options.add_argument("--gains", action="store_true", help="instead of the peers, uft with each gain switched off")
    options.add_argument("--jemalloc", help="library to preload for the peers: their best environment")
    a = options.parse_args()
    a.ruler, a.base, a.sequences = a.ruler.resolve(), a.base.resolve(), SEQUENCES
    with tempfile.TemporaryDirectory() as work:
        (gains if a.gains else compare)(a, Path(work))


if __name__ == "__main__":
    main()
