// Every mistake that a caller of backward() can make and a caller of forward() cannot gives an Error that names the
// argument; the rest is resolve()'s (attention_resolve_test.cc), of which one a kind is tried here to see that it is
// called. Sizes are tiny: only validation runs.
#include <gtest/gtest.h>

#include <functional>
#include <limits>

#include "attention_inputs.h"
#include "call/backward_problem.h"

namespace tessera {
namespace {

const Shape kShape{
    .batch = 2, .seqlen_q = 20, .seqlen_k = 24, .heads = 4, .kv_heads = 2, .head_dim = 8, .head_dim_v = 6};

// A good call with every gradient. Not copyable: args point into the other members.
struct GradientCall {
  Call call;
  Numbers dout, dlse, dq, dk, dv, block_bias, dblock_bias, attn_bias, dattn_bias, sinks, dsinks;
  BackwardArgs args;

  explicit GradientCall(DType dtype = DType::f32)
      : call(kShape, dtype, dense_pattern(20, 24)),
        dout(dtype, {2, 20, 4, 6}),
        dlse(DType::f32, {2, 4, 20}),
        dq(dtype, {2, 20, 4, 8}),
        dk(dtype, {2, 24, 2, 8}),
        dv(dtype, {2, 24, 2, 6}),
        block_bias(DType::f32, {1, 4, 4}),
        dblock_bias(DType::f32, {1, 4, 4}),
        attn_bias(DType::bf16, {2, 1, 20, 24}),
        dattn_bias(DType::bf16, {2, 1, 20, 24}),
        sinks(DType::f32, {4}),
        dsinks(DType::f32, {4}) {
    args.q = call.args.q;
    args.k = call.args.k;
    args.v = call.args.v;
    args.pattern = call.args.pattern;
    args.out = call.args.out;
    args.lse = call.args.lse;
    args.dout = dout.view;
    args.dlse = dlse.view;
    args.dq = dq.view;
    args.dk = dk.view;
    args.dv = dv.view;
    args.dblock_bias = dblock_bias.view;
    args.dattn_bias = dattn_bias.view;
    args.dsinks = dsinks.view;
    args.options.block_bias = block_bias.view;
    args.options.attn_bias = attn_bias.view;
    args.options.sinks = sinks.view;
  }
};

using Change = std::function<void(BackwardArgs&)>;

// The argument named when `change` was made to a good call.
std::string argument_of(const Change& change, DType dtype = DType::f32, Purpose purpose = Purpose::forward) {
  GradientCall c(dtype);
  change(c.args);
  return error_argument([&] { resolve_backward(c.args, purpose); });
}
std::string reference_argument_of(const Change& change, DType dtype = DType::f32) {
  return argument_of(change, dtype, Purpose::reference);
}
// The whole message.
std::string message_of(const Change& change, DType dtype = DType::f32) {
  GradientCall c(dtype);
  change(c.args);
  try {
    resolve_backward(c.args);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

TEST(ResolveBackward, AcceptsGoodCalls) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
    EXPECT_EQ(argument_of([](BackwardArgs&) {}, dtype), "");
    EXPECT_EQ(argument_of([](BackwardArgs& a) { a.dlse = {}; }, dtype), "");
    EXPECT_EQ(argument_of([](BackwardArgs& a) { a.dq = a.dk = a.dv = {}; }, dtype), "");
    EXPECT_EQ(argument_of([](BackwardArgs& a) { a.dblock_bias = a.dattn_bias = a.dsinks = {}; }, dtype), "");
  }
}

TEST(ResolveBackward, EverythingThatForwardChecks) {
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.q = {}; }), "q");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.k.dtype = DType::bf16; }), "k");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.v.strides[3] = 2; }), "v");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.pattern = dense_pattern(20, 25); }), "pattern");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.options.scale = std::nan(""); }), "scale");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.options.softcap = -1; }), "softcap");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.options.dropout.p = 1; }), "dropout");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.options.window_left = -1; }), "window_left");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.options.sinks.sizes[0] = 3; }), "sinks");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.options.block_bias.sizes[2] = 3; }), "block_bias");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.options.attn_bias.sizes[3] = 3; }), "attn_bias");
  const std::vector<int64_t> lengths{24, 25};
  EXPECT_EQ(argument_of([&](BackwardArgs& a) { a.options.key_lengths = lengths; }), "key_lengths");
}

