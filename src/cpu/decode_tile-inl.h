// The inner loops of decode: a few query rows against rows of K and V, with vectors along the head dimension.
//
// Memory decides, and so the order in which lines are first touched. One row of K after the other, each line of it by
// a load of its own (unrolled), ran at the speed of plain reading (32 of 33 GB/s on one Zen 4 core); in a rolled loop
// at 27, with four rows interleaved at 10. Values need two passes over the columns of a few keys; with every row
// touched whole in the first pass they ran at 32, without at 20. Lines that no hardware prefetcher follows (rows of
// one kv head in [B, S, H, D]) are fetched into L2 a tile ahead, in the order of memory and spread over the tile:
// 14 -> 32 for K, 19 -> 28 for values. Fetching them into L1 instead: 18 and 14.
#if defined(TESSERA_CPU_DECODE_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TESSERA_CPU_DECODE_TILE_INL_H_
#undef TESSERA_CPU_DECODE_TILE_INL_H_
#else
#define TESSERA_CPU_DECODE_TILE_INL_H_
#endif

#include <algorithm>
#include <type_traits>

#include "cpu/convert-inl.h"
#include "cpu/softmax-inl.h"
#include "hwy/cache_control.h"

HWY_BEFORE_NAMESPACE();
namespace tessera::cpu::TESSERA_KERNELS {

inline constexpr int kScoreRows = 4;  // query rows that meet a row of K or V while it is read from memory

// Accumulators of values: so many query rows by so many vectors of columns, over so many keys.
struct ValueBlock {
  int rows, vecs, keys;
};
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_NEON  // 32 registers
inline constexpr int kKeysInCache = 4;
template <class T, bool kNativeDot>
inline constexpr ValueBlock kValueBlock = kNativeDot       ? ValueBlock{4, 4, 16}
                                          : sizeof(T) == 4 ? ValueBlock{2, 8, 8}
                                                           : ValueBlock{2, 8, 16};
#else
inline constexpr int kKeysInCache = 2;
template <class T, bool kNativeDot>
inline constexpr ValueBlock kValueBlock{2, 4, 16};
#endif

// Rows that will be read soon, fetched into L2 a few lines at a time.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const char* row, int64_t stride, int64_t bytes, int64_t rows)  // stride and bytes of a row
      : row_(row), stride_(stride), bytes_(bytes), rows_(rows) {}

  template <int kCount>
  HWY_INLINE void Lines() {
    if (rows_ <= 0) return;
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) __builtin_prefetch(row_ + at_ + i * 64, 0, 2);
    at_ += kCount * 64;
    if (at_ >= bytes_) {
      at_ = 0;
      row_ += stride_;
      --rows_;
    }
  }
  // As many lines as a loop reads in `bytes` bytes.
  template <int kBytes>
  HWY_INLINE void Bytes() {
    Lines<(kBytes + 63) / 64>();
  }

 private:
  const char* row_ = nullptr;
  int64_t stride_ = 0, bytes_ = 0, rows_ = 0;
  int64_t at_ = 0;
};

// Reads a byte of every line of a row, in order.
HWY_INLINE void TouchRow(const char* row, int64_t bytes) {
  const volatile char* p = row;
  const auto touch = [&p](int line) { (void)p[line * 64]; };
  for (; bytes >= 512; bytes -= 512, p += 512) {
#pragma GCC unroll 8
    for (int line = 0; line < 8; ++line) touch(line);
  }
  if (bytes >= 256) {
#pragma GCC unroll 4
    for (int line = 0; line < 4; ++line) touch(line);
    bytes -= 256;
    p += 256;
  }
  for (; bytes > 0; bytes -= 64, p += 64) touch(0);
}

using Four = hn::FixedTag<float, 4>;

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

// ---- Scores: query rows (fp32, or bf16 for the native dot) times rows of K, n elements each.

// Elements of Q that a vector holds, and one step of a product.
template <class Q>
inline constexpr int kPerVec = kLanes * sizeof(float) / sizeof(Q);

template <class T>
HWY_INLINE auto LoadKey(const float*, const T* k) {
  return LoadFloats(k);
}
HWY_INLINE Vec MulAddKey(const float* q, Vec k, Vec sum) { return hn::MulAdd(hn::Load(Floats(), q), k, sum); }
#if TESSERA_BF16_DOT
HWY_INLINE __m512i LoadKey(const bfloat16*, const bfloat16* k) { return _mm512_loadu_si512(k); }
HWY_INLINE Vec MulAddKey(const bfloat16* q, __m512i k, Vec sum) {
  return Vec{_mm512_dpbf16_ps(sum.raw, (__m512bh)_mm512_load_si512(q), (__m512bh)k)};
}
#endif

