"""What golden.json is made of, by tests/golden/make_objectives.py."""
from types import SimpleNamespace

import torch
from maker import peers
from maker.expect import TRL, Expectation, dpo


def expectations(others):
    yield dpo("apo-zero", "apo_zero", 0.3)
    yield Expectation("apo-zero", {"beta": 0.3}, "thumbs", f"{TRL}, KTOTrainer, apo_zero_unpaired",
                      lambda prompts: peers.kto(prompts, "apo_zero_unpaired", 0.3))
    yield dpo("sppo", "sppo_hard", 0.5)
    yield dpo("nca", "nca_pair", 0.3)
    yield dpo("info-nca", "sigmoid", 0.3)
    yield from nca(others / "nca/reward_trainer.py")


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
        yield Expectation(ours, {"beta": 0.3, "temperature": 0.4}, "scores", f"thu-ml/Noise-Contrastive-Alignment, {theirs}",
                          lambda prompts, theirs=theirs: run(prompts, theirs, 0.3, 0.4))
