// One block pair of the backward pass: both sides staged, and from them the weights P and the gradients of the scores.
//
// Here vectors run along keys, and a column of blocks stays put while rows of blocks stream past it: K and V are
// transposed once a column, Q and dout are read one element at a time as they lie in memory. With the tiles of
// tile-inl.h:
//
//   scores [queries][W]  =  Q (broadcast)     x  K^T [D][W]
//   dP     [queries][W]  =  dout (broadcast)  x  V^T [Dv][W]
//
// in cells of kQueryChunk queries x a panel of W keys, which turn into P and dscores while they lie in L1.
#if defined(TESSERA_CPU_PAIR_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TESSERA_CPU_PAIR_INL_H_
#undef TESSERA_CPU_PAIR_INL_H_
#else
#define TESSERA_CPU_PAIR_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/backward_state.h"
#include "cpu/chunk-inl.h"
#include "cpu/modify-inl.h"
#include "cpu/pair_weights-inl.h"
#include "cpu/panel-inl.h"
#include "cpu/scratch.h"
#include "cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tessera::cpu::TESSERA_KERNELS {

inline constexpr int kQueryChunk = 64;  // even: bf16 takes queries in pairs

// Queries [begin, end) of a block against keys [key_begin, key_end) of it, whole panels: what a chunk's masks leave.
struct ChunkRange {
  int64_t begin = 0, end = 0;
  int64_t key_begin = 0, key_end = 0;
  int64_t rows() const { return end - begin; }
  bool empty() const { return key_begin >= key_end; }
};

// Panel of keys [first, first + vecs * kLanes) of a block.
struct KeyPanel {
  int64_t first = 0;
  int vecs = 0;
  int64_t width() const { return int64_t{vecs} * kLanes; }
};

// dscores: the gradient of the scores before softcap, that of what the biases join, after it, or what the memory held.
enum class Dscores : uint8_t { of_scores, of_bias, none };

template <class T>
class BlockPair {
 public:
  using P = ProductOf<T>;
  using Element = typename P::Element;
  static constexpr bool kPairs = P::kElementsPerStep == 2;
  static constexpr int kStep = P::kElementsPerStep;

  BlockPair(const BackwardState& state, Scratch& scratch)
      : state_(state),
        p_(state.problem->forward),
        block_q_(p_.pattern.shape.block_q),
        block_k_(p_.pattern.shape.block_k),
        steps_((p_.head_dim + kStep - 1) / kStep),
        steps_v_((p_.head_dim_v + kStep - 1) / kStep),
        padded_(hwy::RoundUpTo(p_.head_dim, kLanes)) {
    // fp32 queries carry scale * log2(e); bf16 ones keep their bits.
    q_scale_ = kPairs ? 1.0f : static_cast<float>(p_.scale * kLog2eDouble);
    factor_ = kPairs ? static_cast<float>(p_.scale * kLog2eDouble) : 1.0f;
    keys_t_ = scratch.take<Element>(steps_ * block_k_);
    values_t_ = scratch.take<Element>(steps_v_ * block_k_);
    keys_rows_ = scratch.take<Element>(block_k_ / kStep * padded_);
    q_ = scratch.take<Element>(block_q_ * steps_);
    dout_ = scratch.take<Element>(block_q_ * steps_v_);
    if constexpr (kPairs) {
      q_pairs_ = scratch.take<Element>(block_q_ / 2 * p_.head_dim);
      dout_pairs_ = scratch.take<Element>(block_q_ / 2 * p_.head_dim_v);
      weight_pairs_ = scratch.take<Element>(kQueryChunk / 2 * block_k_);
      dscore_pairs_ = scratch.take<Element>(kQueryChunk / 2 * block_k_);
      dscore_rows_ = scratch.take<Element>(kQueryChunk * block_k_ / 2);
    }
    weights_ = scratch.take<float>(kQueryChunk * block_k_);
    dscores_ = scratch.take<float>(kQueryChunk * block_k_);
    admitted_ = scratch.take<uint64_t>(kQueryChunk * kMaxPanels);
  }

