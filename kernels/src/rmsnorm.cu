// Root-mean-square normalisation, as in rmsnorm.rs:
//
//   forward    s = 1 / sqrt(mean(x²) + eps)        y = w (x s)
//   backward   g = w dy                            dx += s g - x s³ mean(g x)
//
// x, y, dy, dx [rows, width] and w [width] in bf16, s [rows] in f32; sums in f32.
//
// A row belongs to a team of TEAM threads, a part of a warp or the whole block, so that a head of 128 numbers
// keeps as many threads busy as a hidden state of 8192. A thread has every TEAM-th piece of 16 bytes (8 numbers), PIECES
// of them at most, and keeps what it read in registers: every number is read once and written once.
//
// Shared memory: one float a warp, for the sum where a team is a block.
//
// Bound by memory: forward moves 4 bytes a number, 8 with the residual, backward 8.
#include "device.cuh"

constexpr int NUMBERS = 8;
constexpr int ROWS = THREADS / TEAM;

// Of the team; every thread of the block comes here.
DEVICE float team_sum(float x) {
    if (TEAM > WARP) return block_sum(x, reinterpret_cast<float*>(dynamic_shared()));
#pragma unroll
    for (int distance = TEAM / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}

DEVICE float2 pair_of(const uint4& piece, int i) {
    return unpack_bf16(i == 0 ? piece.x : i == 1 ? piece.y : i == 2 ? piece.z : piece.w);
}

DEVICE uint4 packed(const float2 (&pairs)[4]) {
    return make_uint4(pack_bf16(pairs[0].x, pairs[0].y), pack_bf16(pairs[1].x, pairs[1].y),
                      pack_bf16(pairs[2].x, pairs[2].y), pack_bf16(pairs[3].x, pairs[3].y));
}

// The row that this thread works at; past the last one it computes with zeros and writes nothing.
DEVICE long long row_index() { return (long long)blockIdx.x * ROWS + threadIdx.x / TEAM; }

// The first number of this thread's i-th piece.
DEVICE int column(int i) { return (i * TEAM + int(threadIdx.x) % TEAM) * NUMBERS; }

// y and s of a row of which the team holds the pieces.
DEVICE void normalise(const uint4 (&x)[PIECES], const bf16* w, float eps, bf16* y, float* inv_rms, bool in_range,
                      int width) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float2 pair = pair_of(x[i], j);
            squares += pair.x * pair.x + pair.y * pair.y;
        }
    }
    float s = 1.0f / sqrtf(team_sum(squares) / float(width) + eps);
    if (!in_range) return;
    if (threadIdx.x % TEAM == 0) *inv_rms = s;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        if (column(i) >= width) continue;
        uint4 weight = load16(w + column(i));
        float2 out[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float2 a = pair_of(x[i], j), b = pair_of(weight, j);
            out[j] = make_float2(b.x * (a.x * s), b.y * (a.y * s));
        }
        store16(y + column(i), packed(out));
    }
}

KERNEL(THREADS) rmsnorm_forward(const bf16* x, const bf16* w, float eps, bf16* y, float* inv_rms, long long rows, int width) {
    long long row = row_index();
    bool in_range = row < rows;
    uint4 pieces[PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; i++)
        pieces[i] = in_range && column(i) < width ? load16(x + row * width + column(i)) : make_uint4(0, 0, 0, 0);
    normalise(pieces, w, eps, y + row * width, inv_rms + row, in_range, width);
}

// The same of sum = x + residual, which is rounded and kept: what backward calls x.
KERNEL(THREADS) rmsnorm_forward_residual(const bf16* x, const bf16* residual, const bf16* w, float eps, bf16* sum, bf16* y, float* inv_rms, long long rows, int width) {
    long long row = row_index();
    bool in_range = row < rows;
    uint4 pieces[PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        pieces[i] = make_uint4(0, 0, 0, 0);
        if (!in_range || column(i) >= width) continue;
        long long at = row * width + column(i);
        uint4 left = load16(x + at), right = load16(residual + at);
        float2 out[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float2 a = pair_of(left, j), b = pair_of(right, j);
            out[j] = make_float2(a.x + b.x, a.y + b.y);
        }
        pieces[i] = packed(out);
        store16(sum + at, pieces[i]);
    }
    normalise(pieces, w, eps, y + row * width, inv_rms + row, in_range, width);
}

KERNEL(THREADS) rmsnorm_backward(const bf16* dy, const bf16* x, const bf16* w, const float* inv_rms, bf16* dx, long long rows, int width) {
    long long row = row_index();
    bool in_range = row < rows;
    uint4 kept_x[PIECES], kept_dy[PIECES];
    float mixed = 0.0f;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        kept_x[i] = kept_dy[i] = make_uint4(0, 0, 0, 0);
        if (!in_range || column(i) >= width) continue;
        kept_x[i] = load16(x + row * width + column(i));
        kept_dy[i] = load16(dy + row * width + column(i));
        uint4 weight = load16(w + column(i));
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float2 a = pair_of(kept_x[i], j), b = pair_of(kept_dy[i], j), c = pair_of(weight, j);
            mixed += c.x * b.x * a.x + c.y * b.y * a.y;
        }
    }
    mixed = team_sum(mixed);
    if (!in_range) return;
    float s = inv_rms[row];
    float shared = s * s * s * (mixed / float(width));
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        if (column(i) >= width) continue;
        uint4 weight = load16(w + column(i)), before = load16(dx + row * width + column(i));
        float2 out[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float2 a = pair_of(kept_x[i], j), b = pair_of(kept_dy[i], j), c = pair_of(weight, j);
            float2 d = pair_of(before, j);
            out[j] = make_float2(d.x + (s * (c.x * b.x) - a.x * shared), d.y + (s * (c.y * b.y) - a.y * shared));
        }
        store16(dx + row * width + column(i), packed(out));
    }
}
