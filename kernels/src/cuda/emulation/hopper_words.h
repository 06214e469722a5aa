// Words in global memory by which blocks wait for each other, and numbers on their way there from shared memory.
#pragma once
#include "hopper_copies.h"
#include <unistd.h>

namespace emulation {

// ---- words ----

inline bool has_come(const Waiter& it) { return __atomic_load_n(it.word, __ATOMIC_ACQUIRE) == it.value; }

// Makes those ready whose word has its value.
inline bool wake_waiters(Cluster& cluster) {
    ClusterEngine& all = *cluster.engine;
    unsigned left = 0, count = all.waiter_count;
    for (unsigned i = 0; i < count; i++) {
        Waiter it = all.waiters[i];
        if (!has_come(it)) {
            all.waiters[left++] = it;
            continue;
        }
        fiber(cluster, it.number).waits_at = nullptr;
        make_ready(fiber(cluster, it.number));
    }
    all.waiter_count = left;
    return left < count;
}

// Nothing of the cluster can go on but by a word: waits until one has come. False where nobody is left who could release it.
inline bool await_word(Cluster& cluster) {
    Launch& launch = *cluster.blocks[0].launch;
    while (!__atomic_load_n(&launch.failed, __ATOMIC_ACQUIRE)) {
        uint64_t seen = __atomic_load_n(&launch.told, __ATOMIC_SEQ_CST);
        if (wake_waiters(cluster)) return true;
        if (!__atomic_compare_exchange_n(&launch.told, &seen, seen + 1, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) continue;
        for (uint64_t now; (now = __atomic_load_n(&launch.told, __ATOMIC_SEQ_CST)) >> 32 == seen >> 32;) {
            if (__atomic_load_n(&launch.failed, __ATOMIC_ACQUIRE)) return false;
            if (uint32_t(now) >= __atomic_load_n(&launch.working, __ATOMIC_SEQ_CST)) return false;
            usleep(20);
        }
    }
    return false;
}

inline bool go_on(Cluster& cluster, bool must) {
    if (land_some(cluster, must)) return true;
    if (cluster.engine->waiter_count == 0) return false;
    if (wake_waiters(cluster)) return true;
    return must && cluster.ready_count == 0 && !cluster.late && await_word(cluster);
}

inline void acquire_when(const int* word, int value) {
    Fiber& me = self();
    ClusterEngine& all = engine();
    check_aligned("acquire_when", word, 4);
    Waiter it = {me.block->first + me.number, word, value};
    if (!has_come(it)) {
        me.waits_at = "acquire_when";
        all.waiters[all.waiter_count++] = it;
        suspend(me);
    }
    engine(me).acquired = true;
}

inline void store_release(int* word, int value) {
    ThreadEngine& mine = engine(self());
    check_aligned("store_release", word, 4);
    if (mine.bulk_count) fail("store_release: numbers are under way that bulk_wait has not waited for");
    __atomic_store_n(word, value, __ATOMIC_SEQ_CST);
    // Whoever waits looks again.
    uint64_t* told = &self().block->launch->told;
    uint64_t now = __atomic_load_n(told, __ATOMIC_SEQ_CST);
    while (!__atomic_compare_exchange_n(told, &now, ((now >> 32) + 1) << 32, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
}

inline void fence_async_global() { engine(self()).acquired = false; }

// ---- numbers ----

inline void deliver(Bulk& it) {
    const float* from = it.read;
    if (!from) from = (const float*)(engine().blocks[self().block->rank].seen + it.offset);
    for (unsigned i = 0; i < it.count; i++) it.to[i] = it.adds ? it.to[i] + from[i] : from[i];
    free(it.read);
    it.read = nullptr;
    it.done = true;
}

inline void bulk_start(const char* name, float* to, const void* from, unsigned bytes, bool adds) {
    ThreadEngine& mine = engine(self());
    Cluster& cluster = *self().block->cluster;
    unsigned offset = shared_offset(name, from, bytes);
    check_aligned(name, to, 16);
    check_aligned(name, from, 16);
    if (bytes == 0 || bytes % 16) fail("%s: %u bytes", name, bytes);
    if (mine.acquired) fail("%s: what others released is not fenced (fence_async_global)", name);
    grow(mine.bulks, mine.bulk_count, mine.bulk_capacity);
    Bulk& it = mine.bulks[mine.bulk_count++] = {to, offset, bytes / 4, mine.store_group, adds, false, nullptr};
    // Others may be faster.
    if (cluster.order != Order::IN_TURN && draw(cluster) % 4 == 0) usleep(draw(cluster) % 5000);
    if (engine().early) deliver(it);
}

// The groups have been read, not necessarily delivered.
inline void bulk_read(unsigned pending) {
    ThreadEngine& mine = engine(self());
    const unsigned char* seen = engine().blocks[self().block->rank].seen;
    for (unsigned i = 0; i < mine.bulk_count; i++) {
        Bulk& it = mine.bulks[i];
        if (it.group + pending >= mine.store_group || it.done || it.read) continue;
        it.read = (float*)malloc(it.count * sizeof(float));
        memcpy(it.read, seen + it.offset, it.count * sizeof(float));
    }
}

inline void bulk_wait(unsigned pending) {
    ThreadEngine& mine = engine(self());
    // It takes its time.
    make_ready(self());
    suspend(self());
    unsigned left = 0;
    for (unsigned i = 0; i < mine.bulk_count; i++) {
        Bulk& it = mine.bulks[i];
        if (it.group + pending >= mine.store_group) {
            mine.bulks[left++] = it;
        } else if (!it.done) {
            deliver(it);
        }
    }
    mine.bulk_count = left;
}

} // namespace emulation
