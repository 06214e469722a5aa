// A product whose columns are the heads of queries or keys, rotated on the way out: `nt` of matmul.cu and rope.cu in one.
//
//     hopper_nt_rope   y [m, heads · HEAD_DIM] = rope(x [m, k] w [n, k]ᵀ + u [m, r] b [n, r]ᵀ (+ bias [n]), positions [m])
//
// A head's two halves are in one thread's sums, so nothing moves. The product is rounded to bf16 before it is rotated, as it is
// where rope.cu reads it from memory: the bits are the same, and y is not written, read and written again.
//
// First columns come with short sides of adapters (hopper_short.cuh), as those of hopper_nt.
//
// Constants from outside: those of hopper_product.cuh, and HEAD_DIM, 64 or 128.
#include "hopper_short.cuh"
#include "rope.cuh"

constexpr int HALF = HEAD_DIM / 2;
static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "one piece or two");

struct Rotate {
    const TensorMap& out;
    // May be null.
    const bf16* bias;
    const uint32_t* positions;
    // [table_rows, HALF] pairs of cosine and sine.
    const float* table;
    uint32_t table_rows;
    int rows, columns;

    DEVICE void before(const Shared&, Part, int, int) {}

    // Two sums with their bias, as rope.cu would read them.
    DEVICE float2 product(const float (&sums)[TILE_N / 2], int sum, int column) const {
        float2 more = make_float2(0.0f, 0.0f);
        if (bias) more = unpack_bf16(*reinterpret_cast<const uint32_t*>(bias + column));
        return unpack_bf16(pack_bf16(sums[sum] + more.x, sums[sum + 1] + more.y));
    }

    DEVICE void write(const Shared& shared, Part part, const float (&sums)[TILE_N / 2], int row, int column) const {
        // Of the thread's two rows: the angles of its columns, and what the sine is multiplied by.
        const float* angles[2];
        float sign[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int at = row + part.thread / 32 * 16 + part.thread % 32 / 4 + 8 * half;
            uint32_t position = at < rows ? positions[at] : 0;
            bool known = position < table_rows;
            angles[half] = table + size_t(known ? position : 0) * HEAD_DIM + part.thread % 4 * 4;
            sign[half] = known ? 1.0f : INFINITY - INFINITY;
        }
#pragma unroll
        for (int head = 0; head < TILE_N / HEAD_DIM; head++) {
            constexpr int PIECES = HEAD_DIM / 64;
            int start = head * HEAD_DIM;
            if (column + start >= columns) break;
            // A head takes one piece or both.
            await_place(part, PIECES == 2 || head == 0);
#pragma unroll
            for (int group = 0; group < HALF / 8; group += 2) {
                uint32_t first[4], second[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int half = i % 2, at = start + 8 * (group + i / 2), sum = at / 2 + 2 * half;
                    int bias_at = column + at + part.thread % 4 * 2;
                    float2 x = product(sums, sum, bias_at), y = product(sums, sum + HALF / 2, bias_at + HALF);
                    float4 two = *reinterpret_cast<const float4*>(angles[half] + 16 * (group + i / 2));
                    turn(x.x, y.x, two.x, sign[half] * two.y);
                    turn(x.y, y.y, two.z, sign[half] * two.w);
                    first[i] = pack_bf16(x.x, x.y), second[i] = pack_bf16(y.x, y.y);
                }
                put(shared, part, start + 8 * group, first);
                put(shared, part, start + 8 * group + HALF, second);
            }
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++)
                send(shared, part, (start / 64 + piece) % 2, out, row, column + start + 64 * piece);
        }
    }

    // Four matrices to the piece that has columns `at` to `at` + 15 of the tile.
    DEVICE static void put(const Shared& shared, Part part, int at, const uint32_t (&packed)[4]) {
        stmatrix_x4(place_of(staged_piece(shared, part, at / 64 % 2), part.thread, at % 64 / 8), packed);
    }
};

// As hopper_nt.
HOPPER_KERNEL(THREADS, CLUSTER) hopper_nt_rope(TENSOR_MAP x, TENSOR_MAP w, TENSOR_MAP u, TENSOR_MAP b, TENSOR_MAP a0, TENSOR_MAP a1,
                                               TENSOR_MAP a2, bf16* u0, bf16* u1, bf16* u2, int second_at, int third_at, int groups,
                                               const bf16* bias, const uint32_t* positions, const float* table, TENSOR_MAP y,
                                               uint32_t table_rows, int rows, int columns, int first, int across, int depth, int rank) {
    product(Linear<true>::of({x, w}, depth, {u, b}, rank), Tiles::some(rows, first, across, TILE_N),
            Rotate{y, bias, positions, table, table_rows, rows, columns},
            short_sides<true>(a0, a1, a2, u0, u1, u2, second_at, third_at, groups, rows));
}
