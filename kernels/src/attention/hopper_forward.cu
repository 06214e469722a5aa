// Attention on Hopper, the way forward: formulas, contract, rows and tables as in attention.cu.
//
//     s = q kᵀ · scale        p = e^(s - lse)        out = p v        lse = ln Σ e^s
//
// A block has a tile of ROWS queries and a key head, and when it is done the next one, as the host has given them out
// (attention/cuda/schedule.rs): next [tiles · kv_heads] is what follows a task, negative at the end, and a block begins with the
// task of its number. One warpgroup copies, two have 64 of the queries each and meet all tiles of keys with them. Scores and their
// weights lie in the registers of the warpgroup, as sums of the first product and as the left operand of the second.
//
// Tensor cores wait for nobody if a warpgroup softens while they have something else to multiply. For that
//   * the scores of the next tile are started before this tile's weights meet v, and the softmax of those scores runs while
//     they do;
//   * the two warpgroups take turns in starting their products, so that they do not soften at the same time (after Shah et al.
//     2024, "FlashAttention-3");
//   * what the next task begins with is loaded while this one's last tile is multiplied and its rows are written.
//
// Shared memory: q [ROWS]; out on its way to memory [ROWS]; STAGES times k [KEYS] and v [KEYS], loaded apart, since v is needed
// later and longer; barriers full and empty of each; for q and each k what it is of.
//
// Constants from outside (attention/cuda/hopper.rs): HEAD_DIM, 64 or 128; SHARING; ROWS, 128; KEYS, 128; STAGES.
#include "hopper_tiles.cuh"

static_assert(ROWS == MULTIPLIERS * PART, "a warpgroup has 64 rows");
// Tokens of a tile of queries at most.
constexpr int TOKENS = ROWS / SHARING;

struct Shared {
    unsigned char *q, *out, *k, *v;
    Barrier *q_full, *q_empty, *k_full, *k_empty, *v_full, *v_empty;
    Own* own;
    Met* met;
};

DEVICE Shared shared_memory() {
    unsigned char* q = dynamic_shared();
    unsigned char* out = q + tile_bytes(ROWS);
    unsigned char* k = out + tile_bytes(ROWS);
    unsigned char* v = k + STAGES * tile_bytes(KEYS);
    auto q_full = reinterpret_cast<Barrier*>(v + STAGES * tile_bytes(KEYS));
    Barrier* rings = q_full + 2;
    auto own = reinterpret_cast<Own*>(rings + 4 * STAGES);
    auto met = reinterpret_cast<Met*>(own + 1);
    return {q, out, k, v, q_full, q_full + 1, rings, rings + STAGES, rings + 2 * STAGES, rings + 3 * STAGES, own, met};
}

// By all threads of the block, before anything else.
DEVICE void prepare(const Shared& shared) {
    if (threadIdx.x == 0) {
        barrier_init(shared.q_full, 1);
        barrier_init(shared.q_empty, READERS);
        init_ring(shared.k_full, shared.k_empty, 1);
        init_ring(shared.v_full, shared.v_empty, 1);
        fence_barrier_init();
    }
    __syncthreads();
}

// By one thread: of each task the queries, then each tile of keys, when there is a place for it, k one ahead of v.
DEVICE void copy_tiles(const Shared& shared, const TensorMap& q, const TensorMap& k, const TensorMap& v, const int* tiles,
                       const int* runs, const int* next, int count) {
    Turn k_turn = {0, 0}, v_turn = {0, 0};
    uint32_t q_parity = 1;
    for (int number = int(blockIdx.x); number >= 0;) {
        Task task(number, count);
        number = next[number];
        Walk walk = own_walk(tiles, task.tile);
        auto load_keys = [&](const Span& keys) {
            int stage = k_turn.stage;
            barrier_wait(shared.k_empty + stage, k_turn.parity ^ 1);
            shared.met[stage] = {keys.position, keys.tokens, walk.run != walk.end};
            barrier_arrive_expecting(shared.k_full + stage, tile_bytes(KEYS));
            load_boxes<KEYS>(shared.k + stage * tile_bytes(KEYS), k, shared.k_full + stage, task.head, keys.row);
            k_turn.next();
        };
        auto load_values = [&](const Span& keys) {
            int stage = v_turn.stage;
            barrier_wait(shared.v_empty + stage, v_turn.parity ^ 1);
            barrier_arrive_expecting(shared.v_full + stage, tile_bytes(KEYS));
            load_boxes<KEYS>(shared.v + stage * tile_bytes(KEYS), v, shared.v_full + stage, task.head, keys.row);
            v_turn.next();
        };
        Span own = own_span(tiles, task.tile);
        barrier_wait(shared.q_empty, q_parity);
        q_parity ^= 1;
        *shared.own = {own, task.head, number >= 0};
        barrier_arrive_expecting(shared.q_full, tile_bytes(TOKENS * SHARING));
        load_boxes<ROWS>(shared.q, q, shared.q_full, task.head * SHARING, own.row);
        Span keys = next_span(walk, runs, KEYS);
        load_keys(keys);
        while (keys.tokens > 0) {
            Span after = next_span(walk, runs, KEYS);
            if (after.tokens > 0) load_keys(after);
            load_values(keys);
            keys = after;
        }
    }
}

// Softmax over keys that arrive tile by tile, exponents in base 2: of each of the thread's rows the largest score so far and
// Σ 2^(score - top) over its own columns.
struct OnlineSoftmax {
    float top[2], sum[2];

