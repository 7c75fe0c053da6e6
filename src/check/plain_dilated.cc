#include <algorithm>
#include <cmath>
#include <limits>

#include "call/rows.h"
#include "check/cases.h"

namespace tessera::check {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The results of all segments, and the join.
class Chain {
 public:
  explicit Chain(const Case& test) : test_(test), whole_(test.problems()[0]) {
    const int64_t rows = whole_.batch * whole_.heads * whole_.seqlen_q;
    joined_lse_.assign(rows, -kInfinity);
    for (const Problem& p : test.segment_problems()) {
      out_.emplace_back(p.seqlen_q * p.head_dim_v);
      lse_.emplace_back(p.seqlen_q);
      plain_attention(p, out_.back().data(), lse_.back().data());
    }
    std::vector<double> max(rows, -kInfinity), sum(rows, 0);
    for_rows([&](size_t n, int64_t i, int64_t row) {
      if (!(lse_[n][i] <= max[row])) max[row] = lse_[n][i];  // NaN stays NaN
    });
    for_rows([&](size_t n, int64_t i, int64_t row) {
      if (max[row] != -kInfinity) sum[row] += std::exp(lse_[n][i] - max[row]);
    });
    for (int64_t row = 0; row < rows; ++row) {
      if (max[row] != -kInfinity) joined_lse_[row] = max[row] + std::log(sum[row]);
    }
    joined_.assign(rows * whole_.head_dim_v, 0);
    for_rows([&](size_t n, int64_t i, int64_t row) {
      const double w = weight(n, i, row);
      for (int64_t c = 0; c < whole_.head_dim_v && w != 0; ++c) {
        joined_[row * whole_.head_dim_v + c] += w * out_[n][i * whole_.head_dim_v + c];
      }
    });
    for (double& x : joined_) x = round(x);
  }

  void store(double* out) const {  // joined_ is [B, H, S, Dv]
    const int64_t h = whole_.heads, s = whole_.seqlen_q, dv = whole_.head_dim_v;
    for (int64_t row = 0; row < whole_.batch * h * s; ++row) {
      const int64_t b = row / s / h, head = row / s % h, token = row % s;
      std::copy_n(&joined_[row * dv], dv, out + ((b * s + token) * h + head) * dv);
    }
  }

  void differentiate(const PlainGradients& to) const {
    const int64_t d = whole_.head_dim, dv = whole_.head_dim_v, s = whole_.seqlen_q;
    const int64_t rows_q = whole_.batch * s * whole_.heads, rows_k = whole_.batch * s * whole_.kv_heads;
    if (to.dq) std::fill_n(to.dq, rows_q * d, 0.0);
    if (to.dk) std::fill_n(to.dk, rows_k * d, 0.0);
    if (to.dv) std::fill_n(to.dv, rows_k * dv, 0.0);
    for (size_t n = 0; n < test_.segments().size(); ++n) differentiate_segment(n, to);
    const auto round_all = [&](double* x, int64_t count) {
      for (int64_t i = 0; x != nullptr && i < count; ++i) x[i] = round(x[i]);
    };
    round_all(to.dq, rows_q * d);
    round_all(to.dk, rows_k * d);
    round_all(to.dv, rows_k * dv);
  }

 private:
  double round(double x) const {
    uint64_t bits = 0;
    store_from_double(&bits, whole_.dtype, 0, x);
    return load_as_double(&bits, whole_.dtype, 0);
  }

  // Calls visit(segment, row inside it, row of [B, H, S]) for all rows of all segments.
  template <class Visit>
  void for_rows(Visit visit) const {
    for (size_t n = 0; n < test_.segments().size(); ++n) {
      const Segment& s = test_.segments()[n];
      for (int64_t i = 0; i < test_.segment_problems()[n].seqlen_q; ++i) visit(n, i, row_of(s, i));
    }
  }
  int64_t row_of(const Segment& s, int64_t i) const {
    return (s.batch * whole_.heads + s.head) * whole_.seqlen_q + s.first + i * s.rate;
  }

