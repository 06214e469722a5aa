#!/usr/bin/env python3
"""What PyTorch takes for what the kernels do: cuBLAS, SDPA's fastest backend, torch.compile for what moves bytes.

    gpu-kernels | python3 peers.py [--device cuda|cpu] [--seconds S]

Reads the lines of gpu-kernels and prints, for every different `peer` in them, a line of JSON: {"peer": …, "by": what did it,
"ms": the median by CUDA events, "runs": …}. The level-2 cache is overwritten before every run, inputs are normal numbers.
On the processor every peer runs once and has no time: that proves this script."""
import argparse
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F

BF16 = torch.bfloat16


class Clock:
    """Times by events, as the kernels' own are."""

    def __init__(self, device, seconds):
        self.device, self.seconds = device, seconds
        self.flush = torch.empty(256 << 20 if device == "cuda" else 4096, dtype=torch.uint8, device=device)

    def times(self, work):
        """Milliseconds of each run, none on the processor."""
        work()
        if self.device == "cpu":
            return []
        for _ in range(2):
            work()
        torch.cuda.synchronize()
        times, start = [], time.monotonic()
        while len(times) < 200 and (len(times) < 5 or time.monotonic() - start < self.seconds):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            before.record()
            work()
            after.record()
            torch.cuda.synchronize()
            times.append(before.elapsed_time(after))
        return times


