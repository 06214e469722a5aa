// Attention on Hopper, the way back in one pass: formulas, contract, rows and tables as in attention.cu.
//
//     sᵀ = k qᵀ · scale      dpᵀ = v doutᵀ      dv += pᵀ dout      dsᵀ = pᵀ (dpᵀ - delta)      dk += dsᵀ q · scale      dq += ds k · scale
//
// A block has a tile of ROWS keys and a key head, and meets all tiles of QUERIES stacked queries that see some of them, the last
// ones first. One warp copies, two warpgroups have 64 of the keys each. sᵀ and dpᵀ are sums in registers, laid out as the left operand
// that pᵀ and dsᵀ then are; dk and dv stay in registers for all of the block's time. dsᵀ also goes to shared memory, from where
// each warpgroup multiplies it with half of the columns of all keys: what the block adds to dq, which two more warps hand to the
// copy engine.
//
// dq's sums lie in memory (hopper_sums.cuh), and each gets the keys in the order of their positions, so that its bits are always
// the same: a tile of queries has a word that says up to which position keys have been added, and who has the next ones waits for
// it. Nobody waits for a block that has not begun: blocks take their tiles in the order in which they begin, and who is waited for
// comes earlier in the list. Who walks from the last queries to the first is one tile behind who has the keys before, not all tiles
// of a diagonal. The first keys that a tile of queries sees are stored, not added, so nothing has to be zero but the words.
//
// Products are started as soon as their operands are there and waited for as late as their sums are needed: exponentials run beside
// dpᵀ, differences beside dv, dsᵀ is written beside dk, and dq beside the next tile's sᵀ.
//
// Shared memory: k, v [ROWS]; STAGES times q, dout [QUERIES]; twice dsᵀ [ROWS, QUERIES] and dq in f32 [QUERIES], each row
// as in memory; STAGES times lse in base 2 and delta [QUERIES]; for each what it is of; barriers; the block's number. Rows of q and
// dout that no box fills are zeros.
//
// hopper_backward_finish.cu makes dq of its sums. Both kernels turn what they write back by its position, where there are angles.
//
// Constants from outside (attention/cuda/hopper.rs): HEAD_DIM, 64 or 128; SHARING; ROWS, 128; QUERIES, 64; STAGES.
#include "hopper_sums.cuh"
#include "hopper_tiles.cuh"

static_assert(ROWS == MULTIPLIERS * PART && QUERIES == PART, "a warpgroup has 64 rows, of dq too");
// Tokens of a tile of queries at most.
constexpr int TOKENS = QUERIES / SHARING;
// Slopes that are written while others are read.
constexpr int SLOPES = 2;
// Tiles of dq on their way to memory, a warp for each.
constexpr int STAGED = 2;
constexpr int SLOPES_BYTES = ROWS * QUERIES * int(sizeof(bf16));
constexpr int STAGED_BYTES = QUERIES * HEAD_DIM * int(sizeof(float));
// Tiles of queries of which is known what they are: all that are loaded, multiplied or on their way.
constexpr int KNOWN = 8;
static_assert(KNOWN >= STAGES + STAGED + 1, "none is forgotten while it is asked for");
// Columns of dq that a warpgroup makes.
constexpr int COLUMNS = HEAD_DIM / MULTIPLIERS;
constexpr int SUM_BYTES = HEAD_DIM * int(sizeof(float));

// A tile of keys and a key head.
struct Keys {
    int tile, head;
};

// A tile of queries that the block meets, and whether it meets another.
struct Tile {
    Span queries;
    int more;
};

struct Shared {
    unsigned char *k, *v, *q, *dout, *slopes, *staged;
    float *lse, *delta;
    Barrier *own_full, *full, *empty, *staged_full, *staged_empty;
    Tile* tiles;
    int* number;
};

