#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "call/pair_mask.h"
#include "call/rows.h"
#include "check/verdict.h"
#include "reference/backward.h"

namespace tessera::check {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kMaxF16 = 65504;

double smallest_step(DType dtype) {  // half of it: the error of rounding a number near 0
  if (dtype == DType::f16) return 0x1p-24;
  return dtype == DType::f64 ? 0 : std::numeric_limits<float>::min();
}

// One problem of a case, with gradients that go to the truth's arrays.
class Part {
 public:
  Part(const Case& test, size_t n, GradientTruth& truth)
      : test_(test), truth_(truth), p_(test.backward_problems()[n].forward), bp_(test.backward_problems()[n]) {
    first_[kDq] = test.first_q(n) * p_.heads * p_.head_dim;
    first_[kDk] = test.first_k(n) * p_.kv_heads * p_.head_dim;
    first_[kDv] = test.first_k(n) * p_.kv_heads * p_.head_dim_v;
  }

  // Values and bounds of the gradients that the bound alone judges.
  void reference(Executor& executor) { reference(executor, bp_, false); }

  // Those that FlashAttention's rule judges: of the same call with inputs in fp32, to which they convert exactly. The
  // values are the same, the bounds those of fp32 arithmetic.
  void reference_in_fp32(Executor& executor) {
    BackwardProblem bp = bp_;
    std::vector<float> q, k, v, dout;
    bp.forward.dtype = DType::f32;
    bp.forward.q = in_fp32(p_.q, p_.seqlen_q, p_.heads, p_.head_dim, q);
    bp.forward.k = in_fp32(p_.k, p_.seqlen_k, p_.kv_heads, p_.head_dim, k);
    bp.forward.v = in_fp32(p_.v, p_.seqlen_k, p_.kv_heads, p_.head_dim_v, v);
    bp.dout = in_fp32(bp_.dout, p_.seqlen_q, p_.heads, p_.head_dim_v, dout);
    reference(executor, bp, true);
  }

  // Which elements some pair takes part in.
  void touch() {
    for (int64_t b = 0; b < p_.batch; ++b) {
      const PairMask mask(p_, b);
      for (int64_t h = 0; h < p_.heads; ++h) {
        for (int64_t q = 0; q < p_.seqlen_q; ++q) {
          mask.for_each_pair(h, q, [&](int64_t entry, int64_t k) {
            if (admits_by_bias(p_, b, h, q, k)) touch_pair(b, h, q, k, entry);
          });
        }
      }
    }
  }

  void plain(const std::array<std::vector<double>, kGradients>& to) {
    const auto at = [&](Gradient g) { return to[g].empty() ? nullptr : const_cast<double*>(to[g].data()) + first_[g]; };
    plain_gradients(bp_, {at(kDq), at(kDk), at(kDv), at(kDBlockBias), at(kDAttnBias), at(kDSinks)});
  }

