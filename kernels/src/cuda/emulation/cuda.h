// CUDA's own names.
#pragma once
#include "device.h"
#include <math.h>

#define threadIdx (emulation::self().thread)
#define blockIdx (emulation::self().block->index)
#define blockDim (emulation::self().block->dim)
#define gridDim (emulation::self().block->grid)

inline void __syncthreads() { emulation::barrier(); }
inline void __syncwarp(uint32_t lanes = 0xffffffffu) {
    emulation::settle();
    emulation::collective("__syncwarp", lanes, emulation::self().block, [](void**) {});
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

template <class T> T __shfl_sync(uint32_t lanes, T value, int source) {
    return emulation::shuffle("__shfl_sync", lanes, value, source);
}
template <class T> T __shfl_xor_sync(uint32_t lanes, T value, int mask) {
    return emulation::shuffle("__shfl_xor_sync", lanes, value, emulation::self().number % 32 ^ mask);
}
template <class T> T __shfl_down_sync(uint32_t lanes, T value, unsigned distance) {
    unsigned lane = emulation::self().number % 32;
    return emulation::shuffle("__shfl_down_sync", lanes, value, lane + distance < 32 ? lane + distance : lane);
}
template <class T> T __shfl_up_sync(uint32_t lanes, T value, unsigned distance) {
    unsigned lane = emulation::self().number % 32;
    return emulation::shuffle("__shfl_up_sync", lanes, value, lane >= distance ? lane - distance : lane);
}
inline uint32_t __ballot_sync(uint32_t lanes, int predicate) {
    return emulation::vote("__ballot_sync", lanes, predicate != 0);
}
inline int __any_sync(uint32_t lanes, int predicate) { return emulation::vote("__any_sync", lanes, predicate != 0) != 0; }
inline int __all_sync(uint32_t lanes, int predicate) { return emulation::vote("__all_sync", lanes, predicate == 0) == 0; }

inline int atomicAdd(int* to, int value) { return __atomic_fetch_add(to, value, __ATOMIC_RELAXED); }
inline unsigned atomicAdd(unsigned* to, unsigned value) { return __atomic_fetch_add(to, value, __ATOMIC_RELAXED); }

inline uint32_t __float_as_uint(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
inline int __float_as_int(float x) { return int(__float_as_uint(x)); }
inline float __uint_as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
inline float __int_as_float(int bits) { return __uint_as_float(uint32_t(bits)); }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline size_t min(size_t a, size_t b) { return a < b ? a : b; }
inline size_t max(size_t a, size_t b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

// Static shared memory has no guards.
#pragma GCC poison __shared__
