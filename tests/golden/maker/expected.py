"""What transformers and PEFT compute for one model directory: the files under expected/<model>/."""
import json
import re

import torch
from safetensors.torch import save_file

from . import adapters, data
from .objectives import MIXED, OBJECTIVES, Batch

FEW = ["sft", "sft-turns", "una-score-mse", "dpo", "kto"]
ALL = [*OBJECTIVES, "mixed"]
GRADIENTS = {"mistral": ALL, "qwen3": [*FEW, "mixed"]}  # the other models: FEW
CURVES = ["sft", "una-score-mse", "dpo"]
STEPS, ROWS_PER_STEP, LEARNING_RATE, WEIGHT_DECAY, CLIP = 20, 4, 1e-3, 0.01, 1.0


class Scorer:
    """Per-token log-probs of a response under a PEFT model, one unpadded sequence at a time."""

    def __init__(self, peft):
        self.peft = peft

    def logps(self, prompt_ids, ids, adapter=True):
        """log p of each token of `ids` after `prompt_ids`; `adapter=False` is the reference."""
        if not adapter:
            with self.peft.disable_adapter():
                return self.logps(prompt_ids, ids)
        tokens = torch.tensor([prompt_ids + ids])
        logits = self.peft(input_ids=tokens, use_cache=False).logits[0, len(prompt_ids) - 1:-1]
        return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]


def write_json(path, value):
    """Indented JSON with every list of numbers on one line."""
    text = json.dumps(value, ensure_ascii=False, indent=1)
    text = re.sub(r"\[\n[\s\d.,eE+-]+\]", lambda m: re.sub(r"\s+", "", m[0]).replace(",", ", "), text)
    path.write_text(text + "\n", encoding="utf-8")


def number(x):
    return round(x.item(), 7)


# ------------------------------------------------------------------------------------------- tokens and log-probs

@torch.no_grad()
def responses(folder, files):
    """{file: [row: [response: {key, prompt_ids, ids, logps: {base, adapter, …}}]]}"""
    loaded = {name: adapters.load(folder, folder / name, trainable=False) for name in adapters.ADAPTERS[folder.name]}
    scorers = {name: Scorer(peft) for name, (peft, _) in loaded.items()}
    tok = loaded["adapter"][1]

    def describe(r):
        logps = {"base": scorers["adapter"].logps(r.prompt_ids, r.ids, adapter=False)}
        logps.update((name, scorer.logps(r.prompt_ids, r.ids)) for name, scorer in scorers.items())
        return dict(key=r.key, prompt_ids=r.prompt_ids, ids=r.ids,
                    logps={name: [number(x) for x in values] for name, values in logps.items()})

    return {file: [[describe(r) for r in data.encode_turns(tok, row)] for row in rows] for file, rows in files.items()}


# ------------------------------------------------------------------------------------------- losses and gradients

def gradients(folder, files, names):
    """Loss and LoRA gradient of each objective over its whole file: ({name: facts}, {"name/tensor": gradient})."""
    peft, tok = adapters.load(folder, folder / "adapter")
    scorer, parameters = Scorer(peft), adapters.lora_parameters(peft)
    facts, tensors = {}, {}
    for name in names:
        parts = MIXED if name == "mixed" else [name]
        batches = [batch(scorer, tok, files[OBJECTIVES[p].data]) for p in parts]
        losses = [OBJECTIVES[p].loss(b) for p, b in zip(parts, batches)]
        total = torch.stack(losses).sum()
        facts[name] = dict(loss=number(total))
        if name == "mixed":
            facts[name]["parts"] = dict(zip(parts, map(number, losses)))
        else:
            facts[name].update(data=OBJECTIVES[name].data, logp=[number(x) for x in batches[0].S],
                               ref_logp=[number(x) for x in batches[0].R])
        if name == "kto":
            facts[name]["z0"] = number(batches[0].mismatched_kl())
        slopes = torch.autograd.grad(total, list(parameters.values()))
        tensors.update((f"{name}/{n}", g.contiguous()) for n, g in zip(parameters, slopes))
    return facts, tensors


def batch(scorer, tok, rows):
    return Batch(scorer, rows, [data.encode_turns(tok, row) for row in rows])


# ------------------------------------------------------------------------------------------- training curves

def curve(folder, rows, objective):
    """20 AdamW steps from the committed adapter: four rows a step, in order, wrapping around."""
    peft, tok = adapters.load(folder, folder / "adapter")
    scorer, parameters = Scorer(peft), list(adapters.lora_parameters(peft).values())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8,
                                  weight_decay=WEIGHT_DECAY)
    out = dict(loss=[], grad_norm=[])
    for step in range(STEPS):
        start = step * ROWS_PER_STEP % len(rows)
        loss = objective.loss(batch(scorer, tok, rows[start:start + ROWS_PER_STEP]))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        out["loss"].append(number(loss))
        out["grad_norm"].append(number(norm))
    return out


# ------------------------------------------------------------------------------------------- all of one model

def write(root, name, files):
    """Writes expected/<name>/: responses.json, losses.json, grads.safetensors, curves.json."""
    folder, target = root / "models" / name, root / "expected" / name
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / "responses.json", responses(folder, files))
    facts, tensors = gradients(folder, files, GRADIENTS.get(name, FEW))
    write_json(target / "losses.json", facts)
    save_file(tensors, target / "grads.safetensors", metadata={"format": "pt"})
    write_json(target / "curves.json", {
        o: dict(data=OBJECTIVES[o].data, **curve(folder, files[OBJECTIVES[o].data], OBJECTIVES[o])) for o in CURVES})
    return facts
