// Sums and multiples of whole arrays; twin of elementwise.rs.
//
//   add          x += y                                  [n]
//   scale_rows   y[t, :] = factors[t] x[t, :]            [rows, width]
//
// bf16, computed in f32 and rounded once; factors are f32. Arrays begin at multiples of 16 bytes. Eight elements a
// thread in one access; what a length that is no multiple of 8 leaves over is taken singly. Traffic: 3 · 2 bytes an
// element for add, 2 · 2 for scale_rows.
#include "tile.cuh"

KERNEL(256) elementwise_add(bf16* x, const bf16* y, size_t n) {
    size_t i = (size_t(blockIdx.x) * 256 + threadIdx.x) * 8;
    if (i + 8 <= n) {
        float a[8], b[8];
        unpack8(load16(x + i), a);
        unpack8(load16(y + i), b);
#pragma unroll
        for (int j = 0; j < 8; j++) a[j] += b[j];
        store16(x + i, pack8(a));
        return;
    }
    for (; i < n; i++) x[i] = to_bf16(to_float(x[i]) + to_float(y[i]));
}

// One row a block.
KERNEL(256) elementwise_scale_rows(const bf16* x, const float* factors, bf16* y, uint32_t width) {
    float factor = factors[blockIdx.x];
    x += size_t(blockIdx.x) * width;
    y += size_t(blockIdx.x) * width;
    if (width % 8 == 0) {
        for (uint32_t i = threadIdx.x * 8; i < width; i += 256 * 8) {
            float a[8];
            unpack8(load16(x + i), a);
#pragma unroll
            for (int j = 0; j < 8; j++) a[j] *= factor;
            store16(y + i, pack8(a));
        }
    } else {
        for (uint32_t i = threadIdx.x; i < width; i += 256) y[i] = to_bf16(factor * to_float(x[i]));
    }
}
