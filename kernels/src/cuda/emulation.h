// Executes a kernel's source as C++17 on the processor: device.cuh includes this where it is not NVRTC that compiles.
//
// Every CUDA thread is a fiber: a stack of its own, left and entered by a switch of a dozen instructions. A fiber runs
// until it must wait for others: at __syncthreads until every live thread of the block is there, at a warp's
// collective (__shfl_sync, ldmatrix, mma) until every live lane of its mask is. Then another one that can
// go on is drawn. The blocks of a cluster run together, their threads drawn as those of one block. The seed decides who,
// so that a missing barrier shows as a wrong number under some seed:
//   seed 0         in turn, beginning with thread 0
//   any other      each cluster draws one of: in turn, whoever became ready last, anyone; they run backwards if odd; all but
//                  one of its blocks may begin only when nothing else can happen
//
// What a GPU leaves undefined is made to show:
//   * shared memory is filled with 0xFF, NaN in bf16 and in f32, when a block starts, and lies between addresses that
//     cannot be accessed; where it does not fill its pages, what is left over is checked for writes when the block ends
//   * the target of an asynchronous copy is 0xFF from its start until the wait that promises it
//   * a lane that reads from a lane outside the mask gets 0xFF
//   * a collective that some lanes do not reach, misaligned wide accesses, division by zero, a full stack: errors
// An error ends the launch with a message that names kernel, block and thread; nobody's process dies of it.
//
// What only Hopper has is in emulation_hopper.h.
//
// Not emulated: bank conflicts, memory fences, the order in which tensor cores add.
#pragma once

#if !defined(__x86_64__) || !defined(__linux__)
#error "the emulated device needs Linux on x86-64"
#endif

#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <type_traits>
#include <ucontext.h>
#include <utility>

#define __align__(n) __attribute__((aligned(n)))

