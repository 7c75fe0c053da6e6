// The CPU backend's backward: plans the units of a call and runs them.
//
// A unit is a block column of a kv head, or a part of a long one. It owns nothing alone: dq rows are summed over
// columns, dk and dv over parts, each in an order that the pattern fixes (Turn). Threads take heads, and columns of a
// head in ascending order; who finds no head left helps with one that has columns left. So threads rarely wait for
// turns, one head alone keeps all of them busy, and results do not depend on them.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <deque>
#include <memory>
#include <vector>

#include "core/buffer.h"
#include "core/work.h"
#include "cpu/cpu.h"
#include "cpu/isa.h"

namespace tessera::cpu {

namespace {

// Blocks of a unit: its own costs (transposing K and V, storing dk and dv) are a few percent of one block.
constexpr int64_t kBlocksPerUnit = 32;

// One problem: what its units share, and their plan.
class Plan {
 public:
  explicit Plan(const BackwardProblem& g) : g_(g), p_(g.forward) {
    const PatternShape& s = p_.pattern.shape;
    const int64_t heads = p_.batch * p_.heads, queries = heads * p_.seqlen_q;
    state_.problem = &g;
    state_.lse2 = take(queries);
    state_.delta = take(queries);
    rows_.reset(new RowOfBlocks[static_cast<size_t>(heads * s.rows())]);
    state_.rows = rows_.get();
    bytes_ += static_cast<size_t>(heads * s.rows()) * sizeof(RowOfBlocks);
    sinks_.resize(g.dsinks ? heads * s.rows() : 0);
    if (g.dq.data != nullptr && g.gradient_dtype != DType::f32) state_.dq_sums = take(queries * p_.head_dim);
    if (g.dblock_bias != nullptr) {
      const int64_t pattern_heads = s.heads * s.batches;
      for (int64_t n = 0; n < pattern_heads; ++n) {
        const int64_t* indptr = p_.pattern.indptr + n * s.rows();
        state_.bias_entries = std::max(state_.bias_entries, indptr[s.rows()] - indptr[0]);
      }
      state_.bias_sums = take(heads * state_.bias_entries);
      std::fill_n(state_.bias_sums, heads * state_.bias_entries, 0.0f);
    }
    for (int64_t b = 0; b < p_.batch; ++b) {
      const MaskGeometry mask = p_.mask(b);
      for (int64_t h = 0; h < p_.heads; ++h) plan_rows(mask, b, h);
      for (int64_t h = 0; h < p_.kv_heads && g.wants_columns(); ++h) plan_columns(mask, b, h);
    }
    bytes_ += units_.size() * sizeof(ColumnUnit) + turns_.size() * sizeof(Turn);
  }

  const BackwardState& state() const { return state_; }
  size_t bytes() const { return bytes_; }

  int64_t prepare_units() const { return p_.batch * p_.heads * p_.pattern.shape.rows(); }
  void prepare(int64_t unit, const BackwardKernels& kernels) {
    const int64_t rows = p_.pattern.shape.rows(), i = unit % rows, head = unit / rows;
    const double sink = kernels.prepare_row(state_, head / p_.heads, head % p_.heads, i);
    if (g_.dsinks != nullptr) sinks_[unit] = sink;
  }

  // Columns of one kv head, taken in order.
  struct Head {
    int64_t begin = 0, end = 0;  // units
    int64_t blocks = 0;
  };
  const std::vector<Head>& heads() const { return heads_; }
  const ColumnUnit& unit(int64_t i) const { return units_[i]; }

  int64_t bias_units() const {
    if (g_.dattn_bias == nullptr) return 0;
    const int64_t* size = g_.dattn_bias_size;
    return size[0] * size[1] * bias_rows() * bias_cols();
  }
  BiasUnit bias_unit(int64_t unit) const {
    const int64_t cols = bias_cols(), rows = bias_rows(), heads = g_.dattn_bias_size[1];
    return {unit / (cols * rows * heads), unit / (cols * rows) % heads, unit / cols % rows, unit % cols};
  }

