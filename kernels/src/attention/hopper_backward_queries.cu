// Attention on Hopper, the way back to queries: formulas, contract, rows and tables as in attention.cu.
//
//     s = q kᵀ · scale      dp = dout vᵀ      ds = p (dp - delta)      dq += ds k · scale
//
// A block has a tile of ROWS queries and a key head, and then the next one, as on the way forward (hopper_forward.cu), and meets all
// tiles of KEYS keys that they see. One warpgroup copies, two have 64 of the queries each. s and dp are sums in registers, laid out
// as the left operand that ds then is. Exponentials run beside dp, dq beside the next tile's s.
//
// Shared memory: q, dout [ROWS]; dq on its way to memory [ROWS]; STAGES times k and v [KEYS]; barriers full and empty of each; what
// each is of.
//
// Constants from outside (attention/cuda/hopper.rs): HEAD_DIM, 64 or 128; SHARING; ROWS, 128; KEYS; STAGES.
#include "hopper_tiles.cuh"

static_assert(ROWS == MULTIPLIERS * PART, "a warpgroup has 64 rows");
// Tokens of a tile of queries at most.
constexpr int TOKENS = ROWS / SHARING;

struct Shared {
    unsigned char *q, *dout, *dq, *k, *v;
    Barrier *own_full, *own_empty, *full, *empty;
    Own* own;
    Met* met;
};

DEVICE Shared shared_memory() {
    unsigned char* q = dynamic_shared();
    unsigned char* dout = q + tile_bytes(ROWS);
    unsigned char* dq = dout + tile_bytes(ROWS);
    unsigned char* k = dq + tile_bytes(ROWS);
    unsigned char* v = k + STAGES * tile_bytes(KEYS);
    auto own_full = reinterpret_cast<Barrier*>(v + STAGES * tile_bytes(KEYS));
    Barrier* full = own_full + 2;
    auto own = reinterpret_cast<Own*>(full + 2 * STAGES);
    auto met = reinterpret_cast<Met*>(own + 1);
    return {q, dout, dq, k, v, own_full, own_full + 1, full, full + STAGES, own, met};
}

// By all threads of the block, before anything else.
DEVICE void prepare(const Shared& shared) {
    if (threadIdx.x == 0) {
        barrier_init(shared.own_full, 1);
        barrier_init(shared.own_empty, READERS);
        init_ring(shared.full, shared.empty, 1);
        fence_barrier_init();
    }
    __syncthreads();
}

// By one thread: of each task the queries, then each tile of keys, when there is a place for it.
DEVICE void copy_tiles(const Shared& shared, const TensorMap& dout, const TensorMap& q, const TensorMap& k, const TensorMap& v,
                       const int* tiles, const int* runs, const int* next, int count) {
    Turn turn = {0, 0};
    uint32_t own_parity = 1;
    for (int number = int(blockIdx.x); number >= 0;) {
        Task task(number, count);
        number = next[number];
        Span own = own_span(tiles, task.tile);
        barrier_wait(shared.own_empty, own_parity);
        own_parity ^= 1;
        *shared.own = {own, task.head, number >= 0};
        barrier_arrive_expecting(shared.own_full, 2 * tile_bytes(TOKENS * SHARING));
        load_boxes<ROWS>(shared.q, q, shared.own_full, task.head * SHARING, own.row);
        load_boxes<ROWS>(shared.dout, dout, shared.own_full, task.head * SHARING, own.row);
        Walk walk = own_walk(tiles, task.tile);
        for (Span keys = next_span(walk, runs, KEYS); keys.tokens > 0; keys = next_span(walk, runs, KEYS), turn.next()) {
            int stage = turn.stage;
            Barrier* full = shared.full + stage;
            barrier_wait(shared.empty + stage, turn.parity ^ 1);
            shared.met[stage] = {keys.position, keys.tokens, walk.run != walk.end};
            barrier_arrive_expecting(full, 2 * tile_bytes(KEYS));
            load_boxes<KEYS>(shared.k + stage * tile_bytes(KEYS), k, full, task.head, keys.row);
            load_boxes<KEYS>(shared.v + stage * tile_bytes(KEYS), v, full, task.head, keys.row);
        }
    }
}

