// What a thread, a block and a cluster have under way on Hopper, and waiting for it.
#pragma once
#include "emulation.h"

// A matrix of rows with `pitch` bytes between them, and the box that is copied of it: tensor_map.rs fills it in. Where a row is
// `heads` (not 0) of `columns` each, the box has the `box_heads` heads of a row after each other, then those of the next.
struct __attribute__((aligned(64))) TensorMap {
    uint64_t magic, address, rows, columns, pitch;
    uint32_t box_rows, box_columns, element, writable;
    uint64_t heads;
    uint32_t box_heads, zero;
    uint64_t unused[7];
};
static_assert(sizeof(TensorMap) == 128);

namespace emulation {

constexpr uint64_t TENSOR_MAP = 0x70616d726f736e74;
constexpr unsigned WARPGROUP = 128, WARPGROUPS = MOST_THREADS / WARPGROUP;
constexpr unsigned REGISTERS = 65536;
// Where shared memory begins in the addresses that instructions count in; 0 is none.
constexpr uint32_t SHARED_START = 1024;

struct BarrierState {
    uint64_t phase : 1, expected : 11, pending : 11, fenced : 1, magic : 16;
    // Bytes announced less bytes landed.
    int64_t missing : 24;
};
static_assert(sizeof(BarrierState) == 8);
constexpr unsigned INITIALISED = 0xba55;

// A box under way to shared memory.
struct Landing {
    TensorMap map;
    int column, head, row;
    Block* block;
    unsigned offset;
    uint64_t* barrier;
    Fiber* by;
};

// A box under way from shared memory.
struct Leaving {
    TensorMap map;
    int column, row;
    unsigned offset, group;
    // Whether it has been read.
    bool left;
};

// Numbers under way from shared memory to global memory, stored or added.
struct Bulk {
    float* to;
    unsigned offset, count, group;
    bool adds, done;
    // A copy, once the wait is over that promises only that they have been read.
    float* read;
};

// One wgmma of a thread.
struct Product {
    uint64_t a, b;
    uint32_t registers[4];
    float* d;
    unsigned columns, group;
    bool a_in_registers, transposed_a, transposed_b, accumulate, done;
};

// Sums that products under way add to.
struct Accumulators {
    float* d;
    unsigned count, last_group;
    float sums[128];
};

// What a warp stored by `stmatrix`: 16 bytes at each row, of which every lane has a part.
struct Stored {
    unsigned char* rows[32];
    uint32_t registers[32][4];
    bool transposed;
};

struct ThreadEngine {
    // Of a warp's first lane.
    Stored* stored;
    unsigned stored_count, stored_capacity;
    Product* products;
    unsigned product_count, product_capacity, product_group;
    Accumulators accumulators[8];
    unsigned accumulator_count;
    bool fenced;
    Leaving* stores;
    unsigned store_count, store_capacity, store_group;
    Bulk* bulks;
    unsigned bulk_count, bulk_capacity;
    // What others released, and the copy engine does not yet see.
    bool acquired;
    uint64_t cluster_phase;
};

struct NamedBarrier {
    unsigned arrived, threads;
};

// A thread that waits for a word to have a value.
struct Waiter {
    unsigned number;
    const int* word;
    int value;
};

struct Sleeper {
    unsigned number;
    const void* key;
};

struct BlockEngine {
    // What engines see of shared memory.
    unsigned char* seen;
    NamedBarrier named[16];
    unsigned met[WARPGROUPS];
    unsigned free_registers, warp_registers[MOST_THREADS / 32];
};

struct ClusterEngine {
    BlockEngine blocks[MOST_CLUSTER];
    Landing* landings;
    unsigned landing_count, landing_capacity;
    Sleeper sleepers[MOST_THREADS];
    unsigned sleeper_count;
    Waiter waiters[MOST_THREADS];
    unsigned waiter_count;
    // Barriers that are initialised and not fenced, and by whom.
    struct {
        uint64_t* barrier;
        Fiber* by;
    } initialised[256];
    unsigned initialised_count;
    unsigned cluster_arrived;
    uint64_t cluster_phase;
    // Whether products and stores read shared memory as early as they may, or as late.
    bool early;
    float a[64][16], b[16][256], d[64][256];
};

template <class T> void grow(T*& list, unsigned count, unsigned& capacity) {
    if (count < capacity) return;
    capacity = capacity ? 2 * capacity : 16;
    list = (T*)realloc(list, capacity * sizeof(T));
}

bool go_on(Cluster& cluster, bool must);
void check_finished(Cluster& cluster);

// A cluster's, which is made ready at the first use by any of its threads.
inline ClusterEngine& engine(Cluster& cluster) {
    if (cluster.progress) return *cluster.engine;
    if (!cluster.engine) cluster.engine = (ClusterEngine*)calloc(1, sizeof(ClusterEngine));
    ClusterEngine& it = *cluster.engine;
    unsigned threads = cluster.blocks[0].dim.x;
    for (unsigned rank = 0; rank < cluster.size; rank++) {
        BlockEngine& block = it.blocks[rank];
        if (!block.seen) block.seen = map(MOST_SHARED, PROT_READ | PROT_WRITE);
        memset(block.seen, POISON, cluster.blocks[rank].launch->shared_bytes);
        memset(block.named, 0, sizeof block.named);
        memset(block.met, 0, sizeof block.met);
        // As many as threads of one resident block may have.
        unsigned each = min(REGISTERS / threads / 8 * 8, 255u);
        for (unsigned& registers : block.warp_registers) registers = each;
        // What the block was not given is nobody's.
        block.free_registers = 0;
    }
    it.landing_count = it.sleeper_count = it.waiter_count = it.initialised_count = it.cluster_arrived = 0;
    it.early = cluster.blocks[0].launch->seed && draw(cluster) % 2;
    for (unsigned i = 0; i < cluster.size * threads; i++)
        if (ThreadEngine* of = fiber(cluster, i).engine) {
            of->stored_count = of->product_count = of->product_group = of->accumulator_count = of->store_count = of->store_group = 0;
            of->bulk_count = 0;
            of->fenced = of->acquired = false;
        }
    cluster.progress = go_on;
    cluster.finish = check_finished;
    return it;
}

inline ClusterEngine& engine() { return engine(*self().block->cluster); }

inline ThreadEngine& engine(Fiber& thread) {
    engine(*thread.block->cluster);
    if (!thread.engine) thread.engine = (ThreadEngine*)calloc(1, sizeof(ThreadEngine));
    return *thread.engine;
}

// ---- waiting for something that others do ----

inline void sleep_on(const void* key, const char* name) {
    Fiber& me = self();
    ClusterEngine& all = engine();
    me.waits_at = name;
    all.sleepers[all.sleeper_count++] = {me.block->first + me.number, key};
    suspend(me);
}

inline void wake(Cluster& cluster, const void* key) {
    ClusterEngine& all = engine(cluster);
    unsigned left = 0;
    for (unsigned i = 0; i < all.sleeper_count; i++) {
        if (all.sleepers[i].key != key) {
            all.sleepers[left++] = all.sleepers[i];
            continue;
        }
        Fiber& other = fiber(cluster, all.sleepers[i].number);
        other.waits_at = nullptr;
        make_ready(other);
    }
    all.sleeper_count = left;
}

inline uint32_t shared_offset(const char* name, const void* address, unsigned bytes) {
    check_shared(name, address, bytes);
    return uint32_t((const unsigned char*)address - self().block->shared);
}

// The same place in another block of the cluster.
inline void* at_rank(const char* name, const void* address, unsigned rank) {
    Block& block = *self().block;
    uint32_t offset = shared_offset(name, address, 8);
    if (rank >= block.cluster->size) fail("%s: the cluster has no block %u", name, rank);
    return block.cluster->blocks[rank].shared + offset;
}

} // namespace emulation
