"""The objectives, as plain torch formulas over summed log-probs (method: UFT/UNA papers, TRL for DPO and KTO)."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

BETA = 0.1
LABEL_SMOOTHING = 0.1


@dataclass(frozen=True)
class Objective:
    """Which data file it reads, and its loss over a Batch of rows of that file."""
    data: str
    loss: callable


class Batch:
    """Per-token policy log-probs (with gradient) and reference log-probs of all responses of some rows."""

    def __init__(self, scorer, rows, encoded):
        self.rows, self.encoded, self.scorer = rows, encoded, scorer
        self.flat = [r for responses in encoded for r in responses]
        self.policy = [scorer.logps(r.prompt_ids, r.ids) for r in self.flat]
        with torch.no_grad():
            self.reference = [scorer.logps(r.prompt_ids, r.ids, adapter=False) for r in self.flat]
        self.S = torch.stack([x.sum() for x in self.policy])
        self.R = torch.stack([x.sum() for x in self.reference])
        self.d = self.S - self.R

    def column(self, key):
        return torch.tensor([float(row[key]) for row in self.rows])

    def pair_difference(self):
        """d of the chosen minus d of the rejected response, per row."""
        d = self.d.view(-1, 2)
        return d[:, 0] - d[:, 1]

    def mismatched_kl(self):
        """KTO's z0: every prompt with the completion of the row before it (the first with the last one's), mean of
        S - R over the rows, clamped at zero after the mean, no gradient."""
        rows = [r for r, in self.encoded]
        with torch.no_grad():
            gaps = [self.scorer.logps(r.prompt_ids, rows[i - 1].ids).sum()
                    - self.scorer.logps(r.prompt_ids, rows[i - 1].ids, adapter=False).sum() for i, r in enumerate(rows)]
            return torch.stack(gaps).mean().clamp(min=0)


def sft(b):
    return -torch.cat(b.policy).mean()


def pointwise_mse(b, target):
    return ((torch.sigmoid(BETA * b.d) - target) ** 2).mean()


def pointwise_bce(b, target):
    r = BETA * b.d
    return (-target * F.logsigmoid(r) - (1 - target) * F.logsigmoid(-r)).mean()


def dpo(b, smoothing=0.0):
    x = BETA * b.pair_difference()
    return (-(1 - smoothing) * F.logsigmoid(x) - smoothing * F.logsigmoid(-x)).mean()


def kto(b):
    z0, label = b.mismatched_kl(), b.column("label").bool()
    x = BETA * (b.d - z0)
    return (1 - torch.sigmoid(torch.where(label, x, -x))).mean()


OBJECTIVES = {
    "sft": Objective("demos", sft),
    "sft-turns": Objective("turns", sft),
    "uft-sft-mse": Objective("demos", lambda b: pointwise_mse(b, torch.ones(len(b.rows)))),
    "uft-sft-bce": Objective("demos", lambda b: pointwise_bce(b, torch.ones(len(b.rows)))),
    "una-score-mse": Objective("scores", lambda b: pointwise_mse(b, b.column("score"))),
    "una-score-bce": Objective("scores", lambda b: pointwise_bce(b, b.column("score"))),
    "una-binary-mse": Objective("labels", lambda b: pointwise_mse(b, b.column("label"))),
    "una-binary-bce": Objective("labels", lambda b: pointwise_bce(b, b.column("label"))),
    "dpo": Objective("pairs", dpo),
    "dpo-smoothed": Objective("pairs", lambda b: dpo(b, LABEL_SMOOTHING)),
    "kto": Objective("labels", kto),
}

# The unified objective: the sum of each source's own mean loss, weights 1.
MIXED = ["uft-sft-mse", "una-score-mse", "una-binary-mse", "dpo"]
