// Dilated attention, gradients: one backward call for each (w, r), with the joined out and lse, into one sum.
#include <algorithm>
#include <array>
#include <vector>

#include "attention/device.h"
#include "call/checks.h"
#include "call/dilated_bias.h"
#include "call/dilated_plan.h"
#include "call/rows.h"
#include "core/buffer.h"
#include "core/work.h"

namespace tessera {

namespace {

// One of dq, dk, dv: where the caller wants it, and where the groups add up.
struct Gradient {
  Strided result;  // data nullptr: not wanted
  int64_t heads = 0, dim = 0;
  Buffer own;  // [heads, B, S, dim]; empty: the sum is made in the result
  Strided sum;
};

using Gradients = std::array<Gradient, 3>;

// Calls work(gradient, b, s, h) for all rows of those that are wanted.
template <class Work>
void for_each_row(const Gradients& gradients, int64_t batch, int64_t seqlen, Executor& executor, Work work) {
  constexpr int64_t kTokensPerUnit = 256;
  const int64_t chunks = (seqlen + kTokensPerUnit - 1) / kTokensPerUnit;
  for (const Gradient& g : gradients) {
    if (g.result.data == nullptr) continue;
    parallel_for(
        executor, batch * chunks, [&](int) { return std::vector<double>(static_cast<size_t>(g.dim)); },
        [&](std::vector<double>& row, int64_t unit) {
          const int64_t begin = unit % chunks * kTokensPerUnit, end = std::min(seqlen, begin + kTokensPerUnit);
          for (int64_t s = begin; s < end; ++s) {
            for (int64_t h = 0; h < g.heads; ++h) work(g, unit / chunks, s, h, row.data());
          }
        });
  }
}

bool all_evenly_spaced(const BackwardProblem& whole, const Gradients& gradients) {
  const int64_t n = whole.forward.seqlen_q;
  bool all = evenly_spaced(whole.forward) && evenly_spaced(whole.dout.batch, whole.dout.seq, n);
  if (whole.dlse.data) all = all && evenly_spaced(whole.dlse.batch, whole.dlse.seq, n);
  for (const Gradient& g : gradients) {
    if (g.result.data) all = all && evenly_spaced(g.sum.batch, g.sum.seq, n);
  }
  return all;
}

// The sum over all parts of the gradient of attn_bias; nothing where it is not wanted.
template <class T>  // double for fp64, else float
class BiasGradient {
 public:
  explicit BiasGradient(const BackwardProblem& whole) : whole_(whole) {
    if (whole.dattn_bias == nullptr) return;
    sum_ = reinterpret_cast<T*>(whole.dattn_bias);
    std::copy_n(whole.dattn_bias_stride, 4, stride_.begin());
    if (whole.dattn_bias_dtype != kDType) {
      own_ = Buffer(static_cast<size_t>(bias_numel(whole)) * sizeof(T), "sums of dattn_bias");
      sum_ = own_.as<T>();
      stride_ = contiguous_bias_strides(whole.dattn_bias_size);
    }
    for_each_bias(whole, [&](int64_t i, int64_t at) { sum_[own_.size() ? i : at] = 0; });
  }

  // The parts' own, in one piece for all of a (w, r).
  void open(const DilatedPlan& plan, size_t group, std::vector<BackwardProblem>& problems) {
    parts_.clear();
    if (sum_ == nullptr) return;
    int64_t elements = 0;
    const auto [first, end] = plan.parts_of(group);
    for (size_t i = first; i < end; ++i) {
      parts_.emplace_back(DilatedBias(plan.parts()[i], plan.groups()[group], whole_), elements);
      elements += parts_.back().first.numel();
    }
    const size_t bytes = static_cast<size_t>(elements) * sizeof(T);
    if (of_parts_.size() < bytes) {
      of_parts_ = {};
      of_parts_ = Buffer(bytes, "dattn_bias of dilated segments");
    }
    for (size_t i = 0; i < parts_.size(); ++i) {
      parts_[i].first.set(problems[i], of_parts_.as<char>() + parts_[i].second * sizeof(T), kDType);
    }
  }
  // One part after the other: the same sum for any number of threads.
  void add(Executor& executor) const {
    for (const auto& [part, offset] : parts_) {
      const T* from = of_parts_.as<const T>() + offset;
      parallel_for(executor, part.rows(), [&](int64_t row) {
        part.for_each_run(row, stride_.data(), [&](int64_t first, int64_t to, int64_t n, int64_t step) {
          for (int64_t i = 0; i < n; ++i) sum_[to + i * step] += from[first + i];
        });
      });
    }
  }
  void store() const {
    if (own_.size() == 0) return;
    for_each_bias(whole_, [&](int64_t i, int64_t at) {
      store_from_double(whole_.dattn_bias, whole_.dattn_bias_dtype, at, static_cast<double>(sum_[i]));
    });
  }
  size_t bytes() const { return own_.size() + of_parts_.size(); }

