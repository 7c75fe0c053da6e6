// Backward over one column of blocks (FlashAttention, Dao et al. 2022, algorithm 4, loops as there: columns outside).
//
// For each block pair: weights P and dscores (pair-inl.h), then the three products that sum them up:
//
//   dV^T [Dv][W]     +=  dout^T (broadcast)     x  P        [queries][W]
//   dK^T [D][W]      +=  Q^T (broadcast)        x  dscores  [queries][W]
//   dQ   [queries][D] =  dscores (broadcast)    x  K        [keys][D]
//
// dK and dV stay in scratch until the column ends. dQ of a pair is added to memory when it is the pair's turn: columns
// in ascending order for each row, whatever the threads do.
#if defined(TESSERA_CPU_BACKWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TESSERA_CPU_BACKWARD_INL_H_
#undef TESSERA_CPU_BACKWARD_INL_H_
#else
#define TESSERA_CPU_BACKWARD_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "cpu/pair-inl.h"
#include "cpu/panel-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tessera::cpu::TESSERA_KERNELS {

// Rows that the next pair reads, brought into the cache a few at a time, between tiles.
struct Fetcher {
  FetchList list;
  int64_t quota = 0;

  void Begin(const FetchList& next, int64_t visits) {
    list = next;
    quota = (next.rows + visits - 1) / visits;
  }
  void Some() {
    for (int64_t i = 0; i < quota && list.size > 0; ++i) list.FetchRow();
  }
};

// to = or += from * factor.
HWY_INLINE void PutRow(const float* HWY_RESTRICT from, int64_t n, float factor, bool add, float* HWY_RESTRICT to) {
  const Floats d;
  const Vec f = hn::Set(d, factor);
  int64_t i = 0;
  if (add) {
    for (; i + kLanes <= n; i += kLanes) {
      hn::StoreU(hn::MulAdd(hn::LoadU(d, from + i), f, hn::LoadU(d, to + i)), d, to + i);
    }
    for (; i < n; ++i) to[i] = std::fma(from[i], factor, to[i]);
  } else {
    for (; i + kLanes <= n; i += kLanes) hn::StoreU(hn::Mul(hn::LoadU(d, from + i), f), d, to + i);
    for (; i < n; ++i) to[i] = from[i] * factor;
  }
}

template <class T>
class ColumnKernel {
  using Pair = BlockPair<T>;
  using P = typename Pair::P;
  static constexpr bool kPairs = Pair::kPairs;

 public:
  static size_t ScratchBytes(const BackwardProblem& problem) {
    BackwardState state;
    state.problem = &problem;
    Scratch sizing(nullptr);
    ColumnKernel(state, ColumnUnit{}, sizing);
    return sizing.used();
  }

  ColumnKernel(const BackwardState& state, const ColumnUnit& unit, Scratch& scratch)
      : state_(state), g_(*state.problem), p_(g_.forward), unit_(unit), pair_(state, scratch) {
    const int64_t block_q = p_.pattern.shape.block_q, block_k = p_.pattern.shape.block_k;
    row_ = hwy::RoundUpTo(std::max(p_.head_dim, p_.head_dim_v), 16);
    dk_ = scratch.take<float>(p_.head_dim * block_k);
    dv_ = scratch.take<float>(p_.head_dim_v * block_k);
    dq_ = scratch.take<float>(block_q * pair_.padded());
    rows_ = scratch.take<float>((kLanes + 2) * row_);
  }

  void Run() {
    const int64_t block_k = p_.pattern.shape.block_k;
    std::fill_n(dk_, p_.head_dim * block_k, 0.0f);
    std::fill_n(dv_, p_.head_dim_v * block_k, 0.0f);
    if (unit_.begin < unit_.end) {
      pair_.LoadKeys(unit_.b, unit_.kv_head, unit_.col);
      RunPairs();
    }
    StoreColumn();
  }

 private:
  struct Place {
    int64_t h = 0, i = 0, entry = 0;
  };