TEST(ResolveBackward, WhatForwardGave) {
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.out = {}; }), "out");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.out.sizes[3] = 8; }), "out");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.out.dtype = DType::f16; }), "out");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.out.strides[3] = 2; }), "out");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.out.data = nullptr; }), "out");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.lse = {}; }), "lse");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.lse.sizes[2] = 19; }), "lse");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.lse.dtype = DType::f16; }), "lse");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.lse.dtype = DType::f64; }), "lse");  // of fp32 inputs
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.lse.data = static_cast<const char*>(a.lse.data) + 1; }), "lse");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.dout = {}; }), "dout");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.dout.sizes[2] = 2; }), "dout");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.dout.dtype = DType::f32; }, DType::bf16), "dout");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.dout.strides[3] = 0; }), "dout");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.dlse.sizes[1] = 2; }), "dlse");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.dlse.dtype = DType::bf16; }), "dlse");
  // The reference recomputes them.
  EXPECT_EQ(reference_argument_of([](BackwardArgs& a) { a.out = {}, a.lse = {}; }), "");
  EXPECT_EQ(reference_argument_of([](BackwardArgs& a) { a.dout = {}; }), "dout");
}

TEST(ResolveBackward, Fp64RowNumbers) {
  std::vector<double> rows(2 * 4 * 20);
  const TensorView wide = make_view(static_cast<const void*>(rows.data()), DType::f64, {2, 4, 20});
  EXPECT_EQ(argument_of([&](BackwardArgs& a) { a.lse = a.dlse = wide; }, DType::f64), "");
  EXPECT_EQ(argument_of([&](BackwardArgs& a) { a.lse = wide; }, DType::f64), "dlse");  // not the dtype of lse
  EXPECT_EQ(argument_of([&](BackwardArgs& a) { a.dlse = wide; }, DType::f32), "dlse");
  EXPECT_EQ(reference_argument_of([&](BackwardArgs& a) { a.lse = {}, a.dlse = wide; }), "");
}

TEST(ResolveBackward, Gradients) {
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.dq.sizes[1] = 24; }), "dq");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.dk.sizes[2] = 4; }), "dk");  // of the kv heads, not the query heads
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.dv.sizes[3] = 8; }), "dv");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.dq.rank = 3; }), "dq");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.dq.strides[3] = 2; }), "dq");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.dk.strides[0] = 0; }), "dk");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.dv.strides[2] = 3; }), "dv");  // heads overlap: Dv is 6
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.dv.data = nullptr; }), "dv");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.dq.data = static_cast<char*>(a.dq.data) + 1; }), "dq");
}

