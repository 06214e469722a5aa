// Adapters of layers that share something, as kernels take them: up to three, whose ranks, multiples of 16, lie beside each other.
#pragma once
#include "device.cuh"

// Their matrices, and where the second and the third begin, counted in groups of 16 of the ranks. What is not there has no groups.
template <class Matrix>
struct Three {
    Matrix *first, *second, *third;
    int second_at, third_at;

    // Which matrix a group belongs to, and the group's number in it.
    DEVICE int index(int group) const { return group >= third_at ? 2 : group >= second_at ? 1 : 0; }
    DEVICE Matrix* of(int group, int& inside) const {
        int which = index(group);
        inside = group - begin(which);
        return which == 2 ? third : which == 1 ? second : first;
    }
    DEVICE int begin(int which) const { return which == 2 ? third_at : which == 1 ? second_at : 0; }
    // Groups of a matrix, of so many in all.
    DEVICE int length(int which, int groups) const {
        return which == 2 ? groups - third_at : which == 1 ? third_at - second_at : second_at;
    }
};
