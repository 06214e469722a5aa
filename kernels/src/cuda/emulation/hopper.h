// What only Hopper has, on the processor: hopper.cuh includes this where it is not NVRTC that compiles.
//
//   * An mbarrier is 8 bytes of shared memory, with its phase, the arrivals and the bytes that are still missing.
//   * The copy engine's boxes lie as NaN from their start until they land, which is when no thread can go on, or at some
//     moment before if the seed draws so; the oldest, the newest or any lands first. Of a box for several blocks each
//     lands for itself.
//   * A store's box is read at the wait that promises it, or at once: the seed draws which. If a thread has written to it until then,
//     that is an error.
//   * What bulk_store and bulk_add move is read at the wait that promises that and delivered at the one that promises it, or both
//     at once. A word is not released before, and what others released is fenced before the copy engine touches it.
//   * Who waits for a word lets others go on: of its block, then of blocks that other threads of the host work at. Where all of them
//     wait, nobody is left to release it: a deadlock. Under some seeds they are held up, so that one overtakes another.
//   * wgmma reads its matrices through their descriptors, strides and swizzle decoded, at the wait that promises the result
//     or when its group is committed, as is drawn. The accumulators are NaN until the wait.
//   * What `stmatrix` writes is NaN until the warp meets at `__syncwarp`, or one of its threads says to others, by whatever
//     barrier, or to the engines that it has written.
//   * Engines and tensor cores have a view of shared memory of their own, to which what threads write comes only by
//     `fence_async`. A copy onto what is not fenced is an error.
//   * The blocks of a cluster run together; a copy or an arrival to a block that has ended is an error.
#pragma once
#include "hopper_products.h"

namespace emulation {

// ---- the end of a cluster ----

inline void check_finished(Cluster& cluster) {
    ClusterEngine& all = *cluster.engine;
    if (all.landing_count)
        record(*all.landings[0].block, all.landings[0].by, "a box of tma_load is still under way where the cluster ends");
    for (unsigned i = 0; i < cluster.size * cluster.blocks[0].dim.x; i++) {
        Fiber& it = fiber(cluster, i);
        if (!it.engine) continue;
        if (it.engine->store_count) record(*it.block, &it, "ended before tma_store_wait");
        if (it.engine->bulk_count) record(*it.block, &it, "ended before bulk_wait");
        if (it.engine->product_count) record(*it.block, &it, "ended before wgmma_wait");
    }
}

} // namespace emulation
