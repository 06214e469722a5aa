// What the emulation assumes of a GPU, one kernel an assumption: each shows what the hardware does, lane by lane, and
// hardware.rs compares that with what device.cuh and emulation/ say. Inputs and outputs are raw: nothing here goes
// through two conventions that could be wrong alike.
#include "tile.cuh"

// registers [4, 32] = what each lane holds of the matrices that lie in `matrices` [4, 8, 8], by way of shared memory.
KERNEL(32) load_x4(const uint4* matrices, uint32_t* registers, uint32_t* transposed) {
    unsigned char* shared = dynamic_shared();
    const int lane = threadIdx.x;
    store16(shared + lane * 16, matrices[lane]);
    __syncwarp();
    uint32_t r[4];
    ldmatrix_x4(r, shared + lane * 16);
    for (int i = 0; i < 4; i++) registers[i * 32 + lane] = r[i];
    ldmatrix_x4_transposed(r, shared + lane * 16);
    for (int i = 0; i < 4; i++) transposed[i * 32 + lane] = r[i];
}

// The same for two matrices: the addresses of lanes 16 to 31 do not count, and are all the first one.
KERNEL(32) load_x2(const uint4* matrices, uint32_t* registers, uint32_t* transposed) {
    unsigned char* shared = dynamic_shared();
    const int lane = threadIdx.x;
    if (lane < 16) store16(shared + lane * 16, matrices[lane]);
    __syncwarp();
    const unsigned char* row = shared + (lane < 16 ? lane * 16 : 0);
    uint32_t r[2];
    ldmatrix_x2(r, row);
    for (int i = 0; i < 2; i++) registers[i * 32 + lane] = r[i];
    ldmatrix_x2_transposed(r, row);
    for (int i = 0; i < 2; i++) transposed[i * 32 + lane] = r[i];
}

// d [4, 32] += a [4, 32] · b [2, 32], all as the lanes' registers.
KERNEL(32) multiply(const uint32_t* a, const uint32_t* b, float* d) {
    const int lane = threadIdx.x;
    uint32_t ra[4], rb[2];
    float rd[4];
    for (int i = 0; i < 4; i++) ra[i] = a[i * 32 + lane], rd[i] = d[i * 32 + lane];
    for (int i = 0; i < 2; i++) rb[i] = b[i * 32 + lane];
    mma_bf16(rd, ra, rb);
    for (int i = 0; i < 4; i++) d[i * 32 + lane] = rd[i];
}

// A tile [64, WIDTH] through load_tile, of which `rows` and `columns` are inside, and back: in out [64, WIDTH] as
// plain loads find it, in registers [64 / 8, WIDTH / 8, 32] as ldmatrix does.
template <int WIDTH> DEVICE void show_tile(const bf16* matrix, int rows, int columns, uint4* out, uint32_t* registers) {
    constexpr int CHUNKS = WIDTH / 8;
    unsigned char* tile = dynamic_shared();
    load_tile<64, WIDTH, 128>(tile, matrix, WIDTH, 0, rows, 0, columns);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    for (int at = threadIdx.x; at < 64 * CHUNKS; at += 128)
        out[at] = load16(tile + swizzled<CHUNKS>(at / CHUNKS, at % CHUNKS));
    const int lane = lane_index();
    for (int at = warp_index(); at < 8 * CHUNKS; at += 4) {
        uint32_t r[2];
        ldmatrix_x2(r, tile + swizzled<CHUNKS>(at / CHUNKS * 8 + lane % 8, at % CHUNKS));
        registers[at * 32 + lane] = r[0];
    }
}
KERNEL(128) tile_of_16(const bf16* matrix, int rows, int columns, uint4* out, uint32_t* registers) {
    show_tile<16>(matrix, rows, columns, out, registers);
}
KERNEL(128) tile_of_32(const bf16* matrix, int rows, int columns, uint4* out, uint32_t* registers) {
    show_tile<32>(matrix, rows, columns, out, registers);
}
KERNEL(128) tile_of_64(const bf16* matrix, int rows, int columns, uint4* out, uint32_t* registers) {
    show_tile<64>(matrix, rows, columns, out, registers);
}
KERNEL(128) tile_of_128(const bf16* matrix, int rows, int columns, uint4* out, uint32_t* registers) {
    show_tile<128>(matrix, rows, columns, out, registers);
}

// out [32] = in [32] where the lane's number is even, zeros elsewhere: there nothing is read, whatever the address.
KERNEL(32) zero_fill(const uint4* in, uint4* out) {
    uint4* held = (uint4*)dynamic_shared();
    const int t = threadIdx.x;
    held[t] = make_uint4(t, t, t, t);
    bool valid = t % 2 == 0;
    copy_async16(held + t, valid ? in + t : nullptr, valid);
    copy_async_commit();
    copy_async_wait<0>();
    out[t] = held[t];
}

