// The gated activation of single numbers, for swiglu.cu and for the products that end or begin with it: rounded in one way
// everywhere.
#pragma once
#include "device.cuh"

constexpr float LOG2_E = 1.4426950408889634f;

struct Activation {
    float sigma, silu;
};

// e^-gate may be infinite; σ is then 0, as it should be.
DEVICE Activation activate(float gate) {
    float sigma = reciprocal_fast(1.0f + exp2_fast(-LOG2_E * gate));
    return {sigma, gate * sigma};
}

DEVICE float activated(Activation gate, float up) { return gate.silu * up; }

// (dgate, dup)
DEVICE float2 slopes(float dout, Activation gate, float up) {
    return make_float2(dout * up * fmaf(gate.silu, 1.0f - gate.sigma, gate.sigma), dout * gate.silu);
}
