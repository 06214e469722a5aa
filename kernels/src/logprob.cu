// The head: linear layer, log-softmax and the choice of one entry, without logits in memory; twin of logprob.rs.
//
//   logits_t = W h_t + B s_t                    W [V, H] frozen, s_t = A h_t and B [V, r]: an adapter, if any
//   logp_t   = logits_t[y_t] - ln Σ_v e^logits_t[v]
//   g_t[v]   = dlogp_t / dlogits_t[v] = [v = y_t] - p_tv
//   dlogp_t / dh_t = g_t W + (g_t B) A          two products like those of any linear layer's way back (matmul.cu)
//
// logprob_logits     computes a tile [TILE_M tokens, TILE_N entries] of the logits in registers, as `nt` of matmul.cu does,
//                    and leaves of it, for each token and each strip of 64 entries (what one warp holds), the largest
//                    logit and Σ e^(logit - largest). Whoever holds the target's entry notes its logit. With `weights`
//                    it also leaves e^(logit - c) in bf16, c as logprob.cuh says, and 0 for the target.
// logprob_combine    goes through a token's strips in a fixed order: logp, and e^(c - ln Σ e^logit), with which weights become
//                    probabilities. Where c differs from strip to strip, which takes logits beyond ±44, it makes the weights
//                    of that token those of one c.
// logprob_gradients  turns weights into dlogp · g in place, for products that know nothing of all this: -p, and at the target
//                    1 - p = -expm1(logp), from f32: of a nearly certain token, the difference of two bf16 would have
//                    no digit left.
//
// On Hopper g W needs no such pass: hopper_logprob_backward takes the weights as they are and scales sums instead.
//
// Why weights and not logits lie in memory: a logit of 20 in bf16 is wrong by 1/16 and its probability by 6 %; a
// weight is wrong by 2⁻⁹ whatever the logit. Why they lie there at all, when the logits could be computed again once
// ln Σ is known: that is a third product with the vocabulary, 2 H flops an entry, against writing and reading 2 bytes of it.
// With H = 4096 a GPU of 800 TFLOP/s and 3 TB/s needs 10 ps against 1.3. The host takes a
// bounded number of tokens at a time (Head::tokens), over the whole vocabulary, so that the product g W sums in registers
// and is rounded once.
//
// Sums are cut at the same entries whatever the number of tokens and wherever in a tile a token lies: its log-prob
// has the same bits in any company. Without `weights` nothing else changes, so the reference pass and the policy's
// give the same bits, and B = 0 adds exact zeros.
#include "logprob.cuh"
#include "product.cuh"

static_assert(WARP_N == STRIP, "a warp holds a strip");

// h [tokens, hidden], w [vocab, hidden], s [tokens, rank], b [vocab, rank]; `rank` 0: no adapter.
// strips [tokens, ⌈vocab / 64⌉, 2], target_logits [tokens]; weights [tokens, pitch] with zeros from `vocab` on, or
// null.
KERNEL(THREADS) logprob_logits(const bf16* h, const bf16* w, int hidden, const bf16* s, const bf16* b, int rank,
                               const uint32_t* targets, float* strips, float* target_logits, bf16* weights, int tokens,
                               int vocab, int pitch) {
    Corner corner = corner_of(blockIdx.x, tokens, vocab);
    float sums[DOWN][ACROSS][4] = {};
    sum_products<true>(dynamic_shared(), corner, {h, w, hidden}, {s, b, rank}, tokens, vocab, sums);

    Corner part = corner_of_warp();
    int lane = lane_index(), first_row = corner.row + part.row + lane / 4;
    int strip = (corner.column + part.column) / STRIP, strip_count = divide_up(vocab, STRIP);
    int first_column = strip * STRIP + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < DOWN; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = first_row + 16 * i + 8 * half;
            int target = row < tokens ? int(targets[row]) : -1;
            float largest = NEG_INFINITY;
#pragma unroll
            for (int j = 0; j < ACROSS; j++)
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    int column = first_column + 8 * j + k;
                    float& logit = sums[i][j][2 * half + k];
                    if (column >= vocab) logit = NEG_INFINITY;
                    if (column == target) target_logits[row] = logit;
                    largest = fmaxf(largest, logit);
                }
            largest = quad_max(largest);
            float shift = shift_of(largest), sum = 0.0f;
            float scale = exp_fast(shift - weight_shift(largest));