  double weight(size_t n, int64_t i, int64_t row) const {
    return joined_lse_[row] == -kInfinity ? 0 : round(std::exp(lse_[n][i] - joined_lse_[row]));
  }

  // With out = sum w_g out_g and w the softmax of lse: out_g gets w_g dout, lse_g gets w_g (dout (out_g - out) + dlse).
  void differentiate_segment(size_t n, const PlainGradients& to) const {
    const Segment& s = test_.segments()[n];
    BackwardProblem p = test_.backward_problems()[n];
    const int64_t rows = p.forward.seqlen_q, d = p.forward.head_dim, dv = p.forward.head_dim_v;
    const size_t size = size_of(whole_.dtype);
    std::vector<char> dout(rows * dv * size);
    std::vector<double> dlse(rows), given(dv);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = row_of(s, i);
      if (lse_[n][i] == -kInfinity) continue;  // what stands in its dout is nobody's
      load_row(p.dout.at(0, i, 0, size), whole_.dtype, dv, given.data());
      const double w = weight(n, i, row);
      double partial = 0, all = 0;
      for (int64_t c = 0; c < dv; ++c) {
        partial += given[c] * out_[n][i * dv + c];
        all += given[c] * joined_[row * dv + c];
        store_from_double(dout.data(), whole_.dtype, i * dv + c, w * given[c]);
      }
      const double from_lse = p.load_dlse(0, 0, i);
      dlse[i] = w * (round(partial) - round(all) + from_lse);
    }
    p.dout = {dout.data(), 0, dv, 0};
    p.dlse = {reinterpret_cast<char*>(dlse.data()), 0, 1, 0};
    p.forward.lse_dtype = DType::f64;
    std::vector<double> dq(to.dq ? rows * d : 0), dk(to.dk ? rows * d : 0), dvalues(to.dv ? rows * dv : 0);
    const auto data = [](std::vector<double>& x) { return x.empty() ? nullptr : x.data(); };
    // Of attn_bias: rows, columns or both of the segment, where the whole has them.
    const TensorView bias = test_.gradient(kDAttnBias).view;
    const bool each_q = to.dattn_bias && bias.sizes[2] != 1, each_k = to.dattn_bias && bias.sizes[3] != 1;
    const int64_t bias_rows = each_q ? rows : 1, bias_cols = each_k ? rows : 1;
    std::vector<double> dbias(to.dattn_bias ? bias_rows * bias_cols : 0);
    p.dattn_bias_size[0] = p.dattn_bias_size[1] = 1;
    p.dattn_bias_size[2] = bias_rows;
    p.dattn_bias_size[3] = bias_cols;
    plain_gradients(p, {data(dq), data(dk), data(dvalues), nullptr, data(dbias), nullptr});
    const auto stride = summed_strides(bias);
    for (int64_t i = 0; i < static_cast<int64_t>(dbias.size()); ++i) {
      const int64_t q = s.first + i / bias_cols * s.rate, k = s.first + i % bias_cols * s.rate;
      to.dattn_bias[s.batch * stride[0] + s.head * stride[1] + q * stride[2] + k * stride[3]] += dbias[i];
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t token = s.batch * whole_.seqlen_q + s.first + i * s.rate;
      const int64_t q = token * whole_.heads + s.head, k = token * whole_.kv_heads + s.head / whole_.group();
      for (int64_t c = 0; to.dq && c < d; ++c) to.dq[q * d + c] += dq[i * d + c];
      for (int64_t c = 0; to.dk && c < d; ++c) to.dk[k * d + c] += dk[i * d + c];
      for (int64_t c = 0; to.dv && c < dv; ++c) to.dv[k * dv + c] += dvalues[i * dv + c];
    }
  }

  const Case& test_;
  const Problem& whole_;
  std::vector<std::vector<double>> out_, lse_;  // of segments: [rows, Dv], [rows]
  std::vector<double> joined_, joined_lse_;     // [B, H, S, Dv], [B, H, S]
};

}  // namespace

void plain_dilated(const Case& test, double* out) { Chain(test).store(out); }

void plain_dilated_gradients(const Case& test, const PlainGradients& to) { Chain(test).differentiate(to); }

}  // namespace tessera::check
