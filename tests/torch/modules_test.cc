// The C++ functions and modules against torch's own, in fp64 where the reference kernel makes rounding a matter of
// 1e-12, so that a wrong formula cannot hide. Lengths are no multiples of the block: every call has a ragged end.
#include "tessera/torch/modules.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <functional>
#include <limits>
#include <string>
#include <utility>

#include "tessera/torch/functional.h"

namespace tessera::nn {
namespace {

namespace F = functional;

constexpr double kInf = std::numeric_limits<double>::infinity();
const auto kDouble = at::TensorOptions(at::kDouble);

void expect_close(const at::Tensor& got, const at::Tensor& expected, double tolerance, const char* what) {
  ASSERT_TRUE(got.defined()) << what;
  ASSERT_EQ(got.sizes(), expected.sizes()) << what;
  const double worst = (got - expected).abs().max().item<double>();
  EXPECT_LE(worst, tolerance * std::max(1.0, expected.abs().max().item<double>())) << what;
}

PatternSpec sparse_spec() {
  PatternSpec spec;
  spec.kind = PatternKind::dilated_sparse;
  spec.block_q = spec.block_k = 16;
  spec.density = 0.4;
  return spec;
}

BlockPattern pattern_for(PatternSpec spec, int64_t seqlen_q, int64_t seqlen_k) {
  spec.seqlen_q = seqlen_q;
  spec.seqlen_k = seqlen_k;
  return make_pattern(spec);
}

// True where the pattern keeps the pair, [Sq, Sk].
at::Tensor kept_pairs(const BlockPattern& pattern) {
  const BlockPatternView v = pattern.view();
  const PatternShape& s = v.shape;
  at::Tensor kept = at::zeros({s.rows() * s.block_q, s.cols() * s.block_k}, at::kBool);
  for (int64_t i = 0; i < s.rows(); ++i) {
    for (int64_t e = v.indptr[i]; e < v.indptr[i + 1]; ++e) {
      kept.slice(0, i * s.block_q, (i + 1) * s.block_q)
          .slice(1, v.indices[e] * s.block_k, (v.indices[e] + 1) * s.block_k)
          .fill_(true);
    }
  }
  return kept.slice(0, 0, s.seqlen_q).slice(1, 0, s.seqlen_k);
}

// What torch adds to the scores for a mask of kept pairs.
at::Tensor hidden(const at::Tensor& kept) {
  return at::zeros(kept.sizes(), kDouble).masked_fill_(kept.logical_not(), -kInf);
}

struct Qkv {
  at::Tensor q, k, v;
  explicit Qkv(at::TensorOptions options = kDouble) {
    at::manual_seed(3);
    q = at::randn({2, 50, 4, 8}, options).requires_grad_();
    k = at::randn({2, 70, 2, 8}, options).requires_grad_();
    v = at::randn({2, 70, 2, 12}, options).requires_grad_();
  }
  at::Tensor plain(const at::Tensor& bias) const {  // softmax written out, [B, Sq, H, Dv]
    const auto wide = [](const at::Tensor& t) { return t.repeat_interleave(2, 2).transpose(1, 2); };
    const at::Tensor scores = at::matmul(q.transpose(1, 2), wide(k).transpose(2, 3)) / std::sqrt(8.0) + bias;
    return at::matmul(at::softmax(scores, -1), wide(v)).transpose(1, 2);
  }
};

TEST(Functional, GradientsAreThoseOfTheFormula) {
  const BlockPattern pattern = pattern_for(sparse_spec(), 50, 70);
  Qkv a;
  at::Tensor bias = at::randn({2, 1, 50, 70}, kDouble).requires_grad_();
  ops::OptionArguments options;
  options.attn_bias = bias;
  const auto [out, lse] = F::block_sparse_attention(a.q, a.k, a.v, F::pattern_tensors(pattern), options);
  const at::Tensor expected = a.plain(bias + hidden(kept_pairs(pattern)));
  expect_close(out, expected, 1e-11, "out");
  const at::Tensor seed = at::randn(out.sizes(), kDouble);
  const auto got = torch::autograd::grad({out}, {a.q, a.k, a.v, bias}, {seed});
  const auto want = torch::autograd::grad({expected}, {a.q, a.k, a.v, bias}, {seed});
  const char* names[] = {"dq", "dk", "dv", "dbias"};
  for (int i = 0; i < 4; ++i) expect_close(got[i], want[i], i == 3 ? 1e-6 : 1e-11, names[i]);
}

// Finite differences through both results: what autograd.gradcheck does, along one random direction an input.
TEST(Functional, GradientsOfOutAndLseMatchFiniteDifferences) {
  const ops::PatternTensors pattern = F::pattern_tensors(pattern_for(sparse_spec(), 50, 70));
  Qkv a;
  ops::OptionArguments options;
  options.softcap = 5;
  options.causal = true;
  const at::Tensor to_out = at::randn({2, 50, 4, 12}, kDouble), to_lse = at::randn({2, 4, 50}, kDouble);
  const auto loss = [&](const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
    const auto [out, lse] = F::block_sparse_attention(q, k, v, pattern, options);
    const at::Tensor seen = at::where(lse.isfinite(), lse, at::zeros_like(lse));
    return (out * to_out).sum() + (seen * to_lse).sum();
  };
  loss(a.q, a.k, a.v).backward();
  const at::NoGradGuard no_grad;
  const double h = 1e-5;
  at::Tensor inputs[] = {a.q, a.k, a.v};
  for (int i = 0; i < 3; ++i) {
    const at::Tensor direction = at::randn(inputs[i].sizes(), kDouble);
    const auto at_step = [&](double step) {
      at::Tensor moved[] = {a.q, a.k, a.v};
      moved[i] = inputs[i] + step * direction;
      return loss(moved[0], moved[1], moved[2]).item<double>();
    };
    const double difference = (at_step(h) - at_step(-h)) / (2 * h);
    const double gradient = (inputs[i].grad() * direction).sum().item<double>();
    EXPECT_NEAR(gradient, difference, 1e-6 * std::max(1.0, std::abs(difference))) << "input " << i;
  }
}

TEST(Functional, OnlyWantedGradientsAndNoSecondOnes) {
  Qkv a;
  const auto pattern = F::pattern_tensors(pattern_for(sparse_spec(), 50, 70));
  a.k.requires_grad_(false);
  const at::Tensor out = std::get<0>(F::block_sparse_attention(a.q, a.k, a.v, pattern));
  out.sum().backward();
  EXPECT_TRUE(a.q.grad().defined() && a.v.grad().defined());
  EXPECT_FALSE(a.k.grad().defined());
  const at::Tensor again = std::get<0>(F::block_sparse_attention(a.q, a.k, a.v, pattern));
  const at::Tensor dq = torch::autograd::grad({again.sum()}, {a.q}, {}, true, /*create_graph=*/true)[0];
  EXPECT_THROW(torch::autograd::grad({dq.sum()}, {a.q}), c10::Error);
}

TEST(Functional, DropoutFollowsTorchsGenerator) {
  const Qkv a(at::TensorOptions(at::kFloat));
  const auto pattern = F::pattern_tensors(pattern_for(sparse_spec(), 50, 70));
  ops::OptionArguments options;
  options.dropout_p = 0.5;
  const auto draw = [&](uint64_t seed) {
    at::manual_seed(seed);
    return std::get<0>(F::block_sparse_attention(a.q, a.k, a.v, pattern, options));
  };
  EXPECT_TRUE(at::equal(draw(1), draw(1)));
  EXPECT_FALSE(at::equal(draw(1), draw(2)));
}

TEST(Functional, WrongCallsAreValueErrors) {
  const Qkv a;
  const auto pattern = F::pattern_tensors(pattern_for(sparse_spec(), 50, 70));
  EXPECT_THROW(F::block_sparse_attention(a.q, a.k.slice(1, 0, 60), a.v.slice(1, 0, 60), pattern), c10::ValueError);
  ops::OptionArguments options;
  options.alibi_slopes = at::ones({4}).requires_grad_();
  EXPECT_THROW(F::block_sparse_attention(a.q, a.k, a.v, pattern, options), c10::ValueError);
}

TEST(BlockSparseAttention, PatternFollowsTheLengths) {
  BlockSparseAttentionOptions options;
  options.pattern = sparse_spec();
  options.pattern.causal = true;
  BlockSparseAttention attention(options);
  for (const int64_t seqlen : {40, 90, 40}) {
    const at::Tensor q = at::randn({1, seqlen, 2, 16}, kDouble);
    const BlockPattern pattern = pattern_for(options.pattern, seqlen, seqlen);
    const at::Tensor kept = kept_pairs(pattern).logical_and(at::ones({seqlen, seqlen}, at::kBool).tril());
    const at::Tensor bhsd = q.transpose(1, 2);
    const at::Tensor expected = at::scaled_dot_product_attention(bhsd, bhsd, bhsd, hidden(kept)).transpose(1, 2);
    expect_close(attention->forward(q, q, q), expected, 1e-11, "out");
  }
  EXPECT_TRUE(attention->parameters().empty());
}

// ---- LongNet's segments, packed sequences, caches ----

const std::vector<int64_t> kSegments{16, 40}, kRates{1, 3};

// What one softmax over the multiset of all admitted keys adds to the scores: the log of how often, [H, S, S].
at::Tensor log_of_times_admitted(int64_t heads, int64_t seqlen) {
  at::Tensor times = at::zeros({heads, seqlen, seqlen}, kDouble);
  const at::Tensor position = at::arange(seqlen);
  for (size_t i = 0; i < kSegments.size(); ++i) {
    for (int64_t h = 0; h < heads; ++h) {
      const at::Tensor segment = position.floor_divide(kSegments[i]);
      const at::Tensor kept = position.remainder(kSegments[i]).remainder(kRates[i]) == h % kRates[i];
      const at::Tensor both = kept.unsqueeze(0).logical_and(kept.unsqueeze(1));
      times[h] += both.logical_and(segment.unsqueeze(0) == segment.unsqueeze(1)).to(at::kDouble);
    }
  }
  return times.log();
}

TEST(MultiheadAttention, MistakesAreNamed) {
  const auto message = [](const auto& call) -> std::string {
    try {
      call();
    } catch (const c10::ValueError& e) {
      return e.what_without_backtrace();
    }
    return "no ValueError";
  };
  const auto pattern = F::pattern_tensors(pattern_for(sparse_spec(), 50, 50));
  const at::Tensor x = torch::randn({50, 2, 16});
  F::MultiheadArguments right;
  right.num_heads = 4;
  right.in_proj_weight = torch::randn({48, 16});
  right.out_proj_weight = torch::randn({16, 16});
  EXPECT_NO_THROW(F::multi_head_attention(x, x, x, pattern, right));
  using Change = std::function<void(F::MultiheadArguments&)>;
  const std::pair<const char*, Change> table[] = {
      {"num_heads", [](auto& a) { a.num_heads = 0; }},
      {"num_heads", [](auto& a) { a.num_heads = 5; }},
      {"q_proj_weight", [](auto& a) { a.in_proj_weight = at::Tensor(); }},
      {"in_proj_weight", [](auto& a) { a.in_proj_weight = torch::randn({32, 32}); }},
      {"out_proj_weight", [](auto& a) { a.out_proj_weight = at::Tensor(); }},
      {"in_proj_bias", [](auto& a) { a.in_proj_bias = torch::randn({16}); }},
      {"bias_v", [](auto& a) { a.bias_k = torch::randn({1, 1, 16}); }},
      {"bias_k", [](auto& a) { a.bias_v = torch::randn({1, 1, 16}); }},
      {"dropout_p", [](auto& a) { a.dropout_p = 2; }},
  };
  for (const auto& [name, change] : table) {
    F::MultiheadArguments wrong = right;
    change(wrong);
    const std::string got = message([&] { F::multi_head_attention(x, x, x, pattern, wrong); });
    EXPECT_EQ(got.rfind(std::string(name) + ": got ", 0), 0u) << name << " in: " << got;
  }
  const at::Tensor wide = torch::randn({50, 2, 15});
  EXPECT_EQ(message([&] { F::multi_head_attention(x, wide, wide, pattern, right); }).rfind("key: got", 0), 0u);
  const at::Tensor exact = x.to(at::kDouble);
  EXPECT_EQ(message([&] { F::multi_head_attention(exact, x, x, pattern, right); }).rfind("query: got", 0), 0u);
  EXPECT_EQ(message([&] { F::multi_head_attention(at::Tensor(), x, x, pattern, right); }).rfind("query: got none", 0),
            0u);

  right.dropout_p = 1;  // as torch: nothing is left
  EXPECT_FALSE(std::get<0>(F::multi_head_attention(x, x, x, pattern, right)).any().item<bool>());
  using torch::nn::MultiheadAttentionOptions;
  EXPECT_THROW(MultiheadAttention(MultiheadAttentionOptions(16, 4).dropout(1.5), sparse_spec()), c10::ValueError);
  EXPECT_THROW(MultiheadAttention(MultiheadAttentionOptions(16, 4).kdim(0), sparse_spec()), c10::ValueError);
  EXPECT_THROW(BlockSparseAttention(BlockSparseAttentionOptions{.dropout = 1}), c10::ValueError);
}

TEST(Functional, DilatedAttentionIsOneSoftmaxOverItsKeys) {
  at::manual_seed(8);
  const auto tensor = [] { return at::randn({2, 50, 4, 8}, kDouble).requires_grad_(); };
  at::Tensor q = tensor(), k = tensor(), v = tensor();
  at::Tensor bias = at::randn({2, 1, 50, 50}, kDouble).requires_grad_();
  Dilation dilation;
  dilation.segment_lengths = kSegments;
  dilation.dilation_rates = kRates;
  ops::OptionArguments options;
  options.attn_bias = bias;
  const auto [out, lse] = F::dilated_attention(q, k, v, dilation, options);
  const at::Tensor added = bias + log_of_times_admitted(4, 50);
  const at::Tensor scores = at::matmul(q.transpose(1, 2), k.permute({0, 2, 3, 1})) / std::sqrt(8.0) + added;
  const at::Tensor expected = at::matmul(at::softmax(scores, -1), v.transpose(1, 2)).transpose(1, 2);
  expect_close(out, expected, 1e-12, "out");
  expect_close(lse, at::logsumexp(scores, -1), 1e-12, "lse");
  const at::Tensor seed = at::randn(out.sizes(), kDouble);
  const std::vector<at::Tensor> inputs{q, k, v, bias};
  const auto got = torch::autograd::grad({out}, inputs, {seed});
  const auto wanted = torch::autograd::grad({expected}, inputs, {seed});
  for (size_t i = 0; i < inputs.size(); ++i) expect_close(got[i], wanted[i], 1e-11, "gradient");

  dilation.pattern = sparse_spec();
  dilation.pattern->block_k = 32;
  EXPECT_THROW(F::dilated_attention(q, k, v, dilation), c10::ValueError);
  // One segment of all tokens: the pattern as it is.
  const std::vector<int64_t> all{50}, one{1};
  dilation.segment_lengths = all;
  dilation.dilation_rates = one;
  dilation.pattern->block_k = 16;
  const auto pattern = F::pattern_tensors(pattern_for(sparse_spec(), 50, 50));
  expect_close(std::get<0>(F::dilated_attention(q, k, v, dilation, options)),
               std::get<0>(F::block_sparse_attention(q, k, v, pattern, options)), 1e-12, "pattern in a segment");
  dilation.pattern->heads = 4;  // the operator takes no such number: not dropped in silence
  EXPECT_THROW(F::dilated_attention(q, k, v, dilation), c10::ValueError);
  dilation.pattern->heads = 1;
  dilation.pattern->causal = true;  // said once
  const at::Tensor causal = std::get<0>(F::dilated_attention(q, k, v, dilation));
  ops::OptionArguments told;
  told.causal = true;
  EXPECT_TRUE(at::equal(causal, std::get<0>(F::dilated_attention(q, k, v, dilation, told))));
  told.causal = false;
  EXPECT_THROW(F::dilated_attention(q, k, v, dilation, told), c10::ValueError);
  dilation.make = [](const PatternSpec& spec) { return make_pattern(spec); };
  EXPECT_THROW(F::dilated_attention(q, k, v, dilation), c10::ValueError);
}

TEST(Functional, PackedSequencesAreTheSequencesOneByOne) {
  at::manual_seed(9);
  const std::vector<int64_t> lengths{30, 0, 50};
  const at::Tensor offsets = at::tensor({0, 30, 30, 80});
  const auto tensor = [](int64_t heads, int64_t dim) { return at::randn({80, heads, dim}, kDouble).requires_grad_(); };
  at::Tensor q = tensor(4, 8), k = tensor(2, 8), v = tensor(2, 12);
  std::vector<ops::PatternTensors> patterns;
  for (const int64_t n : lengths) patterns.push_back(F::pattern_tensors(pattern_for(sparse_spec(), n, n)));
  ops::OptionArguments options;
  options.causal = true;
  const auto [out, lse] = F::varlen_attention(q, k, v, offsets, offsets, patterns, options);
  std::vector<at::Tensor> parts;
  for (size_t i = 0; i < lengths.size(); ++i) {
    const int64_t begin = offsets[i].item<int64_t>();
    const auto part = [&](const at::Tensor& t) { return t.slice(0, begin, begin + lengths[i]).unsqueeze(0); };
    parts.push_back(std::get<0>(F::block_sparse_attention(part(q), part(k), part(v), patterns[i], options))[0]);
  }
  const at::Tensor expected = at::cat(parts);
  expect_close(out, expected, 1e-12, "out");
  EXPECT_EQ(lse.sizes(), at::IntArrayRef({4, 80}));
  const auto got = torch::autograd::grad({out.sum()}, {q, k, v});
  const auto wanted = torch::autograd::grad({expected.sum()}, {q, k, v});
  for (size_t i = 0; i < 3; ++i) expect_close(got[i], wanted[i], 1e-11, "gradient");
  options.key_lengths = at::tensor({30, 0, 50});
  EXPECT_THROW(F::varlen_attention(q, k, v, offsets, offsets, patterns, options), c10::ValueError);
}

TEST(Functional, DecodeFromPagesAndJoinedParts) {
  at::manual_seed(10);
  const at::Tensor q = at::randn({2, 1, 4, 8}), k = at::randn({2, 64, 2, 8}), v = at::randn({2, 64, 2, 8});
  PatternSpec spec;
  spec.block_q = spec.block_k = 16;
  const auto pattern = F::pattern_tensors(pattern_for(spec, 1, 64));
  ops::OptionArguments options;
  options.causal = true;
  options.key_lengths = at::tensor({64, 37});
  const auto [out, lse] = F::decode(q, k, v, pattern, options);
  for (int64_t b = 0; b < 2; ++b) {
    const int64_t n = b == 0 ? 64 : 37;
    const auto part = [&](const at::Tensor& t) { return t.slice(0, b, b + 1).slice(1, 0, n).transpose(1, 2); };
    const at::Tensor expected = at::scaled_dot_product_attention(q.slice(0, b, b + 1).transpose(1, 2), part(k), part(v),
                                                                 {}, 0, false, std::nullopt, true);
    expect_close(out.slice(0, b, b + 1), expected.transpose(1, 2), 1e-5, "out");
  }
  const at::Tensor table = at::tensor({3, 1, 0, 2, 7, 6, 4, 5}, at::kInt).view({2, 4});
  const auto pages = [&](const at::Tensor& t) {
    at::Tensor memory = at::empty({8, 16, 2, 8});
    memory.index_put_({table.flatten().to(at::kLong)}, t.view({8, 16, 2, 8}));
    return memory;
  };
  EXPECT_TRUE(at::equal(std::get<0>(F::decode(q, pages(k), pages(v), pattern, options, table)), out));

  const auto half = F::pattern_tensors(pattern_for(spec, 1, 32));
  const auto part = [&](int64_t begin) {
    return F::block_sparse_attention(q, k.slice(1, begin, begin + 32), v.slice(1, begin, begin + 32), half);
  };
  const auto [out_a, lse_a] = part(0);
  const auto [out_b, lse_b] = part(32);
  const auto [joined, joined_lse] = F::merge(out_a, lse_a, out_b, lse_b);
  const auto [whole, whole_lse] = F::block_sparse_attention(q, k, v, pattern);
  expect_close(joined, whole, 1e-5, "joined");
  expect_close(joined_lse, whole_lse, 1e-5, "lse");
}

TEST(BlockSparseAttention, SegmentsAreLongNets) {
  at::manual_seed(11);
  BlockSparseAttentionOptions options;
  options.segment_lengths = kSegments;
  options.dilation_rates = kRates;
  BlockSparseAttention attention(options);
  const at::Tensor q = at::randn({2, 50, 4, 8}, kDouble);
  const at::Tensor bhsd = q.transpose(1, 2);
  const at::Tensor expected = at::scaled_dot_product_attention(bhsd, bhsd, bhsd, log_of_times_admitted(4, 50));
  expect_close(attention->forward(q, q, q), expected.transpose(1, 2), 1e-11, "out");
  EXPECT_THROW(attention->forward(q, q.slice(1, 0, 40), q.slice(1, 0, 40)), c10::ValueError);
}

// ---- MultiheadAttention: against torch's module with the same parameters ----

struct MultiheadCase {
  const char* name;
  bool bias, bias_kv, zero_attn, other_dims;
};

class Multihead : public testing::TestWithParam<MultiheadCase> {};

// torch's C++ module adds the mask to the scores of all heads at once, so the mask of a pattern is one [L, S].
TEST_P(Multihead, EqualsTorchUnderTheMaskOfThePattern) {
  const MultiheadCase c = GetParam();
  torch::nn::MultiheadAttentionOptions options(24, 3);
  options.bias(c.bias).add_bias_kv(c.bias_kv).add_zero_attn(c.zero_attn);
  if (c.other_dims) options.kdim(20).vdim(20);
  at::manual_seed(5);
  torch::nn::MultiheadAttention theirs(options);
  theirs->to(at::kDouble);
  MultiheadAttention ours(options, sparse_spec());
  ours->to(at::kDouble);
  // The same parameters under the same names.
  ASSERT_EQ(ours->named_parameters().keys(), theirs->named_parameters().keys());
  {
    const at::NoGradGuard no_grad;
    for (auto& item : ours->named_parameters()) item.value().copy_(theirs->named_parameters()[item.key()]);
  }
  const int64_t dim = c.other_dims ? 20 : 24;
  const at::Tensor query = at::randn({50, 2, 24}, kDouble), key = at::randn({70, 2, dim}, kDouble);
  const at::Tensor value = at::randn({70, 2, dim}, kDouble);
  const at::Tensor padding = at::arange(70).expand({2, 70}) >= at::tensor({70, 65}).unsqueeze(1);
  const at::Tensor kept = kept_pairs(pattern_for(sparse_spec(), 50, 70));

  const auto [expected, expected_weights] = theirs->forward(query, key, value, padding, true, hidden(kept));
  const auto [got, weights] = ours->forward(query, key, value, padding, true);
  expect_close(got, expected, 1e-6, "output");  // sinks are fp32
  expect_close(weights, expected_weights, 1e-6, "weights");
  const auto [with_mask, per_head] = ours->forward(query, key, value, padding, true, hidden(kept), false);
  expect_close(with_mask, got, 1e-12, "the pattern's own mask changes nothing");
  EXPECT_EQ(per_head.size(1), 3);
  expect_close(per_head.mean(1), weights, 1e-6, "weights per head");

  const at::Tensor seed = at::randn(expected.sizes(), kDouble);
  expected.backward(seed);
  got.backward(seed);
  for (const auto& item : ours->named_parameters()) {
    expect_close(item.value().grad(), theirs->named_parameters()[item.key()].grad(), 1e-6, item.key().c_str());
  }
}

INSTANTIATE_TEST_SUITE_P(Options, Multihead,
                         testing::Values(MultiheadCase{"plain", true, false, false, false},
                                         MultiheadCase{"no_bias", false, false, false, false},
                                         MultiheadCase{"other_dims", true, false, false, true},
                                         MultiheadCase{"bias_kv", true, true, false, false},
                                         MultiheadCase{"zero_attn", true, false, true, false},
                                         MultiheadCase{"bias_kv_and_zero_attn", true, true, true, false}),
                         [](const auto& info) { return info.param.name; });

TEST(MultiheadAttention, DensePatternInSingleEqualsTorch) {
  at::manual_seed(6);
  torch::nn::MultiheadAttention theirs(32, 4);
  MultiheadAttention ours(32, 4);
  {
    const at::NoGradGuard no_grad;
    for (auto& item : ours->named_parameters()) item.value().copy_(theirs->named_parameters()[item.key()]);
  }
  const at::Tensor x = at::randn({45, 3, 32});
  const auto [expected, unused] = theirs->forward(x, x, x, {}, false);
  const auto [got, none] = ours->forward(x, x, x, {}, false);
  expect_close(got, expected, 1e-5, "output");
  EXPECT_FALSE(none.defined());
}

TEST(MultiheadAttention, SegmentsAreLongNets) {
  at::manual_seed(12);
  const torch::nn::MultiheadAttentionOptions options(24, 3);
  MultiheadAttention dense(options);
  dense->to(at::kDouble);
  MultiheadAttention ours(options, PatternSpec{}, kSegments, kRates);
  ours->to(at::kDouble);
  {
    const at::NoGradGuard no_grad;
    for (auto& item : ours->named_parameters()) item.value().copy_(dense->named_parameters()[item.key()]);
  }
  const at::Tensor x = at::randn({50, 2, 24}, kDouble);
  const at::Tensor mask = log_of_times_admitted(3, 50).repeat({2, 1, 1});
  const at::Tensor expected = std::get<0>(dense->forward(x, x, x, {}, false, mask));
  expect_close(std::get<0>(ours->forward(x, x, x, {}, false)), expected, 1e-11, "output");
  const auto copy = std::dynamic_pointer_cast<MultiheadAttentionImpl>(ours->clone());
  expect_close(std::get<0>(copy->forward(x, x, x, {}, false)), expected, 1e-11, "output of a copy");
  EXPECT_THROW(ours->forward(x, x, x, {}, true), c10::ValueError);  // weights
  EXPECT_FALSE(std::get<1>(ours->forward(x, x, x)).defined());
}

TEST(MultiheadAttention, StartsLikeTorchsAndCanBeCloned) {
  at::manual_seed(7);
  torch::nn::MultiheadAttention theirs(32, 4);
  at::manual_seed(7);
  MultiheadAttention ours(32, 4, sparse_spec());
  for (const auto& item : ours->named_parameters()) {
    EXPECT_TRUE(at::equal(item.value(), theirs->named_parameters()[item.key()])) << item.key();
  }
  const auto copy = std::dynamic_pointer_cast<MultiheadAttentionImpl>(ours->clone());
  const at::Tensor x = at::randn({33, 1, 32});
  EXPECT_TRUE(at::equal(std::get<0>(copy->forward(x, x, x)), std::get<0>(ours->forward(x, x, x))));
}

TEST(MultiheadAttention, WrongCallsAreValueErrors) {
  EXPECT_THROW(MultiheadAttention(30, 4), c10::ValueError);
  MultiheadAttention attention(32, 4);
  const at::Tensor x = at::randn({45, 3, 32});
  EXPECT_THROW(attention->forward(x[0], x, x), c10::ValueError);
  EXPECT_THROW(attention->forward(x, x, x, {}, false, at::zeros({45, 44})), c10::ValueError);
  EXPECT_THROW(attention->forward(x, x, x, at::zeros({3, 44}, at::kBool)), c10::ValueError);
  EXPECT_THROW(attention->forward(x, x, x, at::zeros({3, 45}, at::kInt)), c10::ValueError);
}

}  // namespace
}  // namespace tessera::nn