TEST(ResolveBackward, DtypesOfGradients) {
  // A tensor of 16-bit elements has no room for fp32: these only look at dtypes, in memory of their own.
  std::vector<double> memory(3 * 2 * 24 * 4 * 8);
  const auto gradients = [&](DType dq, DType dk, DType dv, bool accumulate) {
    return [=, &memory](BackwardArgs& a) {
      a.dq = make_view(memory.data(), dq, {2, 20, 4, 8});
      a.dk = make_view(memory.data() + 2 * 24 * 4 * 8, dk, {2, 24, 2, 8});
      a.dv = make_view(memory.data() + 2 * 2 * 24 * 4 * 8, dv, {2, 24, 2, 6});
      a.accumulate = accumulate;
    };
  };
  const DType f64 = DType::f64, f32 = DType::f32, f16 = DType::f16, bf16 = DType::bf16;
  EXPECT_EQ(argument_of(gradients(f32, f32, f32, false), bf16), "");
  EXPECT_EQ(argument_of(gradients(bf16, bf16, bf16, false), bf16), "");
  EXPECT_EQ(argument_of(gradients(bf16, f32, bf16, false), bf16), "dk");  // all have the same one
  EXPECT_EQ(argument_of(gradients(f32, f32, bf16, false), bf16), "dv");
  EXPECT_EQ(argument_of(gradients(f16, f16, f16, false), bf16), "dq");
  EXPECT_EQ(argument_of(gradients(bf16, bf16, bf16, false), f32), "dq");
  EXPECT_EQ(argument_of(gradients(f64, f64, f64, false), f32), "dq");
  EXPECT_EQ(argument_of(gradients(f64, f64, f64, false), f64), "");
  EXPECT_EQ(reference_argument_of(gradients(f64, f64, f64, false), bf16), "");
  EXPECT_EQ(argument_of(gradients(bf16, bf16, bf16, true), bf16), "dq");
  EXPECT_EQ(argument_of(gradients(f32, f32, f32, true), bf16), "");
  EXPECT_EQ(argument_of(gradients(f32, f32, f32, true), f64), "dq");
  EXPECT_EQ(argument_of(gradients(f64, f64, f64, true), f64), "");
  EXPECT_EQ(reference_argument_of(gradients(f64, f64, f64, true), bf16), "");
  EXPECT_EQ(message_of(gradients(bf16, bf16, bf16, true), bf16),
            "dq: got bf16; allowed: fp32 with accumulate and bf16 inputs");
  EXPECT_EQ(message_of(gradients(f32, f32, bf16, false), bf16), "dv: got bf16; allowed: fp32, the dtype of dq");
}

TEST(ResolveBackward, GradientsOfBiases) {
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.options.block_bias = {}; }), "dblock_bias");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.options.attn_bias = {}; }), "dattn_bias");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.options.sinks = {}; }), "dsinks");
  EXPECT_EQ(message_of([](BackwardArgs& a) { a.options.sinks = {}; }),
            "dsinks: got a tensor; allowed: none where there is no sinks");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.dblock_bias.sizes[1] = 1; }), "dblock_bias");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.dblock_bias.dtype = DType::f16; }), "dblock_bias");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.dblock_bias.strides[1] = 0; }), "dblock_bias");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.dattn_bias.sizes[0] = 1; }), "dattn_bias");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.dattn_bias.dtype = DType::f16; }), "dattn_bias");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.dattn_bias.strides[2] = 0; }), "dattn_bias");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.dsinks.sizes[0] = 1; }), "dsinks");
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.dsinks.dtype = DType::f64; }), "dsinks");
  std::vector<double> memory(2 * 20 * 24);
  const auto dattn_bias = [&](DType dtype) {
    return [&memory, dtype](BackwardArgs& a) { a.dattn_bias = make_view(memory.data(), dtype, {2, 1, 20, 24}); };
  };
  EXPECT_EQ(argument_of(dattn_bias(DType::f32)), "");
  EXPECT_EQ(argument_of(dattn_bias(DType::f64)), "dattn_bias");
  EXPECT_EQ(reference_argument_of(dattn_bias(DType::f64)), "");
  // A bias that is broadcast by strides, not by sizes, has a gradient of all its elements.
  EXPECT_EQ(argument_of([](BackwardArgs& a) { a.options.attn_bias.strides[2] = 0; }), "");
}

TEST(ResolveBackward, SizesAndStridesOfBiasGradients) {
  GradientCall c;
  const BackwardProblem p = resolve_backward(c.args);
  EXPECT_EQ(p.dbias_batch, 0);
  EXPECT_EQ(p.dbias_head, 4);
  EXPECT_EQ(p.dbias_entry, 1);
  EXPECT_EQ(p.dattn_bias_size[0], 2);
  EXPECT_EQ(p.dattn_bias_size[1], 1);
  EXPECT_EQ(p.dattn_bias_stride[1], 0);
  EXPECT_EQ(p.dattn_bias_stride[2], 24);
  EXPECT_EQ(p.transposed.indptr[2], 4);  // two columns of two blocks
}

