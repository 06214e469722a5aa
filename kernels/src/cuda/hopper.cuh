// What only Hopper has (sm_90a), wrapped as device.cuh wraps the rest: clusters, barriers in shared memory, the copy engine. Two
// bodies each; emulation/hopper.h says what the second makes of mistakes. Products of a warpgroup are in hopper_products.cuh.
//
// The names are those of PTX (Parallel Thread Execution ISA 8.0 and newer), shortened:
//
//   barrier_*    mbarrier.*: an object of 8 bytes that counts arrivals and the bytes of copies, phase by phase
//   tma_*        cp.async.bulk.tensor.*: boxes of a matrix, by one thread, at the copy engine's leisure
//   bulk_*       cp.async.bulk.*, cp.reduce.async.bulk.*: the same of neighbouring numbers, from shared memory
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
