"""What golden.json is made of, by tests/golden/make_objectives.py."""
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from maker import peers
from maker.expect import PAPER, TRL, Expectation, dpo


def expectations(others):
    smooth = dict(label_smoothing=0.2)
    yield dpo("robust-dpo", "robust", 0.3, smooth, **smooth)
    yield dpo("hinge", "hinge", 0.3)
    yield dpo("exo", "exo_pair", 0.3, smooth, **smooth)
    yield dpo("ipo", "ipo", 0.5)
    yield dpo("ln-dpo", "sigmoid_norm", 5.0)
    yield dpo("apo-down", "apo_down", 0.3)
    yield Expectation("simpo", {"beta": 2.5, "gamma": 1.25}, "pairs", f"{TRL}, CPOTrainer, simpo",
                      lambda prompts: peers.cpo(prompts, "simpo", 2.5, 0.0, 1.25))
    yield Expectation("cpo", {"beta": 0.3, "alpha": 0.7}, "pairs", f"{TRL}, CPOTrainer, sigmoid",
                      lambda prompts: peers.cpo(prompts, "sigmoid", 0.3, 0.7))
    yield Expectation("orpo", {"lambda": 0.5}, "pairs", f"{TRL}, ORPOTrainer", lambda prompts: peers.orpo(prompts, 0.5))
    yield Expectation("dpop", {"beta": 0.3, "lambda": 5.0}, "pairs", PAPER, lambda prompts: dpop(prompts, 0.3, 5.0))
    yield from rpo(others / "nemo-aligner/megatron_gpt_dpo_model.py")


def dpop(prompts, beta, penalty):
    """No public trainer of the authors' has it."""
    d = torch.stack([torch.stack([r.S - r.R for r in p]) for p in prompts])
    return -F.logsigmoid(beta * (d[:, 0] - d[:, 1] - penalty * torch.clamp(-d[:, 0], min=0))).mean()


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
        yield Expectation("rpo", {"beta": 0.3, "reward_scale": 1.5, "distance": ours}, "pairs", f"NVIDIA/NeMo-Aligner, {theirs}",
                          lambda prompts, theirs=theirs: run(prompts, theirs))
