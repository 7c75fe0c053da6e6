#include "check/verdict.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "reference/forward.h"

namespace tessera::check {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Place {
  int64_t b, q, h, d;
};

void take(Verdict& verdict, double got, double expected, double tolerance, const char* what, const Place& at) {
  const double fraction = error_fraction(got, expected, tolerance);
  if (fraction > 1 && verdict.problem.empty()) {
    verdict.problem = fmt::format("{} at b={} q={} h={} d={}: got {:.9g}, expected {:.9g}, tolerance {:.3g}", what,
                                  at.b, at.q, at.h, at.d, got, expected, tolerance);
  }
  verdict.worst = std::max(verdict.worst, fraction);
}

}  // namespace

double largest_error(const std::vector<double>& plain, const std::vector<double>& exact) {
  double largest = 0;
  for (size_t i = 0; i < plain.size(); ++i) {
    const double error = std::abs(plain[i] - exact[i]);
    if (std::isfinite(error)) largest = std::max(largest, error);
  }
  return largest;
}

double error_fraction(double got, double expected, double tolerance) {
  if (!std::isfinite(expected)) {
    // NaN or +inf: which of them is a matter of order. -inf is the lse of a row without keys, and exact.
    const bool same = expected == -kInfinity ? got == expected : !std::isfinite(got);
    return same ? 0 : kInfinity;
  }
  const double error = std::abs(got - expected);
  const double fraction = error == 0 ? 0 : error / tolerance;
  return std::isnan(fraction) ? kInfinity : fraction;
}

void Verdict::complain(std::string what) {
  worst = kInfinity;
  if (problem.empty()) problem = std::move(what);
}

Truth::Truth(const Problem& problem, Executor& executor) {
  Problem p = problem;
  keep = 1 / (1 - p.dropout.p);
  out.resize(p.batch * p.seqlen_q * p.heads * p.head_dim_v);
  lse.resize(p.batch * p.heads * p.seqlen_q);
  out_bound.resize(out.size());
  lse_bound.resize(lse.size());
  p.out_dtype = p.lse_dtype = DType::f64;
  p.out = {reinterpret_cast<char*>(out.data()), p.seqlen_q * p.heads * p.head_dim_v, p.heads * p.head_dim_v,
           p.head_dim_v};
  p.lse = {reinterpret_cast<char*>(lse.data()), p.heads * p.seqlen_q, 1, p.seqlen_q};
  reference_attention(p, executor, out_bound.data(), lse_bound.data());
  if (problem.dtype == DType::f32 || out.size() < kFewElements) return;
  std::vector<double> plain(out.size());
  plain_attention(problem, plain.data());
  plain_error = largest_error(plain, out);
}

namespace {

Truth dilated_truth(const Case& test, Executor& executor) {
  const Problem& p = test.problems()[0];
  Truth t;
  t.keep = 1 / (1 - p.dropout.p);
  t.out.resize(p.batch * p.seqlen_q * p.heads * p.head_dim_v);
  t.lse.resize(p.batch * p.heads * p.seqlen_q);
  t.out_bound.resize(t.out.size());
  t.lse_bound.resize(t.lse.size());
  if (t.out.empty()) return t;
  DilatedForwardArgs args = test.dilated_args();
  args.out = make_view(static_cast<void*>(t.out.data()), DType::f64, {p.batch, p.seqlen_q, p.heads, p.head_dim_v});
  args.lse = make_view(static_cast<void*>(t.lse.data()), DType::f64, {p.batch, p.heads, p.seqlen_q});
  reference_dilated_forward(args, executor, t.out_bound.data(), t.lse_bound.data());
  if (p.dtype == DType::f32 || t.out.size() < kFewElements) return t;
  std::vector<double> plain(t.out.size());
  plain_dilated(test, plain.data());
  t.plain_error = largest_error(plain, t.out);
  return t;
}

}  // namespace

std::vector<Truth> truths_of(const Case& test, Executor& executor) {
  std::vector<Truth> truths;
  if (test.config().path == CheckPath::dilated) {
    truths.push_back(dilated_truth(test, executor));
  } else {
    for (const Problem& p : test.problems()) truths.emplace_back(p, executor);
  }
  return truths;
}

double Truth::out_tolerance(DType dtype, size_t i) const {
  if (dtype == DType::f32 || out.size() < kFewElements) return out_bound[i];
  // A subnormal value may count as 0 before it is multiplied.
  const double underflow = dtype == DType::f16 ? 0x1p-25 : keep * std::numeric_limits<float>::min();
  return 2 * plain_error + epsilon_of(dtype) / 2 * std::abs(out[i]) + underflow;
}

void compare(const Problem& p, const Truth& truth, Verdict& verdict) {
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.heads; ++h) {
      for (int64_t q = 0; q < p.seqlen_q; ++q) {
        const char* row = p.out.at(b, q, h, size_of(p.out_dtype));
        for (int64_t i = 0; i < p.head_dim_v; ++i) {
          const size_t at = ((b * p.seqlen_q + q) * p.heads + h) * p.head_dim_v + i;
          // -inf is no lse here: only NaN and infinities of V and K make an output that is not finite.
          const double expected = std::isfinite(truth.out[at]) ? truth.out[at] : std::nan("");
          take(verdict, load_as_double(row, p.out_dtype, i), expected, truth.out_tolerance(p.dtype, at), "out",
               {b, q, h, i});
        }
        const size_t at = (b * p.heads + h) * p.seqlen_q + q;
        const double got = p.load_lse(b, h, q);
        take(verdict, got, truth.lse[at], truth.lse_bound[at], "lse", {b, q, h, 0});
        // -inf says that the row sees no key: backward leaves it out then.
        if (got == -kInfinity && truth.lse[at] != -kInfinity) {
          verdict.complain(fmt::format("lse at b={} q={} h={}: got -inf, expected {}", b, q, h, truth.lse[at]));
        }
      }
    }
  }
}

Verdict judge(Case& test, const std::vector<Truth>& truths, Isa isa, Executor& executor) {
  Verdict verdict;
  const ForwardInfo info = test.run(isa, executor);
  for (size_t i = 0; i < truths.size(); ++i) compare(test.problems()[i], truths[i], verdict);
  if (info.isa != isa) verdict.complain(fmt::format("{} ran instead", name_of(info.isa)));
  if (!test.surroundings_intact()) verdict.complain("bytes outside the elements of out or lse were written");
  return verdict;
}

}  // namespace tessera::check
