// The CPU backend: cuts calls into work units, gives each thread its scratch, and runs them.
//
// A unit owns its output rows, so results do not depend on threads. Units are taken dynamically, heads in order (those
// that share K and V are neighbours), the longest rows of a head first.
#include "cpu/cpu.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <vector>

#include "core/buffer.h"
#include "core/work.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"

namespace tessera::cpu {

namespace {

static_assert(Scratch::kAlign <= Buffer::kAlign);

// Whether a problem takes the decode schedule: few queries, whose time is that of reading K and V. Its time goes with
// the queries, that of a panel of queries is the same for 1 and for 16 of them; and decode has to join its partial
// results. So where keys are few, or queries many for it, they go as a panel (64 sequences of 8 heads and 8 tokens:
// 1,455 -> 356 us; 16 queries on 64 to 512 keys: .75 of the time). By shape alone: results must not depend on threads.
bool takes_decode(const Problem& p) {
  if (p.seqlen_q > 16 || p.pattern.shape.rows() != 1) return false;
  const bool panel = p.seqlen_q > 8 ? p.seqlen_k <= 512 : p.seqlen_q > 5 && p.seqlen_k <= 16;
  return !panel;
}

// A decode unit reads about this many bytes of K and V (long streams, little to join), but fewer where the call would
// then have less than kDecodeUnits of them, and never less than kDecodeLeastKeys keys.
constexpr int64_t kDecodeBytes = 1 << 20;
constexpr int64_t kDecodeUnits = 64;
constexpr int64_t kDecodeLeastKeys = 128;

// Rows of one pattern head, longest first: a permutation of 0 .. rows - 1.
std::vector<int32_t> longest_first(const BlockPatternView& pattern, int64_t first_row) {
  const int64_t rows = pattern.shape.rows();
  std::vector<int32_t> order(static_cast<size_t>(rows));
  std::iota(order.begin(), order.end(), 0);
  const int64_t* indptr = pattern.indptr + first_row;
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return indptr[a + 1] - indptr[a] > indptr[b + 1] - indptr[b]; });
  return order;
}

// Panel units of one problem, numbered by batch, then so that neighbours read the same memory: where heads lie inside
// the sequence ([B, S, H, D]) by row and head, else by kv head, row and head of the group. Rows go longest first.
// (At 8 heads, S = 8192, D = 64 in [B, S, H, D] the head-by-head order ran at .77 of peak, this one at .81: a page of
// memory then serves all heads.)
class PanelUnits {
 public:
  explicit PanelUnits(const Problem& p)
      : p_(p), rows_(p.pattern.shape.rows()), together_(std::abs(p.k.seq) > std::abs(p.k.head) ? p.heads : p.group()) {
    const PatternShape& s = p.pattern.shape;
    for (int64_t i = 0; i < s.batches * s.heads; ++i) orders_.push_back(longest_first(p.pattern, i * rows_));
  }
  int64_t count() const { return p_.batch * p_.heads * rows_; }
  const Problem& problem() const { return p_; }

  RowUnit unit(int64_t unit) const {
    const int64_t member = unit % together_;
    const int64_t place = unit / together_ % rows_;
    const int64_t set = unit / (together_ * rows_);
    const int64_t h = set * together_ % p_.heads + member;
    const int64_t b = set * together_ / p_.heads;
    const PatternShape& s = p_.pattern.shape;
    const auto& order = orders_[(s.batches == 1 ? 0 : b) * s.heads + (s.heads == 1 ? 0 : h)];
    return {b, h, order[place]};
  }

 private:
  const Problem& p_;
  int64_t rows_;
  int64_t together_;  // heads
  std::vector<std::vector<int32_t>> orders_;
};

