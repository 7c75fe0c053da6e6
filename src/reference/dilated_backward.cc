// The fp64 oracle of dilated gradients, with bounds on what rounding may do to dilated_backward().
#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "call/dilated_bias.h"
#include "call/dilated_plan.h"
#include "reference/backward.h"
#include "reference/error_bound.h"

namespace tessera {

namespace {

// One of dq, dk, dv, all [B, S, heads, dim] and contiguous; empty: not wanted.
struct Sum {
  Strided result;          // where the caller wants it, or data nullptr
  float* bound = nullptr;  // or nullptr
  bool kv = false;
  int64_t seqlen = 0, heads = 0, dim = 0;
  std::vector<double> group, total, magnitude;  // of one (w, r); of all; sum of the absolute values of each (w, r)
  std::vector<double> error;

  bool wanted() const { return !total.empty(); }
  Strided view(double* data) const { return {reinterpret_cast<char*>(data), seqlen * heads * dim, heads * dim, dim}; }
};

// Contiguous rows [batches, rows, heads, dim] of a part, added to their places in a whole tensor of doubles.
void add_rows(const DilatedPlan& plan, const DilatedPart& part, Sum& sum, const std::vector<float>& from) {
  const Strided to = plan.rows(part, sum.view(sum.error.data()), sizeof(double), sum.kv);
  const int64_t batches = part.batches * part.segments, heads = sum.kv ? part.kv_heads : part.heads;
  const float* row = from.data();
  for (int64_t b = 0; b < batches; ++b) {
    for (int64_t s = 0; s < part.rows; ++s) {
      for (int64_t h = 0; h < heads; ++h, row += sum.dim) {
        double* place = reinterpret_cast<double*>(to.at(b, s, h, sizeof(double)));
        for (int64_t c = 0; c < sum.dim; ++c) place[c] += row[c];
      }
    }
  }
}

class DilatedReference {
 public:
  DilatedReference(const DilatedBackwardArgs& args, Executor& executor, const GradientBounds& bounds)
      : whole_(resolve_dilated(args, Purpose::reference)),
        with_bounds_(bounds.dq || bounds.dk || bounds.dv || bounds.dattn_bias),
        bias_bound_(bounds.dattn_bias),
        executor_(executor) {
    const Problem& f = whole_.forward;
    sums_[0] = {whole_.dq, bounds.dq, false, f.seqlen_q, f.heads, f.head_dim, {}, {}, {}, {}};
    sums_[1] = {whole_.dk, bounds.dk, true, f.seqlen_q, f.kv_heads, f.head_dim, {}, {}, {}, {}};
    sums_[2] = {whole_.dv, bounds.dv, true, f.seqlen_q, f.kv_heads, f.head_dim_v, {}, {}, {}, {}};
    for (Sum& sum : sums_) {
      if (sum.result.data == nullptr && sum.bound == nullptr) continue;
      sum.total.resize(f.batch * sum.seqlen * sum.heads * sum.dim);
      sum.group.resize(sum.total.size());
      sum.magnitude.resize(with_bounds_ ? sum.total.size() : 0);
      sum.error.resize(with_bounds_ ? sum.total.size() : 0);
    }
    if (whole_.dattn_bias != nullptr) {
      bias_.total.resize(bias_numel(whole_));
      bias_.magnitude.resize(with_bounds_ ? bias_.total.size() : 0);
      bias_.error.resize(with_bounds_ ? bias_.total.size() : 0);
    }
    join(args);
  }

  void run(const DilatedBackwardArgs& args) {
    given_ = whole_.forward;
    const int64_t n = given_.seqlen_q, h = given_.heads, dv = given_.head_dim_v;
    given_.out = {reinterpret_cast<char*>(out_.data()), n * h * dv, h * dv, dv};
    given_.out_dtype = DType::f64;
    set_lse(given_, {reinterpret_cast<char*>(lse_.data()), h * n, 1, n}, DType::f64);
    const DilatedPlan plan(given_, args.dilation, args.options, false);
    double terms = 0;
    for (size_t g = 0; g < plan.groups().size(); ++g) {
      for (Sum& sum : sums_) std::fill(sum.group.begin(), sum.group.end(), 0.0);
      for (auto [part, end] = plan.parts_of(g); part < end; ++part) add_part(plan, plan.parts()[part]);
      for (Sum& sum : sums_) {
        for (size_t i = 0; i < sum.total.size(); ++i) sum.total[i] += sum.group[i];
        for (size_t i = 0; i < sum.magnitude.size(); ++i) sum.magnitude[i] += std::abs(sum.group[i]);
      }
      terms += static_cast<double>(plan.groups()[g].rows) + kGroupRoundings;
    }
    for (Sum& sum : sums_) store(sum, terms, args.accumulate);
    if (whole_.dattn_bias != nullptr) store_bias(static_cast<double>(plan.parts().size()) + kGroupRoundings);
  }

