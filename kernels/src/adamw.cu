// AdamW over all tensors of an adapter in one launch, and the norm of their gradients; twin of adamw.rs.
//
//   g = grad · grad_scale
//   m = m + (1 - beta1) (g - m)
//   v = beta2 v + (1 - beta2) g²
//   p = p (1 - lr weight_decay) - lr / (1 - beta1^step) · m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
//   copy = bf16(copy_scale · p)
//
// p, grad, m, v are f32; products read `copy`, a bf16 matrix whose rows begin `pitch` elements apart. What lies
// between a row's end and the next row is not touched.
//
// Tensors differ in length from thousands to millions of elements, so the work is cut into pieces of PIECE elements
// of one tensor: pieces[block] is (tensor, piece of it). All tensors lie in one array of parameters, and in arrays of
// gradients and moments at the same places; `tensors` says where, and where each one's copy is.
//
// Every operation is rounded by itself, in the twin's order, so the two give the same bits: __fmul_rn and __fadd_rn
// are never contracted into a fused multiply-add. Traffic: 28 bytes an element to read and write p, m, v and read
// grad, and 2 for the copy.
#include "device.cuh"

constexpr uint32_t PIECE = 4096;
constexpr uint32_t THREADS = 256;

// As adamw/cuda.rs writes it.
struct Tensor {
    uint64_t start, copy_start;
    uint32_t length, width, pitch;
    float copy_scale;
};

// A block's elements of its tensor.
struct Piece {
    Tensor it;
    uint32_t first, end;

    DEVICE Piece(const uint64_t* tensors, const uint32_t* pieces)
        : it(reinterpret_cast<const Tensor*>(tensors)[pieces[2 * blockIdx.x]]),
          first(pieces[2 * blockIdx.x + 1] * PIECE),
          end(min(first + PIECE, it.length)) {}
};

KERNEL(THREADS) adamw_step(const uint64_t* tensors, const uint32_t* pieces, float* params, const float* grads, float* ms,
                           float* vs, bf16* copies, float grad_scale, float decay, float one_minus_beta1, float beta2,
                           float one_minus_beta2, float sqrt_correction2, float eps, float step_size) {
    Piece piece(tensors, pieces);
    const Tensor& it = piece.it;
    params += it.start, grads += it.start, ms += it.start, vs += it.start, copies += it.copy_start;
    for (uint32_t i = piece.first + threadIdx.x; i < piece.end; i += THREADS) {
        float g = __fmul_rn(grads[i], grad_scale), m = ms[i], v = vs[i];
        m = __fadd_rn(m, __fmul_rn(one_minus_beta1, __fadd_rn(g, -m)));
        v = __fadd_rn(__fmul_rn(v, beta2), __fmul_rn(__fmul_rn(one_minus_beta2, g), g));
        float denominator = __fadd_rn(sqrtf(v) / sqrt_correction2, eps);
        float p = __fadd_rn(__fmul_rn(params[i], decay), -__fmul_rn(step_size, m / denominator));
        ms[i] = m;
        vs[i] = v;
        params[i] = p;
        copies[size_t(i / it.width) * it.pitch + i % it.width] = to_bf16(__fmul_rn(it.copy_scale, p));
    }
}

DEVICE double block_sum_f64(double x, double* scratch) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    if (lane_index() == 0) scratch[warp_index()] = x;
    __syncthreads();
    double sum = 0.0;
    for (uint32_t warp = 0; warp < THREADS / WARP; warp++) sum += scratch[warp];
    return sum;
}

// sums[block] = Σ grad² over the block's piece, in f64.
KERNEL(THREADS) adamw_norm_squared(const uint64_t* tensors, const uint32_t* pieces, const float* grads, double* sums) {
    Piece piece(tensors, pieces);
    grads += piece.it.start;
    double sum = 0.0;
    for (uint32_t i = piece.first + threadIdx.x; i < piece.end; i += THREADS) sum += double(grads[i]) * double(grads[i]);
    sum = block_sum_f64(sum, reinterpret_cast<double*>(dynamic_shared()));
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// total = Σ sums[0 .. n], by one block. total[1], 0 at first, becomes the `number` of the first sum that is not finite.
KERNEL(THREADS) adamw_add_up(const double* sums, uint32_t n, uint32_t number, double* total) {
    double sum = 0.0;
    for (uint32_t i = threadIdx.x; i < n; i += THREADS) sum += sums[i];
    sum = block_sum_f64(sum, reinterpret_cast<double*>(dynamic_shared()));
    if (threadIdx.x != 0) return;
    total[0] = sum;
    // Infinity and NaN give NaN.
    if (!(sum - sum == 0.0) && total[1] == 0.0) total[1] = number;
}
