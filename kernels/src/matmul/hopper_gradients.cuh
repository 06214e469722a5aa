// The gradients of adapters, which are tasks of a launch of products on Hopper (hopper_product.cuh):
//
//     gradient [columns, ranks] += scale weight ∘ (vᵀ u)        v [tokens, columns], u [tokens, R]
//
// dB has v = dy; dA, of which the transpose lies in memory, v = x and u = du, for up to three layers that read x with their du beside each
// other. `weight` is the norm's that x came through, a number a column.
//
// A persistent product gives some clusters a tile more than others, which wait for them; a gradient only reads v, with hardly any
// arithmetic. So clusters with a tile less make gradients in the meantime: a task is 256 columns (128 for each block, 64 for each of its
// multiplying warpgroups) and up to 64 of the ranks over all tokens, summed in one order whoever makes it. A slice of it
// takes the place of one of a tile in the ring:
//
//     v [TOKENS, 64] for each multiplying warpgroup, read across the rows as the left factor
//     u [TOKENS, 64], zeros where it has ended, read across as well: one product for all ranks, 16, 32, 48 or 64 of them
//
// Each block loads half of u for both. What bounds a task is how fast one multiprocessor fetches v. Clusters make their tasks after
// different numbers of tiles, or all would fetch at once.
#pragma once
#include "hopper_product.cuh"

// As matmul/cuda/hopper/gradients.rs.
constexpr int TASK_COLUMNS = CLUSTER * MULTIPLIERS * 64;
constexpr int TASK_RANKS = 64;

constexpr int TOKENS = TILE_N / 2;
constexpr int PANEL_BYTES = TOKENS * ROW_BYTES;
constexpr int SLICE_BYTES = (MULTIPLIERS + 1) * PANEL_BYTES;
// Tokens that the tensor cores sum, which may cut off what does not fit instead of rounding; spans are added by ordinary additions.
constexpr int SPAN = 1024;
static_assert(SPAN % TOKENS == 0, "spans are whole slices");
static_assert(SLICE_BYTES <= STAGE_BYTES, "a slice takes a stage");
static_assert(PANEL_BYTES % (CLUSTER * 1024) == 0, "halves of u begin where the swizzle's pattern does");

// Numbers of a gradient. `ranks`: R, of all matrices beside each other; the second begins at `second_at`, the third at `third_at`, and
// of each only so many count. In memory a column is `column_stride` numbers behind the one before, a rank `rank_stride`.
struct Sides {
    int tokens, columns, ranks, second_at, third_at, of_first, of_second, of_third, column_stride, rank_stride;
    float scale;
};

struct Gradient {
    const TensorMap *v, *u;
    float *first, *second, *third;
    // May be null.
    const bf16* weight;
    Sides sides;

    DEVICE int parts() const { return divide_up(sides.ranks, TASK_RANKS); }
    DEVICE int tasks() const { return divide_up(sides.columns, TASK_COLUMNS) * parts(); }

    // += the calling thread's sums of the part's 64 columns, from `column` on, and of 16 GROUPS ranks from `rank` on.
    template <int GROUPS>
    DEVICE void add(const float (&sums)[8 * GROUPS], Part part, int column, int rank) const {
        column += part.thread / 32 * 16 + part.thread % 32 / 4;
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            int from = rank + 16 * group;
            bool in_third = from >= sides.third_at, in_second = from >= sides.second_at;
            float* to = in_third ? third : in_second ? second : first;
            int count = in_third ? sides.of_third : in_second ? sides.of_second : sides.of_first;
            from += part.thread % 4 * 2 - (in_third ? sides.third_at : in_second ? sides.second_at : 0);
            // Of the group's sum i: its column and its rank.
            auto column_of = [&](int i) { return column + i / 2 % 2 * 8; };
            auto rank_of = [&](int i) { return from + i / 4 * 8 + i % 2; };
            auto place = [&](int i) -> float& { return to[column_of(i) * sides.column_stride + rank_of(i) * sides.rank_stride]; };
            auto inside = [&](int i) { return column_of(i) < sides.columns && rank_of(i) < count; };
            // All reads before the first write, or each would be waited for.
            float before[8];
#pragma unroll
            for (int i = 0; i < 8; i++) before[i] = inside(i) ? place(i) : 0.0f;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (!inside(i)) continue;
                float factor = weight ? sides.scale * to_float(weight[column_of(i)]) : sides.scale;
                place(i) = before[i] + factor * sums[8 * group + i];
            }
        }
    }
};

// What is left to do of a cluster's tasks: every `step`th from `task` on, before `end`.
struct Share {
    int task, step, end;
};

// Those of a launch that has room for so many.
template <int MOST>
struct Gradients {
    // What is not there has no columns.
    Gradient of[MOST];
    // Tasks of a cluster that has a tile less than others, or where none has, of each.
    int of_idle;
    // The launch's tasks: `task` and on, before `last`.
    int task, last;

