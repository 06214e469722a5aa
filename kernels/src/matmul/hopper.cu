// The products of matmul.cu for Hopper: the same formulas, arguments and order of additions.
//
//     hopper_nt   y [m, n] = x [m, k] w [n, k]ᵀ + u [m, r] b [n, r]ᵀ (+ bias [n]) (+ y)
//     hopper_nn   dx[m, k] = dy[m, n] w [n, k]  + du[m, r] a [r, k]               (+ dx)
//
// The adapter's factors are one more slice of the depth, or as many as its rank has 64s; the copy engine fills up with zeros what a
// box has beyond them.
//
// Constants from outside: those of hopper_product.cuh.
#include "hopper_product.cuh"

// out (+)= sums + bias, 64 columns at a time. What is added to comes to the piece in which it is replaced; the first two are asked
// for before the sums are made.
struct Write {
    const TensorMap& out;
    // May be null.
    const bf16* bias;
    int columns;
    bool add;
    uint32_t parities;

    DEVICE void before(const Shared& shared, Part part, int row, int column) {
        if (!add || part.thread != 0) return;
        tma_store_wait<0>(); // of the tile before
        for (int piece = 0; piece < 2; piece++)
            if (column + 64 * piece < columns) ask_for(shared, part, piece, out, row, column + 64 * piece);
    }

    DEVICE void write(const Shared& shared, Part part, const float (&sums)[TILE_N / 2], int row, int column) {
        int pieces = min(divide_up(columns - column, 64), PANELS);
#pragma unroll
        for (int piece = 0; piece < PANELS; piece++) {
            if (piece >= pieces) break;
            int at = piece % 2, first = column + 64 * piece;
            if (add) await_piece(shared, part, at, parities);
            else await_place(part, piece == 0);
#pragma unroll
            for (int group = 0; group < 8; group += 2) {
                unsigned char* place = place_of(staged_piece(shared, part, at), part.thread, group);
                uint32_t old[4] = {}, packed[4];
                if (add) ldmatrix_x4(old, place);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int sum = 32 * piece + 4 * group + 2 * i;
                    float2 value = make_float2(sums[sum], sums[sum + 1]);
                    int bias_at = first + 8 * (group + i / 2) + part.thread % 4 * 2;
                    if (bias && bias_at < columns) {
                        float2 more = unpack_bf16(*reinterpret_cast<const uint32_t*>(bias + bias_at));
                        value.x += more.x, value.y += more.y;
                    }
                    if (add) {
                        float2 before = unpack_bf16(old[i]);
                        value.x += before.x, value.y += before.y;
                    }
                    packed[i] = pack_bf16(value.x, value.y);
                }
                stmatrix_x4(place, packed);
            }
            send(shared, part, at, out, row, first);
            if (add && piece + 2 < pieces && part.thread == 0) {
                tma_store_wait<0>(); // or the old would land on the new
                ask_for(shared, part, at, out, row, first + 128);
            }
        }
    }
};

// rows, columns: of y; `rank` 0: no adapter, and its maps are not read; `bias` may be null; `add`: y is added to.
HOPPER_KERNEL(THREADS, CLUSTER) hopper_nt(TENSOR_MAP x, TENSOR_MAP w, TENSOR_MAP u, TENSOR_MAP b, const bf16* bias, TENSOR_MAP y,
                                          int rows, int columns, int depth, int rank, int add) {
    product(Linear<true>::of({x, w}, depth, {u, b}, rank), Tiles::of(rows, columns, TILE_N),
            Write{y, bias, columns, add != 0, 0});
}

HOPPER_KERNEL(THREADS, CLUSTER) hopper_nn(TENSOR_MAP dy, TENSOR_MAP w, TENSOR_MAP du, TENSOR_MAP a, TENSOR_MAP dx, int rows,
                                          int columns, int depth, int rank, int add) {
    product(Linear<false>::of({dy, w}, depth, {du, a}, rank), Tiles::of(rows, columns, TILE_N),
            Write{dx, nullptr, columns, add != 0, 0});
}
