// Decode: a few query rows (Sq <= 16, times the heads that share a kv head) against many keys. Reading K and V is the
// cost, so each row of them comes from memory once and meets all its query rows while it is in cache.
//
// A unit reads K of all its keys, then does the softmax of all their scores, then reads V: each change from one to the
// other stops the stream from memory for about a microsecond (changes every 64 KB: 27 GB/s on one Zen 4 core, every
// 256 KB: 29, none: 33). Scores lie flat, [key][row], so that a query row is a lane (or a vector of lanes).
#if defined(TESSERA_CPU_DECODE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TESSERA_CPU_DECODE_INL_H_
#undef TESSERA_CPU_DECODE_INL_H_
#else
#define TESSERA_CPU_DECODE_INL_H_
#endif

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/decode_tile-inl.h"
#include "cpu/kernel_table.h"
#include "cpu/modify-inl.h"
#include "cpu/scratch.h"

HWY_BEFORE_NAMESPACE();
namespace tessera::cpu::TESSERA_KERNELS {

template <class T>
class DecodeKernel {
  static constexpr int kTile = 32;                // keys, at most
  static constexpr int64_t kRoundScores = 16384;  // scores between two softmaxes (64 KB), or one tile
  static constexpr int kMaxTiles = 128;           // of a round
  static constexpr bool kNativeDot = TESSERA_BF16_DOT && std::is_same_v<T, bfloat16>;
  using Query = std::conditional_t<kNativeDot, T, float>;

  // Keys of one entry that lie side by side. Their scores start at `slot` of the round.
  struct Tile {
    int64_t entry = 0, k = 0, keys = 0;
    int64_t slot = 0;
  };

 public:
  static size_t ScratchBytes(const Problem& p) {
    Scratch sizing(nullptr);
    DecodeKernel(p, DecodeUnit{0, 0, p.heads, 0, 0}, DecodePartial{}, sizing);
    return sizing.used();
  }

  DecodeKernel(const Problem& p, const DecodeUnit& unit, const DecodePartial& partial, Scratch& scratch)
      : p_(p), unit_(unit), partial_(partial), mask_(p, unit.batch) {
    rows_ = (unit.head_end - unit.head_begin) * p.seqlen_q;
    kv_rows_ = std::min(p.group(), unit.head_end - unit.head_begin) * p.seqlen_q;
    kv_begin_ = unit.head_begin / p.group();
    kv_heads_ = rows_ / kv_rows_;
    d_ = hwy::RoundUpTo(p.head_dim, kPerVec<Query>);
    dv_ = hwy::RoundUpTo(p.head_dim_v, kPerVec<Query>);
    row_slots_ = rows_ > kLanes ? hwy::RoundUpTo(rows_, kLanes) : std::bit_ceil(static_cast<uint64_t>(rows_));
    width_ = std::max<int64_t>(row_slots_, kLanes);
    key_step_ = width_ / row_slots_ * (kNativeDot ? 2 : 1);
    round_slots_ = std::max(kTile * row_slots_, kRoundScores);
    q_ = scratch.take<Query>(rows_ * d_);
    out_ = scratch.take<float>(rows_ * dv_);
    scores_ = scratch.take<float>(round_slots_);
    tiles_ = scratch.take<Tile>(kMaxTiles);
    lanes_ = scratch.take<float>(4 * width_);
    k_rows_ = scratch.take<T>(kTile * d_);
    v_rows_ = scratch.take<T>(kTile * dv_);
    factor_ = kNativeDot ? static_cast<float>(p.scale * kLog2eDouble) : 1.0f;
    modifies_ = ScoreTerms::any(p) || factor_ == 0.0f;  // -inf * 0 must not arise
    // Rows of two-byte numbers are computed too fast for the hardware to keep ahead (Zen 5: 1.50 -> 1.15 ms a step of
    // 16,384 keys, 8 kv heads, D = 128 in bf16); fp32 rows it fetches best by itself (2.9; told to: 3.6).
    follows_k_ = sizeof(T) == 4 && p.k.seq == p.head_dim;
    follows_v_ = sizeof(T) == 4 && p.v.seq == p.head_dim_v;
  }

