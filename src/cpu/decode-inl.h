// Decode: a few query rows (Sq <= 16, times the heads that share a kv head) against many keys. Reading K and V is the
// cost, so each row of them comes from memory once and meets all its query rows while it is in cache. Vectors run along
// the head dimension here; scores of four keys times up to four rows are reduced together.
//
// Tiles are pulled into the cache by one load a line, in the order of memory, before they are used: this is what the
// hardware's prefetchers follow. (32/8 heads, D = 128, 16,384 keys on two Zen 4 cores, GB/s: loads as the tiles come
// 17, software prefetch a tile ahead 17 to 21, pulled 21 to 25.)
#if defined(TESSERA_CPU_DECODE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TESSERA_CPU_DECODE_INL_H_
#undef TESSERA_CPU_DECODE_INL_H_
#else
#define TESSERA_CPU_DECODE_INL_H_
#endif

#include <algorithm>
#include <cmath>

#include "cpu/convert-inl.h"
#include "cpu/kernel_table.h"
#include "cpu/modify-inl.h"
#include "cpu/scratch.h"
#include "hwy/cache_control.h"

HWY_BEFORE_NAMESPACE();
namespace tessera::cpu::TESSERA_KERNELS {

// The sum of a vector's 128-bit blocks.
HWY_INLINE hn::Vec<Four> SumOfBlocks(Four, hn::Vec<Four> v) { return v; }
template <class D>
HWY_INLINE hn::Vec<Four> SumOfBlocks(D, hn::Vec<D> v) {
  const hn::Half<D> half;
  return SumOfBlocks(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)));
}

// Sums over all lanes of four vectors.
HWY_INLINE hn::Vec<Four> SumsOf4(Vec a, Vec b, Vec c, Vec e) {
  const Floats d;
  const hn::Repartition<double, Floats> dd;
  const Vec ab = hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b));
  const Vec ce = hn::Add(hn::InterleaveLower(d, c, e), hn::InterleaveUpper(d, c, e));
  const auto x = hn::BitCast(dd, ab), y = hn::BitCast(dd, ce);
  const Vec lower = hn::BitCast(d, hn::InterleaveLower(dd, x, y));
  const Vec upper = hn::BitCast(d, hn::InterleaveUpper(dd, x, y));
  return SumOfBlocks(d, hn::Add(lower, upper));
}

// Rows of the current tile that are prefetched again a few lines at a time: where heads lie side by side they were
// pulled together and may have left L1.
struct FetchRows {
  const char* row = nullptr;
  int64_t stride = 0, bytes = 0;  // of a row
  int64_t at = 0;

  HWY_INLINE void FourLines() {
    for (int i = 0; i < 256; i += 64) hwy::Prefetch(row + at + i);
    at += 256;
    if (at >= bytes) {
      at = 0;
      row += stride;
    }
  }
};

// scores[r * stride + j] = q row r . k row j, for R rows and 4 keys; n is a multiple of kLanes.
template <int R, class T>
HWY_INLINE void Dots(const float* HWY_RESTRICT q, int64_t q_stride, int64_t n, const T* const* k,
                     FetchRows fetch, float* HWY_RESTRICT scores, int64_t stride) {
  const Floats d;
  Vec acc[R][4];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) acc[r][j] = hn::Zero(d);
  const T *k0 = k[0], *k1 = k[1], *k2 = k[2], *k3 = k[3];
  for (int64_t i = 0; i < n; i += kLanes) {
    fetch.FourLines();
    const Vec a0 = LoadFloats(k0 + i), a1 = LoadFloats(k1 + i), a2 = LoadFloats(k2 + i), a3 = LoadFloats(k3 + i);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec x = hn::Load(d, q + r * q_stride + i);
      acc[r][0] = hn::MulAdd(x, a0, acc[r][0]);
      acc[r][1] = hn::MulAdd(x, a1, acc[r][1]);
      acc[r][2] = hn::MulAdd(x, a2, acc[r][2]);
      acc[r][3] = hn::MulAdd(x, a3, acc[r][3]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    hn::StoreU(SumsOf4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]), Four(), scores + r * stride);
  }
}

