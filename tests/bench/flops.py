"""Floating-point operations that a run needs, by the shapes of its model and the lengths of its sequences.

Only what cannot be left out is counted: no padding; prompts once; no gradient of a frozen weight; no gradient below the
lowest adapter; after the last layer's attention only rows that trained tokens read; the head for trained tokens only;
the reference once a row. What attention computes again on the way back is not counted."""
import json
from pathlib import Path


class Model:
    def __init__(self, directory, rank=16):
        c = json.loads((Path(directory) / "config.json").read_text())
        self.hidden, self.layers, self.vocab = c["hidden_size"], c["num_hidden_layers"], c["vocab_size"]
        head_dim = c.get("head_dim") or self.hidden // c["num_attention_heads"]
        self.query = c["num_attention_heads"] * head_dim
        key, inner = c.get("num_key_value_heads", c["num_attention_heads"]) * head_dim, c["intermediate_size"]
        # (inputs, outputs) of the products before the attention on rows that are only looked at, and of the rest.
        self.keys = [(self.hidden, key), (self.hidden, key)]
        self.rest = [(self.hidden, self.query), (self.query, self.hidden), (self.hidden, inner), (self.hidden, inner), (inner, self.hidden)]
        self.rank = rank

    def _linears(self, shapes, adapter, backward, below=True):
        """A row of some linear layers."""
        total = 0
        for i, o in shapes:
            low = 2 * self.rank * (i + o) if adapter else 0
            total += 2 * i * o + low
            if backward:
                # dx and its part through the adapter; du, dB, dA.
                total += (2 * i * o + 2 * self.rank * i if below else 0) + 2 * self.rank * (2 * o + i)
        return total

    def sequences(self, prompt, responses, adapter, backward):
        """A prompt of so many tokens with its responses, forward and, if so said, backward."""
        fed = [r - 1 for r in responses]
        rows, needed, trained = prompt + sum(fed), 1 + sum(fed), sum(responses)
        pairs = prompt * (prompt + 1) // 2 + sum(f * prompt + f * (f + 1) // 2 for f in fed)
        needed_pairs = pairs - prompt * (prompt - 1) // 2
        attention = (4 + (8 if backward else 0)) * self.query
        total = 0
        for layer in range(self.layers):
            last, below = layer == self.layers - 1, layer > 0
            n = needed if last else rows
            total += rows * self._linears(self.keys, adapter, backward, below)
            total += n * self._linears(self.rest[:1], adapter, backward, below)
            total += n * self._linears(self.rest[1:], adapter, backward)
            total += (needed_pairs if last else pairs) * attention
        head = 2 * trained * self.vocab * self.hidden
        return total + head * (2 if backward else 1)


def needed(model, task, groups, epochs):
    """Of `epochs` epochs over groups of (prompt, [responses]): a list with one number per group and epoch."""
    out = []
    for epoch in range(epochs):
        for index, (prompt, responses) in enumerate(groups):
            flops = model.sequences(prompt, responses, True, True)
            # With labels, each prompt meets the completion of the row before it, under the policy and the reference.
            # The policy's prompts are those of the training pass.
            others = groups[index - 1][1] if task == "labels" else []
            if others:
                flops += model.sequences(prompt, responses + others, True, False) - model.sequences(prompt, responses, True, False)
            if task != "sft" and epoch == 0:
                flops += model.sequences(prompt, responses + others, False, False)
            out.append(flops)
    return out
