// Dilated attention, forward: partial results of all (w, r) in one call, then their join.
#include <algorithm>
#include <limits>

#include "attention/device.h"
#include "attention/row_join.h"
#include "call/checks.h"
#include "call/dilated_plan.h"
#include "core/buffer.h"
#include "core/work.h"

namespace tessera {

namespace {

constexpr int64_t kTokensPerUnit = 64;  // of the join: some microseconds of work

// Partial result of one group. With several groups, lse is a compact buffer ([H, B, segments, rows]); out likewise, or
// the caller's out, of a group that covers all of it.
struct Partial {
  Buffer out, lse;
  bool in_place = false;  // out is the caller's
};

// The join over the groups that cover a row, in their order. T is double for fp64, else float.
template <class T>
void join(const Problem& whole, const DilatedPlan& plan, const std::vector<Partial>& partials, Executor& executor) {
  struct Worker {
    RowJoin<T> row;
    std::vector<DilatedGroup::Place> places;  // of a token in each group
  };
  const int64_t chunks = (whole.seqlen_q + kTokensPerUnit - 1) / kTokensPerUnit;
  const int64_t row_bytes = whole.head_dim_v * static_cast<int64_t>(size_of(whole.dtype));
  const auto join_row = [&](Worker& worker, int64_t b, int64_t s, int64_t h) {
    char* to = whole.out.at(b, s, h, size_of(whole.dtype));
    for (size_t g = 0; g < partials.size(); ++g) {
      const DilatedGroup& group = plan.groups()[g];
      if (worker.places[g].offset != h % group.rate) continue;  // not covered
      const int64_t at = (h * whole.batch + b) * group.segments * group.rows + worker.places[g].index;
      const char* out = partials[g].in_place ? to : partials[g].out.as<char>() + at * row_bytes;
      worker.row.add(out, whole.dtype, partials[g].lse.as<const T>()[at]);
    }
    whole.store_lse(b, h, s, worker.row.finish(to, whole.dtype));
  };
  parallel_for(
      executor, whole.batch * chunks, [&](int) { return Worker{RowJoin<T>(whole.head_dim_v), {}}; },
      [&](Worker& worker, int64_t unit) {
        const int64_t b = unit / chunks, begin = unit % chunks * kTokensPerUnit;
        for (int64_t s = begin; s < std::min(whole.seqlen_q, begin + kTokensPerUnit); ++s) {
          worker.places.clear();
          for (const DilatedGroup& group : plan.groups()) worker.places.push_back(group.place(s));
          for (int64_t h = 0; h < whole.heads; ++h) join_row(worker, b, s, h);
        }
      });
}

// A single group wrote its rows of out and lse itself: the others are 0 and -inf.
void clear_uncovered(const Problem& whole, const DilatedGroup& group, Executor& executor) {
  const size_t bytes = whole.head_dim_v * size_of(whole.dtype);
  parallel_for(executor, whole.batch * whole.heads, [&](int64_t unit) {
    const int64_t b = unit / whole.heads, h = unit % whole.heads;
    for (int64_t s = 0; s < whole.seqlen_q; ++s) {
      if (group.place(s).offset == h % group.rate) continue;
      std::fill_n(whole.out.at(b, s, h, size_of(whole.dtype)), bytes, 0);  // zero bits are 0 in every dtype
      whole.store_lse(b, h, s, -std::numeric_limits<double>::infinity());
    }
  });
}

}  // namespace

Problem resolve_dilated(const DilatedForwardArgs& args, Purpose purpose) {
  check_dilated(args.q, args.k, args.dilation, args.options);
  ForwardArgs all;
  all.q = args.q;
  all.k = args.k;
  all.v = args.v;
  all.out = args.out;
  all.lse = args.lse;
  all.options = args.options;
  return resolve_without_pattern(all, purpose);
}

ForwardInfo dilated_forward(const DilatedForwardArgs& args, Executor& executor) {
  const Problem whole = resolve_dilated(args, Purpose::forward);
  const DilatedPlan plan(whole, args.dilation, args.options, evenly_spaced(whole));
  const std::vector<DilatedGroup>& groups = plan.groups();
  const size_t size = size_of(whole.dtype);
  const DType lse_dtype = whole.dtype == DType::f64 ? DType::f64 : DType::f32;  // of partials

  std::vector<Partial> partials(groups.size());
  size_t bytes = 0;
  if (groups.size() > 1) {
    const auto whole_rows = [](const DilatedGroup& g) { return g.rate == 1; };
    const auto in_place = std::find_if(groups.begin(), groups.end(), whole_rows) - groups.begin();
    for (size_t g = 0; g < groups.size(); ++g) {
      Partial& partial = partials[g];
      partial.in_place = static_cast<ptrdiff_t>(g) == in_place;
      partial.lse = Buffer(plan.elements(groups[g], 1) * size_of(lse_dtype), "dilated lse");
      const int64_t elements = partial.in_place ? 0 : plan.elements(groups[g], whole.head_dim_v);
      partial.out = Buffer(static_cast<size_t>(elements) * size, "dilated out");
      bytes += partial.lse.size() + partial.out.size();
    }
  }
  std::vector<Problem> problems;
  for (const DilatedPart& part : plan.parts()) {
    Problem& p = problems.emplace_back(plan.problem(part));
    if (groups.size() == 1) continue;
    Partial& partial = partials[part.group];
    if (!partial.in_place) p.out = plan.compact(part, partial.out.as<char>(), whole.head_dim_v, size);
    set_lse(p, plan.compact(part, partial.lse.as<char>(), 1, size_of(lse_dtype)), lse_dtype);
  }
  ForwardInfo info = run_forward(problems, whole.dtype, args.isa, executor);
  if (groups.size() == 1) {
    if (groups[0].rate > 1) clear_uncovered(whole, groups[0], executor);
  } else if (whole.dtype == DType::f64) {
    join<double>(whole, plan, partials, executor);
  } else {
    join<float>(whole, plan, partials, executor);
  }
  info.scratch_bytes += bytes;
  return info;
}

int64_t dilated_pairs(int64_t seqlen, const Dilation& dilation, const AttentionOptions& options, int64_t batch,
                      int64_t heads) {
  const Problem whole = sequence_without_tensors(seqlen, dilation, options, batch, heads);
  const DilatedPlan plan(whole, dilation, options, true);
  int64_t pairs = 0;
  for (const DilatedPart& part : plan.parts()) {
    const Problem p = plan.problem(part);
    AttentionOptions inside;
    inside.causal = p.causal;
    if (p.window_left < MaskGeometry::kUnlimited) inside.window_left = p.window_left;
    if (p.window_right < MaskGeometry::kUnlimited) inside.window_right = p.window_right;
    if (p.key_lengths) inside.key_lengths = {p.key_lengths, static_cast<size_t>(p.batch)};
    pairs += admitted_pairs(part.pattern, inside, p.batch, p.heads);
  }
  return pairs;
}

}  // namespace tessera
