// Every kernel of every ISA of this machine against the fp64 reference, on random cases: what `tessera check` and
// tests/check_test.cc run.
//
// Tolerance. fp32: a bound on the rounding error of each element of the output or gradient, derived from epsilon and
// sum lengths. bf16, fp16: FlashAttention's rule: the largest error is at most twice that of a plain implementation
// that rounds scores, weights and output (backward: also delta, dP and dS; dilated: also the partial results, and their
// weights in the join) to the same dtype, plus one rounding of the result (backward: and the bound of fp32, as a plain
// implementation may be exact where weights are 0 or 1). The backward takes out and lse from the forward kernel of the
// same ISA. Results are also checked for bytes written outside their elements, gradients that no pair takes part in for
// being exactly 0, and a share of the cases for bit-equality on 1, 2, 3 and 5 threads.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "tessera/attention.h"

namespace tessera {

// How the kernel is reached: a batch with more than 16 queries, at most 16 (the decode schedule where keys are more
// than a few), packed sequences, a paged cache, or dilated attention.
enum class CheckPath : uint8_t { panel, decode, varlen, paged, dilated };
std::string_view name_of(CheckPath path);  // "panel", "decode", "varlen", "paged", "dilated"

enum class CheckPass : uint8_t { fwd, bwd };
std::string_view name_of(CheckPass pass);  // "fwd", "bwd"

struct CheckOptions {
  int64_t cases = 500;
  uint64_t seed = 0;
  int64_t first_case = 0;         // runs cases first_case .. first_case + cases - 1 of the seed: a failure alone
  std::vector<Isa> isas;          // empty: all usable ones
  std::vector<CheckPass> passes;  // empty: both
};

// One line of the report: all cases of one kernel.
struct CheckRow {
  Isa isa;
  CheckPass pass;
  CheckPath path;
  DType dtype;
  int64_t cases = 0;
  int64_t failures = 0;
  double worst = 0;  // largest error as a fraction of its tolerance; above 1 fails
};

struct CheckFailure {
  int64_t case_number;  // with the seed, reproduces it: CheckOptions{.cases = 1, .seed, .first_case = case_number}
  Isa isa;
  CheckPass pass;
  CheckPath path;
  DType dtype;
  std::string problem;  // what went wrong, and where
  std::string config;   // the case in words: shapes, pattern, options
};

struct CheckReport {
  uint64_t seed = 0;
  int64_t cases = 0;
  std::vector<CheckRow> rows;  // by isa, pass, path, dtype; those that ran
  std::vector<CheckFailure> failures;
  bool passed() const { return failures.empty(); }
};

// Runs each case on each ISA, forward and backward (a paged cache has no backward). on_progress(done, total), if given,
// is called after each case on the calling thread. The executor runs the fp64 reference; the kernels run on pools of 1
// to 5 threads of their own. Error for an ISA that this CPU lacks, or cases < 0.
CheckReport run_check(const CheckOptions& options, Executor& executor,
                      const std::function<void(int64_t done, int64_t total)>& on_progress = {});

}  // namespace tessera
