#!/usr/bin/env python3
"""Makes objectives.json: what TRL and the authors of the papers compute for the objectives of the catalogue.

    python make_objectives.py PEERS           write it
    python make_objectives.py PEERS --check   compute it again and compare with the committed file

PEERS is a folder with what requirements.txt cannot hold beside TRL 1.16; see README.md, "Objectives".
"""
import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from make_golden import be_quiet, close
from maker import peers, steps

HERE = Path(__file__).resolve().parent
TRL = "TRL 1.16"
PAPER = "the paper's formula"


def expectations(folder):
    """(objective, its parameters, steps trained on before, the step, whose numbers they are, loss over prompts)."""
    def dpo(name, loss_type, beta, parameters=None, step="pairs", **more):
        run = lambda prompts: peers.dpo(prompts, loss_type, beta, **more)
        return name, {"beta": beta, **(parameters or {})}, [], step, f"{TRL}, DPOTrainer, {loss_type}", run

    smooth = dict(label_smoothing=0.2)
    yield dpo("robust-dpo", "robust", 0.3, smooth, **smooth)
    yield dpo("hinge", "hinge", 0.3)
    yield dpo("exo", "exo_pair", 0.3, smooth, **smooth)
    yield dpo("ipo", "ipo", 0.5)
    yield dpo("ln-dpo", "sigmoid_norm", 5.0)
    yield dpo("apo-down", "apo_down", 0.3)
    yield dpo("apo-zero", "apo_zero", 0.3)
    yield dpo("sppo", "sppo_hard", 0.5)
    yield dpo("nca", "nca_pair", 0.3)
    yield dpo("info-nca", "sigmoid", 0.3)
    yield dpo("una-pairwise", "sigmoid", 0.3)
    yield dpo("ld-dpo", "sigmoid", 0.3, dict(alpha=0.4), ld_alpha=0.4)
    yield dpo("aot", "aot", 0.3, smooth, **smooth)
    yield dpo("aot-unpaired", "aot_unpaired", 0.3, smooth, **smooth)
    # Smoothed DPO is no longer a loss of TRL's, but its AOT on a batch of one pair is.
    yield ("una-pairwise", {"beta": 0.3, **smooth}, [], "pairs", f"{TRL}, DPOTrainer, aot_unpaired on one pair a batch",
           lambda prompts: torch.stack([peers.dpo([p], "aot_unpaired", 0.3, **smooth) for p in prompts]).mean())
    yield ("apo-zero", {"beta": 0.3}, [], "thumbs", f"{TRL}, KTOTrainer, apo_zero_unpaired",
           lambda prompts: peers.kto(prompts, "apo_zero_unpaired", 0.3))
    yield ("simpo", {"beta": 2.5, "gamma": 1.25}, [], "pairs", f"{TRL}, CPOTrainer, simpo",
           lambda prompts: peers.cpo(prompts, "simpo", 2.5, 0.0, 1.25))
    yield ("cpo", {"beta": 0.3, "alpha": 0.7}, [], "pairs", f"{TRL}, CPOTrainer, sigmoid",
           lambda prompts: peers.cpo(prompts, "sigmoid", 0.3, 0.7))
    yield "orpo", {"lambda": 0.5}, [], "pairs", f"{TRL}, ORPOTrainer", lambda prompts: peers.orpo(prompts, 0.5)
    yield "dpop", {"beta": 0.3, "lambda": 5.0}, [], "pairs", PAPER, lambda prompts: dpop(prompts, 0.3, 5.0)
    yield from nca(folder / "nca/reward_trainer.py")
    yield from rpo(folder / "nemo-aligner/megatron_gpt_dpo_model.py")
    yield from ulma(folder / "ulma/trainer.py")
    yield from bco(folder / "trl-0.28")


def dpop(prompts, beta, penalty):
    """No public trainer of the authors' has it."""
    d = torch.stack([torch.stack([r.S - r.R for r in p]) for p in prompts])
    return -F.logsigmoid(beta * (d[:, 0] - d[:, 1] - penalty * torch.clamp(-d[:, 0], min=0))).mean()


def nca(source):
    """Four scored responses a prompt. The authors add 0.01 to the first score, so it is taken off before."""
    loss = peers.method(source, "nca_loss")
    def run(prompts, name, beta, temperature):
        stub = SimpleNamespace(beta=beta, temperature_alpha=temperature, loss_type=name)
        def one(prompt):
            scores = torch.tensor([[r.value] for r in prompt], dtype=torch.float64)
            batch = {f"A{k}_score": scores[k] - (0.01 if k == 0 else 0.0) for k in range(4)}
            logps = [r.S[None] for r in prompt] + [r.R[None] for r in prompt]
            return loss(stub, batch, *logps)[0].mean()
        return torch.stack([one(p) for p in prompts]).mean()
    for ours, theirs in [("info-nca", "InfoNCA"), ("nca", "NCA")]:
        yield (ours, {"beta": 0.3, "temperature": 0.4}, [], "scores", f"thu-ml/Noise-Contrastive-Alignment, {theirs}",
               lambda prompts, theirs=theirs: run(prompts, theirs, 0.3, 0.4))


