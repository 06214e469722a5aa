// The memory of those who work at blocks, its guards, and the launch of a kernel.
#pragma once
#include "fibers.h"
#include <signal.h>
#include <sys/mman.h>

namespace emulation {

struct Worker {
    Worker* next;
    uint32_t busy;
    unsigned char* stacks;
    // Stacks whose lowest page is closed.
    uint32_t guarded_stacks;
    // Of each block of a cluster, between two guards; what is open depends on the launch.
    unsigned char* shared[MOST_CLUSTER];
    size_t shared_open[MOST_CLUSTER];
    Cluster cluster;
    unsigned char signal_stack[64 << 10];
};

// What the launches of this library named.
inline Worker** workers = nullptr;

inline unsigned char* map(size_t bytes, int access) {
    void* memory = mmap(nullptr, bytes, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        perror("emulated device: mmap");
        abort();
    }
    return (unsigned char*)memory;
}

inline Worker* take_worker() {
    for (Worker* w = __atomic_load_n(workers, __ATOMIC_ACQUIRE); w; w = w->next)
        if (!__atomic_exchange_n(&w->busy, 1, __ATOMIC_ACQUIRE)) return w;
    Worker* w = (Worker*)map((sizeof(Worker) + PAGE - 1) / PAGE * PAGE, PROT_READ | PROT_WRITE);
    w->busy = 1;
    unsigned char* stacks = map((MOST_THREADS + 1) * STACK, PROT_READ | PROT_WRITE);
    w->stacks = (unsigned char*)(((uintptr_t)stacks + STACK - 1) / STACK * STACK);
    for (unsigned i = 0; i < MOST_CLUSTER; i++)
        w->shared[i] = map(MOST_SHARED + 2 * SHARED_GUARD, PROT_NONE) + SHARED_GUARD;
    w->next = __atomic_load_n(workers, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(workers, &w->next, w, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED)) {}
    return w;
}

inline void protect(unsigned char* from, size_t bytes, int access) {
    if (mprotect(from, bytes, access) == 0) return;
    perror("emulated device: mprotect");
    abort();
}

// Closes the lowest page of every stack that is used, and no more: the system limits how many pieces a process's memory is
// in, and every compiled source has workers of its own.
inline void guard_stacks(Worker& w, uint32_t threads) {
    for (; w.guarded_stacks < threads; w.guarded_stacks++) protect(w.stacks + w.guarded_stacks * STACK, PAGE, PROT_NONE);
}

// Shared memory ends, rounded up to 1024 bytes, where the page that cannot be accessed begins.
inline unsigned char* open_shared(Worker& w, unsigned rank, size_t bytes) {
    unsigned char* end = w.shared[rank] + MOST_SHARED;
    size_t open = (bytes + PAGE - 1) / PAGE * PAGE;
    if (open != w.shared_open[rank]) {
        protect(w.shared[rank], MOST_SHARED, PROT_NONE);
        protect(end - open, open, PROT_READ | PROT_WRITE);
        w.shared_open[rank] = open;
    }
    memset(end - open, POISON, open);
    return end - (bytes + 1023) / 1024 * 1024;
}

inline void check_around_shared(Worker& w, Block& block) {
    size_t bytes = block.launch->shared_bytes;
    unsigned char* end = w.shared[block.rank] + MOST_SHARED;
    for (unsigned char* at = end - w.shared_open[block.rank]; at < block.shared; at++)
        if (*at != POISON)
            return record(block, nullptr, "wrote %zu bytes before its shared memory", size_t(block.shared - at));
    for (unsigned char* at = block.shared + bytes; at < end; at++)
        if (*at != POISON)
            return record(block, nullptr, "wrote %zu bytes past the end of its %zu bytes of shared memory",
                          size_t(at - block.shared - bytes), bytes);
}

inline struct sigaction previous[3];
constexpr int SIGNALS[3] = {SIGSEGV, SIGBUS, SIGFPE};

// The worker on whose stacks a fault happened, if it was on any.
inline Worker* worker_at(uintptr_t stack_pointer) {
    for (Worker* w = __atomic_load_n(workers, __ATOMIC_ACQUIRE); w; w = w->next)
        if (stack_pointer - (uintptr_t)w->stacks < MOST_THREADS * STACK) return w;
    return nullptr;
}

inline void on_fault(int signal, siginfo_t* info, void* context) {
    greg_t* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
    Worker* w = worker_at(registers[REG_RSP]);
    if (!w) { // not a kernel's: whoever was asked before is
        for (int i = 0; i < 3; i++)
            if (SIGNALS[i] == signal) sigaction(signal, &previous[i], nullptr);
        return;
    }
    Fiber* at = fiber_at(registers[REG_RSP]);
    Block& block = *at->block;
    Launch& launch = *block.launch;
    uintptr_t address = (uintptr_t)info->si_addr;
    const char* access = registers[REG_ERR] & 2 ? "write" : "read";
    if (signal == SIGFPE) {
        record(block, at, "integer division by zero, which a GPU does not define");
    } else if (address - (uintptr_t)w->stacks < MOST_THREADS * STACK) {
        record(block, at, "stack overflow: more than %zu KiB of local variables", (STACK - PAGE) >> 10);
    } else if (address - (uintptr_t)w->shared[block.rank] + SHARED_GUARD < MOST_SHARED + 2 * SHARED_GUARD) {
        record(block, at, "%s outside shared memory, at byte %lld of %llu", access,
               (long long)((const char*)address - (const char*)block.shared),
               (unsigned long long)launch.shared_bytes);
    } else {
        launch.fault_address = address;
        record(block, at, "%s outside global memory, at address %#llx", access, (unsigned long long)address);
    }
    // Not back into the kernel, but to where the block was started.
    registers[REG_RSP] = (greg_t)block.cluster->outside;
    registers[REG_RIP] = (greg_t)emulation_resume;
}

inline void catch_faults() {
    static const bool done = [] {
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int i = 0; i < 3; i++) sigaction(SIGNALS[i], &action, &previous[i]);
        return true;
    }();
    (void)done;
}

