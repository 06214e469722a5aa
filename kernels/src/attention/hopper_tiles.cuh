// What attention's kernels for Hopper share: tiles in shared memory, products and softmax of a warpgroup. The lesson is in
// attention.cu and hopper_forward.cu.
//
// A tile [rows, HEAD_DIM] is PANELS panels of [rows, 64] behind each other, each swizzled as hopper.cuh says. Of a matrix
// [T, heads, HEAD_DIM] the copy engine takes boxes of consecutive tokens with one or more heads of each: they come as the rows
// of a panel, stacked as attention.cu stacks them. A box has all of its rows whatever a span has: what lies behind a text are
// rows of another or, behind the last, zeros. They are numbers like all others, and weigh nothing.
//
// Sums of a warpgroup [64, N] lie as `wgmma` leaves them: the calling thread has parts of two rows, `own_row` and the eighth
// after it.
//
// Constants from outside: HEAD_DIM, 64 or 128; SHARING; STAGES.
#pragma once
#include "hopper.cuh"
#include "hopper_products.cuh"
#include "rows.cuh"
#include "tile.cuh"

constexpr int PANELS = HEAD_DIM / 64;
constexpr int CHUNKS = HEAD_DIM / 8;
constexpr int MULTIPLIERS = 2;
constexpr int THREADS = (1 + MULTIPLIERS) * WARPGROUP_THREADS;
// Rows of a warpgroup.
constexpr int PART = 64;
// Registers of a thread that copies, and of one that multiplies: three warpgroups have 504 to share.
constexpr int FEW = 24, MANY = 240;
static_assert(FEW + MULTIPLIERS * MANY <= 504, "or who multiplies waits for ever");
constexpr int ROW_BYTES = 128;
// Who has to have read a stage before it is loaded again.
constexpr int READERS = MULTIPLIERS * WARPGROUP_THREADS / WARP;

static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "rows of whole panels, and sums that the registers hold");

DEVICE constexpr int tile_bytes(int rows) { return rows * HEAD_DIM * int(sizeof(bf16)); }

// What a stage of a ring is of, and whether another tile follows. Who copies writes it down, before the stage is full.
struct Met {
    int position, tokens, more;
};

// Likewise of a tile of queries, for blocks that have one after the other.
struct Own {
    Span span;
    int head, more;
};

// A tile of queries and a key head, of `count` tiles: task number head · count + tile. A block of queries begins with its number and
// goes on with what `next` says, until that is negative.
struct Task {
    int tile, head;

    DEVICE Task(int number, int count) : tile(number % count), head(number / count) {}
};

using Turn = TurnOf<STAGES>;

// ---- before anything else ----

// By one thread: the barriers of a ring, of which each stage is full when so many have arrived.
DEVICE void init_ring(Barrier* full, Barrier* empty, int arrivals) {
    for (int stage = 0; stage < STAGES; stage++) {
        barrier_init(full + stage, arrivals);
        barrier_init(empty + stage, READERS);
    }
}

// By all threads of the block: zeros in the rows, from FILLED on, that no box fills, of `count` tiles of HEIGHT behind each other. A
// weight of zero for what is no number would be none either.
template <int HEIGHT, int FILLED>
DEVICE void fill_up(unsigned char* tiles, int count) {
    constexpr int BEHIND = (HEIGHT - FILLED) * ROW_BYTES;
    if (BEHIND == 0) return;
    for (int panel = 0; panel < count * PANELS; panel++) {
        unsigned char* behind = tiles + (panel * HEIGHT + FILLED) * ROW_BYTES;
        for (int at = 16 * int(threadIdx.x); at < BEHIND; at += 16 * THREADS) {
            store16(behind + at, make_uint4(0, 0, 0, 0));
            fence_async(behind + at, 16);
        }
    }
}

// ---- copies, by one thread ----

// Starts copying the boxes at `head` of the token `row` to the first rows of a tile of HEIGHT.
template <int HEIGHT>
DEVICE void load_boxes(unsigned char* tile, const TensorMap& matrix, Barrier* full, int head, int row) {
#pragma unroll
    for (int panel = 0; panel < PANELS; panel++)
        tma_load(tile + panel * HEIGHT * ROW_BYTES, matrix, full, 64 * panel, head, row);
}

// ---- a multiplying warpgroup ----

// Says that the calling warp has read a stage: with products that have been waited for, and with plain loads.
DEVICE void release(Barrier* empty) {
    __syncwarp();
    if (lane_index() == 0) barrier_arrive(empty);
}

