"""What a plugin's golden.py yields: whose loss an objective has to have, with which parameters and on which step."""
from dataclasses import dataclass, field
from typing import Callable

from . import peers

TRL = "TRL 1.16"
PAPER = "the paper's formula"


@dataclass
class Expectation:
    """`loss` is of a step's prompts, as `steps.load` gives them."""
    objective: str
    params: dict
    step: str
    source: str
    loss: Callable
    # Steps that it is trained on before.
    before: list = field(default_factory=list)


def dpo(objective, loss_type, beta, params=None, **more):
    """TRL's DPOTrainer on pairs; `more` are attributes of the trainer."""
    return Expectation(objective, {"beta": beta, **(params or {})}, "pairs", f"{TRL}, DPOTrainer, {loss_type}",
                       lambda prompts: peers.dpo(prompts, loss_type, beta, **more))
