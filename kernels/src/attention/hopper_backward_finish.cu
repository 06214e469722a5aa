// Attention on Hopper, the end of the way back in one pass: what hopper_backward.cu has added up becomes dq. Contract, rows and
// tables as in attention.cu.
//
//     dq = sums · scale, turned back by its position where there are angles
//
// A block has a tile of queries and a key head, a thread eight columns of one half of a row and those of the other, which turn
// together. Bound by memory: the sums in f32 and dq once.
//
// Constants from outside (attention/cuda/hopper.rs): HEAD_DIM, 64 or 128; SHARING.
#include "hopper_sums.cuh"
#include "tile.cuh"

// Of a block.
constexpr int THREADS = 128;

// `tiles` [count, 3]: row, position and tokens of every tile of queries.
KERNEL(THREADS) hopper_attention_backward_finish(const float* sums, bf16* dq, const int* tiles, int kv_heads, float scale,
                                                 const float* table, uint32_t positions) {
    constexpr int GROUPS = HEAD_DIM / 8;
    const Angles angles = {table, positions};
    const int* tile = tiles + 3 * blockIdx.x;
    const Span queries = {tile[0], tile[1], tile[2]};
    const float* from = sums + sums_at(queries, kv_heads, int(blockIdx.y));
    bf16* to = dq + first_row<SHARING>(queries, kv_heads) * HEAD_DIM;
    for (int item = int(threadIdx.x); item < queries.tokens * SHARING * GROUPS / 2; item += THREADS) {
        int row = item / (GROUPS / 2), group = item % (GROUPS / 2);
        float first[8], second[8];
        auto load = [&](float(&x)[8], int group) {
            auto at = reinterpret_cast<const float4*>(from + row * HEAD_DIM + 8 * place_of(row, group));
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float4 four = at[i];
                x[4 * i] = scale * four.x, x[4 * i + 1] = scale * four.y;
                x[4 * i + 2] = scale * four.z, x[4 * i + 3] = scale * four.w;
            }
        };
        load(first, group);
        load(second, group + GROUPS / 2);
        if (angles.table) {
            float sign;
            auto at = reinterpret_cast<const float4*>(angles.of(queries.position + row / SHARING, sign) + 16 * group);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float4 two = at[i];
                turn(first[2 * i], second[2 * i], two.x, sign * two.y);
                turn(first[2 * i + 1], second[2 * i + 1], two.z, sign * two.w);
            }
        }
        bf16* row_to = to + size_t(row_within<SHARING>(row, kv_heads)) * HEAD_DIM + 8 * group;
        store16(row_to, pack8(first));
        store16(row_to + HEAD_DIM / 2, pack8(second));
    }
}
