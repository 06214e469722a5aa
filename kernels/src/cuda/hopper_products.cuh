// Products of a warpgroup, which only Hopper has (sm_90a), as hopper.cuh has the rest: `wgmma.*` of PTX, of which all 128 threads
// have a part. Two bodies each; emulation/hopper.h says what the second makes of mistakes.
//
//     d [64, N] (+)= a [64, 16] · b [16, N]        f32 += bf16 · bf16
//
// The tensor cores read matrices in shared memory, rows and swizzle as in hopper.cuh, through descriptors; a may be in registers, d
// always is. `wgmma` only starts a product, which runs beside what follows:
//
//     wgmma_fence(); wgmma(d, a, b, …), for every 16 of the sum; wgmma_commit(); …; wgmma_wait<0>(); hold(d); then d may be read
//
// Thread t of the 128 has of d, by column groups of 8 (i = 4 · group + …):
//     d[4g] = d(r, 8g + c)   d[4g + 1] = d(r, 8g + c + 1)   d[4g + 2] = d(r + 8, 8g + c)   d[4g + 3] = d(r + 8, 8g + c + 1)
//     with r = 16 (t / 32) + t % 32 / 4 and c = 2 (t % 4)
// and of an a in registers a[0..4] as `mma_bf16` takes it, for its warp's 16 rows.
#pragma once
#include "hopper.cuh"

#ifndef __CUDACC_RTC__
DEVICE uint32_t shared_address(const void* pointer) {
    return emulation::SHARED_START + emulation::shared_offset("shared_address", pointer, 1);
}
#endif

// How wgmma finds a matrix in shared memory: its beginning, two strides, the swizzle of 128 bytes.
DEVICE uint64_t matrix_descriptor(const void* matrix, uint32_t leading, uint32_t stride) {
    return uint64_t((shared_address(matrix) & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
           uint64_t(1) << 62;
}

// a [64, 16] or bᵀ [N, 16]: the sum runs along the rows of 128 bytes. 16 further along the sum: `advanced` by 32 bytes.
DEVICE uint64_t descriptor_along(const void* matrix) { return matrix_descriptor(matrix, 16, 1024); }

// aᵀ [16, 64] or b [16, N]: the sum runs across the rows, of which each has 64 columns; the next 64 columns are a matrix of their
// own, `panel` bytes further. 16 further along the sum: `advanced` by 2048 bytes.
DEVICE uint64_t descriptor_across(const void* matrix, uint32_t panel) { return matrix_descriptor(matrix, panel, 1024); }

DEVICE uint64_t advanced(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

// Before the first product and after registers that products use were touched: after every wait.
DEVICE void wgmma_fence() {
#ifdef __CUDACC_RTC__
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
    emulation::wgmma_fence();
#endif
}

// The products since the last commit are a group.
DEVICE void wgmma_commit() {
#ifdef __CUDACC_RTC__
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
    emulation::wgmma_commit();
#endif
}

// Waits until at most PENDING groups are under way: before their operands are overwritten, or their sums read.
template <int PENDING>
DEVICE void wgmma_wait() {
#ifdef __CUDACC_RTC__
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory");
#else
    emulation::wgmma_wait(PENDING);
#endif
}

// Keeps the compiler from moving reads and writes of sums across this line: after the wait that precedes their use.
template <int COUNT>
DEVICE void hold(float (&d)[COUNT]) {
#ifdef __CUDACC_RTC__
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i]) :: "memory");
#endif
}

#ifdef __CUDACC_RTC__
#define SUMS_8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
    "+f"(d[i + 6]), "+f"(d[i + 7])
