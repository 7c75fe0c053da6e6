// Gradients of one (query, key) pair in fp64, and bounds on the error of a kernel that computes them in fp32.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "attention/backward_problem.h"
#include "attention/error_bound.h"
#include "attention/parallel.h"
#include "attention/scores.h"

namespace tessera {

// lse and delta = rowsum(dout * out) - dlse of each query row, [B, H, Sq]; errors are those of the kernel's own.
struct RowStatistics {
  std::vector<double> lse, delta, lse_error, delta_error;  // errors are empty where nobody wants bounds
};

struct PairGradient {
  int64_t q = 0, k = 0;    // tokens
  const double* query = nullptr;  // [D]
  const double* key = nullptr;    // [D]
  const double* dout = nullptr;   // [Dv]
  double kept = 0;         // weight after dropout: what meets V
  double dscore = 0;       // gradient of the score: of all that is added to scale * q . k
  double ddot = 0;         // gradient of q . k: dscore through softcap, times scale
  double kept_error = 0, dscore_error = 0, ddot_error = 0;  // 0 where nobody wants bounds
};

// Visits the pairs of block pairs; a state of one thread.
class PairGradients {
 public:
  PairGradients(const BackwardProblem& problem, const RowStatistics& rows)
      : g_(problem), p_(problem.forward), rows_(rows), with_bounds_(!rows.lse_error.empty()) {
    const PatternShape& s = p_.pattern.shape;
    query_.resize(s.block_q * p_.head_dim);
    dout_.resize(s.block_q * p_.head_dim_v);
    key_.resize(s.block_k * p_.head_dim);
    value_.resize(s.block_k * p_.head_dim_v);
  }

  // Calls visit(pair) for the pairs of pattern entry `entry`, in block row i of (b, h), that take part: admitted, not
  // biased by -inf, and of a row that has an lse. No other rows are read.
  template <class Visit>
  void visit(int64_t b, int64_t h, int64_t i, int64_t entry, Visit visit) {
    const PatternShape& s = p_.pattern.shape;
    const int64_t begin = i * s.block_q, end = std::min(p_.seqlen_q, begin + s.block_q);
    const int64_t column = p_.pattern.indices[entry], kv_head = h / p_.group();
    const int64_t element = static_cast<int64_t>(size_of(p_.dtype));
    const MaskGeometry mask = p_.mask(b);
    key_loaded_.assign(s.block_k, 0);
    for (int64_t q = begin; q < end; ++q) {
      const int64_t row = (b * p_.heads + h) * p_.seqlen_q + q;
      if (rows_.lse[row] == -std::numeric_limits<double>::infinity()) continue;
      const RowScores<double> scores(p_, b, h, q);
      double* query = &query_[(q - begin) * p_.head_dim];
      double* dout = &dout_[(q - begin) * p_.head_dim_v];
      bool loaded = false;
      for_each_admitted_key(p_, mask, q, entry, [&](int64_t k) {
        if (!loaded) {
          load_row(p_.q.at(b, q, h, element), p_.dtype, p_.head_dim, query);
          load_row(g_.dout.at(b, q, h, element), p_.dtype, p_.head_dim_v, dout);
          loaded = true;
        }
        const int64_t slot = k - column * s.block_k;
        double* key = &key_[slot * p_.head_dim];
        double* value = &value_[slot * p_.head_dim_v];
        if (!key_loaded_[slot]) {
          load_row(p_.k_block(b, column, kv_head) + slot * element * p_.k.seq, p_.dtype, p_.head_dim, key);
          load_row(p_.v_block(b, column, kv_head) + slot * element * p_.v.seq, p_.dtype, p_.head_dim_v, value);
          key_loaded_[slot] = 1;
        }
        PairGradient pair{q, k, query, key, dout};
        if (differentiate(scores, row, entry, keep_factor(b, h, q, k), value, pair)) visit(pair);
      });
    }
  }

 private:
  struct Dot {
    double sum = 0;
    double magnitude = 0;  // sum |a_i b_i|
    double flushed = 0;    // what may be lost where factors below kTiny count as 0
  };
  Dot dot(const double* a, const double* b, int64_t n) const {
    Dot d;
    for (int64_t i = 0; i < n; ++i) d.sum += a[i] * b[i];
    if (!with_bounds_) return d;
    for (int64_t i = 0; i < n; ++i) {
      d.magnitude += std::abs(a[i] * b[i]);
      d.flushed += std::abs(a[i]) + std::abs(b[i]) + 1;
    }
    d.flushed *= ErrorBound::kTiny;
    return d;
  }

  double keep_factor(int64_t b, int64_t h, int64_t q, int64_t k) const {
    if (p_.dropout.p == 0) return 1;
    const uint32_t random = dropout_random(p_.dropout, p_.dropout_stream(b, h), p_.dropout_q(q), p_.dropout_k(k));
    return random < drop_threshold(p_.dropout.p) ? 0 : 1 / (1 - p_.dropout.p);
  }

