// Dilated attention, gradients: one backward call for each (w, r), with the joined out and lse, into one sum.
#include <algorithm>
#include <array>
#include <vector>

#include "attention/device.h"
#include "attention/dilated_plan.h"
#include "attention/large_buffer.h"
#include "attention/parallel.h"
#include "attention/scores.h"

namespace tessera {

namespace {

// One of dq, dk, dv: where the caller wants it, and where the groups add up.
struct Gradient {
  Strided result;  // data nullptr: not wanted
  int64_t heads = 0, dim = 0;
  LargeBuffer own;  // [heads, B, S, dim]; empty: the sum is made in the result
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
        executor, batch * chunks, [&] { return std::vector<double>(static_cast<size_t>(g.dim)); },
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
  if (whole.dlse) all = all && evenly_spaced(whole.dlse_batch, whole.dlse_seq, n);
  for (const Gradient& g : gradients) {
    if (g.result.data) all = all && evenly_spaced(g.sum.batch, g.sum.seq, n);
  }
  return all;
}

}  // namespace

BackwardProblem resolve_dilated(const DilatedBackwardArgs& args, const BlockPattern& pattern, Purpose purpose) {
  BackwardArgs all;
  all.q = args.q;
  all.k = args.k;
  all.v = args.v;
  all.pattern = pattern;
  all.out = args.out;
  all.lse = args.lse;
  all.dout = args.dout;
  all.dlse = args.dlse;
  all.dq = args.dq;
  all.dk = args.dk;
  all.dv = args.dv;
  all.accumulate = args.accumulate;
  all.options = args.options;
  return resolve_backward(all, purpose);
}

BackwardInfo dilated_backward(const DilatedBackwardArgs& args, Executor& executor) {
  const BlockPattern pattern = check_dilated(args.q, args.k, args.dilation, args.options);
  const BackwardProblem whole = resolve_dilated(args, pattern, Purpose::forward);
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

  const DType sum_dtype = f.dtype == DType::f64 ? DType::f64 : DType::f32;
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
    g.own = LargeBuffer(static_cast<size_t>(g.heads * f.batch * f.seqlen_q * g.dim) * size_of(dtype),
                        "sums of dilated gradients");
    g.sum = {g.own.data(), f.seqlen_q * g.dim, g.dim, f.batch * f.seqlen_q * g.dim};
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
  std::vector<BackwardProblem> problems;
  for (size_t i = 0; i < order.size(); ++i) {
    sums.accumulate = adds || i > 0 || !first_writes;
    problems.clear();
    for (auto [part, end] = plan.parts_of(order[i]); part < end; ++part) {
      problems.push_back(plan.problem(plan.parts()[part], sums));
    }
    const BackwardInfo one = run_backward(problems, f.dtype, args.isa, executor);
    info.isa = one.isa;
    info.scratch_bytes = std::max(info.scratch_bytes, one.scratch_bytes);
  }
  if (!direct) {
    for_each_row(gradients, f.batch, f.seqlen_q, executor,
                 [&](const Gradient& g, int64_t b, int64_t s, int64_t h, double* row) {
                   load_row(g.sum.at(b, s, h, size_of(dtype)), dtype, g.dim, row);
                   char* to = g.result.at(b, s, h, size_of(whole.gradient_dtype));
                   for (int64_t c = 0; c < g.dim; ++c) store_from_double(to, whole.gradient_dtype, c, row[c]);
                 });
  }
  info.scratch_bytes += bytes;
  return info;
}

}  // namespace tessera
