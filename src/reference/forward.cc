#include "reference/forward.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "call/pair_mask.h"
#include "call/rows.h"
#include "call/scores.h"
#include "call/softmax_state.h"
#include "core/work.h"
#include "reference/error_bound.h"

namespace tessera {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The weight of a key is exp(s - max). Its relative error is the absolute error of s, plus that of the exponential.
// Through the softmax an output gets sum p e |v| + |out| sum p e.
double weight_error(const Problem& p, double magnitude, double score, double max, double biases) {
  return ErrorBound::exp_error(score, max, ErrorBound::score_error(p, magnitude, score, biases));
}
// What it gains when the max moves away by `distance`.
double error_of_moving(double distance) { return 4 * ErrorBound::u * distance; }

// Running softmax of one query row, whose reference is its maximum; in fp64 rescaling costs no accuracy.
struct RowState {
  SoftmaxState<double, PowersOfE> softmax;
  double error = 0;  // sum of weight * weight_error
  int64_t keys = 0;
  bool poisoned = false;  // a NaN or +inf score: the softmax of PyTorch is NaN then

  // Makes `score` take part; returns by what the accumulators must be multiplied first.
  double admit(double score) {
    ++keys;
    if (std::isnan(score) || score == kInfinity) poisoned = true;
    if (poisoned) return 1;
    const double before = softmax.reference, factor = softmax.cover(score);
    if (factor > 0 && factor < 1) error = factor * error + error_of_moving(softmax.reference - before) * softmax.sum;
    return factor;
  }
};

class Reference {
 public:
  Reference(const Problem& problem, float* out_bound, float* lse_bound)
      : p_(problem), out_bound_(out_bound), lse_bound_(lse_bound) {
    const PatternShape& s = p_.pattern.shape;
    q_.resize(s.block_q * p_.head_dim);
    k_.resize(s.block_k * p_.head_dim);
    v_.resize(s.block_k * p_.head_dim_v);
    loaded_.resize(s.block_k);
    rows_.resize(s.block_q);
    out_.resize(s.block_q * p_.head_dim_v);
    magnitude_.resize(s.block_q * p_.head_dim_v);
    error_.resize(s.block_q * p_.head_dim_v);
  }

  // Block row i of batch b, head h.
  void run(int64_t b, int64_t h, int64_t i) {
    const PatternShape& s = p_.pattern.shape;
    const int64_t begin = s.query_begin(i), end = s.query_end(i);
    const PairMask mask(p_, b);
    std::fill(rows_.begin(), rows_.end(), RowState{});
    std::fill(out_.begin(), out_.end(), 0.0);
    std::fill(magnitude_.begin(), magnitude_.end(), 0.0);
    std::fill(error_.begin(), error_.end(), 0.0);
    for (int64_t q = begin; q < end; ++q) {
      load_row(p_.q.at(b, q, h, size_of(p_.dtype)), p_.dtype, p_.head_dim, &q_[(q - begin) * p_.head_dim]);
    }
    const int64_t row = p_.pattern.row_id(b, h, i);
    for (int64_t entry = p_.pattern.indptr[row]; entry < p_.pattern.indptr[row + 1]; ++entry) {
      std::fill(loaded_.begin(), loaded_.end(), 0);
      for (int64_t q = begin; q < end; ++q) {
        const RowScores<double> scores(p_, b, h, q);
        mask.for_each_key(entry, q, [&](int64_t k) { accumulate(b, h, q, q - begin, entry, k, scores); });
      }
    }
    for (int64_t q = begin; q < end; ++q) finish(b, h, q, q - begin);
  }

 private:
  void accumulate(int64_t b, int64_t h, int64_t q, int64_t r, int64_t entry, int64_t k,
                  const RowScores<double>& scores) {
    const int64_t d = p_.head_dim, dv = p_.head_dim_v;
    const int64_t column = p_.pattern.indices[entry], slot = k - column * p_.pattern.shape.block_k;
    double* key = &k_[slot * d];
    double* value = &v_[slot * dv];
    if (!loaded_[slot]) {  // only rows that some query admits are read
      const int64_t offset = slot * static_cast<int64_t>(size_of(p_.dtype)), kv_head = h / p_.group();
      load_row(p_.k_block(b, column, kv_head) + offset * p_.k.seq, p_.dtype, d, key);
      load_row(p_.v_block(b, column, kv_head) + offset * p_.v.seq, p_.dtype, dv, value);
      loaded_[slot] = 1;
    }
    const double* query = &q_[r * d];
    double dot = 0;
    for (int64_t i = 0; i < d; ++i) dot += query[i] * key[i];
    RowState& state = rows_[r];
    const double score = scores.score(dot, entry, k);
    const double factor = state.admit(score);
    if (state.poisoned || score == -kInfinity) return;  // -inf from a bias: a key that is not there
    double* out = &out_[r * dv];
    if (factor != 1) rescale(r, factor);
    const double weight = state.softmax.add(score);
    const double keep = keep_factor(p_, b, h, q, k), kept = weight * keep;
    for (int64_t i = 0; i < dv; ++i) out[i] += kept * value[i];
    if (out_bound_ == nullptr && lse_bound_ == nullptr) return;
    double magnitude = 0;
    for (int64_t i = 0; i < d; ++i) magnitude += std::abs(query[i] * key[i]);
    const double error = weight_error(p_, std::abs(p_.scale) * magnitude, score, state.softmax.reference,
                                      scores.bias_magnitude(entry, k));
    if (weight > 0) state.error += weight * error;
    // Weights are stored in the dtype of the inputs before they meet V; below its smallest normal number in steps, or
    // as 0. A kernel's own maximum may be a power of two away.
    double rounding = 2 * keep * std::numeric_limits<float>::min();
    if (p_.dtype == DType::bf16) rounding += epsilon_of(p_.dtype) * kept;
    if (p_.dtype == DType::f16) rounding += epsilon_of(p_.dtype) * kept + keep * 0x1p-25;
    for (int64_t i = 0; i < dv; ++i) {
      magnitude_[r * dv + i] += kept * std::abs(value[i]);
      error_[r * dv + i] += ((weight > 0 ? kept * error : 0) + rounding) * std::abs(value[i]);
    }
  }

