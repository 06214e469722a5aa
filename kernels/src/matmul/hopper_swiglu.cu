// The products next to the gated activation, and the activation with them: swiglu.cu between products of matmul.cu.
//
//     hopper_nt_swiglu             gate [m, i] = x [m, k] w_gate [i, k]ᵀ + u_gate [m, r] b_gate [i, r]ᵀ
//                                  up   [m, i] = x [m, k] w_up   [i, k]ᵀ + u_up   [m, r] b_up   [i, r]ᵀ
//                                  out  [m, i] = silu(gate) up
//                                  u [m, r] = out a [r, i]ᵀ, the short side of an adapter of what reads `out`: its parts
//     hopper_nn_swiglu_backward    dout [m, i] = dy [m, n] w [n, i] + du [m, r] a [r, i], not written
//                                  act  [m, i] = silu(gate) up, if asked for, as the adapter of w has it for its input
//                                  gate, up [m, i] become dout times the slopes of silu(gate) up
//                                  du [m, r] = dgate b [i, r] of gate's adapter, and of up's: their parts
//
// A tile of the first has 128 columns of gate and the same 128 of up beside them, so a thread holds both; in memory they are two
// matrices. An adapter of one is a slice in which the other's half is zeros. What is activated, packed for memory, is also the left
// fragment of `mma`, so u costs no visit to `out`; each tile leaves its 128 columns' part of it in f32, and partials.cu adds the parts
// in the order of the columns. The second kernel reads gate and up while the sums are made, and makes du of their gradients likewise,
// in parts of 256 columns.
// Whatever single kernels write to memory for the next one is rounded to bf16 here as well: the bits are the same.
//
// Constants from outside: those of hopper_product.cuh, with TILE_N 256; RANK_GROUPS of 16 of the rank of du.
#include "hopper_gradients.cuh"
#include "hopper_short.cuh"
#include "swiglu.cuh"

constexpr int WIDTH = TILE_N / 2;

DEVICE float2 rounded(float a, float b) { return unpack_bf16(pack_bf16(a, b)); }

// The terms of gate and up: the weights' slices, then those of gate's adapter, then those of up's.
struct GateAndUp {
    static constexpr bool ALONG = true;
    const TensorMap &x, &w_gate, &w_up, &u_gate, &b_gate, &u_up, &b_up;
    int of_weight, of_gate, gate_rank, up_rank, columns;

    DEVICE int slices() const { return of_weight + of_gate + divide_up(up_rank, TILE_K); }
    DEVICE int2 place(int slice) const {
        if (slice < of_weight) return make_int2(0, slice);
        slice -= of_weight;
        return slice < of_gate ? make_int2(0, slice) : make_int2(1, slice - of_gate);
    }
    DEVICE int steps(int slice) const {
        int2 at = place(slice);
        return steps_of(at.x == 0 ? gate_rank : up_rank, at.y);
    }
    DEVICE void prefetch() const {
        tma_prefetch(x);
        tma_prefetch(w_gate);
        tma_prefetch(w_up);
    }
    DEVICE void load(unsigned char* stage, Barrier* full, int2 corner, int slice, bool with_left) const {
        const bool up_half = cluster_rank() == 1, of_x = slice < of_weight;
        int2 at = place(slice);
        const bool of_up = at.x == 1;
        int k = at.y * TILE_K;
        if (with_left) tma_load(stage, of_x ? x : of_up ? u_up : u_gate, full, k, corner.x);
        // In the half that an adapter has nothing to do with, past its last row, there are zeros.
        int row = of_x || up_half == of_up ? corner.y : columns;
        load_half(stage + LEFT_BYTES, full, of_x ? (up_half ? w_up : w_gate) : of_up ? b_up : b_gate, row, k);
    }
};

// Groups of 16 of the rank that u may have.
constexpr int MOST_GROUPS = 2;

struct Activate {
    const TensorMap &gate, &up, &out;
    // [16 groups, columns]; no groups: there is no u.
    const bf16* a;
    int groups;
    // [tiles across, rows, 16 groups]
    float* partial;
    int rows, columns;