class Peers:
    """A method for each op: gives the name of who does it, and a function that does it once."""

    def __init__(self, device):
        self.device = device
        torch.manual_seed(1)
        self.version = f"torch {torch.__version__.partition('+')[0]}"

    def random(self, *shape, dtype=BF16):
        return torch.randn(*shape, device=self.device, dtype=dtype)

    def ids(self, count, bound):
        return torch.arange(count, device=self.device) * 7919 % bound

    def compiled(self, function):
        """The function as torch.compile makes it, where there is something to gain."""
        if self.device == "cpu":
            return f"eager, {self.version}", function
        return f"torch.compile, {self.version}", torch.compile(function, dynamic=False)

    # ---- products ----

    def mm(self, layout, m, k, n):
        left = self.random(k, m).T if layout == "tn" else self.random(m, k)
        right = self.random(n, k).T if layout == "nt" else self.random(k, n)
        out = torch.empty(m, n, device=self.device, dtype=BF16)
        return f"cuBLAS, {self.version}", lambda: torch.mm(left, right, out=out)

    def mm_added(self, m, depths, n):
        pairs = [(self.random(m, depth), self.random(depth, n)) for depth in depths]
        out = torch.empty(m, n, device=self.device, dtype=BF16)

        def work():
            for i, (left, right) in enumerate(pairs):
                torch.addmm(out, left, right, beta=float(i > 0), out=out)
        return f"cuBLAS, one after the other, {self.version}", work

    def gradient_of_b(self, m, n, r):
        dy, u, b = self.random(m, n), self.random(m, r), self.random(n, r)
        return f"cuBLAS, two products, {self.version}", lambda: (dy.T @ u, dy @ b)

    # ---- attention and head ----

    def backends(self):
        from torch.nn.attention import SDPBackend
        if self.device == "cpu":
            return [SDPBackend.MATH]
        return [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]

    def sdpa(self, direction, batch, tokens, heads, kv_heads, head_dim):
        """Every backend that does it: a list of the two."""
        q = self.random(batch, heads, tokens, head_dim).requires_grad_()
        k, v = (self.random(batch, kv_heads, tokens, head_dim).requires_grad_() for _ in range(2))
        dout = self.random(batch, heads, tokens, head_dim)

        def forward():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        def of(backend):
            from torch.nn.attention import sdpa_kernel
            with sdpa_kernel(backend):
                out = forward() if direction == "backward" else None

            def ahead():
                with torch.no_grad(), sdpa_kernel(backend):
                    forward()

            def back():
                torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
            return f"SDPA {backend.name.lower()}, {self.version}", back if direction == "backward" else ahead
        return [(backend, of) for backend in self.backends()]

    def decode(self, tokens, heads, kv_heads, head_dim):
        q = self.random(1, heads, 1, head_dim)
        k, v = (self.random(1, kv_heads, tokens, head_dim) for _ in range(2))
        return f"SDPA, {self.version}", lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def log_probs(self, tokens, vocab, hidden, gradient):
        weight, targets = self.random(vocab, hidden), self.ids(tokens, vocab)
        x = self.random(tokens, hidden).requires_grad_(gradient)
        name, chunk = self.compiled(lambda h, t: -F.cross_entropy(F.linear(h, weight).float(), t, reduction="none"))

        def work():
            for h, t in zip(x.split(1024), targets.split(1024)):
                logp = chunk(h, t)
                if gradient:
                    torch.autograd.grad(logp.sum(), h)
        return f"{name}, chunks of 1024", work if gradient else torch.no_grad()(work)

    # ---- what moves bytes ----

    def copy(self, bytes):
        source = self.random(bytes // 2)
        target = torch.empty_like(source)
        return self.version, lambda: target.copy_(source)

    @staticmethod
    def normed(x, w):
        wide = x.float()
        return (w * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(BF16)).to(BF16)

    def rmsnorm(self, rows, width):
        x, w = self.random(rows, width), self.random(width)
        name, norm = self.compiled(self.normed)
        return name, lambda: norm(x, w)

    def rmsnorm_residual(self, rows, width):
        x, residual, w = self.random(rows, width), self.random(rows, width), self.random(width)

        def both(x, residual, w):
            total = x + residual
            return total, self.normed(total, w)
        name, norm = self.compiled(both)
        return name, lambda: norm(x, residual, w)

    def rmsnorm_backward(self, rows, width):
        x, dy, dx, w = self.random(rows, width), self.random(rows, width), self.random(rows, width), self.random(width)

        def back(dy, x, w, dx):
            wide = x.float()
            s = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
            g = w.float() * dy.float()
            return dx.copy_((dx.float() + s * g - wide * s.pow(3) * (g * wide).mean(-1, keepdim=True)).to(BF16))
        name, back = self.compiled(back)
        return name, lambda: back(dy, x, w, dx)

    def rope(self, rows, heads, head_dim):
        x, angles = self.random(rows, heads, head_dim), torch.rand(rows, 1, head_dim // 2, device=self.device)
        cos, sin = angles.cos(), angles.sin()

        def turn(x, cos, sin):
            a, b = x.float().chunk(2, -1)
            return x.copy_(torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(BF16))
        name, turn = self.compiled(turn)
        return name, lambda: turn(x, cos, sin)

    def swiglu(self, numbers):
        gate, up = self.random(numbers), self.random(numbers)
        name, act = self.compiled(lambda gate, up: (F.silu(gate.float()) * up.float()).to(BF16))
        return name, lambda: act(gate, up)

    def swiglu_backward(self, numbers):
        gate, up, dout = self.random(numbers), self.random(numbers), self.random(numbers)

        def back(dout, gate, up):
            dout, gate, up = dout.float(), gate.float(), up.float()
            s = torch.sigmoid(gate)
            return (dout * up * s * (1 + gate * (1 - s))).to(BF16), (dout * gate * s).to(BF16)
        name, back = self.compiled(back)
        return name, lambda: back(dout, gate, up)

    def add(self, rows, width):
        x, y = self.random(rows, width), self.random(rows, width)
        return self.version, lambda: x.add_(y)

    def scale_rows(self, rows, width):
        x, factors = self.random(rows, width), self.random(rows, 1, dtype=torch.float32)
        name, scale = self.compiled(lambda x, factors: (x.float() * factors).to(BF16))
        return name, lambda: scale(x, factors)

    def gather(self, rows, width, vocab):
        table, ids = self.random(vocab, width), self.ids(rows, vocab)
        return self.version, lambda: F.embedding(ids, table)

    def scatter(self, rows, width, vocab):
        x, factors = self.random(rows // 2, width), self.random(rows // 2, 1)
        ids, out = torch.arange(rows // 2, device=self.device) * 2, self.random(rows, width)
        name, spread = self.compiled(lambda x, factors, ids, out: out.zero_().index_add_(0, ids, x * factors))
        return name, lambda: spread(x, factors, ids, out)

    def adamw(self, numbers):
        each = numbers // 448
        params = [torch.nn.Parameter(self.random(each, dtype=torch.float32)) for _ in range(448)]
        for param in params:
            param.grad = self.random(each, dtype=torch.float32)
        optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)
        return f"fused AdamW, no copies in bf16, {self.version}", optimizer.step

    def norm(self, numbers):
        grads = [self.random(numbers // 448, dtype=torch.float32) for _ in range(448)]
        return self.version, lambda: torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))).item()


def measured(peer, peers, clock):
    """The record of a peer: the fastest where there are several."""
    arguments = {key: value for key, value in peer.items() if key != "op"}
    made = getattr(peers, peer["op"])(**arguments)
    best, errors = None, []
    for choice in made if isinstance(made, list) else [made]:
        try:
            by, work = choice[1](choice[0]) if isinstance(made, list) else choice
            times = clock.times(work)
        except RuntimeError as error:  # a backend that does not do it
            errors.append(str(error).splitlines()[0])
            continue
        median = statistics.median(times) if times else None
        if best is None or (median is not None and median < best["ms"]):
            best = {"peer": peer, "by": by, "ms": median, "runs": max(len(times), 1)}
    return best or {"peer": peer, "error": "; ".join(errors)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=0.25)
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    peers, clock, seen = Peers(options.device), Clock(options.device, options.seconds), set()
    for line in sys.stdin:
        peer = json.loads(line).get("peer")
        key = json.dumps(peer, sort_keys=True)
        if not peer or key in seen:
            continue
        seen.add(key)
        try:
            record = measured(peer, peers, clock)
        except Exception as error:  # the others go on
            record = {"peer": peer, "error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        print(json.dumps(record), flush=True)
        if options.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
