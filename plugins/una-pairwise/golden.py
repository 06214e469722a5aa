"""What golden.json is made of, by tests/golden/make_objectives.py."""
import torch
from maker import peers
from maker.expect import TRL, Expectation, dpo


def expectations(others):
    yield dpo("una-pairwise", "sigmoid", 0.3)
    # Smoothed DPO is no longer a loss of TRL's, but its AOT on a batch of one pair is.
    smooth = dict(label_smoothing=0.2)
    yield Expectation(
        "una-pairwise", {"beta": 0.3, **smooth}, "pairs", f"{TRL}, DPOTrainer, aot_unpaired on one pair a batch",
        lambda prompts: torch.stack([peers.dpo([p], "aot_unpaired", 0.3, **smooth) for p in prompts]).mean())
