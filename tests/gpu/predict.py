"""What a step of LoRA training is expected to take on an H100, kernel by kernel, before any of it has run: Mistral-7B's shapes,
rank 16 on every projection, 16,384 tokens in texts of 4096, nothing computed again. docs/kernels.md has the table that this prints.

Products on Hopper go tile by tile: as many rounds as the fullest multiprocessor has tiles, each its slices of 64 of the depth and then
its pieces on their way out, which nothing overlaps but the next tile's loads. Attention goes task by task, each all tiles that it
meets and what nothing overlaps: the first tile's softmax and the writing, where a block has one task alone also the loads before it.
What moves bytes takes a share of a copy's speed. Gradients of adapters are tasks of clusters that have a tile less than others. A product
that begins with u or du of adapters is two launches, of which the first reads all rows for few columns."""
from math import ceil, inf

TOKENS, TEXT, HIDDEN, KEYS, FEED, LAYERS = 16384, 4096, 4096, 1024, 14336, 32
HEAD_DIM = 128
# The head takes so many tokens at a time.
VOCABULARY, AT_A_TIME = 32000, 1024
# Of an H100: operations and bytes a second that others have measured, multiprocessors.
CEILING, COPY, PROCESSORS = 798e12, 3.0e12, 132
# Guesses, to be replaced by what the first run says: the loop's operations a second, seconds to write a piece of 64 x 64 for each
# warpgroup, to wait for one that is added to or read, to multiply one by an adapter's rank, and until the first tile's loads are there.
LOOP, WRITE, READ, PROJECT, START = 840e12, 0.35e-6, 0.25e-6, 0.15e-6, 6e-6
# Likewise of attention: two warpgroups that take turns, and as much work beside the products as forward has (FlashAttention-3 reaches
# 650 where no task is short), or products of 64 columns of which both operands come from shared memory, or those whose sums of dq are
# added to memory, too (FlashAttention-3 reaches 560 adding in any order); seconds of a task in a block with several, and of a block
# with one; from a sum that is added to the next block's turn.
FORWARD, BACKWARD, ADDING, TASK, BLOCK, TURN = 620e12, 600e12, 560e12, 1.5e-6, 2.5e-6, 1.5e-6
# Likewise of a gradient's task: bytes a second that one multiprocessor fetches, and seconds until its sums are added.
FETCH, ADD = 90e9, 2e-6
# Shares of a copy's speed, for kernels that stream and for an adapter's gradients.
STREAM, GRADIENT = 0.85, 0.80
# Of a slice of 64, what an adapter of rank 16 multiplies; of a tile, what its short sides do: up to 64 columns, of which few take as long
# as all, since the left factor is read again.
RANK = 16
ADAPTER = RANK / 64
SHORT = 64 / 256


def product(columns, depth, width=256, written=4, read=0, adapters=1, projected=0, tokens=TOKENS, gradients=(), short=False):
    """A tile of 256 columns of the weight makes `width` of the output; `written`, `read` and `projected` are its pieces. `gradients`
    have so many columns, a task for 256 of them; clusters take them as kernels/src/matmul/cuda/hopper/gradients.rs gives them out. It
    begins with `short` sides, of as many columns as kernels/src/matmul/cuda/hopper/short.rs says."""
    clusters = PROCESSORS // 2
    down, across = ceil(tokens / 256), ceil(columns / width)
    slices, slice = ceil(depth / 64) + adapters * ADAPTER, 2 * 128 * 256 * 64 * PROCESSORS / LOOP
    tile = slices * slice + written * WRITE + read * READ + projected * PROJECT
    tasks, task = sum(ceil(columns / 256) for columns in gradients), 2 * tokens * 128 / FETCH + ADD
    begun = 0
    if short:
        first = first_columns(clusters, down, across, depth)
        rounds, busy = divmod(down * first, clusters)
        # Those of so many columns run at once, and all their rows are read once for them.
        rows = min(tokens, 256 * ceil(clusters / first))
        tile_and_short = max(tile + slices * slice * SHORT, 2 * rows * depth / COPY / STREAM)
        begun = START + (rounds + (busy > 0)) * tile_and_short
        tasks -= min(tasks, (clusters - busy) * int(tile_and_short / task)) if busy else 0
        across -= first
    rounds, busy = divmod(down * across, clusters)
    idle = clusters - busy

    def last(of_idle):
        rest = max(0, tasks - of_idle * idle)
        of_busy = tile + ceil(rest / busy) * task if busy else inf if rest else 0
        return max(of_busy, of_idle * task)
    return begun + START + rounds * tile + min(map(last, range(ceil(tasks / idle) + 1)))