 private:
  void reference(Executor& executor, BackwardProblem bp, bool plain) {
    const auto value = [&](Gradient g) {
      GradientTruth::Values& v = truth_.values[g];
      return v.value.empty() || v.plain != plain ? nullptr : v.value.data() + first_[g];
    };
    const auto bound = [&](Gradient g) { return value(g) ? truth_.values[g].bound.data() + first_[g] : nullptr; };
    const auto rows = [&](Gradient g, int64_t seqlen, int64_t heads, int64_t dim) {
      return Strided{reinterpret_cast<char*>(value(g)), seqlen * heads * dim, heads * dim, dim};
    };
    bp.accumulate = false;
    bp.gradient_dtype = bp.dattn_bias_dtype = DType::f64;
    bp.dq = rows(kDq, p_.seqlen_q, p_.heads, p_.head_dim);
    bp.dk = rows(kDk, p_.seqlen_k, p_.kv_heads, p_.head_dim);
    bp.dv = rows(kDv, p_.seqlen_k, p_.kv_heads, p_.head_dim_v);
    std::vector<float> dblock_bias(value(kDBlockBias) ? truth_.values[kDBlockBias].value.size() : 0);
    bp.dblock_bias = dblock_bias.empty() ? nullptr : dblock_bias.data();
    const auto bias = summed_strides(test_.gradient(kDBlockBias).view);
    bp.dbias_batch = bias[0], bp.dbias_head = bias[1], bp.dbias_entry = bias[2];
    bp.dattn_bias = reinterpret_cast<char*>(value(kDAttnBias));
    const auto attn = summed_strides(test_.gradient(kDAttnBias).view);
    std::copy(attn.begin(), attn.end(), bp.dattn_bias_stride);
    std::vector<float> dsinks(value(kDSinks) ? p_.heads : 0), dsinks_bound(dsinks.size());
    bp.dsinks = dsinks.empty() ? nullptr : dsinks.data();
    bp.dsinks_head = 1;
    reference_gradients(bp, executor,
                        {bound(kDq), bound(kDk), bound(kDv), bound(kDBlockBias), bound(kDAttnBias),
                         dsinks.empty() ? nullptr : dsinks_bound.data()});
    std::copy(dblock_bias.begin(), dblock_bias.end(), truth_.values[kDBlockBias].value.begin());
    for (size_t h = 0; h < dsinks.size(); ++h) {  // the sum of all packed sequences
      truth_.values[kDSinks].value[h] += dsinks[h];
      truth_.values[kDSinks].bound[h] += dsinks_bound[h];
    }
  }
  Strided in_fp32(const Strided& from, int64_t seqlen, int64_t heads, int64_t dim, std::vector<float>& to) const {
    to.resize(p_.batch * seqlen * heads * dim);
    const Strided copy{reinterpret_cast<char*>(to.data()), seqlen * heads * dim, heads * dim, dim};
    for (int64_t b = 0; b < p_.batch; ++b) {
      for (int64_t s = 0; s < seqlen; ++s) {
        for (int64_t h = 0; h < heads; ++h) {
          load_row(from.at(b, s, h, size_of(p_.dtype)), p_.dtype, dim,
                   reinterpret_cast<float*>(copy.at(b, s, h, sizeof(float))));
        }
      }
    }
    return copy;
  }
  void touch_pair(int64_t b, int64_t h, int64_t q, int64_t k, int64_t entry) {
    const auto touch = [&](Gradient g, int64_t at) {
      GradientTruth::Values& v = truth_.values[g];
      if (!v.touched.empty()) v.touched[first_[g] / v.inner + at] = 1;
    };
    touch(kDq, (b * p_.seqlen_q + q) * p_.heads + h);
    touch(kDk, (b * p_.seqlen_k + k) * p_.kv_heads + h / p_.group());
    touch(kDv, (b * p_.seqlen_k + k) * p_.kv_heads + h / p_.group());
    const auto bias = summed_strides(test_.gradient(kDBlockBias).view);
    const auto attn = summed_strides(test_.gradient(kDAttnBias).view);
    touch(kDBlockBias, b * bias[0] + h * bias[1] + entry * bias[2]);
    touch(kDAttnBias, b * attn[0] + h * attn[1] + q * attn[2] + k * attn[3]);
    touch(kDSinks, h);
  }

  const Case& test_;
  GradientTruth& truth_;
  const Problem& p_;
  const BackwardProblem& bp_;
  int64_t first_[kGradients] = {};  // where this problem begins in packed gradients
};

// Blocks that a kernel may add one after another to what a gradient held before.
int64_t blocks_summed(const Case& test, int g) {
  const CaseConfig& c = test.config();
  if (c.path == CheckPath::dilated) {  // at most that of the smallest blocks without dilation
    const int64_t blocks = (c.seqlen_q + 15) / 16 * static_cast<int64_t>(c.segment_lengths.size());
    return g == kDq ? blocks : blocks * (c.heads / c.kv_heads);
  }
  const PatternShape& s = test.backward_args().pattern.shape();
  return g == kDq ? s.cols() : s.rows() * (c.heads / std::max<int64_t>(1, c.kv_heads));
}

}  // namespace

std::array<int64_t, 4> summed_strides(const TensorView& t) {
  std::array<int64_t, 4> strides{};
  int64_t stride = 1;
  for (int i = t.rank - 1; i >= 0; --i) {
    strides[i] = t.sizes[i] == 1 ? 0 : stride;
    stride *= t.sizes[i];
  }
  return strides;
}