#define SUMS_16(d, i) SUMS_8(d, i), SUMS_8(d, i + 8)
#define SUMS_24(d, i) SUMS_16(d, i), SUMS_8(d, i + 16)
#define SUMS_32(d, i) SUMS_8(d, i), SUMS_8(d, i + 8), SUMS_8(d, i + 16), SUMS_8(d, i + 24)
#define SUMS_64(d, i) SUMS_32(d, i), SUMS_32(d, i + 32)
#define SUMS_128(d, i) SUMS_64(d, i), SUMS_64(d, i + 64)
#define NUMBERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NUMBERS_16 NUMBERS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NUMBERS_24 NUMBERS_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define NUMBERS_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NUMBERS_64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, " \
    "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, " \
    "%62, %63"
#define NUMBERS_128 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, " \
    "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, " \
    "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
    "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, " \
    "%101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, " \
    "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// N, its accumulators, and the numbers of the operands after them.
#define WGMMA_SHARED(N, COUNT, A, B, SCALE, TRANSPOSED_A, TRANSPOSED_B) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #SCALE ", 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NUMBERS_##COUNT "}, %" #A ", %" #B \
                 ", p, 1, 1, %" #TRANSPOSED_A ", %" #TRANSPOSED_B ";\n}" \
                 : SUMS_##COUNT(d, 0) \
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(TRANSPOSED_LEFT)), "n"(int(TRANSPOSED_RIGHT)))
#define WGMMA_REGISTERS(N, COUNT, A0, A1, A2, A3, B, SCALE, TRANSPOSED_B) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #SCALE ", 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NUMBERS_##COUNT "}, {%" #A0 ", %" #A1 \
                 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, %" #TRANSPOSED_B ";\n}" \
                 : SUMS_##COUNT(d, 0) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(TRANSPOSED_RIGHT)))
#endif

// d (+)= a b, both in shared memory; TRANSPOSED_*: its descriptor is one `across`.
template <bool TRANSPOSED_LEFT, bool TRANSPOSED_RIGHT, int COUNT>
DEVICE void wgmma(float (&d)[COUNT], uint64_t a, uint64_t b, bool accumulate) {
    static_assert((COUNT % 8 == 0 && COUNT <= 32) || COUNT == 64 || COUNT == 128, "16, 32, 48, 64, 128 or 256 columns");
#ifdef __CUDACC_RTC__
    if constexpr (COUNT == 8) WGMMA_SHARED(16, 8, 8, 9, 10, 11, 12);
    if constexpr (COUNT == 16) WGMMA_SHARED(32, 16, 16, 17, 18, 19, 20);
    if constexpr (COUNT == 24) WGMMA_SHARED(48, 24, 24, 25, 26, 27, 28);
    if constexpr (COUNT == 32) WGMMA_SHARED(64, 32, 32, 33, 34, 35, 36);
    if constexpr (COUNT == 64) WGMMA_SHARED(128, 64, 64, 65, 66, 67, 68);
    if constexpr (COUNT == 128) WGMMA_SHARED(256, 128, 128, 129, 130, 131, 132);
#else
    emulation::wgmma(d, 2 * COUNT, nullptr, a, b, TRANSPOSED_LEFT, TRANSPOSED_RIGHT, accumulate);
#endif
}

// d (+)= a b, a in registers.
template <bool TRANSPOSED_RIGHT, int COUNT>
DEVICE void wgmma(float (&d)[COUNT], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    static_assert(COUNT == 32 || COUNT == 64 || COUNT == 128, "64, 128 or 256 columns");
#ifdef __CUDACC_RTC__
    if constexpr (COUNT == 32) WGMMA_REGISTERS(64, 32, 32, 33, 34, 35, 36, 37, 38);
    if constexpr (COUNT == 64) WGMMA_REGISTERS(128, 64, 64, 65, 66, 67, 68, 69, 70);
    if constexpr (COUNT == 128) WGMMA_REGISTERS(256, 128, 128, 129, 130, 131, 132, 133, 134);
#else
    emulation::wgmma(d, 2 * COUNT, a, 0, b, false, TRANSPOSED_RIGHT, accumulate);
#endif
}
