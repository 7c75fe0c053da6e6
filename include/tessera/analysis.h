// Judging patterns against the true attention of real queries, keys and values: quality, mass maps, oracle patterns,
// the search for the cheapest pattern, and quality-against-density curves.
//
// Everything is exact and streamed: each admitted (query, key) pair is scored once, in fp32 (sums of masses in fp64),
// and nothing of size Sq x Sk is ever held. Scratch is per thread: block_q x ceil(Sk / block_k) numbers and a row of
// blocks of outputs a pattern. Results are the same for any number of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "tessera/attention.h"
#include "tessera/block_pattern.h"
#include "tessera/error.h"
#include "tessera/executor.h"
#include "tessera/patterns.h"
#include "tessera/tensor_view.h"

namespace tessera {

// The attention that patterns are judged against: dense attention of q, k, v under `options`. "Mass" of a pair is its
// softmax weight in it, so a row that sees a key has mass 1 over its keys (a sink's share is left out). options must
// not hold block_bias or dropout; everything else counts (causal, window, offsets, key lengths, scale, softcap,
// ALiBi, attn_bias, sinks).
struct AnalysisInput {
  TensorView q;  // [B, Sq, H, D], any floating dtype, any strides with last 1
  TensorView k;  // [B, Sk, Hkv, D]
  TensorView v;  // [B, Sk, Hkv, Dv]; undefined: no output errors
  AttentionOptions options;
};

// What attention computes and analysis cannot judge: an admitted score or value that is NaN or infinite.
class NotFinite : public Error {
  using Error::Error;
};

// Figures of one head (of one batch), or of all together. Coverage counts rows that see a key.
struct QualityFigures {
  double coverage = 0;         // share of the true mass that the kept blocks hold: mean over rows, in 0..1
  double coverage_p5 = 0;      // ... the row at the 5th percentile (nearest rank)
  double coverage_min = 0;     // ... the worst row
  double density = 0;          // kept / admissible block pairs; admissible: holds a (q, k) that options admit
  double efficiency = 0;       // coverage / density: 1 is what random blocks would hold
  double locality = 0;         // coverage of the nearest blocks to the diagonal at this pattern's budget of each row
  double oracle_coverage = 0;  // coverage of the best choice of whole blocks at this pattern's budget of each row
  double oracle_ratio = 0;     // coverage / oracle_coverage
  double bound_coverage = 0;   // the most that any choice of as many blocks keeps, over all rows (at most 1 % above it)
  // |sparse - dense| / |dense| (Frobenius) of the attention outputs, sparse renormalised over the kept keys; not set
  // without v.
  std::optional<double> output_error;
  int64_t rows = 0;  // token rows judged
};

// Every figure with its name; an output error that is not set is NaN.
std::vector<std::pair<std::string, double>> named(const QualityFigures& figures);

struct Quality : QualityFigures {
  std::vector<QualityFigures> heads;  // [B * H]: (b, h) at b * H + h
};

struct QualityOptions {
  // 0: all token rows. Else: about this many token rows of each head, one at random in each of as many equal strata
  // of the sequence. Locality and oracle are then of the sampled rows, chosen per row of blocks as before: with few
  // rows in each row of blocks the oracle is an upper bound.
  int64_t sample_rows = 0;
  uint64_t seed = 0;  // of the sample
};

// Quality of each pattern; patterns of the same block size share one pass, so many cost little more than one.
// Errors: a pattern's lengths, heads or batches that do not fit q and k; what AnalysisInput excludes.
std::vector<Quality> quality(const AnalysisInput& input, std::span<const BlockPattern> patterns, Executor& executor,
                             const QualityOptions& options = {});
Quality quality(const AnalysisInput& input, const BlockPattern& pattern, Executor& executor,
                const QualityOptions& options = {});

// The true attention summed over blocks: what pictures show and searches run on.
struct MassMap {
  PatternShape shape;                // of the map: block sizes, heads = H, batches = B
  std::vector<float> values;         // [B, H, rows, cols]: mean over the row's tokens (that see a key) of their mass
  std::vector<int32_t> row_tokens;   // [B, H, rows]: token rows that see a key
  std::vector<int32_t> first, last;  // [B, rows]: admissible columns are first .. last - 1

