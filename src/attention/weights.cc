// attention_weights: the normalised weights of the kept blocks.
#include <fmt/format.h>

#include <cmath>
#include <limits>
#include <vector>

#include "call/pair_mask.h"
#include "call/rows.h"
#include "call/scores.h"
#include "core/float_mode.h"
#include "core/work.h"
#include "tessera/error.h"

namespace tessera {

namespace {

// One block row at a time: scores go straight to where the weights will be, then each query's run over the row's
// blocks is normalised. T is float, or double for fp64 inputs.
template <class T>
class WeightRows {
 public:
  WeightRows(const Problem& problem, BlockWeights& weights) : p_(problem), weights_(weights) {
    const PatternShape& s = p_.pattern.shape;
    q_.resize(s.block_q * p_.head_dim);
    k_.resize(s.block_k * p_.head_dim);
    row_.resize(p_.head_dim);
    dots_.resize(s.block_k);
    used_.resize(s.block_k);
    max_.resize(s.block_q);
  }

  // `first`: position of the row's first block in the result.
  void run(int64_t b, int64_t h, int64_t i, int64_t first) {
    const PatternShape& s = p_.pattern.shape;
    const int64_t row = p_.pattern.row_id(b, h, i), begin = s.query_begin(i), end = s.query_end(i);
    const int64_t blocks = p_.pattern.indptr[row + 1] - p_.pattern.indptr[row];
    const int64_t block_size = static_cast<int64_t>(s.block_q) * s.block_k;
    const PairMask mask(p_, b);
    for (int64_t q = begin; q < end; ++q) {
      load_row(p_.q.at(b, q, h, size_of(p_.dtype)), p_.dtype, p_.head_dim, &q_[(q - begin) * p_.head_dim]);
    }
    std::fill(max_.begin(), max_.end(), -std::numeric_limits<T>::infinity());
    for (int64_t n = 0; n < blocks; ++n) {
      const int64_t entry = p_.pattern.indptr[row] + n, column = p_.pattern.indices[entry];
      weights_.indices[first + n] = {b, h, i, column};
      float* values = &weights_.values[(first + n) * block_size];
      std::fill(values, values + block_size, -std::numeric_limits<float>::infinity());
      load_keys(b, h, begin, end, entry, mask);
      for (int64_t q = begin; q < end; ++q) {
        const RowScores<T> scores(p_, b, h, q);
        dot_products(&q_[(q - begin) * p_.head_dim]);
        mask.for_each_key(entry, q, [&](int64_t k) {
          const int64_t slot = k - column * s.block_k;
          const float score = in_float(scores.score(dots_[slot], entry, k));
          // NaN wins the maximum, and makes the row NaN.
          if (!(score <= max_[q - begin])) max_[q - begin] = score;
          values[(q - begin) * s.block_k + slot] = score;
        });
      }
    }
    normalise(h, end - begin, &weights_.values[first * block_size], blocks);
  }

 private:
  // k_ becomes [D][block_k], with rows that no query of the block admits left at 0: they are not read.
  void load_keys(int64_t b, int64_t h, int64_t begin, int64_t end, int64_t entry, const PairMask& mask) {
    const int64_t block_k = p_.pattern.shape.block_k, column = p_.pattern.indices[entry];
    std::fill(used_.begin(), used_.end(), 0);
    std::fill(k_.begin(), k_.end(), T{0});
    const char* keys = p_.k_block(b, column, h / p_.group());
    for (int64_t q = begin; q < end; ++q) {
      mask.for_each_key(entry, q, [&](int64_t k) { used_[k - column * block_k] = 1; });
    }
    for (int64_t slot = 0; slot < block_k; ++slot) {
      if (!used_[slot]) continue;
      load_row(keys + slot * p_.k.seq * static_cast<int64_t>(size_of(p_.dtype)), p_.dtype, p_.head_dim, row_.data());
      for (int64_t d = 0; d < p_.head_dim; ++d) k_[d * block_k + slot] = row_[d];
    }
  }

  // As the result holds it until it is normalised. A finite score stays finite: -inf means that there is no key.
  static float in_float(T score) {
    constexpr T lowest = std::numeric_limits<float>::lowest();
    return static_cast<float>(score < lowest && score != -std::numeric_limits<T>::infinity() ? lowest : score);
  }

