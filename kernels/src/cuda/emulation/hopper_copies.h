// The copy engine.
#pragma once
#include "hopper_barriers.h"

namespace emulation {

// 16 bytes of a row of 128 are exchanged by the row's number modulo 8, as the address says it.
inline uint32_t swizzle128(uint32_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

inline void check_box(const char* name, const TensorMap& map, unsigned offset) {
    if (map.magic != TENSOR_MAP) fail("%s: the tensor map is none", name);
    if (offset % 128) fail("%s: the box at byte %u of shared memory is not aligned to 128 bytes", name, offset);
}

inline unsigned box_bytes(const TensorMap& map) { return map.box_rows * map.box_heads * map.box_columns * map.element; }

// What threads wrote to a stretch and engines see.
inline void fence_async(const void* from, unsigned bytes) {
    settle();
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
    Block& block = *self().block;
    const unsigned char* seen = engine().blocks[block.rank].seen;
    if (memcmp(block.shared + it.offset, seen + it.offset, box_bytes(it.map)))
        fail("tma_store: the box at byte %u was written to, without fence_async or before it had been read", it.offset);
    if (it.left) return;
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
    Leaving& it = mine.stores[mine.store_count++] = {map, column, row, offset, mine.store_group, false};
    if (!engine().early) return;
    leave(it);
    it.left = true;
}

inline void tma_store_commit() { engine(self()).store_group++; }

void bulk_read(unsigned pending);

inline void tma_store_wait(unsigned pending) {
    ThreadEngine& mine = engine(self());
    bulk_read(pending);
    unsigned left = 0;
    for (unsigned i = 0; i < mine.store_count; i++) {
        Leaving it = mine.stores[i];
        if (it.group + pending >= mine.store_group) mine.stores[left++] = it;
        else leave(it);
    }
    mine.store_count = left;
}

} // namespace emulation