DEVICE Shared shared_memory() {
    unsigned char* k = dynamic_shared();
    unsigned char* v = k + tile_bytes(ROWS);
    unsigned char* q = v + tile_bytes(ROWS);
    unsigned char* dout = q + STAGES * tile_bytes(QUERIES);
    unsigned char* slopes = dout + STAGES * tile_bytes(QUERIES);
    unsigned char* staged = slopes + SLOPES * SLOPES_BYTES;
    auto lse = reinterpret_cast<float*>(staged + STAGED * STAGED_BYTES);
    float* delta = lse + STAGES * QUERIES;
    auto own_full = reinterpret_cast<Barrier*>(delta + STAGES * QUERIES);
    Barrier* full = own_full + 1;
    Barrier* staged_full = full + 2 * STAGES;
    auto tiles = reinterpret_cast<Tile*>(staged_full + 2 * STAGED);
    auto number = reinterpret_cast<int*>(tiles + KNOWN);
    return {k,    v,        q,    dout,          slopes,      staged, lse, delta, own_full, full, full + STAGES, staged_full,
            staged_full + STAGED, tiles, number};
}

// By all threads of the block, before anything else.
DEVICE void prepare(const Shared& shared, int* begun) {
    if (threadIdx.x == 0) {
        *shared.number = atomicAdd(begun, 1);
        barrier_init(shared.own_full, 1);
        init_ring(shared.full, shared.empty, 2);
        for (int stage = 0; stage < STAGED; stage++) {
            barrier_init(shared.staged_full + stage, READERS);
            barrier_init(shared.staged_empty + stage, 1);
        }
        fence_barrier_init();
    }
    fill_up<QUERIES, TOKENS * SHARING>(shared.q, 2 * STAGES);
    __syncthreads();
}

// What the block has: key heads of a tile follow each other. Each role reads it for itself, so that none keeps what another needs.
DEVICE Keys own_keys(const Shared& shared, int kv_heads) {
    int number = *const_cast<const volatile int*>(shared.number);
    return {number / kv_heads, number % kv_heads};
}

// The tokens before those that were met at the end of the runs, as far as a tile goes that is counted from the run's first; none when
// all have been met.
DEVICE Span span_before(Walk& walk, const int* runs) {
    if (walk.run == walk.end) return Span{0, 0, 0};
    const int* run = runs + 3 * (walk.end - 1);
    int left = run[2] - walk.met, start = (left - 1) / TOKENS * TOKENS;
    walk.met += left - start;
    if (start == 0) {
        walk.end--;
        walk.met = 0;
    }
    return Span{run[0] + start, run[1] + start, left - start};
}

// By one thread: keys and values, then each tile of queries when its stage is free.
DEVICE void copy_tiles(const Shared& shared, const TensorMap& dout, const TensorMap& q, const TensorMap& k, const TensorMap& v,
                       const int* tiles, const int* runs, int kv_heads) {
    const Keys own = own_keys(shared, kv_heads);
    int row = own_span(tiles, own.tile).row;
    barrier_arrive_expecting(shared.own_full, 2 * tile_bytes(ROWS));
    load_boxes<ROWS>(shared.k, k, shared.own_full, own.head, row);
    load_boxes<ROWS>(shared.v, v, shared.own_full, own.head, row);
    Walk walk = own_walk(tiles, own.tile);
    Turn turn = {0, 0};
    int tile = 0;
    for (Span queries = span_before(walk, runs); queries.tokens > 0; queries = span_before(walk, runs), tile++, turn.next()) {
        int stage = turn.stage;
        Barrier* full = shared.full + stage;
        barrier_wait(shared.empty + stage, turn.parity ^ 1);
        shared.tiles[tile % KNOWN] = {queries, walk.run != walk.end};
        barrier_arrive_expecting(full, 2 * tile_bytes(TOKENS * SHARING));
        load_boxes<QUERIES>(shared.q + stage * tile_bytes(QUERIES), q, full, own.head * SHARING, queries.row);
        load_boxes<QUERIES>(shared.dout + stage * tile_bytes(QUERIES), dout, full, own.head * SHARING, queries.row);
    }
}

