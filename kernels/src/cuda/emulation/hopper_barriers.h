// mbarriers, named barriers, those of clusters, and registers that are handed over.
#pragma once
#include "hopper_state.h"

namespace emulation {

// ---- mbarriers ----

// The state, or null with an error recorded.
inline BarrierState* state_of(Block& block, Fiber* by, const char* name, uint64_t* barrier, bool from_elsewhere) {
    BarrierState* state = (BarrierState*)barrier;
    if (block.live == 0) record(block, by, "%s: the block with the barrier has ended", name);
    else if (state->magic != INITIALISED) record(block, by, "%s: the barrier is not initialised, or overwritten", name);
    else if (from_elsewhere && !state->fenced)
        record(block, by, "%s: the barrier's initialisation is not fenced (fence_barrier_init)", name);
    else return state;
    return nullptr;
}

inline BarrierState& barrier_state(const char* name, uint64_t* barrier) {
    check_aligned(name, barrier, 8);
    check_shared(name, barrier, 8);
    Fiber& me = self();
    BarrierState* state = state_of(*me.block, &me, name, barrier, false);
    if (!state) fail("%s", name);
    return *state;
}

inline void barrier_init(uint64_t* barrier, unsigned count) {
    check_aligned("barrier_init", barrier, 8);
    check_shared("barrier_init", barrier, 8);
    ClusterEngine& all = engine();
    if (count == 0 || count > 1023) fail("barrier_init: %u arrivals", count);
    if (all.initialised_count == 256) fail("barrier_init: more than 256 barriers without a fence");
    BarrierState state = {};
    state.expected = state.pending = count;
    state.magic = INITIALISED;
    memcpy(barrier, &state, 8);
    all.initialised[all.initialised_count++] = {barrier, &self()};
}

inline void fence_barrier_init() {
    ClusterEngine& all = engine();
    unsigned left = 0;
    for (unsigned i = 0; i < all.initialised_count; i++)
        if (all.initialised[i].by == &self()) ((BarrierState*)all.initialised[i].barrier)->fenced = 1;
        else all.initialised[left++] = all.initialised[i];
    all.initialised_count = left;
}

inline void complete_phase(Cluster& cluster, uint64_t* barrier) {
    BarrierState& state = *(BarrierState*)barrier;
    if (state.pending || state.missing) return;
    state.phase ^= 1;
    state.pending = state.expected;
    wake(cluster, barrier);
}

inline void arrive(const char* name, uint64_t* barrier, int bytes) {
    settle();
    BarrierState& state = barrier_state(name, barrier);
    if (state.pending == 0) fail("%s: more arrivals than the phase has", name);
    state.missing += bytes;
    state.pending--;
    complete_phase(*self().block->cluster, barrier);
}

inline void barrier_arrive_at(uint64_t* barrier, unsigned rank) {
    settle();
    Fiber& me = self();
    Block& there = me.block->cluster->blocks[rank];
    uint64_t* remote = (uint64_t*)at_rank("barrier_arrive_at", barrier, rank);
    BarrierState* state = state_of(there, &me, "barrier_arrive_at", remote, rank != me.block->rank);
    if (!state) fail("barrier_arrive_at");
    if (state->pending == 0) fail("barrier_arrive_at: more arrivals than the phase has");
    state->pending--;
    complete_phase(*me.block->cluster, remote);
}

inline void barrier_wait(uint64_t* barrier, unsigned parity) {
    while (barrier_state("barrier_wait", barrier).phase == (parity & 1)) sleep_on(barrier, "barrier_wait");
}

inline void named_barrier(const char* name, unsigned id, unsigned threads, bool wait) {
    if (id == 0 || id > 15 || threads == 0 || threads % 32)
        fail("%s: barrier %u of %u threads; 0 is __syncthreads', and warps count whole", name, id, threads);
    settle();
    NamedBarrier& it = engine().blocks[self().block->rank].named[id];
    if (it.arrived && it.threads != threads)
        fail("%s: barrier %u is waited for by %u threads and %u", name, id, it.threads, threads);
    it.threads = threads;
    if (++it.arrived == threads) {
        it.arrived = 0;
        wake(*self().block->cluster, &it);
    } else if (wait) {
        sleep_on(&it, name);
    }
}

inline void cluster_arrive() {
    settle();
    ClusterEngine& all = engine();
    Cluster& cluster = *self().block->cluster;
    engine(self()).cluster_phase = all.cluster_phase;
    if (++all.cluster_arrived < cluster.size * cluster.blocks[0].dim.x) return;
    all.cluster_arrived = 0;
    all.cluster_phase++;
    wake(cluster, &all.cluster_phase);
}

inline void cluster_wait() {
    ClusterEngine& all = engine();
    while (all.cluster_phase == engine(self()).cluster_phase) sleep_on(&all.cluster_phase, "cluster_wait");
}

// ---- registers ----

inline void set_max_registers(unsigned count, bool more) {
    Fiber& me = self();
    BlockEngine& block = engine().blocks[me.block->rank];
    auto nothing = [](void** arguments) { need_all("setmaxnreg", arguments); };
    collective("setmaxnreg", 0xffffffffu, &me, nothing);
    unsigned& now = block.warp_registers[me.number / 32];
    if (me.number % 32 == 0) {
        if (more ? count < now : count > now) fail("setmaxnreg: from %u registers to %u", now, count);
        if (more)
            while (block.free_registers < (count - now) * 32) sleep_on(&block.free_registers, "setmaxnreg");
        block.free_registers += (now - count) * 32;
        now = count;
        wake(*me.block->cluster, &block.free_registers);
    }
    collective("setmaxnreg", 0xffffffffu, &me, nothing);
}

} // namespace emulation
