// What whoever launches a kernel sees of it, with the layouts of emulator.rs, and the limits of the device.
#pragma once

#if !defined(__x86_64__) || !defined(__linux__)
#error "the emulated device needs Linux on x86-64"
#endif

#include <stdint.h>
#include <stdlib.h>

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
    // Who works at it, and how often a block has told others to go on (above), with how many have nothing to do until then (below).
    uint32_t working;
    uint64_t told;
    // Where an access to global memory failed, or 0.
    uint64_t fault_address;
    char message[1024];
};

} // namespace emulation