  void RunPairs() {
    PairReader reader(state_, unit_);
    Place now, next;
    bool more = reader.Next(now);
    while (more) {
      more = reader.Next(next);
      pair_.LoadQueries(now.h, now.i);
      pair_.Open(now.entry);
      FetchList list;
      if (more) list = RowsOf(next);
      fetcher_.Begin(list, Visits());
      for (int64_t begin = 0; begin < pair_.queries(); begin += kQueryChunk) RunChunk(pair_.Chunk(begin));
      if (g_.dq.data != nullptr) AddQueries(now);
      if (state_.bias_sums != nullptr) {
        const int64_t first = p_.pattern.indptr[p_.pattern.row_id(unit_.b, now.h, 0)];
        state_.bias_sums[(unit_.b * p_.heads + now.h) * state_.bias_entries + now.entry - first] = pair_.bias_sum();
      }
      now = next;
    }
  }

  // The blocks of a unit, in order.
  class PairReader {
   public:
    PairReader(const BackwardState& state, const ColumnUnit& unit)
        : state_(state),
          p_(state.problem->forward),
          unit_(unit),
          mask_(p_.mask(unit.b)),
          h_(unit.kv_head * p_.group()) {
      Open();
    }
    bool Next(Place& place) {
      for (; seen_ < unit_.end; ++at_) {
        while (at_ == end_) {
          if (++h_ == (unit_.kv_head + 1) * p_.group()) return false;
          Open();
        }
        const int64_t i = state_.problem->transposed.rows[at_];
        if (!state_.live(mask_, i, unit_.col)) continue;
        if (seen_++ < unit_.begin) continue;
        place = {h_, i, state_.problem->transposed.entries[at_++]};
        return true;
      }
      return false;
    }

   private:
    void Open() {
      const int64_t id = p_.pattern.col_id(unit_.b, h_, unit_.col);
      at_ = state_.problem->transposed.indptr[id];
      end_ = state_.problem->transposed.indptr[id + 1];
    }
    const BackwardState& state_;
    const Problem& p_;
    const ColumnUnit& unit_;
    const MaskGeometry mask_;
    int64_t h_, at_ = 0, end_ = 0, seen_ = 0;
  };

  // Calls of fetcher_.Some() that a pair makes, at least.
  int64_t Visits() const { return std::max<int64_t>(1, 2 * pair_.queries() * pair_.keys() / (kTileRows * kMaxPanel)); }

  FetchList RowsOf(const Place& place) const {
    const int64_t q = p_.pattern.shape.query_begin(place.i), rows = p_.pattern.shape.query_end(place.i) - q;
    constexpr int64_t size = sizeof(T);
    FetchList list;
    if (g_.dq.data != nullptr) {
      int64_t stride = 0;
      const float* dq = Sums(place.h, q, stride);
      list.Add(reinterpret_cast<const char*>(dq), stride * 4, p_.head_dim * 4, rows);
    }
    list.Add(g_.dout.at(unit_.b, q, place.h, size), g_.dout.seq * size, p_.head_dim_v * size, rows);
    list.Add(p_.q.at(unit_.b, q, place.h, size), p_.q.seq * size, p_.head_dim * size, rows);
    return list;
  }

  // Where dq is summed up in fp32.
  float* Sums(int64_t h, int64_t q, int64_t& stride) const {
    if (state_.dq_sums == nullptr) {
      stride = g_.dq.seq;
      return reinterpret_cast<float*>(g_.dq.at(unit_.b, q, h, sizeof(float)));
    }
    stride = p_.head_dim;
    return state_.dq_sums + state_.query_index(unit_.b, h, q) * p_.head_dim;
  }