  // False: a bias of -inf, a key that is not there.
  bool differentiate(const RowScores<double>& scores, int64_t row, int64_t entry, double keep, const double* value,
                     PairGradient& pair) const {
    constexpr double u = ErrorBound::u, tiny = ErrorBound::kTiny;
    const Dot qk = dot(pair.query, pair.key, p_.head_dim);
    const double score = scores.score(qk.sum, entry, pair.k);
    if (score == -std::numeric_limits<double>::infinity()) return false;
    const Dot dout_v = dot(pair.dout, value, p_.head_dim_v);
    const double lse = rows_.lse[row], delta = rows_.delta[row];
    const double weight = std::exp(score - lse);
    const double centered = keep * dout_v.sum - delta;
    const double tanh = p_.softcap > 0 ? std::tanh(p_.scale * qk.sum / p_.softcap) : 0;
    const double slope = 1 - tanh * tanh;
    pair.kept = weight * keep;
    pair.dscore = weight * centered;
    pair.ddot = p_.scale * (pair.dscore * slope);
    if (!with_bounds_) return true;

    const double magnitude = std::abs(p_.scale) * qk.magnitude;
    const double score_error =
        ErrorBound::score_error(p_, magnitude, score, scores.bias_magnitude(entry, pair.k)) + qk.flushed;
    const double weight_error =
        weight * ErrorBound::exp_error(score, lse, score_error + rows_.lse_error[row]) + tiny;
    pair.kept_error = keep * weight_error + 2 * u * pair.kept + ErrorBound::storage_error(p_.dtype, pair.kept);
    // dP - delta cancels: what counts is the size of the two, not of their difference.
    const double centered_error = keep * (u * (static_cast<double>(p_.head_dim_v) + 2) * dout_v.magnitude +
                                          dout_v.flushed) +
                                  rows_.delta_error[row] + u * std::abs(centered);
    pair.dscore_error = weight_error * std::abs(centered) + (weight + weight_error) * centered_error +
                        u * std::abs(pair.dscore) + tiny + ErrorBound::storage_error(p_.dtype, pair.dscore);
    double slope_error = 0;
    if (p_.softcap > 0) {
      const double argument_error =
          u * (static_cast<double>(p_.head_dim) + ErrorBound::kScoreRoundings) * magnitude / p_.softcap;
      const double tanh_error = slope * argument_error + ErrorBound::kScoreRoundings * u;
      slope_error = (2 * std::abs(tanh) + tanh_error) * tanh_error + 2 * u;
    }
    pair.ddot_error = std::abs(p_.scale) * (pair.dscore_error * slope +
                                            (std::abs(pair.dscore) + pair.dscore_error) * slope_error +
                                            ErrorBound::storage_error(p_.dtype, pair.dscore * slope)) +
                      4 * u * std::abs(pair.ddot);
    return true;
  }

  const BackwardProblem& g_;
  const Problem& p_;
  const RowStatistics& rows_;
  const bool with_bounds_;
  std::vector<double> query_, dout_, key_, value_;  // [block, D or Dv]
  std::vector<char> key_loaded_;                    // rows of key_ and value_ that hold the current block's
};

// lse and delta from out and lse of the problem, as given: fp64, or the dtypes of the call.
inline RowStatistics row_statistics(const BackwardProblem& g, const Problem& given, Executor& executor,
                                    const float* out_error, const float* lse_error) {
  constexpr double u = ErrorBound::u;
  const Problem& p = g.forward;
  const int64_t count = p.batch * p.heads * p.seqlen_q, dv = p.head_dim_v;
  RowStatistics rows;
  rows.lse.resize(count);
  rows.delta.resize(count);
  if (lse_error != nullptr) {
    rows.lse_error.assign(lse_error, lse_error + count);
    rows.delta_error.resize(count);
  }
  const int64_t units = p.batch * p.heads;
  parallel_for(
      executor, units, [&] { return std::vector<double>(2 * dv); },
      [&](std::vector<double>& scratch, int64_t unit) {
        const int64_t b = unit / p.heads, h = unit % p.heads;
        double *out = scratch.data(), *dout = out + dv;
        for (int64_t q = 0; q < p.seqlen_q; ++q) {
          const int64_t row = unit * p.seqlen_q + q;
          rows.lse[row] = load_as_double(given.lse, given.lse_dtype,
                                         b * given.lse_batch + h * given.lse_head + q * given.lse_seq);
          if (rows.lse[row] == -std::numeric_limits<double>::infinity()) continue;
          load_row(given.out.at(b, q, h, size_of(given.out_dtype)), given.out_dtype, dv, out);
          load_row(g.dout.at(b, q, h, size_of(p.dtype)), p.dtype, dv, dout);
          double dlse = 0;
          if (g.dlse != nullptr) {
            dlse = load_as_double(g.dlse, p.lse_dtype, b * g.dlse_batch + h * g.dlse_head + q * g.dlse_seq);
          }
          double sum = 0, error = 0;
          for (int64_t i = 0; i < dv; ++i) sum += dout[i] * out[i];
          rows.delta[row] = sum - dlse;
          if (lse_error == nullptr) continue;
          const float* bound = out_error + ((b * p.seqlen_q + q) * p.heads + h) * dv;
          for (int64_t i = 0; i < dv; ++i) {
            error += std::abs(dout[i]) * (static_cast<double>(bound[i]) + ErrorBound::kTiny) +
                     u * static_cast<double>(dv + 2) * std::abs(dout[i] * out[i]) +
                     ErrorBound::kTiny * (std::abs(out[i]) + 1);
          }
          rows.delta_error[row] = error + 2 * u * (std::abs(dlse) + std::abs(rows.delta[row]));
        }
      });
  return rows;
}

}  // namespace tessera
