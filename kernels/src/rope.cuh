// The rotation of a pair, for rope.cu and for the products that rotate what they write: rounded in one way everywhere.
#pragma once
#include "device.cuh"

DEVICE void turn(float& first, float& second, float cosine, float sine) {
    float turned = fmaf(first, cosine, -__fmul_rn(second, sine));
    second = fmaf(second, cosine, __fmul_rn(first, sine));
    first = turned;
}
