// Products of activations with a frozen weight, an adapter's up-projection inside:
//
//     nt   y [m, n] = x [m, k] w [n, k]ᵀ + u [m, r] b [n, r]ᵀ (+ bias [n]) (+ y)      a linear layer
//     nn   dx[m, k] = dy[m, n] w [n, k]  + du[m, r] a [r, k]               (+ dx)     its gradient to the input
//
// Both are `out [rows, columns] = left [rows, depth] right`, summed in f32 over the depth and then over a second, short
// pair of factors (Hu et al. 2021, "LoRA"): an adapter costs one more step of the same loop instead of reading and
// writing the output once more. `nt` has `right` stored [columns, depth], `nn` [depth, columns]: the same
// weight serves both, nobody needs a transposed copy.
//
// A block makes one tile [TILE_M, TILE_N] of the output, a warp [WARP_M, WARP_N] of it:
//
//     ┌ ring in shared memory: STAGES stages, each with a slice of TILE_K of the depth
//     │   left   [TILE_M, TILE_K]
//     │   right  [TILE_N, TILE_K] (nt) or [TILE_K, TILE_N] (nn)
//     └ afterwards the same bytes hold the tile of sums [TILE_M, TILE_N] in f32
//
// Copies run STAGES - 1 slices ahead of the tensor cores. One barrier a slice is enough: after it everybody sees the
// slice that has landed, and nobody still reads the one before, whose place the next copies take. Chunks of 16
// bytes are swizzled (`swizzled`), so that neither copies nor ldmatrix meet in a bank. The finished sums go through
// shared memory because the fragments of `mma` would read and write global memory in pieces of 4 bytes.
//
// What each element is, and in which order it is summed, depends neither on the size of the tile nor on where in
// it the element lies: a row has the same bits in any company. With b = 0 an adapter adds exact zeros to sums that
// are never -0, so a fresh adapter and none give the same bits.
//
// Blocks that run together take a group of GROUP rows of tiles, so that their factors meet in the level 2 cache.
//
// Constants from outside: TILE_M, TILE_N, TILE_K, WARPS_M, WARPS_N, STAGES.
#include "device.cuh"
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
static_assert(TILE_M * TILE_N * sizeof(float) <= STAGES * STAGE_BYTES, "the sums take the place of the ring");

// left [rows, depth] and right: [columns, depth] (nt) or [depth, columns] (nn).
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

template <bool TRANSPOSED>
DEVICE void load_slice(unsigned char* stage, const Factors& factors, Corner corner, int rows, int columns, int k) {
    int depth = factors.depth;
    unsigned char* right = stage + LEFT_BYTES;
    load_tile<TILE_M, TILE_K, THREADS>(stage, factors.left, depth, corner.row, rows, k, depth);
    if (TRANSPOSED) load_tile<TILE_N, TILE_K, THREADS>(right, factors.right, depth, corner.column, columns, k, depth);
    else load_tile<TILE_K, TILE_N, THREADS>(right, factors.right, columns, k, depth, corner.column, columns);
}

// Adds a slice's products to the sums of the warp's tile at `row`, `column` of the block's.
template <bool TRANSPOSED>
DEVICE void multiply_slice(const unsigned char* stage, int row, int column, float (&sums)[DOWN][ACROSS][4]) {
    const unsigned char* right_tile = stage + LEFT_BYTES;
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

// out (+)= sums + bias, through shared memory.
DEVICE void write_tile(unsigned char* shared, const float (&sums)[DOWN][ACROSS][4], int row, int column, Corner corner,
                       const bf16* bias, bf16* out, int rows, int columns, bool add) {
    int lane = lane_index();
#pragma unroll
    for (int i = 0; i < DOWN; i++)
#pragma unroll
        for (int j = 0; j < ACROSS; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int r = row + 16 * i + 8 * half + lane / 4, c = column + 8 * j + lane % 4 * 2;
                auto to = reinterpret_cast<float2*>(shared + swizzled<TILE_N / 4>(r, c / 4) + c % 4 * sizeof(float));
                *to = make_float2(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
            }
    __syncthreads();
    constexpr int CHUNKS = TILE_N / 8;
    for (int i = int(threadIdx.x); i < TILE_M * CHUNKS; i += THREADS) {
        int r = i / CHUNKS, c = i % CHUNKS;
        int out_row = corner.row + r, out_column = corner.column + 8 * c;
        if (out_row >= rows || out_column >= columns) continue;
        float values[8];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            auto four = *reinterpret_cast<const float4*>(shared + swizzled<TILE_N / 4>(r, 2 * c + half));
            values[4 * half] = four.x, values[4 * half + 1] = four.y;
            values[4 * half + 2] = four.z, values[4 * half + 3] = four.w;
        }
        bf16* to = out + size_t(out_row) * columns + out_column;
        if (bias) add_to(values, load16(bias + out_column));
        if (add) add_to(values, load16(to));
        store16(to, pack8(values));
    }
}

template <bool TRANSPOSED>
DEVICE void product(Factors weight, Factors adapter, const bf16* bias, bf16* out, int rows, int columns, bool add) {
    unsigned char* ring = dynamic_shared();
    Corner corner = corner_of(blockIdx.x, rows, columns);
    int row = warp_index() / WARPS_N * WARP_M, column = warp_index() % WARPS_N * WARP_N;
    int of_weight = divide_up(weight.depth, TILE_K), slices = of_weight + divide_up(adapter.depth, TILE_K);

    auto load = [&](int slice) {
        unsigned char* stage = ring + slice % STAGES * STAGE_BYTES;
        if (slice < of_weight) load_slice<TRANSPOSED>(stage, weight, corner, rows, columns, slice * TILE_K);
        else if (slice < slices)
            load_slice<TRANSPOSED>(stage, adapter, corner, rows, columns, (slice - of_weight) * TILE_K);
        // Also where nothing is left to load: the count of groups is what the wait goes by.
        copy_async_commit();
    };

    float sums[DOWN][ACROSS][4] = {};
#pragma unroll
    for (int slice = 0; slice < STAGES - 1; slice++) load(slice);
    for (int slice = 0; slice < slices; slice++) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();
        load(slice + STAGES - 1);
        multiply_slice<TRANSPOSED>(ring + slice % STAGES * STAGE_BYTES, row, column, sums);
    }
    // The sums are about to take the place of slices that others may still read.
    __syncthreads();
    write_tile(ring, sums, row, column, corner, bias, out, rows, columns, add);
}

// rows, columns: of y; `rank` 0: no adapter; `bias` may be null; `add`: y is added to.
KERNEL(THREADS) nt(const bf16* x, const bf16* w, int depth, const bf16* u, const bf16* b, int rank, const bf16* bias,
                   bf16* y, int rows, int columns, int add) {
    product<true>({x, w, depth}, {u, b, rank}, bias, y, rows, columns, add != 0);
}

KERNEL(THREADS) nn(const bf16* dy, const bf16* w, int depth, const bf16* du, const bf16* a, int rank, bf16* dx,
                   int rows, int columns, int add) {
    product<false>({dy, w, depth}, {du, a, rank}, nullptr, dx, rows, columns, add != 0);
}
