// Every gradient is a pass of its own over the pairs that reach it, so that a unit of work owns the places it writes:
// dq and bias gradients by rows, dk and dv by columns. Weights are recomputed in each pass: the plain, slow way.
#include "reference/backward.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "core/work.h"
#include "reference/forward.h"
#include "reference/pair_gradients.h"
#include "reference/row_statistics.h"

namespace tessera {

namespace {

// Sums of rows of `width` numbers, and what a kernel that adds the same terms in fp32 in any order may lose.
class Sums {
 public:
  explicit Sums(bool with_bounds) : with_bounds_(with_bounds) {}

  void clear(int64_t rows, int64_t width) {
    width_ = width;
    value_.assign(rows * width, 0);
    if (with_bounds_) loss_.assign(rows * width, {});
    terms_.assign(rows, 0);
  }

  // Row `row` += factor * x.
  void add(int64_t row, double factor, const double* x, const Error& factor_error) {
    const int64_t first = row * width_;
    for (int64_t i = 0; i < width_; ++i) value_[first + i] += factor * x[i];
    if (!with_bounds_) return;
    for (int64_t i = 0; i < width_; ++i) {
      Loss& loss = loss_[first + i];
      const double term = std::abs(factor * x[i]);
      loss.magnitude += term;
      loss.squares += term * term;
      loss.error += factor_error.times(x[i]) + Error::of(factor * ErrorBound::kTiny);
    }
    ++terms_[row];
  }
  void add(int64_t row, double x, const Error& error) {
    const double one = 1;
    add(row, x, &one, error);
  }
  // An error of a sum as a whole.
  void add_error(int64_t row, int64_t i, const Error& error) { loss_[row * width_ + i].error += error; }
  double value(int64_t row, int64_t i) const { return value_[row * width_ + i]; }

  // Adds row 0 of another, of width 1.
  void join(const Sums& other) {
    value_[0] += other.value_[0];
    terms_[0] += other.terms_[0];
    if (!with_bounds_) return;
    loss_[0].magnitude += other.loss_[0].magnitude;
    loss_[0].squares += other.loss_[0].squares;
    loss_[0].error += other.loss_[0].error;
  }

  // Element i of row `row` to where it belongs. `dtype`: of the gradient; fp64: its own rounding is not counted.
  void store(int64_t row, int64_t i, void* to, DType dtype, int64_t index, bool accumulate, float* bound) const {
    // A few roundings more: scale on the way out, partial sums of threads, and the part of exp2's error that is the
    // same for all terms.
    constexpr double kStoreRoundings = 8 + ErrorBound::kExpRoundings;
    double value = value_[row * width_ + i];
    if (bound != nullptr) {
      const Loss& loss = loss_[row * width_ + i];
      const Error error = loss.error + Error::roundings(kStoreRoundings, value) +
                          Error::summation(static_cast<double>(terms_[row]), value, loss.magnitude, loss.squares);
      const double most = error.bound() + ErrorBound::kTiny;
      // 0 x infinity on the way: no bound.
      *bound = std::isnan(most) ? std::numeric_limits<float>::infinity() : static_cast<float>(most);
    }
    if (to == nullptr) return;
    if (accumulate) value += load_as_double(to, dtype, index);
    store_from_double(to, dtype, index, value);
    if (bound == nullptr || dtype == DType::f64) return;
    *bound += static_cast<float>(epsilon_of(dtype) / 2 * std::abs(value) + (dtype == DType::f16 ? 0x1p-25 : 0));
  }

 private:
  struct Loss {
    double magnitude = 0, squares = 0;  // sums of |x| and x^2 of the terms x
    Error error;                        // of the terms
  };
  bool with_bounds_;
  int64_t width_ = 1;
  std::vector<double> value_;
  std::vector<Loss> loss_;
  std::vector<int64_t> terms_;  // of each row
};

// Where a sum takes several keys of a query row, the errors of the row's lse and delta meet it once, times the sums of
// dscore and weight.
struct RowShare {
  int64_t row = -1;  // of RowStatistics
  double dscore = 0, weight = 0;