    DEVICE void before(const Shared&, Part, int, int) {}

    // u += 16 columns of what is activated, from column `at` on, times a's.
    DEVICE void project(Part part, const uint32_t (&left)[4], int at, float (&u)[MOST_GROUPS][2][4]) const {
#pragma unroll
        for (int group = 0; group < MOST_GROUPS; group++) {
            if (group >= groups) break;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const bf16* row = a + size_t(16 * group + 8 * half + part.thread % 32 / 4) * columns;
                uint32_t right[2] = {};
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int pair = at + 8 * i + part.thread % 4 * 2;
                    if (pair < columns) right[i] = *reinterpret_cast<const uint32_t*>(row + pair);
                }
                mma_bf16(u[group][half], left, right);
            }
        }
    }

    DEVICE void write_u(Part part, const float (&u)[MOST_GROUPS][2][4], int row, int column) const {
        float* tile = partial + size_t(column / WIDTH) * rows * 16 * groups;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int at = row + part.thread / 32 * 16 + part.thread % 32 / 4 + 8 * half;
            if (at >= rows) continue;
#pragma unroll
            for (int group = 0; group < MOST_GROUPS; group++) {
                if (group >= groups) break;
#pragma unroll
                for (int i = 0; i < 2; i++)
                    *reinterpret_cast<float2*>(tile + (size_t(at) * groups + group) * 16 + 8 * i + part.thread % 4 * 2) =
                        make_float2(u[group][i][2 * half], u[group][i][2 * half + 1]);
            }
        }
    }

    DEVICE void write(const Shared& shared, Part part, const float (&sums)[TILE_N / 2], int row, int column) const {
        float u[MOST_GROUPS][2][4] = {};
#pragma unroll
        for (int piece = 0; piece < WIDTH / 64; piece++) {
            int first = column + 64 * piece;
            if (first >= columns) break;
            const float *gates = sums + 32 * piece, *ups = gates + WIDTH / 2;
            // Three pieces in two places.
            int at = piece % 2;
            await_place(part, piece == 0);
            fill_piece(staged_piece(shared, part, at), part, [&](int i) { return pack_bf16(gates[i], gates[i + 1]); });
            send(shared, part, at, gate, row, first);
            await_place(part, false);
            fill_piece(staged_piece(shared, part, 1 - at), part, [&](int i) { return pack_bf16(ups[i], ups[i + 1]); });
            send(shared, part, 1 - at, up, row, first);
            uint32_t activation[16];
#pragma unroll
            for (int i = 0; i < 32; i += 2) {
                float2 g = rounded(gates[i], gates[i + 1]), u = rounded(ups[i], ups[i + 1]);
                activation[i / 2] = pack_bf16(activated(activate(g.x), u.x), activated(activate(g.y), u.y));
            }
            await_place(part, false);
            fill_piece(staged_piece(shared, part, at), part, [&](int i) { return activation[i / 2]; });
            send(shared, part, at, out, row, first);
#pragma unroll
            for (int i = 0; i < 16; i += 4) {
                const uint32_t left[4] = {activation[i], activation[i + 1], activation[i + 2], activation[i + 3]};
                project(part, left, first + 4 * i, u);
            }
        }
        write_u(part, u, row, column);
    }
};

// `across` tiles from column `first` on. a_i, u_i and `short_groups`: see `Short`, of gate's and of up's adapter; where those are made, the
// maps u_gate and u_up are not read. a, `groups` and `partial`: of the adapter of what reads `out`.
HOPPER_KERNEL(THREADS, CLUSTER) hopper_nt_swiglu(TENSOR_MAP x, TENSOR_MAP w_gate, TENSOR_MAP w_up, TENSOR_MAP u_gate,
                                                 TENSOR_MAP b_gate, TENSOR_MAP u_up, TENSOR_MAP b_up, TENSOR_MAP a0, TENSOR_MAP a1,
                                                 TENSOR_MAP a2, bf16* u0, bf16* u1, bf16* u2, int second_at, int third_at,
                                                 int short_groups, TENSOR_MAP gate, TENSOR_MAP up, TENSOR_MAP out, const bf16* a,
                                                 int groups, float* partial, int rows, int columns, int first, int across, int depth,
                                                 int gate_rank, int up_rank) {
    GateAndUp terms = {x, w_gate, w_up, u_gate, b_gate, u_up, b_up, divide_up(depth, TILE_K), divide_up(gate_rank, TILE_K),
                       gate_rank, up_rank, columns};
    product(terms, Tiles::some(rows, first, across, WIDTH), Activate{gate, up, out, a, groups, partial, rows, columns},
            short_sides<true>(a0, a1, a2, u0, u1, u2, second_at, third_at, short_groups, rows));
}

