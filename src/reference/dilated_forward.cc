// The fp64 oracle of dilated attention, with bounds on what rounding may do to dilated_forward().
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "call/dilated_plan.h"
#include "core/work.h"
#include "reference/forward.h"

namespace tessera {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double u = 0x1p-24;  // unit roundoff of fp32

// Result of one group in compact buffers ([H, B, segments, rows, Dv or 1]), and the bounds on its errors.
struct Partial {
  std::vector<double> out, lse;
  std::vector<float> out_bound, lse_bound;
};

// Bounds as the reference gives them, [B, S, H, Dv] and [B, H, S] of a part, to their places in the buffers.
void scatter_bounds(const DilatedPlan& plan, const DilatedPart& part, const Problem& p, const std::vector<float>& out,
                    const std::vector<float>& lse, Partial& partial) {
  const int64_t dim = p.head_dim_v;
  const auto base = [](std::vector<float>& x) { return reinterpret_cast<char*>(x.data()); };
  const Strided to_out = plan.compact(part, base(partial.out_bound), dim, sizeof(float));
  const Strided to_lse = plan.compact(part, base(partial.lse_bound), 1, sizeof(float));
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t s = 0; s < p.seqlen_q; ++s) {
      for (int64_t h = 0; h < p.heads; ++h) {
        const float* row = &out[((b * p.seqlen_q + s) * p.heads + h) * dim];
        std::copy(row, row + dim, reinterpret_cast<float*>(to_out.at(b, s, h, sizeof(float))));
        *reinterpret_cast<float*>(to_lse.at(b, s, h, sizeof(float))) = lse[(b * p.heads + h) * p.seqlen_q + s];
      }
    }
  }
}

class Joined {
 public:
  Joined(const Problem& whole, const DilatedPlan& plan, const std::vector<Partial>& partials, float* out_bound,
         float* lse_bound)
      : whole_(whole), plan_(plan), partials_(partials), out_bound_(out_bound), lse_bound_(lse_bound) {}

  // With weights w_g = exp(lse_g - lse), out = sum w_g out_g. Errors of lse_g of at most d change a weight by a factor
  // of exp(+-2d), and as the weights sum to 1, out by that much of sum w_g |out_g - out|.
  void row(int64_t b, int64_t s, int64_t h) const {
    const int64_t dim = whole_.head_dim_v;
    std::vector<int64_t> at(partials_.size(), -1);
    double max = -kInfinity, error = 0;
    for (size_t g = 0; g < partials_.size(); ++g) {
      const DilatedGroup& group = plan_.groups()[g];
      const DilatedGroup::Place place = group.place(s);
      if (place.offset != h % group.rate) continue;
      const int64_t row = (h * whole_.batch + b) * group.segments * group.rows + place.index;
      const double lse = partials_[g].lse[row];
      if (lse == -kInfinity) continue;
      at[g] = row;
      if (lse > max || std::isnan(lse)) max = lse;
      error = std::max<double>(error, partials_[g].lse_bound[row]);
    }
    double sum = 0;
    for (size_t g = 0; g < at.size(); ++g) {
      if (at[g] >= 0) sum += std::exp(partials_[g].lse[at[g]] - max);
    }
    const double lse = max == -kInfinity ? max : max + std::log(sum);
    whole_.store_lse(b, h, s, lse);
    const double terms = static_cast<double>(at.size());
    const double joining = max == -kInfinity ? 0 : u * (terms + 8 + 4 * std::abs(max) + 4 * std::abs(lse));
    if (lse_bound_) lse_bound_[(b * whole_.heads + h) * whole_.seqlen_q + s] = static_cast<float>(error + joining);
    const double weight_error = std::expm1(std::min(2 * error + joining, 700.0));
    const double underflow = whole_.dtype == DType::f16 ? 0x1p-24 : std::numeric_limits<float>::min();
    char* to = whole_.out.at(b, s, h, size_of(whole_.out_dtype));
    for (int64_t c = 0; c < dim; ++c) {
      double out = 0, spread = 0, magnitude = 0, bounds = 0;
      const auto for_terms = [&](auto visit) {
        for (size_t g = 0; g < at.size(); ++g) {
          if (at[g] < 0) continue;
          const int64_t i = at[g] * dim + c;
          visit(std::exp(partials_[g].lse[at[g]] - lse), partials_[g].out[i], partials_[g].out_bound[i]);
        }
      };
      for_terms([&](double weight, double part, double) { out += weight * part; });
      store_from_double(to, whole_.out_dtype, c, out);
      if (out_bound_ == nullptr) continue;
      for_terms([&](double weight, double part, double bound) {
        spread += weight * std::abs(part - out);
        magnitude += weight * std::abs(part);
        bounds += weight * bound;
      });
      const double total = (1 + weight_error) * bounds + weight_error * spread + (terms + 8) * u * magnitude +
                           epsilon_of(whole_.dtype) * std::abs(out) + underflow;
      out_bound_[((b * whole_.seqlen_q + s) * whole_.heads + h) * dim + c] =
          static_cast<float>(max == -kInfinity ? 0 : total);
    }
  }

 private:
  const Problem& whole_;
  const DilatedPlan& plan_;
  const std::vector<Partial>& partials_;
  float* out_bound_;
  float* lse_bound_;
};

}  // namespace

void reference_dilated_forward(const DilatedForwardArgs& args, Executor& executor, float* out_bound, float* lse_bound) {
  const Problem whole = resolve_dilated(args, Purpose::reference);
  const DilatedPlan plan(whole, args.dilation, args.options, evenly_spaced(whole));
  std::vector<Partial> partials(plan.groups().size());
  for (size_t g = 0; g < partials.size(); ++g) {
    const size_t rows = static_cast<size_t>(plan.elements(plan.groups()[g], 1)), dim = whole.head_dim_v;
    partials[g] = {std::vector<double>(rows * dim), std::vector<double>(rows), std::vector<float>(rows * dim),
                   std::vector<float>(rows)};
  }
  for (const DilatedPart& part : plan.parts()) {
    Partial& partial = partials[part.group];
    Problem p = plan.problem(part);
    p.out = plan.compact(part, reinterpret_cast<char*>(partial.out.data()), p.head_dim_v, sizeof(double));
    p.out_dtype = DType::f64;
    set_lse(p, plan.compact(part, reinterpret_cast<char*>(partial.lse.data()), 1, sizeof(double)), DType::f64);
    const size_t rows = static_cast<size_t>(p.batch * p.seqlen_q * p.heads);
    std::vector<float> out(rows * p.head_dim_v), lse(rows);
    reference_attention(p, executor, out.data(), lse.data());
    scatter_bounds(plan, part, p, out, lse, partial);
  }
  const Joined joined(whole, plan, partials, out_bound, lse_bound);
  parallel_for(executor, whole.batch * whole.seqlen_q, [&](int64_t unit) {
    for (int64_t h = 0; h < whole.heads; ++h) joined.row(unit / whole.seqlen_q, unit % whole.seqlen_q, h);
  });
}

}  // namespace tessera