  void Run(const DecodeUnit* next) {
    Start();
    Tile tile = First(unit_, mask_, unit_.entry_begin);
    while (tile.keys > 0) {
      int64_t slots = 0;
      num_tiles_ = 0;
      for (; tile.keys > 0 && num_tiles_ < kMaxTiles && slots + Slots(tile) <= round_slots_; tile = After(tile)) {
        tile.slot = slots;
        slots += Slots(tile);
        tiles_[num_tiles_++] = tile;
      }
      RunRound(slots, tile.keys > 0 ? Fetch(p_.k, unit_, tile) : FirstOf(next));
    }
    for (int64_t r = 0; r < rows_; ++r) std::copy_n(out_ + r * dv_, p_.head_dim_v, partial_.out + r * p_.head_dim_v);
  }

 private:
  void Start() {
    // With the native dot queries keep their bits, but for a sign: the factor of scores must not be negative.
    const float scale = static_cast<float>(p_.scale * kLog2eDouble);
    for (int64_t r = 0; r < rows_; ++r) {
      const T* q = reinterpret_cast<const T*>(
          p_.q.at(unit_.batch, r % p_.seqlen_q, unit_.head_begin + r / p_.seqlen_q, sizeof(T)));
      Query* row = q_ + r * d_;
      if constexpr (kNativeDot) {
        std::memcpy(row, q, p_.head_dim * sizeof(T));
        std::memset(row + p_.head_dim, 0, (d_ - p_.head_dim) * sizeof(T));
        if (scale < 0) {
          for (int64_t i = 0; i < p_.head_dim; ++i) row[i].bits ^= 0x8000;
        }
      } else {
        RowToFloat(q, p_.head_dim, row);
        for (int64_t i = 0; i < p_.head_dim; ++i) row[i] *= scale;
        std::fill(row + p_.head_dim, row + d_, 0.0f);
      }
    }
    if constexpr (kNativeDot) {
      factor_ = std::abs(scale);
      // Where the two keys of a pair stand among the scores of two vectors.
      const int64_t n = std::min<int64_t>(row_slots_, kLanes);
      for (int64_t i = 0; i < kLanes; ++i) {
        pairs_[2 * i] = static_cast<uint16_t>(i / n * 2 * n + i % n);
        pairs_[2 * i + 1] = static_cast<uint16_t>(pairs_[2 * i] + n);
      }
    }
    std::fill_n(out_, rows_ * dv_, 0.0f);
    std::fill_n(partial_.state, rows_, RowState{kNoScore, 0.0f, 0.0f});
  }

  Tile First(const DecodeUnit& unit, const PairMask& mask, int64_t entry) const {
    for (; entry < unit.entry_end; ++entry) {
      const Interval keys = mask.keys(entry, 0, p_.seqlen_q);
      if (!keys.empty()) return {entry, keys.begin, std::min<int64_t>(kTile, keys.size())};
    }
    return {};
  }
  Tile After(const Tile& t) const {
    const int64_t k = t.k + t.keys, end = mask_.keys(t.entry, 0, p_.seqlen_q).end;
    if (k < end) return {t.entry, k, std::min<int64_t>(kTile, end - k)};
    return First(unit_, mask_, t.entry + 1);
  }
  int64_t Slots(const Tile& t) const { return hwy::RoundUpTo(t.keys, key_step_) * row_slots_; }

  const char* Row(const Strided& t, const DecodeUnit& unit, int64_t k, int64_t kv) const {
    const int64_t block = p_.pattern.shape.block_k;
    const char* first = &t == &p_.k ? p_.k_block(unit.batch, k / block, kv) : p_.v_block(unit.batch, k / block, kv);
    return first + (k % block) * t.seq * static_cast<int64_t>(sizeof(T));
  }

  // The rows of a tile, all kv heads of a unit (if several, they lie side by side).
  Ahead Fetch(const Strided& t, const DecodeUnit& unit, const Tile& tile) const {
    const int64_t size = sizeof(T), dim = &t == &p_.k ? p_.head_dim : p_.head_dim_v;
    return {Row(t, unit, tile.k, unit.head_begin / p_.group()), t.seq * size, kv_heads_ * dim * size, tile.keys};
  }
  Ahead FirstOf(const DecodeUnit* next) const {
    if (next == nullptr) return {};
    const Tile tile = First(*next, PairMask(p_, next->batch), next->entry_begin);
    return tile.keys > 0 ? Fetch(p_.k, *next, tile) : Ahead();
  }

  Ahead FetchNext(const Strided& t, bool follows, int64_t i) const {
    const Tile &tile = tiles_[i], &next = tiles_[i + 1];
    if (follows) {
      const char* end = Row(t, unit_, tile.k, kv_begin_) + tile.keys * t.seq * static_cast<int64_t>(sizeof(T));
      if (Row(t, unit_, next.k, kv_begin_) == end) return Ahead();
    }
    return Fetch(t, unit_, next);
  }

