// Kernels that the emulated device is tested with: each does one thing that can be done wrong.
#include "device.cuh"

// out = in, reversed within each block of 128.
KERNEL(128) reverse(const float* in, float* out) {
    float* held = (float*)dynamic_shared();
    const int t = threadIdx.x, first = blockIdx.x * 128;
    held[t] = in[first + t];
    __syncthreads();
    out[first + t] = held[127 - t];
}

// out[i] = sum over tiles of in[tile, i]: tiles of 32 numbers × 16 bytes through two buffers, one ahead.
KERNEL(32) pipeline(const uint4* in, float* out, int tiles) {
    uint4* buffers = (uint4*)dynamic_shared();
    const int t = threadIdx.x;
    copy_async16(buffers + t, in + t);
    copy_async_commit();
    float4 sum = make_float4(0, 0, 0, 0);
    for (int tile = 0; tile < tiles; tile++) {
        bool more = tile + 1 < tiles;
        copy_async16(buffers + (tile + 1) % 2 * 32 + t, in + (tile + 1) * 32 + t, more);
        copy_async_commit();
        copy_async_wait<1>();
        __syncwarp();
        // A neighbour's piece: the warp's barrier counts.
        uint4 piece = buffers[tile % 2 * 32 + (t + 1) % 32];
        sum.x += __uint_as_float(piece.x), sum.y += __uint_as_float(piece.y);
        sum.z += __uint_as_float(piece.z), sum.w += __uint_as_float(piece.w);
        __syncwarp(); // all have read what the next copy overwrites
    }
    ((float4*)out)[(t + 1) % 32] = sum;
}

// d [16, 8] = a [16, 16] · b [16, 8], b as it lies or from its transpose [8, 16].
KERNEL(32) product(const bf16* a, const bf16* b, const bf16* b_transposed, float* d, float* d_transposed) {
    unsigned char* shared = dynamic_shared();
    const int lane = lane_index();
    store16(shared + lane * 16, load16((const char*)a + lane * 16));
    store16(shared + 512 + lane % 16 * 16, load16((const char*)b + lane % 16 * 16));
    store16(shared + 768 + lane % 16 * 16, load16((const char*)b_transposed + lane % 16 * 16));
    __syncwarp();
    uint32_t ra[4], rb[2];
    ldmatrix_x4(ra, shared + lane % 16 * 32 + lane / 16 * 16);
    ldmatrix_x2_transposed(rb, shared + 512 + lane % 16 * 16);
    float sum[4] = {0, 0, 0, 0};
    mma_bf16(sum, ra, rb);
    const int row = lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < 4; i++) d[(row + i / 2 * 8) * 8 + column + i % 2] = sum[i];
    // The same a by way of its transpose, the same b from its own.
    __syncwarp();
    for (int i = 0; i < 8; i++) {
        int at = lane * 8 + i;
        ((bf16*)shared)[at % 16 * 16 + at / 16] = a[at];
    }
    __syncwarp();
    ldmatrix_x4_transposed(ra, shared + (lane % 8 + lane / 16 * 8) * 32 + lane / 8 % 2 * 16);
    ldmatrix_x2(rb, shared + 768 + lane % 8 * 32 + lane / 8 % 2 * 16);
    for (int i = 0; i < 4; i++) sum[i] = 0;
    mma_bf16(sum, ra, rb);
    for (int i = 0; i < 4; i++) d_transposed[(row + i / 2 * 8) * 8 + column + i % 2] = sum[i];
}

// The first half of out.
KERNEL(32) half_written(float* out) {
    if (threadIdx.x < 16) out[threadIdx.x] = 1.0f;
}

__attribute__((noinline)) float fill_stack(int t) {
    volatile char local[100000];
    for (int i = 0; i < 100000; i++) local[i] = char(i);
    return local[t];
}

// Something wrong, by number.
KERNEL(64) wrong(float* memory, int count, int what, int zero) {
    unsigned char* shared = dynamic_shared();
    float* floats = (float*)shared;
    const int t = threadIdx.x;
    if (what == 0 && t == 33) memory[0] = memory[count + 4];
    if (what == 1 && t == 33) memory[count + 5] = 1;
    if (what == 2 && t == 33) memory[-2000] = 1;
    if (what == 3 && t == 33) floats[256] = 1;
    if (what == 4 && t == 33) memory[0] = floats[-2000];
    if (what == 5 && t == 33) memory[0] = float(t / zero);
    if (what == 6 && t == 33) memory[0] = fill_stack(t);
    if (what == 7 && t == 33) store16(memory + 1, make_uint4(0, 0, 0, 0));
    if (what == 8 && t < 16) __syncwarp();
    if (what == 8 && t >= 16) __syncthreads();
    if (what == 9 && t < 40) __syncthreads();
    if (what == 9) __syncwarp();
    if (what == 10 && t % 2) __shfl_xor_sync(ALL_LANES, t, 1);
    if (what == 10 && t % 2 == 0) __syncwarp();
    if (what == 11) {
        uint32_t r[4];
        ldmatrix_x4(r, shared + 1024 - t * 16);
    }
    if (what == 12 && t == 33) copy_async16(shared + 8, memory);
    if (what == 13 && t == 33) copy_async16(shared, memory + 8192);
    if (what == 14 && t < 31) __syncwarp(1u << 31);
    if (what == 15 && t == 33) memory[count] = 1;
}
