"""What golden.json is made of, by tests/golden/make_objectives.py."""
from types import SimpleNamespace

import torch
from maker import peers, steps
from maker.expect import Expectation

BEFORE = "more thumbs"


def expectations(others):
    yield from ulma(others / "ulma/trainer.py")
    yield bco(others / "trl-0.28")


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
        yield Expectation("ulma", {"beta": 0.3, "shift": 0.2, **ours}, step, f"the authors' ULMATrainer, {kind}, {positives}",
                          lambda prompts, a=(kind, positives, "per" in ours): run(prompts, *a))


def bco(source):
    """Two steps: delta is the mean over both."""
    loss = peers.method(source / "trl/experimental/bco/bco_trainer.py", "bco_loss")
    moments = peers.method(source / "trl/trainer/utils.py", "RunningMoments")
    def run(prompts):
        running = moments(accelerator=peers.Gather())
        stub = SimpleNamespace(beta=0.3, running=running, match_underlying_distribution=False)
        for step in [steps.load(steps.describe()[BEFORE]), prompts]:
            sides = [[r for r in steps.flat(step) if (r.value > 0.5) == up] for up in (True, False)]
            S, R = ([torch.stack([getattr(r, x) for r in side]) for side in sides] for x in "SR")
            losses = loss(stub, *S, *R, None, None)[0]
        return losses.mean()
    return Expectation("bco", {"beta": 0.3}, "thumbs", "TRL 0.28, BCOTrainer", run, before=[BEFORE])
