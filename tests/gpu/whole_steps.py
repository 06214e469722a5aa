"""Whole training steps, uft beside transformers and PEFT, on the same weights and the same tokens.

texts  a step of 16,384 tokens: four texts of 4096, every token trained; the objective is `sft`
pairs  a step of two pairs, each a prompt of 2048 tokens with two responses of 2048; DPO, whose reference log-probs are computed
       in the step, as nothing is met twice. uft computes a prompt once, PEFT once for each response.

The texts once more with all layers computed again, their inputs kept and then offloaded to the machine's memory: what the second
takes longer is the part of the copies that shows. Steps that keep more or less must have the same losses and norms, bit by bit.

A rate counts the tokens of all sequences, prompts once for each response, the same for both. Steps are timed by each side's own
clock, the first two are left out, and the median counts. Memory is the most that nvidia-smi saw in use."""
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import model

HERE = Path(__file__).resolve().parent
GROUPS = {"texts": 4, "pairs": 2}
SOURCES = {
    "texts": 'files = ["{data}/texts.jsonl"]\nadapter = "demonstrations"\nobjective = "sft"',
    "pairs": 'files = ["{data}/pairs.jsonl"]\nadapter = "preferences"\nobjective = {{ plugin = "una-pairwise", beta = 0.1 }}',
}
RUN = """[model]
path = "{model}"
[lora]
rank = 16
alpha = 32
targets = "all-linear"
[[data]]
name = "{task}"
{source}
[train]
output = "{out}"
reference_cache = "{out}/reference"
device = "{device}"
recompute = "{recompute}"
steps = {steps}
batch = {groups}
micro_tokens = {micro_tokens}
max_length = {max_length}
lr = 1e-4
schedule = "constant"
warmup = 0
shuffle = false
"""
# The two sides' rates are those of steps after these.
WARM_UP = 2
# What is done with layers where it is not the plan that chooses, and steps of each.
RECOMPUTED, FEW_STEPS = ["all", "offload"], 5
# Seconds that a run of uft may take: a kernel may never end.
MOST = 75.0


def installed(*modules):
    """Whether Python has them all; nothing is imported, which takes seconds."""
    return all(importlib.util.find_spec(module) for module in modules)


def tokens(task, shape):
    lengths = model.LENGTHS[shape]
    return GROUPS[task] * (lengths["text"] if task == "texts" else 2 * (lengths["prompt"] + lengths["response"]))


def name(task, recompute):
    return f"out-{task}-{recompute}"


def configuration(task, shape, device, steps, folder, recompute="auto"):
    lengths = model.LENGTHS[shape]
    source = SOURCES[task].format(data=folder)
    return RUN.format(model=folder / "model", task=task, source=source, out=folder / name(task, recompute), device=device, steps=steps,
                      recompute=recompute, groups=GROUPS[task], micro_tokens=4 * lengths["text"], max_length=lengths["text"])


