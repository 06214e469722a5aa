// What only Hopper has, on the processor: hopper.cuh includes this where it is not NVRTC that compiles.
//
//   * An mbarrier is 8 bytes of shared memory, with its phase, the arrivals and the bytes that are still missing.
//   * The copy engine's boxes lie as NaN from their start until they land, which is when no thread can go on, or at some
//     moment before if the seed draws so; the oldest, the newest or any lands first. Of a box for several blocks each
//     lands for itself.
//   * A store's box is read at the wait that promises it, or at once: the seed draws which.
//   * wgmma reads its matrices through their descriptors, strides and swizzle decoded, at the wait that promises the result
//     or when its group is committed, as is drawn. The accumulators are NaN until the wait.
//   * Engines and tensor cores have a view of shared memory of their own, to which what threads write comes only by
//     `fence_async`. A copy onto what is not fenced is an error.
//   * The blocks of a cluster run together; a copy or an arrival to a block that has ended is an error.
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

struct ThreadEngine {
    Product* products;
    unsigned product_count, product_capacity, product_group;
    Accumulators accumulators[8];
    unsigned accumulator_count;
    bool fenced;
    Leaving* stores;
    unsigned store_count, store_capacity, store_group;
    uint64_t cluster_phase;
};

struct NamedBarrier {
    unsigned arrived, threads;
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

bool land_some(Cluster& cluster, bool must);
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
        block.free_registers = REGISTERS - (threads + 31) / 32 * 32 * each;
    }
    it.landing_count = it.sleeper_count = it.initialised_count = it.cluster_arrived = 0;
    it.early = cluster.blocks[0].launch->seed && draw(cluster) % 2;
    for (unsigned i = 0; i < cluster.size * threads; i++)
        if (ThreadEngine* of = fiber(cluster, i).engine) {
            of->product_count = of->product_group = of->accumulator_count = of->store_count = of->store_group = 0;
            of->fenced = false;
        }
    cluster.progress = land_some;
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
    BarrierState& state = barrier_state(name, barrier);
    if (state.pending == 0) fail("%s: more arrivals than the phase has", name);
    state.missing += bytes;
    state.pending--;
    complete_phase(*self().block->cluster, barrier);
}

