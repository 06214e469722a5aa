// What device.cuh's wrappers do here: copies that arrive when they are waited for, matrices of a warp.
#pragma once
#include "fibers.h"

namespace emulation {

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
