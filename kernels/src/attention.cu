// Causal attention over packed groups with shared prompts (Dao 2023, "FlashAttention-2"); the twin of attention.rs,
// which has the formulas. Scores are never in memory: a tile of them lives in the registers of one warp.
//
//   forward            s = q kᵀ · scale       p = e^(s - lse)      out = p v        lse = ln Σ e^s
//   backward_keys      sᵀ = k qᵀ · scale      dpᵀ = v doutᵀ        dv += pᵀ dout    dk += dsᵀ q · scale
//   backward_queries   s = q kᵀ · scale       dp = dout vᵀ         ds = p (dp - delta)      dq += ds k · scale
//   backward_delta     delta = rowsum(dout ∘ out)
//
// Contract: q, out, dout, dq: bf16 [T, heads, HEAD_DIM]; k, v, dk, dv: bf16 [T, kv_heads, HEAD_DIM]; lse, delta:
// f32 [T, heads], lse the natural logarithm. Outputs are overwritten. Products take bf16 and sum in f32; p and ds
// are rounded to bf16 on their way into the second product. Blocks are independent of each other and every sum has one order.
//
// Constants from outside (attention/cuda/tiling.rs): HEAD_DIM, even and at most 128; SHARING, the query heads per key head, at
// most MET; rows of a block's own tile, FORWARD_ROWS and BACKWARD_ROWS, and of a tile it meets, FORWARD_COLUMNS and MET.
//
// Rows. The SHARING query heads that read one key head are stacked: row r of a tile of queries is token r / SHARING,
// head r % SHARING. One tile of keys serves them all, short texts fill their tiles better, and dk and dv need no sum
// over heads afterwards. A block is a tile and a key head: blockIdx = (tile, key head).
//
// Who sees whom. A tile lies within one text (a prompt, or the own rows of a branch), so its tokens have consecutive
// rows *and* consecutive positions, and whatever the layout, key and query meet where
//     0 <= position(query) - position(key) < window.
// The shared prompt and the own rows, two intervals of rows, are one interval of positions. Which tiles meet at all
// comes from the host (attention/cuda/schedule.rs) as plain integers:
//     tiles [n, 5]  row, position, tokens, first run, end of runs      what a block owns
//     runs  [m, 3]  row, position, tokens                              what it meets: consecutive tokens of a text
// A block cuts its runs into tiles in order. Only a warp whose tile is not seen as a whole looks at the interval, and
// one that sees none of it skips it.
//
// Shared memory. Tiles of [rows, DIM] bf16, DIM = HEAD_DIM rounded up to 16 with zeros behind it, rows without gaps;
// the 16-byte chunks of a row are permuted (`chunk_offset`), so that the eight rows that an ldmatrix reads lie in different banks.
//     forward            own q [128]          2 × (k [64], v [64])
//     backward_keys      own k, v [rows]      2 × (q [64], dout [64], lse [64], delta [64])
//     backward_queries   own q, dout [rows]   2 × (k [64], v [64])
// The block's own tile stays; the tiles it meets alternate between two stages, the next one being copied while this one is
// computed. A warp has 16 or 32 rows of the own tile as the left operand. The scores come out of their product laid out
// as the next product's left operand wants them, so p and ds never leave the registers.

#include "tiles.cuh"

// 16-row fragments per warp.
constexpr int FORWARD_FRAGMENTS = FORWARD_ROWS / (16 * WARPS);
constexpr int BACKWARD_FRAGMENTS = BACKWARD_ROWS / (16 * WARPS);
// Columns of scores that a warp has in registers at a time on the way back, where it has them twice, as p and as ds.
constexpr int COLUMNS_OF_KEYS = 32 / BACKWARD_FRAGMENTS;
constexpr int COLUMNS_OF_QUERIES = 64 / BACKWARD_FRAGMENTS;

// ---- forward ----

