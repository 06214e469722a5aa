// What goes before and after an adapter's products, a thread for each element:
//
//     pack              a, b in f32  →  bf16, the rank filled up with zeros, b times the scale
//     add_partials      gradients += scale Σ partials (of lowrank.cu)
//     round_partials    du = bf16(Σ partials)
//     join              du of layers with one input beside each other, each row times its factor, eight elements a thread
//
// Partials are added in the order of their numbers, by one thread, so the sum has the same bits every time.
#include "device.cuh"
#include "tile.cuh"

constexpr int THREADS = 256;

DEVICE size_t element() { return size_t(blockIdx.x) * THREADS + threadIdx.x; }

DEVICE float sum_of(const float* partial, int parts, size_t length, size_t at) {
    float sum = 0.0f;
    for (int part = 0; part < parts; part++) sum += partial[part * length + at];
    return sum;
}

// Gradient i, blockIdx.y, `length`s of numbers, += scale columns[at % width] Σ partial. Of a partial, `stride` numbers, gradient i
// takes those from its `begin` on. `columns` may be null for 1.
KERNEL(THREADS) add_partials(const float* partial, int parts, size_t stride, float scale, const bf16* columns, int width,
                             float* gradient0, size_t length0, float* gradient1, size_t begin1, size_t length1,
                             float* gradient2, size_t begin2, size_t length2) {
    int i = int(blockIdx.y);
    float* gradient = i == 0 ? gradient0 : i == 1 ? gradient1 : gradient2;
    size_t at = element(), begin = i == 0 ? 0 : i == 1 ? begin1 : begin2;
    if (at >= (i == 0 ? length0 : i == 1 ? length1 : length2)) return;
    float factor = columns ? scale * to_float(columns[at % width]) : scale;
    gradient[at] += factor * sum_of(partial, parts, stride, begin + at);
}

// du [length] = Σ partial [parts, length].
KERNEL(THREADS) round_partials(const float* partial, int parts, size_t length, bf16* du) {
    size_t at = element();
    if (at < length) du[at] = to_bf16(sum_of(partial, parts, length, at));
}

// to [to_rows, to_columns] = scale · from [rows, columns], with zeros around it.
KERNEL(THREADS) pack(const float* from, int rows, int columns, float scale, bf16* to, int to_rows, int to_columns) {
    size_t at = element();
    if (at >= size_t(to_rows) * to_columns) return;
    int row = int(at / to_columns), column = int(at % to_columns);
    bool inside = row < rows && column < columns;
    to[at] = to_bf16(inside ? scale * from[size_t(row) * columns + column] : 0.0f);
}

// to [rows, width]: up to three matrices beside each other, of which the second begins at column `second_at`, the third at `third_at`;
// `factors` [rows] may be null for 1. All sides are multiples of 8.
KERNEL(THREADS) join(const bf16* u0, const bf16* u1, const bf16* u2, int second_at, int third_at, int width, const float* factors,
                     int rows, bf16* to) {
    size_t at = element();
    int row = int(at / (width / 8)), column = int(at % (width / 8)) * 8;
    if (row >= rows) return;
    bool third = column >= third_at, second = column >= second_at;
    const bf16* from = third ? u2 : second ? u1 : u0;
    int begin = third ? third_at : second ? second_at : 0;
    int end = third ? width : second ? third_at : second_at;
    float values[8];
    unpack8(load16(from + size_t(row) * (end - begin) + (column - begin)), values);
    float factor = factors ? factors[row] : 1.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] *= factor;
    store16(to + at * 8, pack8(values));
}
