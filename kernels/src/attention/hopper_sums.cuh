// What the two kernels of attention's way back in one pass on Hopper share: the sums of dq in memory, which hopper_backward.cu makes
// and hopper_backward_finish.cu reads, and how both turn back what they write.
//
// Sums [T, heads, HEAD_DIM] in f32: those of a tile of queries and a key head follow each other, rows as they are stacked. The eight
// columns G of row r are at place G ^ r % 8, as the copy engine takes them from shared memory, where they come from all banks.
//
// Constants from outside: HEAD_DIM, 64 or 128; SHARING.
#pragma once
#include "rope.cuh"
#include "rows.cuh"

// The first of a tile of queries and a key head.
DEVICE size_t sums_at(const Span& queries, int kv_heads, int head) {
    return size_t(uint32_t(queries.row * kv_heads + head * queries.tokens)) * (SHARING * HEAD_DIM);
}

// Which eight places of a row of a tile have the eight columns `group`.
DEVICE int place_of(int row, int group) { return group ^ row % 8; }

// Cosines and sines [positions, HEAD_DIM / 2, 2] as rope.cu has them, or null.
struct Angles {
    const float* table;
    uint32_t positions;

    // Those of a position, and what its sines are to be multiplied by to turn back: NaN where there are none.
    DEVICE const float* of(int position, float& sign) const {
        bool known = uint32_t(position) < positions;
        sign = known ? -1.0f : INFINITY - INFINITY;
        return table + size_t(known ? position : 0) * HEAD_DIM;
    }
};
