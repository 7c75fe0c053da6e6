#include "reference/row_statistics.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/work.h"

namespace tessera {

namespace {

bool without_keys(double lse) { return lse == -std::numeric_limits<double>::infinity(); }

// Of one block row. out = sum P v / sum P: an error e of the score of a key moves lse by P e, and rowsum(dout * out) by
// P e (dP - rowsum(dout * out)).
class RowErrors {
 public:
  RowErrors(const BackwardProblem& g, const Problem& exact, const std::vector<float>& out_bound,
            const std::vector<float>& lse_bound, const RowStatistics& no_errors, RowStatistics& rows)
      : g_(g),
        p_(g.forward),
        exact_(exact),
        out_bound_(out_bound),
        lse_bound_(lse_bound),
        rows_(rows),
        pairs_(g, no_errors) {
    out_.resize(p_.head_dim_v);
    dout_.resize(p_.head_dim_v);
  }

  void run(int64_t b, int64_t h, int64_t i) {
    const PatternShape& shape = p_.pattern.shape;
    const int64_t begin = shape.query_begin(i), dv = p_.head_dim_v;
    const int64_t first_row = (b * p_.heads + h) * p_.seqlen_q + begin;
    const int64_t count = shape.query_end(i) - begin;
    keys_.assign(count, 0);
    magnitude_.assign(count * dv, 0);
    squares_.assign(count * dv, 0);
    storage_.assign(count * dv, 0);
    lse_.assign(count, {});
    delta_.assign(count, {});
    const int64_t row = p_.pattern.row_id(b, h, i);
    for (int64_t entry = p_.pattern.indptr[row]; entry < p_.pattern.indptr[row + 1]; ++entry) {
      pairs_.visit(b, h, i, entry, [&](const PairGradient& pair) { take(pair, pair.q - begin, b, h); });
    }
    for (int64_t r = 0; r < count; ++r) {
      if (!without_keys(rows_.lse[first_row + r])) finish(b, h, begin + r, r);
    }
  }

 private:
  void take(const PairGradient& pair, int64_t r, int64_t b, int64_t h) {
    const int64_t dv = p_.head_dim_v;
    ++keys_[r];
    lse_[r] += pair.weight_error;
    delta_[r] += pair.weight_error.times(pair.centered - g_.load_dlse(b, h, pair.q));
    const double stored = Error::storage(p_.dtype, pair.kept).sum;
    for (int64_t i = 0; i < dv; ++i) {
      const double term = pair.kept * std::abs(pair.value[i]);
      magnitude_[r * dv + i] += term;
      squares_[r * dv + i] += term * term;
      storage_[r * dv + i] += stored * stored * pair.value[i] * pair.value[i];
    }
  }

  void finish(int64_t b, int64_t h, int64_t q, int64_t r) {
    const int64_t dv = p_.head_dim_v, row = (b * p_.heads + h) * p_.seqlen_q + q;
    const double lse = rows_.lse[row], n = static_cast<double>(keys_[r]), dlse = g_.load_dlse(b, h, q);
    const double dot = rows_.delta[row] + dlse;  // rowsum(dout * out)
    // The kernel's maximum is at most log n below lse, and the sink another term.
    const double max = std::abs(lse) + std::log(n + 1);
    const Error sum = Error::roundings(n + 1, 1);
    Error lse_error = lse_[r] + sum + Error::roundings(4, 1) + Error::roundings(4, lse) + Error::roundings(4, max);
    lse_error.sum = lse_bound_[row];
    rows_.lse_error[row] = lse_error.grown();

    load_row(exact_.out.at(b, q, h, sizeof(double)), DType::f64, dv, out_.data());
    load_row(g_.dout.at(b, q, h, size_of(p_.dtype)), p_.dtype, dv, dout_.data());
    const float* bound = &out_bound_[((b * p_.seqlen_q + q) * p_.heads + h) * dv];
    Error error = delta_[r] + sum.times(dot);
    double linear = 0, magnitude = 0, squares = 0;
    for (int64_t i = 0; i < dv; ++i) {
      const double term = std::abs(dout_[i] * out_[i]);
      magnitude += term;
      squares += term * term;
      linear += std::abs(dout_[i]) * (static_cast<double>(bound[i]) + ErrorBound::kTiny) +
                ErrorBound::kTiny * (std::abs(out_[i]) + 1);
      Error out_error = Error::summation(n + 2, out_[i], magnitude_[r * dv + i], squares_[r * dv + i]) +
                        Error::of(epsilon_of(p_.dtype) / 2 * out_[i]) +
                        Error::of(p_.dtype == DType::f16 ? 0x1p-25 : 2 * ErrorBound::kTiny);
      out_error.square += storage_[r * dv + i];
      error += out_error.times(dout_[i]) + Error::of(ErrorBound::kTiny * (std::abs(out_[i]) + 1));
    }
    error.sum = linear;  // what reference_attention says of out holds always
    rows_.delta_error[row] = error + Error::summation(static_cast<double>(dv + 2), dot, magnitude, squares) +
                             Error::roundings(2, dlse) + Error::roundings(2, rows_.delta[row]);
  }