  // Block column j of a kv head: K transposed and by rows, V transposed. Keys that nobody may see are zeros.
  void LoadKeys(int64_t b, int64_t kv_head, int64_t j) {
    b_ = b;
    kv_head_ = kv_head;
    mask_ = PairMask(p_, b);
    k_begin_ = j * block_k_;
    keys_ = std::clamp<int64_t>(std::min(p_.seqlen_k, mask_.geometry().key_limit) - k_begin_, 0, block_k_);
    panels_ = 0;
    for (int64_t c = 0; c < keys_; c += kMaxPanel) {
      panel_[panels_++] = {c, static_cast<int>((std::min<int64_t>(keys_ - c, kMaxPanel) + kLanes - 1) / kLanes)};
    }
    key_state_ = Finite::unknown;
    const T* k = KRow(0);
    for (int64_t i = 0; i < keys_; i += kStep) {
      Element* to = keys_rows_ + i / kStep * padded_;
      const T* row = k + i * p_.k.seq;
#if TESSERA_BF16_DOT
      if constexpr (kPairs) InterleaveRows(row, i + 1 < keys_ ? row + p_.k.seq : nullptr, p_.head_dim, to);
#endif
      if constexpr (!kPairs) RowToFloat(row, p_.head_dim, to);
      std::fill(to + p_.head_dim, to + padded_, Element{0});
    }
    ToPanels(k, p_.k.seq, p_.head_dim, steps_, keys_t_);
    ToPanels(VRow(0), p_.v.seq, p_.head_dim_v, steps_v_, values_t_);
  }

  // Block row i of head h.
  void LoadQueries(int64_t h, int64_t i) {
    h_ = h;
    q_begin_ = p_.pattern.shape.query_begin(i);
    queries_ = p_.pattern.shape.query_end(i) - q_begin_;
    query_state_ = Finite::unknown;
    const int64_t at = state_.query_index(b_, h, q_begin_);
    lse2_ = state_.lse2 + at;
    delta_ = state_.delta + at;
#if TESSERA_BF16_DOT
    if constexpr (kPairs) {
      CopyPairs(QRow(0), p_.q.seq, p_.head_dim, steps_, q_, q_pairs_);
      CopyPairs(DoutRow(0), state_.problem->dout.seq, p_.head_dim_v, steps_v_, dout_, dout_pairs_);
    }
#endif
    if constexpr (!kPairs) {
      const Floats d;
      const Vec scale = hn::Set(d, q_scale_);
      for (int64_t r = 0; r < queries_; ++r) {
        const T* q = QRow(r);
        float* to = q_ + r * steps_;
        int64_t c = 0;
        for (; c + kLanes <= p_.head_dim; c += kLanes) hn::StoreU(hn::Mul(LoadFloats(q + c), scale), d, to + c);
        for (; c < p_.head_dim; ++c) to[c] = ToFloat(q[c]) * q_scale_;
        RowToFloat(DoutRow(r), p_.head_dim_v, dout_ + r * steps_v_);
      }
    }
  }

  // Does the pair at `entry` need the long way: masks, modifiers, dropout? Call after both loads.
  void Open(int64_t entry) {
    entry_ = entry;
    const bool masked =
        !mask_.full(entry, q_begin_, q_begin_ + queries_, {k_begin_, k_begin_ + keys_}) || keys_ % kLanes != 0;
    modified_ = ScoreTerms::any(p_) || p_.dropout.p > 0;
    special_ = masked || modified_;
    // A weight of 0 must not meet NaN or Inf: then the products leave masked pairs out one by one.
    hostile_ = (masked || ScoreTerms::may_hide_keys(p_)) && AnyHostile();
    bias_sum_ = hn::Zero(Floats());
  }

