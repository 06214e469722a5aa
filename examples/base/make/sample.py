#!/usr/bin/env python3
"""Prints greedy and sampled answers: sample.py MODEL [QUESTION ...]"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = ["What is a footbridge?", "What is a finch?", "What is a kitchen?", "Define velocity.", "Hi! How are you?"]
OPENINGS = ["robin (", "word: teapot\nkind:", "It was a fine morning, and Elizabeth", "Kinds of boat:"]


def main(path, questions):
    torch.set_num_threads(1)
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in questions or QUESTIONS
    ]
    for prompt in prompts + ([] if questions else OPENINGS):
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        print(repr(prompt.removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n<|im_start|>assistant\n")))
        for sample in (False, True):
            how = dict(do_sample=True, temperature=0.7, top_p=0.9) if sample else dict(do_sample=False)
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, **how)
            text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            print("    sampled" if sample else "    greedy ", repr(text))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