TEST(ResolveBackward, OverlapOfGradients) {
  // Each gradient over each input and over each other: the first element of both in one place, and nothing else there.
  std::vector<double> memory(4096);
  using Input = std::pair<const char*, TensorView& (*)(BackwardArgs&)>;
  const Input inputs[] = {
      {"q", [](BackwardArgs& a) -> TensorView& { return a.q; }},
      {"k", [](BackwardArgs& a) -> TensorView& { return a.k; }},
      {"v", [](BackwardArgs& a) -> TensorView& { return a.v; }},
      {"out", [](BackwardArgs& a) -> TensorView& { return a.out; }},
      {"lse", [](BackwardArgs& a) -> TensorView& { return a.lse; }},
      {"dout", [](BackwardArgs& a) -> TensorView& { return a.dout; }},
      {"dlse", [](BackwardArgs& a) -> TensorView& { return a.dlse; }},
      {"block_bias", [](BackwardArgs& a) -> TensorView& { return a.options.block_bias; }},
      {"attn_bias", [](BackwardArgs& a) -> TensorView& { return a.options.attn_bias; }},
      {"sinks", [](BackwardArgs& a) -> TensorView& { return a.options.sinks; }},
  };
  using Output = std::pair<const char*, MutableTensorView& (*)(BackwardArgs&)>;
  const Output outputs[] = {
      {"dq", [](BackwardArgs& a) -> MutableTensorView& { return a.dq; }},
      {"dk", [](BackwardArgs& a) -> MutableTensorView& { return a.dk; }},
      {"dv", [](BackwardArgs& a) -> MutableTensorView& { return a.dv; }},
      {"dblock_bias", [](BackwardArgs& a) -> MutableTensorView& { return a.dblock_bias; }},
      {"dattn_bias", [](BackwardArgs& a) -> MutableTensorView& { return a.dattn_bias; }},
      {"dsinks", [](BackwardArgs& a) -> MutableTensorView& { return a.dsinks; }},
  };
  for (const auto& [output_name, output] : outputs) {
    for (const auto& [input_name, input] : inputs) {
      const Change change = [&](BackwardArgs& a) { output(a).data = memory.data(), input(a).data = memory.data(); };
      EXPECT_EQ(argument_of(change), output_name) << input_name;
      // The reference does not read what forward gave.
      const bool read = std::string(input_name) != "out" && std::string(input_name) != "lse";
      EXPECT_EQ(reference_argument_of(change), read ? output_name : "") << input_name;
    }
    for (const auto& [other_name, other] : outputs) {
      if (&output == &other || std::string(other_name) == output_name) continue;
      const Change change = [&](BackwardArgs& a) { output(a).data = other(a).data = memory.data(); };
      const std::string named = argument_of(change);
      EXPECT_TRUE(named == output_name || named == other_name) << output_name << " " << other_name << " " << named;
    }
  }
}

TEST(ResolveBackward, PackedGradients) {  // dq, dk, dv as slices of one [B, S, 3, H, D]: interleaved, no byte shared
  const int64_t s = 20, h = 4, d = 8;
  std::vector<float> packed(2 * s * 3 * h * d);
  const BlockPattern pattern = dense_pattern(s, s);
  Call c({.batch = 2, .seqlen_q = s, .seqlen_k = s, .heads = h, .kv_heads = h, .head_dim = d, .head_dim_v = d},
         DType::f32, pattern);
  const Numbers dout(DType::f32, {2, s, h, d});
  BackwardArgs args;
  args.q = c.args.q, args.k = c.args.k, args.v = c.args.v, args.out = c.args.out, args.lse = c.args.lse;
  args.pattern = pattern;
  args.dout = dout.view;
  const auto slice = [&](int64_t n) {
    MutableTensorView t = make_view(packed.data() + n * h * d, DType::f32, {2, s, h, d});
    t.strides = {s * 3 * h * d, 3 * h * d, d, 1};
    return t;
  };
  args.dq = slice(0), args.dk = slice(1), args.dv = slice(2);
  EXPECT_EQ(error_argument([&] { resolve_backward(args); }), "");
  args.dv.data = packed.data() + 2 * h * d - 1;  // one element into dk
  EXPECT_EQ(error_argument([&] { resolve_backward(args); }), "dv");
}

