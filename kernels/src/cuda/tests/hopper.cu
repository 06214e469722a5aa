// Kernels that Hopper's part of the emulated device is tested with.
#include "hopper.cuh"
#include "hopper_products.cuh"
#include "tile.cuh"

// The bytes of a matrix with rows of 128 bytes.
DEVICE constexpr int matrix_bytes(int rows) { return rows * 128; }

// y [m, 64] = x [m, depth] w [64, depth]ᵀ. A cluster makes 256 rows, each of its blocks 128 and loads half of w's rows for
// both. One warpgroup copies, two multiply.
constexpr int STAGES = 3;
constexpr int STAGE_BYTES = 3 * 64 * 128;

HOPPER_KERNEL(384, 2) pipeline(TENSOR_MAP x, TENSOR_MAP w, TENSOR_MAP y, int depth) {
    unsigned char* ring = dynamic_shared();
    unsigned char* staged = ring + STAGES * STAGE_BYTES;
    Barrier* full = (Barrier*)(staged + matrix_bytes(128));
    Barrier* empty = full + STAGES;
    const int row = int(blockIdx.x) * 128, slices = divide_up(depth, 64);
    const uint32_t rank = cluster_rank();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; stage++) {
            barrier_init(full + stage, 1);
            barrier_init(empty + stage, 4);
        }
        fence_barrier_init(); // for the cluster
    }
    cluster_sync(); // before the first copy
    if (warpgroup_index() == 0) {
        fewer_registers<40>();
        if (threadIdx.x == 0) {
            for (int slice = 0; slice < slices; slice++) {
                int stage = slice % STAGES;
                barrier_wait(empty + stage, (slice / STAGES & 1) ^ 1);
                unsigned char* to = ring + stage * STAGE_BYTES;
                barrier_arrive_expecting(full + stage, STAGE_BYTES);
                tma_load(to, x, full + stage, slice * 64, row);
                int half = int(rank) * 32;
                tma_load_multicast(to + matrix_bytes(128 + half), w, full + stage, slice * 64, half, 3);
            }
        }
    } else {
        more_registers<216>();
        const int thread = int(threadIdx.x) % 128, part = warpgroup_index() - 1;
        staged += part * matrix_bytes(64);
        float sums[32];
        for (int slice = 0; slice < slices; slice++) {
            int stage = slice % STAGES;
            barrier_wait(full + stage, slice / STAGES & 1);
            uint64_t left = descriptor_along(ring + stage * STAGE_BYTES + part * matrix_bytes(64));
            uint64_t right = descriptor_along(ring + stage * STAGE_BYTES + matrix_bytes(128));
            wgmma_fence(); // also the sums
            for (int k = 0; k < 4; k++)
                wgmma<false, false>(sums, advanced(left, 32 * k), advanced(right, 32 * k), slice > 0 || k > 0);
            wgmma_commit();
            wgmma_wait<0>(); // the stage is read
            if (thread < 2) barrier_arrive_at(empty + stage, thread);
        }
        hold(sums);
        for (int g = 0; g < 8; g += 2) {
            uint32_t packed[4];
            for (int i = 0; i < 4; i++) packed[i] = pack_bf16(sums[4 * g + 2 * i], sums[4 * g + 2 * i + 1]);
            int at = thread / 32 * 16 + thread % 16;
            stmatrix_x4(staged + swizzled<8>(at, g + thread % 32 / 16), packed);
        }
        fence_async(staged, matrix_bytes(64));
        named_barrier_sync(1 + part, 128);
        if (thread == 0) {
            tma_store(y, staged, 0, row + part * 64);
            tma_store_commit();
            tma_store_wait<0>(); // before the block ends
        }
    }
    cluster_sync(); // with all arrivals from elsewhere
}