  int64_t queries() const { return queries_; }
  bool hostile() const { return hostile_; }

  // The next chunk from query `begin` on.
  ChunkRange Chunk(int64_t begin) const {
    ChunkRange c{begin, std::min<int64_t>(begin + kQueryChunk, queries_), 0, 0};
    if (!special_) {
      c.key_end = keys_;
      return c;
    }
    const Interval keys = mask_.keys(entry_, q_begin_ + c.begin, q_begin_ + c.end);
    if (keys.empty()) return c;
    c.key_begin = (keys.begin - k_begin_) / kMaxPanel * kMaxPanel;
    c.key_end = std::min<int64_t>(hwy::RoundUpTo(keys.end - k_begin_, kMaxPanel), keys_);
    return c;
  }

  // P and dscores of a chunk's cell.
  template <int NV, class Between>
  void Cell(const ChunkRange& chunk, const KeyPanel& panel, Dscores wanted, Between& between) {
    const int64_t rows = chunk.rows();
    float* weights = weights_ + panel.first;
    float* dscores = dscores_ + panel.first;
    const int64_t width = panel.width();
    const Element* keys = keys_t_ + steps_ * panel.first;
    const Element* values = values_t_ + steps_v_ * panel.first;
    const Element* q = q_ + chunk.begin * steps_;
    const Element* dout = dout_ + chunk.begin * steps_v_;
    ForTiles(rows, [&](auto n, int64_t r) {
      RowTile<P, n(), NV, false>(q + r * steps_, steps_, keys, width, steps_, weights + r * block_k_, block_k_,
                                 nullptr);
      between.Some();
    });
    if (wanted != Dscores::none) {
      ForTiles(rows, [&](auto n, int64_t r) {
        RowTile<P, n(), NV, false>(dout + r * steps_v_, steps_v_, values, width, steps_v_, dscores + r * block_k_,
                                   block_k_, nullptr);
        between.Some();
      });
    }
    const bool plain = !modified_ && !hostile_ && Plain(chunk, panel);
    if (!plain) Modify(chunk, panel, wanted);
#if TESSERA_BF16_DOT
    if constexpr (kPairs) {
      const PairsOut out{weight_pairs_ + panel.first, dscore_pairs_ + panel.first, dscore_rows_ + panel.first / 2};
      if (plain) {
        WeightsToPairs<NV, true>(weights, dscores, rows, block_k_, factor_, lse2_ + chunk.begin, delta_ + chunk.begin,
                                 out);
      } else {
        WeightsToPairs<NV, false>(weights, dscores, rows, block_k_, 1.0f, nullptr, nullptr, out);
      }
      return;
    }
#endif
    if (plain) PairWeights<NV>(weights, dscores, rows, block_k_, lse2_ + chunk.begin, delta_ + chunk.begin);
  }

  // Calls cell(integral_constant<int, NV>, panel) for each panel of the chunk.
  template <class CellOf>
  void ForPanels(const ChunkRange& chunk, CellOf cell) const {
    for (int i = 0; i < panels_; ++i) {
      const KeyPanel& panel = panel_[i];
      if (panel.first < chunk.key_begin || panel.first >= chunk.key_end) continue;
      switch (panel.vecs) {
        case 1: cell(std::integral_constant<int, 1>(), panel); break;
        case 2: cell(std::integral_constant<int, 2>(), panel); break;
        case 3:
          if constexpr (kMaxVecs > 2) cell(std::integral_constant<int, 3>(), panel);
          break;
        case 4:
          if constexpr (kMaxVecs > 2) cell(std::integral_constant<int, 4>(), panel);
          break;
      }
    }
  }

