// What logprob.cu and hopper_logprob.cu have in common: strips of logits.
#pragma once
#include "device.cuh"

constexpr float LOG2_E = 1.4426950408889634f;
// Entries whose weights have one largest logit.
constexpr int STRIP = 64;

// What is taken off every logit of a strip. A strip past the end has nothing but -inf, of which no difference may be taken.
DEVICE float shift_of(float largest) { return largest == NEG_INFINITY ? 0.0f : largest; }

// Weights are e^(logit - c), c being 0 while a strip's largest logit is within this of 0, else that logit. bf16 has f32's
// exponents, so a weight is as precise at e^44 as at 1, one more than e^43 below its strip's largest may become 0, and the weights of
// nearly every token have one c: then they are the left factor of a product as they are.
constexpr float MODERATE = 44.0f;

DEVICE float weight_shift(float largest) { return fabsf(largest) <= MODERATE ? 0.0f : shift_of(largest); }

DEVICE float exp_fast(float x) { return exp2_fast(x * LOG2_E); }
