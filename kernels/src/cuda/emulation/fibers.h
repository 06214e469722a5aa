// Threads as fibers: who waits, who goes on, the first error, what a warp does together.
#pragma once
#include "launch.h"
#include "types.h"
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>
#include <utility>

namespace emulation {

struct Block;
// What a thread and a cluster have under way on Hopper: hopper_state.h.
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
    // Of a warp's first lane: what its threads wrote to shared memory for each other comes there, if there is anything.
    void (*settle)(Fiber& first_lane);
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
    // One more than the number of a warp of each block that runs only when no other thread can, 0: none is held back; beyond its 16
    // bits whether the warp's first lane is not.
    unsigned held_back;
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

// Of those that can go on.
inline bool is_held_back(Cluster& cluster, unsigned place) {
    unsigned number = fiber(cluster, cluster.ready[(cluster.ready_first + place) % MOST_THREADS]).number;
    return number / 32 + 1 == (cluster.held_back & 0xffff) && (cluster.held_back >> 16 == 0 || number % 32 != 0);
}

inline bool all_held_back(Cluster& cluster) {
    if (!cluster.held_back) return false;
    for (unsigned place = 0; place < cluster.ready_count; place++)
        if (!is_held_back(cluster, place)) return false;
    return true;
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
    // What is under way beside the threads goes on before those that are held back.
    while (all_held_back(cluster) && cluster.progress && cluster.progress(cluster, true)) {}
    unsigned first = cluster.ready_first, last = (first + cluster.ready_count - 1) % MOST_THREADS, place = 0;
    if (cluster.order == Order::LAST_FIRST) place = cluster.ready_count - 1;
    if (cluster.order == Order::ANY) place = draw(cluster) % cluster.ready_count;
    if (!all_held_back(cluster))
        while (is_held_back(cluster, place)) place = (place + 1) % cluster.ready_count;
    unsigned end = cluster.order == Order::IN_TURN ? first : last;
    std::swap(cluster.ready[(first + place) % MOST_THREADS], cluster.ready[end]);
    if (cluster.order == Order::IN_TURN) cluster.ready_first = (first + 1) % MOST_THREADS;
    cluster.ready_count--;
    return &fiber(cluster, cluster.ready[end]);
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

// At whatever orders the calling thread's writes before what others read after it.
inline void settle() {
    Fiber& me = self();
    Fiber& first_lane = fiber(*me.block, me.number / 32 * 32);
    if (first_lane.settle) first_lane.settle(first_lane);
}

inline void barrier() {
    Fiber& me = self();
    settle();
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
        it.settle = nullptr;
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

} // namespace emulation