def first_columns(clusters, down, across, depth):
    """As kernels/src/matmul/cuda/hopper/short.rs has it, in sixteenths of a slice."""
    slices = ceil(depth / 64)
    wide, plain = 20 * slices + 32, 16 * slices + 32

    def time(first):
        rest = across - first
        return ceil(down * first / clusters) * wide + (150 + ceil(down * rest / clusters) * plain if rest else 0)
    return min(range(1, across + 1), key=time)


def operations(columns, depth, tokens=TOKENS):
    return 2 * tokens * columns * depth / CEILING


def moved(width, share=STREAM):
    """Two bytes for each of so many numbers a token."""
    return 2 * TOKENS * width / COPY / share


class Product:
    """`alone`: the same without adapters."""

    def __init__(self, name, calls, columns, depth, tokens=TOKENS, alone=None, **tile):
        self.name, self.calls = name, calls
        self.seconds = product(columns, depth, tokens=tokens, **tile)
        alone = {"adapters": 0, "projected": 0, "gradients": (), "short": False} | (alone or {})
        self.without = product(columns, depth, tokens=tokens, **(tile | alone))
        # A tile that is half gate and half up makes two outputs.
        self.least = operations(columns * 256 // tile.get("width", 256), depth, tokens)


def of_queries(products, speed, tokens=TOKENS, hidden=HIDDEN, keys=KEYS):
    """Tasks are tiles of 128 queries, of which a row is a head of one token, and meet tiles of 128 keys."""
    sharing = hidden // keys
    firsts = range(0, TEXT, 128 // sharing)
    steps = sum(ceil((first + 128 // sharing) / 128) for first in firsts)
    alike = tokens // TEXT * keys // HEAD_DIM
    step = products * 2 * 128 * 128 * HEAD_DIM * PROCESSORS / speed
    return START + alike * (steps * step + len(firsts) * TASK) / PROCESSORS


def of_keys(products, speed, adding=False, tokens=TOKENS, hidden=HIDDEN, keys=KEYS):
    """Blocks are tiles of 128 keys and meet tiles of 64 queries, whose sums of dq each may add to. Those that work at the same queries
    then follow each other a step and a turn apart; memory sees q, dout and the sums once for all of them."""
    sharing = hidden // keys
    firsts = range(0, TEXT, 128)
    steps = sum(ceil((TEXT - first) / (64 // sharing)) for first in firsts)
    alike = tokens // TEXT * keys // HEAD_DIM
    step, stagger = products * 2 * 128 * 64 * HEAD_DIM * PROCESSORS / speed, 0
    if adding:
        together = max(PROCESSORS / alike, 1)
        step = max(step, (2 * 2 + 2 * 4) * 64 * HEAD_DIM / together * PROCESSORS / COPY)
        stagger = together * (step + TURN)
    return START + stagger + alike * (steps * step + len(firsts) * BLOCK) / PROCESSORS


def attention_forward(*shape):
    return of_queries(2, FORWARD, *shape)


def attention_backward(*shape):
    return of_keys(5, ADDING, True, *shape)


def attention_finish(tokens=TOKENS, hidden=HIDDEN):
    """Sums of four bytes become numbers of two."""
    return 6 * tokens * hidden / COPY / STREAM


def visible(products):
    """Operations of so many products over all pairs that see each other, at the ceiling."""
    return products * 2 * HIDDEN * TOKENS * (TEXT + 1) / 2 / CEILING


# Name, calls a layer, columns and depth.
OF_HEAD = TOKENS / AT_A_TIME / LAYERS
HOPPER = [
    Product("`hopper_nt_rope`: q, and u of q, k and v", 1, HIDDEN, HIDDEN, short=True),
    Product("`hopper_nt_rope`: k", 1, KEYS, HIDDEN),
    Product("`hopper_nt`: v", 1, KEYS, HIDDEN),
    Product("`hopper_nt`: o, its u, and the residual", 1, HIDDEN, HIDDEN, read=4, short=True),
    Product("`hopper_nt_swiglu`: gate and up, their u, and u of down", 1, FEED, HIDDEN, width=128, written=6, adapters=2, projected=2,
            short=True),
    Product("`hopper_nt`: down, and the residual", 1, HIDDEN, FEED, read=4),
    Product("`hopper_nn_swiglu_backward`: down, its input and dB, and du of gate and up", 1, FEED, HIDDEN, written=12, read=8,
            projected=8, gradients=(HIDDEN,), alone={"written": 8}),
    # dB of each, dA of what they read, which is read once, and dA of down.
    Product("`hopper_nn`: gate and up, their dA and dB, and dA of down", 1, HIDDEN, 2 * FEED, adapters=2,
            gradients=(FEED, FEED, HIDDEN, FEED)),
    Product("`hopper_nn`: o, du, dA and dB", 1, HIDDEN, HIDDEN, gradients=(HIDDEN, HIDDEN), short=True),
    Product("`hopper_nn`: q, k and v, du, dA and dB", 1, HIDDEN, HIDDEN + 2 * KEYS, adapters=3, gradients=(HIDDEN, KEYS, KEYS, HIDDEN),
            short=True),
    # Exponentials take about as long as a piece that is read, and so does the target's row of W.
    Product("`hopper_logprob_logits`, 1024 tokens", OF_HEAD, VOCABULARY, HIDDEN, read=4, adapters=0, tokens=AT_A_TIME),
    Product("`hopper_logprob_backward`, 1024 tokens", OF_HEAD, HIDDEN, VOCABULARY, read=4, adapters=0, tokens=AT_A_TIME),
]
# Name, calls a layer, seconds of a call, and seconds at the ceiling.
ATTENTION = [
    ("`hopper_attention_forward`", 1, attention_forward(), visible(2)),
    ("`hopper_attention_backward`", 1, attention_backward(), visible(5)),
    ("`hopper_attention_backward_finish`", 1, attention_finish(), attention_finish() * STREAM),
    # What these are compared with.
    ("`hopper_attention_backward_keys`", 0, of_keys(4, BACKWARD), visible(4)),
    ("`hopper_attention_backward_queries`", 0, of_queries(3, BACKWARD), visible(3)),
]
# Of a layer: delta of attention, norms.
PORTABLE = [
    ("attention's delta", moved(2 * HIDDEN)),
    ("norms, forward and back", 2 * moved(2 * HIDDEN) + 2 * moved(4 * HIDDEN)),
]
# Of a layer, what adapters read besides: u of down comes in parts of 128 columns, four bytes each, from the product that makes its input,
# and du of gate and up in parts of 256 from the one that makes their gradients; dy of down is read for its du; du is put beside each other
# where an input is shared. All else is in products.
ADAPTERS = [
    ("u", moved(FEED / 128 * RANK * 2)),
    ("du", moved(HIDDEN, GRADIENT) + 2 * moved(FEED / 256 * RANK * 2) + moved(2 * 5 * RANK)),
]
# Once a step: strips of the head's softmax, AdamW.
ONCE = 2 * TOKENS * VOCABULARY / 64 * 8 / COPY / STREAM + 0.6e-3


def main():
    print("| on Hopper | ms, at the ceiling | expected | measured | ms of a step |\n| --- | --- | --- | --- | --- |")
    products = [(it.name, it.calls, it.seconds, it.least) for it in HOPPER]
    for name, calls, seconds, least in products + ATTENTION:
        print(f"| {name} | {least * 1e3:.3f} | {seconds * 1e3:.3f} | — | {calls * seconds * LAYERS * 1e3:.1f} |")
    of_step = 0
    for what, kernels in ("products", products), ("attention", ATTENTION):
        total = sum(calls * seconds for _, calls, seconds, _ in kernels) * LAYERS
        floor = sum(calls * seconds for _, calls, _, seconds in kernels) * LAYERS
        print(f"{what}: {total * 1e3:.0f} ms of a step, {floor / total:.1%} of the ceiling")
        of_step += total
    head = HOPPER[-2].seconds + HOPPER[-1].seconds
    print(f"head, forward and back: {4 * AT_A_TIME * VOCABULARY * HIDDEN / head / 1e12:.0f} TFLOP/s")
    ahead, back = ATTENTION[0][2], sum(calls * seconds for _, calls, seconds, _ in ATTENTION[1:]) + PORTABLE[0][1]
    print(f"attention forward: {visible(2) * CEILING / ahead / 1e12:.0f} TFLOP/s")
    print(f"attention backward, as of five products: {visible(5) * CEILING / back / 1e12:.0f} TFLOP/s")
    for name, seconds in PORTABLE + ADAPTERS:
        print(f"{name}: {seconds * LAYERS * 1e3:.1f} ms of a step")
    step = of_step + sum(seconds for _, seconds in PORTABLE + ADAPTERS) * LAYERS + ONCE
    inside = sum(it.calls * (it.seconds - it.without) for it in HOPPER) * LAYERS
    adapters = inside + sum(seconds for _, seconds in ADAPTERS) * LAYERS
    print(f"a step: {step * 1e3:.0f} ms, {TOKENS / step:.0f} tokens a second")
    print(f"adapters: {adapters * 1e3:.1f} ms, {adapters / step:.1%} of the step, {inside * 1e3:.1f} ms of it inside products")


if __name__ == "__main__":
    main()