// The sums of all forms of operands: d [form, 64, N] = 1 + a [64, 64] b [64, N], from a, aᵀ, bᵀ [N, 64] and b, in four steps along the
// sum.
template <int COUNT>
DEVICE void multiply(const TensorMap& a, const TensorMap& at, const TensorMap& bt, const TensorMap& b, float* d) {
    constexpr int N = 2 * COUNT, PANELS = (N + 63) / 64;
    unsigned char* shared = dynamic_shared();
    unsigned char *of_a = shared, *of_at = of_a + matrix_bytes(64), *of_bt = of_at + matrix_bytes(64);
    unsigned char* of_b = of_bt + matrix_bytes(N);
    Barrier* barrier = (Barrier*)(of_b + PANELS * matrix_bytes(64));
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        fence_barrier_init();
        barrier_arrive_expecting(barrier, matrix_bytes(64 + 64 + N + PANELS * 64));
        tma_load(of_a, a, barrier, 0, 0);
        tma_load(of_at, at, barrier, 0, 0);
        tma_load(of_bt, bt, barrier, 0, 0);
        for (int panel = 0; panel < PANELS; panel++) tma_load(of_b + panel * matrix_bytes(64), b, barrier, 64 * panel, 0);
    }
    __syncthreads();
    barrier_wait(barrier, 0);
    const int warp = warp_index(), lane = lane_index();
    uint32_t registers[4][4];
    for (int k = 0; k < 4; k++) ldmatrix_x4(registers[k], of_a + swizzled<8>(16 * warp + lane % 16, 2 * k + lane / 16));
    // From registers only what kernels need.
    constexpr int FORMS = COUNT < 32 ? 4 : 6;
    for (int form = 0; form < FORMS; form++) {
        float sums[COUNT];
        for (int i = 0; i < COUNT; i++) sums[i] = 1.0f;
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++) {
            uint64_t along = advanced(descriptor_along(of_bt), 32 * k);
            uint64_t across = advanced(descriptor_across(of_b, matrix_bytes(64)), 2048 * k);
            uint64_t left = advanced(descriptor_along(of_a), 32 * k);
            uint64_t left_across = advanced(descriptor_across(of_at, 0), 2048 * k);
            if (form == 0) wgmma<false, false>(sums, left, along, true);
            if (form == 1) wgmma<false, true>(sums, left, across, true);
            if (form == 2) wgmma<true, false>(sums, left_across, along, true);
            if (form == 3) wgmma<true, true>(sums, left_across, across, true);
            if constexpr (FORMS > 4) {
                if (form == 4) wgmma<false>(sums, registers[k], along, true);
                if (form == 5) wgmma<true>(sums, registers[k], across, true);
            }
        }
        wgmma_commit();
        wgmma_wait<0>();
        hold(sums);
        for (int i = 0; i < COUNT; i++) {
            int row = 16 * warp + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
            d[(form * 64 + row) * N + column] = sums[i];
        }
    }
}

HOPPER_KERNEL(128, 1) multiply_16(TENSOR_MAP a, TENSOR_MAP at, TENSOR_MAP bt, TENSOR_MAP b, float* d) {
    multiply<8>(a, at, bt, b, d);
}
HOPPER_KERNEL(128, 1) multiply_32(TENSOR_MAP a, TENSOR_MAP at, TENSOR_MAP bt, TENSOR_MAP b, float* d) {
    multiply<16>(a, at, bt, b, d);
}
HOPPER_KERNEL(128, 1) multiply_48(TENSOR_MAP a, TENSOR_MAP at, TENSOR_MAP bt, TENSOR_MAP b, float* d) {
    multiply<24>(a, at, bt, b, d);
}
HOPPER_KERNEL(128, 1) multiply_64(TENSOR_MAP a, TENSOR_MAP at, TENSOR_MAP bt, TENSOR_MAP b, float* d) {
    multiply<32>(a, at, bt, b, d);
}
HOPPER_KERNEL(128, 1) multiply_128(TENSOR_MAP a, TENSOR_MAP at, TENSOR_MAP bt, TENSOR_MAP b, float* d) {
    multiply<64>(a, at, bt, b, d);
}
HOPPER_KERNEL(128, 1) multiply_256(TENSOR_MAP a, TENSOR_MAP at, TENSOR_MAP bt, TENSOR_MAP b, float* d) {
    multiply<128>(a, at, bt, b, d);
}

// d [2, 64, 32]: the product of aᵀ [16, 64] and b [16, 64] in two halves of b's columns.
HOPPER_KERNEL(128, 1) halves(TENSOR_MAP at, TENSOR_MAP b, float* d) {
    unsigned char* of_at = dynamic_shared();
    unsigned char* of_b = of_at + matrix_bytes(16);
    Barrier* barrier = (Barrier*)(of_b + matrix_bytes(16));
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        fence_barrier_init();
        barrier_arrive_expecting(barrier, matrix_bytes(32));
        tma_load(of_at, at, barrier, 0, 0);
        tma_load(of_b, b, barrier, 0, 0);
    }
    __syncthreads();
    barrier_wait(barrier, 0);
    for (int half = 0; half < 2; half++) {
        float sums[16];
        for (int i = 0; i < 16; i++) sums[i] = 0.0f;
        wgmma_fence();
        wgmma<true, true>(sums, descriptor_across(of_at, 0), descriptor_across(of_b + 64 * half, 0), true);
        wgmma_commit();
        wgmma_wait<0>();
        hold(sums);
        for (int i = 0; i < 16; i++) {
            int row = 16 * warp_index() + lane_index() / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane_index() % 4 * 2 + i % 2;
            d[(half * 64 + row) * 32 + column] = sums[i];
        }
    }
}