  void add(const PairGradient& pair) {
    row = pair.row;
    dscore += pair.dscore;
    weight += pair.weight;
  }
};

struct Worker {
  PairGradients pairs;
  Sums first, second;
  std::vector<RowShare> shares;
};

class GradientPasses {
 public:
  GradientPasses(const BackwardProblem& problem, const RowStatistics& rows, Executor& executor,
                 const GradientBounds& bounds)
      : g_(problem),
        p_(problem.forward),
        s_(p_.pattern.shape),
        rows_(rows),
        executor_(executor),
        bounds_(bounds),
        with_bounds_(rows.with_errors) {}

  void queries() {
    if (g_.dq.data == nullptr && bounds_.dq == nullptr) return;
    run(p_.batch * p_.heads * s_.rows(), [&](Worker& w, int64_t unit) {
      const int64_t b = unit / s_.rows() / p_.heads, h = unit / s_.rows() % p_.heads, i = unit % s_.rows();
      const int64_t begin = s_.query_begin(i), end = s_.query_end(i);
      w.first.clear(s_.block_q, p_.head_dim);
      w.second.clear(s_.block_q, p_.head_dim);  // of weights: how much an error of delta counts
      visit_row(w, b, h, i, [&](int64_t, const PairGradient& pair) {
        w.first.add(pair.q - begin, pair.ddot, pair.key, pair.ddot_error);
        if (with_bounds_) w.second.add(pair.q - begin, pair.weight * pair.slope, pair.key, {});
      });
      for (int64_t r = 0; with_bounds_ && r < end - begin; ++r) {
        const int64_t row = (b * p_.heads + h) * p_.seqlen_q + begin + r;
        for (int64_t d = 0; d < p_.head_dim; ++d) {
          w.first.add_error(
              r, d,
              rows_.lse_error[row].times(w.first.value(r, d)) + rows_.delta_error[row].times(w.second.value(r, d)));
        }
      }
      store(w.first, g_.dq, b, begin, end, h, p_.seqlen_q, p_.heads, p_.head_dim, bounds_.dq);
    });
  }

  void keys() {
    const bool dk = g_.dk.data != nullptr || bounds_.dk != nullptr;
    const bool dv = g_.dv.data != nullptr || bounds_.dv != nullptr;
    if (!dk && !dv) return;
    run(p_.batch * p_.kv_heads * s_.cols(), [&](Worker& w, int64_t unit) {
      const int64_t b = unit / s_.cols() / p_.kv_heads, kv_head = unit / s_.cols() % p_.kv_heads;
      const int64_t j = unit % s_.cols(), begin = j * s_.block_k, end = std::min(p_.seqlen_k, begin + s_.block_k);
      w.first.clear(s_.block_k, p_.head_dim);
      w.second.clear(s_.block_k, p_.head_dim_v);
      for (int64_t h = kv_head * p_.group(); h < (kv_head + 1) * p_.group(); ++h) {
        const int64_t column = p_.pattern.col_id(b, h, j);
        for (int64_t t = g_.transposed.indptr[column]; t < g_.transposed.indptr[column + 1]; ++t) {
          w.pairs.visit(b, h, g_.transposed.rows[t], g_.transposed.entries[t], [&](const PairGradient& pair) {
            if (dk) {
              w.first.add(pair.k - begin, pair.ddot, pair.query,
                          pair.ddot_error + row_error(pair, pair.ddot, pair.weight * pair.slope));
            }
            if (dv) w.second.add(pair.k - begin, pair.kept, pair.dout, pair.kept_error + row_error(pair, pair.kept, 0));
          });
        }
      }
      store(w.first, g_.dk, b, begin, end, kv_head, p_.seqlen_k, p_.kv_heads, p_.head_dim, bounds_.dk);
      store(w.second, g_.dv, b, begin, end, kv_head, p_.seqlen_k, p_.kv_heads, p_.head_dim_v, bounds_.dv);
    });
  }

