// What kernels are written with: types, and wrappers around the instructions that C++ has no word for.
//
// A kernel's source is compiled by two compilers. NVRTC makes it a cubin for a GPU; the system's C++ compiler makes
// it a shared library that the emulated device executes (emulation/). Whatever differs between the two has
// two bodies here, next to each other; above these names a kernel is the same text for both.
//
// No header of CUDA is included: NVRTC alone has to do.
#pragma once

#ifdef __CUDACC_RTC__

typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef int int32_t;
typedef long long int64_t;

// `KERNEL(threads) name(parameters) { … }`: at most `threads` threads a block; parameters are plain pointers and numbers.
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
#define DEVICE __device__ __forceinline__
#define INFINITY __int_as_float(0x7f800000)

#else

#include "emulation.h"
#define KERNEL(threads) extern "C" void
#define DEVICE inline __attribute__((always_inline))

#endif

#define NEG_INFINITY (-INFINITY)

constexpr int WARP = 32;
constexpr uint32_t ALL_LANES = 0xffffffffu;

// ---- who and where ----

// Threads are numbered along x; a block has no other dimension.
DEVICE int lane_index() { return int(threadIdx.x) % WARP; }
DEVICE int warp_index() { return int(threadIdx.x) / WARP; }

// threadIdx.x, read anew at each call: what follows from it is computed again in every turn of a loop instead of
// being kept in registers that the accumulators need.
DEVICE int thread_index_again() {
#ifdef __CUDACC_RTC__
    int index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    __builtin_assume(index >= 0 && index < 1024);
    return index;
#else
    return int(threadIdx.x);
#endif
}

// The block's shared memory, aligned to 1024 bytes. All of it is dynamic: its size is said at the launch.
DEVICE unsigned char* dynamic_shared() {
#ifdef __CUDACC_RTC__
    extern __shared__ __align__(1024) unsigned char memory[];
    return memory;
#else
    return emulation::shared_memory();
#endif
}

// ---- bf16 ----

struct __align__(2) bf16 {
    uint16_t bits;
};

DEVICE float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }

// Rounds to nearest, ties to even; a NaN becomes the canonical one.
DEVICE bf16 to_bf16(float x) {
#ifdef __CUDACC_RTC__
    bf16 out;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
    return out;
#else
    return bf16{emulation::round_to_bf16(x)};
#endif
}

// Two bf16 in one register; `low` has the lower address.
DEVICE uint32_t pack_bf16(float low, float high) {
#ifdef __CUDACC_RTC__
    uint32_t out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
#else
    return uint32_t(emulation::round_to_bf16(high)) << 16 | emulation::round_to_bf16(low);
#endif
}

DEVICE float2 unpack_bf16(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// ---- memory, 16 bytes at a time; addresses are multiples of 16 ----

DEVICE uint4 load16(const void* from) {
#ifndef __CUDACC_RTC__
    emulation::check_aligned("load16", from, 16);
#endif
    return *reinterpret_cast<const uint4*>(from);
}

DEVICE void store16(void* to, uint4 value) {
#ifndef __CUDACC_RTC__
    emulation::check_aligned("store16", to, 16);
#endif
    *reinterpret_cast<uint4*>(to) = value;
}

#ifdef __CUDACC_RTC__
DEVICE uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }
#endif

// Starts copying 16 bytes from global to shared memory; zeros where not `valid`, and `global` is then not read. What
// `shared` holds until the wait is undefined.
DEVICE void copy_async16(void* shared, const void* global, bool valid = true) {
#ifdef __CUDACC_RTC__
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
#else
    emulation::copy_async(shared, global, valid);
#endif
}

// The copies that this thread started since its last commit are a group.
DEVICE void copy_async_commit() {
#ifdef __CUDACC_RTC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    emulation::copy_async_commit();
#endif
}

// Waits until at most `PENDING` of this thread's groups are under way. Other threads' copies need a barrier after it.
template <int PENDING>
DEVICE void copy_async_wait() {
#ifdef __CUDACC_RTC__
    asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
#else
    emulation::copy_async_wait(PENDING);
#endif
}

// ---- tensor cores; every lane of the warp takes part ----
//
// A fragment of an 8×8 matrix of bf16 is one register a lane: lane l has row l / 4, columns 2 (l % 4) and the next.

// Four 8×8 matrices from shared memory: lane l gives the address of row l % 8 (16 bytes) of matrix l / 8, and
// r[i] is its fragment of matrix i.
DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#ifdef __CUDACC_RTC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#else
    emulation::ldmatrix<4, false>(r, row);
#endif
}

// The same, each matrix transposed on the way.
DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
#ifdef __CUDACC_RTC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#else
    emulation::ldmatrix<4, true>(r, row);
#endif
}

// Two matrices: the addresses of lanes 0 to 15 count, those of the others need only be valid.
DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
#ifdef __CUDACC_RTC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
#else
    emulation::ldmatrix<2, false>(r, row);
#endif
}

DEVICE void ldmatrix_x2_transposed(uint32_t (&r)[2], const void* row) {
#ifdef __CUDACC_RTC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
#else
    emulation::ldmatrix<2, true>(r, row);
#endif
}

// d [16, 8] += a [16, 16] · b [16, 8], f32 += bf16 · bf16.
// With g = lane / 4 and t = 2 (lane % 4), each register of a and b holding two neighbours along the sum:
//   a[0] = a(g, t)   a[1] = a(g + 8, t)   a[2] = a(g, t + 8)   a[3] = a(g + 8, t + 8)
//   b[0] = b(t, g)   b[1] = b(t + 8, g)
//   d[0] = d(g, t)   d[1] = d(g, t + 1)   d[2] = d(g + 8, t)   d[3] = d(g + 8, t + 1)
DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC_RTC__
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    emulation::mma_bf16(d, a, b);
#endif
}

// ---- arithmetic ----

// 2 to the power of x, with a relative error of about 2⁻²².
DEVICE float exp2_fast(float x) {
#ifdef __CUDACC_RTC__
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
#else
    return exp2f(x);
#endif
}

// 1 / x, with a relative error of about 2⁻²³: one instruction, where a division that is correctly rounded takes ten.
DEVICE float reciprocal_fast(float x) {
#ifdef __CUDACC_RTC__
    float out;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
#else
    return 1.0f / x;
#endif
}

// ---- sums and maxima, in a fixed order; every thread gets the result ----

DEVICE float warp_sum(float x) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}

DEVICE float warp_max(float x) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, distance));
    return x;
}

// Over a quad of lanes, which holds a row of a fragment.
DEVICE float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

DEVICE float quad_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

// Over a block of whole warps; `scratch`: one float a warp, in shared memory, free again afterwards.
DEVICE float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    if (lane_index() == 0) scratch[warp_index()] = x;
    __syncthreads();
    float sum = warp_sum(lane_index() < int(blockDim.x) / WARP ? scratch[lane_index()] : 0.0f);
    __syncthreads();
    return sum;
}

DEVICE float block_max(float x, float* scratch) {
    x = warp_max(x);
    if (lane_index() == 0) scratch[warp_index()] = x;
    __syncthreads();
    float largest = warp_max(lane_index() < int(blockDim.x) / WARP ? scratch[lane_index()] : NEG_INFINITY);
    __syncthreads();
    return largest;
}
