#include <algorithm>
#include <cmath>
#include <limits>

#include "call/pair_mask.h"
#include "call/rows.h"
#include "call/scores.h"
#include "check/cases.h"

namespace tessera::check {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

class Plain {
 public:
  Plain(const BackwardProblem& bp, const PlainGradients& to) : bp_(bp), p_(bp.forward), to_(to) {
    query_.resize(p_.head_dim);
    dquery_.resize(p_.head_dim);
    dout_.resize(p_.head_dim_v);
    out_.resize(p_.head_dim_v);
    const int64_t entries = p_.pattern.indptr[p_.pattern.shape.total_rows()];
    if (bp_.dbias_head != 0) bias_head_ = entries;
    if (bp_.dbias_batch != 0) bias_batch_ = bias_head_ != 0 ? entries * p_.heads : entries;
    int64_t stride = 1;
    for (int i = 3; i >= 0; --i) {
      if (bp_.dattn_bias_size[i] != 1) attn_stride_[i] = stride;
      stride *= bp_.dattn_bias_size[i];
    }
    if (to_.dq) std::fill_n(to_.dq, p_.batch * p_.seqlen_q * p_.heads * p_.head_dim, 0.0);
    if (to_.dk) std::fill_n(to_.dk, p_.batch * p_.seqlen_k * p_.kv_heads * p_.head_dim, 0.0);
    if (to_.dv) std::fill_n(to_.dv, p_.batch * p_.seqlen_k * p_.kv_heads * p_.head_dim_v, 0.0);
  }

  void run() {
    for (int64_t b = 0; b < p_.batch; ++b) {
      const PairMask mask(p_, b);
      for (int64_t h = 0; h < p_.heads; ++h) {
        keys_.assign(p_.seqlen_k * p_.head_dim, 0);
        values_.assign(p_.seqlen_k * p_.head_dim_v, 0);
        loaded_.assign(p_.seqlen_k, 0);
        for (int64_t q = 0; q < p_.seqlen_q; ++q) {
          const double max = weigh(mask, b, h, q);
          if (max != -kInfinity) differentiate(b, h, q, max);
        }
      }
    }
    const auto round_all = [&](double* x, int64_t n) {
      for (int64_t i = 0; x != nullptr && i < n; ++i) x[i] = round(x[i]);
    };
    round_all(to_.dq, p_.batch * p_.seqlen_q * p_.heads * p_.head_dim);
    round_all(to_.dk, p_.batch * p_.seqlen_k * p_.kv_heads * p_.head_dim);
    round_all(to_.dv, p_.batch * p_.seqlen_k * p_.kv_heads * p_.head_dim_v);
  }

 private:
  struct Pair {
    int64_t k, entry;
    double weight;   // score, then the rounded weight
    double keep;     // 1 / (1 - p) or 0: dropout
    double softcap;  // derivative of the capped score by the score
  };

  double round(double x) const {
    uint64_t bits = 0;
    store_from_double(&bits, p_.dtype, 0, x);
    return load_as_double(&bits, p_.dtype, 0);
  }

  // The scores of a row, in pairs_; returns their maximum.
  double weigh(const PairMask& mask, int64_t b, int64_t h, int64_t q) {
    const int64_t element = static_cast<int64_t>(size_of(p_.dtype)), block_k = p_.pattern.shape.block_k;
    const RowScores<double> scores(p_, b, h, q);
    const auto rounding = [&](double x) { return round(x); };
    pairs_.clear();
    double max = -kInfinity;
    mask.for_each_pair(h, q, [&](int64_t entry, int64_t k) {
      if (pairs_.empty()) load_row(p_.q.at(b, q, h, element), p_.dtype, p_.head_dim, query_.data());
      double* key = &keys_[k * p_.head_dim];
      if (!loaded_[k]) {
        const int64_t column = k / block_k, offset = k % block_k * element, kv_head = h / p_.group();
        load_row(p_.k_block(b, column, kv_head) + offset * p_.k.seq, p_.dtype, p_.head_dim, key);
        load_row(p_.v_block(b, column, kv_head) + offset * p_.v.seq, p_.dtype, p_.head_dim_v,
                 &values_[k * p_.head_dim_v]);
        loaded_[k] = 1;
      }
      double dot = 0;
      for (int64_t i = 0; i < p_.head_dim; ++i) dot += query_[i] * key[i];
      const double t = round(scores.tanh_of_scaled(round(p_.scale * dot)));
      const Pair pair{k, entry, scores.score(dot, entry, k, rounding), keep_factor(p_, b, h, q, k),
                      round(1 - round(t * t))};
      if (!(pair.weight <= max)) max = pair.weight;
      pairs_.push_back(pair);
    });
    return max;
  }