// By one warp: likewise what is known of each query.
DEVICE void copy_statistics(const Shared& shared, const float* lse, const float* delta, const int* tiles, const int* runs,
                            int kv_heads) {
    const Keys own = own_keys(shared, kv_heads);
    const int lane = lane_index();
    Walk walk = own_walk(tiles, own.tile);
    Turn turn = {0, 0};
    for (Span queries = span_before(walk, runs); queries.tokens > 0; queries = span_before(walk, runs), turn.next()) {
        int stage = turn.stage;
        barrier_wait(shared.empty + stage, turn.parity ^ 1);
#pragma unroll 1
        for (int row = lane; row < QUERIES; row += WARP) {
            bool there = row < queries.tokens * SHARING;
            size_t at = first_row<SHARING>(queries, kv_heads, own.head) + row_within<SHARING>(row, kv_heads);
            // Queries that are not there have a probability of 0.
            shared.lse[stage * QUERIES + row] = there ? lse[at] * LOG2_E : INFINITY;
            shared.delta[stage * QUERIES + row] = there ? delta[at] : 0.0f;
        }
        release(shared.full + stage);
    }
}

// By one thread for each place of dq: every STAGED-th tile goes to its sums when all keys before have been added.
DEVICE void add_tiles(const Shared& shared, int place, float* sums, int* words, const int* tiles, const int* runs,
                      int kv_heads, int window) {
    const Keys task = own_keys(shared, kv_heads);
    const Span own = own_span(tiles, task.tile);
    const Walk walk = own_walk(tiles, task.tile);
    int count = 0;
#pragma unroll 1
    for (int run = walk.run; run < walk.end; run++) count += divide_up(runs[3 * run + 2], TOKENS);
    uint32_t parity = 0;
    for (int tile = place; tile < count; tile += STAGED, parity ^= 1) {
        barrier_wait(shared.staged_full + place, parity);
        const Span queries = shared.tiles[tile % KNOWN].queries;
        const unsigned char* staged = shared.staged + place * STAGED_BYTES;
        float* to = sums + sums_at(queries, kv_heads, task.head);
        int* word = words + (queries.row * kv_heads + task.head);
        uint32_t bytes = uint32_t(queries.tokens * SHARING * SUM_BYTES);
        // The first query sees the farthest.
        if (own.position <= max(queries.position - window + 1, 0)) {
            bulk_store(to, staged, bytes);
        } else {
            acquire_when(word, own.position);
            fence_async_global();
            bulk_add(to, staged, bytes);
        }
        tma_store_commit();
        tma_store_wait<0>();
        barrier_arrive(shared.staged_empty + place);
        bulk_wait<0>();
        store_release(word, end_of(own));
    }
}

// Where those of a tile of queries are.
DEVICE unsigned char* slopes_of(const Shared& shared, int tile) { return shared.slopes + tile % SLOPES * SLOPES_BYTES; }

// A warp's part of slopes, to where tensor cores read them across.
DEVICE void share(unsigned char* tile, int part, const Weights<QUERIES>& slopes) {
    int thread = thread_index_again(), lane = thread % WARP, first = PART * part + thread % WARPGROUP_THREADS / WARP * 16;
#pragma unroll
    for (int k = 0; k < QUERIES / 16; k++)
        stmatrix_x4(tile + swizzled<8>(first + lane % 16, 2 * k + lane / 16), slopes.of[k]);
    fence_async(tile + first * ROW_BYTES, 16 * ROW_BYTES);
}