  // `after` is what is read after the round.
  void RunRound(int64_t slots, const Ahead& after) {
    // Where the hardware fetches rows by itself, all but the first ones of K, of V and of each page or block that does
    // not lie behind the last.
    for (int64_t i = 0; i < num_tiles_; ++i) {
      const bool last = i + 1 == num_tiles_;
      Ahead ahead = last ? Fetch(p_.v, unit_, tiles_[0]) : FetchNext(p_.k, follows_k_, i);
      for (int64_t kv = 0; kv < kv_heads_; ++kv) TileScores(tiles_[i], kv, ahead);
      FinishScores(tiles_[i]);
    }
    Softmax(slots);
    if (p_.dropout.p > 0) {
      for (int64_t i = 0; i < num_tiles_; ++i) Drop(tiles_[i]);
    }
    for (int64_t i = 0; i < num_tiles_; ++i) {
      const bool last = i + 1 == num_tiles_;
      Ahead ahead = last ? after : FetchNext(p_.v, follows_v_, i);
      for (int64_t kv = 0; kv < kv_heads_; ++kv) TileValues(tiles_[i], kv, ahead);
    }
  }

  // Rows that vectors can read whole: in place, or copied with zeros behind.
  const T* Padded(const T* from, int64_t stride, int64_t keys, int64_t n, int64_t padded, T* rows) const {
    if (n == padded) return from;
    for (int64_t j = 0; j < keys; ++j) {
      std::memcpy(rows + j * padded, from + j * stride, n * sizeof(T));
      std::memset(rows + j * padded + n, 0, (padded - n) * sizeof(T));
    }
    return rows;
  }

  void TileScores(const Tile& tile, int64_t kv, Ahead& ahead) {
    const T* from = reinterpret_cast<const T*>(Row(p_.k, unit_, tile.k, kv_begin_ + kv));
    const T* k = Padded(from, p_.k.seq, tile.keys, p_.head_dim, d_, k_rows_);
    const int64_t stride = k == from ? p_.k.seq : d_;
    const Query* q = q_ + kv * kv_rows_ * d_;
    float* s = scores_ + tile.slot + kv * kv_rows_;
    ByRows<kScoreRows>(kv_rows_, [&](auto rows) HWY_ATTR {
      ByVecs(d_ / kPerVec<Query>, [&](auto vecs) HWY_ATTR {
        ScoresFromMemory<rows(), vecs()>(q, d_, d_, k, stride, tile.keys, ahead, s, row_slots_);
      });
    });
    for (int64_t r = kScoreRows; r < kv_rows_; r += kScoreRows) {
      ByRows<kScoreRows>(kv_rows_ - r, [&](auto rows) HWY_ATTR {
        ScoresInCache<rows()>(q + r * d_, d_, d_, k, stride, tile.keys, s + r, row_slots_);
      });
    }
  }

  // Calls body(integral_constant<int, min(rows, kMost)>).
  template <int kMost, class Body>
  static HWY_INLINE void ByRows(int64_t rows, Body body) {
    if (rows >= kMost) return body(std::integral_constant<int, kMost>());
    if constexpr (kMost > 1) ByRows<kMost - 1>(rows, body);
  }

  // Calls body(integral_constant<int, N>) for rows of N vectors; 0 where N is none of those that are unrolled whole.
  template <class Body>
  static HWY_INLINE void ByVecs(int64_t vecs, Body body) {
    switch (vecs) {
      case 2: return body(std::integral_constant<int, 2>());
      case 4: return body(std::integral_constant<int, 4>());
      case 8: return body(std::integral_constant<int, 8>());
      case 16: return body(std::integral_constant<int, 16>());
      default: return body(std::integral_constant<int, 0>());
    }
  }

  bool Masked(const Tile& tile) const { return !mask_.full(tile.entry, 0, p_.seqlen_q, {tile.k, tile.k + tile.keys}); }
  // Keys of a tile that a query row admits, as bits.
  uint64_t Admitted(const Tile& tile, int64_t row) const {
    return mask_.bits(tile.entry, row % p_.seqlen_q, tile.k, tile.keys);
  }

  // All that happens to scores before the softmax: softcap and biases, masks, and -inf behind the last key.
  void FinishScores(const Tile& tile) {
    float* s = scores_ + tile.slot;
    if (modifies_) ModifyTile(tile, s);
    if (Masked(tile)) {
      for (int64_t r = 0; r < rows_; ++r) {
        const uint64_t admitted = Admitted(tile, r);
        for (int64_t j = 0; j < tile.keys; ++j) {
          if (!(admitted >> j & 1)) s[j * row_slots_ + r] = kNegInf;
        }
      }
    }
    std::fill(s + tile.keys * row_slots_, s + Slots(tile), kNegInf);
  }