class Memory:
    """The most memory of the first GPU that is in use while this is entered, in GiB; None without nvidia-smi."""

    def __init__(self):
        self.most, self.over = None, threading.Event()

    def watch(self):
        command = ["nvidia-smi", "-i", "0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self.over.wait(0.5):
            said = subprocess.run(command, capture_output=True, text=True).stdout.strip()
            if said.isdigit():
                self.most = max(self.most or 0.0, int(said) / 1024)

    def __enter__(self):
        if shutil.which("nvidia-smi"):
            threading.Thread(target=self.watch, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.over.set()


def record(task, who, how, seconds, loss, shape, memory, **more):
    """The record of a side's steps, as report.py takes it. `seconds` of each step, None where they say nothing."""
    timed = seconds[WARM_UP:] if seconds else []
    step = statistics.median(timed) if timed else None
    return {"task": f"{task}, {tokens(task, shape):,} tokens a step", "who": who, "how": how, "steps": len(seconds),
            "seconds_per_step": step, "tokens_per_second": tokens(task, shape) / step if step else None, "loss": loss,
            "memory_gib": memory, **more}


def uft(context, task, shape, steps, folder, recompute="auto"):
    """The record of a run of uft, and what its steps came to."""
    run = folder / f"{task}.toml"
    run.write_text(configuration(task, shape, context.options.device, steps, folder, recompute))
    with Memory() as memory:
        out, err, status = context.run([context.binary("uft"), "train", str(run)], MOST)
    metrics = folder / name(task, recompute) / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")] if metrics.exists() else []
    more = {}
    if status != 0:
        last = (err.strip().splitlines() or [f"exit status {status}"])[-1]
        more["error"] = "its time was over" if status == -9 and context.left() <= 0 else f"it did not end in {MOST:.0f} s" if status == -9 else last
    seconds = [line["tokens"] / line["tokens_per_second"] for line in lines]
    if context.emulated:
        more["note"] = "emulated"
    loss = lines[0]["loss"] if lines else None
    how = "one micro-batch" if recompute == "auto" else f'recompute = "{recompute}"'
    found = record(task, "uft", how, seconds, loss, shape, memory.most, recompute=recompute, **more)
    if context.emulated:
        found["seconds_per_step"] = found["tokens_per_second"] = None
    return found, [(line["loss"], line["grad_norm"]) for line in lines]


def computed_again(context, kept, shape, steps, folder):
    """The texts with every layer computed again, and what copies beside launches have to move; `kept`: what the steps came to with
    what the plan keeps."""
    # A text's last token is not fed.
    rows, of_model = tokens("texts", shape) - GROUPS["texts"], model.SHAPES[shape]
    copied = 2 * rows * of_model["hidden_size"] * of_model["num_hidden_layers"]
    for recompute in RECOMPUTED:
        found, came_to = uft(context, "texts", shape, min(steps, FEW_STEPS), folder, recompute)
        if recompute == "offload":
            found["copied_each_way"] = copied
        both = min(len(kept), len(came_to))
        if kept[:both] != came_to[:both] and "error" not in found:
            step = next(i for i in range(both) if kept[i] != came_to[i])
            found["error"] = f"step {step + 1} has loss and norm {came_to[step]}, with what the plan keeps {kept[step]}"
        yield found


def measure(context, missing):
    """Yields a record for each side and task, as soon as it is there."""
    shape, steps = ("small", 3) if context.emulated else ("mistral-7b", 7)
    context.binary("uft")
    with tempfile.TemporaryDirectory(prefix="uft-steps-") as temporary:
        folder = Path(context.options.work or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        room, needed = shutil.disk_usage(folder).free, 16e9 if shape == "mistral-7b" else 1e7
        there = (folder / "model" / "config.json").exists()
        if room < needed and not there:
            raise missing(f"{folder} has {room / 1e9:.1f} GB left, the model takes {needed / 1e9:.0f}; --work names another folder")
        model.write(folder / "model", shape)
        model.write_data(folder, shape, {task: steps * groups for task, groups in GROUPS.items()})
        failed, came_to = False, {}
        for task in GROUPS:
            found, came_to[task] = uft(context, task, shape, steps, folder)
            failed |= "error" in found
            yield found
        # What does not end once would take the peers' time twice more.
        if failed:
            yield {"missing": "recompute", "why": "steps failed, so none were made with all layers computed again or inputs offloaded"}
        else:
            yield from computed_again(context, came_to["texts"], shape, steps, folder)
        yield from peers(context, shape, steps, folder)


def peers(context, shape, steps, folder):
    device = "cpu" if context.emulated else "cuda"
    if not installed("torch"):
        yield {"missing": "peer", "why": "PyTorch is not installed, so whole steps have no peer"}
        return
    how = "peft" if installed("transformers", "peft") else "torch"
    if how == "torch":
        yield {"missing": "peft", "why": "transformers or PEFT is not installed: the peer is a hand-written PyTorch step with the same maths"}
    command = [sys.executable, str(HERE / "step_peer.py"), str(folder), "--steps", str(steps), "--how", how, "--device", device]
    with Memory() as memory:
        for line in context.lines(command):
            if "task" in line:
                seconds = line.pop("seconds") or []
                found = record(line.pop("task"), line.pop("who"), line.pop("how"), seconds, line.pop("loss"), shape, memory.most, **line)
                memory.most = None
                if device == "cpu":
                    found["seconds_per_step"] = found["tokens_per_second"] = None
                yield found
            else:
                yield line
