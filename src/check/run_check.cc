#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <exception>
#include <limits>
#include <optional>
#include <tuple>

#include "check/verdict.h"
#include "tessera/error.h"

namespace tessera {

namespace check {
namespace {

class Checker {
 public:
  Checker(const CheckOptions& options, Executor& executor) : options_(options), executor_(executor) {
    if (options.cases < 0) fail("cases", fmt::format("{}", options.cases), ">= 0");
    constexpr int64_t most = std::numeric_limits<int64_t>::max();
    if (options.first_case < 0 || options.first_case > most - options.cases) {
      fail("first_case", fmt::format("{}", options.first_case), fmt::format("0..{}", most - options.cases));
    }
    isas_ = options.isas;
    const std::span<const Isa> usable = usable_isas();
    if (isas_.empty()) isas_.assign(usable.begin(), usable.end());
    if (isas_.empty()) throw Error("isas", "isas: this CPU has none of the instruction sets Tessera was built for");
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
      return std::tuple(a.isa, a.pass, a.path, a.dtype) < std::tuple(b.isa, b.pass, b.path, b.dtype);
    });
    return std::move(report_);
  }

 private:
  bool wants(CheckPass pass) const {
    const std::vector<CheckPass>& passes = options_.passes;
    return passes.empty() || std::find(passes.begin(), passes.end(), pass) != passes.end();
  }

  void run_case(int64_t number) {
    const CaseConfig config = random_config(options_.seed, number);
    Isa running = Isa::automatic;
    CheckPass pass = CheckPass::fwd;
    try {
      Case test(config);
      std::vector<Truth> truths;
      if (wants(CheckPass::fwd)) {
        truths = truths_of(test, executor_);
      }
      std::optional<GradientTruth> gradients;
      if (wants(CheckPass::bwd) && test.has_backward()) {
        pass = CheckPass::bwd;
        gradients.emplace(test, executor_);
      }
      for (const Isa isa : isas_) {
        running = isa;
        pass = CheckPass::fwd;
        if (wants(pass)) record(number, isa, pass, config, run_forward(number, isa, test, truths));
        else if (gradients) test.run(isa, executor_);  // out and lse
        if (!gradients) continue;
        pass = CheckPass::bwd;
        record(number, isa, pass, config, run_backward(number, isa, test, *gradients));
      }
    } catch (const std::exception& e) {
      Verdict verdict;
      verdict.complain(fmt::format("exception: {}", e.what()));
      record(number, running, pass, config, verdict);
    }
  }

  Verdict run_forward(int64_t number, Isa isa, Case& test, const std::vector<Truth>& truths) {
    Verdict verdict = judge(test, truths, isa, first_pool(number));
    const std::vector<std::byte> out = test.out_memory(), lse = test.lse_memory();
    on_other_pools(number, verdict, [&](Executor& pool) {
      test.run(isa, pool);
      return test.out_memory() == out && test.lse_memory() == lse;
    });
    return verdict;
  }

  Verdict run_backward(int64_t number, Isa isa, Case& test, const GradientTruth& truth) {
    Verdict verdict = judge_backward(test, truth, isa, first_pool(number));
    const std::vector<std::byte> gradients = test.gradient_memory();
    on_other_pools(number, verdict, [&](Executor& pool) {
      test.run_backward(isa, pool);
      return test.gradient_memory() == gradients;
    });
    return verdict;
  }

  size_t first_index(int64_t number) const { return static_cast<size_t>(number) % pools_.size(); }
  ThreadPool& first_pool(int64_t number) { return pools_[first_index(number)]; }

  // A share of the cases runs on each number of threads; same(pool) says whether the bits stay.
  template <class Same>
  void on_other_pools(int64_t number, Verdict& verdict, Same same) {
    if (number % 3 != 0) return;
    for (size_t i = 0; i < pools_.size(); ++i) {
      if (i == first_index(number) || same(pools_[i])) continue;
      verdict.complain(fmt::format("{} and {} threads give different bits", first_pool(number).num_threads(),
                                   pools_[i].num_threads()));
    }
  }

  void record(int64_t number, Isa isa, CheckPass pass, const CaseConfig& config, const Verdict& verdict) {
    auto row = std::find_if(report_.rows.begin(), report_.rows.end(), [&](const CheckRow& r) {
      return r.isa == isa && r.pass == pass && r.path == config.path && r.dtype == config.dtype;
    });
    if (row == report_.rows.end()) {
      report_.rows.push_back({isa, pass, config.path, config.dtype});
      row = report_.rows.end() - 1;
    }
    ++row->cases;
    row->worst = std::max(row->worst, verdict.worst);
    if (verdict.problem.empty()) return;
    ++row->failures;
    report_.failures.push_back({number, isa, pass, config.path, config.dtype, verdict.problem, describe(config)});
  }

  CheckOptions options_;
  Executor& executor_;
  std::vector<Isa> isas_;
  std::array<ThreadPool, 4> pools_{ThreadPool(1), ThreadPool(2), ThreadPool(3), ThreadPool(5)};
  CheckReport report_;
};

}  // namespace
}  // namespace check

std::string_view name_of(CheckPass pass) { return pass == CheckPass::fwd ? "fwd" : "bwd"; }

std::string_view name_of(CheckPath path) {
  switch (path) {
    case CheckPath::panel: return "panel";
    case CheckPath::decode: return "decode";
    case CheckPath::varlen: return "varlen";
    case CheckPath::paged: return "paged";
    case CheckPath::dilated: return "dilated";
  }
  return "?";
}

CheckReport run_check(const CheckOptions& options, Executor& executor,
                      const std::function<void(int64_t done, int64_t total)>& on_progress) {
  return check::Checker(options, executor).run(on_progress);
}

}  // namespace tessera
