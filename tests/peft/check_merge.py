#!/usr/bin/env python3
"""Is a directory that `uft merge` wrote the model with the adapter in it?

    uft merge --model MODEL --adapter ADAPTER --out MERGED
    python check_merge.py MODEL ADAPTER MERGED FILE

Tensors: the names, shapes and dtypes of MODEL; W + PEFT's delta, rounded to W's dtype, to the last bit but one; all
that the adapter does not target unchanged. Log-probs: transformers on MERGED against PEFT on MODEL and ADAPTER, both
computed in f32, for every response of the JSONL file; what rounding to the dtype costs is printed.

The packages are those of ../golden/requirements.txt. Exit code 0 when everything agrees, 1 with one line per finding.
"""
import argparse
import sys
import warnings
from pathlib import Path

import torch
import transformers
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "golden"))
from maker import adapters, data, models  # noqa: E402
from maker.expected import Scorer  # noqa: E402

# Largest difference of a token's log-prob that rounding the merged weights may cost, for models as small and
# adapters as strong as the golden ones.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 3e-1}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def tensors(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def deltas(peft):
    """Name of each targeted weight -> s B A, as PEFT computes it in f32."""
    layers = {name: m for name, m in peft.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    return {f"{name}.weight": layer.get_delta_weight("default") for name, layer in layers.items()}


def tensor_findings(before, after, deltas):
    """`before` and `after` are the tensors of MODEL and MERGED."""
    expected = dict(before)
    if HEAD in deltas and HEAD not in before:  # a head tied to the embedding has to become a tensor of its own
        expected[HEAD] = before[EMBEDDING]
    yield from (f"{name} is missing" for name in expected.keys() - after.keys())
    yield from (f"{name} is new" for name in after.keys() - expected.keys())
    yield from (f"{name} is targeted, but not in the model" for name in deltas.keys() - expected.keys())
    for name in sorted(expected.keys() & after.keys()):
        old, new = expected[name], after[name]
        if (new.dtype, new.shape) != (old.dtype, old.shape):
            yield f"{name}: {new.dtype} {list(new.shape)} for {old.dtype} {list(old.shape)}"
        elif name not in deltas:
            if not torch.equal(new, old):
                yield f"{name} changed"
        else:
            want = (old.float() + deltas[name]).to(old.dtype).double()
            # sums in another order may move a value that lies between two numbers of the dtype to the other one
            slack = want.abs() * torch.finfo(old.dtype).eps + 1e-7
            wrong = ((new.double() - want).abs() > slack).sum().item()
            if wrong:
                yield f"{name}: {wrong} of {want.numel()} elements are not W + s B A"


@torch.no_grad()
def gaps(peft, merged, responses):
    """|difference| for each token of all responses, one after the other."""
    pairs = ((peft.logps(r.prompt_ids, r.ids), merged.logps(r.prompt_ids, r.ids)) for r in responses)
    return torch.cat([(a - b).abs() for a, b in pairs])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "adapter", "merged", "data"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--tolerance", type=float, help="largest difference of a token's log-prob; by default, by dtype")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()

    peft, tok = adapters.load(options.model, options.adapter, trainable=False)
    merged, merged_tok = models.load(options.merged)
    before, after = tensors(options.model), tensors(options.merged)
    findings = [*tensor_findings(before, after, deltas(peft))]
    rows = data.read_jsonl(options.data)
    responses, again = ([r for row in rows for r in data.encode_turns(t, row)] for t in (tok, merged_tok))
    if responses != again:
        findings.append("the tokenizers differ")
    dtype = before[EMBEDDING].dtype
    tolerance = TOLERANCE[dtype] if options.tolerance is None else options.tolerance
    gap = gaps(Scorer(peft), Scorer(merged), responses)
    if not gap.max() <= tolerance:
        findings.append(f"log-probs differ by up to {gap.max():.2e}")
    print(f"{dtype}: {len(responses)} responses, {gap.numel()} tokens, log-probs differ by {gap.mean():.2e} on average,"
          f" {gap.max():.2e} at most")
    print(*findings, sep="\n", end="\n" if findings else "")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