TEST(ResolveBackward, EmptyTensors) {
  for (const Shape& s : {Shape{.batch = 0, .seqlen_q = 2, .seqlen_k = 2}, Shape{.seqlen_q = 0, .seqlen_k = 2},
                         Shape{.seqlen_q = 2, .seqlen_k = 0}, Shape{.seqlen_q = 2, .heads = 0, .kv_heads = 0}}) {
    Call c(s, DType::f32, dense_pattern(s.seqlen_q, s.seqlen_k));
    BackwardArgs args;
    args.q = c.args.q, args.k = c.args.k, args.v = c.args.v, args.out = c.args.out, args.lse = c.args.lse;
    args.dout = c.args.out;
    args.pattern = c.args.pattern;
    for (TensorView* t : {&args.q, &args.k, &args.v, &args.out, &args.lse, &args.dout}) {
      if (t->numel() == 0) t->data = nullptr;
    }
    args.dk = make_view(static_cast<void*>(nullptr), DType::f32, {s.batch, s.seqlen_k, s.kv_heads, s.head_dim});
    std::vector<float> memory(16);
    args.dk.data = memory.data();
    EXPECT_EQ(error_argument([&] { resolve_backward(args); }), "");
  }
}

// Two sequences of 2 and 3 queries against 4 and 1 keys.
struct PackedCall {
  Numbers q{DType::f32, {5, 2, 4}}, k{DType::f32, {5, 1, 4}}, v{DType::f32, {5, 1, 3}};
  Numbers out{DType::f32, {5, 2, 3}}, dout{DType::f32, {5, 2, 3}}, lse{DType::f32, {2, 5}}, dlse{DType::f32, {2, 5}};
  Numbers dq{DType::f32, {5, 2, 4}}, dk{DType::f32, {5, 1, 4}}, dv{DType::f32, {5, 1, 3}};
  Numbers sinks{DType::f32, {2}}, dsinks{DType::f32, {2}};
  std::vector<int64_t> cu_seqlens_q{0, 2, 5}, cu_seqlens_k{0, 4, 5};
  std::vector<BlockPattern> patterns{dense_pattern(2, 4), dense_pattern(3, 1)};
  VarlenBackwardArgs args;

  PackedCall() {
    args.q = q.view, args.k = k.view, args.v = v.view, args.out = out.view, args.dout = dout.view;
    args.lse = lse.view, args.dlse = dlse.view;
    args.dq = dq.view, args.dk = dk.view, args.dv = dv.view, args.dsinks = dsinks.view;
    args.options.sinks = sinks.view;
    args.cu_seqlens_q = cu_seqlens_q;
    args.cu_seqlens_k = cu_seqlens_k;
    args.patterns = patterns;
  }
  PackedCall(const PackedCall&) = delete;
  PackedCall& operator=(const PackedCall&) = delete;
};

std::string packed_argument_of(const std::function<void(PackedCall&)>& change) {
  PackedCall c;
  change(c);
  return error_argument([&] { resolve_backward_varlen(c.args); });
}