// dq [QUERIES, COLUMNS] = slopes keys: of all ROWS keys the warpgroup's columns.
DEVICE void start_queries(float (&dq)[COLUMNS / 2], const unsigned char* slopes, const unsigned char* k, int part) {
    constexpr int SAME_PANEL = MULTIPLIERS / PANELS;
    const unsigned char* columns = k + part / SAME_PANEL * ROWS * ROW_BYTES + part % SAME_PANEL * COLUMNS * int(sizeof(bf16));
    uint64_t left = descriptor_across(slopes, SLOPES_BYTES), right = descriptor_across(columns, ROWS * ROW_BYTES);
#pragma unroll
    for (int keys = 0; keys < ROWS; keys += 16)
        wgmma<true, true>(dq, advanced(left, keys * ROW_BYTES), advanced(right, keys * ROW_BYTES), keys > 0);
}

// Hands a warpgroup's columns of dq to who adds them.
DEVICE void hand_over(const Shared& shared, int tile, int part, const float (&dq)[COLUMNS / 2]) {
    int thread = thread_index_again(), row = thread % WARPGROUP_THREADS / WARP * 16 + thread % WARP / 4, place = tile % STAGED;
    unsigned char* staged = shared.staged + place * STAGED_BYTES;
    unsigned char* at = staged + row * SUM_BYTES + thread % 4 * int(sizeof(float2));
    barrier_wait(shared.staged_empty + place, tile / STAGED % 2 ^ 1);
#pragma unroll
    for (int group = 0; group < COLUMNS / 8; group++) {
        unsigned char* to = at + place_of(row, COLUMNS / 8 * part + group) * 32;
        *reinterpret_cast<float2*>(to) = make_float2(dq[4 * group], dq[4 * group + 1]);
        *reinterpret_cast<float2*>(to + 8 * SUM_BYTES) = make_float2(dq[4 * group + 2], dq[4 * group + 3]);
    }
    fence_async(staged + row / 16 * 16 * SUM_BYTES, 16 * SUM_BYTES);
    release(shared.staged_full + place);
}

// Turns the rows of a warpgroup's sums of keys back, scaled.
DEVICE void turn_back(float (&sums)[HEAD_DIM / 2], int position, float scale, const Angles& angles) {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; i++) sums[i] *= scale;
    if (!angles.table) return;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sign;
        const float* of_row = angles.of(position + 8 * half, sign) + int(threadIdx.x) % 4 * 4;
#pragma unroll
        for (int group = 0; group < HEAD_DIM / 16; group++) {
            int i = 4 * group + 2 * half;
            float4 two = *reinterpret_cast<const float4*>(of_row + 16 * group);
            turn(sums[i], sums[i + HEAD_DIM / 4], two.x, sign * two.y);
            turn(sums[i + 1], sums[i + 1 + HEAD_DIM / 4], two.z, sign * two.w);
        }
    }
}

