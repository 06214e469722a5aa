// What only Hopper has (sm_90a), wrapped as device.cuh wraps the rest: barriers in shared memory, the copy engine, products of a
// warpgroup, clusters. Two bodies each; emulation/hopper.h says what the second makes of mistakes.
//
// The names are those of PTX (Parallel Thread Execution ISA 8.0 and newer), shortened:
//
//   barrier_*    mbarrier.*: an object of 8 bytes that counts arrivals and the bytes of copies, phase by phase
//   tma_*        cp.async.bulk.tensor.*: boxes of a matrix, by one thread, at the copy engine's leisure
//   bulk_*       cp.async.bulk.*, cp.reduce.async.bulk.*: the same of neighbouring numbers, from shared memory
//   wgmma*       wgmma.*: products of 128 threads, operands in shared memory, sums in registers
//
// A matrix in shared memory is made of rows of 128 bytes (64 bf16) in the swizzle that engine and tensor cores share: the 16
// bytes at chunk c of row r lie at chunk c ^ (r % 8). `swizzled<8>` of tile.cuh is the same. It begins at a multiple of 1024.
#pragma once
#include "device.cuh"

#ifdef __CUDACC_RTC__

// `HOPPER_KERNEL(threads, cluster) name(parameters) { … }`: a kernel whose blocks run in clusters along x, one of them to a
// multiprocessor, so that registers can be handed from one warpgroup to another.
#define HOPPER_KERNEL(threads, cluster) \
    extern "C" __global__ void __launch_bounds__(threads, 1) __cluster_dims__(cluster, 1, 1)
// A parameter that is a tensor map.
#define TENSOR_MAP const __grid_constant__ TensorMap

// A matrix in global memory and the box that is copied of it, as tensor_map.rs encodes them.
struct __align__(64) TensorMap {
    uint64_t opaque[16];
};

#else

#include "hopper.h"
#define HOPPER_KERNEL(threads, cluster) extern "C" void
#define TENSOR_MAP const TensorMap

#endif

constexpr int WARPGROUP_THREADS = 128;

// The calling thread's warpgroup; known to the compiler to be the same for the whole warp.
DEVICE int warpgroup_index() { return __shfl_sync(ALL_LANES, int(threadIdx.x) / WARPGROUP_THREADS, 0); }

// ---- clusters ----

DEVICE uint32_t cluster_rank() {
#ifdef __CUDACC_RTC__
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#else
    return emulation::self().block->rank;
#endif
}

// All threads of all blocks of the cluster, those of a warp not necessarily together; what was written before the arrival is seen after
// the wait.
DEVICE void cluster_arrive() {
#ifdef __CUDACC_RTC__
    asm volatile("barrier.cluster.arrive;" ::: "memory");
#else
    emulation::cluster_arrive();
#endif
}

DEVICE void cluster_wait() {
#ifdef __CUDACC_RTC__
    asm volatile("barrier.cluster.wait;" ::: "memory");
#else
    emulation::cluster_wait();
#endif
}

DEVICE void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}

// ---- registers; all threads of a warpgroup ----

// Gives back what a thread has beyond COUNT registers.
template <int COUNT>
DEVICE void fewer_registers() {
    static_assert(COUNT >= 24 && COUNT <= 256 && COUNT % 8 == 0, "what the instruction allows");
#ifdef __CUDACC_RTC__
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(COUNT));
#else
    emulation::set_max_registers(COUNT, false);
#endif
}

// Takes registers that others gave back, when they have.
template <int COUNT>
DEVICE void more_registers() {
    static_assert(COUNT >= 24 && COUNT <= 256 && COUNT % 8 == 0, "what the instruction allows");
#ifdef __CUDACC_RTC__
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(COUNT));
#else
    emulation::set_max_registers(COUNT, true);
#endif
}

// ---- barriers ----

// In shared memory. Phase p, from 0, is complete when `count` threads have arrived and all bytes that they announced have
// landed; then phase p + 1 begins.
typedef uint64_t Barrier;

DEVICE void barrier_init(Barrier* barrier, uint32_t count) {
#ifdef __CUDACC_RTC__
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(barrier)), "r"(count) : "memory");
#else
    emulation::barrier_init(barrier, count);
#endif
}

// After the initialisation, by the thread that did it and before a barrier of the cluster: for the copy engine and others.
DEVICE void fence_barrier_init() {
#ifdef __CUDACC_RTC__
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
    emulation::fence_barrier_init();
#endif
}

