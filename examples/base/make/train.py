#!/usr/bin/env python3
"""Trains the base model on the CPU: train.py WORK [--steps N] [--threads N]

Reads what corpus.py wrote; writes WORK/state.pt now and then (it goes on from there when
started again) and WORK/log.jsonl, one line an evaluation. Muon on the layers' matrices,
AdamW on the embedding and the norms. The learning rate rises over the first 100 steps,
stays, and falls to zero over the last 40 %.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SEED = 20260103
BATCH = 16
LR_MUON, LR_ADAM = 0.015, 0.004
SHAPE = dict(
    vocab_size=3072,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    tie_word_embeddings=True,
    attention_bias=False,
    mlp_bias=False,
    bos_token_id=None,
    eos_token_id=2,
    pad_token_id=0,
)


def rate(step, steps):
    return min(1.0, (step + 1) / 100, (steps - step) / (0.4 * steps))


def loss_of(model, rows):
    tokens = torch.from_numpy(rows.astype(np.int64))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def evaluate(model, work):
    losses = {}
    for path in sorted(work.glob("heldout_*.npy")):
        rows = np.load(path)[:48]
        pieces = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        total = sum(loss_of(model, piece).item() * len(piece) for piece in pieces)
        losses[path.stem[8:]] = round(total / len(rows), 4)
    return losses


def main():
    options = argparse.ArgumentParser()
    options.add_argument("work", type=Path)
    options.add_argument("--steps", type=int, default=1600)
    options.add_argument("--stop", type=int, help="stop here, to measure the speed")
    options.add_argument("--threads", type=int, default=1)
    a = options.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    matrices = [p for n, p in model.model.layers.named_parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=LR_MUON, momentum=0.95, weight_decay=0.05, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=LR_ADAM, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = (LR_MUON, LR_ADAM)
    rows = np.load(a.work / "train.npy")
    state, start, spent, mean = a.work / "state.pt", 0, 0.0, None
    if state.exists():
        saved = torch.load(state)
        model.load_state_dict(saved["model"])
        for optimizer, part in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(part)
        start, spent = saved["step"], saved["seconds"]
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {rows.size} tokens, step {start} of {a.steps}")

    def record(step, seconds):
        line = {"step": step, "tokens": step * BATCH * (rows.shape[1] - 1), "seconds": round(seconds),
                "train": mean and round(mean, 4), **evaluate(model, a.work)}
        print(json.dumps(line), flush=True)
        with (a.work / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    began, last = time.time() - spent, a.stop or a.steps
    for step in range(start, last):
        if step == 0:
            record(0, 0)
        at = [(step * BATCH + i) % len(rows) for i in range(BATCH)]
        for optimizer, peak in zip(optimizers, peaks):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate(step, a.steps)
        loss = loss_of(model, rows[at])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        value = loss.item()
        mean = value if mean is None else 0.98 * mean + 0.02 * value
        if (step + 1) % 200 == 0 or step + 1 == last:
            seconds = time.time() - began
            record(step + 1, seconds)
            torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                        "step": step + 1, "seconds": seconds}, state)


if __name__ == "__main__":
    main()
