// A product on Hopper but for what becomes of its sums: what hopper*.cu are made of.
//
//     out [rows, columns] = left [rows, depth] right        right: [columns, depth] ("along") or [depth, columns] ("across")
//
// A block makes tiles [128, TILE_N] of the output, a cluster of two blocks one below the other. One warpgroup copies, two
// multiply 64 rows each, all three for as many tiles as come: while a tile is written the next is being loaded. Shared memory:
//
//     ring     STAGES times a slice of 64 of the depth: left [128, 64], right [TILE_N, 64] or TILE_N / 64 panels [64, 64],
//              and for short sides of adapters (hopper_short.cuh) a piece more
//     staged   STAGED pieces [64, 64] for each multiplying warpgroup, on their way to global memory or from it
//     barriers full and empty of each stage, one for each staged piece
//     tasks    what a cluster does besides tiles, if anything
//
// The factor `right` is the same for both blocks: each loads half of it for both, so the level 2 cache is asked for 128 + TILE_N / 2
// rows a block instead of 128 + TILE_N. A stage is loaded again when both warpgroups of both blocks have read it.
//
// Every element is summed in one order, whatever rows are beside it: a row has the same bits in any company. (Whether tiles of
// different width agree in the last bit is the tensor cores' secret: the weight alone decides the width.) An adapter whose products
// are zeros changes no bit.
//
// After Pranjal Shankhdhar's "Outperforming cuBLAS on H100" (fast.cu) and DeepGEMM.
//
// Constants from outside: TILE_N, STAGES, STAGED, and SHORT_GROUPS of 16 of the ranks of short sides, 0 where none are made.
#pragma once
#include "hopper.cuh"
#include "hopper_products.cuh"
#include "tile.cuh"

constexpr int CLUSTER = 2;
constexpr int MULTIPLIERS = 2;
constexpr int THREADS = (1 + MULTIPLIERS) * WARPGROUP_THREADS;
constexpr int TILE_M = 64 * MULTIPLIERS;
constexpr int TILE_K = 64;
// Of the depth, for one product of the tensor cores.
constexpr int STEP = 16;
constexpr int PANELS = TILE_N / 64;
// Registers of a thread that copies, and of one that multiplies: three warpgroups have 504 to share.
constexpr int FEW = 40, MANY = 232;
static_assert(FEW + MULTIPLIERS * MANY <= 504, "or who multiplies waits for ever");

constexpr int ROW_BYTES = 128;
constexpr int PIECE_BYTES = 64 * ROW_BYTES;
constexpr int LEFT_BYTES = TILE_M * ROW_BYTES;
constexpr int RIGHT_BYTES = TILE_N * ROW_BYTES;
constexpr int STAGE_BYTES = LEFT_BYTES + RIGHT_BYTES + (SHORT_GROUPS > 0 ? PIECE_BYTES : 0);

// Pairs of tiles below each other that run together before the next columns do, so that factors meet in the level 2 cache.
constexpr int GROUP = 8;

struct Shared {
    unsigned char* ring;
    unsigned char* staged;
    Barrier *full, *empty, *arrived;
    void* tasks;
};

DEVICE Shared shared_memory() {
    unsigned char* ring = dynamic_shared();
    unsigned char* staged = ring + STAGES * STAGE_BYTES;
    auto barriers = reinterpret_cast<Barrier*>(staged + MULTIPLIERS * STAGED * PIECE_BYTES);
    Barrier* arrived = barriers + 2 * STAGES;
    return {ring, staged, barriers, barriers + STAGES, arrived, arrived + MULTIPLIERS * STAGED};
}

// By all threads of the cluster, before anything else.
DEVICE void prepare(const Shared& shared) {
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; stage++) {
            barrier_init(shared.full + stage, 1);
            barrier_init(shared.empty + stage, MULTIPLIERS * CLUSTER);
        }
        for (int piece = 0; piece < MULTIPLIERS * STAGED; piece++) barrier_init(shared.arrived + piece, 1);
        fence_barrier_init();
    }
    cluster_sync();
}

// Every turn goes on where the last tile left it.
using Turn = TurnOf<STAGES>;

// A multiplying warpgroup: which one, and the calling thread in it.
struct Part {
    int index, thread;

    DEVICE void sync() const { named_barrier_sync(1 + index, WARPGROUP_THREADS); }
};

// The tiles of an output, as a cluster meets them.
struct Tiles {
    // `width`: of the output that a tile makes.
    int down, across, width, first, at;

