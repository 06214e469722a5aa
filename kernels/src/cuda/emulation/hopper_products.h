// The products of a warpgroup (wgmma) and stmatrix.
#pragma once
#include "hopper_words.h"

namespace emulation {

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

inline void settle_matrices(Fiber& first_lane) {
    ThreadEngine& lead = engine(first_lane);
    for (unsigned i = 0; i < lead.stored_count; i++) {
        const Stored& it = lead.stored[i];
        for (unsigned lane = 0; lane < 32; lane++)
            for (unsigned m = 0; m < 4; m++) {
                unsigned char* const* rows = it.rows + m * 8;
                const unsigned char* pair = (const unsigned char*)&it.registers[lane][m];
                if (it.transposed) {
                    memcpy(rows[lane % 4 * 2] + lane / 4 * 2, pair, 2);
                    memcpy(rows[lane % 4 * 2 + 1] + lane / 4 * 2, pair + 2, 2);
                } else {
                    memcpy(rows[lane / 4] + lane % 4 * 4, pair, 4);
                }
            }
    }
    lead.stored_count = 0;
}

template <bool TRANSPOSED> void store_matrices(void** arguments) {
    need_all("stmatrix", arguments);
    Fiber& me = self();
    Fiber& first_lane = fiber(*me.block, me.number / 32 * 32);
    ThreadEngine& lead = engine(first_lane);
    grow(lead.stored, lead.stored_count, lead.stored_capacity);
    Stored& it = lead.stored[lead.stored_count++];
    it.transposed = TRANSPOSED;
    for (unsigned lane = 0; lane < 32; lane++) {
        const Stmatrix& of = *(Stmatrix*)arguments[lane];
        it.rows[lane] = of.row;
        memcpy(it.registers[lane], of.r, sizeof it.registers[lane]);
        memset(of.row, POISON, 16);
    }
    first_lane.settle = settle_matrices;
}

template <bool TRANSPOSED> void stmatrix(void* row, const uint32_t* r) {
    check_aligned("stmatrix", row, 16);
    check_shared("stmatrix", row, 16);
    Stmatrix mine{r, (unsigned char*)row};
    collective("stmatrix", 0xffffffffu, &mine, store_matrices<TRANSPOSED>);
}

} // namespace emulation
