// The products of matmul.cu for Hopper: the same formulas, arguments and order of additions.
//
//     hopper_nt   y [m, n] = x [m, k] w [n, k]ᵀ + u [m, r] b [n, r]ᵀ (+ bias [n]) (+ before [m, n])
//     hopper_nn   dx[m, k] = Σ dy[m, n] w [n, k]  + du[m, r] a [r, k]             (+ dx)
//
// The second for up to three layers that have one input: their depths are one behind the other, and dx is written once. Beside it,
// clusters that have a tile less than others add to gradients of adapters (hopper_gradients.cuh).
//
// The adapter's factors are one more slice of the depth, or as many as its rank has 64s; the copy engine fills up with zeros what a
// box has beyond them. Launches that make an output's first columns make u or du (hopper_short.cuh), for themselves and for what follows.
//
// Constants from outside: those of hopper_product.cuh.
#include "hopper_gradients.cuh"
#include "hopper_short.cuh"

// The terms of layers with one input: all weights' slices, then all adapters'. What is not there has a depth of 0.
struct Layers {
    static constexpr bool ALONG = false;
    Linear<false> first, second, third;
    int of_weight;

    DEVICE static Layers of(const Linear<false>& first, const Linear<false>& second, const Linear<false>& third) {
        return {first, second, third, first.of_weight + second.of_weight + third.of_weight};
    }
    DEVICE int slices() const { return first.slices() + second.slices() + third.slices(); }
    DEVICE void prefetch() const { first.prefetch(); }
    DEVICE int2 place(int slice) const {
        const bool of_adapters = slice >= of_weight;
        if (of_adapters) slice -= of_weight;
        auto length = [&](const Linear<false>& it) { return of_adapters ? it.of_adapter() : it.of_weight; };
        if (slice < length(first)) return make_int2(0, slice);
        slice -= length(first);
        if (slice < length(second)) return make_int2(1, slice);
        return make_int2(2, slice - length(second));
    }
    DEVICE int steps(int slice) const {
        int2 at = place(slice);
        return steps_of(at.x == 0 ? first.rank : at.x == 1 ? second.rank : third.rank, at.y);
    }
    DEVICE void load(unsigned char* stage, Barrier* full, int2 corner, int slice, bool with_left) const {
        const bool of_w = slice < of_weight;
        int2 at = place(slice);
        if (at.x == 0) first.load_of(of_w, stage, full, corner, at.y, with_left);
        else if (at.x == 1) second.load_of(of_w, stage, full, corner, at.y, with_left);
        else third.load_of(of_w, stage, full, corner, at.y, with_left);
    }
};

// out = sums + bias + what was before, 64 columns at a time. The latter, which may be `out` itself, comes to the piece in which it is
// replaced; the first two are asked for before the sums are made.
struct Write {
    const TensorMap &out, &old;
    // May be null.
    const bf16* bias;
    int columns;
    bool add;
    uint32_t parities;

    DEVICE void before(const Shared& shared, Part part, int row, int column) {
        if (!add || part.thread != 0) return;
        tma_store_wait<0>(); // of the tile before
        for (int piece = 0; piece < 2; piece++)
            if (column + 64 * piece < columns) ask_for(shared, part, piece, old, row, column + 64 * piece);
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
                uint32_t added[4] = {}, packed[4];
                if (add) ldmatrix_x4(added, place);
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
                        float2 before = unpack_bf16(added[i]);
                        value.x += before.x, value.y += before.y;
                    }
                    packed[i] = pack_bf16(value.x, value.y);
                }
                stmatrix_x4(place, packed);
            }
            send(shared, part, at, out, row, first);
            if (add && piece + 2 < pieces && part.thread == 0) {
                tma_store_wait<0>(); // or the old would land on the new
                ask_for(shared, part, at, old, row, first + 128);
            }
        }
    }
};

// rows, columns: of y, of which `across` tiles are made from column `first` on; `rank` 0: no adapter, and its maps are not read; `bias`
// may be null; not `add`: `before` is not read. a_i, u_i and `groups`: see `Short`; where those are made, the map u is not read.
HOPPER_KERNEL(THREADS, CLUSTER) hopper_nt(TENSOR_MAP x, TENSOR_MAP w, TENSOR_MAP u, TENSOR_MAP b, TENSOR_MAP a0, TENSOR_MAP a1,
                                          TENSOR_MAP a2, bf16* u0, bf16* u1, bf16* u2, int second_at, int third_at, int groups,
                                          const bf16* bias, TENSOR_MAP before, TENSOR_MAP y, int rows, int columns, int first,
                                          int across, int depth, int rank, int add) {
    product(Linear<true>::of({x, w}, depth, {u, b}, rank), Tiles::some(rows, first, across, TILE_N),
            Write{y, before, bias, columns, add != 0, 0},
            short_sides<true>(a0, a1, a2, u0, u1, u2, second_at, third_at, groups, rows));
}

// Likewise; b_i and du_i are those of `Short`. The tasks from `task` to `last`, and `of_idle`: see `Gradients`; what follows is those.
HOPPER_KERNEL(THREADS, CLUSTER) hopper_nn(
    TENSOR_MAP dy0, TENSOR_MAP w0, TENSOR_MAP left0, TENSOR_MAP a0, TENSOR_MAP dy1, TENSOR_MAP w1, TENSOR_MAP left1, TENSOR_MAP a1,
    TENSOR_MAP dy2, TENSOR_MAP w2, TENSOR_MAP left2, TENSOR_MAP a2, TENSOR_MAP b0, TENSOR_MAP b1, TENSOR_MAP b2, bf16* du0, bf16* du1,
    bf16* du2, int second_at, int third_at, int groups, TENSOR_MAP dx, int rows, int columns, int first, int across, int depth0, int rank0,
    int depth1, int rank1, int depth2, int rank2, int add, int of_idle, int task, int last,
    TENSOR_MAP v0, TENSOR_MAP u0, float* first0, float* second0, float* third0, const bf16* weight0, Sides sides0,
    TENSOR_MAP v1, TENSOR_MAP u1, float* first1, float* second1, float* third1, const bf16* weight1, Sides sides1,
    TENSOR_MAP v2, TENSOR_MAP u2, float* first2, float* second2, float* third2, const bf16* weight2, Sides sides2,
    TENSOR_MAP v3, TENSOR_MAP u3, float* first3, float* second3, float* third3, const bf16* weight3, Sides sides3,
    TENSOR_MAP v4, TENSOR_MAP u4, float* first4, float* second4, float* third4, const bf16* weight4, Sides sides4) {
    const Gradients<5> gradients = {{{&v0, &u0, first0, second0, third0, weight0, sides0},
                                     {&v1, &u1, first1, second1, third1, weight1, sides1},
                                     {&v2, &u2, first2, second2, third2, weight2, sides2},
                                     {&v3, &u3, first3, second3, third3, weight3, sides3},
                                     {&v4, &u4, first4, second4, third4, weight4, sides4}},
                                    of_idle, task, last};
    product(Layers::of(Linear<false>::of({dy0, w0}, depth0, {left0, a0}, rank0),
                       Linear<false>::of({dy1, w1}, depth1, {left1, a1}, rank1),
                       Linear<false>::of({dy2, w2}, depth2, {left2, a2}, rank2)),
            Tiles::some(rows, first, across, TILE_N), Write{dx, dx, nullptr, columns, add != 0, 0},
            short_sides<false>(b0, b1, b2, du0, du1, du2, second_at, third_at, groups, rows), gradients);
}