    // Turns scores into weights 2^(scale · score - top). What was summed before is to be multiplied by `shrink`.
    DEVICE void soften(float (&scores)[KEYS / 2], float scale, float (&shrink)[2]) {
        float shift[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float largest = NEG_INFINITY;
#pragma unroll
            for (int i = 0; i < KEYS / 2; i++)
                if (half_of(i) == half) largest = fmaxf(largest, scores[i]);
            largest = fmaxf(top[half], quad_max(largest) * scale);
            // Nothing visible yet: any shift but -inf keeps 2^(-inf) at 0.
            shift[half] = largest == NEG_INFINITY ? 0.0f : largest;
            shrink[half] = exp2_fast(top[half] - shift[half]);
            top[half] = largest;
            sum[half] *= shrink[half];
        }
#pragma unroll
        for (int i = 0; i < KEYS / 2; i++) {
            int half = half_of(i);
            scores[i] = exp2_fast(__fmaf_rn(scores[i], scale, -shift[half]));
            sum[half] += scores[i];
        }
    }
};

// One of the two warpgroups: of each task its queries meet all keys.
DEVICE void attend(const Shared& shared, int part, bf16* out, float* lse, int kv_heads, int window, float scale) {
    constexpr int BOTH = MULTIPLIERS * WARPGROUP_THREADS;
    const int first = PART * part, row = first + own_row();
    const unsigned char* q = shared.q + first * ROW_BYTES;
    float sums[HEAD_DIM / 2], scores[KEYS / 2], shrink[2];
    Weights<KEYS> weights;
    Turn k_turn = {0, 0}, v_turn = {0, 0};
    uint32_t q_parity = 0;
    // The first turn is the first warpgroup's.
    if (part == 1) named_barrier_arrive(1, BOTH);
    for (int more = 1; more;) {
        barrier_wait(shared.q_full, q_parity);
        q_parity ^= 1;
        const Own task = *shared.own;
        const Span own = task.span, mine = tokens_of(own, first, PART, SHARING);
        more = task.more;
        const int positions[2] = {own.position + row / SHARING, own.position + (row + 8) / SHARING};
        OnlineSoftmax state = {{NEG_INFINITY, NEG_INFINITY}, {0.0f, 0.0f}};

        auto next_keys = [&] {
            barrier_wait(shared.k_full + k_turn.stage, k_turn.parity);
            return shared.met[k_turn.stage];
        };
        auto start_scores = [&] {
            start_product<ROWS, KEYS>(scores, q, shared.k + k_turn.stage * tile_bytes(KEYS));
            wgmma_commit();
        };
        auto start_sums = [&] {
            barrier_wait(shared.v_full + v_turn.stage, v_turn.parity);
            wgmma_fence();
            start_adding<KEYS>(sums, weights, shared.v + v_turn.stage * tile_bytes(KEYS));
            wgmma_commit();
        };
        auto soften = [&](const Met& met) {
            hold(scores);
            release(shared.k_empty + k_turn.stage);
            if (!met.more) release(shared.q_empty);
            k_turn.next();
            Span keys = {0, met.position, met.tokens};
            if (met.tokens < KEYS || !sees_all(mine, keys, window)) {
                const Columns visible[2] = {keys_of(positions[0], keys, window), keys_of(positions[1], keys, window)};
                hide(scores, visible);
            }
            state.soften(scores, scale * LOG2_E, shrink);
        };

        set_zero(sums);
        Met keys = next_keys();
        wgmma_fence();
        start_scores();
        wgmma_wait<0>();
        soften(keys);
        weights.round(scores);
        while (keys.more) {
            keys = next_keys();
            named_barrier_sync(1 + part, BOTH);
            wgmma_fence();
            start_scores();
            start_sums();
            named_barrier_arrive(2 - part, BOTH);
            wgmma_wait<1>();
            soften(keys);
            finish(scores, shared.v_full + v_turn.stage, v_turn.parity);
            wgmma_wait<0>();
            hold(sums);
            release(shared.v_empty + v_turn.stage);
            v_turn.next();
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 2; i++) sums[i] *= shrink[half_of(i)];
            weights.round(scores);
        }
        start_sums();
        wgmma_wait<0>();
        hold(sums);
        release(shared.v_empty + v_turn.stage);
        v_turn.next();

        float factors[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = quad_sum(state.sum[half]);
            factors[half] = 1.0f / sum;
            int stacked = row + 8 * half;
            if (threadIdx.x % 4 == 0 && stacked < own.tokens * SHARING) {
                size_t at = first_row<SHARING>(own, kv_heads, task.head) + row_within<SHARING>(stacked, kv_heads);
                lse[at] = state.top[half] * LN_2 + logf(sum);
            }
        }
        store_rows<SHARING, ROWS>(shared.out, first, sums, factors, out, own, kv_heads, task.head);
    }
    // The last turn that was given, which nobody takes.
    if (part == 0) named_barrier_sync(1, BOTH);
}

// `scale`: 1 / sqrt(HEAD_DIM). `window`: larger than any position where there is none. `count`: of the tiles.
HOPPER_KERNEL(THREADS, 1) hopper_attention_forward(TENSOR_MAP q, TENSOR_MAP k, TENSOR_MAP v, bf16* out, float* lse,
                                                   const int* tiles, const int* runs, const int* next, int count, int kv_heads,
                                                   int window, float scale) {
    Shared shared = shared_memory();
    prepare(shared);
    if (warpgroup_index() == 0) {
        fewer_registers<FEW>();
        if (threadIdx.x == 0) copy_tiles(shared, q, k, v, tiles, runs, next, count);
    } else {
        more_registers<MANY>();
        attend(shared, warpgroup_index() - 1, out, lse, kv_heads, window, scale);
    }
}
