#!/usr/bin/env python3
"""The steps of whole_steps.py in PyTorch: transformers with PEFT, or by hand where these are not installed.

    python3 step_peer.py FOLDER --steps N --how peft|torch [--device cuda|cpu]

FOLDER holds model/ and texts.jsonl, pairs.jsonl. The best setting counts: bf16 weights and adapters, SDPA (its flash backend, since
sequences are of equal length and need no mask), fused AdamW, and both with and without gradient checkpointing; the head
computes the rows that are trained and no others. A line of JSON for each task and setting: seconds of every step, the first
step's loss."""
import argparse
import contextlib
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import model as maker
from whole_steps import GROUPS

RANK, ALPHA, BETA = 16, 32, 0.1
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Peft:
    """transformers and PEFT."""

    def __init__(self, folder, device):
        import peft
        import transformers
        base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
        base.config.use_cache = False
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=LINEAR, task_type="CAUSAL_LM")
        # In bf16, as PEFT's own default of f32 costs conversions in every layer.
        self.net = peft.get_peft_model(base, config, autocast_adapter_dtype=False).to(device)
        self.net.train()
        self.name = f"transformers {transformers.__version__}, PEFT {peft.__version__}"

    def checkpointing(self, on):
        if on:
            self.net.enable_input_require_grads()
            self.net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.net.gradient_checkpointing_disable()

    def parameters(self):
        return [p for p in self.net.parameters() if p.requires_grad]

    def reference(self):
        return self.net.disable_adapter()

    def logits(self, ids, keep):
        """Of the last `keep` positions."""
        return self.net(input_ids=ids, logits_to_keep=keep).logits


class ByHand(torch.nn.Module):
    """The same decoder in plain PyTorch."""

    def __init__(self, folder, device):
        super().__init__()
        self.c, self.w = json.loads((Path(folder) / "config.json").read_text()), weights(Path(folder) / "model.safetensors", device)
        self.adapter_on, self.again, self.name = True, False, "plain PyTorch by hand"
        self.low = torch.nn.ParameterDict()
        for name, weight in self.w.items():
            if name.split(".")[-2] in LINEAR:
                outputs, inputs = weight.shape
                a = torch.empty(RANK, inputs, device=device, dtype=torch.bfloat16).uniform_(-1, 1) * inputs**-0.5
                self.low[name.replace(".", "/")] = torch.nn.ParameterList([a, torch.zeros(outputs, RANK, device=device, dtype=torch.bfloat16)])

    def checkpointing(self, on):
        self.again = on

    @contextlib.contextmanager
    def reference(self):
        self.adapter_on = False
        yield
        self.adapter_on = True

    def linear(self, name, x):
        y = F.linear(x, self.w[name])
        if self.adapter_on:
            a, b = self.low[name.replace(".", "/")]
            y = y + F.linear(F.linear(x, a), b) * (ALPHA / RANK)
        return y

    def norm(self, name, x):
        wide = x.float()
        return self.w[name] * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.c["rms_norm_eps"])).to(x.dtype)

    def block(self, i, x, cos, sin):
        c, at = self.c, f"model.layers.{i}"
        batch, tokens, _ = x.shape
        h = self.norm(f"{at}.input_layernorm.weight", x)
        q, k, v = (self.linear(f"{at}.self_attn.{n}_proj.weight", h).view(batch, tokens, -1, c["head_dim"]).transpose(1, 2) for n in "qkv")
        turn = lambda y: y * cos + torch.cat((-y.chunk(2, -1)[1], y.chunk(2, -1)[0]), -1) * sin  # noqa: E731
        out = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True, enable_gqa=True)
        x = x + self.linear(f"{at}.self_attn.o_proj.weight", out.transpose(1, 2).reshape(batch, tokens, -1))
        h = self.norm(f"{at}.post_attention_layernorm.weight", x)
        gated = F.silu(self.linear(f"{at}.mlp.gate_proj.weight", h)) * self.linear(f"{at}.mlp.up_proj.weight", h)
        return x + self.linear(f"{at}.mlp.down_proj.weight", gated)

    def logits(self, ids, keep):
        """Of the last `keep` positions."""
        half = self.c["head_dim"] // 2
        frequency = self.c["rope_theta"] ** (-torch.arange(half, device=ids.device) / half)
        angles = torch.arange(ids.shape[1], device=ids.device)[:, None] * frequency
        cos, sin = (torch.cat((f, f), -1).to(torch.bfloat16) for f in (angles.cos(), angles.sin()))
        x = F.embedding(ids, self.w["model.embed_tokens.weight"])
        for i in range(self.c["num_hidden_layers"]):
            if self.again and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(self.block, i, x, cos, sin, use_reentrant=False)
            else:
                x = self.block(i, x, cos, sin)
        return F.linear(self.norm("model.norm.weight", x[:, -keep:]), self.w["lm_head.weight"])


def weights(path, device):
    """The tensors of a safetensors file in bf16."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        head = json.loads(file.read(length))
        out = {}
        for name, entry in head.items():
            start, end = entry["data_offsets"]
            file.seek(8 + length + start)
            data = torch.frombuffer(bytearray(file.read(end - start)), dtype=torch.bfloat16)
            out[name] = data.view(entry["shape"]).to(device)
    return out


def log_probs(net, ids, trained):
    """Of the last `trained` tokens of every sequence, `[sequences, trained]`."""
    logits = net.logits(ids, trained + 1)[:, :-1]
    each = [F.cross_entropy(row.float(), target, reduction="none") for row, target in zip(logits, ids[:, -trained:])]
    return -torch.stack(each)


def texts(net, rows, device):
    ids = torch.tensor([maker.ids(row["prompt"] + row["completion"]) for row in rows], device=device)
    return -log_probs(net, ids, ids.shape[1] - 1).mean()


def pairs(net, rows, device):
    ids = torch.tensor([maker.ids(row["prompt"] + row[which]) for which in ("chosen", "rejected") for row in rows], device=device)
    trained = len(maker.ids(rows[0]["chosen"]))
    with torch.no_grad(), net.reference():
        reference = log_probs(net, ids, trained).sum(-1)
    ratios = log_probs(net, ids, trained).sum(-1) - reference
    return -F.logsigmoid(BETA * (ratios[: len(rows)] - ratios[len(rows):])).mean()


def run(net, task, rows, steps, device):
    """Seconds of every step, and the first one's loss where it is the base model's: the adapter has not been trained."""
    loss_of, groups = {"texts": texts, "pairs": pairs}[task], GROUPS[task]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    seconds, first = [], None
    optimizer.zero_grad()
    for step in range(steps):
        start = time.perf_counter()
        loss = loss_of(net, rows[step * groups:(step + 1) * groups], device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if not net.trained:
            first, net.trained = loss.item(), True
    return seconds, first


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--how", choices=["peft", "torch"], required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    torch.manual_seed(1)
    net = (Peft if options.how == "peft" else ByHand)(options.folder / "model", options.device)
    net.trained = False
    for task in GROUPS:
        rows = [json.loads(line) for line in (options.folder / f"{task}.jsonl").read_text().splitlines()]
        for on in (False, True):
            net.checkpointing(on)
            line = {"task": task, "who": net.name, "how": f"gradient checkpointing {'on' if on else 'off'}", "seconds": None, "loss": None}
            try:
                line["seconds"], line["loss"] = run(net, task, rows, options.steps, options.device)
            except torch.OutOfMemoryError:
                line["error"] = "out of memory"
            print(json.dumps(line), flush=True)
            if options.device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