  // Sums that meet over heads and batches, in their order.
  void add_small_gradients() const {
    const PatternShape& s = p_.pattern.shape;
    if (g_.dblock_bias != nullptr) {
      for (int64_t b = 0; b < p_.batch; ++b) {
        for (int64_t h = 0; h < p_.heads; ++h) {
          const int64_t first = p_.pattern.indptr[p_.pattern.row_id(b, h, 0)];
          const int64_t end = p_.pattern.indptr[p_.pattern.row_id(b, h, 0) + s.rows()];
          const float* sums = state_.bias_sums + (b * p_.heads + h) * state_.bias_entries;
          float* to = g_.dblock_bias + b * g_.dbias_batch + h * g_.dbias_head;
          for (int64_t e = first; e < end; ++e) to[e * g_.dbias_entry] += sums[e - first];
        }
      }
    }
    if (g_.dsinks != nullptr) {
      for (int64_t h = 0; h < p_.heads; ++h) {
        double sum = g_.dsinks[h * g_.dsinks_head];
        for (int64_t b = 0; b < p_.batch; ++b) {
          for (int64_t i = 0; i < s.rows(); ++i) sum += sinks_[(b * p_.heads + h) * s.rows() + i];
        }
        g_.dsinks[h * g_.dsinks_head] = static_cast<float>(sum);
      }
    }
  }
  void clear_small_gradients() const {
    if (g_.dblock_bias != nullptr) {
      const int64_t entries = p_.pattern.indptr[p_.pattern.shape.total_rows()];
      for (int64_t b = 0; b < (g_.dbias_batch ? p_.batch : 1); ++b) {
        for (int64_t h = 0; h < (g_.dbias_head ? p_.heads : 1); ++h) {
          float* to = g_.dblock_bias + b * g_.dbias_batch + h * g_.dbias_head;
          for (int64_t e = 0; e < entries; ++e) to[e * g_.dbias_entry] = 0;
        }
      }
    }
    if (g_.dsinks != nullptr) {
      for (int64_t h = 0; h < p_.heads; ++h) g_.dsinks[h * g_.dsinks_head] = 0;
    }
  }

 private:
  float* take(int64_t n) {
    const size_t bytes = static_cast<size_t>(n) * sizeof(float);
    memory_.emplace_back(bytes, "backward workspace");
    bytes_ += bytes;
    return memory_.back().as<float>();
  }

  int64_t bias_rows() const { return g_.dattn_bias_size[2] == p_.seqlen_q ? p_.pattern.shape.rows() : 1; }
  int64_t bias_cols() const { return g_.dattn_bias_size[3] == p_.seqlen_k ? p_.pattern.shape.cols() : 1; }

  void plan_rows(const MaskGeometry& mask, int64_t b, int64_t h) {
    for (int64_t i = 0; i < p_.pattern.shape.rows(); ++i) {
      const int64_t id = p_.pattern.row_id(b, h, i);
      RowOfBlocks& row = rows_[state_.row_index(b, h, i)];
      row.first = p_.pattern.indptr[id];
      row.end = p_.pattern.indptr[id + 1];
      while (row.first < row.end && !state_.live(mask, i, p_.pattern.indices[row.first])) ++row.first;
      while (row.first < row.end && !state_.live(mask, i, p_.pattern.indices[row.end - 1])) --row.end;
      row.turn.set(row.first);
    }
  }

  void plan_columns(const MaskGeometry& mask, int64_t b, int64_t kv_head) {
    const PatternShape& s = p_.pattern.shape;
    Head head;
    head.begin = static_cast<int64_t>(units_.size());
    for (int64_t j = 0; j < s.cols(); ++j) {
      int64_t blocks = 0;
      for (int64_t h = kv_head * p_.group(); h < (kv_head + 1) * p_.group(); ++h) {
        const int64_t id = p_.pattern.col_id(b, h, j);
        for (int64_t t = g_.transposed.indptr[id]; t < g_.transposed.indptr[id + 1]; ++t) {
          blocks += state_.live(mask, g_.transposed.rows[t], j) ? 1 : 0;
        }
      }
      const int parts = static_cast<int>(std::max<int64_t>(1, (blocks + kBlocksPerUnit - 1) / kBlocksPerUnit));
      ColumnUnit unit{b, kv_head, j, 0, 0, 0, parts, nullptr, nullptr};
      if (parts > 1) {
        unit.turn = &turns_.emplace_back();
        const bool dkv = g_.dk.data != nullptr || g_.dv.data != nullptr;
        if (g_.gradient_dtype != DType::f32 && dkv) unit.sums = take(s.block_k * (p_.head_dim + p_.head_dim_v));
      }
      for (unit.part = 0; unit.part < parts; ++unit.part) {
        unit.begin = blocks * unit.part / parts;
        unit.end = blocks * (unit.part + 1) / parts;
        units_.push_back(unit);
      }
      head.blocks += blocks;
    }
    head.end = static_cast<int64_t>(units_.size());
    heads_.push_back(head);
  }

