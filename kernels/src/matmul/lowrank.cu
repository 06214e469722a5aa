// Gradients of an adapter's matrices, and du:
//
//     c[p, r] = Σ_m v[m, p] u[m, r]        dA: v = x, u = du        dB: v = dy, u = u
//     du[m, r] = Σ_n dy[m, n] b[n, r]      in the same visit to dy as dB, if WITH_DU
//
// They are limited by reading v (or dy), [tokens, columns], which is large while the rank is small. So dA is made for all
// layers with one input together: u is then up to three matrices, taken as if they stood beside each other. A block visits a slab of
// COLUMNS columns over a span of tokens, TOKENS at a time through a ring in shared memory, and keeps the
// slab's sums [COLUMNS, RANK] in registers until the span ends; a warp owns an eighth of the slab. One slice:
//
//     v [TOKENS, COLUMNS]    read transposed, [columns, tokens], for the gradient; as it is, [tokens, columns], for du
//     u [TOKENS, RANK]
//
// Sums end at the borders of blocks, so each span leaves a partial gradient and each slab a partial du in f32, which
// partials.cu adds in the order of their numbers: no atomics, the same bits every time. How many there are depends on
// shapes alone.
//
// du of a slab costs 4 RANK / COLUMNS bytes for each element of dy, written and read once more: with COLUMNS = 16384 /
// RANK an eighth of dy's own bytes at rank 16 and half of them at rank 32. At rank 64 it would be twice, more than reading
// dy again: there du is a product of its own.
//
// Constants from outside: RANK (16, 32 or 64: columns of u that a block takes), TOKENS, STAGES, WITH_DU (0 or 1).
#include "device.cuh"
#include "tile.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
constexpr int COLUMNS = 16384 / RANK;
constexpr int WARP_COLUMNS = COLUMNS / WARPS;
// Fragments of a warp's sums, down the columns and across the rank.
constexpr int DOWN = WARP_COLUMNS / 16;
constexpr int ACROSS = RANK / 8;

constexpr int V_BYTES = TOKENS * COLUMNS * sizeof(bf16);
constexpr int STAGE_BYTES = V_BYTES + TOKENS * RANK * sizeof(bf16);

static_assert(RANK % 16 == 0 && TOKENS % 16 == 0 && WARP_COLUMNS % 16 == 0, "sums are made of fragments");

// v [tokens, columns], and beside each other u [tokens, …] with `ranks` columns, of which the block takes RANK: the second begins at
// column `second_at`, the third at `third_at`.
struct Factors {
    const bf16 *v, *u[3];
    int tokens, columns, second_at, third_at, ranks;
};

// Starts copying [TOKENS, RANK] from column `r` of u; zeros where it has ended.
DEVICE void load_u(unsigned char* tile, const Factors& factors, int token, int last, int r) {
    constexpr int CHUNKS = RANK / 8;
    constexpr int STEP = THREADS / CHUNKS;
    static_assert(THREADS % CHUNKS == 0, "a thread keeps to one column of chunks");
    int chunk = int(threadIdx.x) % CHUNKS, first = int(threadIdx.x) / CHUNKS, column = r + 8 * chunk;
    bool inside = column < factors.ranks, third = column >= factors.third_at, second = column >= factors.second_at;
    const bf16* from = third ? factors.u[2] : second ? factors.u[1] : factors.u[0];
    int begin = third ? factors.third_at : second ? factors.second_at : 0;
    int end = third ? factors.ranks : second ? factors.third_at : factors.second_at;
#pragma unroll
    for (int i = 0; i < TOKENS; i += STEP) {
        if (TOKENS % STEP != 0 && first + i >= TOKENS) break;
        copy_async16(tile + swizzled<CHUNKS>(first + i, chunk),
                     from + size_t(token + first + i) * (end - begin) + (column - begin), inside && token + first + i < last);
    }
}