  void dot_products(const T* query) {
    const int64_t block_k = p_.pattern.shape.block_k;
    std::fill(dots_.begin(), dots_.end(), T{0});
    for (int64_t d = 0; d < p_.head_dim; ++d) {
      const T* key = &k_[d * block_k];
      for (int64_t slot = 0; slot < block_k; ++slot) dots_[slot] += query[d] * key[slot];
    }
  }

  void normalise(int64_t h, int64_t queries, float* values, int64_t blocks) {
    const PatternShape& s = p_.pattern.shape;
    const int64_t block_size = static_cast<int64_t>(s.block_q) * s.block_k;
    for (int64_t r = 0; r < queries; ++r) {
      T max = max_[r];
      const bool sees_a_key = max != -std::numeric_limits<T>::infinity();
      T sum = 0;
      if (sees_a_key && p_.sinks) {
        const T sink = static_cast<T>(*p_.sinks.at(0, h));
        if (!(sink <= max)) max = sink;
        sum = std::exp(sink - max);
      }
      const auto for_each_weight = [&](auto change) {
        for (int64_t n = 0; n < blocks; ++n) {
          float* run = values + n * block_size + r * s.block_k;
          for (int64_t slot = 0; slot < s.block_k; ++slot) change(run[slot]);
        }
      };
      for_each_weight([&](float& value) {
        // -inf: masked, or no key at all (then max is -inf too and the difference would be NaN).
        const bool no_key = value == -std::numeric_limits<float>::infinity();
        const T weight = no_key ? T{0} : std::exp(static_cast<T>(value) - max);
        sum += weight;
        value = static_cast<float>(weight);
      });
      if (!sees_a_key) continue;
      // A masked position stays 0 even where NaN scores make the rest of the row NaN.
      for_each_weight([&](float& value) { value = value == 0 ? 0.0f : static_cast<float>(value / sum); });
    }
    // Rows past the end.
    for (int64_t n = 0; n < blocks; ++n) {
      std::fill(values + n * block_size + queries * s.block_k, values + (n + 1) * block_size, 0.0f);
    }
  }

  const Problem& p_;
  BlockWeights& weights_;
  std::vector<T> q_, k_, row_, dots_;
  std::vector<char> used_;
  std::vector<T> max_;
};

}  // namespace

BlockWeights attention_weights(const ForwardArgs& args, Executor& executor, size_t max_bytes) {
  const Problem p = resolve(args, Purpose::weights);
  const PatternShape& s = p.pattern.shape;
  const int64_t rows = s.rows();
  BlockWeights weights;
  weights.block_q = s.block_q;
  weights.block_k = s.block_k;
  weights.shape = {p.batch, p.heads, p.seqlen_q, p.seqlen_k};
  // Where each block row's blocks begin.
  std::vector<int64_t> first(1, 0);
  first.reserve(p.batch * p.heads * rows + 1);
  for (int64_t unit = 0; unit < p.batch * p.heads * rows; ++unit) {
    const int64_t row = p.pattern.row_id(unit / rows / p.heads, unit / rows % p.heads, unit % rows);
    first.push_back(first.back() + p.pattern.indptr[row + 1] - p.pattern.indptr[row]);
  }
  const int64_t block_size = static_cast<int64_t>(s.block_q) * s.block_k;
  const int64_t bytes_per_block = block_size * sizeof(float) + sizeof(BlockWeights::Index);
  const __int128 bytes = static_cast<__int128>(first.back()) * bytes_per_block;
  if (bytes > static_cast<__int128>(max_bytes)) {
    fail("max_bytes",
         fmt::format("{} blocks of {} x {}: {:.3g} bytes", first.back(), s.block_q, s.block_k,
                     static_cast<double>(bytes)),
         fmt::format("at most max_bytes = {}", max_bytes));
  }
  weights.indices.resize(first.back());
  weights.values.resize(first.back() * block_size);
  const auto run = [&](auto number) {
    using T = decltype(number);
    parallel_for(
        executor, p.batch * p.heads * rows, [&](int) { return WeightRows<T>(p, weights); },
        [&](WeightRows<T>& w, int64_t unit) {
          const FlushSubnormals flush;
          w.run(unit / rows / p.heads, unit / rows % p.heads, unit % rows, first[unit]);
        });
  };
  if (p.dtype == DType::f64) run(double{});
  else run(float{});
  return weights;
}

}  // namespace tessera
