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
// of one tensor: pieces[block] is (tensor, piece of it). A tensor is described by addresses and sizes in `tensors`,
// written once.
//
// Every operation is rounded by itself, in the twin's order, so the two give the same bits: __fmul_rn and __fadd_rn
// are never contracted into a fused multiply-add. Traffic: 28 bytes an element to read and write p, m, v and read
// grad, and 2 for the copy.
#include "device.cuh"

constexpr uint32_t PIECE = 4096;
constexpr uint32_t THREADS = 256;

// As adamw/cuda.rs writes it.
struct Tensor {
    float *param, *m, *v;
    const float* grad;
    bf16* copy;
    uint32_t length, width, pitch;
    float copy_scale;
};

KERNEL(THREADS) adamw_step(const uint64_t* tensors, const uint32_t* pieces, float grad_scale, float decay,
                           float one_minus_beta1, float beta2, float one_minus_beta2, float sqrt_correction2, float eps,
                           float step_size) {
    const Tensor& it = reinterpret_cast<const Tensor*>(tensors)[pieces[2 * blockIdx.x]];
    uint32_t first = pieces[2 * blockIdx.x + 1] * PIECE, end = min(first + PIECE, it.length);
    for (uint32_t i = first + threadIdx.x; i < end; i += THREADS) {
        float g = __fmul_rn(it.grad[i], grad_scale), m = it.m[i], v = it.v[i];
        m = __fadd_rn(m, __fmul_rn(one_minus_beta1, __fadd_rn(g, -m)));
        v = __fadd_rn(__fmul_rn(v, beta2), __fmul_rn(__fmul_rn(one_minus_beta2, g), g));
        float denominator = __fadd_rn(sqrtf(v) / sqrt_correction2, eps);
        float p = __fadd_rn(__fmul_rn(it.param[i], decay), -__fmul_rn(step_size, m / denominator));
        it.m[i] = m;
        it.v[i] = v;
        it.param[i] = p;
        it.copy[size_t(i / it.width) * it.pitch + i % it.width] = to_bf16(__fmul_rn(it.copy_scale, p));
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
KERNEL(THREADS) adamw_norm_squared(const uint64_t* tensors, const uint32_t* pieces, double* sums) {
    const Tensor& it = reinterpret_cast<const Tensor*>(tensors)[pieces[2 * blockIdx.x]];
    uint32_t first = pieces[2 * blockIdx.x + 1] * PIECE, end = min(first + PIECE, it.length);
    double sum = 0.0;
    for (uint32_t i = first + threadIdx.x; i < end; i += THREADS) sum += double(it.grad[i]) * double(it.grad[i]);
    sum = block_sum_f64(sum, reinterpret_cast<double*>(dynamic_shared()));
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// total = Σ sums[0 .. n], by one block.
KERNEL(THREADS) adamw_add_up(const double* sums, uint32_t n, double* total) {
    double sum = 0.0;
    for (uint32_t i = threadIdx.x; i < n; i += THREADS) sum += sums[i];
    sum = block_sum_f64(sum, reinterpret_cast<double*>(dynamic_shared()));
    if (threadIdx.x == 0) *total = sum;
}
