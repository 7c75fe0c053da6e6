// Small fp64 training steps for the tests of gradients: a call in both directions on waves (attention_inputs.h).
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "attention_inputs.h"
#include "tessera/backward.h"

namespace tessera {

// Multiples of 2^-10.
inline std::vector<double> coarse_wave(int64_t n, double a, double b) {
  std::vector<double> x = wave(n, a, b);
  for (double& value : x) value = std::round(value * 0x1p10) * 0x1p-10;
  return x;
}

// A call in both directions. Not copyable: args point into the other members.
struct Training : Call {
  Numbers dout, dlse, dq, dk, dv, dblock_bias, dattn_bias, dsinks;
  Numbers alibi, block_bias, attn_bias, sinks;
  std::vector<int64_t> key_lengths;

  Training(const Shape& s, const BlockPattern& pattern)
      : Call(s, DType::f64, pattern, DType::f64, DType::f64),
        dout(DType::f64, {s.batch, s.seqlen_q, s.heads, s.head_dim_v},
             wave(s.batch * s.seqlen_q * s.heads * s.head_dim_v, 0.9, 0.3)),
        dlse(DType::f64, {s.batch, s.heads, s.seqlen_q}, wave(s.batch * s.heads * s.seqlen_q, 1.1, 0.7)),
        dq(DType::f64, {s.batch, s.seqlen_q, s.heads, s.head_dim}),
        dk(DType::f64, {s.batch, s.seqlen_k, s.kv_heads, s.head_dim}),
        dv(DType::f64, {s.batch, s.seqlen_k, s.kv_heads, s.head_dim_v}) {}

  AttentionOptions& options() { return args.options; }
  void give_block_bias(int64_t batches, int64_t heads) {
    const int64_t entries = args.pattern.num_blocks();
    block_bias = Numbers(DType::f32, {batches, heads, entries}, coarse_wave(batches * heads * entries, 0.6, 0.2));
    dblock_bias = Numbers(DType::f32, {batches, heads, entries});
    options().block_bias = block_bias.view;
  }
  void give_attn_bias(int64_t b, int64_t h, int64_t q, int64_t k) {
    attn_bias = Numbers(DType::f64, {b, h, q, k}, wave(b * h * q * k, 0.9, 0.2));
    dattn_bias = Numbers(DType::f64, {b, h, q, k});
    options().attn_bias = attn_bias.view;
  }
  void give_sinks() {
    sinks = Numbers(DType::f32, {shape.heads}, coarse_wave(shape.heads, 2.1, 0.4));
    dsinks = Numbers(DType::f32, {shape.heads});
    options().sinks = sinks.view;
  }
  void give_alibi(bool per_batch) {
    std::vector<double> slopes = wave(shape.batch * shape.heads, 0.5, 0.1);
    if (!per_batch) slopes.resize(shape.heads);
    alibi = per_batch ? Numbers(DType::f32, {shape.batch, shape.heads}, slopes)
                      : Numbers(DType::f32, {shape.heads}, slopes);
    options().alibi_slopes = alibi.view;
  }

  BackwardArgs backward_args() const {
    BackwardArgs a;
    a.q = args.q;
    a.k = args.k;
    a.v = args.v;
    a.pattern = args.pattern;
    a.out = args.out;
    a.lse = args.lse;
    a.dout = dout.view;
    a.dlse = dlse.view;
    a.dq = dq.view;
    a.dk = dk.view;
    a.dv = dv.view;
    a.dblock_bias = dblock_bias.view;
    a.dattn_bias = dattn_bias.view;
    a.dsinks = dsinks.view;
    a.options = args.options;
    return a;
  }

  void forward() {
    InlineExecutor executor;
    reference_forward(args, executor);
  }
  double loss() {
    forward();
    double sum = 0;
    for (int64_t i = 0; i < out.view.numel(); ++i) sum += out.get(i) * dout.get(i);
    for (int64_t i = 0; i < lse.view.numel(); ++i) {
      if (lse.get(i) != -std::numeric_limits<double>::infinity()) sum += lse.get(i) * dlse.get(i);
    }
    return sum;
  }
};

}  // namespace tessera