  // A unit: the entries of one row of the pattern, for one batch and head of the bias.
  void block_bias() {
    if (g_.dblock_bias == nullptr) return;
    const int64_t bias_batches = g_.dbias_batch != 0 ? p_.batch : 1, bias_heads = g_.dbias_head != 0 ? p_.heads : 1;
    const int64_t rows = s_.total_rows(), entries = p_.pattern.indptr[rows];
    run(bias_batches * bias_heads * rows, [&](Worker& w, int64_t unit) {
      const int64_t bias_b = unit / rows / bias_heads, bias_h = unit / rows % bias_heads, row = unit % rows;
      const int64_t i = row % s_.rows(), first = p_.pattern.indptr[row], last = p_.pattern.indptr[row + 1];
      w.first.clear(last - first, 1);
      for_each_head(bias_batches, bias_b, bias_heads, bias_h, [&](int64_t b, int64_t h) {
        if (p_.pattern.row_id(b, h, i) != row) return;
        w.shares.assign((last - first) * s_.block_q, {});
        visit_row(w, b, h, i, [&](int64_t entry, const PairGradient& pair) {
          w.first.add(entry - first, pair.dscore, pair.dscore_error);
          w.shares[(entry - first) * s_.block_q + s_.row_in_block(pair.q)].add(pair);
        });
        for (size_t n = 0; n < w.shares.size(); ++n) {
          add_share(w.first, static_cast<int64_t>(n) / s_.block_q, w.shares[n]);
        }
      });
      for (int64_t entry = first; entry < last; ++entry) {
        const int64_t at = bias_b * g_.dbias_batch + bias_h * g_.dbias_head + entry * g_.dbias_entry;
        float* bound = bounds_.dblock_bias;
        if (bound != nullptr) bound += (bias_b * bias_heads + bias_h) * entries + entry;
        w.first.store(entry - first, 0, g_.dblock_bias, DType::f32, at, true, bound);
      }
    });
  }

  // A unit: a block row (all rows, where the bias has one) of one batch and head of the bias.
  void attn_bias() {
    if (g_.dattn_bias == nullptr) return;
    const int64_t* size = g_.dattn_bias_size;
    const int64_t* stride = g_.dattn_bias_stride;
    const bool by_row = size[2] == p_.seqlen_q, by_key = size[3] == p_.seqlen_k;
    const int64_t parts = by_row ? s_.rows() : 1;
    run(size[0] * size[1] * parts, [&](Worker& w, int64_t unit) {
      const int64_t bias_b = unit / parts / size[1], bias_h = unit / parts % size[1], part = unit % parts;
      const int64_t begin = by_row ? s_.query_begin(part) : 0;
      const int64_t rows = by_row ? s_.query_end(part) - begin : 1;
      w.first.clear(rows * size[3], 1);
      for_each_head(size[0], bias_b, size[1], bias_h, [&](int64_t b, int64_t h) {
        const int64_t first = by_row ? part : 0, last = by_row ? part + 1 : s_.rows();
        for (int64_t i = first; i < last; ++i) {
          w.shares.assign(s_.block_q, {});
          visit_row(w, b, h, i, [&](int64_t, const PairGradient& pair) {
            const int64_t to = (by_row ? pair.q - begin : 0) * size[3] + (by_key ? pair.k : 0);
            w.first.add(to, pair.dscore, pair.dscore_error);
            RowShare alone, &share = by_key ? alone : w.shares[pair.q - s_.query_begin(i)];
            share.add(pair);
            if (by_key) add_share(w.first, to, alone);
          });
          for (int64_t r = 0; r < s_.block_q; ++r) add_share(w.first, by_row ? r * size[3] : 0, w.shares[r]);
        }
      });
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t k = 0; k < size[3]; ++k) {
          const int64_t at = bias_b * stride[0] + bias_h * stride[1] + (begin + r) * stride[2] + k * stride[3];
          float* bound = bounds_.dattn_bias;
          if (bound != nullptr) bound += ((bias_b * size[1] + bias_h) * size[2] + begin + r) * size[3] + k;
          w.first.store(r * size[3] + k, 0, g_.dattn_bias, g_.dattn_bias_dtype, at, true, bound);
        }
      }
    });
  }

