"""PEFT adapters of the tiny models, written by PEFT itself, with A and B both random so that no log-ratio is zero."""
import json
import shutil

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from . import models

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# model -> adapter folder -> LoraConfig arguments
ADAPTERS = {name: {"adapter": dict(target_modules=LINEAR)} for name in models.SPECS}
ADAPTERS["llama"]["adapter-patterns"] = dict(
    target_modules=r".*\.layers\.[02]\.(self_attn\.(q|v|o)_proj|mlp\.(gate|down)_proj)", use_rslora=True,
    rank_pattern={"q_proj": 6, r"layers\.2\.mlp\.down_proj": 2}, alpha_pattern={"v_proj": 3, r"model\.layers\.0\..*gate_proj": 12})
ADAPTERS["qwen2"]["adapter-head"] = dict(target_modules=[*LINEAR, "lm_head"])

# Seeds for which KTO's z0 is positive (its clamp at zero is a test of its own, not of these files) and the
# implicit rewards are spread on both sides of zero.
SEEDS = {"llama": 212, "llama-bias": 204, "mistral": 206, "qwen2": 206, "qwen3": 202}
SCALE_A, SCALE_B = 0.3, 0.08


def build(root, name):
    """Writes every adapter folder of the model `root/name`."""
    for k, (folder, arguments) in enumerate(ADAPTERS[name].items()):
        target = root / name / folder
        shutil.rmtree(target, ignore_errors=True)
        base, _ = models.load(root / name)
        peft = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, bias="none",
                                               task_type="CAUSAL_LM", **arguments))
        fill(peft, SEEDS[name] + 100 * k)
        peft.peft_config["default"].base_model_name_or_path = name
        peft.save_pretrained(target)  # with lm_head among the targets this also saves its frozen base layer
        (target / "README.md").unlink()  # the model card
        sort_targets(target / "adapter_config.json")


def sort_targets(path):
    """PEFT keeps the target modules as a set and writes them in an order that changes from run to run."""
    config = json.loads(path.read_text())
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def fill(peft, seed):
    rng = np.random.RandomState(seed)
    for name, parameter in sorted(lora_parameters(peft).items()):
        scale = SCALE_A if "lora_A" in name else SCALE_B
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(scale * rng.standard_normal(parameter.shape)))


def load(model_folder, adapter_folder, trainable=True, attention="eager"):
    """PeftModel in f32 on the committed files, and its tokenizer."""
    base, tok = models.load(model_folder, attention)
    return PeftModel.from_pretrained(base, adapter_folder, is_trainable=trainable).eval(), tok


def lora_parameters(peft):
    """PEFT's file name of each LoRA tensor -> parameter."""
    return {n.replace(".default", ""): p for n, p in peft.named_parameters() if ".lora_" in n}