// Decode units of one problem and their partial results. Heads that share a pattern row go together, so that K and V
// rows which lie side by side are read side by side.
class DecodeUnits {
 public:
  explicit DecodeUnits(const Problem& p) : p_(p) {
    const PatternShape& s = p.pattern.shape;
    // With [B, S, H, D] in memory all heads of a key are neighbours; otherwise each kv head streams by itself.
    const bool interleaved = p.kv_heads > 1 && p.k.head == p.head_dim && p.v.head == p.head_dim_v;
    const int64_t together = s.heads > 1 ? 1 : interleaved ? p.heads : p.group();
    const int64_t split = std::max<int64_t>(1, unit_keys(together) / s.block_k);
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t h = 0; h < p.heads; h += together) {
        const int64_t row = p.pattern.row_id(b, h, 0);
        const int64_t begin = units();
        const int64_t end = p.pattern.indptr[row + 1];
        for (int64_t e = p.pattern.indptr[row]; e < end; e += split) {
          units_.push_back({b, h, h + together, e, std::min(e + split, end)});
          range_of_.push_back(static_cast<int64_t>(ranges_.size()));
        }
        ranges_.push_back({b, h, begin, units()});
      }
    }
    waiting_ = std::make_unique<std::atomic<int64_t>[]>(ranges_.size());
    for (size_t i = 0; i < ranges_.size(); ++i) waiting_[i] = ranges_[i].unit_end - ranges_[i].unit_begin;
    rows_ = together * p.seqlen_q;
    const size_t rows = static_cast<size_t>(units() * rows_);
    partials_ = Buffer(rows * static_cast<size_t>(p.head_dim_v) * sizeof(float), "partial results of decode");
    states_ = Buffer(rows * sizeof(RowState), "partial results of decode");
  }
  int64_t units() const { return static_cast<int64_t>(units_.size()); }
  size_t bytes() const { return partials_.size() + states_.size(); }

  // Whoever finishes the last unit of some heads joins them: the order in which partials join is that of the keys.
  void run(int64_t unit, bool follows, const DecodeKernels& kernels, std::byte* scratch) const {
    kernels.run(p_, units_[unit], follows && unit + 1 < units() ? &units_[unit + 1] : nullptr, partial(unit), scratch);
    const int64_t range = range_of_[unit];
    if (waiting_[range].fetch_sub(1, std::memory_order_acq_rel) == 1) join(ranges_[range]);
  }
  // Heads that have no unit, as nothing is kept.
  void finish_empty() const {
    for (const HeadRange& range : ranges_) {
      if (range.unit_begin == range.unit_end) join(range);
    }
  }

 private:
  struct HeadRange {
    int64_t b, head_begin, unit_begin, unit_end;
  };

  int64_t unit_keys(int64_t together) const {
    const int64_t kv_heads = std::max<int64_t>(1, together / p_.group());
    const int64_t sets = std::max<int64_t>(1, p_.kv_heads / kv_heads) * p_.batch;
    const int64_t key_bytes =
        std::max<int64_t>(1, kv_heads * (p_.head_dim + p_.head_dim_v) * static_cast<int64_t>(size_of(p_.dtype)));
    return std::max(kDecodeLeastKeys, std::min(kDecodeBytes / key_bytes, p_.seqlen_k * sets / kDecodeUnits));
  }
  DecodePartial partial(int64_t unit) const {
    return {partials_.as<float>() + unit * rows_ * p_.head_dim_v, states_.as<RowState>() + unit * rows_};
  }

  // Joins the partials of each row in the order of keys and writes out and lse.
  void join(const HeadRange& range) const {
    std::vector<double> out(static_cast<size_t>(p_.head_dim_v));
    for (int64_t r = 0; r < rows_; ++r) join_row(range, r, out);
  }
  void join_row(const HeadRange& range, int64_t r, std::vector<double>& out) const {
    const int64_t h = range.head_begin + r / p_.seqlen_q, q = r % p_.seqlen_q, dims = p_.head_dim_v;
    SoftmaxState<double, PowersOf2> joined;
    for (int64_t u = range.unit_begin; u < range.unit_end; ++u) joined.cover(partial(u).state[r].reference);
    std::fill(out.begin(), out.end(), 0.0);
    for (int64_t u = range.unit_begin; u < range.unit_end; ++u) {
      const DecodePartial part = partial(u);
      if (part.state[r].empty()) continue;
      const double weight = joined.merge(part.state[r].as<double>());
      for (int64_t c = 0; c < dims; ++c) out[c] += weight * part.out[r * dims + c];
    }
    const auto end = joined.as<float>().finish(p_.sinks.at(0, h));
    const double factor = end.factor / (1.0 - p_.dropout.p);
    char* row = p_.out.at(range.b, q, h, size_of(p_.dtype));
    for (int64_t c = 0; c < dims; ++c) store_from_double(row, p_.dtype, c, factor == 0 ? 0.0 : out[c] * factor);
    p_.store_lse(range.b, h, q, end.lse);
  }

  const Problem& p_;
  std::vector<DecodeUnit> units_;
  std::vector<int64_t> range_of_;  // of a unit
  std::vector<HeadRange> ranges_;
  std::unique_ptr<std::atomic<int64_t>[]> waiting_;  // units of a range that are not done
  int64_t rows_ = 0;                                 // of a unit
  Buffer partials_, states_;                         // of all units
};