  void RunChunk(const ChunkRange& chunk) {
    float* dq = dq_ + chunk.begin * pair_.padded();
    if (chunk.empty() || pair_.hostile()) std::fill_n(dq, chunk.rows() * pair_.padded(), 0.0f);
    if (chunk.empty()) return;
    pair_.ForPanels(chunk, [&](auto vecs, const KeyPanel& panel) {
      constexpr int NV = vecs();
      pair_.template Cell<NV>(chunk, panel, g_.wants_dscores() ? Dscores::of_scores : Dscores::none, fetcher_);
      if (pair_.hostile()) {
        AddAdmitted<NV>(chunk, panel, dq);
        return;
      }
      const int64_t stride = p_.pattern.shape.block_k, steps = Pair::Steps(chunk.rows());
      if (g_.dv.data != nullptr) {
        AddOut<P, NV>(pair_.weights() + panel.first, stride, steps, pair_.dout_steps(chunk.begin), p_.head_dim_v,
                      p_.head_dim_v, true, dv_ + panel.first * p_.head_dim_v);
      }
      if (g_.dk.data != nullptr) {
        AddOut<P, NV>(pair_.dscores() + panel.first, stride, steps, pair_.q_steps(chunk.begin), p_.head_dim,
                      p_.head_dim, true, dk_ + panel.first * p_.head_dim);
      }
    });
    if (g_.dq.data == nullptr || pair_.hostile()) return;
    const int64_t steps = Pair::Steps(chunk.key_end) - Pair::Steps(chunk.key_begin);
    for (int64_t c = 0; c < pair_.padded(); c += kMaxPanel) {
      switch (std::min<int64_t>(kMaxPanel, pair_.padded() - c) / kLanes) {
        case 1: QueryTiles<1>(chunk, steps, c, dq + c); break;
        case 2: QueryTiles<2>(chunk, steps, c, dq + c); break;
        case 3:
          if constexpr (kMaxVecs > 2) QueryTiles<3>(chunk, steps, c, dq + c);
          break;
        case 4:
          if constexpr (kMaxVecs > 2) QueryTiles<4>(chunk, steps, c, dq + c);
          break;
      }
    }
  }

  template <int NV>
  void QueryTiles(const ChunkRange& chunk, int64_t steps, int64_t column, float* dq) {
    const int64_t stride = pair_.dscores_by_row_stride(), padded = pair_.padded();
    const auto* keys = pair_.keys_by_row(chunk.key_begin) + column;
    const auto* dscores = pair_.dscores_by_row() + chunk.key_begin / Pair::kStep;
    ForTiles(chunk.rows(), [&](auto n, int64_t r) {
      RowTile<P, n(), NV, false>(dscores + r * stride, stride, keys, padded, steps, dq + r * padded, padded, nullptr);
    });
  }

  // The three products where admitted, untouched elsewhere, whatever Q, K and dout hold.
  template <int NV>
  void AddAdmitted(const ChunkRange& chunk, const KeyPanel& panel, float* dq) {
    const Floats d;
    const int64_t stride = p_.pattern.shape.block_k, width = panel.width();
    const auto add = [&](auto admitted, Vec a, float b, float* to) {
      const Vec old = hn::Load(d, to);
      hn::Store(hn::IfThenElse(admitted, hn::MulAdd(a, hn::Set(d, b), old), old), d, to);
    };
    for (int64_t r = 0; r < chunk.rows(); ++r) {
      const uint64_t bits = pair_.admitted(r, panel);
      const T* q = pair_.QRow(chunk.begin + r);
      const T* dout = pair_.DoutRow(chunk.begin + r);
      const float* weights = pair_.weight_floats() + r * stride + panel.first;
      const float* dscores = pair_.dscore_floats() + r * stride + panel.first;
      for (int v = 0; v < NV; ++v) {
        const auto admitted = MaskOfBits(static_cast<uint32_t>(bits >> (v * kLanes)));
        const Vec p = hn::Load(d, weights + v * kLanes), ds = hn::Load(d, dscores + v * kLanes);
        float* dv = dv_ + panel.first * p_.head_dim_v + v * kLanes;
        float* dk = dk_ + panel.first * p_.head_dim + v * kLanes;
        for (int64_t c = 0; c < p_.head_dim_v; ++c) add(admitted, p, ToFloat(dout[c]), dv + c * width);
        for (int64_t c = 0; c < p_.head_dim; ++c) add(admitted, ds, ToFloat(q[c]) * pair_.q_scale(), dk + c * width);
      }
      for (int64_t k = 0; k < width; ++k) {
        if ((bits >> k & 1) == 0) continue;
        const T* key = pair_.KRow(panel.first + k);
        for (int64_t c = 0; c < p_.head_dim; ++c) dq[r * pair_.padded() + c] += dscores[k] * ToFloat(key[c]);
      }
    }
  }

