// BackwardProblem: a validated, fully resolved backward call as plain numbers and pointers.
#pragma once

#include <cstdint>
#include <vector>

#include "call/problem.h"
#include "tessera/backward.h"

namespace tessera {

struct BackwardProblem {
  // out and lse of `forward` are inputs here: what the forward call gave.
  Problem forward;
  TransposedView transposed;          // of the pattern
  Strided dout;                       // [B, Sq, H, Dv], forward.dtype
  Strided dlse;                       // [B, H, Sq] in forward.lse_dtype; data nullptr: none
  DType gradient_dtype = DType::f32;  // of dq, dk, dv
  Strided dq, dk, dv;                 // data nullptr: not wanted
  bool accumulate = false;            // add to them; gradient_dtype is then f32 (f64 inputs: f64)
  float* dblock_bias = nullptr;       // of entry e: [b * dbias_batch + h * dbias_head + e * dbias_entry]
  // Sizes of block_bias: a stride of a size 1 dimension is 0, and gradients of all batches (heads) sum up there.
  int64_t dbias_batch = 0, dbias_head = 0, dbias_entry = 0;
  char* dattn_bias = nullptr;
  DType dattn_bias_dtype = DType::f32;
  int64_t dattn_bias_stride[4] = {0, 0, 0, 0};  // b, h, q, k; 0 where attn_bias has size 1: gradients sum up there
  int64_t dattn_bias_size[4] = {0, 0, 0, 0};    // B or 1, H or 1, Sq or 1, Sk or 1
  float* dsinks = nullptr;  // of head h: dsinks[h * dsinks_head]; summed over batches (and packed sequences)
  int64_t dsinks_head = 0;

  // What is wanted decides what is computed: the sums over columns at all, and dscores in them.
  bool wants_dscores() const { return dq.data != nullptr || dk.data != nullptr || dblock_bias != nullptr; }
  bool wants_columns() const { return wants_dscores() || dv.data != nullptr; }

  double load_dlse(int64_t b, int64_t h, int64_t q) const {  // 0 where it is not given
    if (dlse.data == nullptr) return 0;
    return load_as_double(dlse.at(b, q, h, size_of(forward.lse_dtype)), forward.lse_dtype, 0);
  }
};

// Validates every field (Error names the argument, what came, what is allowed) and resolves defaults. Purpose::forward:
// what backward() takes. Purpose::reference: out and lse may be undefined, gradients may be fp64. The result borrows
// all pointers: args must outlive it.
BackwardProblem resolve_backward(const BackwardArgs& args, Purpose purpose = Purpose::forward);
std::vector<BackwardProblem> resolve_backward_varlen(const VarlenBackwardArgs& args);

}  // namespace tessera
