#!/usr/bin/env python3
"""Does PEFT read an adapter that uft wrote, and does it give the log-probs that uft's own `score` gives?

    uft score --model MODEL --adapter ADAPTER --data FILE --format FORMAT --tokens > scores.jsonl
    python check_adapter.py MODEL ADAPTER FILE scores.jsonl [--tolerance 1e-4]

Exit code 0 when everything agrees, 1 with one line per finding otherwise.
"""
import argparse
import sys
import warnings
from pathlib import Path

import torch
import transformers
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from maker import adapters, data
from maker.expected import Scorer


def tensor_findings(peft, folder):
    """Names that PEFT misses or does not know, values that it changed, B matrices that are still zero."""
    written = load_file(folder / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(peft, save_embedding_layers=False)
    yield from (f"PEFT finds no {name} in the file" for name in loaded.keys() - written.keys())
    yield from (f"PEFT does not know {name}" for name in written.keys() - loaded.keys() if ".lora_" in name)
    for name in sorted(loaded.keys() & written.keys()):
        if not torch.equal(loaded[name], written[name].float()):
            yield f"{name} is not what the file says"
        if ".lora_B" in name and not written[name].any():
            yield f"{name} is all zero"


@torch.no_grad()
def score_findings(peft, tok, rows, lines, tolerance):
    """Compares line by line, in the order of rows and of responses within a row."""
    scorer = Scorer(peft)
    responses = [r for row in rows for r in data.encode_turns(tok, row)]
    lines = sorted(lines, key=lambda line: (line["row"], line.get("response", 0)))
    if len(lines) != len(responses):
        yield f"{len(lines)} scored responses, but the data has {len(responses)}"
        return
    worst = 0.0
    for line, r in zip(lines, responses):
        where = f"row {line['row']} response {line.get('response', 0)}"
        policy = scorer.logps(r.prompt_ids, r.ids).double()
        reference = scorer.logps(r.prompt_ids, r.ids, adapter=False).double()
        if line["tokens"] != len(r.ids):
            yield f"{where}: {line['tokens']} tokens, TRL's rule gives {len(r.ids)}"
            continue
        if line.get("ids") not in (None, r.ids, r.prompt_ids + r.ids):
            yield f"{where}: other token ids than by TRL's rule"
        # a sum over n tokens may be off by n times the tolerance of one
        gaps = {"logp": (line["logp"] - policy.sum()).abs() / len(r.ids)}
        if line.get("ref_logp") is not None:
            gaps["ref_logp"] = (line["ref_logp"] - reference.sum()).abs() / len(r.ids)
        if line.get("token_logps") is not None:
            gaps["token_logps"] = (torch.tensor(line["token_logps"], dtype=torch.float64) - policy).abs().max()
        for key, gap in gaps.items():
            worst = max(worst, gap.item())
            if not gap <= tolerance:
                yield f"{where}: {key} differs by {gap:.2e} a token"
    print(f"{len(responses)} responses, largest difference {worst:.2e} a token")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "adapter", "data", "scores"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    peft, tok = adapters.load(options.model, options.adapter, trainable=False)
    findings = [*tensor_findings(peft, options.adapter),
                *score_findings(peft, tok, data.read_jsonl(options.data), data.read_jsonl(options.scores),
                                options.tolerance)]
    print(*findings, sep="\n", end="\n" if findings else "")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