// du of an adapter, by `mma` of the fragments that its dy is packed in. In b a pair of numbers belongs to one column of dy and two of the
// rank, while `mma` wants two columns and one of the rank: so of 16 of the rank its first 8 are the even ones and its second the odd.
struct Pull {
    // [columns, 16 RANK_GROUPS]; may be null: there is no du.
    const bf16* b;
    // [tiles across, rows, 16 RANK_GROUPS]
    float* partial;

    // Of b: two rows from `at` + 2 (thread % 4) on, and two that are 8 further down.
    DEVICE void load(Part part, int at, int columns, uint32_t (&right)[RANK_GROUPS][2][2]) const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int column = at + 8 * i + part.thread % 4 * 2;
            const bf16* pair = b + size_t(column) * 16 * RANK_GROUPS + part.thread % 32 / 4 * 2;
            bool inside = b && column < columns;
#pragma unroll
            for (int group = 0; group < RANK_GROUPS; group++) {
                right[group][i][0] = inside ? *reinterpret_cast<const uint32_t*>(pair + 16 * group) : 0;
                right[group][i][1] = inside ? *reinterpret_cast<const uint32_t*>(pair + 16 * (RANK_GROUPS + group)) : 0;
            }
        }
    }

    // du += 16 columns of dy times their rows of b.
    DEVICE void add(const uint32_t (&left)[4], const uint32_t (&right)[RANK_GROUPS][2][2], float (&du)[RANK_GROUPS][2][4]) const {
        if (!b) return;
#pragma unroll
        for (int group = 0; group < RANK_GROUPS; group++) {
            uint32_t even[2], odd[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                uint32_t first = right[group][i][0], second = right[group][i][1];
                even[i] = (first & 0xffff) | second << 16;
                odd[i] = first >> 16 | (second & 0xffff0000);
            }
            mma_bf16(du[group][0], left, even);
            mma_bf16(du[group][1], left, odd);
        }
    }

    DEVICE void write(Part part, const float (&du)[RANK_GROUPS][2][4], int row, int rows, int column) const {
        if (!b) return;
        float* tile = partial + size_t(column / TILE_N) * rows * 16 * RANK_GROUPS;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int at = row + part.thread / 32 * 16 + part.thread % 32 / 4 + 8 * half;
            if (at >= rows) break;
#pragma unroll
            for (int group = 0; group < RANK_GROUPS; group++) {
                const float(&even)[4] = du[group][0], (&odd)[4] = du[group][1];
                *reinterpret_cast<float4*>(tile + (size_t(at) * RANK_GROUPS + group) * 16 + part.thread % 4 * 4) =
                    make_float4(even[2 * half], odd[2 * half], even[2 * half + 1], odd[2 * half + 1]);
            }
        }
    }
};

// gate and up come to the pieces in which their gradients replace them; two pairs of pieces are under way. What is activated has a
// piece of its own, the last.
struct ActivateBackward {
    const TensorMap &gate, &up, &act;
    Pull of_gate, of_up;
    int rows, columns;
    bool with_act;
    uint32_t parities;

    DEVICE void ask(const Shared& shared, Part part, int piece, int row, int column) const {
        ask_for(shared, part, piece % 2 * 2, gate, row, column + 64 * piece);
        ask_for(shared, part, piece % 2 * 2 + 1, up, row, column + 64 * piece);
    }

