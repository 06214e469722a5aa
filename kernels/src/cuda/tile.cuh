// Tiles of bf16 matrices in shared memory, and eight elements at a time.
#pragma once
#include "device.cuh"

DEVICE int divide_up(int a, int b) { return (a + b - 1) / b; }

// Where chunk `chunk` (16 bytes) of row `row` lies in a tile with CHUNKS chunks a row, in bytes. Shared memory serves
// 128 bytes at a time if they come from different banks; ldmatrix reads the same chunk of eight rows, copies write
// neighbouring chunks of a row. Exchanging chunks by an exclusive or with the row makes both meet all banks.
template <int CHUNKS>
DEVICE int swizzled(int row, int chunk) {
    static_assert(CHUNKS > 0 && (CHUNKS & (CHUNKS - 1)) == 0, "a power of two");
    constexpr int EXCHANGED = CHUNKS < 8 ? CHUNKS : 8;
    // Rows that share 128 bytes lie in different banks anyway.
    constexpr int TOGETHER = 8 / EXCHANGED;
    return (row * CHUNKS + (chunk ^ (row / TOGETHER % EXCHANGED))) * 16;
}

// Starts copying [HEIGHT, WIDTH] from `row`, `column` of a matrix [rows, columns] with rows `pitch` elements apart; zeros
// where the matrix has ended. All BLOCK threads of the block take part. `column`, `columns` and `pitch` are multiples
// of 8.
template <int HEIGHT, int WIDTH, int BLOCK>
DEVICE void load_tile(unsigned char* tile, const bf16* matrix, int pitch, int row, int rows, int column, int columns) {
    constexpr int CHUNKS = WIDTH / 8;
    constexpr int STEP = BLOCK / CHUNKS;
    static_assert(BLOCK % CHUNKS == 0, "a thread keeps to one column of chunks");
    int chunk = int(threadIdx.x) % CHUNKS, first = int(threadIdx.x) / CHUNKS;
    bool inside = column + 8 * chunk < columns;
    const bf16* from = matrix + size_t(row + first) * pitch + column + 8 * chunk;
#pragma unroll
    for (int r = 0; r < HEIGHT; r += STEP) {
        if (HEIGHT % STEP != 0 && first + r >= HEIGHT) break;
        copy_async16(tile + swizzled<CHUNKS>(first + r, chunk), from + size_t(r) * pitch,
                     inside && row + first + r < rows);
    }
}

DEVICE void unpack8(uint4 packed, float (&values)[8]) {
    const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 pair = unpack_bf16(pairs[i]);
        values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
    }
}

DEVICE void add_to(float (&values)[8], uint4 packed) {
    float more[8];
    unpack8(packed, more);
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] += more[i];
}

DEVICE uint4 pack8(const float (&values)[8]) {
    return make_uint4(pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]), pack_bf16(values[4], values[5]),
                      pack_bf16(values[6], values[7]));
}