    // They are read from shared memory: held in registers beside a tile's sums they do not fit, and parameters have no numbers.
    DEVICE static Gradient* table(const Shared& shared) { return static_cast<Gradient*>(shared.tasks); }
    DEVICE void prepare(const Shared& shared) const {
#pragma unroll
        for (int i = 0; i < MOST; i++) table(shared)[i] = of[i];
    }

    DEVICE Share share(const Tiles& tiles) const {
        const int clusters = int(gridDim.x) / CLUSTER, cluster = int(blockIdx.x) / CLUSTER;
        const int busy = tiles.all() % clusters, idle = clusters - busy, border = min(task + of_idle * idle, last);
        return cluster < busy ? Share{border + cluster, busy, last} : Share{task + cluster - busy, idle, border};
    }

    // The gradient of a task, whose number becomes the one within it.
    DEVICE static const Gradient& of_task(const Shared& shared, int& task) {
        const Gradient* it = table(shared);
        for (; task >= it->tasks(); it++) task -= it->tasks();
        return *it;
    }

    DEVICE static int after(const Tiles& tiles) {
        const int clusters = int(gridDim.x) / CLUSTER, cluster = int(blockIdx.x) / CLUSTER;
        return cluster % (divide_up(tiles.all() - cluster, clusters) + 1);
    }

    DEVICE void copy(const Shared& shared, Turn& turn, const Tiles& tiles) const {
        const int rank = int(cluster_rank());
        for (Share left = share(tiles); left.task < left.end; left.task += left.step) {
            int task = left.task;
            const Gradient& it = of_task(shared, task);
            int column = (task / it.parts() * CLUSTER + rank) * (TASK_COLUMNS / CLUSTER), first = task % it.parts() * TASK_RANKS;
            for (int token = 0; token < it.sides.tokens; token += TOKENS, turn.next()) {
                barrier_wait(shared.empty + turn.stage, turn.parity ^ 1);
                Barrier* full = shared.full + turn.stage;
                unsigned char* stage = shared.ring + turn.stage * STAGE_BYTES;
                barrier_arrive_expecting(full, SLICE_BYTES);
#pragma unroll
                for (int panel = 0; panel < MULTIPLIERS; panel++)
                    tma_load(stage + panel * PANEL_BYTES, *it.v, full, column + 64 * panel, token);
                tma_load_multicast(stage + MULTIPLIERS * PANEL_BYTES + rank * (PANEL_BYTES / CLUSTER), *it.u, full, first,
                                   token + rank * (TOKENS / CLUSTER), 3);
            }
        }
    }

    DEVICE void make(const Shared& shared, Turn& turn, const Tiles& tiles, Part part) const {
        for (Share left = share(tiles); left.task < left.end; left.task += left.step) {
            int task = left.task;
            const Gradient& it = of_task(shared, task);
            int block = task / it.parts() * CLUSTER + int(cluster_rank());
            int column = (block * MULTIPLIERS + part.index) * 64, rank = task % it.parts() * TASK_RANKS;
            int groups = divide_up(min(it.sides.ranks - rank, TASK_RANKS), 16);
            if (groups == 1) sum_tokens<1>(shared, turn, it, part, column, rank);
            else if (groups == 2) sum_tokens<2>(shared, turn, it, part, column, rank);
            else if (groups == 3) sum_tokens<3>(shared, turn, it, part, column, rank);
            else sum_tokens<4>(shared, turn, it, part, column, rank);
        }
    }

    template <int GROUPS>
    DEVICE static void sum_tokens(const Shared& shared, Turn& turn, const Gradient& it, Part part, int column, int rank) {
        float all[8 * GROUPS] = {};
        for (int first = 0; first < it.sides.tokens; first += SPAN) {
            float sums[8 * GROUPS] = {};
            int before = turn.stage, last = min(first + SPAN, it.sides.tokens);
            for (int token = first; token < last; token += TOKENS, turn.next()) {
                barrier_wait(shared.full + turn.stage, turn.parity);
                unsigned char* stage = shared.ring + turn.stage * STAGE_BYTES;
                uint64_t v = descriptor_across(stage + part.index * PANEL_BYTES, 0);
                uint64_t u = descriptor_across(stage + MULTIPLIERS * PANEL_BYTES, 0);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < TOKENS / STEP; k++)
                    wgmma<true, true>(sums, advanced(v, STEP * ROW_BYTES * k), advanced(u, STEP * ROW_BYTES * k), true);
                wgmma_commit();
                wgmma_wait<1>();
                if (token > first) release(shared, before, part.thread);
                before = turn.stage;
            }
            wgmma_wait<0>();
            hold(sums);
            release(shared, before, part.thread);
#pragma unroll
            for (int i = 0; i < 8 * GROUPS; i++) all[i] += sums[i];
        }
        it.add<GROUPS>(all, part, column, rank);
    }
};