 private:
  static constexpr double kGroupRoundings = 8;  // as those of one call: scale on the way out, partial sums of threads

  // out and lse of the joined softmax, and their errors.
  void join(const DilatedBackwardArgs& args) {
    const Problem& f = whole_.forward;
    const int64_t b = f.batch, n = f.seqlen_q, h = f.heads, dv = f.head_dim_v;
    out_.resize(b * n * h * dv);
    lse_.resize(b * h * n);
    out_error_.resize(with_bounds_ ? out_.size() : 0);
    lse_error_.resize(with_bounds_ ? lse_.size() : 0);
    DilatedForwardArgs forward;
    forward.q = args.q;
    forward.k = args.k;
    forward.v = args.v;
    forward.out = make_view(static_cast<void*>(out_.data()), DType::f64, {b, n, h, dv});
    forward.lse = make_view(static_cast<void*>(lse_.data()), DType::f64, {b, h, n});
    forward.dilation = args.dilation;
    forward.options = args.options;
    if (out_.empty()) return;
    reference_dilated_forward(forward, executor_, with_bounds_ ? out_error_.data() : nullptr,
                              with_bounds_ ? lse_error_.data() : nullptr);
  }

  void add_part(const DilatedPlan& plan, const DilatedPart& part) {
    BackwardProblem all = whole_;
    all.gradient_dtype = DType::f64;
    all.accumulate = true;
    all.dq = sums_[0].wanted() ? sums_[0].view(sums_[0].group.data()) : Strided{};
    all.dk = sums_[1].wanted() ? sums_[1].view(sums_[1].group.data()) : Strided{};
    all.dv = sums_[2].wanted() ? sums_[2].view(sums_[2].group.data()) : Strided{};
    BackwardProblem p = plan.problem(part, all);
    const Problem given = p.forward;
    p.forward.lse_dtype = whole_.forward.lse_dtype;  // that of dlse
    const DilatedBias bias(part, plan.groups()[part.group], whole_);
    std::vector<double> dbias(whole_.dattn_bias ? bias.numel() : 0);
    std::vector<float> bias_bound(with_bounds_ ? dbias.size() : 0);
    if (whole_.dattn_bias != nullptr) bias.set(p, dbias.data(), DType::f64);
    if (!with_bounds_) {
      reference_part_gradients(p, given, executor_, nullptr, nullptr, {});
      return add_bias(bias, dbias, bias_bound);
    }
    const int64_t batch = given.batch, rows = given.seqlen_q, heads = given.heads, dv = given.head_dim_v;
    std::vector<float> out_error(batch * rows * heads * dv), lse_error(batch * heads * rows);
    gather_errors(plan, part, given, out_error, lse_error);
    std::array<std::vector<float>, 3> bounds;
    std::array<float*, 3> to{};
    for (size_t i = 0; i < 3; ++i) {
      if (!sums_[i].wanted()) continue;
      bounds[i].resize(batch * rows * (sums_[i].kv ? given.kv_heads : heads) * sums_[i].dim);
      to[i] = bounds[i].data();
    }
    reference_part_gradients(
        p, given, executor_, out_error.data(), lse_error.data(),
        {.dq = to[0], .dk = to[1], .dv = to[2], .dattn_bias = bias_bound.empty() ? nullptr : bias_bound.data()});
    add_bias(bias, dbias, bias_bound);
    for (size_t i = 0; i < 3; ++i) {
      if (sums_[i].wanted()) add_rows(plan, part, sums_[i], bounds[i]);
    }
  }