  // Adds dq of the pair to memory when all columns before it have; the last one rounds to 16 bits where dq has them.
  void AddQueries(const Place& place) {
    RowOfBlocks& row = state_.rows[state_.row_index(unit_.b, place.h, place.i)];
    row.turn.wait(place.entry);
    const bool add = place.entry != row.first || g_.accumulate;
    const bool last = place.entry + 1 == row.end;
    const float scale = static_cast<float>(p_.scale);
    int64_t stride = 0;
    float* sums = Sums(place.h, pair_.q_begin(), stride);
    for (int64_t r = 0; r < pair_.queries(); ++r) {
      PutRow(dq_ + r * pair_.padded(), p_.head_dim, scale, add, sums + r * stride);
      if (last && state_.dq_sums != nullptr) {
        T* to = reinterpret_cast<T*>(g_.dq.at(unit_.b, pair_.q_begin() + r, place.h, sizeof(T)));
        RowFromFloat(sums + r * stride, p_.head_dim, to);
      }
    }
    row.turn.set(place.entry + 1);
  }

  void StoreColumn() {
    if (unit_.turn != nullptr) unit_.turn->wait(unit_.part);
    // fp32 queries carried scale * log2(e) into dK.
    const float mend = static_cast<float>(kPairs ? p_.scale : kLn2);
    if (g_.dk.data != nullptr) StoreSums(dk_, p_.head_dim, mend, g_.dk, unit_.sums);
    if (g_.dv.data != nullptr) {
      float* sums = unit_.sums ? unit_.sums + p_.pattern.shape.block_k * p_.head_dim : nullptr;
      StoreSums(dv_, p_.head_dim_v, 1.0f, g_.dv, sums);
    }
    if (unit_.turn != nullptr) unit_.turn->set(unit_.part + 1);
  }

  // Panels [dims][W] to the rows of dk or dv; keys that nobody may see get zeros.
  void StoreSums(const float* panels, int64_t dims, float factor, const Strided& to, float* sums) {
    const int64_t block_k = p_.pattern.shape.block_k, k_begin = unit_.col * block_k;
    const int64_t rows = std::min<int64_t>(block_k, p_.seqlen_k - k_begin);
    const int64_t seen = unit_.begin < unit_.end ? pair_.keys() : 0;
    float* zeros = rows_ + kLanes * row_;
    std::fill_n(zeros, dims, 0.0f);
    const Vec one = hn::Set(Floats(), 1.0f);
    for (int64_t k = 0; k < rows; k += kLanes) {
      if (k < seen) {
        const int64_t first = k / kMaxPanel * kMaxPanel;
        const int64_t width = std::min<int64_t>(kMaxPanel, hwy::RoundUpTo(seen - first, kLanes));
        LanesToRows(panels + first * dims + k - first, width, dims, one, seen - k, rows_, row_);
      }
      for (int64_t n = 0; n < std::min<int64_t>(kLanes, rows - k); ++n) {
        StoreKey(k + n < seen ? rows_ + n * row_ : zeros, dims, factor, to, k_begin + k + n,
                 sums ? sums + (k + n) * dims : nullptr);
      }
    }
  }

  void StoreKey(float* row, int64_t dims, float factor, const Strided& to, int64_t k, float* sums) const {
    const bool add = unit_.part > 0 || g_.accumulate;
    if (g_.gradient_dtype == DType::f32) {
      PutRow(row, dims, factor, add, reinterpret_cast<float*>(to.at(unit_.b, k, unit_.kv_head, sizeof(float))));
      return;
    }
    T* out = reinterpret_cast<T*>(to.at(unit_.b, k, unit_.kv_head, sizeof(T)));
    if (unit_.parts == 1) {
      PutRow(row, dims, factor, false, rows_ + (kLanes + 1) * row_);
      RowFromFloat(rows_ + (kLanes + 1) * row_, dims, out);
      return;
    }
    PutRow(row, dims, factor, add, sums);
    if (unit_.part + 1 == unit_.parts) RowFromFloat(sums, dims, out);
  }

