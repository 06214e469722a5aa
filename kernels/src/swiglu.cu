// The gated activation of the feed-forward block (Shazeer 2020, "GLU Variants Improve Transformer"); twin of
// swiglu.rs.
//
//   σ = 1 / (1 + e^-gate)
//   forward    out   = gate σ up
//   backward   dup   = dout gate σ
//              dgate = dout up σ (1 + gate (1 - σ)), in the places of up and gate; out once more, if it is asked for
//
// All arrays are [n] bf16, computed in f32 and rounded once, and begin at multiples of 16 bytes; results are
// overwritten. Eight elements a thread in one access; where n is no multiple of 8, the last thread takes what is left
// singly. Traffic: 3 · 2 bytes an element forward, 5 · 2 backward, 6 · 2 with out.
#include "swiglu.cuh"
#include "tile.cuh"

KERNEL(256) swiglu_forward(const bf16* gate, const bf16* up, bf16* out, size_t n) {
    size_t i = (size_t(blockIdx.x) * 256 + threadIdx.x) * 8;
    if (i + 8 <= n) {
        float g[8], u[8], o[8];
        unpack8(load16(gate + i), g);
        unpack8(load16(up + i), u);
#pragma unroll
        for (int j = 0; j < 8; j++) o[j] = activated(activate(g[j]), u[j]);
        store16(out + i, pack8(o));
        return;
    }
    for (; i < n; i++) out[i] = to_bf16(activated(activate(to_float(gate[i])), to_float(up[i])));
}

KERNEL(256) swiglu_backward(const bf16* dout, bf16* gate, bf16* up, bf16* out, size_t n) {
    size_t i = (size_t(blockIdx.x) * 256 + threadIdx.x) * 8;
    if (i + 8 <= n) {
        float d[8], g[8], u[8], o[8];
        unpack8(load16(dout + i), d);
        unpack8(load16(gate + i), g);
        unpack8(load16(up + i), u);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            Activation it = activate(g[j]);
            o[j] = activated(it, u[j]);
            float2 both = slopes(d[j], it, u[j]);
            g[j] = both.x;
            u[j] = both.y;
        }
        store16(gate + i, pack8(g));
        store16(up + i, pack8(u));
        if (out) store16(out + i, pack8(o));
        return;
    }
    for (; i < n; i++) {
        Activation it = activate(to_float(gate[i]));
        float u = to_float(up[i]);
        float2 both = slopes(to_float(dout[i]), it, u);
        gate[i] = to_bf16(both.x);
        up[i] = to_bf16(both.y);
        if (out) out[i] = to_bf16(activated(it, u));
    }
}