inline void barrier_arrive_at(uint64_t* barrier, unsigned rank) {
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

// ---- the copy engine ----

// 16 bytes of a row of 128 are exchanged by the row's number modulo 8, as the address says it.
inline uint32_t swizzle128(uint32_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

inline void check_box(const char* name, const TensorMap& map, unsigned offset) {
    if (map.magic != TENSOR_MAP) fail("%s: the tensor map is none", name);
    if (offset % 128) fail("%s: the box at byte %u of shared memory is not aligned to 128 bytes", name, offset);
}

inline unsigned box_bytes(const TensorMap& map) { return map.box_rows * map.box_heads * map.box_columns * map.element; }

// What threads wrote to a stretch and engines see.
inline void fence_async(const void* from, unsigned bytes) {
    uint32_t offset = shared_offset("fence_async", from, bytes);
    memcpy(engine().blocks[self().block->rank].seen + offset, from, bytes);
}

// The box in pieces, 16 bytes or at the matrix's edges an element: move(place in shared memory, in global memory or null
// outside the matrix, bytes).
template <class Move> void for_box(const TensorMap& map, int column, int head, int row, unsigned offset, Move move) {
    unsigned each = 16 / map.element;
    int64_t heads = map.heads ? map.heads : 1;
    for (unsigned r = 0; r < map.box_rows * map.box_heads; r++)
        for (unsigned c = 0; c < map.box_columns; c += each) {
            int64_t x = int64_t(column) + c, y = int64_t(row) + r / map.box_heads, z = int64_t(head) + r % map.box_heads;
            unsigned at = swizzle128(offset + (r * map.box_columns + c) * map.element);
            bool row_inside = y >= 0 && y < int64_t(map.rows) && z >= 0 && z < heads;
            unsigned char* global = (unsigned char*)map.address + y * int64_t(map.pitch) +
                                    (z * int64_t(map.columns) + x) * map.element;
            if (row_inside && x >= 0 && x + each <= int64_t(map.columns)) {
                move(at, global, 16u);
            } else {
                for (unsigned e = 0; e < each; e++) {
                    bool inside = row_inside && x + e >= 0 && x + e < int64_t(map.columns);
                    move(at + e * map.element, inside ? global + e * map.element : nullptr, map.element);
                }
            }
        }
}

inline void load_box(void* to, const TensorMap& map, uint64_t* barrier, int column, int head, int row, unsigned ranks) {
    Fiber& me = self();
    Cluster& cluster = *me.block->cluster;
    ClusterEngine& all = engine();
    unsigned bytes = box_bytes(map), offset = shared_offset("tma_load", to, bytes);
    check_box("tma_load", map, offset);
    check_aligned("tma_load", barrier, 8);
    if (ranks == 0 || ranks >> cluster.size) fail("tma_load: the cluster has %u blocks, the mask is %x", cluster.size, ranks);
    for (unsigned rank = 0; rank < cluster.size; rank++) {
        if (!(ranks >> rank & 1)) continue;
        Block& block = cluster.blocks[rank];
        unsigned char* seen = all.blocks[rank].seen + offset;
        if (memcmp(block.shared + offset, seen, bytes))
            fail("tma_load: the box at byte %u lands on what threads wrote without fence_async", offset);
        memset(block.shared + offset, POISON, bytes);
        memset(seen, POISON, bytes);
        uint64_t* signal = (uint64_t*)at_rank("tma_load", barrier, rank);
        grow(all.landings, all.landing_count, all.landing_capacity);
        all.landings[all.landing_count++] = {map, column, head, row, &block, offset, signal, &me};
    }
}

inline void tma_load(void* to, const TensorMap& map, uint64_t* barrier, int column, int row, unsigned ranks) {
    if (map.heads) fail("tma_load: two numbers for a tensor map of heads");
    load_box(to, map, barrier, column, 0, row, ranks);
}

inline void tma_load_heads(void* to, const TensorMap& map, uint64_t* barrier, int column, int head, int row) {
    if (!map.heads) fail("tma_load: three numbers for a tensor map without heads");
    load_box(to, map, barrier, column, head, row, 1u << self().block->rank);
}

inline void land(Cluster& cluster, const Landing& it) {
    BarrierState* state = state_of(*it.block, it.by, "tma_load", it.barrier, true);
    if (!state) return;
    unsigned char *shared = it.block->shared, *seen = engine(cluster).blocks[it.block->rank].seen;
    for_box(it.map, it.column, it.head, it.row, it.offset, [&](unsigned at, const unsigned char* global, unsigned bytes) {
        if (global) memcpy(shared + at, global, bytes);
        else memset(shared + at, 0, bytes);
        memcpy(seen + at, shared + at, bytes);
    });
    state->missing -= box_bytes(it.map);
    complete_phase(cluster, it.barrier);
}

inline bool land_some(Cluster& cluster, bool must) {
    ClusterEngine& all = *cluster.engine;
    if (all.landing_count == 0) return false;
    if (!must && (cluster.order != Order::ANY || draw(cluster) % 16)) return false;
    unsigned which = 0;
    if (cluster.order == Order::LAST_FIRST) which = all.landing_count - 1;
    if (cluster.order == Order::ANY) which = draw(cluster) % all.landing_count;
    Landing it = all.landings[which];
    all.landing_count--;
    memmove(all.landings + which, all.landings + which + 1, (all.landing_count - which) * sizeof(Landing));
    land(cluster, it);
    return true;
}

inline void leave(const Leaving& it) {
    const unsigned char* seen = engine().blocks[self().block->rank].seen;
    for_box(it.map, it.column, 0, it.row, it.offset, [&](unsigned at, unsigned char* global, unsigned bytes) {
        if (global) memcpy(global, seen + at, bytes);
    });
}

inline void tma_store(const TensorMap& map, const void* from, int column, int row) {
    ThreadEngine& mine = engine(self());
    unsigned offset = shared_offset("tma_store", from, box_bytes(map));
    check_box("tma_store", map, offset);
    if (!map.writable) fail("tma_store: the tensor map is of a matrix that is only read");
    grow(mine.stores, mine.store_count, mine.store_capacity);
    Leaving& it = mine.stores[mine.store_count++] = {map, column, row, offset, mine.store_group};
    if (!engine().early) return;
    leave(it);
    it.map.box_rows = 0;
}

inline void tma_store_commit() { engine(self()).store_group++; }

inline void tma_store_wait(unsigned pending) {
    ThreadEngine& mine = engine(self());
    unsigned left = 0;
    for (unsigned i = 0; i < mine.store_count; i++) {
        Leaving it = mine.stores[i];
        if (it.group + pending >= mine.store_group) mine.stores[left++] = it;
        else leave(it);
    }
    mine.store_count = left;
}

// ---- wgmma ----

struct Operand {
    uint32_t start, leading, stride;
};

inline Operand decode(uint64_t descriptor) {
    Operand it = {uint32_t(descriptor & 0x3fff) << 4, uint32_t(descriptor >> 16 & 0x3fff) << 4,
                  uint32_t(descriptor >> 32 & 0x3fff) << 4};
    if (descriptor >> 62 != 1) fail("wgmma: swizzle mode %u is not emulated, only 1 (128 bytes)", unsigned(descriptor >> 62));
    if (descriptor >> 49 & 7 || it.start >> 7 & 7)
        fail("wgmma: the matrix at %#x does not begin where the swizzle's pattern does", it.start);
    return it;
}

// [count, 16] along the sum, whose 16 are neighbours, or if `transposed` [16, count]: put(i, k, bits).
template <class Put> void read_operand(uint64_t descriptor, bool transposed, unsigned count, Put put) {
    Operand it = decode(descriptor);
    Block& block = *self().block;
    const unsigned char* seen = engine().blocks[block.rank].seen;
    auto chunk = [&](uint32_t offset) {
        uint32_t at = swizzle128(it.start + offset) - SHARED_START;
        if (it.start < SHARED_START || at + 16 > block.launch->shared_bytes)
            fail("wgmma: byte %d is outside the %llu bytes of shared memory", int(at),
                 (unsigned long long)block.launch->shared_bytes);
        return (const uint16_t*)(seen + at);
    };
    if (transposed) {
        for (unsigned k = 0; k < 16; k++)
            for (unsigned i = 0; i < count; i += 8) {
                auto from = chunk(i / 64 * it.leading + i % 64 * 2 + k / 8 * it.stride + k % 8 * 128);
                for (unsigned e = 0; e < 8; e++) put(i + e, k, from[e]);
            }
    } else {
        for (unsigned i = 0; i < count; i++)
            for (unsigned k = 0; k < 16; k += 8) {
                auto from = chunk(i / 8 * it.stride + i % 8 * 128 + k * 2);
                for (unsigned e = 0; e < 8; e++) put(i, k + e, from[e]);
            }
    }
}

inline float widened(uint16_t bits) {
    uint32_t wide = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}

__attribute__((optimize("O3"), target_clones("avx512f", "avx2", "default"))) void
add_products(float (&d)[64][256], const float (&a)[64][16], const float (&b)[16][256], unsigned columns) {
    for (unsigned i = 0; i < 64; i++)
        for (unsigned k = 0; k < 16; k++) {
            float factor = a[i][k];
            for (unsigned j = 0; j < columns; j++) d[i][j] += factor * b[k][j];
        }
}

inline Accumulators* accumulators_of(ThreadEngine& thread, const float* d) {
    for (unsigned i = 0; i < thread.accumulator_count; i++)
        if (thread.accumulators[i].d == d) return &thread.accumulators[i];
    return nullptr;
}

// Thread t of a warpgroup has of d [64, columns] the rows 16 (t / 32) + t % 32 / 4 and the eighth after it, of every eight
// columns two.
template <class Visit> void for_fragment(unsigned t, unsigned columns, Visit visit) {
    unsigned row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
    for (unsigned i = 0; i < columns / 2; i++) visit(i, row + i / 2 % 2 * 8, i / 4 * 8 + column + i % 2);
}

// The products of a warpgroup up to a group that have not been computed.
inline void compute(Fiber& first, unsigned before_group) {
    ClusterEngine& all = engine();
    Block& block = *first.block;
    ThreadEngine& lead = engine(first);
    auto thread = [&](unsigned t) -> ThreadEngine& { return *fiber(block, first.number + t).engine; };
    for (unsigned t = 1; t < WARPGROUP; t++) {
        Fiber& other = fiber(block, first.number + t);
        if (!other.engine || other.engine->product_count != lead.product_count)
            fail("wgmma: thread %u has other products under way than thread %u", other.number, first.number);
    }
    float* loaded = nullptr;
    for (unsigned p = 0; p < lead.product_count; p++) {
        const Product& it = lead.products[p];
        if (it.done || it.group >= before_group) continue;
        for (unsigned t = 1; t < WARPGROUP; t++) {
            const Product& other = thread(t).products[p];
            if (other.a != it.a || other.b != it.b || other.columns != it.columns || other.group != it.group ||
                other.accumulate != it.accumulate)
                fail("wgmma: threads %u and %u give different matrices", first.number, first.number + t);
        }
        auto sums_of = [&](unsigned t) { return accumulators_of(thread(t), thread(t).products[p].d)->sums; };
        if (it.accumulate && loaded != it.d)
            for (unsigned t = 0; t < WARPGROUP; t++) {
                float* sums = sums_of(t);
                for_fragment(t, it.columns, [&](unsigned i, unsigned r, unsigned c) { all.d[r][c] = sums[i]; });
            }
        if (!it.accumulate) memset(all.d, 0, sizeof all.d);
        if (it.a_in_registers) {
            for (unsigned t = 0; t < WARPGROUP; t++)
                for (unsigned i = 0; i < 4; i++) {
                    uint32_t pair = thread(t).products[p].registers[i];
                    unsigned r = t / 32 * 16 + t % 32 / 4 + i % 2 * 8, k = t % 4 * 2 + i / 2 * 8;
                    all.a[r][k] = widened(uint16_t(pair)), all.a[r][k + 1] = widened(uint16_t(pair >> 16));
                }
        } else {
            read_operand(it.a, it.transposed_a, 64, [&](unsigned i, unsigned k, uint16_t x) { all.a[i][k] = widened(x); });
        }
        read_operand(it.b, it.transposed_b, it.columns,
                     [&](unsigned j, unsigned k, uint16_t x) { all.b[k][j] = widened(x); });
        add_products(all.d, all.a, all.b, it.columns);
        loaded = it.d;
        const Product* next = p + 1 < lead.product_count ? &lead.products[p + 1] : nullptr;
        if (!next || next->d != it.d || next->group >= before_group || !next->accumulate)
            for (unsigned t = 0; t < WARPGROUP; t++) {
                float* sums = sums_of(t);
                for_fragment(t, it.columns, [&](unsigned i, unsigned r, unsigned c) { sums[i] = all.d[r][c]; });
            }
        for (unsigned t = 0; t < WARPGROUP; t++) thread(t).products[p].done = true;
    }
}

// Meets the other threads of the warpgroup; the last to come runs `operation`.
template <class Run> void meet_warpgroup(const char* name, Run run) {
    Fiber& me = self();
    Block& block = *me.block;
    unsigned first = me.number / WARPGROUP * WARPGROUP;
    unsigned& met = engine().blocks[block.rank].met[me.number / WARPGROUP];
    me.waits_at = name;
    if (++met == WARPGROUP) {
        met = 0;
        for (unsigned t = 0; t < WARPGROUP; t++)
            if (fiber(block, first + t).waits_at != name)
                fail("%s: thread %u of the warpgroup is at %s", name, first + t, fiber(block, first + t).waits_at);
        run(fiber(block, first));
        for (unsigned t = 0; t < WARPGROUP; t++) {
            fiber(block, first + t).waits_at = nullptr;
            make_ready(fiber(block, first + t));
        }
    }
    suspend(me);
}

inline void wgmma_fence() { engine(self()).fenced = true; }

inline void wgmma(float* d, unsigned columns, const uint32_t* registers, uint64_t a, uint64_t b, bool transposed_a,
                  bool transposed_b, bool accumulate) {
    ThreadEngine& mine = engine(self());
    if (!mine.fenced) fail("wgmma: registers are not fenced (wgmma_fence) since the last wait");
    Accumulators* sums = accumulators_of(mine, d);
    if (!sums) {
        if (mine.accumulator_count == 8) fail("wgmma: more than 8 sets of accumulators under way");
        sums = &mine.accumulators[mine.accumulator_count++];
        sums->d = d;
        sums->count = columns / 2;
        memcpy(sums->sums, d, columns / 2 * sizeof(float));
        memset(d, POISON, columns / 2 * sizeof(float));
    }
    if (sums->count != columns / 2) fail("wgmma: accumulators of two widths");
    sums->last_group = mine.product_group;
    grow(mine.products, mine.product_count, mine.product_capacity);
    Product& it = mine.products[mine.product_count++];
    it = {a, b, {}, d, columns, mine.product_group, registers != nullptr, transposed_a, transposed_b, accumulate, false};
    if (registers) memcpy(it.registers, registers, sizeof it.registers);
}

inline void wgmma_commit() {
    if (engine().early)
        meet_warpgroup("wgmma_commit", [](Fiber& first) { compute(first, first.engine->product_group + 1); });
    engine(self()).product_group++;
}

inline void wgmma_wait(unsigned pending) {
    ThreadEngine& mine = engine(self());
    unsigned before = mine.product_group > pending ? mine.product_group - pending : 0;
    meet_warpgroup("wgmma_wait", [=](Fiber& first) { compute(first, before); });
    unsigned left = 0;
    for (unsigned i = 0; i < mine.product_count; i++)
        if (mine.products[i].group >= before) mine.products[left++] = mine.products[i];
    mine.product_count = left;
    left = 0;
    for (unsigned i = 0; i < mine.accumulator_count; i++) {
        Accumulators& it = mine.accumulators[i];
        if (it.last_group >= before) mine.accumulators[left++] = it;
        else memcpy(it.d, it.sums, it.count * sizeof(float));
    }
    mine.accumulator_count = left;
    mine.fenced = false;
}

// ---- stmatrix ----

struct Stmatrix {
    const uint32_t* r;
    unsigned char* row;
};

template <bool TRANSPOSED> void store_matrices(void** arguments) {
    need_all("stmatrix", arguments);
    for (unsigned lane = 0; lane < 32; lane++)
        for (unsigned m = 0; m < 4; m++) {
            auto row = [&](unsigned i) { return ((Stmatrix*)arguments[m * 8 + i])->row; };
            const unsigned char* pair = (const unsigned char*)&((Stmatrix*)arguments[lane])->r[m];
            if (TRANSPOSED) {
                memcpy(row(lane % 4 * 2) + lane / 4 * 2, pair, 2);
                memcpy(row(lane % 4 * 2 + 1) + lane / 4 * 2, pair + 2, 2);
            } else {
                memcpy(row(lane / 4) + lane % 4 * 4, pair, 4);
            }
        }
}

template <bool TRANSPOSED> void stmatrix(void* row, const uint32_t* r) {
    check_aligned("stmatrix", row, 16);
    check_shared("stmatrix", row, 16);
    Stmatrix mine{r, (unsigned char*)row};
    collective("stmatrix", 0xffffffffu, &mine, store_matrices<TRANSPOSED>);
}

// ---- the end of a cluster ----

inline void check_finished(Cluster& cluster) {
    ClusterEngine& all = *cluster.engine;
    if (all.landing_count)
        record(*all.landings[0].block, all.landings[0].by, "a box of tma_load is still under way where the cluster ends");
    for (unsigned i = 0; i < cluster.size * cluster.blocks[0].dim.x; i++) {
        Fiber& it = fiber(cluster, i);
        if (!it.engine) continue;
        if (it.engine->store_count) record(*it.block, &it, "ended before tma_store_wait");
        if (it.engine->product_count) record(*it.block, &it, "ended before wgmma_wait");
    }
}

} // namespace emulation