// sums [count] of parts [blocks, count], in the order of the parts; a block takes its part as it begins. words [2]: zeros.
HOPPER_KERNEL(32, 1) in_order(const float* parts, float* sums, int* words, int count) {
    float* staged = (float*)dynamic_shared();
    const int lane = lane_index();
    int number = lane == 0 ? atomicAdd(words, 1) : 0;
    number = __shfl_sync(ALL_LANES, number, 0);
    for (int i = lane; i < count; i += 32) staged[i] = parts[number * count + i];
    __syncwarp();
    fence_async(staged, 4 * count);
    __syncwarp();
    if (lane == 0) {
        if (number == 0) {
            bulk_store(sums, staged, 4 * count);
        } else {
            acquire_when(words + 1, number);
            fence_async_global();
            bulk_add(sums, staged, 4 * count);
        }
        tma_store_commit();
        tma_store_wait<0>();
        for (int i = 0; i < count; i++) staged[i] = -1.0f;
        fence_async(staged, 4 * count);
        bulk_wait<0>();
        store_release(words + 1, number + 1);
    }
}

// y = x [rows, columns] with each box of 32 rows turned upside down; up to two stores are under way.
HOPPER_KERNEL(32, 1) copies(TENSOR_MAP x, TENSOR_MAP y, int boxes) {
    unsigned char* shared = dynamic_shared();
    Barrier* barrier = (Barrier*)(shared + 3 * matrix_bytes(32));
    unsigned char* from = shared + 2 * matrix_bytes(32);
    const int lane = lane_index();
    if (lane == 0) {
        barrier_init(barrier, 1);
        fence_barrier_init();
    }
    __syncwarp();
    for (int i = 0; i < boxes; i++) {
        int column = 64 * i, row = 32 * int(blockIdx.x);
        if (lane == 0) {
            barrier_arrive_expecting(barrier, matrix_bytes(32));
            tma_load(from, x, barrier, column, row);
            // The store before the last has been read.
            tma_store_wait<1>();
        }
        __syncwarp();
        barrier_wait(barrier, i & 1);
        unsigned char* to = shared + i % 2 * matrix_bytes(32);
        for (int c = 0; c < 8; c++) store16(to + swizzled<8>(31 - lane, c), load16(from + swizzled<8>(lane, c)));
        fence_async(to, matrix_bytes(32));
        __syncwarp();
        if (lane == 0) {
            tma_store(y, to, column, row);
            tma_store_commit();
        }
    }
    if (lane == 0) tma_store_wait<0>();
}

// y [18, 64]: a box of 6 rows with 3 heads each.
HOPPER_KERNEL(32, 1) heads(TENSOR_MAP x, bf16* y, int column, int head, int row) {
    unsigned char* shared = dynamic_shared();
    Barrier* barrier = (Barrier*)(shared + matrix_bytes(18));
    const int lane = lane_index();
    if (lane == 0) {
        barrier_init(barrier, 1);
        fence_barrier_init();
        barrier_arrive_expecting(barrier, matrix_bytes(18));
        tma_load(shared, x, barrier, column, head, row);
    }
    __syncwarp();
    barrier_wait(barrier, 0);
    for (int i = lane; i < 18 * 8; i += 32) store16(y + 8 * i, load16(shared + swizzled<8>(i / 8, i % 8)));
}

// Whether a barrier's phase comes within a second: where an assumption is wrong, a test is to fail, not to wait without end.
DEVICE bool comes(Barrier* barrier, uint32_t parity) {
#ifdef __CUDACC_RTC__
    for (long long start = clock64(); clock64() - start < 2000000000ll;) {
        uint32_t done;
        asm volatile("{\n"
                     ".reg .pred done;\n"
                     "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, done;\n"
                     "}" : "=r"(done)
                     : "r"(shared_address(barrier)), "r"(parity)
                     : "memory");
        if (done) return true;
    }
    return false;
#else
    barrier_wait(barrier, parity);
    return true;
#endif
}