  const BackwardProblem& g_;
  const Problem& p_;
  const Problem& exact_;
  const std::vector<float>& out_bound_;
  const std::vector<float>& lse_bound_;
  RowStatistics& rows_;
  PairGradients pairs_;
  std::vector<double> out_, dout_;                     // [Dv]
  std::vector<int64_t> keys_;                          // of each row
  std::vector<Error> lse_, delta_;                     // of each row: from errors of its scores
  std::vector<double> magnitude_, squares_, storage_;  // [rows, Dv]: of the terms P v
};

}  // namespace

RowStatistics row_statistics(const BackwardProblem& g, const Problem& given, Executor& executor) {
  const Problem& p = g.forward;
  const int64_t count = p.batch * p.heads * p.seqlen_q, dv = p.head_dim_v;
  RowStatistics rows;
  rows.lse.resize(count);
  rows.delta.resize(count);
  parallel_for(
      executor, p.batch * p.heads, [&](int) { return std::vector<double>(2 * dv); },
      [&](std::vector<double>& scratch, int64_t unit) {
        const int64_t b = unit / p.heads, h = unit % p.heads;
        double *out = scratch.data(), *dout = out + dv;
        for (int64_t q = 0; q < p.seqlen_q; ++q) {
          const int64_t row = unit * p.seqlen_q + q;
          rows.lse[row] = given.load_lse(b, h, q);
          if (without_keys(rows.lse[row])) continue;
          load_row(given.out.at(b, q, h, size_of(given.out_dtype)), given.out_dtype, dv, out);
          load_row(g.dout.at(b, q, h, size_of(p.dtype)), p.dtype, dv, dout);
          double sum = 0;
          for (int64_t i = 0; i < dv; ++i) sum += dout[i] * out[i];
          rows.delta[row] = sum - g.load_dlse(b, h, q);
        }
      });
  return rows;
}

void add_row_errors(const BackwardProblem& problem, const Problem& exact, const std::vector<float>& out_bound,
                    const std::vector<float>& lse_bound, Executor& executor, RowStatistics& rows) {
  RowStatistics no_errors = rows;  // the pairs are visited with bounds, of their own errors alone
  no_errors.with_errors = true;
  no_errors.lse_error.resize(rows.lse.size());
  no_errors.delta_error.resize(rows.lse.size());
  rows = no_errors;
  const int64_t block_rows = problem.forward.pattern.shape.rows(), heads = problem.forward.heads;
  parallel_for(
      executor, problem.forward.batch * heads * block_rows,
      [&](int) { return RowErrors(problem, exact, out_bound, lse_bound, no_errors, rows); },
      [&](RowErrors& errors, int64_t unit) {
        errors.run(unit / block_rows / heads, unit / block_rows % heads, unit % block_rows);
      });
}

void set_row_errors(const BackwardProblem& g, const Problem& exact, const float* out_bound, const float* lse_bound,
                    Executor& executor, RowStatistics& rows) {
  const Problem& p = g.forward;
  const int64_t dv = p.head_dim_v;
  rows.with_errors = true;
  rows.lse_error.resize(rows.lse.size());
  rows.delta_error.resize(rows.lse.size());
  parallel_for(
      executor, p.batch * p.heads, [&](int) { return std::vector<double>(2 * dv); },
      [&](std::vector<double>& scratch, int64_t unit) {
        const int64_t b = unit / p.heads, h = unit % p.heads;
        double *out = scratch.data(), *dout = out + dv;
        for (int64_t q = 0; q < p.seqlen_q; ++q) {
          const int64_t row = unit * p.seqlen_q + q;
          if (without_keys(rows.lse[row])) continue;
          load_row(exact.out.at(b, q, h, sizeof(double)), DType::f64, dv, out);
          load_row(g.dout.at(b, q, h, size_of(p.dtype)), p.dtype, dv, dout);
          const float* bound = &out_bound[((b * p.seqlen_q + q) * p.heads + h) * dv];
          double linear = 0, magnitude = 0, squares = 0;
          for (int64_t i = 0; i < dv; ++i) {
            const double term = std::abs(dout[i] * out[i]);
            magnitude += term;
            squares += term * term;
            linear += std::abs(dout[i]) * (static_cast<double>(bound[i]) + ErrorBound::kTiny) +
                      ErrorBound::kTiny * (std::abs(out[i]) + 1);
          }
          const double dlse = g.load_dlse(b, h, q);
          rows.lse_error[row] = Error::of(lse_bound[row]).grown();
          rows.delta_error[row] =
              Error::of(linear) +
              Error::summation(static_cast<double>(dv + 2), rows.delta[row] + dlse, magnitude, squares) +
              Error::roundings(2, dlse) + Error::roundings(2, rows.delta[row]);
        }
      });
}

}  // namespace tessera