    DEVICE static Tiles of(int rows, int columns, int width) { return some(rows, 0, divide_up(columns, width), width); }
    // Those `across`, from column `first` on.
    DEVICE static Tiles some(int rows, int first, int across, int width) {
        return {divide_up(rows, CLUSTER * TILE_M), across, width, first, int(blockIdx.x) / CLUSTER};
    }
    DEVICE int all() const { return down * across; }
    DEVICE bool more() const { return at < all(); }
    DEVICE void next() { at += int(gridDim.x) / CLUSTER; }
    // The first row and column of this block's.
    DEVICE int2 corner() const {
        int top = at / (GROUP * across) * GROUP;
        int height = min(down - top, GROUP);
        int inside = at % (GROUP * across);
        int pair = top + inside % height;
        return make_int2((pair * CLUSTER + int(cluster_rank())) * TILE_M, first + inside / height * width);
    }
};

// A block's half of `right`, rows `row` on of a map in boxes of TILE_N / 2, for both blocks.
DEVICE void load_half(unsigned char* right, Barrier* full, const TensorMap& map, int row, int k) {
    tma_load_multicast(right + int(cluster_rank()) * (TILE_N / CLUSTER) * ROW_BYTES, map, full, k, row, 3);
}

// Two factors' tensor maps: left in boxes of 128 rows, right of TILE_N / 2 ("along") or 64 ("across").
struct Factors {
    const TensorMap& left;
    const TensorMap& right;

    // Not `with_left`: the left one is not asked for.
    template <bool ALONG>
    DEVICE void load(unsigned char* stage, Barrier* full, int2 corner, int k, bool with_left) const {
        const int rank = int(cluster_rank());
        if (with_left) tma_load(stage, left, full, k, corner.x);
        if (ALONG) {
            load_half(stage + LEFT_BYTES, full, right, corner.y + rank * (TILE_N / CLUSTER), k);
        } else {
            constexpr int HALF = PANELS / CLUSTER;
#pragma unroll
            for (int panel = 0; panel < HALF; panel++) {
                int at = rank * HALF + panel;
                tma_load_multicast(stage + LEFT_BYTES + at * PIECE_BYTES, right, full, corner.y + 64 * at, k, 3);
            }
        }
    }
};

// How many products of the tensor cores slice `slice` of a factor of this depth takes: an adapter's rank rarely fills one.
DEVICE int steps_of(int depth, int slice) { return divide_up(min(depth - slice * TILE_K, TILE_K), STEP); }

// What a tile is the sum of: the weight's slices and then the adapter's.
template <bool ALONG_>
struct Linear {
    static constexpr bool ALONG = ALONG_;
    Factors weight, adapter;
    int of_weight, rank;

    DEVICE static Linear of(Factors weight, int depth, Factors adapter, int rank) {
        return {weight, adapter, divide_up(depth, TILE_K), rank};
    }
    DEVICE int of_adapter() const { return divide_up(rank, TILE_K); }
    DEVICE int slices() const { return of_weight + of_adapter(); }
    // Of a slice: which layer's it is, and which of the weight's or of the adapter's.
    DEVICE int2 place(int slice) const { return make_int2(0, slice < of_weight ? slice : slice - of_weight); }
    // Of a slice after the weight's.
    DEVICE int steps(int slice) const { return steps_of(rank, slice - of_weight); }
    DEVICE void prefetch() const {
        tma_prefetch(weight.left);
        tma_prefetch(weight.right);
    }
    DEVICE void load(unsigned char* stage, Barrier* full, int2 corner, int slice, bool with_left) const {
        load_of(slice < of_weight, stage, full, corner, place(slice).y, with_left);
    }
    // The weight's or the adapter's slice `slice`.
    DEVICE void load_of(bool of_w, unsigned char* stage, Barrier* full, int2 corner, int slice, bool with_left) const {
        if (of_w) weight.template load<ALONG>(stage, full, corner, slice * TILE_K, with_left);
        else adapter.template load<ALONG>(stage, full, corner, slice * TILE_K, with_left);
    }
};

// What is made beside a tile of the same rows: nothing. hopper_short.cuh has something.
struct NoShort {
    static constexpr int GROUPS = 0;
};

// What a cluster does besides tiles: nothing. hopper_gradients.cuh has something.
struct NoTasks {
    // By one thread, before anything else.
    DEVICE static void prepare(const Shared&) {}
    // After how many of the cluster's tiles.
    DEVICE static int after(const Tiles&) { return 0; }
    // By one thread of each block: the copies; by multiplying threads: the rest.
    DEVICE static void copy(const Shared&, Turn&, const Tiles&) {}
    DEVICE static void make(const Shared&, Turn&, const Tiles&, Part) {}
};