  // ModifyScores where lanes are rows of several heads, and keys of them where rows are few.
  void ModifyTile(const Tile& tile, float* s) {
    const Floats d;
    const auto terms_of = [&](int64_t row) {
      return ScoreTerms(p_, unit_.batch, unit_.head_begin + row / p_.seqlen_q);
    };
    LaneScores lanes(terms_of(0), tile.entry, factor_);
    float *slope = lanes_, *shift = lanes_ + width_, *distance = lanes_ + 2 * width_;  // of the first width_ slots
    for (int64_t lane = 0; lane < width_; ++lane) {
      const int64_t row = std::min(lane % row_slots_, rows_ - 1);
      const ScoreTerms terms = terms_of(row);
      slope[lane] = LaneScores::Slope(terms);
      shift[lane] = BiasInLog2(terms.shift(tile.entry));
      distance[lane] = static_cast<float>(row % p_.seqlen_q + terms.diagonal - tile.k - lane / row_slots_);
    }
    Vec derivative;
    for (int64_t key = 0; key * row_slots_ < Slots(tile); key += width_ / row_slots_) {
      for (int64_t lane = 0; lane < width_; lane += kLanes) {
        float* x = s + key * row_slots_ + lane;
        lanes.slope = hn::Load(d, slope + lane);
        lanes.shift = hn::Load(d, shift + lane);
        const Vec gap = hn::Sub(hn::Load(d, distance + lane), hn::Set(d, static_cast<float>(key)));
        hn::Store(lanes.Score(hn::Load(d, x), gap, derivative), d, x);
      }
    }
    for (int64_t row = 0; row < rows_ && terms_of(0).has_bias; ++row) {
      float bias[kTile];
      LoadBiasRow(p_, terms_of(row), row % p_.seqlen_q, tile.k, tile.keys, bias);
      for (int64_t j = 0; j < tile.keys; ++j) s[j * row_slots_ + row] += bias[j];
    }
  }

  // Scores of the round to weights, with the softmax state of the rows. References move as in softmax-inl.h.
  void Softmax(int64_t slots) {
    const float factor = modifies_ ? 1.0f : factor_;
    float *max = lanes_, *reference = lanes_ + width_, *sum = lanes_ + 2 * width_, *used = lanes_ + 3 * width_;
    MaxOfLanes(scores_, slots, width_, max);
    for (int64_t r = 0; r < rows_; ++r) {
      float top = max[r];
      for (int64_t lane = r + row_slots_; lane < width_; lane += row_slots_) top = std::max(top, max[lane]);
      Raise(r, top * factor);
    }
    for (int64_t lane = 0; lane < width_; ++lane) {
      reference[lane] = lane % row_slots_ < rows_ ? partial_.state[lane % row_slots_].reference : 0.0f;
    }
    if constexpr (kNativeDot) {
#if TESSERA_BF16_DOT
      PairWeightsOfLanes(scores_, slots, width_, factor, pairs_, reference, sum, used);
#endif
    } else {
      WeightsOfLanes(scores_, slots, width_, factor, reference, sum);
      used = sum;
    }
    for (int64_t lane = 0; lane < width_; ++lane) {
      const int64_t row = lane % row_slots_;
      if (row >= rows_) continue;
      partial_.state[row].sum += sum[lane];
      partial_.state[row].used += used[lane];
    }
  }
  void Raise(int64_t row, float max) {
    RowState& state = partial_.state[row];
    if (!(max > state.reference + kRescaleThreshold)) return;
    const Floats d;
    const Vec a = hn::Set(d, state.cover(std::ceil(max)));
    float* out = out_ + row * dv_;
    for (int64_t c = 0; c < dv_; c += kLanes) hn::Store(hn::Mul(hn::Load(d, out + c), a), d, out + c);
  }

  // The weight of key j of a tile as V meets it.
  Query& WeightAt(const Tile& tile, int64_t j, int64_t row) const {
    if constexpr (kNativeDot) {
      return reinterpret_cast<Query*>(scores_)[tile.slot + (j / 2 * row_slots_ + row) * 2 + j % 2];
    } else {
      return scores_[tile.slot + j * row_slots_ + row];
    }
  }