  const BackwardState& state_;
  const BackwardProblem& g_;
  const Problem& p_;
  const ColumnUnit& unit_;
  Pair pair_;
  Fetcher fetcher_;
  int64_t row_ = 0;
  float* dk_ = nullptr;    // panels [D][W]
  float* dv_ = nullptr;    // panels [Dv][W]
  float* dq_ = nullptr;    // [queries][padded]
  float* rows_ = nullptr;  // [kLanes + 2][row]: some of dK or dV, zeros, one to be rounded
};

// lse in log2 units and delta of block row i of (b, h). Returns -sum of (weight of the sink) * delta.
template <class T>
double PrepareRow(const BackwardState& state, int64_t b, int64_t h, int64_t i) {
  const BackwardProblem& g = *state.problem;
  const Problem& p = g.forward;
  const Floats d;
  const int64_t begin = p.pattern.shape.query_begin(i), end = p.pattern.shape.query_end(i), dims = p.head_dim_v;
  const RowOfBlocks& row = state.rows[state.row_index(b, h, i)];
  const PairMask mask(p, b);
  double sink_sum = 0;
  for (int64_t q = begin; q < end; ++q) {
    const int64_t at = state.query_index(b, h, q);
    const float lse = static_cast<float>(p.load_lse(b, h, q));
    if (lse == kNegInf) {
      state.lse2[at] = -kNegInf;
      state.delta[at] = 0;
      continue;
    }
    const T* out = reinterpret_cast<const T*>(p.out.at(b, q, h, sizeof(T)));
    const T* dout = reinterpret_cast<const T*>(g.dout.at(b, q, h, sizeof(T)));
    Vec sum = hn::Zero(d);
    int64_t c = 0;
    for (; c + kLanes <= dims; c += kLanes) sum = hn::MulAdd(LoadFloats(out + c), LoadFloats(dout + c), sum);
    float delta = hn::GetLane(hn::SumOfLanes(d, sum));
    for (; c < dims; ++c) delta += ToFloat(out[c]) * ToFloat(dout[c]);
    delta -= static_cast<float>(g.load_dlse(b, h, q));
    state.lse2[at] = static_cast<float>(lse * kLog2eDouble);
    state.delta[at] = delta;
    if (g.dsinks == nullptr) continue;
    // lse cannot tell whether the row sees a key of this pattern where it is joined over more than that.
    bool sees_key = false;
    for (int64_t e = row.first; e < row.end && !sees_key; ++e) sees_key = mask.any(e, q);
    if (sees_key) sink_sum -= std::exp(static_cast<double>(*p.sinks.at(b, h)) - lse) * delta;
  }
  if (g.dq.data != nullptr && row.first == row.end && !g.accumulate) {
    const int64_t size = static_cast<int64_t>(size_of(g.gradient_dtype));
    for (int64_t q = begin; q < end; ++q) std::memset(g.dq.at(b, q, h, size), 0, p.head_dim * size);
  }
  return sink_sum;
}

// The gradient of attn_bias: dscores before softcap, summed where the bias is broadcast. A pass of its own, as several
// heads may add to one element; it computes weights once more.
template <class T>
class AttnBiasKernel {
 public:
  AttnBiasKernel(const BackwardState& state, const BiasUnit& unit, Scratch& scratch)
      : state_(state), g_(*state.problem), p_(g_.forward), unit_(unit), pair_(state, scratch) {
    sums_ = scratch.take<float>(int64_t{p_.pattern.shape.block_q} * p_.pattern.shape.block_k);
  }
  static size_t ScratchBytes(const BackwardProblem& problem) {
    BackwardState state;
    state.problem = &problem;
    Scratch sizing(nullptr);
    AttnBiasKernel(state, BiasUnit{}, sizing);
    return sizing.used();
  }