  // Of a part, to their places in the whole.
  void add_bias(const DilatedBias& bias, const std::vector<double>& values, const std::vector<float>& bounds) {
    const std::array<int64_t, 4> stride = contiguous_bias_strides(whole_.dattn_bias_size);
    for (int64_t row = 0; !values.empty() && row < bias.rows(); ++row) {
      bias.for_each_run(row, stride.data(), [&](int64_t from, int64_t to, int64_t n, int64_t step) {
        for (int64_t i = 0; i < n; ++i) {
          bias_.total[to + i * step] += values[from + i];
          if (!with_bounds_) continue;
          bias_.magnitude[to + i * step] += std::abs(values[from + i]);
          bias_.error[to + i * step] += bounds[from + i];
        }
      });
    }
  }

  // As of dq, dk and dv: each part may round what the others left.
  void store_bias(double terms) {
    for_each_bias(whole_, [&](int64_t i, int64_t at) {
      const DType dtype = whole_.dattn_bias_dtype;
      store_from_double(whole_.dattn_bias, dtype, at, bias_.total[i]);
      if (bias_bound_ == nullptr) return;
      double error = bias_.error[i] + ErrorBound::u * terms * bias_.magnitude[i];
      if (dtype != DType::f64) error += epsilon_of(dtype) / 2 * std::abs(bias_.total[i]);
      bias_bound_[i] = static_cast<float>(error);
    });
  }

  void gather_errors(const DilatedPlan& plan, const DilatedPart& part, const Problem& p, std::vector<float>& out,
                     std::vector<float>& lse) {
    const int64_t n = whole_.forward.seqlen_q, h = whole_.forward.heads, dv = p.head_dim_v;
    const Strided all_out{reinterpret_cast<char*>(out_error_.data()), n * h * dv, h * dv, dv};
    const Strided all_lse{reinterpret_cast<char*>(lse_error_.data()), h * n, 1, n};
    const Strided from_out = plan.rows(part, all_out, sizeof(float));
    const Strided from_lse = plan.rows(part, all_lse, sizeof(float));
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t q = 0; q < p.seqlen_q; ++q) {
        for (int64_t head = 0; head < p.heads; ++head) {
          const float* row = reinterpret_cast<const float*>(from_out.at(b, q, head, sizeof(float)));
          std::copy(row, row + dv, &out[((b * p.seqlen_q + q) * p.heads + head) * dv]);
          lse[(b * p.heads + head) * p.seqlen_q + q] =
              *reinterpret_cast<const float*>(from_lse.at(b, q, head, sizeof(float)));
        }
      }
    }
  }

  // The (w, r) add up in place, in any order: each of `terms` additions (times the heads of a group, for k and v) may
  // round what the other (w, r) left there. That comes on top of what each (w, r) may lose by itself.
  void store(const Sum& sum, double terms, bool accumulate) {
    const Problem& f = whole_.forward;
    const DType dtype = whole_.gradient_dtype;
    if (sum.kv) terms *= static_cast<double>(f.heads) / static_cast<double>(std::max<int64_t>(1, f.kv_heads));
    const int64_t rows = sum.wanted() ? f.batch * sum.seqlen * sum.heads : 0;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t h = row % sum.heads, s = row / sum.heads % sum.seqlen, b = row / sum.heads / sum.seqlen;
      char* to = sum.result.data ? sum.result.at(b, s, h, size_of(dtype)) : nullptr;
      for (int64_t c = 0; c < sum.dim; ++c) {
        const int64_t i = row * sum.dim + c;
        double value = sum.total[i], error = 0;
        if (with_bounds_) error = sum.error[i] + ErrorBound::u * terms * sum.magnitude[i];
        if (to != nullptr) {
          if (accumulate) value += load_as_double(to, dtype, c);
          store_from_double(to, dtype, c, value);
          if (dtype != DType::f64) error += epsilon_of(dtype) / 2 * std::abs(value);
          if (dtype == DType::f16) error += 0x1p-25;
        }
        if (sum.bound != nullptr) sum.bound[i] = static_cast<float>(error);
      }
    }
  }

  const BackwardProblem whole_;
  const bool with_bounds_;
  float* bias_bound_;
  Executor& executor_;
  Problem given_;  // whole_ with the joined out and lse in fp64
  std::vector<double> out_, lse_;
  std::vector<float> out_error_, lse_error_;
  std::array<Sum, 3> sums_;
  struct {
    std::vector<double> total, magnitude, error;
  } bias_;  // of attn_bias, contiguous; empty: not wanted
};

}  // namespace

void reference_dilated_backward(const DilatedBackwardArgs& args, Executor& executor, const GradientBounds& bounds) {
  DilatedReference(args, executor, bounds).run(args);
}

}  // namespace tessera