DEVICE void barrier_arrive(Barrier* barrier) {
#ifdef __CUDACC_RTC__
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(barrier)) : "memory");
#else
    emulation::arrive("barrier_arrive", barrier, 0);
#endif
}

// Arrives, with `bytes` more to land before the phase is complete.
DEVICE void barrier_arrive_expecting(Barrier* barrier, uint32_t bytes) {
#ifdef __CUDACC_RTC__
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
#else
    emulation::arrive("barrier_arrive_expecting", barrier, int(bytes));
#endif
}

// Arrives at the barrier that lies at the same place in block `rank` of the cluster. Orders what the calling thread's block
// sees, not the whole GPU: enough where others are only told that something has been read.
DEVICE void barrier_arrive_at(Barrier* barrier, uint32_t rank) {
#ifdef __CUDACC_RTC__
    asm volatile("{\n"
                 ".reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
                 "}" :: "r"(shared_address(barrier)), "r"(rank)
                 : "memory");
#else
    emulation::barrier_arrive_at(barrier, rank);
#endif
}

// Waits until the phase of this parity is complete: that of phase p is p % 2, and parity 1 is complete at the beginning.
DEVICE void barrier_wait(Barrier* barrier, uint32_t parity) {
#ifdef __CUDACC_RTC__
    uint32_t done;
    do {
        asm volatile("{\n"
                     ".reg .pred done;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, done;\n"
                     "}" : "=r"(done)
                     : "r"(shared_address(barrier)), "r"(parity)
                     : "memory");
    } while (!done);
#else
    emulation::barrier_wait(barrier, parity);
#endif
}

// A stage of a ring of so many, each with a barrier, and the parity of its round.
template <int COUNT>
struct TurnOf {
    int stage;
    uint32_t parity;

    DEVICE void next() {
        if (++stage == COUNT) stage = 0, parity ^= 1;
    }
};

// Of `threads` threads of the block, whole warps; `id` 1 to 15.
DEVICE void named_barrier_sync(int id, int threads) {
#ifdef __CUDACC_RTC__
    asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
#else
    emulation::named_barrier("named_barrier_sync", id, threads, true);
#endif
}

// Counts for the same barrier without waiting at it.
DEVICE void named_barrier_arrive(int id, int threads) {
#ifdef __CUDACC_RTC__
    asm volatile("bar.arrive %0, %1;" :: "r"(id), "r"(threads) : "memory");
#else
    emulation::named_barrier("named_barrier_arrive", id, threads, false);
#endif
}

// ---- words in global memory, by which blocks wait for each other ----

// Waits until a word has this value; what was written before it was released is then seen. Who is to release it must have begun.
DEVICE void acquire_when(const int* word, int value) {
#ifdef __CUDACC_RTC__
    int now;
    do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(word) : "memory");
    } while (now != value);
#else
    emulation::acquire_when(word, value);
#endif
}

DEVICE void store_release(int* word, int value) {
#ifdef __CUDACC_RTC__
    asm volatile("st.release.gpu.global.s32 [%0], %1;" :: "l"(word), "r"(value) : "memory");
#else
    emulation::store_release(word, value);
#endif
}

// ---- the copy engine; each call by one thread ----

// Fetches what a tensor map says, ahead of its first use.
DEVICE void tma_prefetch(const TensorMap& map) {
#ifdef __CUDACC_RTC__
    asm volatile("prefetch.tensormap [%0];" :: "l"(&map) : "memory");
#endif
}

// Starts copying the box at `column`, `row` to shared memory, zeros where the matrix has ended. All of the box's bytes count
// at the barrier.
DEVICE void tma_load(void* shared, const TensorMap& map, Barrier* barrier, int column, int row) {
#ifdef __CUDACC_RTC__
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
                 :: "r"(shared_address(shared)), "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row)
                 : "memory");
#else
    emulation::tma_load(shared, map, barrier, column, row, 1u << cluster_rank());
#endif
}

// The same of a map of heads: the box at `column` of head `head` of row `row` and on.
DEVICE void tma_load(void* shared, const TensorMap& map, Barrier* barrier, int column, int head, int row) {
#ifdef __CUDACC_RTC__
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
                 :: "r"(shared_address(shared)), "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(head), "r"(row)
                 : "memory");
#else
    emulation::tma_load_heads(shared, map, barrier, column, head, row);
#endif
}

