#!/usr/bin/env python3
"""The ruler's hand-written PyTorch loop on the tasks and models that the ruler doesn't run itself.

    python loop_peer.py RULER MODEL TASK ROWS

`ROWS` is a JSON file with the rows of every source of the task. Prints a line like the ruler's. The net is the ruler's (no padding,
attention per sequence, head on response tokens only); a step is 8 responses, the reference is computed in every step, since
an epoch is all there is. A step's loss is the sum of its sources', each a mean over its own, as uft adds them up."""
import json
import os
import resource
import sys
import time
from pathlib import Path

ruler, model, task, file = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
sys.path.insert(0, str(ruler))
os.environ.setdefault("BASELINE_DIR", str(model.parent.parent))
import torch
import torch.nn.functional as F
from common import encode_pair
from loop import Mini
from transformers import AutoTokenizer

from cpu import TASKS

BETA = 0.1
torch.set_num_threads(int(os.environ.get("BENCH_THREADS", 2)))
net, tok = Mini(model, torch.float32, r=16, alpha=32), AutoTokenizer.from_pretrained(model)
optimizer = torch.optim.AdamW(net.params(), lr=1e-4, weight_decay=0.0, fused=True)
sources = list(zip(TASKS[task][0], json.loads(file.read_text())))


def reward_loss(adapter, reward, rows):
    """Of one source: implicit rewards of its responses, all first ones, then all second ones."""
    if adapter == "preferences":
        return -F.logsigmoid(reward[: len(rows)] - reward[len(rows):]).mean()
    if adapter == "demonstrations":
        target = torch.ones(len(rows))
    else:
        target = torch.tensor([float(row["label"] if adapter == "labels" else row["score"]) for row in rows])
    return ((torch.sigmoid(reward) - target) ** 2).mean()


steps = []
for step in range(len(sources[0][1]) // sources[0][0][2]):
    prompts, responses, parts = [], [], []
    for (_, columns, each, adapter, _), rows in sources:
        rows = rows[step * each: (step + 1) * each]
        pairs = [encode_pair(tok, row["prompt"], row[c])[:2] for c in columns for row in rows]
        parts.append((adapter, rows, len(pairs)))
        prompts += [p for p, _ in pairs]
        responses += [r for _, r in pairs]
    started = time.perf_counter()
    if task == "sft":
        loss = -net.logps(prompts, responses)[0].mean()
    else:
        with torch.no_grad():
            reference = net.sums(prompts, responses, on=False)
            mismatched = torch.zeros(())
            if task == "labels":
                before = responses[-1:] + responses[:-1]
                mismatched = (net.sums(prompts, before) - net.sums(prompts, before, on=False)).mean().clamp(min=0)
        ratios = net.sums(prompts, responses) - reference
        loss, at = torch.zeros(()), 0
        for adapter, rows, count in parts:
            own = ratios[at: at + count]
            at += count
            if task == "labels":
                sign = torch.tensor([1.0 if row["label"] else -1.0 for row in rows])
                loss = loss + (1 - torch.sigmoid(BETA * sign * (own - mismatched))).mean()
            else:
                loss = loss + reward_loss(adapter, BETA * own, rows)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.params(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    steps.append((time.perf_counter() - started, sum(map(len, prompts)) + sum(map(len, responses)), loss.item()))

seconds, tokens = sum(s for s, *_ in steps[1:]), sum(t for _, t, _ in steps[1:])
print("RESULT " + json.dumps(dict(tokens_per_s_all_steps=tokens / seconds, s_per_step=seconds / (len(steps) - 1), losses=[steps[0][2]],
                                  peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)))
