// What the gradients of a dilated case should be.
#include "call/pair_mask.h"
#include "check/verdict.h"

namespace tessera::check {

namespace {

// Values in fp32, contiguous; those of 16 bits convert exactly.
TensorView in_fp32(const TensorView& from, std::vector<float>& to) {
  to.clear();
  for_each_element(from, [&](int64_t offset) {
    const char* element = static_cast<const char*>(from.data) + offset;
    to.push_back(static_cast<float>(load_as_double(element, from.dtype, 0)));
  });
  const auto& n = from.sizes;
  return make_view(static_cast<const void*>(to.data()), DType::f32, {n[0], n[1], n[2], n[3]});
}

// Of the gradients that the rule `plain` judges.
void reference(const Case& test, DilatedBackwardArgs args, Executor& executor, bool plain, GradientTruth& truth) {
  args.accumulate = false;
  GradientBounds bounds;
  const struct {
    Gradient gradient;
    MutableTensorView* view;
    float** bound;
  } wanted[] = {{kDq, &args.dq, &bounds.dq},
                {kDk, &args.dk, &bounds.dk},
                {kDv, &args.dv, &bounds.dv},
                {kDAttnBias, &args.dattn_bias, &bounds.dattn_bias}};
  for (const auto& [g, view, bound] : wanted) {
    GradientTruth::Values& v = truth.values[g];
    *view = {};
    if (v.value.empty() || v.plain != plain) continue;
    const auto& n = test.gradient(g).view.sizes;
    *view = make_view(static_cast<void*>(v.value.data()), DType::f64, {n[0], n[1], n[2], n[3]});
    *bound = v.bound.data();
  }
  reference_dilated_backward(args, executor, bounds);
}

// Which rows some pair of weight above 0 takes part in.
void touch(const Case& test, GradientTruth& truth) {
  const CaseConfig& c = test.config();
  const auto bias = summed_strides(test.gradient(kDAttnBias).view);
  std::vector<char>& bias_touched = truth.values[kDAttnBias].touched;
  for (size_t n = 0; n < test.segments().size(); ++n) {
    const Segment& s = test.segments()[n];
    const Problem& p = test.segment_problems()[n];
    const PairMask mask(p, 0);
    const auto mark = [&](int g, int64_t i, int64_t heads, int64_t head) {
      std::vector<char>& touched = truth.values[g].touched;
      if (!touched.empty()) touched[(s.batch * c.seqlen_q + s.first + i * s.rate) * heads + head] = 1;
    };
    for (int64_t q = 0; q < p.seqlen_q; ++q) {
      mask.for_each_pair(0, q, [&](int64_t, int64_t k) {
        if (!admits_by_bias(p, 0, 0, q, k)) return;
        mark(kDq, q, c.heads, s.head);
        mark(kDk, k, c.kv_heads, s.head / (c.heads / c.kv_heads));
        mark(kDv, k, c.kv_heads, s.head / (c.heads / c.kv_heads));
        if (bias_touched.empty()) return;
        bias_touched[s.batch * bias[0] + s.head * bias[1] + (s.first + q * s.rate) * bias[2] +
                     (s.first + k * s.rate) * bias[3]] = 1;
      });
    }
  }
}

}  // namespace

void dilated_gradient_truth(const Case& test, Executor& executor, bool bounded, bool plain, GradientTruth& truth,
                            std::array<std::vector<double>, kGradients>& plain_values) {
  touch(test, truth);
  const DilatedBackwardArgs& args = test.dilated_backward_args();
  if (bounded) reference(test, args, executor, false, truth);
  if (!plain) return;
  // The same call with inputs in fp32: the values are the same, the bounds those of fp32 arithmetic.
  DilatedBackwardArgs fp32 = args;
  std::vector<float> q, k, v, dout;
  fp32.q = in_fp32(args.q, q);
  fp32.k = in_fp32(args.k, k);
  fp32.v = in_fp32(args.v, v);
  fp32.dout = in_fp32(args.dout, dout);
  reference(test, fp32, executor, true, truth);
  const auto at = [&](int g) { return plain_values[g].empty() ? nullptr : plain_values[g].data(); };
  plain_dilated_gradients(test, {at(kDq), at(kDk), at(kDv), nullptr, at(kDAttnBias), nullptr});
}

}  // namespace tessera::check