// What `d` is made of comes before, a wait for products after. Arithmetic the assembler moves behind such a wait, beside which it
// should run; but not behind a branch, and that the phase of this barrier has been complete for long only we know.
template <int COUNT>
DEVICE void finish(float (&d)[COUNT], Barrier* complete, uint32_t parity) {
    hold(d);
    barrier_wait(complete, parity);
}

// Of the rows of the warpgroup.
DEVICE int own_row() { return int(threadIdx.x) % WARPGROUP_THREADS / WARP * 16 + lane_index() / 4; }

// sums [64, B_ROWS] = a bᵀ: 64 rows of a tile of A_ROWS, from `a` on, and a tile of B_ROWS.
template <int A_ROWS, int B_ROWS>
DEVICE void start_product(float (&sums)[B_ROWS / 2], const unsigned char* a, const unsigned char* b) {
    uint64_t left = descriptor_along(a), right = descriptor_along(b);
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; k++) {
        int panel = k / 4, within = k % 4 * 32;
        wgmma<false, false>(sums, advanced(left, panel * A_ROWS * ROW_BYTES + within),
                            advanced(right, panel * B_ROWS * ROW_BYTES + within), k > 0);
    }
}

// Weights [64, WIDTH] as the left operand of a product: rounded to bf16, four registers for every 16 columns.
template <int WIDTH>
struct Weights {
    uint32_t of[WIDTH / 16][4];

    // `scores`: sums, whose layout is the operand's.
    DEVICE void round(const float (&scores)[WIDTH / 2]) {
#pragma unroll
        for (int k = 0; k < WIDTH / 16; k++) {
#pragma unroll
            for (int i = 0; i < 4; i++) of[k][i] = pack_bf16(scores[8 * k + 2 * i], scores[8 * k + 2 * i + 1]);
        }
    }
};

// sums [64, HEAD_DIM] += weights b: a tile of HEIGHT, a column of weights for each.
template <int HEIGHT>
DEVICE void start_adding(float (&sums)[HEAD_DIM / 2], const Weights<HEIGHT>& weights, const unsigned char* b) {
    uint64_t right = descriptor_across(b, HEIGHT * ROW_BYTES);
#pragma unroll
    for (int k = 0; k < HEIGHT / 16; k++) wgmma<true>(sums, weights.of[k], advanced(right, 16 * ROW_BYTES * k), true);
}

template <int COUNT>
DEVICE void set_zero(float (&sums)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) sums[i] = 0.0f;
}

// The column of a thread's i-th sum, and which of its two rows has it.
DEVICE int column_of(int i) { return i / 4 * 8 + int(threadIdx.x) % 4 * 2 + i % 2; }
DEVICE constexpr int half_of(int i) { return i / 2 % 2; }

// Scores outside `visible`, which is per row, become -inf.
template <int COUNT>
DEVICE void hide(float (&scores)[COUNT], const Columns (&visible)[2]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        Columns seen = visible[half_of(i)];
        int column = column_of(i);
        if (column < seen.first || column >= seen.end) scores[i] = NEG_INFINITY;
    }
}

// Writes a warpgroup's sums, `factors` applied per row, to the rows of a span, of which it has those from `first` on, and of a
// key head. They go through the same rows of a tile of HEIGHT that nothing reads any more, so that memory is written 16 bytes at
// a time.
template <int sharing, int HEIGHT>
DEVICE void store_rows(unsigned char* tile, int first, const float (&sums)[HEAD_DIM / 2], const float (&factors)[2],
                       bf16* matrix, const Span& span, int kv_heads, int head) {
    int lane = lane_index();
    first += int(threadIdx.x) % WARPGROUP_THREADS / WARP * 16;
    auto place = [&](int row, int chunk) {
        return tile + chunk / 8 * HEIGHT * ROW_BYTES + swizzled<8>(first + row, chunk % 8);
    };
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk += 2) {
        uint32_t packed[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int at = 4 * chunk + 2 * i;
            packed[i] = pack_bf16(sums[at] * factors[half_of(at)], sums[at + 1] * factors[half_of(at)]);
        }
        stmatrix_x4(place(lane % 16, chunk + lane / 16), packed);
    }
    __syncwarp();
    bf16* target = matrix + first_row<sharing>(span, kv_heads, head) * HEAD_DIM;
#pragma unroll 4
    for (int index = lane; index < 16 * CHUNKS; index += WARP) {
        int row = index / CHUNKS, chunk = index % CHUNKS;
        if (first + row >= span.tokens * sharing) continue;
        bf16* to = target + size_t(row_within<sharing>(first + row, kv_heads)) * HEAD_DIM + chunk * 8;
        store16(to, load16(place(row, chunk)));
    }
}