struct uint3 { unsigned x, y, z; };
struct int2 { int x, y; };
struct __align__(16) int4 { int x, y, z, w; };
struct __align__(8) uint2 { unsigned x, y; };
struct __align__(16) uint4 { unsigned x, y, z, w; };
struct __align__(8) float2 { float x, y; };
struct __align__(16) float4 { float x, y, z, w; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulation {

constexpr size_t PAGE = 4096;
// One thread's stack; its lowest page cannot be accessed, at its top lies its Fiber.
constexpr size_t STACK = 64 << 10;
// Of a block, and of a cluster.
constexpr unsigned MOST_THREADS = 1024;
constexpr unsigned MOST_CLUSTER = 4;
// More than any GPU has; what a launch may ask for is limited by whoever launches.
constexpr size_t MOST_SHARED = 256 << 10;
constexpr size_t SHARED_GUARD = 1 << 20;
constexpr int POISON = 0xff;

// ---- what whoever launches sees ----

struct Parameter {
    uint8_t size, is_pointer, is_writable, type;
};

// One kernel of this library.
struct Entry {
    const char* name;
    uint32_t threads;
    // Blocks of a cluster.
    uint32_t cluster;
    uint32_t parameter_count;
    const Parameter* parameters;
    void (*call)(void** arguments);
};

struct Worker;

// One launch; as many OS threads as like work at it, each through `emulation_run`.
struct Launch {
    const Entry* entry;
    void** arguments;
    uint32_t grid[3];
    uint32_t threads;
    uint64_t shared_bytes;
    uint64_t seed;
    uint64_t next_cluster;
    // Those of the whole process, first null: every library has a copy of this file, and a worker is two thousand
    // mappings, of which a process may have some ten thousands.
    Worker** workers;
    uint32_t failed;
    // Where an access to global memory failed, or 0.
    uint64_t fault_address;
    char message[1024];
};

// ---- fibers ----

struct Block;
// What a thread and a cluster have under way on Hopper: emulation_hopper.h.
struct ThreadEngine;
struct ClusterEngine;

struct Copy {
    void* to;
    const void* from;
    unsigned group;
    bool valid;
};

typedef void (*Operation)(void** arguments);

struct Fiber {
    void* stack_pointer;
    Block* block;
    uint3 thread;
    // In its block.
    unsigned number;
    bool done;
    // What it waits for: a barrier, or a collective of `lanes`, each of which brings an argument.
    const char* waits_at;
    Operation operation;
    uint32_t lanes;
    void* argument;
    // Asynchronous copies: the group that is open, and those that have not landed.
    unsigned group, copies, copies_capacity;
    Copy* copy;
    // Null where a kernel has nothing of it, and kept from block to block.
    ThreadEngine* engine;
};

constexpr size_t FIBER_SIZE = (sizeof(Fiber) + 63) / 64 * 64;

struct Warp {
    uint32_t live, arrived;
};

enum class Order { IN_TURN, LAST_FIRST, ANY };

struct Cluster;

struct Block {
    Launch* launch;
    Cluster* cluster;
    // Its place in the cluster, and that of its first thread.
    unsigned rank, first;
    uint3 index, dim, grid;
    unsigned live, at_barrier;
    Warp warps[MOST_THREADS / 32];
    unsigned char* shared;
};

// Blocks that run together.
struct Cluster {
    Block blocks[MOST_CLUSTER];
    unsigned size, live;
    // Blocks that have not begun, a bit each.
    unsigned late;
    // Fibers that can go on, numbered throughout the cluster: a ring.
    unsigned short ready[MOST_THREADS];
    unsigned ready_first, ready_count;
    Order order;
    uint64_t random;
    void* outside;
    unsigned char* stacks;
    // What goes on besides the threads; `progress` is asked before each is drawn, and whether anything can become of it if
    // there is none.
    ClusterEngine* engine;
    bool (*progress)(Cluster&, bool must);
    void (*finish)(Cluster&);
};

inline Fiber* fiber_at(uintptr_t address) { return (Fiber*)((address | (STACK - 1)) + 1 - FIBER_SIZE); }
inline __attribute__((always_inline)) Fiber& self() { return *fiber_at((uintptr_t)__builtin_frame_address(0)); }
inline Fiber& fiber(Cluster& cluster, unsigned number) { return *fiber_at((uintptr_t)cluster.stacks + number * STACK); }
inline Fiber& fiber(Block& block, unsigned number) { return fiber(*block.cluster, block.first + number); }

// Puts the callee's registers on the stack, leaves its pointer in *save, and goes on where `load` was saved. A
// fault handler goes on at emulation_resume with the stack pointer it chose.
extern "C" __attribute__((visibility("hidden"))) void emulation_switch(void** save, void* load);
extern "C" __attribute__((visibility("hidden"))) void emulation_resume();
asm(R"(
.text
.p2align 4
.globl emulation_switch
.hidden emulation_switch
.globl emulation_resume
.hidden emulation_resume
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
emulation_resume:
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

inline uint64_t mix(uint64_t x) { // splitmix64's finaliser
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

inline uint64_t draw(Cluster& cluster) { return mix(cluster.random += 0x9e3779b97f4a7c15u); }

// ---- errors ----

// The first error of a launch is kept.
inline void record(Block& block, const Fiber* at, const char* format, va_list values) {
    Launch& launch = *block.launch;
    if (__atomic_exchange_n(&launch.failed, 1, __ATOMIC_ACQ_REL)) return;
    int used = snprintf(launch.message, sizeof launch.message, "kernel %s, block (%u, %u, %u)", launch.entry->name,
                        block.index.x, block.index.y, block.index.z);
    if (at) used += snprintf(launch.message + used, sizeof launch.message - used, ", thread %u", at->number);
    used += snprintf(launch.message + used, sizeof launch.message - used, ": ");
    vsnprintf(launch.message + used, sizeof launch.message - used, format, values);
}

inline void record(Block& block, const Fiber* at, const char* format, ...) {
    va_list values;
    va_start(values, format);
    record(block, at, format, values);
    va_end(values);
}

// Ends the block with an error of the calling thread.
[[noreturn]] inline void fail(const char* format, ...) {
    Fiber& me = self();
    va_list values;
    va_start(values, format);
    record(*me.block, &me, format, values);
    va_end(values);
    emulation_switch(&me.stack_pointer, me.block->cluster->outside);
    abort();
}

// Nobody can go on: says who waits where.
inline void record_deadlock(Cluster& cluster) {
    char waiting[512];
    int used = 0;
    const char* seen[8];
    unsigned places = 0, threads = cluster.size * cluster.blocks[0].dim.x;
    for (unsigned i = 0; i < threads && places < 8; i++) {
        Fiber& first = fiber(cluster, i);
        bool known = first.done;
        for (unsigned p = 0; p < places; p++) known |= seen[p] == first.waits_at;
        if (known) continue;
        unsigned count = 0;
        for (unsigned j = i; j < threads; j++)
            count += !fiber(cluster, j).done && fiber(cluster, j).waits_at == first.waits_at;
        used += snprintf(waiting + used, sizeof waiting - used, "%s%u wait at %s (thread %u first)",
                         places ? ", " : "", count, first.waits_at, first.number);
        seen[places++] = first.waits_at;
    }
    record(cluster.blocks[0], nullptr, "deadlock: of %u threads %u have ended, %s", threads, threads - cluster.live, waiting);
}

// ---- who runs ----

inline void make_ready(Fiber& it) {
    Cluster& cluster = *it.block->cluster;
    cluster.ready[(cluster.ready_first + cluster.ready_count++) % MOST_THREADS] = it.block->first + it.number;
}

inline void begin(Block& block) {
    for (unsigned i = 0; i < block.dim.x; i++) make_ready(fiber(block, i));
}

inline Fiber* take_ready(Cluster& cluster) {
    if (cluster.progress) {
        cluster.progress(cluster, false);
        while (cluster.ready_count == 0 && cluster.progress(cluster, true)) {}
    }
    if (cluster.ready_count == 0 && cluster.late) {
        for (unsigned i = 0; i < cluster.size; i++)
            if (cluster.late >> i & 1) begin(cluster.blocks[i]);
        cluster.late = 0;
    }
    if (cluster.ready_count == 0) return nullptr;
    unsigned first = cluster.ready_first, last = (first + cluster.ready_count - 1) % MOST_THREADS;
    cluster.ready_count--;
    if (cluster.order == Order::IN_TURN) {
        cluster.ready_first = (first + 1) % MOST_THREADS;
        return &fiber(cluster, cluster.ready[first]);
    }
    if (cluster.order == Order::ANY) {
        unsigned any = (first + draw(cluster) % (cluster.ready_count + 1)) % MOST_THREADS;
        std::swap(cluster.ready[any], cluster.ready[last]);
    }
    return &fiber(cluster, cluster.ready[last]);
}

// Leaves the calling fiber; returns when somebody made it ready again.
inline void suspend(Fiber& me) {
    Cluster& cluster = *me.block->cluster;
    Fiber* next = take_ready(cluster);
    if (next == &me) return;
    if (!next) record_deadlock(cluster);
    emulation_switch(&me.stack_pointer, next ? next->stack_pointer : cluster.outside);
}

inline constexpr const char* BARRIER = "__syncthreads";

// Lets everybody go on if everybody who is still there has come.
inline bool open_barrier(Block& block) {
    if (block.live == 0 || block.at_barrier < block.live) return false;
    block.at_barrier = 0;
    for (unsigned i = 0; i < block.dim.x; i++) {
        Fiber& other = fiber(block, i);
        if (!other.done && other.waits_at == BARRIER) {
            other.waits_at = nullptr;
            make_ready(other);
        }
    }
    return true;
}

inline void barrier() {
    Fiber& me = self();
    me.waits_at = BARRIER;
    me.block->at_barrier++;
    open_barrier(*me.block); // which makes also the caller ready: who goes first is drawn
    suspend(me);
}

// Runs a collective if every live lane that `me` waits for has come.
inline bool complete(Fiber& me) {
    Block& block = *me.block;
    unsigned first = me.number / 32 * 32;
    Warp& warp = block.warps[me.number / 32];
    uint32_t lanes = me.lanes & warp.live;
    if ((warp.arrived & lanes) != lanes) return false;
    void* arguments[32];
    for (unsigned lane = 0; lane < 32; lane++) {
        arguments[lane] = nullptr;
        if (!(lanes >> lane & 1)) continue;
        Fiber& other = fiber(block, first + lane);
        if (other.operation != me.operation || other.lanes != me.lanes)
            fail("divergent collectives: thread %u is at %s for lanes %08x, thread %u at %s for lanes %08x", me.number,
                 me.waits_at, me.lanes, other.number, other.waits_at, other.lanes);
        arguments[lane] = other.argument;
    }
    me.operation(arguments);
    warp.arrived &= ~lanes;
    for (unsigned lane = 0; lane < 32; lane++) {
        if (!(lanes >> lane & 1)) continue;
        fiber(block, first + lane).waits_at = nullptr;
        make_ready(fiber(block, first + lane));
    }
    return true;
}

// Meets the other lanes of the mask; the last to come runs `operation` on the arguments of all, a null where a
// lane does not take part.
inline void collective(const char* name, uint32_t lanes, void* argument, Operation operation) {
    Fiber& me = self();
    uint32_t bit = 1u << me.number % 32;
    me.waits_at = name;
    if (!(lanes & bit)) fail("%s: the mask %08x leaves out the calling lane %u", name, lanes, me.number % 32);
    me.operation = operation;
    me.lanes = lanes;
    me.argument = argument;
    me.block->warps[me.number / 32].arrived |= bit;
    complete(me);
    suspend(me);
}

// A collective that the hardware defines for whole warps only.
inline void need_all(const char* name, void** arguments) {
    for (unsigned lane = 0; lane < 32; lane++)
        if (!arguments[lane]) fail("%s needs all 32 lanes of a warp, lane %u has ended", name, lane);
}

// ---- a cluster, from its first thread to its last ----

inline void fiber_main() {
    Fiber& me = self();
    Block& block = *me.block;
    block.launch->entry->call(block.launch->arguments);
    me.done = true;
    block.live--;
    block.cluster->live--;
    Warp& warp = block.warps[me.number / 32];
    warp.live &= ~(1u << me.number % 32);
    // Others may have waited for nobody else.
    for (unsigned lane = 0; lane < 32; lane++)
        if (warp.arrived >> lane & 1) complete(fiber(block, me.number / 32 * 32 + lane));
    open_barrier(block);
    if (block.cluster->live == 0) emulation_switch(&me.stack_pointer, block.cluster->outside);
    suspend(me);
    abort();
}

inline void start_block(Block& block) {
    Launch& launch = *block.launch;
    unsigned threads = launch.threads;
    block.dim = {threads, 1, 1};
    block.live = threads;
    block.at_barrier = 0;
    memset(block.warps, 0, sizeof block.warps);
    memset(block.shared, POISON, launch.shared_bytes);
    for (unsigned i = 0; i < threads; i++) {
        Fiber& it = fiber(block, i);
        it.block = &block;
        it.thread = {i, 0, 0};
        it.number = i;
        it.done = false;
        it.waits_at = nullptr;
        it.group = it.copies = 0;
        // As emulation_switch leaves a stack: six registers, then where to go on.
        uintptr_t* top = (uintptr_t*)&it;
        *--top = 0;
        *--top = (uintptr_t)fiber_main;
        it.stack_pointer = top - 6;
        block.warps[i / 32].live |= 1u << i % 32;
    }
}

inline void run_cluster(Cluster& cluster) {
    Launch& launch = *cluster.blocks[0].launch;
    unsigned threads = cluster.size * launch.threads;
    cluster.live = threads;
    cluster.ready_first = cluster.ready_count = 0;
    cluster.progress = nullptr;
    cluster.finish = nullptr;
    cluster.late = 0;
    if (launch.seed && cluster.size > 1 && draw(cluster) % 2)
        cluster.late = ((1u << cluster.size) - 1) & ~(1u << draw(cluster) % cluster.size);
    for (unsigned i = 0; i < cluster.size; i++) {
        start_block(cluster.blocks[i]);
        if (!(cluster.late >> i & 1)) begin(cluster.blocks[i]);
    }
    if (launch.seed)
        for (unsigned i = cluster.ready_count - 1; i > 0; i--)
            std::swap(cluster.ready[i], cluster.ready[draw(cluster) % (i + 1)]);
    emulation_switch(&cluster.outside, take_ready(cluster)->stack_pointer);
    if (cluster.finish) cluster.finish(cluster);
}

// ---- memory of those who work at blocks, and its guards ----

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
    uint64_t across = launch.grid[0] / cluster.size, clusters = across * launch.grid[1] * launch.grid[2], i;
    while ((i = __atomic_fetch_add(&launch.next_cluster, 1, __ATOMIC_RELAXED)) < clusters) {
        if (__atomic_load_n(&launch.failed, __ATOMIC_ACQUIRE)) break;
        if (launch.seed % 2) i = clusters - 1 - i;
        for (unsigned rank = 0; rank < cluster.size; rank++)
            cluster.blocks[rank].index = {unsigned(i % across * cluster.size + rank), unsigned(i / across % launch.grid[1]),
                                          unsigned(i / across / launch.grid[1])};
        cluster.random = mix(launch.seed + 0x9e3779b97f4a7c15u * (i + 1));
        cluster.order = launch.seed ? Order(draw(cluster) % 3) : Order::IN_TURN;
        run_cluster(cluster);
        for (unsigned rank = 0; rank < cluster.size; rank++) check_around_shared(w, cluster.blocks[rank]);
    }
    sigaltstack(&before, nullptr);
    __atomic_store_n(&w.busy, 0, __ATOMIC_RELEASE);
}

// ---- the table of kernels ----

// What Rust's `cuda::args` calls the types: 1 bf16, 2 f32, 3 i32, 4 u32, 5 i64, 6 u64, 7 u8, 8 f64, 9 a tensor map, 0
// anything else.
template <class T> constexpr uint8_t type_code() {
    if (std::is_class_v<T> && sizeof(T) == 128) return 9;
    if (std::is_same_v<T, float>) return 2;
    if (std::is_same_v<T, double>) return 8;
    if (!std::is_integral_v<T>) return sizeof(T) == 2 && std::is_class_v<T> ? 1 : 0;
    if (sizeof(T) == 8) return std::is_signed_v<T> ? 5 : 6;
    if (sizeof(T) == 4) return std::is_signed_v<T> ? 3 : 4;
    return sizeof(T) == 1 ? 7 : 0;
}

template <class T> constexpr Parameter parameter() {
    using Target = std::remove_pointer_t<T>;
    bool pointer = std::is_pointer_v<T>;
    return {sizeof(T), pointer, pointer && !std::is_const_v<Target>, type_code<std::remove_cv_t<Target>>()};
}

template <auto kernel> struct Emulated;
template <class... T, void (*kernel)(T...)> struct Emulated<kernel> {
    static constexpr Parameter parameters[sizeof...(T) + 1] = {parameter<T>()..., Parameter{}};
    template <size_t... I> static void apply(void** arguments, std::index_sequence<I...>) {
        kernel(*(std::remove_cv_t<T>*)arguments[I]...);
    }
    static void call(void** arguments) { apply(arguments, std::index_sequence_for<T...>()); }
    static constexpr Entry entry(const char* name, uint32_t threads, uint32_t cluster) {
        return {name, threads, cluster, sizeof...(T), parameters, call};
    }
};

// ---- what device.cuh's wrappers do here ----

inline unsigned char* shared_memory() { return self().block->shared; }

inline void check_aligned(const char* name, const void* address, unsigned alignment) {
    if ((uintptr_t)address % alignment)
        fail("%s: the address %#llx is not a multiple of %u", name, (unsigned long long)(uintptr_t)address, alignment);
}

inline void check_shared(const char* name, const void* address, unsigned bytes) {
    Block& block = *self().block;
    long long offset = (const unsigned char*)address - block.shared;
    if (offset < 0 || (unsigned long long)offset + bytes > block.launch->shared_bytes)
        fail("%s: byte %lld is outside the %llu bytes of shared memory", name, offset,
             (unsigned long long)block.launch->shared_bytes);
}

inline uint16_t round_to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline void copy_async(void* to, const void* from, bool valid) {
    check_aligned("copy_async16, shared", to, 16);
    check_shared("copy_async16", to, 16);
    Fiber& me = self();
    if (valid) {
        check_aligned("copy_async16, global", from, 16);
        // Here, so that a fault has the place where the copy was started.
        (void)*(const volatile uint64_t*)from;
        (void)*((const volatile uint64_t*)from + 1);
    }
    memset(to, POISON, 16);
    if (me.copies == me.copies_capacity) {
        me.copies_capacity = me.copies_capacity ? 2 * me.copies_capacity : 64;
        me.copy = (Copy*)realloc(me.copy, me.copies_capacity * sizeof(Copy));
    }
    me.copy[me.copies++] = {to, from, me.group, valid};
}

inline void copy_async_commit() { self().group++; }

inline void copy_async_wait(unsigned pending) {
    Fiber& me = self();
    unsigned left = 0;
    for (unsigned i = 0; i < me.copies; i++) {
        Copy copy = me.copy[i];
        if (copy.group + pending >= me.group) {
            me.copy[left++] = copy;
        } else if (copy.valid) {
            memcpy(copy.to, copy.from, 16);
        } else {
            memset(copy.to, 0, 16);
        }
    }
    me.copies = left;
}

struct Ldmatrix {
    uint32_t* r;
    const unsigned char* row;
};

template <unsigned COUNT, bool TRANSPOSED> void load_matrices(void** arguments) {
    need_all("ldmatrix", arguments);
    for (unsigned lane = 0; lane < 32; lane++) {
        for (unsigned m = 0; m < COUNT; m++) {
            auto row = [&](unsigned i) { return ((Ldmatrix*)arguments[m * 8 + i])->row; };
            unsigned char pair[4];
            if (TRANSPOSED) {
                memcpy(pair, row(lane % 4 * 2) + lane / 4 * 2, 2);
                memcpy(pair + 2, row(lane % 4 * 2 + 1) + lane / 4 * 2, 2);
            } else {
                memcpy(pair, row(lane / 4) + lane % 4 * 4, 4);
            }
            memcpy(&((Ldmatrix*)arguments[lane])->r[m], pair, 4);
        }
    }
}

template <unsigned COUNT, bool TRANSPOSED> void ldmatrix(uint32_t* r, const void* row) {
    if (self().number % 32 < COUNT * 8) {
        check_aligned("ldmatrix", row, 16);
        check_shared("ldmatrix", row, 16);
    }
    Ldmatrix mine{r, (const unsigned char*)row};
    collective("ldmatrix", 0xffffffffu, &mine, load_matrices<COUNT, TRANSPOSED>);
}

struct Mma {
    float* d;
    const uint32_t *a, *b;
};

__attribute__((optimize("O3"))) inline void multiply(void** arguments) {
    need_all("mma", arguments);
    float a[16][16], b[16][8], d[16][8];
    auto put = [](float* to, uint32_t pair) {
        uint32_t wide[2] = {pair << 16, pair & 0xffff0000u};
        memcpy(to, wide, 8);
    };
    for (unsigned lane = 0; lane < 32; lane++) {
        Mma& it = *(Mma*)arguments[lane];
        unsigned g = lane / 4, t = lane % 4 * 2;
        for (unsigned i = 0; i < 4; i++) put(&a[g + i % 2 * 8][t + i / 2 * 8], it.a[i]);
        for (unsigned i = 0; i < 2; i++) {
            float pair[2];
            put(pair, it.b[i]);
            b[t + i * 8][g] = pair[0];
            b[t + i * 8 + 1][g] = pair[1];
        }
        for (unsigned i = 0; i < 4; i++) d[g + i / 2 * 8][t + i % 2] = it.d[i];
    }
    for (unsigned i = 0; i < 16; i++)
        for (unsigned k = 0; k < 16; k++)
            for (unsigned j = 0; j < 8; j++) d[i][j] += a[i][k] * b[k][j];
    for (unsigned lane = 0; lane < 32; lane++) {
        Mma& it = *(Mma*)arguments[lane];
        unsigned g = lane / 4, t = lane % 4 * 2;
        for (unsigned i = 0; i < 4; i++) it.d[i] = d[g + i / 2 * 8][t + i % 2];
    }
}

inline void mma_bf16(float* d, const uint32_t* a, const uint32_t* b) {
    Mma mine{d, a, b};
    collective("mma_bf16", 0xffffffffu, &mine, multiply);
}

template <class T> struct Shuffle {
    T value;
    unsigned source;
    T result;
};

template <class T> void shuffle(void** arguments) {
    for (unsigned lane = 0; lane < 32; lane++) {
        Shuffle<T>* mine = (Shuffle<T>*)arguments[lane];
        if (!mine) continue;
        Shuffle<T>* source = (Shuffle<T>*)arguments[mine->source % 32];
        if (source) mine->result = source->value;
        else memset(&mine->result, POISON, sizeof(T));
    }
}

template <class T> T shuffle(const char* name, uint32_t lanes, T value, unsigned source) {
    Shuffle<T> mine{value, source, value};
    collective(name, lanes, &mine, shuffle<T>);
    return mine.result;
}

struct Vote {
    bool predicate;
    uint32_t result;
};

inline uint32_t vote(const char* name, uint32_t lanes, bool predicate) {
    Vote mine{predicate, 0};
    collective(name, lanes, &mine, [](void** arguments) {
        uint32_t ballot = 0;
        for (unsigned lane = 0; lane < 32; lane++)
            if (arguments[lane]) ballot |= uint32_t(((Vote*)arguments[lane])->predicate) << lane;
        for (unsigned lane = 0; lane < 32; lane++)
            if (arguments[lane]) ((Vote*)arguments[lane])->result = ballot;
    });
    return mine.result;
}

} // namespace emulation

// Emulates `name`, a kernel of this file.
#define EMULATED(name, threads, cluster) emulation::Emulated<&name>::entry(#name, threads, cluster)

extern "C" __attribute__((visibility("default"), used)) inline void emulation_run(emulation::Launch* launch) {
    emulation::run(*launch);
}

// ---- CUDA's own names ----

#define threadIdx (emulation::self().thread)
#define blockIdx (emulation::self().block->index)
#define blockDim (emulation::self().block->dim)
#define gridDim (emulation::self().block->grid)

inline void __syncthreads() { emulation::barrier(); }
inline void __syncwarp(uint32_t lanes = 0xffffffffu) {
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
