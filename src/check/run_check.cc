#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <exception>
#include <limits>

#include "attention/reference.h"
#include "check/cases.h"
#include "tessera/error.h"

namespace tessera {

namespace check {
namespace {

// A maximum over fewer elements is a matter of luck: there FlashAttention's rule could fail a right result (or the
// plain implementation happen to be exact), and the derived bound holds instead.
constexpr size_t kFewElements = 4096;

// What one problem of a case should give.
struct Truth {
  std::vector<double> out;       // [B, Sq, H, Dv]
  std::vector<double> lse;       // [B, H, Sq]
  std::vector<float> out_bound;  // like out
  std::vector<float> lse_bound;  // like lse
  double plain_error = 0;        // largest error of the plain implementation in the dtype of the inputs

  Truth(const Problem& problem, Executor& executor) {
    Problem p = problem;
    out.resize(p.batch * p.seqlen_q * p.heads * p.head_dim_v);
    lse.resize(p.batch * p.heads * p.seqlen_q);
    out_bound.resize(out.size());
    lse_bound.resize(lse.size());
    p.out_dtype = p.lse_dtype = DType::f64;
    p.out = {reinterpret_cast<char*>(out.data()), p.seqlen_q * p.heads * p.head_dim_v, p.heads * p.head_dim_v,
             p.head_dim_v};
    p.lse = reinterpret_cast<char*>(lse.data());
    p.lse_batch = p.heads * p.seqlen_q;
    p.lse_head = p.seqlen_q;
    p.lse_seq = 1;
    reference_attention(p, executor, out_bound.data(), lse_bound.data());
    if (problem.dtype == DType::f32 || out.size() < kFewElements) return;
    std::vector<double> plain(out.size());
    plain_attention(problem, plain.data());
    for (size_t i = 0; i < out.size(); ++i) {
      const double error = std::abs(plain[i] - out[i]);
      if (std::isfinite(error)) plain_error = std::max(plain_error, error);
    }
  }

  double out_tolerance(DType dtype, size_t i) const {
    if (dtype == DType::f32 || out.size() < kFewElements) return out_bound[i];
    const double underflow = dtype == DType::f16 ? 0x1p-25 : std::numeric_limits<float>::min();
    return 2 * plain_error + epsilon_of(dtype) / 2 * std::abs(out[i]) + underflow;
  }
};

struct Verdict {
  double worst = 0;
  std::string problem;  // empty: none

  void take(double got, double expected, double tolerance, const char* what, int64_t b, int64_t q, int64_t h,
            int64_t i) {
    double fraction = 0;
    if (!std::isfinite(expected)) {
      // NaN and infinities: which one is a matter of order, but lse -inf of a row without keys is exact.
      const bool same = std::isinf(expected) && expected < 0 ? got == expected : !std::isfinite(got);
      fraction = same ? 0 : std::numeric_limits<double>::infinity();
    } else {
      const double error = std::abs(got - expected);
      fraction = error == 0 ? 0 : error / tolerance;
      if (std::isnan(fraction)) fraction = std::numeric_limits<double>::infinity();
    }
    if (fraction > 1 && problem.empty()) {
      problem = fmt::format("{} at b={} q={} h={} d={}: got {:.9g}, expected {:.9g}, tolerance {:.3g}", what, b, q, h,
                            i, got, expected, tolerance);
    }
    worst = std::max(worst, fraction);
  }
};

void compare(const Problem& p, const Truth& truth, Verdict& verdict) {
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.heads; ++h) {
      for (int64_t q = 0; q < p.seqlen_q; ++q) {
        const char* row = p.out.at(b, q, h, size_of(p.out_dtype));
        for (int64_t i = 0; i < p.head_dim_v; ++i) {
          const size_t at = ((b * p.seqlen_q + q) * p.heads + h) * p.head_dim_v + i;
          // -inf is no lse here: only NaN and infinities of V and K make an output that is not finite.
          const double expected = std::isfinite(truth.out[at]) ? truth.out[at] : std::nan("");
          verdict.take(load_as_double(row, p.out_dtype, i), expected, truth.out_tolerance(p.dtype, at), "out", b, q,
                       h, i);
        }
        const size_t at = (b * p.heads + h) * p.seqlen_q + q;
        const double got = load_as_double(p.lse, p.lse_dtype, b * p.lse_batch + h * p.lse_head + q * p.lse_seq);
        verdict.take(got, truth.lse[at], truth.lse_bound[at], "lse", b, q, h, 0);
      }
    }
  }
}

class Checker {
 public:
  Checker(const CheckOptions& options, Executor& executor) : options_(options), executor_(executor) {
    if (options.cases < 0) fail("cases", fmt::format("{}", options.cases), ">= 0");
    isas_ = options.isas;
    const std::span<const Isa> usable = usable_isas();
    if (isas_.empty()) isas_.assign(usable.begin(), usable.end());
    for (const Isa isa : isas_) {
      if (std::find(usable.begin(), usable.end(), isa) == usable.end()) {
        fail("isas", name_of(isa), "an ISA that this CPU and build have");
      }
    }
    report_.seed = options.seed;
  }

