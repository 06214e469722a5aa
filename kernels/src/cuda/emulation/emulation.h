// Executes a kernel's source as C++17 on the processor: device.cuh includes this where it is not NVRTC that compiles.
//
// Every CUDA thread is a fiber: a stack of its own, left and entered by a switch of a dozen instructions. A fiber runs
// until it must wait for others: at __syncthreads until every live thread of the block is there, at a warp's
// collective (__shfl_sync, ldmatrix, mma) until every live lane of its mask is. Then another one that can
// go on is drawn. The blocks of a cluster run together, their threads drawn as those of one block. The seed decides who,
// so that a missing barrier shows as a wrong number under some seed:
//   seed 0         in turn, beginning with thread 0
//   any other      each cluster draws one of: in turn, whoever became ready last, anyone; they run backwards if odd; all but
//                  one of its blocks may begin only when nothing else can happen
//
// What a GPU leaves undefined is made to show:
//   * shared memory is filled with 0xFF, NaN in bf16 and in f32, when a block starts, and lies between addresses that
//     cannot be accessed; where it does not fill its pages, what is left over is checked for writes when the block ends
//   * the target of an asynchronous copy is 0xFF from its start until the wait that promises it
//   * a lane that reads from a lane outside the mask gets 0xFF
//   * a collective that some lanes do not reach, misaligned wide accesses, division by zero, a full stack: errors
// An error ends the launch with a message that names kernel, block and thread; nobody's process dies of it.
//
// What only Hopper has is in hopper.h.
//
// Not emulated: bank conflicts, memory fences, the order in which tensor cores add.
#pragma once
#include "cuda.h"
#include "table.h"