// out [32, 64] = the box of x at `column` and `row`, and to y it goes at the same place; `came`: all of its bytes were counted.
HOPPER_KERNEL(32, 1) box(TENSOR_MAP x, TENSOR_MAP y, bf16* out, uint32_t* came, int column, int row) {
    unsigned char* shared = dynamic_shared();
    Barrier* barrier = (Barrier*)(shared + matrix_bytes(32));
    const int lane = lane_index();
    if (lane == 0) {
        barrier_init(barrier, 1);
        fence_barrier_init();
        barrier_arrive_expecting(barrier, matrix_bytes(32));
        tma_load(shared, x, barrier, column, row);
    }
    __syncwarp();
    bool there = comes(barrier, 0);
    if (lane == 0) came[0] = there;
    if (!there) return;
    for (int i = lane; i < 32 * 8; i += 32) store16(out + 8 * i, load16(shared + swizzled<8>(i / 8, i % 8)));
    if (lane != 0) return;
    tma_store(y, shared, column, row);
    tma_store_commit();
    tma_store_wait<0>();
}

// Of a cluster of two: out [2, 32, 64] = a box that the first block loads for both; seen [2, 3] = each block's rank, whether the box came,
// and whether the other block's arrival did.
HOPPER_KERNEL(32, 2) neighbours(TENSOR_MAP x, bf16* out, uint32_t* seen) {
    unsigned char* shared = dynamic_shared();
    Barrier* barriers = (Barrier*)(shared + matrix_bytes(32));
    const int lane = lane_index();
    const uint32_t rank = cluster_rank();
    if (lane == 0) {
        barrier_init(barriers, 1);
        barrier_init(barriers + 1, 1);
        fence_barrier_init();
        barrier_arrive_expecting(barriers, matrix_bytes(32));
    }
    cluster_sync();
    if (lane == 0 && rank == 0) tma_load_multicast(shared, x, barriers, 0, 0, 3);
    if (lane == 0) barrier_arrive_at(barriers + 1, 1 - rank);
    bool box = comes(barriers, 0), arrival = comes(barriers + 1, 0);
    if (lane == 0) seen[3 * blockIdx.x] = rank, seen[3 * blockIdx.x + 1] = box, seen[3 * blockIdx.x + 2] = arrival;
    if (box)
        for (int i = lane; i < 32 * 8; i += 32)
            store16(out + 32 * 64 * blockIdx.x + 8 * i, load16(shared + swizzled<8>(i / 8, i % 8)));
    cluster_sync();
}

// Of two warpgroups each thread gets more registers when those of the third have given some back: out [384] = the thread's number.
HOPPER_KERNEL(384, 1) handed_over(uint32_t* out) {
    if (warpgroup_index() == 0) fewer_registers<24>();
    else more_registers<240>();
    out[threadIdx.x] = threadIdx.x;
}

// With `bytes` of shared memory and thirteen maps, of a cluster of two: out [2, 32, 64] = a box of the last map, at the end of shared
// memory; seen [2, 2] = where shared memory begins, modulo 1024, and whether the box came.
HOPPER_KERNEL(32, 2) large(TENSOR_MAP a, TENSOR_MAP b, TENSOR_MAP c, TENSOR_MAP d, TENSOR_MAP e, TENSOR_MAP f, TENSOR_MAP g,
                           TENSOR_MAP h, TENSOR_MAP i, TENSOR_MAP j, TENSOR_MAP k, TENSOR_MAP l, TENSOR_MAP m, bf16* out,
                           uint32_t* seen, int bytes) {
    unsigned char* shared = dynamic_shared();
    unsigned char* box = shared + (bytes - matrix_bytes(32)) / 1024 * 1024;
    Barrier* barrier = (Barrier*)shared;
    const int lane = lane_index();
    if (lane == 0) {
        barrier_init(barrier, 1);
        fence_barrier_init();
        barrier_arrive_expecting(barrier, matrix_bytes(32));
        tma_load(box, cluster_rank() == 2 ? a : m, barrier, 0, 0);
    }
    __syncwarp();
    bool there = comes(barrier, 0);
    if (lane == 0) seen[2 * blockIdx.x] = shared_address(shared) % 1024, seen[2 * blockIdx.x + 1] = there;
    if (!there) return;
    for (int at = lane; at < 32 * 8; at += 32)
        store16(out + 32 * 64 * blockIdx.x + 8 * at, load16(box + swizzled<8>(at / 8, at % 8)));
}