  const BackwardProblem& g_;
  const Problem& p_;
  BackwardState state_;
  std::unique_ptr<RowOfBlocks[]> rows_;
  std::vector<Buffer> memory_;
  std::vector<ColumnUnit> units_;
  std::deque<Turn> turns_;  // does not move what it holds
  std::vector<Head> heads_;
  std::vector<double> sinks_;  // [B, H, rows]
  size_t bytes_ = 0;
};

// The heads of all problems, the longest first. A thread takes heads of its own while there are any, then helps.
class Heads {
 public:
  explicit Heads(const std::vector<std::unique_ptr<Plan>>& plans) {
    for (const auto& plan : plans) {
      for (const Plan::Head& head : plan->heads()) {
        if (head.begin < head.end) heads_.push_back({plan.get(), head.blocks, Units(head.end, head.begin)});
      }
    }
    next_head_ = Units(static_cast<int64_t>(heads_.size()));
    std::stable_sort(heads_.begin(), heads_.end(), [](const Work& a, const Work& b) { return a.blocks > b.blocks; });
  }
  int64_t units() const {
    int64_t n = 0;
    for (const Work& work : heads_) n += work.units.left();
    return n;
  }

  template <class Run>
  void run(const Run& run_unit) {
    next_head_.drain([&](int64_t i) { drain(heads_[i], run_unit); });
    for (;;) {
      Work* longest = nullptr;
      int64_t left = 0;
      for (Work& work : heads_) {
        const int64_t n = work.units.left();
        if (n > left) {
          longest = &work;
          left = n;
        }
      }
      if (longest == nullptr) return;
      drain(*longest, run_unit);
    }
  }

 private:
  struct Work {
    const Plan* plan;
    int64_t blocks;
    Units units;
  };

  template <class Run>
  static void drain(Work& work, const Run& run_unit) {
    work.units.drain([&](int64_t unit) { run_unit(work.plan->state(), work.plan->unit(unit)); });
  }

  std::vector<Work> heads_;
  Units next_head_{0};
};

}  // namespace

BackwardInfo backward(std::span<const BackwardProblem> problems, Isa isa, Executor& executor) {
  BackwardInfo info;
  info.isa = resolve_isa(isa, Bound::compute);
  const BackwardKernels& kernels = *kernels_of(info.isa).backward;

  std::vector<std::unique_ptr<Plan>> plans;
  UnitRanges prepare_units, bias_units;
  size_t scratch_bytes = 0;
  for (const BackwardProblem& problem : problems) {
    plans.push_back(std::make_unique<Plan>(problem));
    prepare_units.add(plans.back()->prepare_units());
    bias_units.add(plans.back()->bias_units());
    scratch_bytes = std::max(scratch_bytes, kernels.scratch(problem));
    info.scratch_bytes += plans.back()->bytes();
  }
  parallel_for(executor, prepare_units.units(), [&](int64_t number) {
    const auto [i, unit] = prepare_units.find(number);
    plans[i]->prepare(unit, kernels);
  });

  Heads heads(plans);
  const int64_t units = std::max(heads.units(), bias_units.units());
  const int threads = threads_for(executor, units);
  std::vector<Buffer> scratch;
  for (int i = 0; i < threads; ++i) scratch.emplace_back(scratch_bytes, "scratch");
  info.scratch_bytes += scratch_bytes * threads;
  if (heads.units() > 0) {
    executor.run(threads, [&](int thread) {
      heads.run([&](const BackwardState& state, const ColumnUnit& unit) {
        kernels.column(state, unit, scratch[thread].as<std::byte>());
      });
    });
  }
  parallel_for(
      executor, bias_units.units(), [&](int thread) { return scratch[thread].as<std::byte>(); },
      [&](std::byte* own, int64_t number) {
        const auto [i, unit] = bias_units.find(number);
        kernels.attn_bias_gradient(plans[i]->state(), plans[i]->bias_unit(unit), own);
      });
  for (const auto& plan : plans) plan->clear_small_gradients();
  for (const auto& plan : plans) plan->add_small_gradients();
  return info;
}

}  // namespace tessera::cpu