// acc[r] += products of query row r and N vectors of one row of K.
template <int R, int N, class Q, class T>
HWY_INLINE void AddProducts(const Q* HWY_RESTRICT q, int64_t q_stride, const T* HWY_RESTRICT k, Ahead& ahead,
                            Vec (&acc)[R]) {
  ahead.Bytes<N * kPerVec<Q> * sizeof(T)>();
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) {
    const auto x = LoadKey(q, k + i * kPerVec<Q>);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[r] = MulAddKey(q + r * q_stride + i * kPerVec<Q>, x, acc[r]);
  }
}

// acc[r] = products of query row r and one row of K, in the order of memory. N: vectors of a row (a loop that is not
// unrolled whole ran at 29 GB/s instead of 35), or 0 for any n.
template <int R, int N, class Q, class T>
HWY_INLINE void OneKey(const Q* HWY_RESTRICT q, int64_t q_stride, int64_t n, const T* HWY_RESTRICT k, Ahead& ahead,
                       Vec (&acc)[R]) {
  constexpr int kStep = kPerVec<Q>;
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) acc[r] = hn::Zero(Floats());
  if constexpr (N > 0) {
    AddProducts<R, N>(q, q_stride, k, ahead, acc);
    return;
  }
  int64_t i = 0;
  for (; i + 8 * kStep <= n; i += 8 * kStep) AddProducts<R, 8>(q + i, q_stride, k + i, ahead, acc);
  if (i + 4 * kStep <= n) {
    AddProducts<R, 4>(q + i, q_stride, k + i, ahead, acc);
    i += 4 * kStep;
  }
  if (i + 2 * kStep <= n) {
    AddProducts<R, 2>(q + i, q_stride, k + i, ahead, acc);
    i += 2 * kStep;
  }
  if (i < n) AddProducts<R, 1>(q + i, q_stride, k + i, ahead, acc);
}

// Stores R lanes.
template <int R>
HWY_INLINE void StoreLanes(hn::Vec<Four> x, float* to) {
  if constexpr (R == 4) {
    hn::StoreU(x, Four(), to);
  } else {
    alignas(16) float lanes[4];
    hn::Store(x, Four(), lanes);
    for (int r = 0; r < R; ++r) to[r] = lanes[r];
  }
}

// scores[j * stride + r] = q row r . k row j for R <= 4 query rows: K comes from memory, key after key.
template <int R, int N, class Q, class T>
HWY_NOINLINE void ScoresFromMemory(const Q* HWY_RESTRICT q, int64_t q_stride, int64_t n, const T* HWY_RESTRICT k,
                                   int64_t k_stride, int64_t keys, Ahead& fetch, float* HWY_RESTRICT scores,
                                   int64_t stride) {
  Ahead ahead = fetch;  // a copy that can live in registers
  if constexpr (R == 1) {
    for (int64_t j = 0; j < keys; j += 4) {
      const int64_t last = keys - 1;
      Vec a[1], b[1], c[1], e[1];
      OneKey<1, N>(q, q_stride, n, k + j * k_stride, ahead, a);
      OneKey<1, N>(q, q_stride, n, k + std::min(j + 1, last) * k_stride, ahead, b);
      OneKey<1, N>(q, q_stride, n, k + std::min(j + 2, last) * k_stride, ahead, c);
      OneKey<1, N>(q, q_stride, n, k + std::min(j + 3, last) * k_stride, ahead, e);
      alignas(16) float sums[4];
      hn::Store(SumsOf4(a[0], b[0], c[0], e[0]), Four(), sums);
      for (int64_t i = 0; i < std::min<int64_t>(4, keys - j); ++i) scores[(j + i) * stride] = sums[i];
    }
  } else if constexpr (R == 2) {
    for (int64_t j = 0; j < keys; j += 2) {
      const int64_t next = std::min(j + 1, keys - 1);
      Vec a[2], b[2];
      OneKey<2, N>(q, q_stride, n, k + j * k_stride, ahead, a);
      OneKey<2, N>(q, q_stride, n, k + next * k_stride, ahead, b);
      alignas(16) float sums[4];
      hn::Store(SumsOf4(a[0], a[1], b[0], b[1]), Four(), sums);
      for (int r = 0; r < 2; ++r) {
        scores[j * stride + r] = sums[r];
        scores[next * stride + r] = sums[(next - j) * 2 + r];
      }
    }
  } else {
    for (int64_t j = 0; j < keys; ++j) {
      Vec a[R];
      OneKey<R, N>(q, q_stride, n, k + j * k_stride, ahead, a);
      StoreLanes<R>(SumsOf4(a[0], a[1], a[2], a[R - 1]), scores + j * stride);
    }
  }
  fetch = ahead;
}