// sums += vᵀ u over a slice.
DEVICE void add_slice(const unsigned char* stage, int column, float (&sums)[DOWN][ACROSS][4]) {
    int lane = lane_index();
#pragma unroll
    for (int token = 0; token < TOKENS; token += 16) {
        uint32_t u[ACROSS][2];
#pragma unroll
        for (int j = 0; j < ACROSS; j += 2) {
            uint32_t pair[4];
            ldmatrix_x4_transposed(pair, stage + V_BYTES + swizzled<RANK / 8>(token + lane % 16, j + lane / 16));
            u[j][0] = pair[0], u[j][1] = pair[1];
            u[j + 1][0] = pair[2], u[j + 1][1] = pair[3];
        }
#pragma unroll
        for (int i = 0; i < DOWN; i++) {
            uint32_t v[4];
            int chunk = (column + 16 * i) / 8 + lane / 8 % 2;
            ldmatrix_x4_transposed(v, stage + swizzled<COLUMNS / 8>(token + lane / 16 * 8 + lane % 8, chunk));
#pragma unroll
            for (int j = 0; j < ACROSS; j++) mma_bf16(sums[i][j], v, u[j]);
        }
    }
}

// The warp's part of the sum dy b over the slab's columns: [TOKENS, RANK] for each warp, side by side.
DEVICE void share_of_du(const unsigned char* stage, int column, const uint32_t (&b)[DOWN][ACROSS][2],
                        float (&share)[TOKENS / 16][ACROSS][4]) {
    int lane = lane_index();
#pragma unroll
    for (int t = 0; t < TOKENS / 16; t++)
#pragma unroll
        for (int i = 0; i < DOWN; i++) {
            uint32_t dy[4];
            int chunk = (column + 16 * i) / 8 + lane / 16;
            ldmatrix_x4(dy, stage + swizzled<COLUMNS / 8>(16 * t + lane % 16, chunk));
#pragma unroll
            for (int j = 0; j < ACROSS; j++) mma_bf16(share[t][j], dy, b[i][j]);
        }
}

// Adds the shares of all warps, in their order, in the place of a slice that has been used, and writes the slab's part of
// du: [tokens, RANK].
DEVICE void write_du(unsigned char* stage, const float (&share)[TOKENS / 16][ACROSS][4], int first, int last,
                     float* partial) {
    static_assert(!WITH_DU || WARPS * TOKENS * RANK * int(sizeof(float)) <= STAGE_BYTES, "shares fit in a stage");
    float* shares = reinterpret_cast<float*>(stage);
    float* mine = shares + warp_index() * TOKENS * RANK;
    int lane = lane_index();
    // Until now others may have been reading the slice.
    __syncthreads();
#pragma unroll
    for (int t = 0; t < TOKENS / 16; t++)
#pragma unroll
        for (int j = 0; j < ACROSS; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int token = 16 * t + 8 * half + lane / 4, r = 8 * j + lane % 4 * 2;
                *reinterpret_cast<float2*>(mine + token * RANK + r) =
                    make_float2(share[t][j][2 * half], share[t][j][2 * half + 1]);
            }
    __syncthreads();
    for (int i = int(threadIdx.x); i < TOKENS * RANK; i += THREADS) {
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) sum += shares[warp * TOKENS * RANK + i];
        int token = first + i / RANK;
        if (token < last) partial[size_t(token) * RANK + i % RANK] = sum;
    }
}

