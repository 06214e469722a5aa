// Rotary position embedding (Su et al. 2021, "RoFormer"), in place; twin of rope.rs.
//
//   c, s     = scale · (cos, sin)(position · inv_freq[i])          i < HALF, from the twin's table
//   x[i]        = c x[i]        - direction · s x[i + HALF]        direction: 1 forward, -1 backward
//   x[i + HALF] = c x[i + HALF] + direction · s x[i]
//
// x: [rows, heads, HEAD_DIM] bf16, computed in f32 and rounded once.
// positions: [rows]; table: [table_rows, HALF] pairs (c, s) of f32.
//
// A thread turns PIECE elements of a head's first half with their partners of the second: 16 bytes of each
// where a half is a multiple of 8, else one element. Angles are not computed here: f32 has too few digits
// for the sine of position 30,000. The table is shared by all heads and layers and stays in the cache.
// A kernel cannot refuse a position; one beyond the table makes its row NaN, which no loss overlooks.
// Traffic: x once there and once back.
#include "rope.cuh"
#include "tile.cuh"

#ifndef HEAD_DIM
#error "HEAD_DIM: the width of a head, an even number"
#endif

constexpr int HALF = HEAD_DIM / 2;
constexpr int PIECE = HALF % 8 == 0 ? 8 : 1;
constexpr int PIECES = HALF / PIECE;

// A thread for each of `items` = rows · heads · PIECES.
KERNEL(256) rope_rotate(bf16* x, const uint32_t* positions, const float* table, uint32_t table_rows, uint32_t heads,
                        uint32_t items, float direction) {
    uint32_t item = blockIdx.x * 256 + threadIdx.x;
    if (item >= items) return;
    uint32_t head = item / PIECES, first = item % PIECES * PIECE;
    uint32_t position = positions[head / heads];
    bool known = position < table_rows;
    const float* angles = table + (size_t(known ? position : 0) * HALF + first) * 2;
    float sign = known ? direction : INFINITY - INFINITY;
    bf16* at = x + size_t(head) * HEAD_DIM + first;
    if constexpr (PIECE == 8) {
        float a[8], b[8];
        unpack8(load16(at), a);
        unpack8(load16(at + HALF), b);
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            float4 two = *reinterpret_cast<const float4*>(angles + 2 * i);
            turn(a[i], b[i], two.x, sign * two.y);
            turn(a[i + 1], b[i + 1], two.z, sign * two.w);
        }
        store16(at, pack8(a));
        store16(at + HALF, pack8(b));
    } else {
        float a = to_float(at[0]), b = to_float(at[HALF]);
        turn(a, b, angles[0], sign * angles[1]);
        at[0] = to_bf16(a);
        at[HALF] = to_bf16(b);
    }
}