// By one thread: the slices of all tiles and tasks, each when its stage is free.
template <class Terms, class Short, class Tasks>
DEVICE void copy_slices(const Shared& shared, const Terms& terms, const Short& sides, Tiles tiles, const Tasks& tasks) {
    Turn turn = {0, 0};
    const int after = tasks.after(tiles);
    for (int done = 0;; done++, tiles.next()) {
        if (done == after) tasks.copy(shared, turn, tiles);
        if (!tiles.more()) break;
        int2 corner = tiles.corner();
        for (int slice = 0; slice < terms.slices(); slice++, turn.next()) {
            barrier_wait(shared.empty + turn.stage, turn.parity ^ 1);
            Barrier* full = shared.full + turn.stage;
            unsigned char* stage = shared.ring + turn.stage * STAGE_BYTES;
            if constexpr (Short::GROUPS == 0) {
                barrier_arrive_expecting(full, STAGE_BYTES);
                terms.load(stage, full, corner, slice, true);
            } else {
                // An adapter's left factor is made here.
                const bool of_weight = slice < terms.of_weight;
                barrier_arrive_expecting(full, RIGHT_BYTES + (of_weight ? LEFT_BYTES + Short::BYTES : 0));
                terms.load(stage, full, corner, slice, of_weight);
                if (of_weight) sides.load(stage, full, terms.place(slice));
            }
        }
    }
}

// Tells both blocks that the calling warpgroup has read a stage.
DEVICE void release(const Shared& shared, int stage, int thread) {
    if (thread < CLUSTER) barrier_arrive_at(shared.empty + stage, uint32_t(thread));
}

// Step k of a right factor of which a stage has a slice.
template <bool ALONG>
DEVICE uint64_t right_factor(unsigned char* right, int k) {
    return ALONG ? advanced(descriptor_along(right), 32 * k) : advanced(descriptor_across(right, PIECE_BYTES), 2048 * k);
}

// The sums of the part's 64 rows of a tile, as `wgmma` holds them; the weight has at least one slice. `corner`: the block's.
template <class Terms, class Short>
DEVICE void sum_slices(const Shared& shared, Turn& turn, const Terms& terms, const Short& sides, Part part, int2 corner,
                       float (&sums)[TILE_N / 2]) {
    constexpr bool ALONG = Terms::ALONG;
    int before = turn.stage;
    float beside[Short::GROUPS > 0 ? 8 * Short::GROUPS : 1];
    auto stage = [&]() { return shared.ring + turn.stage * STAGE_BYTES; };
    auto step = [&](int k, bool add) {
        uint64_t left = advanced(descriptor_along(stage() + part.index * PIECE_BYTES), 32 * k);
        wgmma<false, !ALONG>(sums, left, right_factor<ALONG>(stage() + LEFT_BYTES, k), add);
        if constexpr (Short::GROUPS > 0)
            wgmma<false, !ALONG>(beside, left, right_factor<ALONG>(stage() + LEFT_BYTES + RIGHT_BYTES, k), add);
    };
    auto steps = [&](bool add) {
        barrier_wait(shared.full + turn.stage, turn.parity);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < TILE_K / STEP; k++) step(k, add || k > 0);
        wgmma_commit();
    };
    // Apart, so that the compiler sees that nothing is left of the sums before.
    steps(false);
    turn.next();
    int slice = 1;
    for (; slice < terms.of_weight; slice++, turn.next()) {
        steps(true);
        // The slice before has been read.
        wgmma_wait<1>();
        release(shared, before, part.thread);
        before = turn.stage;
    }
    if constexpr (Short::GROUPS == 0) {
        // One product a turn: around a loop of as many as there are, the assembler would wait for each.
        for (int k = 0; slice < terms.slices();) {
            if (k == 0) barrier_wait(shared.full + turn.stage, turn.parity);
            wgmma_fence();
            step(k, true);
            wgmma_commit();
            wgmma_wait<1>();
            if (k == 0) release(shared, before, part.thread);
            before = turn.stage;
            if (++k < terms.steps(slice)) continue;
            k = 0, slice++;
            turn.next();
        }
    }
    wgmma_wait<0>();
    hold(sums);
    release(shared, before, part.thread);
    if constexpr (Short::GROUPS > 0) {
        hold(beside);
        uint32_t packed[Short::GROUPS][4], left[Short::GROUPS][4];
        sides.pack(beside, packed);
        sides.write(packed, part, corner);
        for (; slice < terms.slices(); slice++, turn.next()) {
            sides.of_layer(packed, terms.place(slice).x, left);
            barrier_wait(shared.full + turn.stage, turn.parity);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < Short::GROUPS; k++)
                wgmma<!ALONG>(sums, left[k], right_factor<ALONG>(stage() + LEFT_BYTES, k), true);
            wgmma_commit();
            wgmma_wait<0>();
            hold(sums);
            release(shared, turn.stage, part.thread);
        }
    }
}