// `scale`: 1 / sqrt(HEAD_DIM). `window`: larger than any position where there is none.
KERNEL(THREADS) attention_forward(const bf16* q, const bf16* k, const bf16* v, bf16* out, float* lse, const int* tiles, const int* runs,
                  int kv_heads, int window, float scale) {
    constexpr int F = FORWARD_FRAGMENTS;
    bf16* own_q = reinterpret_cast<bf16*>(dynamic_shared());
    bf16* stages = own_q + FORWARD_ROWS * DIM;
    int first = warp_index() * 16 * F;
    Span own = own_span(tiles), mine = tokens_of(own, first, 16 * F, SHARING);
    Walk walk = own_walk(tiles);
    OnlineSoftmax<F> state;
    start(state);

    Span keys = next_span(walk, runs, FORWARD_COLUMNS);
    load_tile<SHARING, FORWARD_ROWS>(own_q, q, own, kv_heads);
    load_tile<1, FORWARD_COLUMNS>(stages, k, keys, kv_heads);
    load_tile<1, FORWARD_COLUMNS>(stages + FORWARD_COLUMNS * DIM, v, keys, kv_heads);
    copy_async_commit();
    for (int stage = 0; keys.tokens > 0; stage ^= 1) {
        bf16* tile_k = stages + stage * 2 * FORWARD_COLUMNS * DIM;
        bf16* tile_v = tile_k + FORWARD_COLUMNS * DIM;
        copy_async_wait<0>();
        // This stage is there for all, and all are done with the other one.
        __syncthreads();
        Walk ahead = walk;
        Span next = next_span(ahead, runs, FORWARD_COLUMNS);
        if (next.tokens > 0) {
            bf16* other = stages + (stage ^ 1) * 2 * FORWARD_COLUMNS * DIM;
            load_tile<1, FORWARD_COLUMNS>(other, k, next, kv_heads);
            load_tile<1, FORWARD_COLUMNS>(other + FORWARD_COLUMNS * DIM, v, next, kv_heads);
            copy_async_commit();
        }
        if (!sees_none(mine, keys, window)) {
            float scores[F][FORWARD_COLUMNS / 8][4];
            product_transposed(scores, own_q, first, tile_k, 0);
            if (keys.tokens < FORWARD_COLUMNS || !sees_all(mine, keys, window)) {
                Columns visible[F][2];
#pragma unroll
                for (int row = 0; row < 2 * F; row++) {
                    int position = own.position + (first + 8 * row + thread_index_again() % WARP / 4) / SHARING;
                    visible[row / 2][row % 2] = keys_of(position, keys, window);
                }
                hide(scores, visible, 0);
            }
            soften(state, scores, scale * LOG2_E);
            add_product(state.out, scores, tile_v, 0);
        }
        keys = next_span(walk, runs, FORWARD_COLUMNS);
    }

    own = own_span(tiles);
    int lane = lane_index();
    float factors[F][2];
#pragma unroll
    for (int row = 0; row < 2 * F; row++) {
        float sum = quad_sum(state.sum[row / 2][row % 2]);
        factors[row / 2][row % 2] = 1.0f / sum;
        int stacked = first + 8 * row + lane / 4;
        if (lane % 4 == 0 && stacked < own.tokens * SHARING) {
            size_t at = first_row<SHARING>(own, kv_heads) + row_within<SHARING>(stacked, kv_heads);
            lse[at] = state.top[row / 2][row % 2] * LN_2 + logf(sum);
        }
    }
    store_rows<SHARING>(own_q, first, state.out, factors, out, own, kv_heads);
}

// ---- backward ----

// A warp has a row of [T * heads].
KERNEL(THREADS) attention_backward_delta(const bf16* dout, const bf16* out, float* delta, long long rows) {
    long long row = (long long)(blockIdx.x) * WARPS + warp_index();
    if (row >= rows) return;
    float sum = 0.0f;
    for (int column = 2 * lane_index(); column < HEAD_DIM; column += 2 * WARP) {
        long long at = row * HEAD_DIM + column;
        float2 a = unpack_bf16(*reinterpret_cast<const uint32_t*>(dout + at));
        float2 b = unpack_bf16(*reinterpret_cast<const uint32_t*>(out + at));
        sum += a.x * b.x + a.y * b.y;
    }
    sum = warp_sum(sum);
    if (lane_index() == 0) delta[row] = sum;
}