def rpo(source):
    """The pair's margin as the chosen response's reward, the rejected one's being 0."""
    loss = peers.method(source, "loss_func")
    def run(prompts, distance):
        pairs = [p[0] for p in prompts] + [p[1] for p in prompts]
        stub = SimpleNamespace(
            preference_loss=distance, ref_policy_kl_penalty=0.3, gt_reward_scale=1.5,
            get_reduced_masked_logps=lambda x, *_, **__: x, split_output_tensor=lambda x: x.chunk(2))
        rewards = torch.tensor([p[0].value for p in prompts] + [0.0] * len(prompts), dtype=torch.float64)
        S, R = (torch.stack([getattr(r, side) for r in pairs]) for side in "SR")
        return loss(stub, S, R, None, rewards)[0]
    for ours, theirs in [("backward", "rpo_bwd_kl"), ("forward", "rpo_fwd_kl"), ("squared", "rpo_sq")]:
        yield ("rpo", {"beta": 0.3, "reward_scale": 1.5, "distance": ours}, [], "pairs", f"NVIDIA/NeMo-Aligner, {theirs}",
               lambda prompts, theirs=theirs: run(prompts, theirs))


def ulma(source):
    """The authors add the mean over positives to that over the others; here each response counts once."""
    loss = peers.method(source, "ulma_loss")
    def run(prompts, kind, positives, per_token):
        stub = SimpleNamespace(beta=0.3, constant_zx=0.2, sft_loss_type=positives, preference_loss_type=kind)
        responses = steps.flat(prompts)
        def one(r):
            n = r.n if per_token else 1
            positive = r.kind != "score" and r.value == 1
            score = torch.tensor([1.0 if positive else min(r.value, 1 - 1e-12)], dtype=torch.float64)
            return loss(stub, None, None, (r.S / n)[None], (r.R / n)[None], None, score)[0]
        return torch.stack([one(r) for r in responses]).mean()
    for step, kind, positives, ours in [
            ("demonstrations and thumbs", "binary", "logloss", {}),
            ("demonstrations and thumbs", "binary", "logloss", {"per": "token"}),
            ("demonstrations and thumbs", "binary", "pointwise_dpo", {"positives": "reward"}),
            ("scores", "continuous", "logloss", {})]:
        yield ("ulma", {"beta": 0.3, "shift": 0.2, **ours}, [], step, f"the authors' ULMATrainer, {kind}, {positives}",
               lambda prompts, a=(kind, positives, "per" in ours): run(prompts, *a))


def bco(source):
    """Two steps: delta is the mean over both."""
    loss = peers.method(source / "trl/experimental/bco/bco_trainer.py", "bco_loss")
    moments = peers.method(source / "trl/trainer/utils.py", "RunningMoments")
    def run(prompts):
        running = moments(accelerator=peers.Gather())
        stub = SimpleNamespace(beta=0.3, running=running, match_underlying_distribution=False)
        for step in [BEFORE["more thumbs"], prompts]:
            sides = [[r for r in steps.flat(step) if (r.value > 0.5) == up] for up in (True, False)]
            S, R = ([torch.stack([getattr(r, x) for r in side]) for side in sides] for x in "SR")
            losses = loss(stub, *S, *R, None, None)[0]
        return losses.mean()
    yield "bco", {"beta": 0.3}, ["more thumbs"], "thumbs", "TRL 0.28, BCOTrainer", run


DESCRIBED = steps.describe()
BEFORE = {name: steps.load(step) for name, step in DESCRIBED.items()}


def make(folder):
    out = []
    for objective, parameters, before, step, source, run in expectations(folder):
        prompts = steps.load(DESCRIBED[step])
        loss = run(prompts)
        loss.backward()
        dlogp = [[g for g in r.logps.grad.tolist()] if r.logps.grad is not None else [0.0] * r.n
                 for r in steps.flat(prompts)]
        out.append({"objective": objective, "params": parameters, "before": before, "step": step, "source": source,
                    "loss": loss.item(), "dlogp": [g for gradients in dlogp for g in gradients]})
    return {"steps": DESCRIBED, "expected": out}


def text(made):
    """One step and one expectation a line."""
    described = [f"  {json.dumps(name)}: {json.dumps(step)}" for name, step in made["steps"].items()]
    expected = [f"  {json.dumps(e)}" for e in made["expected"]]
    return '{"steps": {\n' + ",\n".join(described) + '\n}, "expected": [\n' + ",\n".join(expected) + "\n]}\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", type=Path, metavar="PEERS")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    be_quiet()
    path, made = HERE / "objectives.json", make(options.peers)
    if options.check:
        same = close(json.loads(path.read_text("utf-8")), json.loads(json.dumps(made)))
        print("objectives.json agrees" if same else "objectives.json differs")
        sys.exit(not same)
    path.write_text(text(made), "utf-8")
    print(len(made["expected"]), "expectations of", len({e["objective"] for e in made["expected"]}), "objectives")
