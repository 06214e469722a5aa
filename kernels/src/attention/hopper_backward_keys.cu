// Attention on Hopper, the way back to keys and values: formulas, contract, rows and tables as in attention.cu.
//
//     sᵀ = k qᵀ · scale      dpᵀ = v doutᵀ      dv += pᵀ dout      dsᵀ = pᵀ (dpᵀ - delta)      dk += dsᵀ q · scale
//
// A block has a tile of ROWS keys and a key head, and meets all tiles of QUERIES stacked queries that see some of them. One warp
// copies, two warpgroups have 64 of the keys each. sᵀ and dpᵀ are sums in registers, laid out as the left operand that pᵀ and
// dsᵀ then are; dk and dv stay in registers for all of the block's time.
//
// Products are started as soon as their operands are there and waited for as late as their sums are needed, so that exponentials
// run beside dpᵀ, differences beside dv, and dk beside the next tile's sᵀ.
//
// Shared memory: k, v [ROWS]; STAGES times q, dout, lse in base 2 and delta [QUERIES]; for each what it is of; barriers. Rows of q
// and dout that no box fills are zeros.
//
// Constants from outside (attention/cuda/hopper.rs): HEAD_DIM, 64 or 128; SHARING; ROWS, 128; QUERIES, 64; STAGES.
#include "hopper_tiles.cuh"

static_assert(ROWS == MULTIPLIERS * PART && QUERIES == 2 * WARP, "a warpgroup has 64 rows, a lane two statistics");
// Tokens of a tile of queries at most.
constexpr int TOKENS = QUERIES / SHARING;

struct Shared {
    unsigned char *k, *v, *q, *dout;
    float *lse, *delta;
    Barrier *own_full, *full, *empty;
    Met* met;
};

DEVICE Shared shared_memory() {
    unsigned char* k = dynamic_shared();
    unsigned char* v = k + tile_bytes(ROWS);
    unsigned char* q = v + tile_bytes(ROWS);
    unsigned char* dout = q + STAGES * tile_bytes(QUERIES);
    auto lse = reinterpret_cast<float*>(dout + STAGES * tile_bytes(QUERIES));
    float* delta = lse + STAGES * QUERIES;
    auto barriers = reinterpret_cast<Barrier*>(delta + STAGES * QUERIES);
    Barrier* full = barriers + 1;
    auto met = reinterpret_cast<Met*>(full + 2 * STAGES);
    return {k, v, q, dout, lse, delta, barriers, full, full + STAGES, met};
}

// By all threads of the block, before anything else.
DEVICE void prepare(const Shared& shared) {
    if (threadIdx.x == 0) {
        barrier_init(shared.own_full, 1);
        init_ring(shared.full, shared.empty, 1);
        fence_barrier_init();
    }
    fill_up<QUERIES, TOKENS * SHARING>(shared.q, 2 * STAGES);
    __syncthreads();
}

// By one warp: keys and values, then each tile of queries when its stage is free.
DEVICE void copy_tiles(const Shared& shared, const TensorMap& dout, const TensorMap& q, const TensorMap& k, const TensorMap& v,
                       const float* lse, const float* delta, const int* tiles, const int* runs, int kv_heads) {
    const int head = int(blockIdx.y), lane = lane_index();
    if (lane == 0) {
        int row = own_span(tiles).row;
        barrier_arrive_expecting(shared.own_full, 2 * tile_bytes(ROWS));
        load_boxes<ROWS>(shared.k, k, shared.own_full, head, row);
        load_boxes<ROWS>(shared.v, v, shared.own_full, head, row);
    }
    Walk walk = own_walk(tiles);
    Turn turn = {0, 0};
    for (Span queries = next_span(walk, runs, TOKENS); queries.tokens > 0; queries = next_span(walk, runs, TOKENS), turn.next()) {
        float of_lse[2], of_delta[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int row = lane + WARP * i;
            bool there = row < queries.tokens * SHARING;
            size_t at = first_row<SHARING>(queries, kv_heads) + row_within<SHARING>(row, kv_heads);
            // Queries that are not there have a probability of 0.
            of_lse[i] = there ? lse[at] * LOG2_E : INFINITY;
            of_delta[i] = there ? delta[at] : 0.0f;
        }
        int stage = turn.stage;
        barrier_wait(shared.empty + stage, turn.parity ^ 1);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            shared.lse[stage * QUERIES + lane + WARP * i] = of_lse[i];
            shared.delta[stage * QUERIES + lane + WARP * i] = of_delta[i];
        }
        __syncwarp();
        if (lane == 0) {
            Barrier* full = shared.full + stage;
            shared.met[stage] = {queries.position, queries.tokens, walk.run != walk.end};
            barrier_arrive_expecting(full, 2 * tile_bytes(TOKENS * SHARING));
            load_boxes<QUERIES>(shared.q + stage * tile_bytes(QUERIES), q, full, head * SHARING, queries.row);
            load_boxes<QUERIES>(shared.dout + stage * tile_bytes(QUERIES), dout, full, head * SHARING, queries.row);
        }
    }
}

