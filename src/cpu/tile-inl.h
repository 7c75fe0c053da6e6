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

// scores [KR][W] = K tile x q panel, and column maxima joined into `max` [W].
template <class P, int KR, int NV>
HWY_NOINLINE void ScoreTile(const typename P::Element* HWY_RESTRICT q, int64_t steps,
                            const typename P::Element* HWY_RESTRICT k, int64_t k_stride, float* HWY_RESTRICT scores,
                            float* HWY_RESTRICT max) {
  const Floats d;
  constexpr int W = NV * kLanes;
  Vec acc[KR][NV];
#pragma GCC unroll 8
  for (int r = 0; r < KR; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[r][v] = hn::Zero(d);
  for (int64_t i = 0; i < steps; ++i) {
    decltype(P::Load(q)) a[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) a[v] = P::Load(q + i * W + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < KR; ++r) {
      const auto b = P::Broadcast(k + r * k_stride + i);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[r][v] = P::MulAdd(b, a[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) {
    Vec m = hn::Load(d, max + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < KR; ++r) {
      hn::Store(acc[r][v], d, scores + r * W + v * kLanes);
      m = hn::Max(m, acc[r][v]);
    }
    hn::Store(m, d, max + v * kLanes);
  }
}

// out [DR][W] += V columns x weights, over `steps` keys (or pairs of keys).
template <class P, int DR, int NV>
HWY_NOINLINE void OutTile(const typename P::Element* HWY_RESTRICT weights, int64_t steps,
                          const typename P::Element* HWY_RESTRICT v, int64_t v_stride, float* HWY_RESTRICT out) {
  const Floats d;
  constexpr int W = NV * kLanes;
  Vec acc[DR][NV];
#pragma GCC unroll 8
  for (int r = 0; r < DR; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < NV; ++c) acc[r][c] = hn::Load(d, out + r * W + c * kLanes);
  for (int64_t i = 0; i < steps; ++i) {
    decltype(P::Load(weights)) a[NV];
#pragma GCC unroll 8
    for (int c = 0; c < NV; ++c) a[c] = P::Load(weights + i * W + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < DR; ++r) {
      const auto b = P::Broadcast(v + i * v_stride + r);
#pragma GCC unroll 8
      for (int c = 0; c < NV; ++c) acc[r][c] = P::MulAdd(b, a[c], acc[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < DR; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < NV; ++c) hn::Store(acc[r][c], d, out + r * W + c * kLanes);
}

// scores [keys][W] of a chunk. `between` runs once a tile: work for other execution units than the multipliers, which
// overlaps with the tiles around it.
template <class P, int NV, class Between>
void Scores(const typename P::Element* q, int64_t steps, const typename P::Element* k, int64_t k_stride, int64_t keys,
            float* scores, float* max, Between& between) {
  constexpr int W = NV * kLanes;
  int64_t i = 0;
  for (; i + kTileRows <= keys; i += kTileRows) {
    ScoreTile<P, kTileRows, NV>(q, steps, k + i * k_stride, k_stride, scores + i * W, max);
    between.Some();
  }
  const auto* tail = k + i * k_stride;
  float* s = scores + i * W;
  switch (keys - i) {
    case 5: ScoreTile<P, 5, NV>(q, steps, tail, k_stride, s, max); break;
    case 4: ScoreTile<P, 4, NV>(q, steps, tail, k_stride, s, max); break;
    case 3: ScoreTile<P, 3, NV>(q, steps, tail, k_stride, s, max); break;
    case 2: ScoreTile<P, 2, NV>(q, steps, tail, k_stride, s, max); break;
    case 1: ScoreTile<P, 1, NV>(q, steps, tail, k_stride, s, max); break;
    default: break;
  }
}

template <class P, int NV>
void AddOut(const typename P::Element* weights, int64_t steps, const typename P::Element* v, int64_t v_stride,
            int64_t dims, float* out) {
  constexpr int W = NV * kLanes;
  int64_t i = 0;
  for (; i + kTileRows <= dims; i += kTileRows) {
    OutTile<P, kTileRows, NV>(weights, steps, v + i, v_stride, out + i * W);
  }
  float* o = out + i * W;
  switch (dims - i) {
    case 5: OutTile<P, 5, NV>(weights, steps, v + i, v_stride, o); break;
    case 4: OutTile<P, 4, NV>(weights, steps, v + i, v_stride, o); break;
    case 3: OutTile<P, 3, NV>(weights, steps, v + i, v_stride, o); break;
    case 2: OutTile<P, 2, NV>(weights, steps, v + i, v_stride, o); break;
    case 1: OutTile<P, 1, NV>(weights, steps, v + i, v_stride, o); break;
    default: break;
  }
}

}  // namespace tessera::cpu::TESSERA_KERNELS
HWY_AFTER_NAMESPACE();
#endif