// b's rows of the slab, [columns, RANK], as the fragments in which the warp multiplies by them.
DEVICE void load_b(unsigned char* ring, const bf16* b, int slab, int column, int columns,
                   uint32_t (&fragments)[DOWN][ACROSS][2]) {
    static_assert(COLUMNS * RANK * int(sizeof(bf16)) <= STAGES * STAGE_BYTES, "b's slab fits in the ring");
    load_tile<COLUMNS, RANK, THREADS>(ring, b, RANK, slab, columns, 0, RANK);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    int lane = lane_index();
#pragma unroll
    for (int i = 0; i < DOWN; i++)
#pragma unroll
        for (int j = 0; j < ACROSS; j += 2) {
            uint32_t pair[4];
            ldmatrix_x4_transposed(pair, ring + swizzled<RANK / 8>(column + 16 * i + lane % 16, j + lane / 16));
            fragments[i][j][0] = pair[0], fragments[i][j][1] = pair[1];
            fragments[i][j + 1][0] = pair[2], fragments[i][j + 1][1] = pair[3];
        }
    // The ring is about to be filled with slices.
    __syncthreads();
}

// blockIdx: slab of columns, span of tokens, RANK columns of u.
DEVICE void collect(Factors factors, const bf16* b, int span, float* partial, int rank, int column_stride,
                    int rank_stride, float* du_partial) {
    unsigned char* ring = dynamic_shared();
    int slab = int(blockIdx.x) * COLUMNS, r = int(blockIdx.z) * RANK;
    int column = warp_index() * WARP_COLUMNS;
    int first = int(blockIdx.y) * span, last = min(first + span, factors.tokens);
    int slices = divide_up(last - first, TOKENS);

    uint32_t b_fragments[DOWN][ACROSS][2];
    if (WITH_DU) load_b(ring, b, slab, column, factors.columns, b_fragments);

    auto load = [&](int slice) {
        unsigned char* stage = ring + slice % STAGES * STAGE_BYTES;
        int token = first + slice * TOKENS;
        if (slice < slices) {
            load_tile<TOKENS, COLUMNS, THREADS>(stage, factors.v, factors.columns, token, last, slab, factors.columns);
            load_u(stage + V_BYTES, factors, token, last, r);
        }
        copy_async_commit();
    };

    float sums[DOWN][ACROSS][4] = {};
#pragma unroll
    for (int slice = 0; slice < STAGES - 1; slice++) load(slice);
    for (int slice = 0; slice < slices; slice++) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();
        load(slice + STAGES - 1);
        unsigned char* stage = ring + slice % STAGES * STAGE_BYTES;
        add_slice(stage, column, sums);
        if (WITH_DU) {
            float share[TOKENS / 16][ACROSS][4] = {};
            share_of_du(stage, column, b_fragments, share);
            float* slab_partial = du_partial + size_t(blockIdx.x) * factors.tokens * RANK;
            write_du(stage, share, first + slice * TOKENS, last, slab_partial);
        }
    }

    float* span_partial = partial + size_t(blockIdx.y) * factors.columns * rank;
    int lane = lane_index();
#pragma unroll
    for (int i = 0; i < DOWN; i++)
#pragma unroll
        for (int j = 0; j < ACROSS; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int at = slab + column + 16 * i + e / 2 * 8 + lane / 4, at_rank = r + 8 * j + lane % 4 * 2 + e % 2;
                if (at < factors.columns && at_rank < rank)
                    span_partial[size_t(at) * column_stride + size_t(at_rank) * rank_stride] = sums[i][j][e];
            }
}

// v [tokens, columns], u as `Factors` says. `partial`: for each span of `span` tokens a matrix of `rank` columns of u whose
// element (column, r) is at column · column_stride + r · rank_stride. WITH_DU, where ranks = RANK: b
// [columns, RANK], and in `du_partial` for each slab its part of v b, [tokens, RANK].
KERNEL(THREADS) gradient(const bf16* v, const bf16* u0, const bf16* u1, const bf16* u2, int second_at, int third_at, int ranks,
                         const bf16* b, int tokens, int columns, int span, float* partial, int rank, int column_stride,
                         int rank_stride, float* du_partial) {
    collect({v, {u0, u1, u2}, tokens, columns, second_at, third_at, ranks}, b, span, partial, rank, column_stride,
            rank_stride, du_partial);
}