  std::span<const float> head(int64_t b, int64_t h) const;  // [rows, cols]
  std::vector<float> mean_over_heads(int64_t b) const;      // [rows, cols]
};

// Error ("max_bytes") if `values` would need more than max_bytes.
MassMap attention_mass(const AnalysisInput& input, int block_q, int block_k, Executor& executor,
                       size_t max_bytes = size_t{1} << 32);

// Coverage (mean over all token rows, heads and batches) and density of a pattern without partial bitmaps, in
// O(kept blocks); equal to what quality() reports up to fp32 rounding.
struct Coverage {
  double coverage = 0;
  double density = 0;
};
Coverage coverage_of(const MassMap& mass, const BlockPattern& pattern);

// The best pattern whose rows have the budgets of patterns.h: in each row of blocks of each head and batch the blocks
// of most mass (ties: the lower column). Heads H, batches B.
BlockPattern oracle_pattern(const MassMap& mass, double density, Budget budget = Budget::even);
// Its coverage, and the (achieved) density of the cheapest such pattern that reaches `coverage`.
double oracle_coverage(const MassMap& mass, double density, Budget budget = Budget::even);
double oracle_density(const MassMap& mass, double coverage, Budget budget = Budget::even);
// The best pattern of all: the round(density * admissible) blocks of most mass, chosen freely over all rows, heads and
// batches (ties: the first). No pattern of whole blocks, no more of them, keeps more; its coverage grows with density.
BlockPattern bound_pattern(const MassMap& mass, double density);
// Density of the smallest set of blocks, chosen freely over all rows, heads and batches, that reaches `coverage`: no
// pattern of whole blocks does with less.
double bound_density(const MassMap& mass, double coverage);

struct OptimizeOptions {
  double target_coverage = 0.9;    // in (0, 1]: mean over rows, heads and batches
  std::vector<PatternKind> kinds;  // empty: local_window, dilated_sparse, global_local, strided, random, bigbird,
                                   // dilated_segments
  uint64_t seed = 0;               // of random kinds
};

struct OptimizeResult {
  struct Candidate {
    PatternSpec spec;  // the cheapest of its kind that reaches the target; if none does, the one of most coverage
    double coverage = 0;
    double density = 0;
    bool reached = false;
  };
  Candidate best;                     // cheapest of all that reach the target (if none: of most coverage)
  std::vector<Candidate> candidates;  // the best of each kind, in the order of `kinds`
  double oracle_density = 0;          // of the cheapest oracle_pattern that reaches the target
  double bound_density = 0;           // no pattern whatever reaches the target below this
  int64_t evaluated = 0;              // patterns that were built and judged
};

// The cheapest named pattern that reaches the target coverage: searches each kind's options and, inside them, its
// density, window or stride by bisection. Deterministic. The first form makes the mass map itself.
OptimizeResult optimize(const AnalysisInput& input, int block_q, int block_k, const OptimizeOptions& options,
                        Executor& executor);
OptimizeResult optimize(const MassMap& mass, bool causal, const OptimizeOptions& options);

// Quality against density, for plots.
struct QualityCurve {
  struct Point {
    double asked_density = 0;
    double density = 0;  // achieved
    double coverage = 0;
    std::optional<double> output_error;
  };
  std::string name;  // the kind's name, or "best possible"
  std::vector<Point> points;
};

// One curve for each spec at each density (spec.density is replaced; lengths, block sizes and causality too are taken
// from here and input), and that of bound_pattern(), the best possible, as the last one: at these densities and at
// those that the patterns reached.
std::vector<QualityCurve> quality_curves(const AnalysisInput& input, std::span<const PatternSpec> specs,
                                         std::span<const double> densities, int block_q, int block_k,
                                         Executor& executor);

}  // namespace tessera