// One of the two warpgroups: its keys meet all queries.
DEVICE void collect(const Shared& shared, int part, bf16* dk, bf16* dv, const int* tiles, int kv_heads, int window, float scale) {
    const int first = PART * part, row = first + own_row();
    Span own = own_span(tiles), mine = tokens_of(own, first, PART, 1);
    const int position = own.position + row;
    const unsigned char *k = shared.k + first * ROW_BYTES, *v = shared.v + first * ROW_BYTES;
    float sums_k[HEAD_DIM / 2], sums_v[HEAD_DIM / 2], p[QUERIES / 2], ds[QUERIES / 2];
    Weights<QUERIES> weights, slopes;
    Turn turn = {0, 0};
    int before = 0;
    set_zero(sums_k);
    set_zero(sums_v);
    barrier_wait(shared.own_full, 0);
    for (int more = 1, tile = 0; more; tile++, turn.next()) {
        const unsigned char* q = shared.q + turn.stage * tile_bytes(QUERIES);
        const unsigned char* dout = shared.dout + turn.stage * tile_bytes(QUERIES);
        // Of the thread's two columns in every eight.
        const float* lse = shared.lse + turn.stage * QUERIES + threadIdx.x % 4 * 2;
        const float* delta = shared.delta + turn.stage * QUERIES + threadIdx.x % 4 * 2;
        barrier_wait(shared.full + turn.stage, turn.parity);
        Met met = shared.met[turn.stage];
        more = met.more;
        wgmma_fence();
        start_product<ROWS, QUERIES>(p, k, q);
        wgmma_commit();
        // All of the tile before, whose operands' registers are needed.
        wgmma_wait<1>();
        if (tile > 0) release(shared.empty + before);
        before = turn.stage;
        wgmma_fence();
        start_product<ROWS, QUERIES>(ds, v, dout);
        wgmma_commit();
        wgmma_wait<1>();
        hold(p);
        Span queries = {0, met.position, met.tokens};
        if (!sees_all(queries, mine, window)) {
            const Columns visible[2] = {queries_of(position, queries, window), queries_of(position + 8, queries, window)};
            hide(p, visible);
        }
#pragma unroll
        for (int group = 0; group < QUERIES / 8; group++) {
            float2 of = *reinterpret_cast<const float2*>(lse + 8 * group);
#pragma unroll
            for (int i = 4 * group; i < 4 * group + 4; i++)
                p[i] = exp2_fast(__fmaf_rn(p[i], scale * LOG2_E, i % 2 ? -of.y : -of.x));
        }
        weights.round(p);
        wgmma_fence();
        start_adding<QUERIES>(sums_v, weights, dout);
        wgmma_commit();
        wgmma_wait<1>();
        hold(ds);
#pragma unroll
        for (int group = 0; group < QUERIES / 8; group++) {
            float2 of = *reinterpret_cast<const float2*>(delta + 8 * group);
#pragma unroll
            for (int i = 4 * group; i < 4 * group + 4; i++) ds[i] = p[i] * (ds[i] - (i % 2 ? of.y : of.x));
        }
        slopes.round(ds);
        wgmma_fence();
        start_adding<QUERIES>(sums_k, slopes, q);
        wgmma_commit();
    }
    wgmma_wait<0>();
    hold(sums_k);
    hold(sums_v);
    const float scales[2] = {scale, scale}, ones[2] = {1.0f, 1.0f};
    store_rows<1, ROWS>(shared.k, first, sums_k, scales, dk, own, kv_heads, int(blockIdx.y));
    store_rows<1, ROWS>(shared.v, first, sums_v, ones, dv, own, kv_heads, int(blockIdx.y));
}

HOPPER_KERNEL(THREADS, 1) hopper_attention_backward_keys(TENSOR_MAP dout, TENSOR_MAP q, TENSOR_MAP k, TENSOR_MAP v,
                                                         const float* lse, const float* delta, bf16* dk, bf16* dv,
                                                         const int* tiles, const int* runs, int kv_heads, int window, float scale) {
    Shared shared = shared_memory();
    prepare(shared);
    if (warpgroup_index() == 0) {
        fewer_registers<FEW>();
        if (warp_index() == 0) copy_tiles(shared, dout, q, k, v, lse, delta, tiles, runs, kv_heads);
    } else {
        more_registers<MANY>();
        collect(shared, warpgroup_index() - 1, dk, dv, tiles, kv_heads, window, scale);
    }
}