#pragma unroll
            for (int j = 0; j < ACROSS; j++) {
                float low = exp_fast(sums[i][j][2 * half] - shift), high = exp_fast(sums[i][j][2 * half + 1] - shift);
                sum += low + high;
                int column = first_column + 8 * j;
                if (weights && row < tokens && column < pitch)
                    *reinterpret_cast<uint32_t*>(weights + size_t(row) * pitch + column) =
                        pack_bf16(column == target ? 0.0f : low * scale, column + 1 == target ? 0.0f : high * scale);
            }
            sum = quad_sum(sum);
            if (lane % 4 == 0 && row < tokens && strip < strip_count)
                reinterpret_cast<float2*>(strips)[size_t(row) * strip_count + strip] = make_float2(largest, sum);
        }
}

// Σ e^(x - largest) over two sets of logits together.
DEVICE float2 together(float2 a, float2 b) {
    float largest = fmaxf(a.x, b.x);
    if (largest == NEG_INFINITY) return a;
    return make_float2(largest, a.y * exp_fast(a.x - largest) + b.y * exp_fast(b.x - largest));
}

// values · factor, eight of them.
DEVICE void scale8(bf16* at, float factor) {
    float values[8];
    unpack8(load16(at), values);
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] *= factor;
    store16(at, pack8(values));
}

// logp, scales [tokens]: a warp a token. weights [tokens, pitch], or null.
KERNEL(128) logprob_combine(const float* strips, const float* target_logits, const uint32_t* targets, float* logp,
                            float* scales, bf16* weights, int tokens, int vocab, int pitch) {
    int row = int(blockIdx.x) * 4 + warp_index(), lane = lane_index();
    if (row >= tokens) return;
    int strip_count = divide_up(vocab, STRIP);
    auto of_row = reinterpret_cast<const float2*>(strips) + size_t(row) * strip_count;
    float2 sum = make_float2(NEG_INFINITY, 0.0f);
    float shifted = 0.0f;
    for (int strip = lane; strip < strip_count; strip += WARP) {
        sum = together(sum, of_row[strip]);
        if (weight_shift(of_row[strip].x) != 0.0f) shifted = 1.0f;
    }
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        sum = together(sum, make_float2(__shfl_xor_sync(ALL_LANES, sum.x, distance),
                                        __shfl_xor_sync(ALL_LANES, sum.y, distance)));
    shifted = warp_max(shifted);
    float log_sum = logf(sum.y), shift = shifted != 0.0f ? sum.x : 0.0f;
    if (weights && shifted != 0.0f)
        for (int column = 8 * lane; column < pitch; column += 8 * WARP)
            scale8(weights + size_t(row) * pitch + column,
                   exp_fast(weight_shift(of_row[column / STRIP].x) - shift));
    if (lane != 0) return;
    // Of a target outside the vocabulary there is no logit.
    float target = targets[row] < uint32_t(vocab) ? target_logits[row] : __uint_as_float(0x7fffffff);
    // In this order a nearly certain token keeps its precision.
    logp[row] = (target - sum.x) - log_sum;
    scales[row] = exp_fast((shift - sum.x) - log_sum);
}

// weights [tokens, pitch] → dlogp · g in place; `dlogp` [tokens], or null for 1. A block a token.
KERNEL(256) logprob_gradients(bf16* weights, const float* scales, const float* logp, const uint32_t* targets,
                              const float* dlogp, int pitch) {
    size_t row = blockIdx.x;
    float factor = dlogp ? dlogp[row] : 1.0f, of_others = -factor * scales[row];
    for (int column = int(threadIdx.x) * 8; column < pitch; column += 256 * 8)
        scale8(weights + row * pitch + column, of_others);
    // Whoever wrote there does so once more.
    uint32_t target = targets[row];
    if (target < uint32_t(pitch) && threadIdx.x == target / 8 % 256)
        weights[row * pitch + target] = to_bf16(-factor * expm1f(logp[row]));
}
