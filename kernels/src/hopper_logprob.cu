// `logprob_logits` of logprob.cu for Hopper: the same of a tile's logits, as a product's tile comes out of the tensor cores. A strip is
// a piece of 64 columns, of which four lanes hold two rows; weights go out as any product does.
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
            float largest[2] = {NEG_INFINITY, NEG_INFINITY}, shift[2], sum[2] = {0.0f, 0.0f};
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
            }
            auto weigh = [&](int i) {
                int half = i / 2 % 2;
                float low = exp2_fast((logit(i) - shift[half]) * LOG2_E);
                float high = exp2_fast((logit(i + 1) - shift[half]) * LOG2_E);
                sum[half] += low + high;
                return pack_bf16(low, high);
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
