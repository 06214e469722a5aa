// What attention's kernels share on every GPU: which rows of a tile are which tokens, which of them see which. The lesson
// is in attention.cu.
#pragma once

#include "device.cuh"

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// ---- which tokens ----

// Consecutive tokens of a text.
struct Span {
    int row, position, tokens;
};

// The position behind its last token.
DEVICE int end_of(const Span& span) { return span.position + span.tokens; }

// The runs that a block still has to meet, and how many tokens of the first of them it has met.
struct Walk {
    int run, end, met;
};

// The next tokens, at most `most`; none at the end.
DEVICE Span next_span(Walk& walk, const int* runs, int most) {
    if (walk.run == walk.end) return Span{0, 0, 0};
    const int* run = runs + 3 * walk.run;
    Span span{run[0] + walk.met, run[1] + walk.met, min(most, run[2] - walk.met)};
    walk.met += span.tokens;
    if (walk.met == run[2]) {
        walk.run++;
        walk.met = 0;
    }
    return span;
}

// What the block has of the tiles: that of its number, where it has one.
DEVICE Span own_span(const int* tiles, int number = blockIdx.x) {
    const int* tile = tiles + 5 * number;
    return Span{tile[0], tile[1], tile[2]};
}

DEVICE Walk own_walk(const int* tiles, int number = blockIdx.x) {
    const int* tile = tiles + 5 * number;
    return Walk{tile[3], tile[4], 0};
}

// The tokens of `span` that rows first .. first + rows - 1 stand for, `sharing` rows each.
DEVICE Span tokens_of(const Span& span, int first, int rows, int sharing) {
    int start = first / sharing, end = min((first + rows - 1) / sharing + 1, span.tokens);
    return Span{span.row + start, span.position + start, max(end - start, 0)};
}

DEVICE bool sees_none(const Span& queries, const Span& keys, int window) {
    return queries.tokens <= 0 || keys.position >= end_of(queries) || queries.position - (end_of(keys) - 1) >= window;
}

DEVICE bool sees_all(const Span& queries, const Span& keys, int window) {
    return end_of(keys) - 1 <= queries.position && end_of(queries) - 1 - keys.position < window;
}

// Half-open columns of a tile.
struct Columns {
    int first, end;
};

// The keys that the query at `position` sees.
DEVICE Columns keys_of(int position, const Span& keys, int window) {
    int last = position - keys.position;
    return Columns{last - window + 1, min(last + 1, keys.tokens)};
}

// The stacked queries that see the key at `position`.
DEVICE Columns queries_of(int position, const Span& queries, int window) {
    int first = position - queries.position;
    return Columns{first * SHARING, min(first + window, queries.tokens) * SHARING};
}

// ---- rows ----

// Row `row` of a span in a matrix [T, heads], from the span's first row; `sharing` rows a token.
template <int sharing>
DEVICE int row_within(int row, int kv_heads) {
    return row / sharing * (kv_heads * sharing) + row % sharing;
}

// The first row of a span in a matrix [T, heads], of the block's key head.
template <int sharing>
DEVICE size_t first_row(const Span& span, int kv_heads, int head = blockIdx.y) {
    return (size_t(span.row) * kv_heads + head) * sharing;
}