GradientTruth::GradientTruth(const Case& test, Executor& executor, bool by_bound) {
  const CaseConfig& c = test.config();
  values[kDq].inner = values[kDk].inner = c.head_dim;
  values[kDv].inner = c.head_dim_v;
  bool plain = false, bounded = false;
  std::array<std::vector<double>, kGradients> plain_values;
  for (int g = 0; g < kGradients; ++g) {
    if (!test.gradient(g).view.defined()) continue;
    Values& v = values[g];
    v.value.resize(test.gradient(g).view.numel());
    v.bound.resize(v.value.size());
    v.touched.resize(v.value.size() / v.inner);
    v.plain = !by_bound && (c.dtype == DType::bf16 || c.dtype == DType::f16) && v.value.size() >= kFewElements;
    if (v.plain) plain_values[g].resize(v.value.size());
    (v.plain ? plain : bounded) = true;
  }
  const bool dilated = c.path == CheckPath::dilated;
  if (dilated) dilated_gradient_truth(test, executor, bounded, plain, *this, plain_values);
  for (size_t n = 0; !dilated && n < test.backward_problems().size(); ++n) {
    Part part(test, n, *this);
    part.touch();
    if (bounded) part.reference(executor);
    if (plain) part.reference_in_fp32(executor);
    if (plain) part.plain(plain_values);
  }
  for (int g = 0; g < kGradients; ++g) values[g].plain_error = largest_error(plain_values[g], values[g].value);
}

Verdict judge_backward(Case& test, const GradientTruth& truth, Isa isa, Executor& executor) {
  Verdict verdict;
  const BackwardInfo info = test.run_backward(isa, executor);
  // Where a handful of rows count, the plain implementation may be right by luck: its roundings cancel. What exceeds
  // its rule is then judged by the bound on arithmetic in its own dtype.
  std::optional<GradientTruth> bounded;
  for (int g = 0; g < kGradients; ++g) {
    const MutableTensorView& view = test.gradient(g).view;
    if (!view.defined()) continue;
    const GradientTruth::Values& want = truth.values[g];
    size_t i = 0;
    for_each_element(view, [&](int64_t offset) {
      const double got = load_as_double(static_cast<char*>(view.data) + offset, view.dtype, 0);
      const double before = test.before(g, test.gradient(g).base() + offset);
      const double value = want.value[i], expected = before + value;
      double tolerance = 0, rounding = 0;
      if (want.touched[i / want.inner]) {
        rounding = epsilon_of(view.dtype) / 2 * std::abs(expected) + smallest_step(view.dtype);
        if (before != 0) rounding += epsilon_of(DType::f32) * blocks_summed(test, g) * std::abs(before);
        tolerance = 2 * want.plain_error + want.bound[i] + rounding;
      }
      double fraction = error_fraction(got, expected, tolerance);
      if (want.plain && want.touched[i / want.inner] && fraction > 1) {
        if (!bounded) bounded.emplace(test, executor, true);
        tolerance = std::max(tolerance, bounded->values[g].bound[i] + rounding);
        fraction = error_fraction(got, expected, tolerance);
      }
      if (view.dtype == DType::f16 && std::abs(expected) + tolerance > kMaxF16 && !std::isfinite(got)) fraction = 0;
      if (fraction > 1 && verdict.problem.empty()) {
        size_t rest = i;
        std::array<int64_t, 4> at{};
        for (int j = view.rank - 1; j >= 0; --j) {
          at[j] = static_cast<int64_t>(rest) % view.sizes[j];
          rest /= view.sizes[j];
        }
        std::string place;
        for (int j = 0; j < view.rank; ++j) place += fmt::format("{}{}", j ? "," : "", at[j]);
        verdict.problem = fmt::format("{}[{}]: got {:.9g}, expected {:.9g}, tolerance {:.3g}", kGradientNames[g], place,
                                      got, expected, tolerance);
      }
      verdict.worst = std::max(verdict.worst, fraction);
      ++i;
    });
  }
  if (info.isa != isa) verdict.complain(fmt::format("{} ran instead", name_of(info.isa)));
  if (!test.gradient_surroundings_intact()) {
    verdict.complain("bytes outside the elements of a gradient were written");
  }
  return verdict;
}

}  // namespace tessera::check
