// An adapter's short side, of all layers that have one input:
//
//     u_i [rows, R_i] = x [rows, depth] a_i [R_i, depth]ᵀ        i < 3, R_i a multiple of 16
//
// It is limited by reading x, so x is read once for the a of all, as if they stood below each other: GROUPS groups of 16 of
// their rows are what a block takes, with 64 rows of x, a slice of 64 of the depth at a time through a ring of STAGES:
//
//     x   [64, 64]             a   [16 GROUPS, 64]
//
// A warp has 16 rows of x and all groups. Every element is summed in one order, whatever is beside it.
//
// Constants from outside: GROUPS, STAGES.
#include "three.cuh"
#include "tile.cuh"

constexpr int THREADS = 128;
constexpr int ROWS = 64;
constexpr int DEPTH = 64;
constexpr int X_BYTES = ROWS * DEPTH * sizeof(bf16);
constexpr int GROUP_BYTES = 16 * DEPTH * sizeof(bf16);
constexpr int STAGE_BYTES = X_BYTES + GROUPS * GROUP_BYTES;

// blockIdx: rows, groups. Adapters that are not there begin at `groups`.
KERNEL(THREADS) project(const bf16* x, int rows, int depth, const bf16* a0, const bf16* a1, const bf16* a2, bf16* u0, bf16* u1,
                        bf16* u2, int second_at, int third_at, int groups) {
    unsigned char* ring = dynamic_shared();
    const Three<const bf16> a = {a0, a1, a2, second_at, third_at};
    const Three<bf16> u = {u0, u1, u2, second_at, third_at};
    const int row = int(blockIdx.x) * ROWS, first = int(blockIdx.y) * GROUPS;
    const int lane = lane_index(), warp_row = 16 * warp_index();
    const int slices = divide_up(depth, DEPTH);

    auto load = [&](int slice) {
        unsigned char* stage = ring + slice % STAGES * STAGE_BYTES;
        int k = slice * DEPTH;
        if (slice < slices) {
            load_tile<ROWS, DEPTH, THREADS>(stage, x, depth, row, rows, k, depth);
#pragma unroll
            for (int group = 0; group < GROUPS; group++) {
                int inside;
                const bf16* from = a.of(first + group, inside);
                // Of a group that is not there, zeros.
                int end = first + group < groups ? 16 * inside + 16 : 0;
                load_tile<16, DEPTH, THREADS>(stage + X_BYTES + group * GROUP_BYTES, from, depth, 16 * inside, end, k, depth);
            }
        }
        copy_async_commit();
    };

    float sums[GROUPS][2][4] = {};
#pragma unroll
    for (int slice = 0; slice < STAGES - 1; slice++) load(slice);
    for (int slice = 0; slice < slices; slice++) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();
        load(slice + STAGES - 1);
        const unsigned char* stage = ring + slice % STAGES * STAGE_BYTES;
#pragma unroll
        for (int k = 0; k < DEPTH; k += 16) {
            uint32_t left[4];
            ldmatrix_x4(left, stage + swizzled<DEPTH / 8>(warp_row + lane % 16, k / 8 + lane / 16));
#pragma unroll
            for (int group = 0; group < GROUPS; group++) {
                const unsigned char* tile = stage + X_BYTES + group * GROUP_BYTES;
                uint32_t pair[4];
                ldmatrix_x4(pair, tile + swizzled<DEPTH / 8>(lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2));
                const uint32_t low[2] = {pair[0], pair[1]}, high[2] = {pair[2], pair[3]};
                mma_bf16(sums[group][0], left, low);
                mma_bf16(sums[group][1], left, high);
            }
        }
    }

#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        if (first + group >= groups) break;
        int inside;
        bf16* to = u.of(first + group, inside);
        size_t pitch = size_t(16) * u.length(u.index(first + group), groups);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int at = row + warp_row + lane / 4 + 8 * half;
            if (at >= rows) continue;
#pragma unroll
            for (int j = 0; j < 2; j++)
                *reinterpret_cast<uint32_t*>(to + at * pitch + 16 * inside + 8 * j + lane % 4 * 2) =
                    pack_bf16(sums[group][j][2 * half], sums[group][j][2 * half + 1]);
        }
    }
}