  void Drop(const Tile& tile) {
    const uint32_t threshold = drop_threshold(p_.dropout.p);
    for (int64_t r = 0; r < rows_; ++r) {
      const uint64_t stream = p_.dropout_stream(unit_.batch, unit_.head_begin + r / p_.seqlen_q);
      const int64_t q = p_.dropout_q(r % p_.seqlen_q);
      for (int64_t j = 0; j < tile.keys; ++j) {
        if (dropout_random(p_.dropout, stream, q, p_.dropout_k(tile.k + j)) < threshold) {
          WeightAt(tile, j, r) = Query{};
        }
      }
    }
  }

  void TileValues(const Tile& tile, int64_t kv, Ahead& ahead) {
    const T* from = reinterpret_cast<const T*>(Row(p_.v, unit_, tile.k, kv_begin_ + kv));
    if (Masked(tile) && NonFinite(from, tile.keys)) {
      AddValuesMasked(tile, kv, from);
      return;
    }
    const T* v = Padded(from, p_.v.seq, tile.keys, p_.head_dim_v, dv_, v_rows_);
    const int64_t stride = v == from ? p_.v.seq : dv_;
    const auto* weights = reinterpret_cast<const typename Values<T>::Weight*>(&WeightAt(tile, 0, kv * kv_rows_));
    float* out = out_ + kv * kv_rows_ * dv_;
    ByRows<kScoreRows>(kv_rows_, [&](auto rows) HWY_ATTR {
      ByVecs(dv_ / kLanes, [&](auto vecs) HWY_ATTR {
        AddValues<rows(), vecs(), true>(weights, row_slots_, tile.keys, v, stride, follows_v_, ahead, out, dv_);
      });
    });
    for (int64_t r = kScoreRows; r < kv_rows_; r += kScoreRows) {
      ByRows<kScoreRows>(kv_rows_ - r, [&](auto rows) HWY_ATTR {
        Ahead none;
        AddValues<rows(), 0, false>(weights + r, row_slots_, tile.keys, v, stride, false, none, out + r * dv_, dv_);
      });
    }
  }

  bool NonFinite(const T* v, int64_t keys) const {
    for (int64_t j = 0; j < keys; ++j) {
      if (AnyNonFinite(v + j * p_.v.seq, p_.head_dim_v)) return true;
    }
    return false;
  }

  void AddValuesMasked(const Tile& tile, int64_t kv, const T* v) {
    for (int64_t row = kv * kv_rows_; row < (kv + 1) * kv_rows_; ++row) {
      float* out = out_ + row * dv_;
      const uint64_t admitted = Admitted(tile, row);
      for (int64_t j = 0; j < tile.keys; ++j) {
        if (!(admitted >> j & 1)) continue;
        const float w = ToFloat(WeightAt(tile, j, row));
        for (int64_t c = 0; c < p_.head_dim_v; ++c) out[c] += w * ToFloat(v[j * p_.v.seq + c]);
      }
    }
  }

  const Problem& p_;
  const DecodeUnit& unit_;
  const DecodePartial& partial_;
  const PairMask mask_;
  int64_t rows_ = 0;     // query rows of the unit: (kv head, head of the group, query)
  int64_t kv_rows_ = 0;  // of one kv head
  int64_t kv_begin_ = 0, kv_heads_ = 0;
  int64_t d_ = 0, dv_ = 0;
  int64_t row_slots_ = 0;  // scores of a key: rows_, up to a power of two or a multiple of kLanes
  int64_t width_ = 0;      // lanes after which rows repeat
  int64_t key_step_ = 0;   // a tile's scores are padded to this many keys: whole vectors, or pairs of them
  int64_t round_slots_ = 0;
  int64_t num_tiles_ = 0;
  bool modifies_ = false;
  bool follows_k_ = false, follows_v_ = false;  // a row lies right behind the one before
  float factor_ = 1;
  Query* q_ = nullptr;       // [rows, d_]
  float* out_ = nullptr;     // [rows, dv_]
  float* scores_ = nullptr;  // [keys of the round][row_slots_]; then weights, or bf16 pairs [keys / 2][row_slots_]
  Tile* tiles_ = nullptr;    // of the round
  float* lanes_ = nullptr;   // [4, width_]
  T* k_rows_ = nullptr;      // [kTile, d_]
  T* v_rows_ = nullptr;      // [kTile, dv_]
  alignas(64) uint16_t pairs_[2 * kLanes];
};

}  // namespace tessera::cpu::TESSERA_KERNELS
HWY_AFTER_NAMESPACE();
#endif
