"""Optimizer steps for the objectives of the catalogue: made-up log-probs, multiples of 1/64 and so exact in f32."""
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class Response:
    """`kind` and `value` are uft's feedback; the policy's log-probs are what losses are differentiated by."""
    kind: str
    value: float
    logps: torch.Tensor
    ref_logps: torch.Tensor

    @property
    def S(self):
        return self.logps.sum()

    @property
    def R(self):
        return self.ref_logps.sum()

    @property
    def n(self):
        return len(self.logps)


def describe():
    """{name: [prompt: [response, …]]} as JSON: the steps that golden.py files may name."""
    rng = np.random.RandomState(6)

    def response(kind, value=0.0):
        n = int(rng.randint(1, 7))
        ref = rng.randint(-256, -16, n) / 64
        return {"kind": kind, "value": value, "logps": list(np.minimum(ref + rng.randint(-64, 64, n) / 64, -1 / 64)),
                "ref_logps": list(ref)}

    def pair():
        margin = int(rng.randint(1, 17)) / 16
        return [response("chosen", margin), response("rejected", margin)]

    def thumbs(count):
        return [[response("binary", float(rng.rand() < 0.6))] for _ in range(count)]

    return {
        "pairs": [pair() for _ in range(5)],
        "scores": [[response("score", int(rng.randint(17)) / 16) for _ in range(4)] for _ in range(3)],
        "thumbs": thumbs(6),
        "more thumbs": thumbs(5),
        "demonstrations and thumbs": [[response("demonstration", 1.0)] for _ in range(3)] + thumbs(5),
    }


def load(step):
    """A step of `describe` as Responses, in double precision, the policy's log-probs as leaves."""
    def tensor(values, grad):
        return torch.tensor(values, dtype=torch.float64, requires_grad=grad)
    return [[Response(r["kind"], r["value"], tensor(r["logps"], True), tensor(r["ref_logps"], False)) for r in prompt]
            for prompt in step]


def flat(prompts):
    return [response for prompt in prompts for response in prompt]