// A block owns keys and meets the queries that see them.
KERNEL(THREADS) attention_backward_keys(const bf16* dout, const bf16* q, const bf16* k, const bf16* v, const float* lse, const float* delta,
                        bf16* dk, bf16* dv, const int* tiles, const int* runs, int kv_heads, int window, float scale) {
    constexpr int F = BACKWARD_FRAGMENTS, N = COLUMNS_OF_KEYS / 8;
    bf16* own_k = reinterpret_cast<bf16*>(dynamic_shared());
    bf16* own_v = own_k + BACKWARD_ROWS * DIM;
    bf16* stages = own_v + BACKWARD_ROWS * DIM;
    // Of each stage lse in base 2, then delta.
    float* statistics = reinterpret_cast<float*>(stages + 4 * MET * DIM);
    int first = warp_index() * 16 * F;
    Span own = own_span(tiles), mine = tokens_of(own, first, 16 * F, 1);
    Walk walk = own_walk(tiles);

    // Half of the threads fetch lse, half delta; queries that are not there have a probability of 0.
    auto statistic = [&](const Span& queries) {
        int thread = thread_index_again(), column = thread % MET;
        bool of_lse = thread < MET;
        if (column >= queries.tokens * SHARING) return of_lse ? INFINITY : 0.0f;
        size_t at = first_row<SHARING>(queries, kv_heads) + row_within<SHARING>(column, kv_heads);
        return of_lse ? lse[at] * LOG2_E : delta[at];
    };

    float sums_k[F][CHUNKS][4], sums_v[F][CHUNKS][4];
    set_zero(sums_k);
    set_zero(sums_v);

    Span queries = next_span(walk, runs, MET / SHARING);
    load_tile<1, BACKWARD_ROWS>(own_k, k, own, kv_heads);
    load_tile<1, BACKWARD_ROWS>(own_v, v, own, kv_heads);
    load_tile<SHARING, MET>(stages, q, queries, kv_heads);
    load_tile<SHARING, MET>(stages + MET * DIM, dout, queries, kv_heads);
    statistics[threadIdx.x] = statistic(queries);
    copy_async_commit();
    for (int stage = 0; queries.tokens > 0; stage ^= 1) {
        bf16* tile_q = stages + stage * 2 * MET * DIM;
        bf16* tile_dout = tile_q + MET * DIM;
        const float* tile_lse = statistics + stage * 2 * MET;
        const float* tile_delta = tile_lse + MET;
        copy_async_wait<0>();
        __syncthreads();
        Walk ahead = walk;
        Span next = next_span(ahead, runs, MET / SHARING);
        float next_statistic = 0.0f;
        if (next.tokens > 0) {
            bf16* other = stages + (stage ^ 1) * 2 * MET * DIM;
            load_tile<SHARING, MET>(other, q, next, kv_heads);
            load_tile<SHARING, MET>(other + MET * DIM, dout, next, kv_heads);
            next_statistic = statistic(next);
            copy_async_commit();
        }
        if (!sees_none(queries, mine, window)) {
            bool partial = !sees_all(queries, mine, window);
#pragma unroll 1
            for (int from = 0; from < MET; from += COLUMNS_OF_KEYS) {
                float p[F][N][4], ds[F][N][4];
                int pair = thread_index_again() % 4 * 2;
                product_transposed(p, own_k, first, tile_q, from);
                if (partial) {
                    Columns visible[F][2];
#pragma unroll
                    for (int row = 0; row < 2 * F; row++) {
                        int position = own.position + first + 8 * row + thread_index_again() % WARP / 4;
                        visible[row / 2][row % 2] = queries_of(position, queries, window);
                    }
                    hide(p, visible, from);
                }
#pragma unroll
                for (int n = 0; n < N; n++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float lse = tile_lse[from + 8 * n + pair + i % 2];
#pragma unroll
                        for (int f = 0; f < F; f++) p[f][n][i] = exp2_fast(__fmaf_rn(p[f][n][i], scale * LOG2_E, -lse));
                    }
                }
                add_product(sums_v, p, tile_dout, from);
                product_transposed(ds, own_v, first, tile_dout, from);
#pragma unroll
                for (int n = 0; n < N; n++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float delta = tile_delta[from + 8 * n + pair + i % 2];
#pragma unroll
                        for (int f = 0; f < F; f++) ds[f][n][i] = p[f][n][i] * (ds[f][n][i] - delta);
                    }
                }
                add_product(sums_k, ds, tile_q, from);
            }
        }
        // The other stage's statistics; the barrier that follows is the one at the top.
        if (next.tokens > 0) statistics[(stage ^ 1) * 2 * MET + threadIdx.x] = next_statistic;
        queries = next_span(walk, runs, MET / SHARING);
    }

    float scales[F][2], ones[F][2];
