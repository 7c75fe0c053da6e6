// Forward over one row of blocks.
//
// The queries of the row are cut into panels of up to kMaxPanel, transposed once. Kept blocks stream by in chunks of
// up to kChunk keys (chunk-inl.h). For each chunk and panel: scores, online softmax, out += weights x V, all in L1 and
// L2; out is normalised and transposed back at the end. Nothing is packed ahead, so scratch does not grow with the
// problem.
#if defined(TESSERA_CPU_FORWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TESSERA_CPU_FORWARD_INL_H_
#undef TESSERA_CPU_FORWARD_INL_H_
#else
#define TESSERA_CPU_FORWARD_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/chunk-inl.h"
#include "cpu/kernel_table.h"
#include "cpu/modify-inl.h"
#include "cpu/panel-inl.h"
#include "cpu/scratch.h"
#include "cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tessera::cpu::TESSERA_KERNELS {

template <class T>
class RowKernel {
  using P = ProductOf<T>;
  using Element = typename P::Element;
  using Staged = typename Stager<T>::Staged;
  static constexpr bool kPairs = P::kElementsPerStep == 2;

  struct Panel {
    int64_t q = 0;     // first query
    int64_t rows = 0;  // queries, at most kMaxPanel
    int vecs = 0;
    Element* qt = nullptr;  // [steps][W]
    float* out = nullptr;   // [Dv][W]; holds nothing yet while `fresh`
    bool fresh = true;
    float* reference = nullptr;  // [W]
    float* sum = nullptr;        // [W]
    float* used = nullptr;       // [W] sum of the weights as V met them: rounded to bf16, or the same array as sum
  };

 public:
  static size_t ScratchBytes(const Problem& p) {
    Scratch sizing(nullptr);
    RowKernel(p, RowUnit{}, sizing);
    return sizing.used();
  }

  RowKernel(const Problem& p, const RowUnit& unit, Scratch& scratch)
      : p_(p), b_(unit.b), h_(unit.h), mask_(p, unit.b), row_(unit.row), stager_(p, unit.b, unit.h, scratch) {
    const PatternShape& shape = p.pattern.shape;
    q_begin_ = shape.query_begin(row_);
    q_end_ = shape.query_end(row_);
    steps_ = (p.head_dim + P::kElementsPerStep - 1) / P::kElementsPerStep;
    const int64_t queries = hwy::RoundUpTo(shape.block_q, kLanes);
    const int64_t chunk = std::min<int64_t>(kChunk, hwy::RoundUpTo(std::max<int64_t>(p.seqlen_k, 1), 2));
    queries_t_ = scratch.take<Element>(steps_ * queries);
    out_t_ = scratch.take<float>(p.head_dim_v * queries);
    references_ = scratch.take<float>(queries);
    sums_ = scratch.take<float>(queries);
    used_ = kPairs ? scratch.take<float>(queries) : sums_;
    scores_ = scratch.take<float>(chunk * kMaxPanel);
    factor_ = kPairs ? static_cast<float>(std::abs(p.scale) * kLog2eDouble) : 1.0f;
  }

  void Run(const RowUnit* next) {
    ChunkReader reader(p_, b_, h_, row_, mask_);
    Chunk chunks[2];
    bool more = reader.Next(chunks[0]);
    if (more) stager_.Begin(chunks[0], 1);
    LoadPanels();
    for (int i = 0; more; i ^= 1) {
      const Staged staged = stager_.Finish();
      more = reader.Next(chunks[i ^ 1]);
      const int64_t tiles = num_panels_ * (chunks[i].keys / kTileRows + p_.head_dim_v / kTileRows);
      if (more) {
        stager_.Begin(chunks[i ^ 1], tiles);
      } else {
        stager_.Fetch(LastRows(next), tiles);
      }
      RunChunk(chunks[i], staged);
    }
    StorePanels();
  }