  // What the products of the column read. Rows of a chunk; steps are queries, or pairs of them.
  static int64_t Steps(int64_t n) { return (n + kStep - 1) / kStep; }
  const Element* weights() const { return kPairs ? weight_pairs_ : reinterpret_cast<const Element*>(weights_); }
  const Element* dscores() const { return kPairs ? dscore_pairs_ : reinterpret_cast<const Element*>(dscores_); }
  const Element* dscores_by_row() const { return kPairs ? dscore_rows_ : reinterpret_cast<const Element*>(dscores_); }
  int64_t dscores_by_row_stride() const { return block_k_ / kStep; }
  const Element* q_steps(int64_t r) const { return (kPairs ? q_pairs_ : q_) + r / kStep * p_.head_dim; }
  const Element* dout_steps(int64_t r) const { return (kPairs ? dout_pairs_ : dout_) + r / kStep * p_.head_dim_v; }
  const Element* keys_by_row(int64_t k) const { return keys_rows_ + k / kStep * padded_; }
  int64_t padded() const { return padded_; }
  int64_t keys() const { return keys_; }
  int64_t k_begin() const { return k_begin_; }
  int64_t q_begin() const { return q_begin_; }
  const float* weight_floats() const { return weights_; }
  const float* dscore_floats() const { return dscores_; }
  uint64_t admitted(int64_t chunk_row, const KeyPanel& panel) const {
    return admitted_[chunk_row * kMaxPanels + panel.first / kMaxPanel];
  }
  float bias_sum() const { return hn::GetLane(hn::SumOfLanes(Floats(), bias_sum_)); }

  const T* QRow(int64_t r) const { return reinterpret_cast<const T*>(p_.q.at(b_, q_begin_ + r, h_, sizeof(T))); }
  const T* DoutRow(int64_t r) const {
    return reinterpret_cast<const T*>(state_.problem->dout.at(b_, q_begin_ + r, h_, sizeof(T)));
  }
  const T* KRow(int64_t k) const { return reinterpret_cast<const T*>(p_.k.at(b_, k_begin_ + k, kv_head_, sizeof(T))); }
  const T* VRow(int64_t k) const { return reinterpret_cast<const T*>(p_.v.at(b_, k_begin_ + k, kv_head_, sizeof(T))); }
  float q_scale() const { return q_scale_; }

 private:
  enum class Finite : uint8_t { unknown, yes, no };
  static constexpr int kMaxPanels = 256 / (kMaxVecs * kLanes);

  bool Plain(const ChunkRange& chunk, const KeyPanel& panel) const {
    if (!special_) return true;
    const int64_t k = k_begin_ + panel.first;
    return panel.first + panel.width() <= keys_ &&
           mask_.full(entry_, q_begin_ + chunk.begin, q_begin_ + chunk.end, {k, k + panel.width()});
  }

  bool AnyHostile() {
    if (key_state_ == Finite::unknown) {
      bool bad = false;
      for (int64_t i = 0; i < keys_; ++i) bad = bad || AnyNonFinite(KRow(i), p_.head_dim);
      key_state_ = bad ? Finite::no : Finite::yes;
    }
    if (query_state_ == Finite::unknown) {
      bool bad = false;
      for (int64_t r = 0; r < queries_; ++r) {
        bad = bad || AnyNonFinite(QRow(r), p_.head_dim) || AnyNonFinite(DoutRow(r), p_.head_dim_v);
      }
      query_state_ = bad ? Finite::no : Finite::yes;
    }
    return key_state_ == Finite::no || query_state_ == Finite::no;
  }

