// Products of few rows with a weight: generation, a token for each of up to eight texts.
//
//     few   y [m, n] = x [m, k] w [n, k]ᵀ + u [m, r] b [n, r]ᵀ (+ bias [n]) (+ y)        m ≤ MOST_ROWS
//
// Every weight is used m times only, so reading w once at the memory's speed is all that matters. A warp takes COLUMNS
// rows of w; its lanes read 16 bytes next to each other and multiply them in f32 by all rows of x, which come
// from the level 1 cache. Each chunk of x serves COLUMNS rows of w, so that the cache is not asked for more than twice
// what memory is. In the end the lanes' sums are added by a butterfly, a fixed order.
//
// A row's sum has another order than in `nt` (matmul.cu), so its last bits may differ from there; they do not depend on
// how many rows there are.
//
// Constant from outside: MOST_ROWS (1, 2, 4 or 8).
#include "device.cuh"
#include "tile.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP;
constexpr int COLUMNS = MOST_ROWS < 4 ? 1 : MOST_ROWS / 2;
// Chunks of each row of w that a lane has under way.
constexpr int AHEAD = 4 / COLUMNS;

// sums += x wᵀ for rows of x and rows of w from `column`; both `depth` wide. A row that does not exist is taken to
// be the last one, whose sum nobody keeps.
DEVICE void add_products(const bf16* x, const bf16* w, int depth, int rows, int column, int columns,
                         float (&sums)[MOST_ROWS][COLUMNS]) {
    const bf16 *x_row[MOST_ROWS], *w_row[COLUMNS];
#pragma unroll
    for (int i = 0; i < MOST_ROWS; i++) x_row[i] = x + size_t(min(i, rows - 1)) * depth;
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) w_row[j] = w + size_t(min(column + j, columns - 1)) * depth;
#pragma unroll (AHEAD)
    for (int k = 8 * lane_index(); k < depth; k += 8 * WARP) {
        float weights[COLUMNS][8];
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) unpack8(load16(w_row[j] + k), weights[j]);
#pragma unroll
        for (int i = 0; i < MOST_ROWS; i++) {
            float values[8];
            unpack8(load16(x_row[i] + k), values);
#pragma unroll
            for (int j = 0; j < COLUMNS; j++)
#pragma unroll
                for (int e = 0; e < 8; e++) sums[i][j] = fmaf(values[e], weights[j][e], sums[i][j]);
        }
    }
}

// Parameters as for `nt`.
KERNEL(THREADS) few(const bf16* x, const bf16* w, int depth, const bf16* u, const bf16* b, int rank, const bf16* bias,
                    bf16* y, int rows, int columns, int add) {
    int column = (int(blockIdx.x) * WARPS + warp_index()) * COLUMNS;
    if (column >= columns) return;
    float sums[MOST_ROWS][COLUMNS] = {};
    add_products(x, w, depth, rows, column, columns, sums);
    add_products(u, b, rank, rows, column, columns, sums);
#pragma unroll
    for (int i = 0; i < MOST_ROWS; i++)
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            float sum = warp_sum(sums[i][j]);
            if (lane_index() != 0 || i >= rows || column + j >= columns) continue;
            bf16* to = y + size_t(i) * columns + column + j;
            if (bias) sum += to_float(bias[column + j]);
            if (add) sum += to_float(*to);
            *to = to_bf16(sum);
        }
}
