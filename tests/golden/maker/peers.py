"""Others' losses, run as they are on log-probs that are given: trainers of TRL without a model, and single methods
out of source files whose imports are not here."""
import ast
from collections import defaultdict
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer


class Gather:
    """An accelerator of one process."""
    device = torch.device("cpu")
    use_distributed = False

    def gather_for_metrics(self, x):
        return x

    gather = gather_for_metrics


class Model(torch.nn.Module):
    """Gives the log-probs that it was made with, padded with 0 behind one prompt token, as TRL's fused head does."""
    is_gradient_checkpointing = False

    def __init__(self, logps):
        super().__init__()
        width = max(map(len, logps))
        self.log_probs = torch.stack([F.pad(x, (0, width - len(x))) for x in logps])

    def forward(self, **_):
        none = torch.zeros_like(self.log_probs)
        return SimpleNamespace(log_probs=self.log_probs, entropy=none, mean_logits=none, is_top1=none.bool())


def trainer(responses, **attributes):
    """What `_compute_loss` reads of a trainer, and its inputs."""
    policy, reference = Model([r.logps for r in responses]), Model([r.ref_logps for r in responses])
    width = policy.log_probs.shape[1] + 1
    mask = torch.tensor([[0] + [1] * r.n + [0] * (width - 1 - r.n) for r in responses])
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    stub = SimpleNamespace(
        model=policy, ref_model=reference, accelerator=Gather(), args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False, precompute_ref_logps=False, use_weighting=False, ld_alpha=None, label_smoothing=0.0,
        f_divergence_type="reverse_kl", _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1)
    vars(stub).update(attributes)
    return stub, inputs


def dpo(prompts, loss_type, beta, **more):
    """`DPOTrainer` on pairs."""
    pairs = [p[0] for p in prompts] + [p[1] for p in prompts]
    stub, inputs = trainer(pairs, loss_types=[loss_type], loss_weights=[1.0], beta=beta, **more)
    return DPOTrainer._compute_loss(stub, stub.model, inputs, False)


def kto(prompts, loss_type, beta):
    """`KTOTrainer` on thumbs."""
    responses = [r for p in prompts for r in p]
    stub, inputs = trainer(responses, loss_type=loss_type, beta=beta, calculate_KL=False, desirable_weight=1.0,
                           undesirable_weight=1.0)
    stub._compute_kl_logps = lambda model, batch: None
    inputs["label"] = torch.tensor([r.value > 0.5 for r in responses])
    return KTOTrainer._compute_loss(stub, stub.model, inputs, False)


def cpo(prompts, loss_type, beta, alpha, gamma=0.0):
    """`CPOTrainer` on one pair a batch: its likelihood is a mean over the batch's tokens."""
    stub = SimpleNamespace(loss_type=loss_type, beta=beta, simpo_gamma=gamma, alpha=0.0, label_smoothing=0.0,
                           accelerator=Gather())
    def one(chosen, rejected):
        logps = [r.S / r.n if loss_type == "simpo" else r.S for r in (chosen, rejected)]
        losses, _, _ = CPOTrainer.cpo_loss(stub, *(x[None] for x in logps))
        return losses.mean() + alpha * -chosen.logps.mean()
    return torch.stack([one(*p) for p in prompts]).mean()


def orpo(prompts, beta):
    """`ORPOTrainer` on one pair a batch, its likelihood over the response alone."""
    stub = SimpleNamespace(beta=beta, accelerator=Gather())
    def one(chosen, rejected):
        ratio = ORPOTrainer.odds_ratio_loss(stub, *((r.S / r.n)[None] for r in (chosen, rejected)))[0]
        return -chosen.logps.mean() - ratio.mean()
    return torch.stack([one(*p) for p in prompts]).mean()


def method(path, name):
    """A function of a source file, by itself: nothing else of the file is run."""
    tree = ast.parse(path.read_text("utf-8"))
    found = next(n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name)
    found.decorator_list = [] if isinstance(found, ast.FunctionDef) else found.decorator_list
    for part in ast.walk(found):
        if isinstance(part, ast.FunctionDef):
            part.returns = None
            part.decorator_list = []
            for argument in part.args.args:
                argument.annotation = None
    from dataclasses import dataclass
    space = {"torch": torch, "F": F, "dataclass": dataclass, "Accelerator": object, "DPOPackedDataset": None}
    exec(compile(ast.Module([found], []), str(path), "exec"), space)
    return space[name]
