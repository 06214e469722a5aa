// What attention's kernels for every GPU share: tiles in shared memory, products and softmax of a warp. The lesson is in
// attention.cu.
//
// Constants from outside: HEAD_DIM, SHARING, MET.
#pragma once

#include "rows.cuh"

constexpr int DIM = (HEAD_DIM + 15) / 16 * 16;
constexpr int CHUNKS = DIM / 8;
constexpr int THREADS = 128;
constexpr int WARPS = THREADS / WARP;

static_assert(HEAD_DIM % 2 == 0 && HEAD_DIM <= 128, "head_dim must be even and at most 128");
static_assert(SHARING <= MET, "at most 64 query heads may share a key head");

// ---- tiles in shared memory ----

// Where chunk `chunk` of row `row` begins. With g the largest power of two up to 8 in CHUNKS, 8 / g rows lie in different
// banks by themselves; the permutation separates the g rows that would not. Eight rows on it is the same.
DEVICE int chunk_offset(int row, int chunk) {
    constexpr int CLASHING = CHUNKS % 8 == 0 ? 8 : CHUNKS % 4 == 0 ? 4 : 2;
    return row * DIM + (chunk ^ row / (8 / CLASHING) % CLASHING) * 8;
}

// The same for chunk `even + odd`, `odd` 0 or 1, in a form that leaves a loop over `even` few addresses to keep.
DEVICE int pair_offset(int row, int even, int odd) {
    constexpr int CLASHING = CHUNKS % 8 == 0 ? 8 : CHUNKS % 4 == 0 ? 4 : 2;
    int permutation = row / (8 / CLASHING) % CLASHING ^ odd;
    return row * DIM + even / CLASHING * CLASHING * 8 + (even % CLASHING ^ permutation) * 8;
}

// Starts copying `there` rows that begin at `source` into a tile, zeros behind them; rows lie as those of a span do.
template <int sharing, int rows>
DEVICE void load_rows(bf16* tile, const bf16* source, int there, int kv_heads) {
    int thread = thread_index_again();
    // Where rows lie at uneven distances, an offset for each would take registers.
    constexpr int UNROLLED = THREADS / 8 % sharing == 0 ? rows / (THREADS / 8) : 1;
#pragma unroll
    for (int first = 0; first < CHUNKS; first += 8) {
        int chunk = first + thread % 8;
        if (CHUNKS % 8 != 0 && chunk >= CHUNKS) continue;
#pragma unroll UNROLLED
        for (int step = 0; step < rows; step += THREADS / 8) {
            int row = step + thread / 8;
            bool valid = row < there && chunk * 8 < HEAD_DIM;
            const bf16* from = valid ? source + row_within<sharing>(row, kv_heads) * HEAD_DIM + chunk * 8 : source;
            bf16* to = tile + step * DIM + chunk_offset(thread / 8, chunk);
            if (HEAD_DIM % 8 == 0) {
                copy_async16(to, from, valid);
            } else {
                // Rows that do not begin at a multiple of 16 bytes: only toy models have them.
                for (int i = 0; i < 8; i++) to[i] = valid && chunk * 8 + i < HEAD_DIM ? from[i] : to_bf16(0.0f);
            }
        }
    }
}

// Starts copying a span's rows.
template <int sharing, int rows>
DEVICE void load_tile(bf16* tile, const bf16* matrix, const Span& span, int kv_heads) {
    const bf16* source = matrix + first_row<sharing>(span, kv_heads) * HEAD_DIM;
    load_rows<sharing, rows>(tile, source, span.tokens * sharing, kv_heads);
}

// Writes a warp's sums, `factors` applied per row, to the rows of its span. They go through rows `first` .. of `tile`, which
// no other warp reads, so that memory is written 16 bytes at a time.
template <int sharing, int F>
DEVICE void store_rows(bf16* tile, int first, const float (&sums)[F][CHUNKS][4], const float (&factors)[F][2],
                       bf16* matrix, const Span& span, int kv_heads) {
    int lane = lane_index();
#pragma unroll
    for (int f = 0; f < F; f++) {
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                bf16* to = tile + chunk_offset(first + 16 * f + 8 * half + lane / 4, c) + lane % 4 * 2;
                float factor = factors[f][half];
                *reinterpret_cast<uint32_t*>(to) = pack_bf16(sums[f][c][2 * half] * factor, sums[f][c][2 * half + 1] * factor);
            }
        }
    }
    __syncwarp();
    bf16* target = matrix + first_row<sharing>(span, kv_heads) * HEAD_DIM;
    for (int index = lane; index < 16 * F * CHUNKS; index += WARP) {
        int row = first + index / CHUNKS, chunk = index % CHUNKS;
        if (row >= span.tokens * sharing || chunk * 8 >= HEAD_DIM) continue;
        bf16* to = target + row_within<sharing>(row, kv_heads) * HEAD_DIM + chunk * 8;
        bf16* from = tile + chunk_offset(row, chunk);
        if (HEAD_DIM % 8 == 0) {
            store16(to, load16(from));
        } else {
            for (int i = 0; i < 8 && chunk * 8 + i < HEAD_DIM; i++) to[i] = from[i];
        }
    }
}

