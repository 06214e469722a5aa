// Rows by number: of the token embedding, and of activations where only some rows go on; twin of embedding.rs.
//
//   gather    out[t] = table[ids[t]]                                       [T, width] of [V, width]
//   scatter   out[v] = Σ factors[t] x[t] over all t with ids[t] = v        the way back: [V, width] of [T, width]
//
// bf16; gather copies bits, scatter adds in f32 in the order of t and rounds once. Both overwrite all of `out`: a row
// to which nothing is added becomes zeros. A row is written by one block, so nothing is added atomically: the host
// has sorted the t by their id, and those of row v are readers[starts[v] .. starts[v + 1]]. `factors` may be null:
// all are 1.
//
// A kernel cannot refuse an id; one outside the table makes its row NaN, which no loss overlooks.
// One row a block; sixteen bytes a thread in one access where the width is a multiple of 8.
#include "tile.cuh"

constexpr uint32_t NANS = 0xffffffffu;

KERNEL(128) embedding_gather(const bf16* table, const uint32_t* ids, bf16* out, uint32_t width, uint32_t table_rows) {
    uint32_t id = ids[blockIdx.x];
    bool known = id < table_rows;
    table += known ? size_t(id) * width : 0;
    out += size_t(blockIdx.x) * width;
    if (width % 8 == 0) {
        for (uint32_t i = threadIdx.x * 8; i < width; i += 128 * 8)
            store16(out + i, known ? load16(table + i) : make_uint4(NANS, NANS, NANS, NANS));
    } else {
        for (uint32_t i = threadIdx.x; i < width; i += 128) out[i] = known ? table[i] : bf16{uint16_t(NANS)};
    }
}

KERNEL(128) embedding_scatter(const bf16* x, const uint32_t* starts, const uint32_t* readers, const float* factors,
                              bf16* out, uint32_t width) {
    uint32_t first = starts[blockIdx.x], end = starts[blockIdx.x + 1];
    out += size_t(blockIdx.x) * width;
    if (width % 8 == 0) {
        for (uint32_t i = threadIdx.x * 8; i < width; i += 128 * 8) {
            float sums[8] = {};
            for (uint32_t reader = first; reader < end; reader++) {
                uint32_t t = readers[reader];
                float factor = factors ? factors[t] : 1.0f, row[8];
                unpack8(load16(x + size_t(t) * width + i), row);
#pragma unroll
                for (int j = 0; j < 8; j++) sums[j] += factor * row[j];
            }
            store16(out + i, pack8(sums));
        }
    } else {
        for (uint32_t i = threadIdx.x; i < width; i += 128) {
            float sum = 0.0f;
            for (uint32_t reader = first; reader < end; reader++) {
                uint32_t t = readers[reader];
                sum += (factors ? factors[t] : 1.0f) * to_float(x[size_t(t) * width + i]);
            }
            out[i] = to_bf16(sum);
        }
    }
}