 private:
  // What is touched after the last chunk: the output, and the first rows of the next unit.
  FetchList LastRows(const RowUnit* next) const {
    constexpr int64_t size = sizeof(T);
    FetchList list;
    list.Add(p_.out.at(b_, q_begin_, h_, size), p_.out.seq * size, p_.head_dim_v * size, q_end_ - q_begin_);
    if (next == nullptr) return list;
    const PatternShape& shape = p_.pattern.shape;
    const int64_t q = shape.query_begin(next->row);
    list.Add(p_.q.at(next->b, q, next->h, size), p_.q.seq * size, p_.head_dim * size, shape.query_end(next->row) - q);
    const PairMask mask(p_, next->b);
    ChunkReader reader(p_, next->b, next->h, next->row, mask);
    const Segment first = reader.First();
    if (first.keys == 0) return list;
    const int64_t block = shape.block_k, kv_head = next->h / p_.group();
    const int64_t j = first.k / block, skip = first.k % block, rows = std::min<int64_t>(first.keys, kChunk);
    list.Add(p_.k_block(next->b, j, kv_head) + skip * p_.k.seq * size, p_.k.seq * size, p_.head_dim * size, rows);
    list.Add(p_.v_block(next->b, j, kv_head) + skip * p_.v.seq * size, p_.v.seq * size, p_.head_dim_v * size, rows);
    return list;
  }

  // Queries into panels: transposed, with scale * log2(e) folded in (bf16 pairs keep their bits, but for a sign).
  void LoadPanels() {
    num_panels_ = 0;
    const float scale = static_cast<float>(p_.scale * kLog2eDouble);
    int64_t offset = 0;  // lanes before this panel
    for (int64_t q = q_begin_; q < q_end_; q += kMaxPanel) {
      Panel& panel = panels_[num_panels_++];
      panel.q = q;
      panel.rows = std::min<int64_t>(kMaxPanel, q_end_ - q);
      panel.vecs = static_cast<int>((panel.rows + kLanes - 1) / kLanes);
      const int64_t width = panel.vecs * kLanes;
      panel.qt = queries_t_ + steps_ * offset;
      panel.out = out_t_ + p_.head_dim_v * offset;
      panel.reference = references_ + offset;
      panel.sum = sums_ + offset;
      panel.used = used_ + offset;
      offset += width;
      for (int64_t r = 0; r < width; r += kLanes) {
        RowsToLanes<P::kElementsPerStep>(At<const T>(p_.q, panel.q + r), p_.q.seq, panel.rows - r, p_.head_dim, scale,
                                         reinterpret_cast<float*>(panel.qt) + r, width);
      }
      panel.fresh = true;
      std::fill_n(panel.reference, width, kNoScore);
      std::fill_n(panel.sum, width, 0.0f);
      std::fill_n(panel.used, width, 0.0f);
    }
  }

  void RunChunk(const Chunk& chunk, const Staged& staged) {
    const Segment& segment = chunk.segments[0];
    for (int i = 0; i < num_panels_; ++i) {
      Panel& panel = panels_[i];
      if (!chunk.alone) {
        RunPanel(panel, chunk, segment, staged);
        continue;
      }
      // One segment; each panel clips it to the keys that its own queries may admit.
      const Interval keys = mask_.keys(segment.entry, panel.q, panel.q + panel.rows);
      Segment clip = segment;
      // bf16 values are staged in pairs of keys: clipping cuts none of them (the key beside it is masked then).
      clip.k = std::max(segment.k, segment.k + ((keys.begin - segment.k) & ~int64_t{1}));
      const int64_t skipped = clip.k - segment.k;
      clip.keys = std::min(segment.k + segment.keys, keys.end) - clip.k;
      if (clip.keys <= 0) continue;
      clip.keys = std::min(segment.keys - skipped, (clip.keys + 1) & ~int64_t{1});
      Staged part = staged;
      part.k += skipped * staged.k_stride;
      part.v += skipped / P::kElementsPerStep * staged.v_stride;
      RunPanel(panel, chunk, clip, part);
    }
  }