// One of the two warpgroups: of each task its queries meet all keys.
DEVICE void collect(const Shared& shared, int part, const float* lse, const float* delta, bf16* dq, int kv_heads, int window,
                    float scale) {
    const int first = PART * part, row = first + own_row();
    const unsigned char *q = shared.q + first * ROW_BYTES, *dout = shared.dout + first * ROW_BYTES;
    float sums[HEAD_DIM / 2], p[KEYS / 2], ds[KEYS / 2];
    Weights<KEYS> slopes;
    Turn turn = {0, 0};
    uint32_t own_parity = 0;
    for (int more_tasks = 1; more_tasks;) {
        barrier_wait(shared.own_full, own_parity);
        own_parity ^= 1;
        const Own task = *shared.own;
        const Span own = task.span, mine = tokens_of(own, first, PART, SHARING);
        more_tasks = task.more;
        const int positions[2] = {own.position + row / SHARING, own.position + (row + 8) / SHARING};
        float own_lse[2], own_delta[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int stacked = row + 8 * half;
            bool there = stacked < own.tokens * SHARING;
            size_t at = first_row<SHARING>(own, kv_heads, task.head) + row_within<SHARING>(stacked, kv_heads);
            own_lse[half] = there ? lse[at] * LOG2_E : INFINITY;
            own_delta[half] = there ? delta[at] : 0.0f;
        }
        set_zero(sums);
        int before = -1;
        for (int more = 1; more; turn.next()) {
            const unsigned char* k = shared.k + turn.stage * tile_bytes(KEYS);
            const unsigned char* v = shared.v + turn.stage * tile_bytes(KEYS);
            barrier_wait(shared.full + turn.stage, turn.parity);
            Met met = shared.met[turn.stage];
            more = met.more;
            wgmma_fence();
            start_product<ROWS, KEYS>(p, q, k);
            wgmma_commit();
            // All of the tile before, whose operands' registers are needed.
            wgmma_wait<1>();
            if (before >= 0) release(shared.empty + before);
            before = turn.stage;
            wgmma_fence();
            start_product<ROWS, KEYS>(ds, dout, v);
            wgmma_commit();
            wgmma_wait<1>();
            hold(p);
            Span keys = {0, met.position, met.tokens};
            if (met.tokens < KEYS || !sees_all(mine, keys, window)) {
                const Columns visible[2] = {keys_of(positions[0], keys, window), keys_of(positions[1], keys, window)};
                hide(p, visible);
            }
#pragma unroll
            for (int i = 0; i < KEYS / 2; i++) p[i] = exp2_fast(__fmaf_rn(p[i], scale * LOG2_E, -own_lse[half_of(i)]));
            finish(p, shared.full + turn.stage, turn.parity);
            wgmma_wait<0>();
            hold(ds);
            if (!more) release(shared.own_empty);
#pragma unroll
            for (int i = 0; i < KEYS / 2; i++) ds[i] = p[i] * (ds[i] - own_delta[half_of(i)]);
            slopes.round(ds);
            wgmma_fence();
            start_adding<KEYS>(sums, slopes, k);
            wgmma_commit();
        }
        wgmma_wait<0>();
        hold(sums);
        release(shared.empty + before);
        const float scales[2] = {scale, scale};
        store_rows<SHARING, ROWS>(shared.dq, first, sums, scales, dq, own, kv_heads, task.head);
    }
}

// `count`: of the tiles.
HOPPER_KERNEL(THREADS, 1) hopper_attention_backward_queries(TENSOR_MAP dout, TENSOR_MAP q, TENSOR_MAP k, TENSOR_MAP v,
                                                            const float* lse, const float* delta, bf16* dq, const int* tiles,
                                                            const int* runs, const int* next, int count, int kv_heads, int window,
                                                            float scale) {
    Shared shared = shared_memory();
    prepare(shared);
    if (warpgroup_index() == 0) {
        fewer_registers<FEW>();
        if (threadIdx.x == 0) copy_tiles(shared, dout, q, k, v, tiles, runs, next, count);
    } else {
        more_registers<MANY>();
        collect(shared, warpgroup_index() - 1, lse, delta, dq, kv_heads, window, scale);
    }
}
