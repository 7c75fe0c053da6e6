// Every mistake a caller can make in forward() gives an Error that names the argument. Sizes are tiny: only validation
// runs. What is unusual but right (packed qkv, broadcast inputs, empty tensors, NaN as data) is accepted.
#include <gtest/gtest.h>

#include <functional>
#include <limits>

#include "attention_inputs.h"
#include "call/overlap.h"
#include "call/problem.h"
#include "tessera/patterns.h"

namespace tessera {
namespace {

const Shape kShape{
    .batch = 2, .seqlen_q = 20, .seqlen_k = 24, .heads = 4, .kv_heads = 2, .head_dim = 8, .head_dim_v = 6};

// The argument named when `change` was made to a good call.
std::string argument_of(const std::function<void(Call&)>& change) {
  Call c(kShape, DType::f32, dense_pattern(20, 24));
  change(c);
  return error_argument([&] { resolve(c.args); });
}

TEST(Resolve, AcceptsAGoodCall) {
  EXPECT_EQ(argument_of([](Call&) {}), "");
}

TEST(Resolve, RanksAndSizes) {
  EXPECT_EQ(argument_of([](Call& c) { c.args.q.rank = 3; }), "q");
  EXPECT_EQ(argument_of([](Call& c) { c.args.k = {}; }), "k");
  EXPECT_EQ(argument_of([](Call& c) { c.args.v.rank = 2; }), "v");
  EXPECT_EQ(argument_of([](Call& c) { c.args.out.rank = 0; }), "out");
  EXPECT_EQ(argument_of([](Call& c) { c.args.q.sizes[1] = -1; }), "q");
  EXPECT_EQ(argument_of([](Call& c) { c.args.q.sizes[3] = 0; }), "q");
  EXPECT_EQ(argument_of([](Call& c) { c.args.k.sizes[3] = 7; }), "k");
  EXPECT_EQ(argument_of([](Call& c) { c.args.k.sizes[0] = 1; }), "k");
  EXPECT_EQ(argument_of([](Call& c) { c.args.v.sizes[0] = 1; }), "v");
  EXPECT_EQ(argument_of([](Call& c) { c.args.v.sizes[1] = 23; }), "v");
  EXPECT_EQ(argument_of([](Call& c) { c.args.v.sizes[2] = 1; }), "v");
  EXPECT_EQ(argument_of([](Call& c) { c.args.out.sizes[3] = 8; }), "out");
  EXPECT_EQ(argument_of([](Call& c) { c.args.lse.sizes[1] = 2; }), "lse");
  EXPECT_EQ(argument_of([](Call& c) { c.args.q.sizes[2] = 3; }), "k");  // H % Hkv
  EXPECT_EQ(argument_of([](Call& c) { c.args.k.sizes[2] = 0; }), "k");
  EXPECT_EQ(argument_of([](Call& c) { c.args.q.sizes[3] = 100000; }), "q");
}

TEST(Resolve, Dtypes) {
  EXPECT_EQ(argument_of([](Call& c) { c.args.q.dtype = DType::i32; }), "q");
  EXPECT_EQ(argument_of([](Call& c) { c.args.k.dtype = DType::bf16; }), "k");
  EXPECT_EQ(argument_of([](Call& c) { c.args.v.dtype = DType::f16; }), "v");
  EXPECT_EQ(argument_of([](Call& c) { c.args.out.dtype = DType::bf16; }), "out");
  EXPECT_EQ(argument_of([](Call& c) { c.args.lse.dtype = DType::f16; }), "lse");
}

TEST(Resolve, MemoryOfTensors) {
  EXPECT_EQ(argument_of([](Call& c) { c.args.q.data = nullptr; }), "q");
  EXPECT_EQ(argument_of([](Call& c) { c.args.q.strides[3] = 2; }), "q");
  EXPECT_EQ(argument_of([](Call& c) { c.args.k.strides[3] = -1; }), "k");
  EXPECT_EQ(argument_of([](Call& c) { c.args.v.strides[3] = 0; }), "v");
  EXPECT_EQ(argument_of([](Call& c) { c.args.q.strides[1] = std::numeric_limits<int64_t>::max() / 4; }), "q");
  EXPECT_EQ(argument_of([](Call& c) { c.args.q.strides[1] = std::numeric_limits<int64_t>::min(); }), "q");
  EXPECT_EQ(argument_of([](Call& c) { c.args.q.data = static_cast<const char*>(c.args.q.data) + 1; }), "q");
  EXPECT_EQ(argument_of([](Call& c) { c.args.out.strides[3] = 3; }), "out");
  EXPECT_EQ(argument_of([](Call& c) { c.args.out.strides[1] = 0; }), "out");
  EXPECT_EQ(argument_of([](Call& c) { c.args.out.strides[2] = 3; }), "out");  // heads overlap: Dv is 6
  EXPECT_EQ(argument_of([](Call& c) { c.args.lse.strides[0] = 0; }), "lse");
  const int64_t huge = int64_t{1} << 62;
  EXPECT_EQ(argument_of([=](Call& c) { c.args.k.sizes[1] = huge; }), "k");
  EXPECT_EQ(argument_of([=](Call& c) { c.args.q.sizes[0] = huge, c.args.q.strides[0] = 0; }), "q");
}

TEST(Resolve, UnusualButRightMemory) {
  EXPECT_EQ(argument_of([](Call& c) { c.args.k.strides[0] = c.args.v.strides[2] = 0; }), "");  // broadcast inputs
  EXPECT_EQ(argument_of([](Call& c) { c.args.lse = {}; }), "");
  EXPECT_EQ(argument_of([](Call& c) { c.args.v = c.args.k, c.args.v.sizes[3] = 6; }), "");  // K and V share memory
  Call one({.seqlen_q = 3, .seqlen_k = 3}, DType::f32, dense_pattern(3, 3));
  one.args.q.strides[3] = 77;  // head_dim 1: no stride between its elements
  EXPECT_EQ(error_argument([&] { resolve(one.args); }), "");
  for (const Shape& s : {Shape{.batch = 0, .seqlen_q = 2, .seqlen_k = 2}, Shape{.seqlen_q = 0, .seqlen_k = 2},
                         Shape{.seqlen_q = 2, .seqlen_k = 0}, Shape{.seqlen_q = 2, .heads = 0, .kv_heads = 0}}) {
    Call c(s, DType::f32, dense_pattern(s.seqlen_q, s.seqlen_k));
    for (Numbers* t : {&c.q, &c.k, &c.v, &c.out, &c.lse}) {
      if (t->view.numel() == 0) t->view.data = nullptr;
    }
    c.args.q = c.q.view, c.args.k = c.k.view, c.args.v = c.v.view, c.args.out = c.out.view, c.args.lse = c.lse.view;
    EXPECT_EQ(error_argument([&] { resolve(c.args); }), "");
  }
}

TEST(Resolve, OverlapOfOutputs) {
  EXPECT_EQ(argument_of([](Call& c) { c.args.out.data = c.q.view.data; }), "out");
  EXPECT_EQ(argument_of([](Call& c) { c.args.out.data = c.v.view.data; }), "out");
  EXPECT_EQ(argument_of([](Call& c) { c.args.lse.data = c.k.view.data; }), "lse");
  EXPECT_EQ(argument_of([](Call& c) { c.args.lse.data = c.out.view.data; }), "lse");
  // q, k, v and out as slices of one packed [B, S, 4, H, D] tensor: interleaved, no byte shared.
  const int64_t s = 20, h = 4, d = 8;
  std::vector<float> packed(2 * s * 4 * h * d);
  Call c({.batch = 2, .seqlen_q = s, .seqlen_k = s, .heads = h, .kv_heads = h, .head_dim = d, .head_dim_v = d},
         DType::f32, dense_pattern(s, s));
  const auto slice = [&](int64_t n) {
    MutableTensorView t = make_view(packed.data() + n * h * d, DType::f32, {2, s, h, d});
    t.strides = {s * 4 * h * d, 4 * h * d, d, 1};
    return t;
  };
  c.args.q = slice(0), c.args.k = slice(1), c.args.v = slice(2), c.args.out = slice(3);
  EXPECT_EQ(error_argument([&] { resolve(c.args); }), "");
  c.args.out.data = packed.data() + 3 * h * d - 1;  // one element into v
  EXPECT_EQ(error_argument([&] { resolve(c.args); }), "out");
}

TEST(Resolve, Pattern) {
  EXPECT_EQ(argument_of([](Call& c) { c.args.pattern = dense_pattern(19, 24); }), "pattern");
  EXPECT_EQ(argument_of([](Call& c) { c.args.pattern = dense_pattern(20, 25); }), "pattern");
  const auto with = [](int64_t heads, int64_t batches) {
    const PatternShape s{20, 24, 32, 32, heads, batches};
    return BlockPattern::from_csr(s, std::vector<int64_t>(s.total_rows() + 1, 0), {});
  };
  EXPECT_EQ(argument_of([&](Call& c) { c.args.pattern = with(3, 1); }), "pattern");
  EXPECT_EQ(argument_of([&](Call& c) { c.args.pattern = with(2, 1); }), "pattern");  // Hkv is not H
  EXPECT_EQ(argument_of([&](Call& c) { c.args.pattern = with(1, 3); }), "pattern");
  EXPECT_EQ(argument_of([&](Call& c) { c.args.pattern = with(4, 2); }), "");
}

TEST(Resolve, Numbers) {
  const double nan = std::nan(""), infinity = std::numeric_limits<double>::infinity();
  for (const double x : {nan, infinity, -infinity, 1e300}) {
    EXPECT_EQ(argument_of([=](Call& c) { c.args.options.scale = x; }), "scale") << x;
  }
  for (const double x : {0.0, -1.0, 1e30}) {
    EXPECT_EQ(argument_of([=](Call& c) { c.args.options.scale = x; }), "") << x;
  }
  for (const double x : {nan, infinity, -1.0}) {
    EXPECT_EQ(argument_of([=](Call& c) { c.args.options.softcap = x; }), "softcap") << x;
  }
  for (const double x : {nan, infinity, -0.1, 1.0, 1.5}) {
    EXPECT_EQ(argument_of([=](Call& c) { c.args.options.dropout.p = x; }), "dropout") << x;
  }
  EXPECT_EQ(argument_of([](Call& c) { c.args.options.window_left = -1; }), "window_left");
  EXPECT_EQ(argument_of([](Call& c) { c.args.options.window_right = -1; }), "window_right");
  const int64_t huge = std::numeric_limits<int64_t>::max();
  EXPECT_EQ(argument_of([=](Call& c) { c.args.options.window_left = huge; }), "");
  EXPECT_EQ(argument_of([=](Call& c) { c.args.options.q_offset = huge; }), "q_offset");
  EXPECT_EQ(argument_of([=](Call& c) { c.args.options.k_offset = -huge; }), "k_offset");
}

TEST(Resolve, KeyLengths) {
  const auto with = [](std::vector<int64_t> lengths) {
    return argument_of([&](Call& c) { c.args.options.key_lengths = lengths; });
  };
  EXPECT_EQ(with({24}), "key_lengths");
  EXPECT_EQ(with({24, 24, 24}), "key_lengths");
  EXPECT_EQ(with({24, 25}), "key_lengths");
  EXPECT_EQ(with({-1, 24}), "key_lengths");
  EXPECT_EQ(with({0, 24}), "");
}

TEST(Resolve, Biases) {
  std::vector<float> data(4096, std::nanf(""));  // NaN is data
  const auto view = [&](std::initializer_list<int64_t> sizes) { return make_view(data.data(), DType::f32, sizes); };
  AttentionOptions o;
  const auto argument = [&] { return argument_of([&](Call& c) { c.args.options = o; }); };
  for (const auto& [slopes, good] : {std::pair{view({4}), true},
                                     {view({2, 4}), true},
                                     {view({3}), false},
                                     {view({4, 2}), false},
                                     {view({1, 2, 4}), false}}) {
    o.alibi_slopes = slopes;
    EXPECT_EQ(argument(), good ? "" : "alibi_slopes");
  }
  o = {};
  for (const auto& [sinks, good] : {std::pair{view({4}), true}, {view({1}), false}, {view({1, 4}), false}}) {
    o.sinks = sinks;
    EXPECT_EQ(argument(), good ? "" : "sinks");
  }
  o = {};
  for (const auto& [bias, good] : {std::pair{view({1, 1, 4}), true},
                                   {view({2, 4, 4}), true},
                                   {view({2, 1, 4}), true},
                                   {view({1, 1, 5}), false},
                                   {view({1, 1, 1}), false},
                                   {view({1, 2, 4}), false},
                                   {view({4}), false}}) {
    o.block_bias = bias;
    EXPECT_EQ(argument(), good ? "" : "block_bias");
  }
  o = {};
  for (const auto& [bias, good] : {std::pair{view({2, 4, 20, 24}), true},
                                   {view({1, 1, 20, 24}), true},
                                   {view({2, 1, 1, 24}), true},
                                   {view({1, 1, 1, 1}), true},
                                   {view({1, 1, 24, 20}), false},
                                   {view({1, 2, 20, 24}), false},
                                   {view({20, 24}), false}}) {
    o.attn_bias = bias;
    EXPECT_EQ(argument(), good ? "" : "attn_bias");
  }
  for (TensorView AttentionOptions::*member : {&AttentionOptions::alibi_slopes, &AttentionOptions::sinks}) {
    o = {};
    o.*member = view({4});
    (o.*member).dtype = DType::bf16;
    EXPECT_NE(argument(), "");
    (o.*member) = view({4});
    (o.*member).data = nullptr;
    EXPECT_NE(argument(), "");
  }
  o = {};
  o.attn_bias = view({1, 1, 20, 24});
  o.attn_bias.dtype = DType::boolean;
  EXPECT_EQ(argument(), "attn_bias");
}

TEST(Resolve, Pages) {
  // 24 keys in blocks of 16: two pages a batch.
  std::vector<float> pages(5 * 16 * 2 * 8);
  std::vector<int32_t> table{0, 1, 2, 3};
  const auto argument = [&](const std::function<void(ForwardArgs&)>& change) {
    return argument_of([&](Call& c) {
      c.args.k = make_view(static_cast<const void*>(pages.data()), DType::f32, {5, 16, 2, 8});
      c.args.v = make_view(static_cast<const void*>(pages.data()), DType::f32, {5, 16, 2, 6});
      c.args.page_table = PageTable{table.data(), 2, 2};
      change(c.args);
    });
  };
  EXPECT_EQ(argument([](ForwardArgs&) {}), "");
  EXPECT_EQ(argument([](ForwardArgs& a) { a.page_table->batch = 1; }), "page_table");
  EXPECT_EQ(argument([](ForwardArgs& a) { a.page_table->pages_per_batch = 3; }), "page_table");
  EXPECT_EQ(argument([](ForwardArgs& a) { a.page_table->data = nullptr; }), "page_table");
  EXPECT_EQ(argument([](ForwardArgs& a) { a.k.sizes[1] = 15; }), "k");
  EXPECT_EQ(argument([](ForwardArgs& a) { a.v.sizes[1] = 17, a.v.sizes[0] = 4; }), "v");
  EXPECT_EQ(argument([](ForwardArgs& a) { a.v.sizes[0] = 4; }), "v");
  table[3] = 5;
  EXPECT_EQ(argument([](ForwardArgs&) {}), "page_table");
  table[3] = -1;
  EXPECT_EQ(argument([](ForwardArgs&) {}), "page_table");
  const std::vector<int64_t> lengths{24, 16};  // batch 1 has no key on its second page
  EXPECT_EQ(argument([&](ForwardArgs& a) { a.options.key_lengths = lengths; }), "");
}

// What is not said is the pattern's; what contradicts it names the argument. kShape: 20 queries at the end of 24 keys.
TEST(Resolve, CausalityAndPositionAreThePatterns) {
  PatternSpec spec{.kind = PatternKind::local_window, .seqlen_q = 20, .seqlen_k = 24, .block_q = 16, .block_k = 16};
  spec.window = 1;
  const auto problem = [&](const std::function<void(AttentionOptions&)>& change) {
    Call c(kShape, DType::f32, make_pattern(spec));
    change(c.args.options);
    return resolve(c.args);
  };
  const auto argument = [&](const std::function<void(AttentionOptions&)>& change) {
    return error_argument([&] { problem(change); });
  };
  const std::vector<int64_t> shorter{24, 21}, whole{24, 24};
  const auto aligned = [](const std::vector<int64_t>& lengths) {
    return [&lengths](AttentionOptions& o) { o.key_lengths = lengths, o.align_to_key_lengths = true; };
  };

  EXPECT_FALSE(problem([](AttentionOptions&) {}).causal);
  EXPECT_TRUE(problem([](AttentionOptions& o) { o.causal = true; }).causal);
  EXPECT_EQ(argument([](AttentionOptions& o) { o.q_offset = 9; }), "");  // who says it means it
  EXPECT_EQ(argument(aligned(shorter)), "key_lengths");
  EXPECT_EQ(argument(aligned(whole)), "");

  spec.causal = true;
  EXPECT_TRUE(problem([](AttentionOptions&) {}).causal);
  EXPECT_EQ(problem([](AttentionOptions&) {}).diagonal(0), 4);
  EXPECT_EQ(argument([](AttentionOptions& o) { o.k_offset = 2; }), "k_offset");  // moves keys, but not queries
  EXPECT_EQ(argument([](AttentionOptions& o) { o.causal = false; }), "causal");
  EXPECT_EQ(argument([](AttentionOptions& o) { o.q_offset = 9; }), "q_offset");
  EXPECT_EQ(argument([](AttentionOptions& o) { o.q_offset = 14, o.k_offset = 10; }), "");
  EXPECT_EQ(argument(aligned(shorter)), "key_lengths");

  spec.q_offset = 2;  // rows 2..21 of a longer sequence
  spec.seqlen_total = 40;
  EXPECT_EQ(problem([](AttentionOptions&) {}).diagonal(0), 2);
  EXPECT_EQ(argument([](AttentionOptions& o) { o.q_offset = 4; }), "q_offset");

  spec = {.kind = PatternKind::causal, .seqlen_q = 20, .seqlen_k = 24, .block_q = 16, .block_k = 16};
  EXPECT_EQ(argument(aligned(shorter)), "");  // keeps all that is admitted there as well
  EXPECT_EQ(problem(aligned(shorter)).diagonal(1), 1);
}

// What was checked is what is used: lengths and pages that another thread writes after the check reach no kernel.
TEST(Resolve, KeepsItsOwnCopiesOfWhatIndexesMemory) {
  std::vector<int32_t> table{0, 1, 2, 3};
  std::vector<int64_t> lengths{24, 20};
  std::vector<float> pages(4 * 16 * 2 * 8), values(4 * 16 * 2 * 6);
  Call c(kShape, DType::f32, dense_pattern(20, 24));
  c.args.k = make_view(pages.data(), DType::f32, {4, 16, 2, 8});
  c.args.v = make_view(values.data(), DType::f32, {4, 16, 2, 6});
  c.args.page_table = PageTable{table.data(), 2, 2};
  c.args.options.key_lengths = lengths;
  const Problem p = resolve(c.args);
  table.assign(4, 1 << 30);
  lengths.assign(2, int64_t{1} << 40);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(p.page_table[i], i);
  EXPECT_EQ(p.key_length(0), 24);
  EXPECT_EQ(p.key_length(1), 20);
}

TEST(Overlap, ExactOnStridedViews) {
  std::vector<float> x(200);
  const auto view = [&](int64_t offset, std::array<int64_t, 4> sizes, std::array<int64_t, 4> strides) {
    TensorView t;
    t.data = x.data() + offset;
    t.rank = 4;
    t.sizes = sizes;
    t.strides = strides;
    return t;
  };
  const TensorView even = view(0, {1, 1, 1, 20}, {0, 0, 0, 2});
  EXPECT_FALSE(shares_memory(even, view(1, {1, 1, 1, 20}, {0, 0, 0, 2})));
  EXPECT_TRUE(shares_memory(even, view(1, {1, 1, 1, 20}, {0, 0, 0, 3})));  // 4, 10, ...
  EXPECT_FALSE(shares_memory(even, view(1, {1, 1, 1, 1}, {0, 0, 0, 3})));
  EXPECT_TRUE(shares_memory(even, view(38, {1, 1, 1, 3}, {0, 0, 0, -19})));  // 38, 19, 0
  EXPECT_FALSE(shares_memory(even, view(39, {1, 1, 1, 2}, {0, 0, 0, -2})));
  EXPECT_TRUE(overlaps_itself(view(0, {1, 3, 2, 2}, {0, 4, 2, 2})));
  EXPECT_FALSE(overlaps_itself(view(0, {1, 2, 2, 1}, {0, 2, 3, 1})));  // 0, 2, 3, 5: not nested, yet apart
  EXPECT_TRUE(overlaps_itself(view(6, {1, 3, 4, 1}, {0, 3, -2, 1})));
}

}  // namespace
}  // namespace tessera
