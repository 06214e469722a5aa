"""What a step of LoRA training of Qwen2.5-32B is expected to take on one H100 of 80 GB before any of it has run: rank 16 on every
projection, texts of 4096 tokens, as predict.py has it for Mistral-7B. Weights and optimizer leave about 13 GiB, so that most layers
are computed again on the way back, and what they are computed from waits in the machine's memory where that is too much, too.
docs/kernels.md has the table that this prints; the choices are those of `uft check`, and a test holds them to it."""
from predict import (AT_A_TIME, COPY, GRADIENT, RANK, STREAM, TEXT, attention_backward, attention_finish, attention_forward,
                     product)

HIDDEN, KEYS, FEED, LAYERS, VOCABULARY, LENGTH = 5120, 1024, 27648, 64, 152064, TEXT
# As model.py has shapes.
SHAPE = dict(hidden_size=HIDDEN, intermediate_size=FEED, num_hidden_layers=LAYERS, num_attention_heads=40, num_key_value_heads=8,
             head_dim=128, vocab_size=VOCABULARY)
# What an H100 of 80 GB has left for a program, in GiB.
MEMORY = 78
# Bytes a second between the GPU and page-locked memory, each way, through PCIe 5.0.
LINK = 50e9
# Tokens of a micro-batch; of the layers that have not all kept, those whose gate and up alone are computed again and those that are
# whole; and how many inputs of these wait in the machine's memory.
CHOICES = [(4096, 61, 0, 0), (8192, 22, 42, 0), (16384, 0, 64, 8), (32768, 0, 64, 50)]


def step(tokens, gates, whole, offloaded):
    """Seconds of a micro-batch, and of a layer's way forward and its way back, which copies have to keep up with."""
    def linear(columns, depth, **how):
        return product(columns, depth, tokens=tokens, **how)

    def moved(width, share=STREAM):
        return 2 * tokens * width / COPY / share

    # All of a layer but its last product, which nothing needs again.
    again = (linear(HIDDEN, HIDDEN, short=True) + 2 * linear(KEYS, HIDDEN) + linear(HIDDEN, HIDDEN, read=4, short=True)
             + linear(FEED, HIDDEN, width=128, written=6, adapters=2, projected=2, short=True)
             + attention_forward(tokens, HIDDEN, KEYS)
             + 2 * moved(2 * HIDDEN) + moved(FEED / 128 * RANK * 2))
    forward = again + linear(HIDDEN, FEED, read=4)
    back = (linear(FEED, HIDDEN, written=12, read=8, projected=8, gradients=(HIDDEN,))
            + linear(HIDDEN, 2 * FEED, adapters=2, gradients=(FEED, FEED, HIDDEN, FEED))
            + linear(HIDDEN, HIDDEN, gradients=(HIDDEN, HIDDEN), short=True)
            + linear(HIDDEN, HIDDEN + 2 * KEYS, adapters=3, gradients=(HIDDEN, KEYS, KEYS, HIDDEN), short=True)
            + attention_backward(tokens, HIDDEN, KEYS) + attention_finish(tokens, HIDDEN)
            + 2 * moved(4 * HIDDEN)
            + moved(HIDDEN, GRADIENT) + 2 * moved(FEED / 256 * RANK * 2) + moved(2 * 5 * RANK))
    gate_and_up = 2 * linear(FEED, HIDDEN) + moved(2 * HIDDEN)
    head = tokens / AT_A_TIME * (product(VOCABULARY, HIDDEN, read=4, adapters=0, tokens=AT_A_TIME)
                                 + product(HIDDEN, VOCABULARY, read=4, adapters=0, tokens=AT_A_TIME))
    head += 2 * tokens * VOCABULARY / 64 * 8 / COPY / STREAM
    total = LAYERS * (forward + back) + whole * again + gates * gate_and_up + head
    # A copy has a layer's time to arrive; where it needs longer, the GPU waits.
    copied = 2 * tokens * HIDDEN / LINK
    total += offloaded * (max(0, copied - forward) + max(0, copied - back - again))
    return total, forward, back + again, copied


def main():
    print("| tokens of a micro-batch | gate and up again, of layers | whole layers again | inputs offloaded | expected, ms | measured |"
          " ms of a layer forward, back | of its input's copy | tokens a second |\n" + "| --- " * 9 + "|")
    for tokens, gates, whole, offloaded in CHOICES:
        total, forward, back, copied = step(tokens, gates, whole, offloaded)
        print(f"| `{tokens}` | {gates} | {whole} | {offloaded} | {total * 1e3:.0f} | — | {forward * 1e3:.1f}, {back * 1e3:.1f} |"
              f" {copied * 1e3:.1f} | {tokens / total:.0f} |")


if __name__ == "__main__":
    main()