// The same for rows of K that are in L1 already: several keys share each load of the queries.
template <int R, int J, class Q, class T>
HWY_INLINE void ScoresOfKeys(const Q* HWY_RESTRICT q, int64_t q_stride, int64_t n, const T* HWY_RESTRICT k,
                             int64_t k_stride, float* HWY_RESTRICT scores, int64_t stride) {
  Vec acc[J][R];
#pragma GCC unroll 4
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[j][r] = hn::Zero(Floats());
  for (int64_t i = 0; i < n; i += kPerVec<Q>) {
    decltype(LoadKey(q, k)) x[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) x[j] = LoadKey(q, k + j * k_stride + i);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) acc[j][r] = MulAddKey(q + r * q_stride + i, x[j], acc[j][r]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < J; ++j) {
    StoreLanes<R>(SumsOf4(acc[j][0], acc[j][R > 1 ? 1 : 0], acc[j][R > 2 ? 2 : 0], acc[j][R - 1]), scores + j * stride);
  }
}
template <int R, class Q, class T>
HWY_NOINLINE void ScoresInCache(const Q* HWY_RESTRICT q, int64_t q_stride, int64_t n, const T* HWY_RESTRICT k,
                                int64_t k_stride, int64_t keys, float* HWY_RESTRICT scores, int64_t stride) {
  constexpr int J = kKeysInCache;
  int64_t j = 0;
  for (; j + J <= keys; j += J) {
    ScoresOfKeys<R, J>(q, q_stride, n, k + j * k_stride, k_stride, scores + j * stride, stride);
  }
  for (; j < keys; ++j) {
    ScoresOfKeys<R, 1>(q, q_stride, n, k + j * k_stride, k_stride, scores + j * stride, stride);
  }
}

// ---- Softmax over flat scores: n of them, lane l of every `width` (a multiple of kLanes) belongs to one row.

// max[l] = the largest of its scores.
HWY_NOINLINE void MaxOfLanes(const float* scores, int64_t n, int64_t width, float* max) {
  const Floats d;
  for (int64_t v = 0; v < width; v += kLanes) {
    Vec m0 = hn::Set(d, kNegInf), m1 = m0, m2 = m0, m3 = m0;
    int64_t i = v;
    for (; i + 3 * width < n; i += 4 * width) {
      m0 = hn::Max(m0, hn::Load(d, scores + i));
      m1 = hn::Max(m1, hn::Load(d, scores + i + width));
      m2 = hn::Max(m2, hn::Load(d, scores + i + 2 * width));
      m3 = hn::Max(m3, hn::Load(d, scores + i + 3 * width));
    }
    for (; i < n; i += width) m0 = hn::Max(m0, hn::Load(d, scores + i));
    hn::Store(hn::Max(hn::Max(m0, m1), hn::Max(m2, m3)), d, max + v);
  }
}

// Scores become weights in place; sum[l] = their sum.
HWY_NOINLINE void WeightsOfLanes(float* scores, int64_t n, int64_t width, float factor, const float* reference,
                                 float* sum) {
  const Floats d;
  const Vec f = hn::Set(d, factor);
  for (int64_t v = 0; v < width; v += kLanes) {
    const Vec bias = WeightBias(hn::Load(d, reference + v));
    Vec sum0 = hn::Zero(d), sum1 = hn::Zero(d);
    const auto weight = [&](int64_t i) HWY_ATTR {
      const Vec w = Weight<true>(hn::Load(d, scores + i), f, bias);
      hn::Store(w, d, scores + i);
      return w;
    };
    int64_t i = v;
    for (; i + 3 * width < n; i += 4 * width) {
      const Vec a = weight(i), b = weight(i + width), c = weight(i + 2 * width), e = weight(i + 3 * width);
      sum0 = hn::Add(sum0, hn::Add(a, c));
      sum1 = hn::Add(sum1, hn::Add(b, e));
    }
    for (; i < n; i += width) sum0 = hn::Add(sum0, weight(i));
    hn::Store(hn::Add(sum0, sum1), d, sum + v);
  }
}

