// Time to make a pattern of 1,048,576 tokens, block 128, density .005, with its transposed form (bar: 50 ms).
#include <benchmark/benchmark.h>

#include <string>

#include "tessera/patterns.h"

namespace tessera {
namespace {

PatternSpec million_tokens(PatternKind kind, bool causal) {
  PatternSpec spec;
  spec.kind = kind;
  spec.seqlen_q = spec.seqlen_k = int64_t{1} << 20;
  spec.causal = causal;
  if (kind == PatternKind::dilated_segments) {
    spec.segment_lengths = {4096, 8192, 16384};
    spec.dilation_rates = {1, 4, 16};
  } else {
    spec.density = 0.005;
  }
  if (kind == PatternKind::hierarchical) {
    spec.ranks = 8;
    spec.ranks_per_node = 4;
  }
  return spec;
}

void make_with_transposed(benchmark::State& state, PatternKind kind, bool causal) {
  const PatternSpec spec = million_tokens(kind, causal);
  for (auto _ : state) {
    const BlockPattern pattern = make_pattern(spec);
    benchmark::DoNotOptimize(pattern.transposed().indptr);
    state.counters["blocks"] = static_cast<double>(pattern.num_blocks());
  }
}

// Registered before main: one benchmark a kind and direction, but those that keep everything.
const bool registered = [] {
  for (PatternKind kind : all_pattern_kinds()) {
    if (kind == PatternKind::dense || kind == PatternKind::causal) continue;
    for (bool causal : {false, true}) {
      const std::string name = std::string(name_of(kind)) + (causal ? "/causal" : "");
      benchmark::RegisterBenchmark(name.c_str(), make_with_transposed, kind, causal)->Unit(benchmark::kMillisecond);
    }
  }
  return true;
}();

}  // namespace
}  // namespace tessera