// out [groups, 32]: what a thread finds of each of its copies at the moment that promises it, later ones under way.
KERNEL(32) copies_in_order(const uint4* in, uint4* out) {
    uint4* held = (uint4*)dynamic_shared();
    const int t = threadIdx.x;
    for (int group = 0; group < 4; group++) {
        copy_async16(held + group * 32 + t, in + group * 32 + t);
        copy_async_commit();
    }
    copy_async_wait<3>();
    out[t] = held[t];
    copy_async_wait<2>();
    out[32 + t] = held[32 + t];
    copy_async_wait<1>();
    out[64 + t] = held[64 + t];
    copy_async_wait<0>();
    out[96 + t] = held[96 + t];
}

// What an argument of each kind is: the numbers, whether the pointer is null, and where shared memory begins.
KERNEL(32) arguments(const float* null, int32_t a, float b, uint64_t c, uint32_t d, int64_t e, const bf16* some,
                     uint64_t* out) {
    if (threadIdx.x != 0) return;
    out[0] = uint64_t(null == nullptr);
    out[1] = uint64_t(int64_t(a));
    out[2] = __float_as_uint(b);
    out[3] = c;
    out[4] = d;
    out[5] = uint64_t(e);
    out[6] = some[0].bits;
    out[7] = uint64_t(reinterpret_cast<size_t>(dynamic_shared()) % 1024);
}

// out [blocks] = the block's number.
KERNEL(32) many_blocks(uint32_t* out) {
    if (threadIdx.x == 0) out[blockIdx.x] = blockIdx.x;
}

// One row of 32 numbers for each function of a warp.
KERNEL(32) warp_functions(int* out) {
    const int t = threadIdx.x;
    out[t] = __shfl_sync(ALL_LANES, t, (t + 5) % 32);
    out[32 + t] = __shfl_xor_sync(ALL_LANES, t, 9);
    out[64 + t] = __shfl_down_sync(ALL_LANES, t, 3);
    out[96 + t] = __shfl_up_sync(ALL_LANES, t, 3);
    out[128 + t] = int(__ballot_sync(ALL_LANES, t % 3 == 0));
    out[160 + t] = __any_sync(ALL_LANES, t == 7) * 2 + __all_sync(ALL_LANES, t < 31);
    out[192 + t] = int(warp_sum(float(t)));
    out[224 + t] = int(warp_max(float(t % 17)));
    // Two halves, each for itself.
    uint32_t half = t < 16 ? 0x0000ffffu : 0xffff0000u;
    out[256 + t] = __shfl_xor_sync(half, t, 1);
}

// sums [blocks, 2, 128]: every thread's view of two sums and two maxima over its block, one after the other.
KERNEL(128) block_functions(const float* in, float* sums, float* maxima) {
    float* scratch = (float*)dynamic_shared();
    const int t = blockIdx.x * 128 + threadIdx.x;
    sums[2 * t] = block_sum(in[t], scratch);
    maxima[2 * t] = block_max(in[t], scratch);
    sums[2 * t + 1] = block_sum(-2.0f * in[t], scratch);
    maxima[2 * t + 1] = block_max(-in[t], scratch);
}

// The threads from `first_leaving` on end before the barrier that the others meet at.
KERNEL(96) early_exit(float* out, int first_leaving) {
    float* held = (float*)dynamic_shared();
    const int t = threadIdx.x;
    if (t >= first_leaving) return;
    held[t] = float(t);
    __syncthreads();
    out[t] = held[first_leaving - 1 - t];
}

// Conversions to bf16, alone and as the high and the low one of a pair, and back.
KERNEL(64) conversions(const float* in, bf16* alone, uint32_t* pairs, float* back, int count) {
    for (int i = threadIdx.x; i < count; i += 64) {
        alone[i] = to_bf16(in[i]);
        pairs[i] = pack_bf16(in[i], -in[i]);
        back[2 * i] = unpack_bf16(pairs[i]).x;
        back[2 * i + 1] = to_float(alone[i]);
    }
}

// out [6, count]: arithmetic that is correctly rounded. No denormal is flushed, nothing is contracted that says _rn.
KERNEL(64) exact_arithmetic(const float* x, const float* y, const float* z, float* out, int count) {
    for (int i = threadIdx.x; i < count; i += 64) {
        out[i] = x[i] / y[i];
        out[count + i] = sqrtf(fabsf(x[i]));
        out[2 * count + i] = __fadd_rn(z[i], __fmul_rn(x[i], y[i]));
        out[3 * count + i] = fmaf(x[i], y[i], z[i]);
        out[4 * count + i] = fmaxf(x[i], y[i]);
        out[5 * count + i] = float(double(x[i]) * double(y[i]) + double(z[i]));
    }
}

// out [4, count]: functions that are right to a few units in the last place.
KERNEL(64) near_arithmetic(const float* x, float* out, int count) {
    for (int i = threadIdx.x; i < count; i += 64) {
        out[i] = exp2_fast(x[i]);
        out[count + i] = expm1f(x[i]);
        out[2 * count + i] = logf(fabsf(x[i]));
        out[3 * count + i] = reciprocal_fast(1.0f + exp2_fast(-x[i]));
    }
}