#if TESSERA_BF16_DOT
// Scores become bf16 weights as pairs of keys, packed into the first half of `scores`; n is a multiple of 2 * width.
// `pairs` says where the two elements of each pair stand among 2 * kLanes scores. used[l]: sums of rounded weights.
HWY_NOINLINE void PairWeightsOfLanes(float* scores, int64_t n, int64_t width, float factor, const uint16_t* pairs,
                                     const float* reference, float* sum, float* used) {
  const Floats d;
  const Vec f = hn::Set(d, factor);
  const __m512i order = _mm512_load_si512(pairs);
  for (int64_t v = 0; v < width; v += kLanes) {
    const Vec bias = WeightBias(hn::Load(d, reference + v));
    Vec sum0 = hn::Zero(d), sum1 = hn::Zero(d), used0 = hn::Zero(d), used1 = hn::Zero(d);
    float* to = scores + v;
    const auto pair = [&](int64_t i) HWY_ATTR {
      const Vec a = Weight<true>(hn::Load(d, scores + i), f, bias);
      const Vec b = Weight<true>(hn::Load(d, scores + i + width), f, bias);
      sum0 = hn::Add(sum0, a);
      sum1 = hn::Add(sum1, b);
      return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(b.raw, a.raw));
    };
    int64_t i = v;
    for (; i + 3 * width < n; i += 4 * width, to += 2 * width) {
      const __m512i x = pair(i), y = pair(i + 2 * width);
      used0 = AddPairs(used0, x);
      used1 = AddPairs(used1, y);
      _mm512_store_si512(to, x);
      _mm512_store_si512(to + width, y);
    }
    for (; i < n; i += 2 * width, to += width) {
      const __m512i x = pair(i);
      used0 = AddPairs(used0, x);
      _mm512_store_si512(to, x);
    }
    hn::Store(hn::Add(sum0, sum1), d, sum + v);
    hn::Store(hn::Add(used0, used1), d, used + v);
  }
}
#endif

// ---- Values.

// Weights of one key (or of a pair of keys, for the native dot) and rows of V: what differs between the two is here.
template <class T>
struct Values {
  using Weight = float;
  static constexpr int kStep = 1;  // vectors of columns that one load of V brings
  static constexpr ValueBlock kBlock = kValueBlock<T, false>;

  // acc[r] += weights[key * stride + r] * v[key], over `keys` keys and C vectors of columns; touch as below.
  template <int R, int C>
  static HWY_INLINE void Add(const float* HWY_RESTRICT weights, int64_t stride, int64_t keys, const T* HWY_RESTRICT v,
                             int64_t v_stride, int64_t touch, Ahead& ahead, Vec (&acc)[R][C]) {
    const Floats d;
    for (int64_t j = 0; j < keys; ++j) {
      const T* row = v + j * v_stride;
      TouchRow(reinterpret_cast<const char*>(row), touch);
      ahead.Bytes<C * kLanes * sizeof(T)>();
      Vec w[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) w[r] = hn::Set(d, weights[j * stride + r]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        const Vec x = LoadFloats(row + c * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[r][c] = hn::MulAdd(w[r], x, acc[r][c]);
      }
    }
  }
};

#if TESSERA_BF16_DOT
template <>
struct Values<bfloat16> {
  using Weight = uint32_t;  // of two keys
  static constexpr int kStep = 2;
  static constexpr ValueBlock kBlock = kValueBlock<bfloat16, true>;