// The matrices [4, 8, 8] that lanes' registers [4, 32] are stored as, and each transposed.
HOPPER_KERNEL(32, 1) stored(const uint32_t* registers, uint4* plain, uint4* transposed) {
    unsigned char* shared = dynamic_shared();
    const int lane = lane_index();
    uint32_t r[4];
    for (int i = 0; i < 4; i++) r[i] = registers[i * 32 + lane];
    stmatrix_x4(shared + lane * 16, r);
    __syncwarp();
    plain[lane] = load16(shared + lane * 16);
    __syncwarp();
    stmatrix_x4_transposed(shared + lane * 16, r);
    __syncwarp();
    transposed[lane] = load16(shared + lane * 16);
}

// Two warpgroups write to `out` in turns, which named barriers give them.
HOPPER_KERNEL(256, 1) turns(float* out, int count) {
    float* shared = (float*)dynamic_shared();
    const int mine = warpgroup_index(), thread = int(threadIdx.x) % 128;
    if (mine == 1) named_barrier_arrive(1, 256);
    for (int i = 0; i < count; i++) {
        named_barrier_sync(1 + mine, 256);
        float before = i + mine > 0 ? shared[127 - thread] : 0.0f;
        named_barrier_sync(3 + mine, 128);
        shared[thread] = before + float(thread);
        named_barrier_arrive(2 - mine, 256);
    }
    if (mine == 0) named_barrier_sync(1, 256);
    __syncthreads();
    if (mine == 1) out[thread] = shared[thread];
}

// Something wrong, by number.
HOPPER_KERNEL(128, 2) wrong(TENSOR_MAP x, float* out, int what) {
    unsigned char* shared = dynamic_shared();
    Barrier* barrier = (Barrier*)(shared + matrix_bytes(128));
    const bool first = threadIdx.x == 0;
    if (first && what != 0) {
        barrier_init(barrier, 1);
        if (what != 1) fence_barrier_init();
    }
    if (what != 2) cluster_sync();
    if (what == 0 && first) barrier_arrive(barrier);
    if (what == 1 && first) barrier_arrive_at(barrier, 1 - cluster_rank());
    if (what == 2 && first && cluster_rank() == 0) {
        barrier_wait(barrier, 0);
    } else if (what == 2 && first) {
        return;
    }
    if (what == 3 && first) tma_load(shared + 64, x, barrier, 0, 0);
    if (what == 4 && first) tma_store(x, shared, 0, 0);
    if (what == 5 && first) {
        store16(shared + 16, make_uint4(1, 2, 3, 4));
        tma_load(shared, x, barrier, 0, 0);
    }
    if (what == 6 && first) tma_load(shared + matrix_bytes(128), x, barrier, 0, 0);
    if (what == 7 && first) tma_load(shared, x, barrier, 0, 0);
    if (what == 8 && first) tma_load_multicast(shared, x, barrier, 0, 0, 4);
    if (what == 9 && first && cluster_rank() == 0) {
        barrier_arrive_expecting(barrier, matrix_bytes(32) - 2);
        tma_load(shared, x, barrier, 0, 0);
        barrier_wait(barrier, 0);
    }
    if (what == 10) more_registers<248>();
    if (what == 11) named_barrier_sync(1, threadIdx.x & 32 ? 64 : 128);
    if (what >= 12) {
        float sums[32];
        for (int i = 0; i < 32; i++) sums[i] = 0.0f;
        uint64_t matrix = descriptor_along(shared);
        if (what != 12) wgmma_fence();
        if (what == 13) matrix = descriptor_along(shared + 128);
        if (what == 14) matrix &= ~(uint64_t(3) << 62);
        if (what == 15) matrix = descriptor_along(shared + (first ? 1024 : 0));
        if (what == 17) matrix = descriptor_along(shared + matrix_bytes(72));
        if (what == 18 && threadIdx.x < 32) return;
        wgmma<false, false>(sums, matrix, descriptor_along(shared), true);
        wgmma_commit();
        if (what != 16) wgmma_wait<0>();
        out[threadIdx.x] = sums[0];
    }
    // What nobody waits for is the mistake of 7.
    if (what < 12 && what != 2 && what != 7) cluster_sync();
}
