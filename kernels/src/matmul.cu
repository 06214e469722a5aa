// Products of activations with a frozen weight, an adapter's up-projection inside:
//
//     nt   y [m, n] = x [m, k] w [n, k]ᵀ + u [m, r] b [n, r]ᵀ (+ bias [n]) (+ before [m, n])      a linear layer
//     nn   dx[m, k] = dy[m, n] w [n, k]  + du[m, r] a [r, k]               (+ dx)                its gradient to the input
//
// Both are `out [rows, columns] = left [rows, depth] right`, summed in f32 over the depth and then over a second, short
// pair of factors (Hu et al. 2021, "LoRA"): an adapter costs one more step of the same loop instead of reading and
// writing the output once more. `nt` has `right` stored [columns, depth], `nn` [depth, columns]: the same
// weight serves both, nobody needs a transposed copy.
//
// The sums come from product.cuh, where the tiling is. They then take the place of the ring in shared memory,
// [TILE_M, TILE_N] in f32, because the fragments of `mma` would read and write global memory in pieces of 4 bytes.
//
// Constants from outside: those of product.cuh.
#include "product.cuh"

static_assert(TILE_M * TILE_N * sizeof(float) <= STAGES * STAGE_BYTES, "the sums take the place of the ring");

// out = sums + bias + before, through shared memory.
DEVICE void write_tile(unsigned char* shared, const float (&sums)[DOWN][ACROSS][4], Corner corner, const bf16* bias,
                       const bf16* before, bf16* out, int rows, int columns) {
    auto [row, column] = corner_of_warp();
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
        size_t at = size_t(out_row) * columns + out_column;
        if (bias) add_to(values, load16(bias + out_column));
        if (before) add_to(values, load16(before + at));
        store16(out + at, pack8(values));
    }
}

template <bool TRANSPOSED>
DEVICE void product(Factors weight, Factors adapter, const bf16* bias, const bf16* before, bf16* out, int rows,
                    int columns) {
    unsigned char* ring = dynamic_shared();
    Corner corner = corner_of(blockIdx.x, rows, columns);
    float sums[DOWN][ACROSS][4] = {};
    sum_products<TRANSPOSED>(ring, corner, weight, adapter, rows, columns, sums);
    // The sums are about to take the place of slices that others may still read.
    __syncthreads();
    write_tile(ring, sums, corner, bias, before, out, rows, columns);
}

// rows, columns: of y; `rank` 0: no adapter; `bias` and `before` may be null; `add`: what is added to is y itself.
KERNEL(THREADS) nt(const bf16* x, const bf16* w, int depth, const bf16* u, const bf16* b, int rank, const bf16* bias,
                   const bf16* before, bf16* y, int rows, int columns, int add) {
    product<true>({x, w, depth}, {u, b, rank}, bias, add ? y : before, y, rows, columns);
}

KERNEL(THREADS) nn(const bf16* dy, const bf16* w, int depth, const bf16* du, const bf16* a, int rank, bf16* dx,
                   int rows, int columns, int add) {
    product<false>({dy, w, depth}, {du, a, rank}, nullptr, add ? dx : nullptr, dx, rows, columns);
}