  template <int R, int C>
  static HWY_INLINE void Add(const uint32_t* HWY_RESTRICT weights, int64_t stride, int64_t keys,
                             const bfloat16* HWY_RESTRICT v, int64_t v_stride, int64_t touch, Ahead& ahead,
                             Vec (&acc)[R][C]) {
    alignas(64) static constexpr uint16_t kLower[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i lower = _mm512_load_si512(kLower);
    const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
    const auto load = [&](int64_t j, __m512i(&x)[C / 2]) HWY_ATTR {
      const bfloat16* row = v + j * v_stride;
      TouchRow(reinterpret_cast<const char*>(row), touch);
#pragma GCC unroll 4
      for (int c = 0; c < C / 2; ++c) x[c] = _mm512_loadu_si512(row + c * 2 * kLanes);
    };
    const auto add = [&](int64_t pair, const __m512i(&a)[C / 2], const __m512i(&b)[C / 2]) HWY_ATTR {
      __m512bh w[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) w[r] = (__m512bh)_mm512_set1_epi32(static_cast<int>(weights[pair * stride + r]));
#pragma GCC unroll 4
      for (int c = 0; c < C / 2; ++c) {
        const __m512bh x = (__m512bh)_mm512_permutex2var_epi16(a[c], lower, b[c]);
        const __m512bh y = (__m512bh)_mm512_permutex2var_epi16(a[c], upper, b[c]);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          acc[r][2 * c] = Vec{_mm512_dpbf16_ps(acc[r][2 * c].raw, x, w[r])};
          acc[r][2 * c + 1] = Vec{_mm512_dpbf16_ps(acc[r][2 * c + 1].raw, y, w[r])};
        }
      }
    };
    __m512i a[C / 2], b[C / 2];
    for (int64_t j = 0; j + 2 <= keys; j += 2) {
      ahead.Bytes<2 * C * kLanes * sizeof(bfloat16)>();
      load(j, a);
      load(j + 1, b);
      add(j / 2, a, b);
    }
    if (keys % 2 != 0) {  // the weight beyond the last key is 0, but 0 times what stands there need not be
      load(keys - 1, a);
#pragma GCC unroll 4
      for (int c = 0; c < C / 2; ++c) b[c] = _mm512_setzero_si512();
      add(keys / 2, a, b);
    }
  }
};
#endif

// out[r][0 .. C * kLanes) += sum over keys of weights * v. The first `touch` bytes of each row of v are read at once:
// they hold the columns of later passes.
template <int R, int C, class T>
HWY_INLINE void AddColumns(const typename Values<T>::Weight* weights, int64_t stride, int64_t keys, const T* v,
                           int64_t v_stride, int64_t touch, Ahead& ahead, float* out, int64_t out_stride) {
  const Floats d;
  Vec acc[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[r][c] = hn::Load(d, out + r * out_stride + c * kLanes);
  Values<T>::template Add<R, C>(weights, stride, keys, v, v_stride, touch, ahead, acc);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) hn::Store(acc[r][c], d, out + r * out_stride + c * kLanes);
}

// The same for R <= 4 query rows and whole rows of V: N vectors, or 0 for any number of `columns`. With kMemory V comes
// from memory and goes by few keys, so that all passes over their rows but the first find them in L1.
template <int R, int N, bool kMemory, class T>
HWY_NOINLINE void AddValues(const typename Values<T>::Weight* weights, int64_t stride, int64_t keys, const T* v,
                            int64_t v_stride, bool in_order, Ahead& fetch, float* out, int64_t columns) {
  constexpr ValueBlock kBlock = Values<T>::kBlock;
  constexpr int kRows = std::min(R, kBlock.rows), kVecs = N == 0 ? kBlock.vecs : std::min(N, kBlock.vecs);
  constexpr bool kOnePass = N != 0 && R <= kRows && N <= kVecs;
  constexpr int kPair = Values<T>::kStep;  // keys of a weight
  const int64_t step = kOnePass || !kMemory ? keys : kBlock.keys;
  const int64_t row_bytes = kMemory && in_order && columns > kVecs * kLanes ? columns * int64_t{sizeof(T)} : 0;
  Ahead ahead = fetch;
  for (int64_t j = 0; j < keys; j += step) {
    const int64_t n = std::min(step, keys - j);
    const typename Values<T>::Weight* w = weights + j / kPair * stride;
    const T* rows = v + j * v_stride;
    int64_t touch = row_bytes;
    const auto add = [&](auto vecs, int64_t c) HWY_ATTR {
      AddColumns<kRows, vecs()>(w, stride, n, rows + c, v_stride, touch, ahead, out + c, columns);
      touch = 0;
      if constexpr (R > kRows) {
        Ahead none;
        AddColumns<R - kRows, vecs()>(w + kRows, stride, n, rows + c, v_stride, 0, none, out + kRows * columns + c,
                                      columns);
      }
    };
    if constexpr (N != 0) {
      for (int64_t c = 0; c < N; c += kVecs) add(std::integral_constant<int, kVecs>(), c * kLanes);
    } else {
      int64_t c = 0;
      const auto until = [&](auto vecs) HWY_ATTR {
        for (; c + vecs() * kLanes <= columns; c += vecs() * kLanes) add(vecs, c);
      };
      until(std::integral_constant<int, kVecs>());
      if constexpr (kVecs > 4) until(std::integral_constant<int, 4>());
      if constexpr (kVecs > 2) until(std::integral_constant<int, 2>());
      if constexpr (kPair == 1) until(std::integral_constant<int, 1>());
    }
  }
  fetch = ahead;
}

}  // namespace tessera::cpu::TESSERA_KERNELS
HWY_AFTER_NAMESPACE();
#endif