  void RunPanel(Panel& panel, const Chunk& chunk, const Segment& segment, const Staged& staged) {
    switch (panel.vecs) {
      case 1: PanelChunk<1>(panel, chunk, segment, staged); break;
      case 2: PanelChunk<2>(panel, chunk, segment, staged); break;
      case 3:
        if constexpr (kMaxVecs > 2) PanelChunk<3>(panel, chunk, segment, staged);
        break;
      case 4:
        if constexpr (kMaxVecs > 2) PanelChunk<4>(panel, chunk, segment, staged);
        break;
    }
  }

  // `segment` is what this panel sees of the chunk where the chunk is alone.
  template <int NV>
  void PanelChunk(Panel& panel, const Chunk& chunk, const Segment& segment, const Staged& staged) {
    const int64_t keys = chunk.alone ? segment.keys : chunk.keys;
    HWY_ALIGN float max[NV * kLanes];
    std::fill_n(max, NV * kLanes, kNegInf);
    Scores<P, NV>(panel.qt, steps_, staged.k, staged.k_stride, keys, scores_, max, stager_);
    if (HWY_LIKELY(!chunk.alone)) {
      Raise<NV>(panel, max, factor_);
#if TESSERA_BF16_DOT
      if constexpr (kPairs) WeightsToBf16<NV, true>(scores_, keys, factor_, panel.reference, panel.sum, panel.used);
#endif
      if constexpr (!kPairs) Weights<NV, false>(scores_, keys, 1.0f, panel.reference, panel.sum);
    } else if (!ModifiedWeights<NV>(panel, segment, chunk.masked, max)) {
      return;
    }
    AddOut<P, NV>(reinterpret_cast<const Element*>(scores_), NV * kLanes,
                  (keys + P::kElementsPerStep - 1) / P::kElementsPerStep, staged.v, staged.v_stride, p_.head_dim_v,
                  !panel.fresh, panel.out, stager_);
    panel.fresh = false;
  }

  template <int NV>
  void Raise(const Panel& panel, const float* max, float factor) const {
    RaiseReference<NV>(max, factor, panel.reference, panel.sum, panel.used, panel.out, panel.fresh ? 0 : p_.head_dim_v);
  }

  // The long way from scores to weights: modifiers, masks, dropout. False when out is already done: V holds NaN or
  // Inf, and a masked weight of 0 must not meet them.
  template <int NV>
  bool ModifiedWeights(Panel& panel, const Segment& segment, bool masked, float* max) {
    const int64_t keys = segment.keys;
    const PanelPlace place{b_, h_, panel.q, segment.k, panel.rows, keys, segment.entry};
    float factor = factor_;
    // A scale of 0 goes in before the masks do: 0 * -inf is no weight.
    const bool modified = ScoreTerms::any(p_) || factor == 0;
    if (modified) {
      ModifyScores<NV>(p_, place, factor, scores_, max);
      factor = 1.0f;
    }
    uint64_t bits[kChunk];
    if (masked) {
      mask_.bits_by_key(segment.entry, panel.q, panel.rows, segment.k, keys, bits);
      MaskPanel<NV>(bits, keys, kNegInf, scores_);
      ColumnMax<NV>(scores_, keys, max);
    }
    Raise<NV>(panel, max, factor);
    if constexpr (kPairs) {
      Weights<NV, true>(scores_, keys, factor, panel.reference, panel.sum);
      RoundWeights<NV>(scores_, keys, panel.used);
    } else {
      Weights<NV, false>(scores_, keys, 1.0f, panel.reference, panel.sum);
    }
    if (p_.dropout.p > 0) DropWeights<NV>(p_, place, scores_);
    if (masked && ValuesNonFinite(segment.k, keys)) {
      if (panel.fresh) std::fill_n(panel.out, p_.head_dim_v * NV * kLanes, 0.0f);
      panel.fresh = false;
      AddOutMasked<NV>(bits, segment.k, keys, panel.out);
      return false;
    }
#if TESSERA_BF16_DOT
    if constexpr (kPairs) WeightsToBf16<NV, false>(scores_, keys, 1.0f, nullptr, nullptr, nullptr);
#endif
    return true;
  }

