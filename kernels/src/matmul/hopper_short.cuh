// The short sides of adapters, made beside tiles of a product (hopper_product.cuh) whose left factor they are made of:
//
//     forward   u_i  [rows, R_i] = x aᵢᵀ       aᵢ [R_i, depth], of up to three layers that read x
//     back      du_i [rows, R_i] = dy_i bᵢ     bᵢ [depth_i, R_i], of up to three layers whose terms the product has
//
// A block has all of its rows pass through shared memory anyway. So the tiles of an output's first columns multiply them by the R_i, too,
// which stand beside the tile's columns; the other columns are a launch of their own, after it, and read what this one wrote. Its own
// tiles have it in registers, rounded to bf16, as the left factor of their adapters' slices.
//
// A stage has besides left and right, a slice of 64 of the depth long:
//
//     along     SHORT_GROUPS boxes [16, 64] of the aᵢ, below each other
//     across    a box [64, 64] of the bᵢ whose layer the slice is of; in the places of the others' columns there are zeros
//
// The R_i are multiples of 16, together at most 16 SHORT_GROUPS, and at most 64. Every element is summed in one order, whatever is beside it,
// if the tensor cores' order does not depend on how many columns a product has; a test on a GPU says so.
#pragma once
#include "hopper_product.cuh"
#include "three.cuh"

static_assert(SHORT_GROUPS <= 4, "no adapter has more than one slice");

// A box's row where every matrix has ended.
constexpr int OUTSIDE = 1 << 30;

// `right`: maps of the aᵢ in boxes of 16 rows, of the bᵢ in boxes of 32. `made`: u or du.
template <bool ALONG, int GROUPS_>
struct Short {
    static constexpr int GROUPS = GROUPS_;
    static constexpr int BYTES = ALONG ? GROUPS * 16 * ROW_BYTES : PIECE_BYTES;

    Three<const TensorMap> right;
    Three<bf16> made;
    int groups, rows;

    // By one thread: a stage's share, of which each block loads a part for both. `place`: a layer and which of its slices.
    DEVICE void load(unsigned char* stage, Barrier* full, int2 place) const {
        const int rank = int(cluster_rank()), k = place.y * TILE_K;
        unsigned char* piece = stage + LEFT_BYTES + RIGHT_BYTES;
        if constexpr (ALONG) {
            for (int group = rank; group < GROUPS; group += CLUSTER) {
                int inside;
                // In a place that no rank has, another: what comes of it is left out.
                const TensorMap* a = right.of(min(group, groups - 1), inside);
                tma_load_multicast(piece + group * 16 * ROW_BYTES, *a, full, k, 16 * inside, 3);
            }
        } else {
            const int begin = right.begin(place.x), half = TILE_K / CLUSTER;
            int inside;
            const TensorMap* b = right.of(min(begin, groups - 1), inside);
            // Of a layer without an adapter, zeros.
            int row = right.length(place.x, groups) > 0 ? k + rank * half : OUTSIDE;
            tma_load_multicast(piece + rank * half * ROW_BYTES, *b, full, -16 * begin, row, 3);
        }
    }

    // The sums as fragments of a left factor.
    DEVICE static void pack(const float (&sums)[8 * GROUPS], uint32_t (&packed)[GROUPS][4]) {
#pragma unroll
        for (int group = 0; group < GROUPS; group++)
#pragma unroll
            for (int i = 0; i < 4; i++) packed[group][i] = pack_bf16(sums[8 * group + 2 * i], sums[8 * group + 2 * i + 1]);
    }

    // Those of one layer's adapter, its first at 0, and zeros: what others have may be infinite.
    DEVICE void of_layer(const uint32_t (&packed)[GROUPS][4], int layer, uint32_t (&left)[GROUPS][4]) const {
        const int begin = made.begin(layer), length = made.length(layer, groups);
#pragma unroll
        for (int k = 0; k < GROUPS; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                left[k][i] = 0;
                // By masks: a choice would take them from memory.
#pragma unroll
                for (int group = k; group < GROUPS; group++)
                    left[k][i] |= packed[group][i] & -uint32_t(k < length && group == begin + k);
            }
    }

    // To memory, by the tiles of the first columns. `corner`: the block's.
    DEVICE void write(const uint32_t (&packed)[GROUPS][4], Part part, int2 corner) const {
        if (corner.y > 0) return;
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            if (group >= groups) break;
            int inside;
            bf16* to = made.of(group, inside);
            size_t pitch = size_t(16) * made.length(made.index(group), groups);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int row = corner.x + 64 * part.index + part.thread / 32 * 16 + part.thread % 32 / 4 + 8 * half;
                if (row >= rows) continue;
#pragma unroll
                for (int j = 0; j < 2; j++)
                    *reinterpret_cast<uint32_t*>(to + row * pitch + 16 * inside + 8 * j + part.thread % 4 * 2) =
                        packed[group][2 * j + half];
            }
        }
    }
};

// What a kernel has whose constants say whether there are any.
template <bool ALONG>
DEVICE auto short_sides(const TensorMap& right0, const TensorMap& right1, const TensorMap& right2, bf16* made0, bf16* made1, bf16* made2,
                        int second_at, int third_at, int groups, int rows) {
    if constexpr (SHORT_GROUPS > 0)
        return Short<ALONG, SHORT_GROUPS>{
            {&right0, &right1, &right2, second_at, third_at}, {made0, made1, made2, second_at, third_at}, groups, rows};
    else return NoShort{};
}