  // A sink takes weight from the rows that see a key here; with it goes -weight * delta.
  void sinks() {
    if (g_.dsinks == nullptr) return;
    std::vector<Sums> partial(p_.heads * s_.rows(), Sums(with_bounds_));
    run(p_.heads * s_.rows(), [&](Worker& w, int64_t unit) {
      const int64_t h = unit / s_.rows(), i = unit % s_.rows(), begin = s_.query_begin(i);
      const double sink = *p_.sinks.at(0, h);
      std::vector<char> seen(s_.block_q);
      partial[unit].clear(1, 1);
      for (int64_t b = 0; b < p_.batch; ++b) {
        std::fill(seen.begin(), seen.end(), 0);
        visit_row(w, b, h, i, [&](int64_t, const PairGradient& pair) { seen[pair.q - begin] = 1; });
        for (int64_t q = begin; q < s_.query_end(i); ++q) {
          if (seen[q - begin]) add_sink(partial[unit], sink, (b * p_.heads + h) * p_.seqlen_q + q);
        }
      }
    });
    for (int64_t h = 0; h < p_.heads; ++h) {
      Sums sum(with_bounds_);
      sum.clear(1, 1);
      for (int64_t i = 0; i < s_.rows(); ++i) sum.join(partial[h * s_.rows() + i]);
      sum.store(0, 0, g_.dsinks, DType::f32, h * g_.dsinks_head, true, bounds_.dsinks ? bounds_.dsinks + h : nullptr);
    }
  }

 private:
  void run(int64_t units, const std::function<void(Worker&, int64_t)>& work) {
    parallel_for(
        executor_, units,
        [&](int) { return Worker{PairGradients(g_, rows_), Sums(with_bounds_), Sums(with_bounds_), {}}; }, work);
  }

  // Calls visit(entry, pair) for all pairs of block row i of (b, h).
  template <class Visit>
  void visit_row(Worker& w, int64_t b, int64_t h, int64_t i, Visit visit) {
    const int64_t row = p_.pattern.row_id(b, h, i);
    for (int64_t entry = p_.pattern.indptr[row]; entry < p_.pattern.indptr[row + 1]; ++entry) {
      w.pairs.visit(b, h, i, entry, [&](const PairGradient& pair) { visit(entry, pair); });
    }
  }

  // The (b, h) that share batch bias_b and head bias_h of a bias with so many.
  template <class Visit>
  void for_each_head(int64_t bias_batches, int64_t bias_b, int64_t bias_heads, int64_t bias_h, Visit visit) {
    for (int64_t b = 0; b < p_.batch; ++b) {
      for (int64_t h = 0; h < p_.heads; ++h) {
        if ((bias_batches == 1 || b == bias_b) && (bias_heads == 1 || h == bias_h)) visit(b, h);
      }
    }
  }

  // Rows begin .. end of one head to dq, dk or dv [B, seqlen, heads, dim].
  void store(const Sums& sums, const Strided& to, int64_t b, int64_t begin, int64_t end, int64_t h, int64_t seqlen,
             int64_t heads, int64_t dim, float* bounds) const {
    if (to.data == nullptr && bounds == nullptr) return;
    for (int64_t row = begin; row < end; ++row) {
      char* place = to.data ? to.at(b, row, h, size_of(g_.gradient_dtype)) : nullptr;
      float* bound = bounds ? bounds + ((b * seqlen + row) * heads + h) * dim : nullptr;
      for (int64_t i = 0; i < dim; ++i) {
        sums.store(row - begin, i, place, g_.gradient_dtype, i, g_.accumulate, bound ? bound + i : nullptr);
      }
    }
  }

  // What errors of lse and delta do to a number with these (negative) derivatives.
  Error row_error(const PairGradient& pair, double by_lse, double by_delta) const {
    if (!with_bounds_) return {};
    return rows_.lse_error[pair.row].times(by_lse) + rows_.delta_error[pair.row].times(by_delta);
  }
  void add_share(Sums& sums, int64_t to, const RowShare& share) const {
    if (!with_bounds_ || share.row < 0) return;
    sums.add_error(to, 0,
                   rows_.lse_error[share.row].times(share.dscore) + rows_.delta_error[share.row].times(share.weight));
  }

  void add_sink(Sums& sums, double sink, int64_t row) const {
    const double lse = rows_.lse[row], delta = rows_.delta[row], weight = std::exp(sink - lse);
    Error error;
    if (with_bounds_) {
      const Error exponent = Error::roundings(2, sink) + Error::roundings(2, lse) + Error::roundings(2, sink - lse) +
                             Error::roundings(ErrorBound::kExpRoundings, 1) + rows_.lse_error[row];
      const Error weight_error = exponent.grown().times(weight) + Error::of(ErrorBound::kTiny);
      error = weight_error.times(delta) + rows_.delta_error[row].times(weight + weight_error.bound()) +
              Error::roundings(2, weight * delta);
    }
    sums.add(0, -weight * delta, error);
  }