// One of the two warpgroups: its keys meet all queries.
DEVICE void collect(const Shared& shared, int part, bf16* dk, bf16* dv, const int* tiles, int kv_heads, int window,
                    float scale, const Angles& angles) {
    constexpr int BOTH = MULTIPLIERS * WARPGROUP_THREADS;
    const Keys task = own_keys(shared, kv_heads);
    const int first = PART * part, row = first + own_row();
    Span own = own_span(tiles, task.tile), mine = tokens_of(own, first, PART, 1);
    const int position = own.position + row;
    const unsigned char *k = shared.k + first * ROW_BYTES, *v = shared.v + first * ROW_BYTES;
    float sums_k[HEAD_DIM / 2], sums_v[HEAD_DIM / 2], p[QUERIES / 2], dq[COLUMNS / 2];
    Turn turn = {0, 0};
    auto start_scores = [&] {
        set_zero(p);
        wgmma_fence();
        start_product<ROWS, QUERIES>(p, k, shared.q + turn.stage * tile_bytes(QUERIES));
        wgmma_commit();
    };
    auto start_dq = [&](int tile) {
        set_zero(dq);
        wgmma_fence();
        start_queries(dq, slopes_of(shared, tile), shared.k, part);
        wgmma_commit();
    };
    set_zero(sums_k);
    set_zero(sums_v);
    barrier_wait(shared.own_full, 0);
    barrier_wait(shared.full + turn.stage, turn.parity);
    start_scores();
    int tile = 0;
    for (;; tile++) {
        const int stage = turn.stage;
        const unsigned char* q = shared.q + stage * tile_bytes(QUERIES);
        const unsigned char* dout = shared.dout + stage * tile_bytes(QUERIES);
        // Of the thread's two columns in every eight.
        const float* lse = shared.lse + stage * QUERIES + threadIdx.x % 4 * 2;
        const float* delta = shared.delta + stage * QUERIES + threadIdx.x % 4 * 2;
        float ds[QUERIES / 2];
        Weights<QUERIES> weights, slopes;
        set_zero(ds);
        wgmma_fence();
        start_product<ROWS, QUERIES>(ds, v, dout);
        wgmma_commit();
        wgmma_wait<1>();
        hold(p);
        const Span queries = shared.tiles[tile % KNOWN].queries;
        // Keys that are not there add nothing to dq.
        if (mine.tokens < PART || !sees_all(queries, mine, window)) {
            Columns visible[2] = {queries_of(position, queries, window), queries_of(position + 8, queries, window)};
            if (row >= own.tokens) visible[0].end = 0;
            if (row + 8 >= own.tokens) visible[1].end = 0;
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
        share(slopes_of(shared, tile), part, slopes);
        // Who is here has read the slopes before the last ones, whose place is next.
        named_barrier_sync(1, BOTH);
        if (!shared.tiles[tile % KNOWN].more) break;
        turn.next();
        // The weights, whose registers are needed.
        wgmma_wait<1>();
        // Here, since the assembler has products behind such a wait done before sums are read that were started ahead of it.
        barrier_wait(shared.full + turn.stage, turn.parity);
        start_dq(tile);
        start_scores();
        // All of this tile.
        wgmma_wait<1>();
        hold(dq);
        release(shared.empty + stage);
        hand_over(shared, tile, part, dq);
    }
    start_dq(tile);
    wgmma_wait<0>();
    hold(sums_k);
    hold(sums_v);
    hold(dq);
    hand_over(shared, tile, part, dq);
    // Both have read all keys.
    named_barrier_sync(1, BOTH);
    turn_back(sums_k, position, scale, angles);
    const float ones[2] = {1.0f, 1.0f};
    store_rows<1, ROWS>(shared.k, first, sums_k, ones, dk, own, kv_heads, task.head);
    store_rows<1, ROWS>(shared.v, first, sums_v, ones, dv, own, kv_heads, task.head);
}

// `sums` [T, heads, HEAD_DIM], as hopper_sums.cuh says; `words_room` [1 + T · kv_heads], zeros, integers in room for f32: how many
// blocks have begun, then of each token that is the first of a tile and each key head up to which position keys have been added.
HOPPER_KERNEL(THREADS, 1) hopper_attention_backward(TENSOR_MAP dout, TENSOR_MAP q, TENSOR_MAP k, TENSOR_MAP v, const float* lse,
                                                    const float* delta, float* sums, float* words_room, bf16* dk, bf16* dv,
                                                    const int* tiles, const int* runs, int kv_heads, int window, float scale,
                                                    const float* angles, uint32_t positions) {
    Shared shared = shared_memory();
    auto words = reinterpret_cast<int*>(words_room);
    prepare(shared, words);
    if (warpgroup_index() == 0) {
        fewer_registers<FEW>();
        const int warp = warp_index(), lane = lane_index();
        if (warp < STAGED) {
            if (lane == 0) add_tiles(shared, warp, sums, words + 1, tiles, runs, kv_heads, window);
        } else if (warp == STAGED) {
            if (lane == 0) copy_tiles(shared, dout, q, k, v, tiles, runs, kv_heads);
        } else {
            copy_statistics(shared, lse, delta, tiles, runs, kv_heads);
        }
    } else {
        more_registers<MANY>();
        collect(shared, warpgroup_index() - 1, dk, dv, tiles, kv_heads, window, scale, {angles, positions});
    }
}