inline void run(Launch& launch) {
    __atomic_store_n(&workers, launch.workers, __ATOMIC_RELEASE);
    catch_faults();
    Worker& w = *take_worker();
    stack_t before, own = {};
    own.ss_sp = w.signal_stack;
    own.ss_size = sizeof w.signal_stack;
    sigaltstack(&own, &before);
    Cluster& cluster = w.cluster;
    cluster.size = launch.entry->cluster;
    cluster.stacks = w.stacks;
    guard_stacks(w, cluster.size * launch.threads);
    for (unsigned rank = 0; rank < cluster.size; rank++) {
        Block& block = cluster.blocks[rank];
        block.launch = &launch;
        block.cluster = &cluster;
        block.rank = rank;
        block.first = rank * launch.threads;
        block.shared = open_shared(w, rank, launch.shared_bytes);
        block.grid = {launch.grid[0], launch.grid[1], launch.grid[2]};
    }
    // A cluster is made of neighbours along x.
    __atomic_fetch_add(&launch.working, 1, __ATOMIC_SEQ_CST);
    uint64_t across = launch.grid[0] / cluster.size, clusters = across * launch.grid[1] * launch.grid[2], i;
    while ((i = __atomic_fetch_add(&launch.next_cluster, 1, __ATOMIC_RELAXED)) < clusters) {
        if (__atomic_load_n(&launch.failed, __ATOMIC_ACQUIRE)) break;
        if (launch.seed % 2) i = clusters - 1 - i;
        for (unsigned rank = 0; rank < cluster.size; rank++)
            cluster.blocks[rank].index = {unsigned(i % across * cluster.size + rank), unsigned(i / across % launch.grid[1]),
                                          unsigned(i / across / launch.grid[1])};
        cluster.random = mix(launch.seed + 0x9e3779b97f4a7c15u * (i + 1));
        cluster.held_back = unsigned(launch.seed >> 32);
        cluster.order = launch.seed ? Order(draw(cluster) % 3) : Order::IN_TURN;
        run_cluster(cluster);
        for (unsigned rank = 0; rank < cluster.size; rank++) check_around_shared(w, cluster.blocks[rank]);
    }
    __atomic_fetch_sub(&launch.working, 1, __ATOMIC_SEQ_CST);
    sigaltstack(&before, nullptr);
    __atomic_store_n(&w.busy, 0, __ATOMIC_RELEASE);
}

} // namespace emulation
