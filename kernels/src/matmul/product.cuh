// The sums of a product's tile, in the registers of a block: what matmul.cu rounds and writes, and logprob.cu takes
// the softmax of.
//
//     out [rows, columns] = left [rows, depth] right        right: [columns, depth] ("transposed") or [depth, columns]
//
// A block makes one tile [TILE_M, TILE_N] of the output, a warp [WARP_M, WARP_N] of it. Shared memory is a ring of STAGES
// stages, each with a slice of TILE_K of the depth:
//
//     left   [TILE_M, TILE_K]
//     right  [TILE_N, TILE_K] (transposed) or [TILE_K, TILE_N]
//
// Copies run STAGES - 1 slices ahead of the tensor cores. One barrier a slice is enough: after it everybody sees the
// slice that has landed, and nobody still reads the one before, whose place the next copies take. Chunks of 16
// bytes are swizzled (`swizzled`), so that neither copies nor ldmatrix meet in a bank.
//
// What each element is, and in which order it is summed, depends neither on the size of the tile nor on where in
// it the element lies: a row has the same bits in any company. With b = 0 an adapter adds exact zeros to sums that
// are never -0, so a fresh adapter and none give the same bits.
//
// Blocks that run together take a group of GROUP rows of tiles, so that their factors meet in the level 2 cache.
//
// Constants from outside: TILE_M, TILE_N, TILE_K, WARPS_M, WARPS_N, STAGES.
#pragma once
#include "tile.cuh"

constexpr int THREADS = WARPS_M * WARPS_N * WARP;
constexpr int WARP_M = TILE_M / WARPS_M;
constexpr int WARP_N = TILE_N / WARPS_N;
// Fragments of a warp's tile, down and across.
constexpr int DOWN = WARP_M / 16;
constexpr int ACROSS = WARP_N / 8;
constexpr int GROUP = 8;

constexpr int LEFT_BYTES = TILE_M * TILE_K * sizeof(bf16);
constexpr int STAGE_BYTES = LEFT_BYTES + TILE_N * TILE_K * sizeof(bf16);

static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0 && TILE_K % 16 == 0, "a warp's tile is made of fragments");

// left [rows, depth] and right: [columns, depth] (transposed) or [depth, columns].
struct Factors {
    const bf16* left;
    const bf16* right;
    int depth;
};

// The first row and column of a block's tile.
struct Corner {
    int row, column;
};

DEVICE Corner corner_of(int block, int rows, int columns) {
    int down = divide_up(rows, TILE_M), across = divide_up(columns, TILE_N);
    int first = block / (GROUP * across) * GROUP;
    int height = min(down - first, GROUP);
    int inside = block % (GROUP * across);
    return {(first + inside % height) * TILE_M, inside / height * TILE_N};
}

// Where in the block's tile the calling warp's part begins.
DEVICE Corner corner_of_warp() { return {warp_index() / WARPS_N * WARP_M, warp_index() % WARPS_N * WARP_N}; }

template <bool TRANSPOSED>
DEVICE void load_slice(unsigned char* stage, const Factors& factors, Corner corner, int rows, int columns, int k) {
    int depth = factors.depth;
    unsigned char* right = stage + LEFT_BYTES;
    load_tile<TILE_M, TILE_K, THREADS>(stage, factors.left, depth, corner.row, rows, k, depth);
    if (TRANSPOSED) load_tile<TILE_N, TILE_K, THREADS>(right, factors.right, depth, corner.column, columns, k, depth);
    else load_tile<TILE_K, TILE_N, THREADS>(right, factors.right, columns, k, depth, corner.column, columns);
}

// Adds a slice's products to the sums of the warp's part.
template <bool TRANSPOSED>
DEVICE void multiply_slice(const unsigned char* stage, float (&sums)[DOWN][ACROSS][4]) {
    const unsigned char* right_tile = stage + LEFT_BYTES;
    auto [row, column] = corner_of_warp();
    int lane = lane_index();
#pragma unroll
    for (int k = 0; k < TILE_K; k += 16) {
        uint32_t left[DOWN][4], right[ACROSS][2];
#pragma unroll
        for (int i = 0; i < DOWN; i++)
            ldmatrix_x4(left[i], stage + swizzled<TILE_K / 8>(row + 16 * i + lane % 16, k / 8 + lane / 16));
#pragma unroll
        for (int j = 0; j < ACROSS; j += 2) {
            uint32_t pair[4];
            int at = column + 8 * j;
            if (TRANSPOSED)
                ldmatrix_x4(pair, right_tile + swizzled<TILE_K / 8>(at + lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2));
            else
                ldmatrix_x4_transposed(pair, right_tile + swizzled<TILE_N / 8>(k + lane % 16, at / 8 + lane / 16));
            right[j][0] = pair[0], right[j][1] = pair[1];
            right[j + 1][0] = pair[2], right[j + 1][1] = pair[3];
        }
#pragma unroll
        for (int i = 0; i < DOWN; i++)
#pragma unroll
            for (int j = 0; j < ACROSS; j++) mma_bf16(sums[i][j], left[i], right[j]);
    }
}

// sums: of the calling warp's part of the tile at `corner`; of the weight's products and then of the adapter's, if its depth
// is not 0. At the end other warps may still read the ring, which is STAGES * STAGE_BYTES of shared memory.
template <bool TRANSPOSED>
DEVICE void sum_products(unsigned char* ring, Corner corner, Factors weight, Factors adapter, int rows, int columns,
                         float (&sums)[DOWN][ACROSS][4]) {
    int of_weight = divide_up(weight.depth, TILE_K), slices = of_weight + divide_up(adapter.depth, TILE_K);

    auto load = [&](int slice) {
        unsigned char* stage = ring + slice % STAGES * STAGE_BYTES;
        if (slice < of_weight) load_slice<TRANSPOSED>(stage, weight, corner, rows, columns, slice * TILE_K);
        else if (slice < slices)
            load_slice<TRANSPOSED>(stage, adapter, corner, rows, columns, (slice - of_weight) * TILE_K);
        // Also where nothing is left to load: the count of groups is what the wait goes by.
        copy_async_commit();
    };

#pragma unroll
    for (int slice = 0; slice < STAGES - 1; slice++) load(slice);
    for (int slice = 0; slice < slices; slice++) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();
        load(slice + STAGES - 1);
        multiply_slice<TRANSPOSED>(ring + slice % STAGES * STAGE_BYTES, sums);
    }
}