#pragma unroll
    for (int row = 0; row < 2 * F; row++) {
        scales[row / 2][row % 2] = scale;
        ones[row / 2][row % 2] = 1.0f;
    }
    own = own_span(tiles);
    store_rows<1>(own_k, first, sums_k, scales, dk, own, kv_heads);
    store_rows<1>(own_v, first, sums_v, ones, dv, own, kv_heads);
}

// A block owns queries and meets the keys that they see.
KERNEL(THREADS) attention_backward_queries(const bf16* dout, const bf16* q, const bf16* k, const bf16* v, const float* lse,
                           const float* delta, bf16* dq, const int* tiles, const int* runs, int kv_heads, int window,
                           float scale) {
    constexpr int F = BACKWARD_FRAGMENTS, N = COLUMNS_OF_QUERIES / 8;
    bf16* own_q = reinterpret_cast<bf16*>(dynamic_shared());
    bf16* own_dout = own_q + BACKWARD_ROWS * DIM;
    bf16* stages = own_dout + BACKWARD_ROWS * DIM;
    int first = warp_index() * 16 * F, lane = lane_index();
    Span own = own_span(tiles), mine = tokens_of(own, first, 16 * F, SHARING);
    Walk walk = own_walk(tiles);

    float own_lse[F][2], own_delta[F][2], scales[F][2], sums[F][CHUNKS][4];
#pragma unroll
    for (int row = 0; row < 2 * F; row++) {
        int stacked = first + 8 * row + lane / 4;
        bool valid = stacked < own.tokens * SHARING;
        size_t at = first_row<SHARING>(own, kv_heads) + row_within<SHARING>(stacked, kv_heads);
        own_lse[row / 2][row % 2] = valid ? lse[at] * LOG2_E : INFINITY;
        own_delta[row / 2][row % 2] = valid ? delta[at] : 0.0f;
        scales[row / 2][row % 2] = scale;
    }
    set_zero(sums);

    Span keys = next_span(walk, runs, MET);
    load_tile<SHARING, BACKWARD_ROWS>(own_q, q, own, kv_heads);
    load_tile<SHARING, BACKWARD_ROWS>(own_dout, dout, own, kv_heads);
    load_tile<1, MET>(stages, k, keys, kv_heads);
    load_tile<1, MET>(stages + MET * DIM, v, keys, kv_heads);
    copy_async_commit();
    for (int stage = 0; keys.tokens > 0; stage ^= 1) {
        bf16* tile_k = stages + stage * 2 * MET * DIM;
        bf16* tile_v = tile_k + MET * DIM;
        copy_async_wait<0>();
        __syncthreads();
        Walk ahead = walk;
        Span next = next_span(ahead, runs, MET);
        if (next.tokens > 0) {
            bf16* other = stages + (stage ^ 1) * 2 * MET * DIM;
            load_tile<1, MET>(other, k, next, kv_heads);
            load_tile<1, MET>(other + MET * DIM, v, next, kv_heads);
            copy_async_commit();
        }
        if (!sees_none(mine, keys, window)) {
            bool partial = keys.tokens < MET || !sees_all(mine, keys, window);
#pragma unroll 1
            for (int from = 0; from < MET; from += COLUMNS_OF_QUERIES) {
                float p[F][N][4], ds[F][N][4];
                product_transposed(p, own_q, first, tile_k, from);
                if (partial) {
                    Columns visible[F][2];
#pragma unroll
                    for (int row = 0; row < 2 * F; row++) {
                        int position = own.position + (first + 8 * row + thread_index_again() % WARP / 4) / SHARING;
                        visible[row / 2][row % 2] = keys_of(position, keys, window);
                    }
                    hide(p, visible, from);
                }
                product_transposed(ds, own_dout, first, tile_v, from);
#pragma unroll
                for (int f = 0; f < F; f++) {
#pragma unroll
                    for (int n = 0; n < N; n++) {
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            float weight = exp2_fast(__fmaf_rn(p[f][n][i], scale * LOG2_E, -own_lse[f][i / 2]));
                            ds[f][n][i] = weight * (ds[f][n][i] - own_delta[f][i / 2]);
                        }
                    }
                }
                add_product(sums, ds, tile_k, from);
            }
        }
        keys = next_span(walk, runs, MET);
    }
    own = own_span(tiles);
    store_rows<SHARING>(own_q, first, sums, scales, dq, own, kv_heads);
}
