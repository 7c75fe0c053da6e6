// The two products of attention as register tiles. Vectors run along queries everywhere:
//
//   scores^T [keys][W]  =  K [keys][steps] (broadcast)  x  q^T [steps][W]
//   out^T    [Dv][W]   +=  V^T (broadcast)              x  weights^T [steps][W]
//
// so K and V are read as they lie in memory, one element at a time, and only the query side is ever transposed (once
// per row of blocks). W = NV * kLanes queries form a panel. A policy says what an element is: one float, or a pair of
// bf16 along the summed dimension for the native dot.
#if defined(TESSERA_CPU_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TESSERA_CPU_TILE_INL_H_
#undef TESSERA_CPU_TILE_INL_H_
#else
#define TESSERA_CPU_TILE_INL_H_
#endif

#include <cstring>
#include <type_traits>

#include "cpu/vecmath-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tessera::cpu::TESSERA_KERNELS {

// Register tile: kTileRows x kMaxVecs accumulators, kMaxVecs query vectors and one broadcast must fit in the file.
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_NEON
inline constexpr int kMaxVecs = 4;  // 32 registers
#else
inline constexpr int kMaxVecs = 2;  // 16 registers
#endif
inline constexpr int kTileRows = 6;
inline constexpr int kMaxPanel = kMaxVecs * kLanes;  // queries, at most 64

struct Fp32Product {
  using Element = float;
  static constexpr int kElementsPerStep = 1;
  static HWY_INLINE Vec Load(const float* p) { return hn::Load(Floats(), p); }
  static HWY_INLINE Vec Broadcast(const float* p) { return hn::Set(Floats(), *p); }
  static HWY_INLINE Vec MulAdd(Vec b, Vec a, Vec sum) { return hn::MulAdd(b, a, sum); }
};

#if TESSERA_BF16_DOT
struct Bf16Product {
  using Element = uint32_t;  // two bf16, the lower half first
  static constexpr int kElementsPerStep = 2;
  static HWY_INLINE __m512i Load(const uint32_t* p) { return _mm512_load_si512(p); }
  static HWY_INLINE __m512i Broadcast(const uint32_t* p) {
    uint32_t x;
    std::memcpy(&x, p, sizeof x);  // K's rows are aligned to 2 bytes only
    return _mm512_set1_epi32(static_cast<int>(x));
  }
  static HWY_INLINE Vec MulAdd(__m512i b, __m512i a, Vec sum) {
    return Vec{_mm512_dpbf16_ps(sum.raw, (__m512bh)a, (__m512bh)b)};
  }
};
#endif

// acc [R][NV] += sum over i of a[r * a_row + i * a_step] (broadcast) x b[i * b_step ..] (vectors). Two steps a turn of
// the loop: as one, Intel lost .02 of the peak to it.
template <class P, int R, int NV>
HWY_INLINE void Accumulate(const typename P::Element* HWY_RESTRICT a, int64_t a_row, int64_t a_step,
                           const typename P::Element* HWY_RESTRICT b, int64_t b_step, int64_t steps,
                           Vec (&acc)[R][NV]) {
  const auto step = [&](const typename P::Element* HWY_RESTRICT x, const typename P::Element* HWY_RESTRICT y) HWY_ATTR {
    decltype(P::Load(y)) vectors[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) vectors[v] = P::Load(y + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto e = P::Broadcast(x + r * a_row);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[r][v] = P::MulAdd(e, vectors[v], acc[r][v]);
    }
  };
  for (; steps >= 2; steps -= 2) {
    step(a, b);
    step(a + a_step, b + b_step);
    a += 2 * a_step;
    b += 2 * b_step;
  }
  if (steps > 0) step(a, b);
}

// out [R][NV] = rows of a x panel b; with kMax, column maxima joined into `max` [NV].
template <class P, int R, int NV, bool kMax>
HWY_NOINLINE void RowTile(const typename P::Element* HWY_RESTRICT a, int64_t a_stride,
                          const typename P::Element* HWY_RESTRICT b, int64_t b_stride, int64_t steps,
                          float* HWY_RESTRICT out, int64_t out_stride, float* HWY_RESTRICT max) {
  const Floats d;
  Vec acc[R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[r][v] = hn::Zero(d);
  Accumulate<P, R, NV>(a, a_stride, 1, b, b_stride, steps, acc);
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) {
    Vec m = kMax ? hn::Load(d, max + v * kLanes) : hn::Zero(d);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      hn::Store(acc[r][v], d, out + r * out_stride + v * kLanes);
      if constexpr (kMax) m = hn::Max(m, acc[r][v]);
    }
    if constexpr (kMax) hn::Store(m, d, max + v * kLanes);
  }
}

// out [R][W] = columns of a x b, over `steps` rows of both, added to what out holds if `add`.
template <class P, int R, int NV>
HWY_NOINLINE void ColumnTile(const typename P::Element* HWY_RESTRICT a, int64_t a_stride,
                             const typename P::Element* HWY_RESTRICT b, int64_t b_stride, int64_t steps, bool add,
                             float* HWY_RESTRICT out) {
  const Floats d;
  constexpr int W = NV * kLanes;
  Vec acc[R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[r][v] = add ? hn::Load(d, out + r * W + v * kLanes) : hn::Zero(d);
  Accumulate<P, R, NV>(a, 1, a_stride, b, b_stride, steps, acc);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) hn::Store(acc[r][v], d, out + r * W + v * kLanes);
}

// Calls tile(integral_constant<int, R>, i) for rows i .. i + R - 1 until n are done: R = kTileRows, then what is left.
template <class Tile>
HWY_INLINE void ForTiles(int64_t n, Tile tile) {
  int64_t i = 0;
  for (; i + kTileRows <= n; i += kTileRows) tile(std::integral_constant<int, kTileRows>(), i);
  switch (n - i) {
    case 5: tile(std::integral_constant<int, 5>(), i); break;
    case 4: tile(std::integral_constant<int, 4>(), i); break;
    case 3: tile(std::integral_constant<int, 3>(), i); break;
    case 2: tile(std::integral_constant<int, 2>(), i); break;
    case 1: tile(std::integral_constant<int, 1>(), i); break;
    default: break;
  }
}

// scores [keys][W] of a chunk, and their column maxima. `between` runs once a tile: work for other execution units than
// the multipliers, which overlaps with the tiles around it.
template <class P, int NV, class Between>
void Scores(const typename P::Element* q, int64_t steps, const typename P::Element* k, int64_t k_stride, int64_t keys,
            float* scores, float* max, Between& between) {
  constexpr int W = NV * kLanes;
  ForTiles(keys, [&](auto rows, int64_t i) {
    RowTile<P, rows(), NV, true>(k + i * k_stride, k_stride, q, W, steps, scores + i * W, W, max);
    between.Some();
  });
}

struct NoWork {
  void Some() {}
};

// out [dims][W] = columns of v x weights (vectors, `stride` apart), over `steps` keys (or pairs of keys), added to what
// out holds if `add`. `between` as above.
template <class P, int NV, class Between = NoWork>
void AddOut(const typename P::Element* weights, int64_t stride, int64_t steps, const typename P::Element* v,
            int64_t v_stride, int64_t dims, bool add, float* out, Between&& between = Between()) {
  constexpr int W = NV * kLanes;
  ForTiles(dims, [&](auto rows, int64_t i) {
    ColumnTile<P, rows(), NV>(v + i, v_stride, weights, stride, steps, add, out + i * W);
    between.Some();
  });
}

}  // namespace tessera::cpu::TESSERA_KERNELS
HWY_AFTER_NAMESPACE();
#endif
