"""The five tiny models: config, random weights, tokenizer. Weights come from numpy's frozen RandomState stream."""
import json
import shutil
from dataclasses import dataclass, field

import numpy as np
import torch
from safetensors.torch import save_file

from . import tokenizer
from .tokenizer import write_json

COMMON = dict(hidden_act="silu", attention_dropout=0.0, initializer_range=0.02, use_cache=True,
              max_position_embeddings=2048)


@dataclass
class Spec:
    """What one model directory is made of."""
    config: dict
    tokenizer: str
    seed: int
    dtype: str
    v5: bool = False  # key names of transformers v5 and the chat template in its own file
    shards: int = 1
    eos: list = field(default_factory=list)  # extra end-of-sequence tokens in front of the tokenizer's own


SPECS = {
    # GQA, llama3 rope scaling whose ramp falls inside the four frequencies, tied embeddings, two eos ids
    "llama": Spec(dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=32, intermediate_size=64,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=512, rms_norm_eps=1e-5,
        attention_bias=False, mlp_bias=False, pretraining_tp=1, tie_word_embeddings=True, rope_theta=500000.0,
        rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                          original_max_position_embeddings=256)),
        "llama3", seed=101, dtype="float32", eos=["<|end_of_text|>"]),
    # biases everywhere, the old spelling of linear rope scaling, one key/value head per query head
    "llama-bias": Spec(dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=48, intermediate_size=80,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, vocab_size=448, rms_norm_eps=1e-6,
        attention_bias=True, mlp_bias=True, pretraining_tp=1, tie_word_embeddings=False, rope_theta=10000.0,
        rope_scaling=dict(type="linear", factor=2.5)),
        "llama3-generation", seed=102, dtype="float16"),
    # a window shorter than every text, two shards, GQA with three queries per key
    "mistral": Spec(dict(
        architectures=["MistralForCausalLM"], model_type="mistral", hidden_size=48, intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, vocab_size=560, rms_norm_eps=1e-5,
        tie_word_embeddings=False, rope_theta=10000.0, sliding_window=16),
        "mistral", seed=103, dtype="bfloat16", shards=2),
    # biases on q, k and v only, tied embeddings
    "qwen2": Spec(dict(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_size=32, intermediate_size=64,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=480, rms_norm_eps=1e-6,
        tie_word_embeddings=True, use_sliding_window=False, sliding_window=None, max_window_layers=3,
        layer_types=["full_attention"] * 3, rope_parameters=dict(rope_type="default", rope_theta=1000000.0)),
        "qwen2", seed=104, dtype="float32", v5=True),
    # norms on q and k, heads wider than hidden_size / heads
    "qwen3": Spec(dict(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_size=48, intermediate_size=80,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=488,
        rms_norm_eps=1e-6, attention_bias=False, tie_word_embeddings=False, use_sliding_window=False,
        sliding_window=None, max_window_layers=2, layer_types=["full_attention"] * 2,
        rope_parameters=dict(rope_type="default", rope_theta=1000000.0)),
        "qwen3", seed=105, dtype="bfloat16", v5=True),
}

# Standard deviations at which attention, MLP and head are all far from flat at these widths.
SCALE = dict(embed_tokens=0.35, lm_head=0.25, o_proj=0.25, down_proj=0.25, q_proj=0.25, k_proj=0.25)


def build(root, name):
    """Writes the model directory `root/name`, replacing what was there."""
    spec, folder = SPECS[name], root / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tok = tokenizer.train(spec.tokenizer, spec.config["vocab_size"])
    tokenizer.write(folder, spec.tokenizer, tok, template_file=spec.v5)
    write_config(folder, spec, tok)
    write_weights(folder, spec)


def write_config(folder, spec, tok):
    names = tokenizer.CONFIGS[spec.tokenizer]
    eos = [tok.token_to_id(t) for t in [*spec.eos, names["eos_token"]]]
    pad = tok.token_to_id(names["pad_token"])
    ids = dict(bos_token_id=tok.token_to_id(names["bos_token"]) if names["bos_token"] else pad,  # Qwen names <|endoftext|>
               eos_token_id=eos if len(eos) > 1 else eos[0])
    version = dict(dtype=spec.dtype, transformers_version="5.0.0") if spec.v5 else \
        dict(torch_dtype=spec.dtype, transformers_version="4.46.0")
    write_json(folder / "config.json", {**spec.config, **COMMON, **ids, **version})
    write_json(folder / "generation_config.json", {**ids, "pad_token_id": pad})


def random_weights(spec):
    """Tensor name -> float32 array, for the architecture's own list of tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM
    keys = {k: v for k, v in spec.config.items() if k not in ("architectures", "model_type")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(spec.config["model_type"], **keys))
    rng = np.random.RandomState(spec.seed)
    for name, parameter in sorted(model.state_dict().items()):
        if name == "lm_head.weight" and spec.config["tie_word_embeddings"]:
            continue
        noise = rng.standard_normal(parameter.shape)
        if name.endswith("norm.weight"):
            value = 1 + 0.15 * noise
        elif name.endswith(".bias"):
            value = 0.3 * noise
        else:
            value = SCALE.get(name.split(".")[-2], 0.3) * noise
        yield name, value.astype(np.float32)


def write_weights(folder, spec):
    weights = {n: torch.from_numpy(w).to(getattr(torch, spec.dtype)) for n, w in random_weights(spec)}
    if spec.shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, where = list(weights), {}
    for i in range(spec.shards):
        file = f"model-{i + 1:05d}-of-{spec.shards:05d}.safetensors"
        part = names[i::spec.shards]  # interleaved, so that every layer spans both shards
        save_file({n: weights[n] for n in part}, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(part, file))
    size = sum(w.numel() * w.element_size() for w in weights.values())
    write_json(folder / "model.safetensors.index.json",
               {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))})


def load(folder, attention="eager"):
    """The model in f32, whatever dtype its file has, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    declared = json.loads((folder / "config.json").read_text())
    assert model.config.model_type == declared["model_type"]
    return model.eval(), AutoTokenizer.from_pretrained(folder)
