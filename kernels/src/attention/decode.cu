// Attention of one new token against the cache of all before it (the keys split over blocks as in "Flash-Decoding", Dao,
// Haziza, Massa & Sizov 2023); formulas as in attention.cu, whose tiles, products and softmax these kernels use.
//
//   attention_decode           a block meets PART_KEYS keys and leaves what they alone would give:
//                              top = max s, sum = Σ 2^(s - top), partial = Σ 2^(s - top) v      s in base 2
//   attention_decode_combine   out = Σ_parts 2^(top_part - top) partial / Σ_parts 2^(top_part - top) sum
//
// Contract: q, out: bf16 [heads, HEAD_DIM]; k_cache, v_cache: bf16 [n, kv_heads, HEAD_DIM]; partial:
// f32 [parts, heads, HEAD_DIM]; statistics: f32 [parts, heads, 2], top and sum. All of partial and statistics is
// overwritten. The parts are of one size and combined in order, so the sums depend on nothing but n and the window.
//
// The cache is read once, which is all the time that this takes; tensor cores are used because with many heads per key head
// the arithmetic would not hide behind the reading otherwise. blockIdx = (part, key head, which 16 of the query heads
// that read it). Rows of the left operand are those heads, mostly fewer than 16. Of a tile of 64 keys a warp has 16, with
// a softmax of its own; the four are put together at the end.
//
// Shared memory: q [16, DIM], 2 × (k [64, DIM], v [64, DIM]); at the end, over the latter, per warp f32
// sums [16, DIM], top [16], sum [16].
//
// Constants from outside (attention/cuda/tiling.rs): HEAD_DIM, SHARING, MET, ROWS (16), PART_KEYS.

#include "device.cuh"
#include "tiles.cuh"

// Keys first_key .. first_key + keys - 1 of the cache are visible.
KERNEL(THREADS) attention_decode(const bf16* q, const bf16* k_cache, const bf16* v_cache, float* partial, float* statistics,
                                 int first_key, int keys, int kv_heads, float scale) {
    constexpr int KEYS = MET / WARPS;
    bf16* tile_q = reinterpret_cast<bf16*>(dynamic_shared());
    bf16* stages = tile_q + ROWS * DIM;
    int lane = lane_index(), warp = warp_index();
    int first_head = blockIdx.y * SHARING + blockIdx.z * ROWS;
    int heads = min(ROWS, SHARING - int(blockIdx.z) * ROWS);
    int begin = blockIdx.x * PART_KEYS, end = min(begin + PART_KEYS, keys);
    OnlineSoftmax<1> state;
    start(state);

    load_rows<SHARING, ROWS>(tile_q, q + size_t(first_head) * HEAD_DIM, heads, kv_heads);
    auto load = [&](int stage, int from) {
        Span span{first_key + from, first_key + from, min(MET, end - from)};
        load_tile<1, MET>(stages + stage * 2 * MET * DIM, k_cache, span, kv_heads);
        load_tile<1, MET>(stages + (stage * 2 + 1) * MET * DIM, v_cache, span, kv_heads);
        copy_async_commit();
    };
    load(0, begin);
    for (int from = begin, stage = 0; from < end; from += MET, stage ^= 1) {
        copy_async_wait<0>();
        // This stage is there for all, and all are done with the other one.
        __syncthreads();
        if (from + MET < end) load(stage ^ 1, from + MET);
        bf16* tile_k = stages + stage * 2 * MET * DIM;
        float scores[1][KEYS / 8][4];
        product_transposed(scores, tile_q, 0, tile_k, warp * KEYS);
        if (end - from < MET) {
            Columns seen{0, end - from}, visible[1][2] = {{seen, seen}};
            hide(scores, visible, warp * KEYS);
        }
        soften(state, scores, scale * LOG2_E);
        add_product(state.out, scores, tile_k + MET * DIM, warp * KEYS);
    }

    // Everyone is done with the tiles, whose memory the warps' results take.
    __syncthreads();
    float* sums = reinterpret_cast<float*>(stages);
    float* tops = sums + WARPS * ROWS * DIM;
    float* own_sums = tops + WARPS * ROWS;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = warp * ROWS + 8 * half + lane / 4;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            float* to = sums + row * DIM + 8 * c + lane % 4 * 2;
            to[0] = state.out[0][c][2 * half];
            to[1] = state.out[0][c][2 * half + 1];
        }
        float sum = quad_sum(state.sum[0][half]);
        if (lane % 4 == 0) {
            tops[row] = state.top[0][half];
            own_sums[row] = sum;
        }
    }
    __syncthreads();
    size_t at = size_t(blockIdx.x) * kv_heads * SHARING + first_head;
    for (int index = threadIdx.x; index < heads * HEAD_DIM; index += THREADS) {
        int row = index / HEAD_DIM, column = index % HEAD_DIM;
        float top = NEG_INFINITY, sum = 0.0f, out = 0.0f;
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, tops[w * ROWS + row]);
        for (int w = 0; w < WARPS; w++) {
            // A warp that met no key has weight 0, and at least one has met some.
            float weight = exp2_fast(tops[w * ROWS + row] - top);
            sum += weight * own_sums[w * ROWS + row];
            out += weight * sums[(w * ROWS + row) * DIM + column];
        }
        partial[(at + row) * HEAD_DIM + column] = out;
        if (column == 0) {
            statistics[2 * (at + row)] = top;
            statistics[2 * (at + row) + 1] = sum;
        }
    }
}

// A block has a head, a thread a column.
KERNEL(THREADS) attention_decode_combine(const float* partial, const float* statistics, bf16* out, int parts) {
    int head = blockIdx.x, heads = gridDim.x, column = threadIdx.x;
    if (column >= HEAD_DIM) return;
    float top = NEG_INFINITY, sum = 0.0f, total = 0.0f;
    for (int part = 0; part < parts; part++) top = fmaxf(top, statistics[2 * (size_t(part) * heads + head)]);
    for (int part = 0; part < parts; part++) {
        size_t at = size_t(part) * heads + head;
        float weight = exp2_fast(statistics[2 * at] - top);
        sum += weight * statistics[2 * at + 1];
        total += weight * partial[at * HEAD_DIM + column];
    }
    out[head * HEAD_DIM + column] = to_bf16(total / sum);
}