  const BackwardProblem& g_;
  const Problem& p_;
  const PatternShape& s_;
  const RowStatistics& rows_;
  Executor& executor_;
  const GradientBounds& bounds_;
  const bool with_bounds_;
};

// To zero: what problems add their bias gradients to.
void clear_bias_gradients(const BackwardProblem& g) {
  const Problem& p = g.forward;
  if (g.dblock_bias != nullptr) {
    const int64_t entries = p.pattern.indptr[p.pattern.shape.total_rows()];
    for (int64_t b = 0; b < (g.dbias_batch != 0 ? p.batch : 1); ++b) {
      for (int64_t h = 0; h < (g.dbias_head != 0 ? p.heads : 1); ++h) {
        for (int64_t e = 0; e < entries; ++e) {
          g.dblock_bias[b * g.dbias_batch + h * g.dbias_head + e * g.dbias_entry] = 0;
        }
      }
    }
  }
  if (g.dattn_bias != nullptr) {
    const int64_t *n = g.dattn_bias_size, *stride = g.dattn_bias_stride;
    for (int64_t b = 0; b < n[0]; ++b) {
      for (int64_t h = 0; h < n[1]; ++h) {
        for (int64_t q = 0; q < n[2]; ++q) {
          for (int64_t k = 0; k < n[3]; ++k) {
            const int64_t at = b * stride[0] + h * stride[1] + q * stride[2] + k * stride[3];
            store_from_double(g.dattn_bias, g.dattn_bias_dtype, at, 0);
          }
        }
      }
    }
  }
  if (g.dsinks != nullptr) {
    for (int64_t h = 0; h < p.heads; ++h) g.dsinks[h * g.dsinks_head] = 0;
  }
}

void run_passes(const BackwardProblem& problem, const RowStatistics& rows, Executor& executor,
                const GradientBounds& bounds = {}) {
  GradientPasses passes(problem, rows, executor, bounds);
  passes.queries();
  passes.keys();
  passes.block_bias();
  passes.attn_bias();
  passes.sinks();
}

}  // namespace

void reference_gradients(const BackwardProblem& problem, Executor& executor, const GradientBounds& bounds) {
  Problem forward = problem.forward;
  const int64_t b = forward.batch, h = forward.heads, n = forward.seqlen_q, dv = forward.head_dim_v;
  std::vector<double> out(b * n * h * dv), lse(b * h * n);
  forward.out = {reinterpret_cast<char*>(out.data()), n * h * dv, h * dv, dv};
  forward.lse = {reinterpret_cast<char*>(lse.data()), h * n, 1, n};
  forward.out_dtype = forward.lse_dtype = DType::f64;
  const bool with_bounds =
      bounds.dq || bounds.dk || bounds.dv || bounds.dblock_bias || bounds.dattn_bias || bounds.dsinks;
  std::vector<float> out_error(with_bounds ? out.size() : 0), lse_error(with_bounds ? lse.size() : 0);
  float* out_bound = with_bounds ? out_error.data() : nullptr;
  float* lse_bound = with_bounds ? lse_error.data() : nullptr;
  reference_attention(forward, executor, out_bound, lse_bound);
  RowStatistics rows = row_statistics(problem, forward, executor);
  if (with_bounds) add_row_errors(problem, forward, out_error, lse_error, executor, rows);
  clear_bias_gradients(problem);
  run_passes(problem, rows, executor, bounds);
}

void reference_part_gradients(const BackwardProblem& problem, const Problem& given, Executor& executor,
                              const float* out_error, const float* lse_error, const GradientBounds& bounds) {
  RowStatistics rows = row_statistics(problem, given, executor);
  if (lse_error != nullptr) set_row_errors(problem, given, out_error, lse_error, executor, rows);
  run_passes(problem, rows, executor, bounds);
}

void fp64_backward(std::span<const BackwardProblem> problems, Executor& executor) {
  for (const BackwardProblem& problem : problems) clear_bias_gradients(problem);
  for (const BackwardProblem& problem : problems) {
    run_passes(problem, row_statistics(problem, problem.forward, executor), executor);
  }
}

void reference_backward(const BackwardArgs& args, Executor& executor, const GradientBounds& bounds) {
  const BackwardProblem problem = resolve_backward(args, Purpose::reference);
  reference_gradients(problem, executor, bounds);
}

}  // namespace tessera