 private:
  static constexpr DType kDType = sizeof(T) == 8 ? DType::f64 : DType::f32;
  const BackwardProblem& whole_;
  T* sum_ = nullptr;
  std::array<int64_t, 4> stride_{};
  Buffer own_, of_parts_;
  std::vector<std::pair<DilatedBias, int64_t>> parts_;  // and where they begin in of_parts_
};

template <class T>
BackwardInfo run(const DilatedBackwardArgs& args, const BackwardProblem& whole, Executor& executor) {
  const Problem& f = whole.forward;
  const Dilation& dilation = args.dilation;

  // A group of rate 1 reaches every row: it goes first and writes, the others add. Without one, sums start at zero.
  std::vector<size_t> order;
  const auto rate_one = std::find(dilation.dilation_rates.begin(), dilation.dilation_rates.end(), 1);
  const size_t first = rate_one - dilation.dilation_rates.begin();
  const bool first_writes = rate_one != dilation.dilation_rates.end();
  if (first_writes) order.push_back(first);
  for (size_t g = 0; g < dilation.dilation_rates.size(); ++g) {
    if (!first_writes || g != first) order.push_back(g);
  }

  const DType sum_dtype = sizeof(T) == 8 ? DType::f64 : DType::f32;
  const bool alone = order.size() == 1 && first_writes;  // rounds to the gradients' dtype itself
  const bool direct = alone || whole.gradient_dtype == sum_dtype;
  const DType dtype = direct ? whole.gradient_dtype : sum_dtype;
  Gradients gradients;
  gradients[0] = {whole.dq, f.heads, f.head_dim};
  gradients[1] = {whole.dk, f.kv_heads, f.head_dim};
  gradients[2] = {whole.dv, f.kv_heads, f.head_dim_v};
  size_t bytes = 0;
  for (Gradient& g : gradients) {
    g.sum = g.result;
    if (direct || g.result.data == nullptr) continue;
    g.own = Buffer(static_cast<size_t>(g.heads * f.batch * f.seqlen_q * g.dim) * size_of(dtype),
                   "sums of dilated gradients");
    g.sum = {g.own.as<char>(), f.seqlen_q * g.dim, g.dim, f.batch * f.seqlen_q * g.dim};
    bytes += g.own.size();
  }
  const DilatedPlan plan(f, dilation, args.options, all_evenly_spaced(whole, gradients));

  const bool adds = whole.accumulate;  // the sums are the caller's then
  if (!first_writes && !adds) {
    for_each_row(gradients, f.batch, f.seqlen_q, executor,
                 [&](const Gradient& g, int64_t b, int64_t s, int64_t h, double*) {
                   std::fill_n(g.sum.at(b, s, h, size_of(dtype)), g.dim * size_of(dtype), 0);
                 });
  }
  BackwardInfo info;
  BackwardProblem sums = whole;
  sums.gradient_dtype = dtype;
  sums.dq = gradients[0].sum;
  sums.dk = gradients[1].sum;
  sums.dv = gradients[2].sum;
  BiasGradient<T> bias(whole);
  std::vector<BackwardProblem> problems;
  for (size_t i = 0; i < order.size(); ++i) {
    sums.accumulate = adds || i > 0 || !first_writes;
    problems.clear();
    for (auto [part, end] = plan.parts_of(order[i]); part < end; ++part) {
      problems.push_back(plan.problem(plan.parts()[part], sums));
    }
    bias.open(plan, order[i], problems);
    const BackwardInfo one = run_backward(problems, f.dtype, args.isa, executor);
    bias.add(executor);
    info.isa = one.isa;
    info.scratch_bytes = std::max(info.scratch_bytes, one.scratch_bytes);
  }
  if (!direct) {
    for_each_row(gradients, f.batch, f.seqlen_q, executor,
                 [&](const Gradient& g, int64_t b, int64_t s, int64_t h, double* row) {
                   load_row(g.sum.at(b, s, h, size_of(dtype)), dtype, g.dim, row);
                   store_row(row, g.dim, g.result.at(b, s, h, size_of(whole.gradient_dtype)), whole.gradient_dtype);
                 });
  }
  bias.store();
  info.scratch_bytes += bytes + bias.bytes();
  return info;
}

}  // namespace

BackwardProblem resolve_dilated(const DilatedBackwardArgs& args, Purpose purpose) {
  check_dilated(args.q, args.k, args.dilation, args.options);
  BackwardArgs all;
  all.q = args.q;
  all.k = args.k;
  all.v = args.v;
  all.out = args.out;
  all.lse = args.lse;
  all.dout = args.dout;
  all.dlse = args.dlse;
  all.dq = args.dq;
  all.dk = args.dk;
  all.dv = args.dv;
  all.dattn_bias = args.dattn_bias;
  all.accumulate = args.accumulate;
  all.options = args.options;
  return resolve_without_pattern(all, purpose);
}

BackwardInfo dilated_backward(const DilatedBackwardArgs& args, Executor& executor) {
  const BackwardProblem whole = resolve_dilated(args, Purpose::forward);
  return whole.forward.dtype == DType::f64 ? run<double>(args, whole, executor) : run<float>(args, whole, executor);
}

}  // namespace tessera