// ---- pieces ----

// Staged piece `at` of the part, with the barrier at which what is loaded to it arrives.
DEVICE unsigned char* staged_piece(const Shared& shared, Part part, int at) {
    return shared.staged + (part.index * STAGED + at) * PIECE_BYTES;
}

// By one thread: asks for a piece of a matrix, which must be on its way nowhere.
DEVICE void ask_for(const Shared& shared, Part part, int at, const TensorMap& map, int row, int column) {
    Barrier* arrived = shared.arrived + part.index * STAGED + at;
    barrier_arrive_expecting(arrived, PIECE_BYTES);
    tma_load(staged_piece(shared, part, at), map, arrived, column, row);
}

// Waits for it; `parities` has a bit for each piece.
DEVICE void await_piece(const Shared& shared, Part part, int at, uint32_t& parities) {
    barrier_wait(shared.arrived + part.index * STAGED + at, parities >> at & 1);
    parities ^= 1u << at;
}

// Where in a piece [64, 64] the calling thread's 16 bytes of `stmatrix_x4` and `ldmatrix_x4` lie that go with the sums of
// columns 8 group to 8 group + 15.
DEVICE unsigned char* place_of(unsigned char* piece, int thread, int group) {
    return piece + swizzled<8>(thread / 32 * 16 + thread % 16, group + thread % 32 / 16);
}

// Sends a staged piece that all threads of the part have written to.
DEVICE void send(const Shared& shared, Part part, int at, const TensorMap& map, int row, int column) {
    unsigned char* piece = staged_piece(shared, part, at);
    fence_async(piece, PIECE_BYTES);
    part.sync();
    if (part.thread != 0) return;
    tma_store(map, piece, column, row);
    tma_store_commit();
}

// Waits until a staged piece may be written to. Within a tile two are taken in turns, so that the store before the last must have been
// read; the `first` comes after any of the last tile.
DEVICE void await_place(Part part, bool first) {
    if (part.thread == 0) {
        if (first) tma_store_wait<0>();
        else tma_store_wait<1>();
    }
    part.sync();
}

// Fills a staged piece: `pair(i)` is what becomes of the i-th and the next of the 32 sums that a thread has of 64 columns. (Sums stay
// as they are: where they are changed in place, the compiler moves them about in the loop that makes them.)
template <class Pair>
DEVICE void fill_piece(unsigned char* staged, Part part, Pair pair) {
#pragma unroll
    for (int group = 0; group < 8; group += 2) {
        uint32_t packed[4];
#pragma unroll
        for (int i = 0; i < 4; i++) packed[i] = pair(4 * group + 2 * i);
        stmatrix_x4(place_of(staged, part.thread, group), packed);
    }
}

// ---- the whole ----

// The sums of all tiles of `terms`, each handed to `epilogue`: of a tile whose rows begin at `row` and columns at `column`,
// `before(shared, part, row, column)` is called before the sums are made and `write(shared, part, sums, row, column)` after. With
// them the short `sides` of adapters are made, between tiles come the cluster's `tasks`.
template <class Terms, class Epilogue, class Short = NoShort, class Tasks = NoTasks>
DEVICE void product(const Terms& terms, Tiles tiles, Epilogue epilogue, const Short& sides = {}, const Tasks& tasks = {}) {
    Shared shared = shared_memory();
    if (threadIdx.x == 0) {
        terms.prefetch();
        tasks.prepare(shared);
    }
    prepare(shared);
    if (warpgroup_index() == 0) {
        fewer_registers<FEW>();
        if (threadIdx.x == 0) copy_slices(shared, terms, sides, tiles, tasks);
    } else {
        more_registers<MANY>();
        Part part = {warpgroup_index() - 1, int(threadIdx.x) % WARPGROUP_THREADS};
        Turn turn = {0, 0};
        const int after = tasks.after(tiles);
        for (int done = 0;; done++, tiles.next()) {
            if (done == after) tasks.make(shared, turn, tiles, part);
            if (!tiles.more()) break;
            int2 corner = tiles.corner();
            int row = corner.x + 64 * part.index;
            epilogue.before(shared, part, row, corner.y);
            float sums[TILE_N / 2];
            sum_slices(shared, turn, terms, sides, part, corner, sums);
            epilogue.write(shared, part, sums, row, corner.y);
        }
        if (part.thread == 0) tma_store_wait<0>(); // shared memory ends with the block
    }
    // Others may still arrive at this block's barriers.
    cluster_sync();
}