  // Rows of n elements into panels [steps][width], zeros past the last key.
  void ToPanels(const T* from, int64_t stride, int64_t n, int64_t steps, Element* to) const {
    for (int i = 0; i < panels_; ++i) {
      float* panel = reinterpret_cast<float*>(to + steps * panel_[i].first);
      for (int64_t r = 0; r < panel_[i].width(); r += kLanes) {
        const int64_t k = panel_[i].first + r;
        RowsToLanes<kStep>(from + k * stride, stride, keys_ - k, n, 1.0f, panel + r, panel_[i].width());
      }
    }
  }

#if TESSERA_BF16_DOT
  // bf16 rows as they lie, and in pairs of queries.
  void CopyPairs(const T* from, int64_t stride, int64_t n, int64_t steps, Element* rows, Element* pairs) const {
    for (int64_t r = 0; r < queries_; ++r) {
      rows[r * steps + steps - 1] = 0;
      std::memcpy(rows + r * steps, from + r * stride, n * sizeof(T));
    }
    for (int64_t r = 0; r < queries_; r += 2) {
      InterleaveRows(from + r * stride, r + 1 < queries_ ? from + (r + 1) * stride : nullptr, n, pairs + r / 2 * n);
    }
  }
#endif

  // The long way for a cell: products in weights_ and dscores_ become P and dscores there, row by row.
  void Modify(const ChunkRange& chunk, const KeyPanel& panel, Dscores wanted) {
    const ScoreModifier modifier(p_, b_, h_, entry_, factor_);
    const int64_t width = panel.width();
    HWY_ALIGN float extra[kMaxPanel];
    HWY_ALIGN float keep[kMaxPanel];
    for (int64_t r = 0; r < chunk.rows(); ++r) {
      const int64_t q = q_begin_ + chunk.begin + r, k = k_begin_ + panel.first;
      const bool biased = modifier.LoadBias(q, k, std::min(width, keys_ - panel.first), width, extra);
      if (p_.dropout.p > 0) modifier.LoadKeep(q, k, width, keep);
      const RowPlace place{
          q, k, width, mask_.bits(entry_, q, k, width), lse2_[chunk.begin + r], delta_[chunk.begin + r]};
      const uint64_t seen =
          modifier.Row(place, biased ? extra : nullptr, keep, wanted == Dscores::of_scores,
                       weights_ + r * block_k_ + panel.first, dscores_ + r * block_k_ + panel.first, bias_sum_);
      admitted_[r * kMaxPanels + panel.first / kMaxPanel] = seen;
    }
  }

  const BackwardState& state_;
  const Problem& p_;
  const int64_t block_q_, block_k_;
  const int64_t steps_, steps_v_;  // elements of a q (k) and a dout (v) row as the products read it
  const int64_t padded_;           // floats of a row of dq in scratch
  float q_scale_ = 1, factor_ = 1;
  int64_t b_ = 0, h_ = 0, kv_head_ = 0, entry_ = 0;
  int64_t q_begin_ = 0, queries_ = 0, k_begin_ = 0, keys_ = 0;
  PairMask mask_;
  KeyPanel panel_[kMaxPanels];
  int panels_ = 0;
  bool special_ = false, modified_ = false, hostile_ = false;
  Finite key_state_ = Finite::unknown, query_state_ = Finite::unknown;
  const float* lse2_ = nullptr;  // of the first query
  const float* delta_ = nullptr;
  Vec bias_sum_ = hn::Zero(Floats());
  Element* keys_t_ = nullptr;     // panels [steps][W]
  Element* values_t_ = nullptr;   // panels [steps_v][W]
  Element* keys_rows_ = nullptr;  // [keys or pairs of keys][padded]
  Element* q_ = nullptr;          // [queries][steps]
  Element* dout_ = nullptr;       // [queries][steps_v]
  Element* q_pairs_ = nullptr;    // bf16: [pairs of queries][D]
  Element* dout_pairs_ = nullptr;
  Element* weight_pairs_ = nullptr;  // bf16: [pairs of queries][block_k]
  Element* dscore_pairs_ = nullptr;
  Element* dscore_rows_ = nullptr;  // bf16: [queries][block_k / 2]
  float* weights_ = nullptr;        // [kQueryChunk][block_k]
  float* dscores_ = nullptr;
  uint64_t* admitted_ = nullptr;  // [kQueryChunk][panels]
};

}  // namespace tessera::cpu::TESSERA_KERNELS
HWY_AFTER_NAMESPACE();
#endif
