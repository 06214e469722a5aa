// The head's two products on Hopper, each with what belongs to the softmax:
//
//     hopper_logprob_logits      `logprob_logits` of logprob.cu: a strip is a piece of 64 columns, of which four lanes hold two
//                                rows; weights go out as any product does
//     hopper_logprob_backward    dlogp_t / dh_t = g_t W = (1 - p_t) W[y_t] - scale_t Σ_v weight_tv W[v]
//
// A matrix [tokens, vocabulary] is written once and read once, and nothing passes over it in between: what makes weights
// probabilities is one number a token and waits for the sums, and the target, whose weight is 0, comes to them in f32.
//
// Constants from outside: those of hopper_product.cuh.
#include "hopper_product.cuh"
#include "logprob.cuh"

struct Strips {
    // [tokens, pitch], if `keeps`.
    const TensorMap& weights;
    bool keeps;
    const uint32_t* targets;
    // [tokens, ⌈vocab / 64⌉, 2]
    float* strips;
    float* target_logits;
    int tokens, vocab;

    DEVICE void before(const Shared&, Part, int, int) {}

    DEVICE void write(const Shared& shared, Part part, const float (&sums)[TILE_N / 2], int row, int column) const {
        const int first_row = row + part.thread / 32 * 16 + part.thread % 32 / 4, quad = part.thread % 4;
        const int strip_count = divide_up(vocab, STRIP);
        int target[2];
#pragma unroll
        for (int half = 0; half < 2; half++)
            target[half] = first_row + 8 * half < tokens ? int(targets[first_row + 8 * half]) : -1;
#pragma unroll
        for (int piece = 0; piece < PANELS; piece++) {
            int first = column + STRIP * piece;
            if (first >= vocab) break;
            auto logit = [&](int i) {
                int at = first + i / 4 * 8 + 2 * quad + i % 2;
                return at < vocab ? sums[32 * piece + i] : NEG_INFINITY;
            };
            float largest[2] = {NEG_INFINITY, NEG_INFINITY}, shift[2], scale[2], sum[2] = {0.0f, 0.0f};
#pragma unroll
            for (int i = 0; i < 32; i++) {
                int half = i / 2 % 2;
                if (first + i / 4 * 8 + 2 * quad + i % 2 == target[half]) target_logits[first_row + 8 * half] = logit(i);
                largest[half] = fmaxf(largest[half], logit(i));
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                largest[half] = quad_max(largest[half]);
                shift[half] = shift_of(largest[half]);
                scale[half] = exp_fast(shift[half] - weight_shift(largest[half]));
            }
            auto weigh = [&](int i) {
                int half = i / 2 % 2, of_target = target[half] - (first + i / 4 * 8 + 2 * quad);
                float low = exp_fast(logit(i) - shift[half]), high = exp_fast(logit(i + 1) - shift[half]);
                sum[half] += low + high;
                return pack_bf16(of_target == 0 ? 0.0f : low * scale[half], of_target == 1 ? 0.0f : high * scale[half]);
            };
            if (keeps) {
                await_place(part, piece == 0);
                fill_piece(staged_piece(shared, part, piece % 2), part, weigh);
                send(shared, part, piece % 2, weights, row, first);
            } else {
#pragma unroll
                for (int i = 0; i < 32; i += 2) weigh(i);
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float total = quad_sum(sum[half]);
                size_t at = size_t(first_row + 8 * half) * strip_count + first / STRIP;
                if (quad == 0 && first_row + 8 * half < tokens)
                    reinterpret_cast<float2*>(strips)[at] = make_float2(largest[half], total);
            }
        }
    }
};

// h [tokens, hidden], w [vocab, hidden], s [tokens, rank], b [vocab, rank]; `rank` 0: no adapter; not `keeps`: `weights` is not written.
HOPPER_KERNEL(THREADS, CLUSTER) hopper_logprob_logits(TENSOR_MAP h, TENSOR_MAP w, TENSOR_MAP s, TENSOR_MAP b, TENSOR_MAP weights,
                                                      const uint32_t* targets, float* strips, float* target_logits, int tokens,
                                                      int vocab, int hidden, int rank, int keeps) {
    product(Linear<true>::of({h, w}, hidden, {s, b}, rank), Tiles::of(tokens, vocab, TILE_N),
            Strips{weights, keeps != 0, targets, strips, target_logits, tokens, vocab});
}

// out = (1 - p_t) W[y_t] - scale_t sums.
struct Pull {
    const TensorMap& out;
    // [entries, hidden]
    const bf16* w;
    const uint32_t* targets;
    const float *logp, *scales;
    int tokens, entries, hidden;

    DEVICE void before(const Shared&, Part, int, int) {}

    DEVICE void write(const Shared& shared, Part part, const float (&sums)[TILE_N / 2], int row, int column) const {
        // Of the thread's two rows: the target's row of W, and both factors.
        const bf16* of_target[2];
        float doubt[2], scale[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int at = min(row + part.thread / 32 * 16 + part.thread % 32 / 4 + 8 * half, tokens - 1);
            // The log-prob of a target outside the vocabulary is NaN, and so is what becomes of any row of W.
            of_target[half] = w + size_t(targets[at] < uint32_t(entries) ? targets[at] : 0) * hidden;
            doubt[half] = -expm1f(logp[at]);
            scale[half] = scales[at];
        }
#pragma unroll
        for (int piece = 0; piece < PANELS; piece++) {
            int first = column + 64 * piece;
            if (first >= hidden) break;
            await_place(part, piece == 0);
            fill_piece(staged_piece(shared, part, piece % 2), part, [&](int i) {
                int half = i / 2 % 2, at = first + i / 4 * 8 + part.thread % 4 * 2;
                float2 target = make_float2(0.0f, 0.0f);
                if (at < hidden) target = unpack_bf16(*reinterpret_cast<const uint32_t*>(of_target[half] + at));
                const float* sum = sums + 32 * piece + i;
                return pack_bf16(doubt[half] * target.x - scale[half] * sum[0],
                                 doubt[half] * target.y - scale[half] * sum[1]);
            });
            send(shared, part, piece % 2, out, row, first);
        }
    }
};

// weights [tokens, entries], w [entries, hidden]: as a map and as it lies; out [tokens, hidden].
HOPPER_KERNEL(THREADS, CLUSTER) hopper_logprob_backward(TENSOR_MAP weights, TENSOR_MAP w, const bf16* rows_of_w, TENSOR_MAP out,
                                                        const uint32_t* targets, const float* logp, const float* scales,
                                                        int tokens, int entries, int hidden) {
    product(Linear<false>::of({weights, w}, entries, {weights, w}, 0), Tiles::of(tokens, hidden, TILE_N),
            Pull{out, rows_of_w, targets, logp, scales, tokens, entries, hidden});
}