// Runs `run(unit, follows, scratch)` for all units on the executor's threads, each with `scratch_bytes` of its own.
// `follows` says that unit + 1 runs next on this thread.
template <class Run>
size_t run_units(int64_t units, size_t scratch_bytes, Executor& executor, const Run& run) {
  if (units == 0) return 0;
  const int threads = threads_for(executor, units);
  std::vector<Buffer> scratch;
  for (int i = 0; i < threads; ++i) scratch.emplace_back(scratch_bytes, "scratch");
  parallel_for(
      executor, units, [&](int thread) { return scratch[thread].as<std::byte>(); },
      [&](std::byte* own, int64_t unit, bool follows) { run(unit, follows, own); });
  return scratch_bytes * threads;
}

}  // namespace

ForwardInfo forward(std::span<const Problem> problems, Isa isa, Executor& executor) {
  ForwardInfo info;
  const Isa computing = resolve_isa(isa, Bound::compute), streaming = resolve_isa(isa, Bound::memory);
  const ForwardKernels& panel_kernels = *kernels_of(computing).forward;
  const DecodeKernels& decode_kernels = *kernels_of(streaming).decode;

  std::vector<PanelUnits> panels;
  std::vector<DecodeUnits> decodes;
  UnitRanges panel_units, decode_units;
  size_t panel_scratch = 0, decode_scratch = 0;
  for (const Problem& p : problems) {
    if (p.batch == 0 || p.heads == 0 || p.seqlen_q == 0) continue;
    if (takes_decode(p)) {
      decodes.emplace_back(p);
      decode_units.add(decodes.back().units());
      decode_scratch = std::max(decode_scratch, decode_kernels.scratch(p));
    } else {
      panels.emplace_back(p);
      panel_units.add(panels.back().count());
      panel_scratch = std::max(panel_scratch, panel_kernels.scratch(p));
    }
  }
  const auto run_panel = [&](int64_t number, bool follows, std::byte* scratch) {
    const auto [i, unit] = panel_units.find(number);
    const RowUnit now = panels[i].unit(unit);
    follows = follows && unit + 1 < panels[i].count();
    const RowUnit next = follows ? panels[i].unit(unit + 1) : RowUnit{};
    panel_kernels.row(panels[i].problem(), now, follows ? &next : nullptr, scratch);
  };
  const auto run_decode = [&](int64_t number, bool follows, std::byte* scratch) {
    const auto [i, unit] = decode_units.find(number);
    decodes[i].run(unit, follows, decode_kernels, scratch);
  };
  info.isa = panels.empty() && !decodes.empty() ? streaming : computing;
  info.scratch_bytes = run_units(panel_units.units(), panel_scratch, executor, run_panel);
  size_t decode_bytes = run_units(decode_units.units(), decode_scratch, executor, run_decode);
  for (const DecodeUnits& d : decodes) {
    d.finish_empty();
    decode_bytes += d.bytes();
  }
  info.scratch_bytes = std::max(info.scratch_bytes, decode_bytes);
  return info;
}

}  // namespace tessera::cpu