TEST(ResolveBackwardVarlen, Mistakes) {
  EXPECT_EQ(packed_argument_of([](PackedCall&) {}), "");
  EXPECT_EQ(packed_argument_of([](PackedCall& c) { c.args.dlse = {}, c.args.dq = {}, c.args.dsinks = {}; }), "");
  EXPECT_EQ(packed_argument_of([](PackedCall& c) { c.args.q = {}; }), "q");
  EXPECT_EQ(packed_argument_of([](PackedCall& c) { c.args.out = {}; }), "out");
  EXPECT_EQ(packed_argument_of([](PackedCall& c) { c.args.dout = {}; }), "dout");
  EXPECT_EQ(packed_argument_of([](PackedCall& c) { c.args.dout.sizes[0] = 4; }), "dout");
  EXPECT_EQ(packed_argument_of([](PackedCall& c) { c.args.lse = {}; }), "lse");
  EXPECT_EQ(packed_argument_of([](PackedCall& c) { c.args.lse.rank = 1; }), "lse");
  EXPECT_EQ(packed_argument_of([](PackedCall& c) { c.args.dlse.sizes[0] = 1; }), "dlse");
  EXPECT_EQ(packed_argument_of([](PackedCall& c) { c.args.dq.sizes[2] = 3; }), "dq");
  EXPECT_EQ(packed_argument_of([](PackedCall& c) { c.args.dk.rank = 2; }), "dk");
  EXPECT_EQ(packed_argument_of([](PackedCall& c) { c.args.dv.dtype = DType::f16; }), "dv");
  EXPECT_EQ(packed_argument_of([](PackedCall& c) { c.args.options.sinks = {}; }), "dsinks");
  EXPECT_EQ(packed_argument_of([](PackedCall& c) { c.args.dq.data = c.q.view.data; }), "dq");
  EXPECT_EQ(packed_argument_of([](PackedCall& c) { c.args.cu_seqlens_q = {c.cu_seqlens_q.data(), 2}; }),
            "cu_seqlens_q");
  EXPECT_EQ(packed_argument_of([](PackedCall& c) { c.cu_seqlens_k[2] = 4; }), "cu_seqlens_k");
  EXPECT_EQ(packed_argument_of([](PackedCall& c) { c.cu_seqlens_k[1] = 6; }), "cu_seqlens_k");
  EXPECT_EQ(packed_argument_of([](PackedCall& c) { c.args.options.q_offset = 1; }), "q_offset");
  EXPECT_EQ(packed_argument_of([](PackedCall& c) { c.args.options.attn_bias = c.q.view; }), "attn_bias");
  EXPECT_EQ(packed_argument_of([](PackedCall& c) { c.args.options.block_bias = c.q.view; }), "block_bias");
  // Views of one row that claim 2^46 rows: refused by what the patterns say, without memory for so many.
  EXPECT_EQ(packed_argument_of([](PackedCall& c) {
              c.args.dk = c.args.dv = {};
              for (TensorView* t : {&c.args.k, &c.args.v}) t->sizes[0] = int64_t{1} << 46, t->strides[0] = 0;
            }),
            "cu_seqlens_k");
  PackedCall c;
  c.patterns[1] = dense_pattern(3, 2);
  try {
    resolve_backward_varlen(c.args);
    ADD_FAILURE() << "a pattern of other lengths was taken";
  } catch (const Error& e) {
    EXPECT_EQ(e.argument(), "pattern");
    EXPECT_EQ(std::string(e.what()).find("sequence 1: "), 0u) << e.what();
  }
}

TEST(ResolveBackwardVarlen, EachSequenceHasItsRows) {
  PackedCall c;
  const std::vector<BackwardProblem> p = resolve_backward_varlen(c.args);
  ASSERT_EQ(p.size(), 2u);
  EXPECT_EQ(p[1].forward.batch_base, 1);
  EXPECT_EQ(p[1].forward.seqlen_q, 3);
  const auto at = [](const Numbers& n, int64_t i) { return const_cast<char*>(n.memory.data()) + i * 4; };
  EXPECT_EQ(p[1].dout.data, at(c.dout, 2 * 2 * 3));
  EXPECT_EQ(p[1].dlse.data, at(c.dlse, 2));
  EXPECT_EQ(p[1].forward.lse.data, at(c.lse, 2));
  EXPECT_EQ(p[1].dq.data, at(c.dq, 2 * 2 * 4));
  EXPECT_EQ(p[1].dk.data, at(c.dk, 4 * 4));
  EXPECT_EQ(p[1].dv.data, at(c.dv, 4 * 3));
  EXPECT_EQ(p[0].dsinks, p[1].dsinks);
}

}  // namespace
}  // namespace tessera