  bool ValuesNonFinite(int64_t k, int64_t keys) const {
    const T* v = stager_.VRow(k);
    for (int64_t i = 0; i < keys; ++i, v += p_.v.seq) {
      if (AnyNonFinite(v, p_.head_dim_v)) return true;
    }
    return false;
  }

  // out += weights x V where admitted, untouched elsewhere, whatever V holds.
  template <int NV>
  void AddOutMasked(const uint64_t* bits, int64_t k, int64_t keys, float* out) const {
    const Floats d;
    const T* v = stager_.VRow(k);
    for (int64_t i = 0; i < keys; ++i, v += p_.v.seq) {
      for (int64_t c = 0; c < p_.head_dim_v; ++c) {
        const Vec value = hn::Set(d, ToFloat(v[c]));
        for (int n = 0; n < NV; ++n) {
          const auto admitted = MaskOfBits(static_cast<uint32_t>(bits[i] >> (n * kLanes)));
          float* o = out + (c * NV + n) * kLanes;
          const Vec old = hn::Load(d, o);
          const Vec weight = hn::Load(d, scores_ + (i * NV + n) * kLanes);
          hn::Store(hn::IfThenElse(admitted, hn::MulAdd(weight, value, old), old), d, o);
        }
      }
    }
  }

  // Empty rows have factor 0.
  void StorePanels() {
    const float keep = static_cast<float>(1.0 / (1.0 - p_.dropout.p));
    for (int i = 0; i < num_panels_; ++i) {
      Panel& panel = panels_[i];
      const int64_t width = panel.vecs * kLanes;
      HWY_ALIGN float factor[kMaxPanel];
      for (int64_t r = 0; r < width; ++r) factor[r] = Finish(panel, r) * keep;
      for (int64_t r = 0; r < panel.rows; r += kLanes) {
        LanesToRows(panel.out + r, width, p_.head_dim_v, hn::Load(Floats(), factor + r), panel.rows - r,
                    At<T>(p_.out, panel.q + r), p_.out.seq);
      }
    }
  }

  template <class E>
  E* At(const Strided& tensor, int64_t q) const {
    return reinterpret_cast<E*>(tensor.at(b_, q, h_, sizeof(T)));
  }

  // Writes lse of a query and returns what its out must be multiplied by: 1 / denominator.
  float Finish(const Panel& panel, int64_t r) const {
    if (r >= panel.rows) return 0.0f;
    const auto end = RowState{panel.reference[r], panel.sum[r], panel.used[r]}.finish(p_.sinks.at(b_, h_));
    p_.store_lse(b_, h_, panel.q + r, end.lse);
    return end.factor;
  }

  const Problem& p_;
  const int64_t b_, h_;
  const PairMask mask_;
  const int64_t row_;
  int64_t q_begin_ = 0, q_end_ = 0;
  int64_t steps_ = 0;  // elements of a q or k row as the product reads it
  float factor_ = 1;   // of raw scores, to log2 units
  Stager<T> stager_;
  Panel panels_[256 / kLanes];
  int num_panels_ = 0;
  Element* queries_t_ = nullptr;
  float* out_t_ = nullptr;
  float* references_ = nullptr;
  float* sums_ = nullptr;
  float* used_ = nullptr;
  float* scores_ = nullptr;
};

}  // namespace tessera::cpu::TESSERA_KERNELS
HWY_AFTER_NAMESPACE();
#endif