  void Run() {
    const PatternShape& shape = p_.pattern.shape;
    const int64_t* size = g_.dattn_bias_size;
    const bool each_q = size[2] == p_.seqlen_q, each_k = size[3] == p_.seqlen_k;
    rows_ = each_q ? shape.query_end(unit_.i) - shape.query_begin(unit_.i) : 1;
    cols_ = each_k ? std::min<int64_t>(shape.block_k, p_.seqlen_k - unit_.j * shape.block_k) : 1;
    std::fill_n(sums_, rows_ * cols_, 0.0f);
    const auto range = [](bool all, int64_t one, int64_t n) { return all ? Interval{0, n} : Interval{one, one + 1}; };
    const Interval batches = range(size[0] != p_.batch, unit_.b, p_.batch);
    const Interval heads = range(size[1] != p_.heads, unit_.h, p_.heads);
    const Interval rows = range(!each_q, unit_.i, shape.rows()), cols = range(!each_k, unit_.j, shape.cols());
    for (int64_t b = batches.begin; b < batches.end; ++b) {
      for (int64_t h = heads.begin; h < heads.end; ++h) {
        for (int64_t j = cols.begin; j < cols.end; ++j) {
          for (int64_t i = rows.begin; i < rows.end; ++i) AddBlock(b, h, i, j, each_q, each_k);
        }
      }
    }
    const int64_t* stride = g_.dattn_bias_stride;
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t at = unit_.b * stride[0] + unit_.h * stride[1] +
                         ((each_q ? shape.query_begin(unit_.i) : 0) + r) * stride[2] +
                         unit_.j * shape.block_k * stride[3];
      for (int64_t c = 0; c < cols_; ++c) {
        store_from_double(g_.dattn_bias, g_.dattn_bias_dtype, at + c * stride[3], sums_[r * cols_ + c]);
      }
    }
  }

 private:
  struct Nothing {
    void Some() {}
  };

  void AddBlock(int64_t b, int64_t h, int64_t i, int64_t j, bool each_q, bool each_k) {
    const int64_t id = p_.pattern.row_id(b, h, i);
    const int32_t* first = p_.pattern.indices + p_.pattern.indptr[id];
    const int32_t* last = p_.pattern.indices + p_.pattern.indptr[id + 1];
    const int32_t* found = std::lower_bound(first, last, static_cast<int32_t>(j));
    if (found == last || *found != j || !state_.live(p_.mask(b), i, j)) return;
    const int64_t kv_head = h / p_.group(), block_k = p_.pattern.shape.block_k;
    pair_.LoadKeys(b, kv_head, j);
    pair_.LoadQueries(h, i);
    pair_.Open(found - p_.pattern.indices);
    Nothing nothing;
    for (int64_t begin = 0; begin < pair_.queries(); begin += kQueryChunk) {
      const ChunkRange chunk = pair_.Chunk(begin);
      pair_.ForPanels(chunk, [&](auto vecs, const KeyPanel& panel) {
        pair_.template Cell<vecs()>(chunk, panel, Dscores::of_bias, nothing);
        const int64_t keys = std::min(panel.width(), pair_.keys() - panel.first);
        for (int64_t r = 0; r < chunk.rows(); ++r) {
          const float* dscores = pair_.dscore_floats() + r * block_k + panel.first;
          float* to = sums_ + (each_q ? chunk.begin + r : 0) * cols_ + (each_k ? panel.first : 0);
          for (int64_t k = 0; k < keys; ++k) to[each_k ? k : 0] += dscores[k];
        }
      });
    }
  }

  const BackwardState& state_;
  const BackwardProblem& g_;
  const Problem& p_;
  const BiasUnit& unit_;
  BlockPair<T> pair_;
  int64_t rows_ = 0, cols_ = 0;
  float* sums_ = nullptr;  // [rows][cols] of the unit
};

}  // namespace tessera::cpu::TESSERA_KERNELS
HWY_AFTER_NAMESPACE();
#endif