  void differentiate(int64_t b, int64_t h, int64_t q, double max) {
    const int64_t d = p_.head_dim, dv = p_.head_dim_v;
    load_row(bp_.dout.at(b, q, h, size_of(p_.dtype)), p_.dtype, dv, dout_.data());
    const double sink = p_.sinks ? std::exp(*p_.sinks.at(0, h) - max) : 0;
    double sum = sink;
    for (Pair& pair : pairs_) sum += pair.weight = std::exp(pair.weight - max);
    std::fill(out_.begin(), out_.end(), 0.0);
    for (Pair& pair : pairs_) {
      const double dropped = round(pair.weight / sum * pair.keep), *value = &values_[pair.k * dv];
      pair.weight = round(pair.weight / sum);
      for (int64_t i = 0; i < dv; ++i) out_[i] += dropped * value[i];
      double* to = to_.dv + ((b * p_.seqlen_k + pair.k) * p_.kv_heads + h / p_.group()) * dv;
      for (int64_t i = 0; to_.dv != nullptr && i < dv; ++i) to[i] += dropped * dout_[i];
    }
    double delta = 0;
    for (int64_t i = 0; i < dv; ++i) delta += dout_[i] * round(out_[i]);
    delta = round(delta) - bp_.load_dlse(b, h, q);
    if (to_.dsinks) to_.dsinks[h] -= round(sink / sum) * delta;
    std::fill(dquery_.begin(), dquery_.end(), 0.0);
    for (const Pair& pair : pairs_) {
      const double *key = &keys_[pair.k * d], *value = &values_[pair.k * dv];
      double dweight = 0;
      for (int64_t i = 0; i < dv; ++i) dweight += dout_[i] * value[i];
      const double dscore = round(pair.weight * (round(round(dweight) * pair.keep) - delta));
      if (to_.dblock_bias) to_.dblock_bias[b * bias_batch_ + h * bias_head_ + pair.entry] += dscore;
      if (to_.dattn_bias) {
        to_.dattn_bias[b * attn_stride_[0] + h * attn_stride_[1] + q * attn_stride_[2] + pair.k * attn_stride_[3]] +=
            dscore;
      }
      const double ddot = round(p_.scale * round(dscore * pair.softcap));
      for (int64_t i = 0; i < d; ++i) dquery_[i] += ddot * key[i];
      double* to = to_.dk + ((b * p_.seqlen_k + pair.k) * p_.kv_heads + h / p_.group()) * d;
      for (int64_t i = 0; to_.dk != nullptr && i < d; ++i) to[i] += ddot * query_[i];
    }
    if (to_.dq) std::copy(dquery_.begin(), dquery_.end(), to_.dq + ((b * p_.seqlen_q + q) * p_.heads + h) * d);
  }

  const BackwardProblem& bp_;
  const Problem& p_;
  const PlainGradients& to_;
  int64_t bias_batch_ = 0, bias_head_ = 0, attn_stride_[4] = {0, 0, 0, 0};
  std::vector<double> query_, dquery_, dout_, out_, keys_, values_;
  std::vector<char> loaded_;
  std::vector<Pair> pairs_;
};

}  // namespace

void plain_gradients(const BackwardProblem& problem, const PlainGradients& to) { Plain(problem, to).run(); }

}  // namespace tessera::check
