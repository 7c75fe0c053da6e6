// Dilated attention, forward: partial results of all (w, r) in one call, then their join.
#include <algorithm>
#include <cmath>
#include <limits>

#include "attention/device.h"
#include "call/checks.h"
#include "call/dilated_plan.h"
#include "call/scores.h"
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

// out = sum of exp(lse_g - lse) out_g over the groups g that cover a row, in their order; 0 where none does.
// T is double for fp64, else float.
template <class T>
class Join {
 public:
  Join(const Problem& whole, const DilatedPlan& plan, const std::vector<Partial>& partials)
      : whole_(whole), plan_(plan), partials_(partials) {}

  void run(Executor& executor) const {
    const int64_t chunks = (whole_.seqlen_q + kTokensPerUnit - 1) / kTokensPerUnit;
    const size_t groups = plan_.groups().size();
    parallel_for(
        executor, whole_.batch * chunks, [&](int) { return Scratch(2 * whole_.head_dim_v, groups); },
        [&](Scratch& scratch, int64_t unit) {
          const int64_t b = unit / chunks, begin = unit % chunks * kTokensPerUnit;
          for (int64_t s = begin; s < std::min(whole_.seqlen_q, begin + kTokensPerUnit); ++s) {
            for (size_t g = 0; g < groups; ++g) scratch.places[g] = plan_.groups()[g].place(s);
            for (int64_t h = 0; h < whole_.heads; ++h) join_row(b, s, h, scratch);
          }
        });
  }

 private:
  struct Term {
    const char* out;
    T lse;
  };
  struct Scratch {
    Scratch(int64_t elements, size_t groups) : rows(elements), places(groups), terms(groups) {}
    std::vector<T> rows;                      // [2, Dv]
    std::vector<DilatedGroup::Place> places;  // of the token in each group
    std::vector<Term> terms;
  };

  void join_row(int64_t b, int64_t s, int64_t h, Scratch& scratch) const {
    const size_t size = size_of(whole_.dtype);
    const int64_t dim = whole_.head_dim_v;
    char* to = whole_.out.at(b, s, h, size);
    size_t n = 0;
    T max = -std::numeric_limits<T>::infinity();
    for (size_t g = 0; g < plan_.groups().size(); ++g) {
      const DilatedGroup& group = plan_.groups()[g];
      if (scratch.places[g].offset != h % group.rate) continue;  // not covered
      const int64_t row = (h * whole_.batch + b) * group.segments * group.rows + scratch.places[g].index;
      const T lse = partials_[g].lse.as<const T>()[row];
      if (lse == -std::numeric_limits<T>::infinity()) continue;  // saw no key: its out is not read
      if (lse > max || std::isnan(lse)) max = lse;               // NaN stays NaN
      const char* out =
          partials_[g].in_place ? to : partials_[g].out.as<char>() + row * dim * static_cast<int64_t>(size);
      scratch.terms[n++] = {out, lse};
    }
    T* sum = scratch.rows.data();
    T* row = sum + dim;
    if (n == 0) std::fill(sum, sum + dim, T{0});
    T lse = max;
    if (n == 1) {
      load_row(scratch.terms[0].out, whole_.dtype, dim, sum);
    } else if (n > 1) {
      T weights = 0;
      for (size_t i = 0; i < n; ++i) weights += std::exp(scratch.terms[i].lse - max);
      lse = max + std::log(weights);
      for (size_t i = 0; i < n; ++i) {
        const T weight = std::exp(scratch.terms[i].lse - max) / weights;
        load_row(scratch.terms[i].out, whole_.dtype, dim, i == 0 ? sum : row);
        if (i == 0) {
          for (int64_t c = 0; c < dim; ++c) sum[c] *= weight;
        } else {
          for (int64_t c = 0; c < dim; ++c) sum[c] += weight * row[c];
        }
      }
    }
    if (n != 1 || scratch.terms[0].out != to) store(to, sum);
    if (whole_.lse) {
      const int64_t place = b * whole_.lse_batch + h * whole_.lse_head + s * whole_.lse_seq;
      store_from_double(whole_.lse, whole_.lse_dtype, place, lse);
    }
  }

  void store(char* to, const T* row) const {
    const int64_t dim = whole_.head_dim_v;
    if (whole_.dtype == (sizeof(T) == 8 ? DType::f64 : DType::f32)) {
      std::copy(row, row + dim, reinterpret_cast<T*>(to));
    } else {
      for (int64_t c = 0; c < dim; ++c) store_from_double(to, whole_.dtype, c, row[c]);
    }
  }

  const Problem& whole_;
  const DilatedPlan& plan_;
  const std::vector<Partial>& partials_;
};

// A single group wrote its rows of out and lse itself: the others are 0 and -inf.
void clear_uncovered(const Problem& whole, const DilatedGroup& group, Executor& executor) {
  const size_t bytes = whole.head_dim_v * size_of(whole.dtype);
  parallel_for(executor, whole.batch * whole.heads, [&](int64_t unit) {
    const int64_t b = unit / whole.heads, h = unit % whole.heads;
    for (int64_t s = 0; s < whole.seqlen_q; ++s) {
      if (group.place(s).offset == h % group.rate) continue;
      std::fill_n(whole.out.at(b, s, h, size_of(whole.dtype)), bytes, 0);  // zero bits are 0 in every dtype
      if (whole.lse == nullptr) continue;
      const int64_t place = b * whole.lse_batch + h * whole.lse_head + s * whole.lse_seq;
      store_from_double(whole.lse, whole.lse_dtype, place, -std::numeric_limits<double>::infinity());
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
    Join<double>(whole, plan, partials).run(executor);
  } else {
    Join<float>(whole, plan, partials).run(executor);
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
