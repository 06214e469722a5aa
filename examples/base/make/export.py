#!/usr/bin/env python3
"""Writes the model directory from train.py's last state: export.py WORK OUTPUT"""

import json
import sys
from pathlib import Path

import torch
from train import SHAPE
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def main(work, output):
    state = torch.load(work / "state.pt")
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.load_state_dict(state["model"])
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=[2, 0], pad_token_id=0)
    model.save_pretrained(output)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(work / "tokenizer.json"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(output, save_jinja_files=False)
    # names that transformers 4 knows as well
    path = output / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("backend", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["additional_special_tokens"] = config.pop("extra_special_tokens", ["<|im_start|>"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (output / "model.safetensors").chmod(0o644)
    print(f"step {state['step']}: {sum(p.numel() for p in model.parameters())} parameters")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