  void rescale(int64_t r, double factor) {
    const int64_t dv = p_.head_dim_v;
    const double farther = factor > 0 ? error_of_moving(-std::log(factor)) : 0;
    for (int64_t i = r * dv; i < (r + 1) * dv; ++i) {
      out_[i] *= factor;
      error_[i] = factor * (error_[i] + farther * magnitude_[i]);
      magnitude_[i] *= factor;
    }
  }

  void finish(int64_t b, int64_t h, int64_t q, int64_t r) {
    RowState& state = rows_[r];
    const int64_t dv = p_.head_dim_v;
    const bool empty = !state.poisoned && state.softmax.empty();  // no key, or -inf for each
    if (!empty && p_.sinks) {
      const double sink = *p_.sinks.at(b, h);
      const double factor = state.admit(sink);
      --state.keys;
      if (factor != 1) rescale(r, factor);
      const double weight = state.softmax.add(sink);
      if (weight > 0) state.error += weight * weight_error(p_, 0, sink, state.softmax.reference, 0);
    }
    const double poison = state.poisoned ? std::numeric_limits<double>::quiet_NaN() : 0;
    const double max = state.softmax.reference, sum = state.softmax.sum;
    const double lse = state.softmax.finish().lse + poison;
    p_.store_lse(b, h, q, lse);
    char* out = p_.out.at(b, q, h, size_of(p_.out_dtype));
    for (int64_t i = 0; i < dv; ++i) {
      store_from_double(out, p_.out_dtype, i, empty ? 0 : out_[r * dv + i] / sum + poison);
    }
    const double error = empty ? 0 : state.error / sum;  // relative error of the sum of weights
    const double summation = static_cast<double>(state.keys + p_.pattern.shape.block_k) * ErrorBound::u;
    if (lse_bound_) {
      lse_bound_[(b * p_.heads + h) * p_.seqlen_q + q] = static_cast<float>(
          empty ? 0 : std::log1p(error) + summation + 4 * ErrorBound::u * (1 + std::abs(lse) + std::abs(max)));
    }
    if (!out_bound_) return;
    float* bound = out_bound_ + ((b * p_.seqlen_q + q) * p_.heads + h) * dv;
    for (int64_t i = 0; i < dv; ++i) {
      if (empty) {
        bound[i] = 0;
        continue;
      }
      const double value = std::abs(out_[r * dv + i] / sum);
      const double sums = (error_[r * dv + i] + 2 * summation * magnitude_[r * dv + i]) / sum;
      const double underflow = p_.dtype == DType::f16 ? 0x1p-24 : std::numeric_limits<float>::min();
      const double normalised = (1 + error) * (sums + value * error);  // the sum is at least 1 / (1 + error) of its own
      bound[i] = static_cast<float>(normalised + value * epsilon_of(p_.dtype) + underflow);
    }
  }

  const Problem& p_;
  float* out_bound_;
  float* lse_bound_;
  std::vector<double> q_, k_, v_;
  std::vector<char> loaded_;  // rows of k_ and v_ that hold the current block's
  std::vector<RowState> rows_;
  std::vector<double> out_, magnitude_, error_;  // [block_q, Dv] sums of p v, p |v|, p e |v|
};

}  // namespace

void reference_attention(const Problem& p, Executor& executor, float* out_bound, float* lse_bound) {
  const int64_t rows = p.pattern.shape.rows();
  parallel_for(
      executor, p.batch * p.heads * rows, [&](int) { return Reference(p, out_bound, lse_bound); },
      [&](Reference& reference, int64_t unit) {
        reference.run(unit / rows / p.heads, unit / rows % p.heads, unit % rows);
      });
}

void reference_forward(const ForwardArgs& args, Executor& executor, float* out_bound, float* lse_bound) {
  reference_attention(resolve(args, Purpose::reference), executor, out_bound, lse_bound);
}

}  // namespace tessera