  CheckReport run(const std::function<void(int64_t, int64_t)>& on_progress) {
    for (int64_t n = 0; n < options_.cases; ++n) {
      run_case(options_.first_case + n);
      ++report_.cases;
      if (on_progress) on_progress(n + 1, options_.cases);
    }
    std::sort(report_.rows.begin(), report_.rows.end(), [](const CheckRow& a, const CheckRow& b) {
      return std::tuple(a.isa, a.path, a.dtype) < std::tuple(b.isa, b.path, b.dtype);
    });
    return std::move(report_);
  }

 private:
  void run_case(int64_t number) {
    const CaseConfig config = random_config(options_.seed, number);
    Isa running = Isa::automatic;
    try {
      Case test(config);
      std::vector<Truth> truths;
      for (const Problem& p : test.problems()) truths.emplace_back(p, executor_);
      for (const Isa isa : isas_) {
        running = isa;
        record(number, isa, config, run_isa(number, isa, test, truths));
      }
    } catch (const std::exception& e) {
      Verdict verdict;
      verdict.worst = std::numeric_limits<double>::infinity();
      verdict.problem = fmt::format("exception: {}", e.what());
      record(number, running, config, verdict);
    }
  }

  Verdict run_isa(int64_t number, Isa isa, Case& test, const std::vector<Truth>& truths) {
    Verdict verdict;
    const auto complain = [&](std::string problem) {
      verdict.worst = std::numeric_limits<double>::infinity();
      if (verdict.problem.empty()) verdict.problem = std::move(problem);
    };
    const ForwardInfo info = test.run(isa, pools_[number % 3]);
    if (info.isa != isa) complain(fmt::format("{} ran instead", name_of(info.isa)));
    if (!test.surroundings_intact()) complain("bytes outside the elements of out or lse were written");
    for (size_t i = 0; i < truths.size(); ++i) compare(test.problems()[i], truths[i], verdict);
    if (number % 4 == 0) {  // a share of the cases on each number of threads
      const std::vector<std::byte> out = test.out_memory(), lse = test.lse_memory();
      for (int other = 0; other < 3; ++other) {
        if (other == number % 3) continue;
        test.run(isa, pools_[other]);
        if (test.out_memory() != out || test.lse_memory() != lse) {
          complain(fmt::format("{} and {} threads give different bits", number % 3 + 1, other + 1));
        }
      }
    }
    return verdict;
  }

  void record(int64_t number, Isa isa, const CaseConfig& config, const Verdict& verdict) {
    auto row = std::find_if(report_.rows.begin(), report_.rows.end(), [&](const CheckRow& r) {
      return r.isa == isa && r.path == config.path && r.dtype == config.dtype;
    });
    if (row == report_.rows.end()) {
      report_.rows.push_back({isa, config.path, config.dtype});
      row = report_.rows.end() - 1;
    }
    ++row->cases;
    row->worst = std::max(row->worst, verdict.worst);
    if (verdict.problem.empty()) return;
    ++row->failures;
    report_.failures.push_back({number, isa, config.path, config.dtype, verdict.problem, describe(config)});
  }

  CheckOptions options_;
  Executor& executor_;
  std::vector<Isa> isas_;
  std::array<ThreadPool, 3> pools_{ThreadPool(1), ThreadPool(2), ThreadPool(3)};
  CheckReport report_;
};

}  // namespace
}  // namespace check

std::string_view name_of(CheckPath path) {
  switch (path) {
    case CheckPath::panel: return "panel";
    case CheckPath::decode: return "decode";
    case CheckPath::varlen: return "varlen";
    case CheckPath::paged: return "paged";
  }
  return "?";
}

CheckReport run_check(const CheckOptions& options, Executor& executor,
                      const std::function<void(int64_t done, int64_t total)>& on_progress) {
  return check::Checker(options, executor).run(on_progress);
}

}  // namespace tessera