#if TESSERA_BF16_DOT
// The same with native dots: q rows hold bf16 too; n is a multiple of 2 * kLanes.
template <int R>
HWY_INLINE void DotsBf16(const bfloat16* HWY_RESTRICT q, int64_t q_stride, int64_t n, const bfloat16* const* k,
                         FetchRows fetch, float* HWY_RESTRICT scores, int64_t stride) {
  const Floats d;
  Vec acc[R][4];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) acc[r][j] = hn::Zero(d);
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    fetch.FourLines();
    __m512i a[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) a[j] = _mm512_loadu_si512(k[j] + i);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m512i x = _mm512_load_si512(q + r * q_stride + i);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) acc[r][j] = Vec{_mm512_dpbf16_ps(acc[r][j].raw, (__m512bh)x, (__m512bh)a[j])};
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    hn::StoreU(SumsOf4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]), Four(), scores + r * stride);
  }
}
#endif

// out[r][c .. c + C * kLanes) += sum over keys of weights[r][key] * v[key]; R rows.
template <int R, int C, class T>
HWY_INLINE void AddValues(const float* HWY_RESTRICT weights, int64_t stride, int64_t keys, const T* HWY_RESTRICT v,
                          int64_t v_stride, const FetchRows& fetch, float* HWY_RESTRICT out, int64_t out_stride) {
  const Floats d;
  Vec acc[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[r][c] = hn::Load(d, out + r * out_stride + c * kLanes);
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t i = 0; i < fetch.bytes; i += 64) hwy::Prefetch(fetch.row + j * fetch.stride + i);
    Vec x[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) x[c] = LoadFloats(v + j * v_stride + c * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec w = hn::Set(d, weights[r * stride + j]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] = hn::MulAdd(w, x[c], acc[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) hn::Store(acc[r][c], d, out + r * out_stride + c * kLanes);
}

template <class T>
class DecodeKernel {
  static constexpr int kTile = 16;   // keys
  static constexpr int kRows = 4;    // query rows that meet a K row at once
  static constexpr int kVecs = 4;    // accumulator vectors a row
  static constexpr bool kNativeDot = TESSERA_BF16_DOT && std::is_same_v<T, bfloat16>;

  struct Tile {
    int64_t entry = 0, k = 0, keys = 0;
  };

 public:
  static size_t ScratchBytes(const Problem& p) {
    Scratch sizing(nullptr);
    DecodeKernel(p, DecodeUnit{0, 0, p.heads, 0, 0}, DecodePartial{}, sizing);
    return sizing.used();
  }

  DecodeKernel(const Problem& p, const DecodeUnit& unit, const DecodePartial& partial, Scratch& scratch)
      : p_(p), unit_(unit), partial_(partial), mask_(p.mask(unit.batch)) {
    rows_ = (unit.head_end - unit.head_begin) * p.seqlen_q;
    kv_rows_ = std::min(p.group(), unit.head_end - unit.head_begin) * p.seqlen_q;
    d_ = hwy::RoundUpTo(p.head_dim, kNativeDot ? 2 * kLanes : kLanes);
    dv_ = hwy::RoundUpTo(p.head_dim_v, kLanes);
    q_ = scratch.take<float>(rows_ * d_);
    out_ = scratch.take<float>(rows_ * dv_);
    scores_ = scratch.take<float>(kv_rows_ * kTile);
    k_rows_ = scratch.take<T>(kTile * d_);
    v_rows_ = scratch.take<T>(kTile * dv_);
    factor_ = kNativeDot ? static_cast<float>(p.scale * kLog2eDouble) : 1.0f;
  }

  void Run() {
    Start();
    const int64_t kv_begin = unit_.head_begin / p_.group(), kv_end = (unit_.head_end - 1) / p_.group() + 1;
    for (Tile tile = First(unit_.entry_begin); tile.keys > 0; tile = After(tile)) {
      if (kv_end - kv_begin > 1) {  // heads lie side by side: all of them at once
        Pull(p_.k, tile, kv_begin, (kv_end - kv_begin) * p_.head_dim);
        Pull(p_.v, tile, kv_begin, (kv_end - kv_begin) * p_.head_dim_v);
      }
      for (int64_t kv = kv_begin; kv < kv_end; ++kv) {
        RunTile(tile, kv, (kv - kv_begin) * kv_rows_, kv_end - kv_begin == 1);
      }
    }
    for (int64_t r = 0; r < rows_; ++r) std::copy_n(out_ + r * dv_, p_.head_dim_v, partial_.out + r * p_.head_dim_v);
  }

 private:
  void Start() {
    for (int64_t r = 0; r < rows_; ++r) {
      const T* q = reinterpret_cast<const T*>(
          p_.q.at(unit_.batch, r % p_.seqlen_q, unit_.head_begin + r / p_.seqlen_q, sizeof(T)));
      if constexpr (kNativeDot) {
        T* row = reinterpret_cast<T*>(q_) + r * d_;
        std::memset(row, 0, d_ * sizeof(T));
        std::memcpy(row, q, p_.head_dim * sizeof(T));
      } else {
        float* row = q_ + r * d_;
        RowToFloat(q, p_.head_dim, row);
        const float scale = static_cast<float>(p_.scale * kLog2eDouble);
        for (int64_t i = 0; i < p_.head_dim; ++i) row[i] *= scale;
        std::fill(row + p_.head_dim, row + d_, 0.0f);
      }
    }
    std::fill_n(out_, rows_ * dv_, 0.0f);
    std::fill_n(partial_.max, rows_, kNoScore);
    std::fill_n(partial_.sum, rows_, 0.0f);
  }

  // Keys of an entry that some query row admits.
  Interval Keys(int64_t entry) const {
    const int64_t begin = int64_t{p_.pattern.indices[entry]} * p_.pattern.shape.block_k;
    const int64_t end = std::min(begin + p_.pattern.shape.block_k, p_.seqlen_k);
    return {std::max(begin, mask_.keys_of(0, p_.seqlen_k).begin),
            std::min(end, mask_.keys_of(p_.seqlen_q - 1, p_.seqlen_k).end)};
  }
  Tile First(int64_t entry) const {
    for (; entry < unit_.entry_end; ++entry) {
      const Interval keys = Keys(entry);
      if (!keys.empty()) return {entry, keys.begin, std::min<int64_t>(kTile, keys.size())};
    }
    return {};
  }
  Tile After(const Tile& t) const {
    const int64_t k = t.k + t.keys, end = Keys(t.entry).end;
    if (k < end) return {t.entry, k, std::min<int64_t>(kTile, end - k)};
    return First(t.entry + 1);
  }

  const T* Row(const Strided& t, int64_t k, int64_t kv) const {
    const int64_t block = p_.pattern.shape.block_k;
    const char* first = &t == &p_.k ? p_.k_block(unit_.batch, k / block, kv) : p_.v_block(unit_.batch, k / block, kv);
    return reinterpret_cast<const T*>(first) + (k % block) * t.seq;
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

  // Touches every cache line of `elements` from each row of the tile.
  void Pull(const Strided& t, const Tile& tile, int64_t kv, int64_t elements) const {
    using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
    constexpr int64_t kStep = 64 / sizeof(Word);
    const Word* row = reinterpret_cast<const Word*>(Row(t, tile.k, kv));
    Word sum = 0;
    for (int64_t j = 0; j < tile.keys; ++j, row += t.seq) {
      for (int64_t i = 0; i < elements; i += kStep) sum += *const_cast<const volatile Word*>(row + i);
    }
    asm volatile("" : : "r"(sum));  // the sum is for keeping: without it the loads ran a fifth slower
  }

  void RunTile(const Tile& tile, int64_t kv, int64_t first_row, bool pull) {
    const T* k = Row(p_.k, tile.k, kv);
    const T* v = Row(p_.v, tile.k, kv);
    if (pull) Pull(p_.k, tile, kv, p_.head_dim);
    const T* k_rows = Padded(k, p_.k.seq, tile.keys, p_.head_dim, d_, k_rows_);
    const int64_t k_stride = k_rows == k ? p_.k.seq : d_;
    for (int64_t r = 0; r < kv_rows_; r += kRows) {
      const int64_t n = std::min<int64_t>(kRows, kv_rows_ - r);
      for (int64_t j = 0; j < tile.keys; j += 4) {
        const T* rows[4];
        for (int64_t i = 0; i < 4; ++i) rows[i] = k_rows + std::min(j + i, tile.keys - 1) * k_stride;
        DotsOf(n, first_row + r, rows, FetchOf(k + j * p_.k.seq, p_.k.seq, p_.head_dim), scores_ + r * kTile + j);
      }
    }
    const bool masked = p_.pattern.bitmap(tile.entry) != nullptr ||
                        mask_.classify(0, p_.seqlen_q, tile.k, tile.k + tile.keys) != TileKind::full;
    for (int64_t r = 0; r < kv_rows_; ++r) RowWeights(tile, first_row + r, scores_ + r * kTile, masked);
    if (masked && NonFinite(v, tile.keys)) {
      AddValuesMasked(tile, first_row, v);
      return;
    }
    if (pull) Pull(p_.v, tile, kv, p_.head_dim_v);
    const T* v_rows = Padded(v, p_.v.seq, tile.keys, p_.head_dim_v, dv_, v_rows_);
    const int64_t v_stride = v_rows == v ? p_.v.seq : dv_;
    for (int64_t r = 0; r < kv_rows_; r += kRows) {
      const int64_t n = std::min<int64_t>(kRows, kv_rows_ - r);
      const FetchRows fetch = r == 0 ? FetchOf(v, p_.v.seq, p_.head_dim_v) : FetchRows{};
      ValuesOf(n, scores_ + r * kTile, tile.keys, v_rows, v_stride, fetch, out_ + (first_row + r) * dv_);
    }
  }

  static FetchRows FetchOf(const T* rows, int64_t stride, int64_t n) {
    return {reinterpret_cast<const char*>(rows), stride * static_cast<int64_t>(sizeof(T)),
            n * static_cast<int64_t>(sizeof(T))};
  }

  void DotsOf(int64_t n, int64_t row, const T* const* k, const FetchRows& fetch, float* scores) const {
#if TESSERA_BF16_DOT
    if constexpr (kNativeDot) {
      const bfloat16* q = reinterpret_cast<const bfloat16*>(q_) + row * d_;
      switch (n) {
        case 1: DotsBf16<1>(q, d_, d_, k, fetch, scores, kTile); break;
        case 2: DotsBf16<2>(q, d_, d_, k, fetch, scores, kTile); break;
        case 3: DotsBf16<3>(q, d_, d_, k, fetch, scores, kTile); break;
        default: DotsBf16<4>(q, d_, d_, k, fetch, scores, kTile); break;
      }
      return;
    }
#endif
    const float* q = q_ + row * d_;
    switch (n) {
      case 1: Dots<1>(q, d_, d_, k, fetch, scores, kTile); break;
      case 2: Dots<2>(q, d_, d_, k, fetch, scores, kTile); break;
      case 3: Dots<3>(q, d_, d_, k, fetch, scores, kTile); break;
      default: Dots<4>(q, d_, d_, k, fetch, scores, kTile); break;
    }
  }

  void ValuesOf(int64_t n, const float* weights, int64_t keys, const T* v, int64_t v_stride, const FetchRows& fetch,
                float* out) const {
    switch (n) {
      case 1: ValueColumns<1>(weights, keys, v, v_stride, fetch, out); break;
      case 2: ValueColumns<2>(weights, keys, v, v_stride, fetch, out); break;
      case 3: ValueColumns<3>(weights, keys, v, v_stride, fetch, out); break;
      default: ValueColumns<4>(weights, keys, v, v_stride, fetch, out); break;
    }
  }
  template <int R>
  void ValueColumns(const float* weights, int64_t keys, const T* v, int64_t v_stride, const FetchRows& fetch,
                    float* out) const {
    int64_t c = 0;
    for (; c + kVecs * kLanes <= dv_; c += kVecs * kLanes) {
      AddValues<R, kVecs>(weights, kTile, keys, v + c, v_stride, c == 0 ? fetch : FetchRows{}, out + c, dv_);
    }
    for (; c < dv_; c += kLanes) {
      AddValues<R, 1>(weights, kTile, keys, v + c, v_stride, c == 0 ? fetch : FetchRows{}, out + c, dv_);
    }
  }

  bool Admits(const Tile& tile, int64_t q, int64_t j) const {
    if (!mask_.admits(q, tile.k + j)) return false;
    const uint64_t* bitmap = p_.pattern.bitmap(tile.entry);
    if (bitmap == nullptr) return true;
    const PatternShape& shape = p_.pattern.shape;
    const int64_t key = tile.k + j - int64_t{p_.pattern.indices[tile.entry]} * shape.block_k;
    return (bitmap[q * shape.bitmap_words() + key / 64] >> (key % 64)) & 1;
  }

  // Scores of one row and tile to weights, with the row's softmax state.
  void RowWeights(const Tile& tile, int64_t row, float* s, bool masked) {
    const Floats d;
    const int64_t q = row % p_.seqlen_q, h = unit_.head_begin + row / p_.seqlen_q;
    if (ModifiesScores(p_) || factor_ != 1.0f) ModifyRow(tile, q, h, s);
    if (masked) {
      for (int64_t j = 0; j < tile.keys; ++j) {
        if (!Admits(tile, q, j)) s[j] = kNegInf;
      }
    }
    std::fill(s + tile.keys, s + kTile, kNegInf);
    Vec top = hn::Load(d, s);
    for (int64_t j = kLanes; j < kTile; j += kLanes) top = hn::Max(top, hn::Load(d, s + j));
    const float max = hn::GetLane(hn::MaxOfLanes(d, top));
    float& reference = partial_.max[row];
    float& sum = partial_.sum[row];
    if (max > reference + kRescaleThreshold) {
      const float now = std::ceil(max);
      const float alpha = hn::GetLane(Exp2(hn::Set(d, reference - now)));
      reference = now;
      sum *= alpha;
      float* out = out_ + row * dv_;
      for (int64_t c = 0; c < dv_; ++c) out[c] *= alpha;
    }
    const Vec m = hn::Set(d, reference);
    Vec total = hn::Zero(d);
    for (int64_t j = 0; j < kTile; j += kLanes) {
      const Vec w = Exp2(hn::Sub(hn::Load(d, s + j), m));
      hn::Store(w, d, s + j);
      total = hn::Add(total, w);
    }
    sum += hn::GetLane(hn::SumOfLanes(d, total));
    if (p_.dropout.p > 0) {
      const uint32_t threshold = drop_threshold(p_.dropout.p);
      const uint64_t stream = p_.dropout_stream(unit_.batch, h);
      for (int64_t j = 0; j < tile.keys; ++j) {
        if (dropout_random(p_.dropout, stream, p_.dropout_q(q), p_.dropout_k(tile.k + j)) < threshold) s[j] = 0.0f;
      }
    }
  }

  // One row of scores * factor_ (log2 units): softcap, then biases. ModifyScores for vectors along keys.
  void ModifyRow(const Tile& tile, int64_t q, int64_t h, float* s) const {
    const Floats d;
    const int64_t b = unit_.batch;
    for (int64_t j = 0; j < kTile; j += kLanes) {
      Vec x = hn::Load(d, s + j);
      if (p_.softcap > 0) {
        const Vec to_cap = hn::Set(d, static_cast<float>(factor_ * kLn2 / p_.softcap));
        x = hn::Mul(hn::Set(d, static_cast<float>(p_.softcap) * kLog2e), Tanh(hn::Mul(x, to_cap)));
      } else {
        x = hn::Mul(x, hn::Set(d, factor_));
      }
      hn::Store(x, d, s + j);
    }
    if (p_.block_bias) {
      const float shift = kLog2e * p_.block_bias[b * p_.bias_batch + h * p_.bias_head + tile.entry * p_.bias_entry];
      for (int64_t j = 0; j < tile.keys; ++j) s[j] += shift;
    }
    if (p_.alibi) {
      const float slope = -kLog2e * p_.alibi[b * p_.alibi_batch + h * p_.alibi_head];
      const int64_t distance = q + p_.diagonal(b) - tile.k;
      for (int64_t j = 0; j < tile.keys; ++j) s[j] += slope * std::abs(static_cast<float>(distance - j));
    }
    if (p_.attn_bias) {
      const int64_t* stride = p_.attn_bias_stride;
      const int64_t base = b * stride[0] + h * stride[1] + q * stride[2] + tile.k * stride[3];
      for (int64_t j = 0; j < tile.keys; ++j) {
        s[j] += kLog2e * static_cast<float>(load_as_double(p_.attn_bias, p_.attn_bias_dtype, base + j * stride[3]));
      }
    }
  }

  bool NonFinite(const T* v, int64_t keys) const {
    for (int64_t j = 0; j < keys; ++j) {
      if (AnyNonFinite(v + j * p_.v.seq, p_.head_dim_v)) return true;
    }
    return false;
  }

  void AddValuesMasked(const Tile& tile, int64_t first_row, const T* v) {
    for (int64_t r = 0; r < kv_rows_; ++r) {
      float* out = out_ + (first_row + r) * dv_;
      for (int64_t j = 0; j < tile.keys; ++j) {
        if (!Admits(tile, r % p_.seqlen_q, j)) continue;
        for (int64_t c = 0; c < p_.head_dim_v; ++c) out[c] += scores_[r * kTile + j] * ToFloat(v[j * p_.v.seq + c]);
      }
    }
  }

  const Problem& p_;
  const DecodeUnit& unit_;
  const DecodePartial& partial_;
  const MaskGeometry mask_;
  int64_t rows_ = 0;     // query rows of the unit
  int64_t kv_rows_ = 0;  // of one kv head
  int64_t d_ = 0, dv_ = 0;
  float factor_ = 1;
  float* q_ = nullptr;       // [rows, d_], or as bf16
  float* out_ = nullptr;     // [rows, dv_]
  float* scores_ = nullptr;  // [kv_rows, kTile]
  T* k_rows_ = nullptr;
  T* v_rows_ = nullptr;
};

}  // namespace tessera::cpu::TESSERA_KERNELS
HWY_AFTER_NAMESPACE();
#endif
