// Gradients of block-sparse attention: dq, dk, dv, and those of the biases and sinks.
//
// With P = exp(score - lse) over the admitted keys and delta = rowsum(dout * out) - dlse,
//   dv += P^T dout,   dscore = P * (dout v^T - delta),   dq += scale * dscore k,   dk += scale * dscore^T q
// (FlashAttention, Dao et al. 2022, algorithm 4; softcap multiplies dscore by 1 - tanh^2). Weights are recomputed
// block by block. Deterministic: bit-equal from run to run and for any number of threads. A row that sees no key gives
// and gets zero gradients; whatever bytes lie in skipped blocks, masked positions or past the end, in dout as well,
// reach no gradient.
#pragma once

#include <cstddef>
#include <span>

#include "tessera/attention.h"

namespace tessera {

struct BackwardArgs {
  TensorView q;          // [B, Sq, H, D]; last stride 1
  TensorView k;          // [B, Sk, Hkv, D]
  TensorView v;          // [B, Sk, Hkv, Dv]
  BlockPattern pattern;  // of (Sq, Sk)
  TensorView out;        // [B, Sq, H, Dv], dtype of q: what forward() gave
  TensorView lse;        // fp32 [B, H, Sq] (fp64 inputs: or fp64): what forward() gave. Both may also be joined over
                         // more keys than this pattern's (merge): the gradients are then those of the joined result
  TensorView dout;       // [B, Sq, H, Dv], dtype of q; last stride 1
  TensorView dlse;       // gradient that reaches lse, as lse; may be undefined: 0
  // Each may be undefined: not wanted. dtype of q, or fp32; all that are given have the same one. Must not overlap an
  // input or each other.
  MutableTensorView dq;     // [B, Sq, H, D]; last stride 1
  MutableTensorView dk;     // [B, Sk, Hkv, D]
  MutableTensorView dv;     // [B, Sk, Hkv, Dv]
  bool accumulate = false;  // adds to dq, dk and dv instead of writing them; they are then fp32 (fp64 inputs: fp64)
  MutableTensorView dblock_bias;  // fp32, the sizes of options.block_bias; written. May be undefined
  MutableTensorView dattn_bias;   // fp32 or the dtype of attn_bias, the sizes of options.attn_bias; written, 0 for
                                  // pairs that are not admitted. May be undefined
  MutableTensorView dsinks;       // fp32 [H]; written. May be undefined
  AttentionOptions options;       // those of the forward call
  Isa isa = Isa::automatic;
};

struct BackwardInfo {
  Isa isa = Isa::automatic;  // the one that ran; automatic for the fp64 reference
  size_t scratch_bytes = 0;  // allocated by the call, all threads together, fp32 gradients of 16-bit tensors included
};

// dtypes as in forward(). Sums are fp32 (fp64 for fp64), rounded once to the dtype of the gradient.
BackwardInfo backward(const BackwardArgs& args, Executor& executor);

// Packed sequences, as VarlenForwardArgs.
struct VarlenBackwardArgs {
  TensorView q;                            // [total_q, H, D]
  TensorView k;                            // [total_k, Hkv, D]
  TensorView v;                            // [total_k, Hkv, Dv]
  TensorView out, dout;                    // [total_q, H, Dv]
  TensorView lse;                          // fp32 [H, total_q]
  TensorView dlse;                         // fp32 [H, total_q]; may be undefined
  MutableTensorView dq, dk, dv;            // as q, k, v; each may be undefined
  MutableTensorView dsinks;                // fp32 [H]; may be undefined
  std::span<const int64_t> cu_seqlens_q;   // [N + 1]
  std::span<const int64_t> cu_seqlens_k;   // [N + 1]
  std::span<const BlockPattern> patterns;  // [N]
  AttentionOptions options;
  Isa isa = Isa::automatic;
};
BackwardInfo backward_varlen(const VarlenBackwardArgs& args, Executor& executor);

// Bounds on the rounding errors that backward() may make, contiguous, of the sizes of the gradients; null: not wanted.
// Derived from epsilon and the terms of each sum, roundings taken as independent: an element exceeds its bound with a
// probability below 1e-13 (Higham & Mary 2019). Not so where rows are copies of each other, as are their errors then.
// Of fp64 gradients the last rounding, to the dtype of a gradient, is left out.
struct GradientBounds {
  float* dq = nullptr;
  float* dk = nullptr;
  float* dv = nullptr;
  float* dblock_bias = nullptr;
  float* dattn_bias = nullptr;
  float* dsinks = nullptr;
};

// The same gradients in fp64 throughout, by the plainest code there is: the oracle of the tests. `out` and `lse` of
// args are not used (they are recomputed in fp64) and may be undefined; the gradients may be fp64 whatever the inputs
// are.
void reference_backward(const BackwardArgs& args, Executor& executor, const GradientBounds& bounds = {});

}  // namespace tessera