    DEVICE void before(const Shared& shared, Part part, int row, int column) {
        // The stores of the tile before have been waited for.
        if (part.thread != 0) return;
        for (int piece = 0; piece < 2; piece++)
            if (column + 64 * piece < columns) ask(shared, part, piece, row, column);
    }

    DEVICE void write(const Shared& shared, Part part, const float (&sums)[TILE_N / 2], int row, int column) {
        float du_gate[RANK_GROUPS][2][4] = {}, du_up[RANK_GROUPS][2][4] = {};
#pragma unroll
        for (int piece = 0; piece < PANELS; piece++) {
            int first = column + 64 * piece, at = piece % 2 * 2;
            if (first >= columns) break;
            await_piece(shared, part, at, parities);
            await_piece(shared, part, at + 1, parities);
#pragma unroll
            for (int group = 0; group < 8; group += 2) {
                unsigned char* gates_at = place_of(staged_piece(shared, part, at), part.thread, group);
                unsigned char* ups_at = place_of(staged_piece(shared, part, at + 1), part.thread, group);
                // Long before they are needed.
                uint32_t b_gate[RANK_GROUPS][2][2], b_up[RANK_GROUPS][2][2];
                of_gate.load(part, first + 8 * group, columns, b_gate);
                of_up.load(part, first + 8 * group, columns, b_up);
                uint32_t g[4], u[4], activation[4];
                ldmatrix_x4(g, gates_at);
                ldmatrix_x4(u, ups_at);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int sum = 32 * piece + 4 * group + 2 * i;
                    float2 dout = rounded(sums[sum], sums[sum + 1]), gates = unpack_bf16(g[i]), ups = unpack_bf16(u[i]);
                    Activation lower = activate(gates.x), upper = activate(gates.y);
                    float2 low = slopes(dout.x, lower, ups.x), high = slopes(dout.y, upper, ups.y);
                    activation[i] = pack_bf16(activated(lower, ups.x), activated(upper, ups.y));
                    g[i] = pack_bf16(low.x, high.x);
                    u[i] = pack_bf16(low.y, high.y);
                }
                stmatrix_x4(gates_at, g);
                stmatrix_x4(ups_at, u);
                if (with_act) stmatrix_x4(place_of(staged_piece(shared, part, STAGED - 1), part.thread, group), activation);
                of_gate.add(g, b_gate, du_gate);
                of_up.add(u, b_up, du_up);
            }
            send(shared, part, at, gate, row, first);
            send(shared, part, at + 1, up, row, first);
            if (with_act) send(shared, part, STAGED - 1, act, row, first);
            if (part.thread == 0) {
                tma_store_wait<0>(); // or what comes next would land on it
                if (piece + 2 < PANELS && column + 64 * (piece + 2) < columns) ask(shared, part, piece + 2, row, column);
            }
            if (with_act) part.sync(); // nor on what is activated
        }
        of_gate.write(part, du_gate, row, rows, column);
        of_up.write(part, du_up, row, rows, column);
    }
};

// gate and up become their gradients; not `with_act`: `act` is not written. Of adapters without b there is no du. Clusters that have a
// tile less add to a gradient of what has waited (hopper_gradients.cuh).
HOPPER_KERNEL(THREADS, CLUSTER) hopper_nn_swiglu_backward(TENSOR_MAP dy, TENSOR_MAP w, TENSOR_MAP du, TENSOR_MAP a,
                                                          TENSOR_MAP gate, TENSOR_MAP up, TENSOR_MAP act, const bf16* b_gate,
                                                          float* gate_partial, const bf16* b_up, float* up_partial, int rows,
                                                          int columns, int depth, int rank, int with_act, int of_idle, int task,
                                                          int last, TENSOR_MAP v, TENSOR_MAP u, float* first, float* second, float* third,
                                                          const bf16* weight, Sides sides) {
    product(Linear<false>::of({dy, w}, depth, {du, a}, rank), Tiles::of(rows, columns, TILE_N),
            ActivateBackward{gate, up, act, {b_gate, gate_partial}, {b_up, up_partial}, rows, columns, with_act != 0, 0},
            NoShort{}, Gradients<1>{{{&v, &u, first, second, third, weight, sides}}, of_idle, task, last});
}