// ---- products of a warp; sums [f][n] is rows 16 f .., columns 8 n .. as mma_bf16 lays them out ----

template <int F, int N>
DEVICE void set_zero(float (&sums)[F][N][4]) {
#pragma unroll
    for (int f = 0; f < F; f++) {
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) sums[f][n][i] = 0.0f;
        }
    }
}

// sums = a · bᵀ: rows a_row .. of tile `a`, rows b_row .. of tile `b`.
template <int F, int N>
DEVICE void product_transposed(float (&sums)[F][N][4], bf16* a, int a_row, bf16* b, int b_row) {
    int lane = thread_index_again() % WARP;
    set_zero(sums);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk += 2) {
        uint32_t left[F][4];
#pragma unroll
        for (int f = 0; f < F; f++) ldmatrix_x4(left[f], a + (a_row + 16 * f) * DIM + pair_offset(lane % 16, chunk, lane / 16));
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t right[4];
            ldmatrix_x4(right, b + (b_row + 8 * n) * DIM + pair_offset(lane / 16 * 8 + lane % 8, chunk, lane / 8 % 2));
            uint32_t even[2] = {right[0], right[1]}, odd[2] = {right[2], right[3]};
#pragma unroll
            for (int f = 0; f < F; f++) {
                mma_bf16(sums[f][n], left[f], even);
                mma_bf16(sums[f][n + 1], left[f], odd);
            }
        }
    }
}

// sums += weights · b: the weights rounded to bf16, a column for each of the rows b_row .. of tile `b`.
template <int F, int N>
DEVICE void add_product(float (&sums)[F][CHUNKS][4], const float (&weights)[F][N][4], bf16* b, int b_row) {
    int lane = thread_index_again() % WARP;
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        uint32_t left[F][4];
#pragma unroll
        for (int f = 0; f < F; f++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* pair = &weights[f][n + i / 2][i % 2 * 2];
                left[f][i] = pack_bf16(pair[0], pair[1]);
            }
        }
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk += 2) {
            uint32_t right[4];
            ldmatrix_x4_transposed(right, b + (b_row + 8 * n) * DIM + pair_offset(lane % 16, chunk, lane / 16));
            uint32_t even[2] = {right[0], right[1]}, odd[2] = {right[2], right[3]};
#pragma unroll
            for (int f = 0; f < F; f++) {
                mma_bf16(sums[f][chunk], left[f], even);
                mma_bf16(sums[f][chunk + 1], left[f], odd);
            }
        }
    }
}

// Scores outside `visible`, which is per row and counts columns from `first`, become -inf.
template <int F, int N>
DEVICE void hide(float (&scores)[F][N][4], const Columns (&visible)[F][2], int first) {
    int lane = thread_index_again() % WARP;
#pragma unroll
    for (int f = 0; f < F; f++) {
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int column = first + 8 * n + lane % 4 * 2 + i % 2;
                Columns seen = visible[f][i / 2];
                if (column < seen.first || column >= seen.end) scores[f][n][i] = NEG_INFINITY;
            }
        }
    }
}

// Softmax over columns that arrive tile by tile (Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"),
// exponents in base 2. Of each row: the largest score so far, Σ 2^(score - top) over this lane's columns, Σ 2^(score - top) v.
template <int F>
struct OnlineSoftmax {
    float top[F][2], sum[F][2], out[F][CHUNKS][4];
};

template <int F>
DEVICE void start(OnlineSoftmax<F>& state) {
#pragma unroll
    for (int f = 0; f < F; f++) {
        state.top[f][0] = state.top[f][1] = NEG_INFINITY;
        state.sum[f][0] = state.sum[f][1] = 0.0f;
    }
    set_zero(state.out);
}

// Turns a tile's scores into weights 2^(scale·score - top), with the state brought up to date but for these columns' v.
template <int F, int N>
DEVICE void soften(OnlineSoftmax<F>& state, float (&scores)[F][N][4], float scale) {
#pragma unroll
    for (int f = 0; f < F; f++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float largest = NEG_INFINITY;
#pragma unroll
            for (int n = 0; n < N; n++) largest = fmaxf(largest, fmaxf(scores[f][n][2 * half], scores[f][n][2 * half + 1]));
            largest = fmaxf(state.top[f][half], quad_max(largest) * scale);
            // Nothing visible yet: any shift but -inf keeps 2^(-inf) at 0.
            float shift = largest == NEG_INFINITY ? 0.0f : largest;
            float shrink = exp2_fast(state.top[f][half] - shift);
            state.top[f][half] = largest;
            state.sum[f][half] *= shrink;
#pragma unroll
            for (int n = 0; n < N; n++) {
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) {
                    scores[f][n][i] = exp2_fast(__fmaf_rn(scores[f][n][i], scale, -shift));
                    state.sum[f][half] += scores[f][n][i];
                }
            }
            if (shrink != 1.0f) {
#pragma unroll
                for (int c = 0; c < CHUNKS; c++) {
                    state.out[f][c][2 * half] *= shrink;
                    state.out[f][c][2 * half + 1] *= shrink;
                }
            }
        }
    }
}