// The same as the first for all blocks of the cluster whose bits are in `ranks`, at the same place in each and at its barrier there.
DEVICE void tma_load_multicast(void* shared, const TensorMap& map, Barrier* barrier, int column, int row, uint32_t ranks) {
#ifdef __CUDACC_RTC__
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%3, %4}], [%2], %5;"
                 :: "r"(shared_address(shared)), "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row),
                    "h"(uint16_t(ranks))
                 : "memory");
#else
    emulation::tma_load(shared, map, barrier, column, row, ranks);
#endif
}

// Starts copying a box from shared memory to the matrix; what lies outside it is left out.
DEVICE void tma_store(const TensorMap& map, const void* shared, int column, int row) {
#ifdef __CUDACC_RTC__
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];"
                 :: "l"(&map), "r"(shared_address(shared)), "r"(column), "r"(row)
                 : "memory");
#else
    emulation::tma_store(map, shared, column, row);
#endif
}

// The stores that this thread started since its last commit are a group.
DEVICE void tma_store_commit() {
#ifdef __CUDACC_RTC__
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#else
    emulation::tma_store_commit();
#endif
}

// Waits until at most PENDING of this thread's groups still have to be read from shared memory. With 0 it must be done before
// the thread ends.
template <int PENDING>
DEVICE void tma_store_wait() {
#ifdef __CUDACC_RTC__
    asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(PENDING) : "memory");
#else
    emulation::tma_store_wait(PENDING);
#endif
}

// Starts copying `bytes` from shared memory to global memory, all three multiples of 16; committed and waited for as boxes are.
DEVICE void bulk_store(float* to, const void* shared, uint32_t bytes) {
#ifdef __CUDACC_RTC__
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
                 :: "l"(to), "r"(shared_address(shared)), "r"(bytes)
                 : "memory");
#else
    emulation::bulk_start("bulk_store", to, shared, bytes, false);
#endif
}

// Likewise adds, each number rounded to nearest.
DEVICE void bulk_add(float* to, const void* shared, uint32_t bytes) {
#ifdef __CUDACC_RTC__
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
                 :: "l"(to), "r"(shared_address(shared)), "r"(bytes)
                 : "memory");
#else
    emulation::bulk_start("bulk_add", to, shared, bytes, true);
#endif
}

// Waits until at most PENDING of this thread's groups still have to be written, and it sees what they wrote.
template <int PENDING>
DEVICE void bulk_wait() {
#ifdef __CUDACC_RTC__
    asm volatile("cp.async.bulk.wait_group %0;" :: "n"(PENDING) : "memory");
#else
    emulation::bulk_wait(PENDING);
#endif
}

// Before the copy engine reads or writes global memory that others wrote, as this thread knows by `acquire_when`.
DEVICE void fence_async_global() {
#ifdef __CUDACC_RTC__
    asm volatile("fence.proxy.async.global;" ::: "memory");
#else
    emulation::fence_async_global();
#endif
}

// Before the copy engine or tensor cores read, or a copy overwrites, what this thread wrote by plain stores at `from`: by every
// thread that wrote, then a barrier. (On a GPU all of shared memory is fenced; the emulation believes only this.)
DEVICE void fence_async(const void* from, int bytes) {
#ifdef __CUDACC_RTC__
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
    emulation::fence_async(from, bytes);
#endif
}

// Four 8×8 matrices to shared memory, the way back of ldmatrix_x4.
DEVICE void stmatrix_x4(void* row, const uint32_t (&r)[4]) {
#ifdef __CUDACC_RTC__
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(shared_address(row)), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
#else
    emulation::stmatrix<false>(row, r);
#endif
}

DEVICE void stmatrix_x4_transposed(void* row, const uint32_t (&r)[4]) {
#ifdef __CUDACC_RTC__
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(shared_address(row)), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
#else
    emulation::stmatrix<true>(row, r);
#endif
}

// ---- products of a warpgroup; all of its threads ----
//
//     d [64, N] (+)= a [64, 16] · b [16, N]        f32 += bf16 · bf16
//
// Thread t of the 128 has of d, by column groups of 8 (i = 4 · group + …):
//     d[4g] = d(r, 8g + c)   d[4g + 1] = d(r, 8g + c + 1)   d[4g + 2] = d(r + 8, 8g + c)   d[4g + 3] = d(r + 8, 8g + c + 1)
//     with r = 16 (t / 32) + t % 32 / 4 and c = 2 (t % 4)
// and of an a in registers a[0..4] as `mma_bf16` takes it, for its warp's 16 rows.

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
