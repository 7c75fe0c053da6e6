#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <exception>
#include <limits>
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
    isas_ = options.isas;
    const std::span<const Isa> usable = usable_isas();
    if (isas_.empty()) isas_.assign(usable.begin(), usable.end());
    if (isas_.empty()) throw Error("isas", "isas: this CPU has none of the instruction sets that Tessera was built for");
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
    Verdict verdict = judge(test, truths, isa, pools_[number % 3]);
    if (number % 4 == 0) {  // a share of the cases on each number of threads
      const std::vector<std::byte> out = test.out_memory(), lse = test.lse_memory();
      for (int other = 0; other < 3; ++other) {
        if (other == number % 3) continue;
        test.run(isa, pools_[other]);
        if (test.out_memory() != out || test.lse_memory() != lse) {
          verdict = {std::numeric_limits<double>::infinity(),
                     fmt::format("{} and {} threads give different bits", number % 3 + 1, other + 1)};
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
