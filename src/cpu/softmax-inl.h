// Online softmax over a panel of transposed scores [keys][W], one query a lane (Milakov & Gimelshein 2018).
//
// Scores are in log2 units, so weights are 2^(s - m). The reference m of a query is an integer, and it moves only when
// a score exceeds it by more than 2^8: rescaling is then by an exact power of two, and rare (FlashAttention-4's trick).
#if defined(TESSERA_CPU_SOFTMAX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TESSERA_CPU_SOFTMAX_INL_H_
#undef TESSERA_CPU_SOFTMAX_INL_H_
#else
#define TESSERA_CPU_SOFTMAX_INL_H_
#endif

#include <limits>

#include "cpu/convert-inl.h"
#include "cpu/vecmath-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tessera::cpu::TESSERA_KERNELS {

inline constexpr float kRescaleThreshold = 8.0f;
// Reference of a query that has seen no score yet: lower than any finite score, yet x - kNoScore is never NaN.
inline constexpr float kNoScore = std::numeric_limits<float>::lowest();
inline constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// Raises the references to cover `max` (scores * factor) and rescales the sums (`used` may be `sum` itself) and out
// [dims][W] of lanes that moved.
template <int NV>
void RaiseReference(const float* max, float factor, float* reference, float* sum, float* used, float* out,
                    int64_t dims) {
  const Floats d;
  constexpr int W = NV * kLanes;
  const Vec f = hn::Set(d, factor);
  bool moved = false;
  for (int v = 0; v < NV; ++v) {
    const Vec top = hn::Mul(hn::Load(d, max + v * kLanes), f);
    const Vec limit = hn::Add(hn::Load(d, reference + v * kLanes), hn::Set(d, kRescaleThreshold));
    moved = moved || !hn::AllFalse(d, hn::Gt(top, limit));
  }
  if (HWY_LIKELY(!moved)) return;
  for (int v = 0; v < NV; ++v) {
    const Vec top = hn::Mul(hn::Load(d, max + v * kLanes), f);
    const Vec old = hn::Load(d, reference + v * kLanes);
    const auto grows = hn::Gt(top, hn::Add(old, hn::Set(d, kRescaleThreshold)));
    const Vec now = hn::IfThenElse(grows, hn::Ceil(top), old);
    const Vec alpha = hn::IfThenElse(grows, Exp2(hn::Sub(old, now)), hn::Set(d, 1.0f));
    hn::Store(now, d, reference + v * kLanes);
    hn::Store(hn::Mul(hn::Load(d, sum + v * kLanes), alpha), d, sum + v * kLanes);
    if (used != sum) hn::Store(hn::Mul(hn::Load(d, used + v * kLanes), alpha), d, used + v * kLanes);
    for (int64_t i = 0; i < dims; ++i) {
      float* p = out + i * W + v * kLanes;
      hn::Store(hn::Mul(hn::Load(d, p), alpha), d, p);
    }
  }
}

// Scores become weights in place; their sums join `sum`.
template <int NV, bool kScaled>
HWY_NOINLINE void Weights(float* HWY_RESTRICT scores, int64_t keys, float factor, const float* HWY_RESTRICT reference,
                          float* HWY_RESTRICT sum) {
  const Floats d;
  constexpr int W = NV * kLanes;
  const Vec f = hn::Set(d, factor);
  for (int v = 0; v < NV; ++v) {
    const Vec m = WeightBias(hn::Load(d, reference + v * kLanes));
    float* s = scores + v * kLanes;
    Vec sum0 = hn::Zero(d), sum1 = hn::Zero(d);
    int64_t i = 0;
    for (; i + 4 <= keys; i += 4, s += 4 * W) {  // four independent chains cover the latency of the polynomial
      const Vec a = Weight<kScaled>(hn::Load(d, s), f, m);
      const Vec b = Weight<kScaled>(hn::Load(d, s + W), f, m);
      const Vec c = Weight<kScaled>(hn::Load(d, s + 2 * W), f, m);
      const Vec e = Weight<kScaled>(hn::Load(d, s + 3 * W), f, m);
      hn::Store(a, d, s);
      hn::Store(b, d, s + W);
      hn::Store(c, d, s + 2 * W);
      hn::Store(e, d, s + 3 * W);
      sum0 = hn::Add(sum0, hn::Add(a, c));
      sum1 = hn::Add(sum1, hn::Add(b, e));
    }
    for (; i < keys; ++i, s += W) {
      const Vec a = Weight<kScaled>(hn::Load(d, s), f, m);
      hn::Store(a, d, s);
      sum0 = hn::Add(sum0, a);
    }
    hn::Store(hn::Add(hn::Load(d, sum + v * kLanes), hn::Add(sum0, sum1)), d, sum + v * kLanes);
  }
}

// Column maxima of scores [keys][W].
template <int NV>
void ColumnMax(const float* scores, int64_t keys, float* max) {
  const Floats d;
  for (int v = 0; v < NV; ++v) {
    Vec m = hn::Set(d, kNegInf);
    for (int64_t i = 0; i < keys; ++i) m = hn::Max(m, hn::Load(d, scores + (i * NV + v) * kLanes));
    hn::Store(m, d, max + v * kLanes);
  }
}

#if TESSERA_BF16_DOT
// sum + both bf16 of each pair, by the instruction that multiplies them with V: the same subnormals count as 0.
HWY_INLINE Vec AddPairs(Vec sum, __m512i pairs) {
  const __m512i ones = _mm512_set1_epi32(0x3f803f80);
  return Vec{_mm512_dpbf16_ps(sum.raw, (__m512bh)pairs, (__m512bh)ones)};
}

// Weights as pairs of keys [ceil(keys / 2)][W], written over the scores (row i of pairs lies on row i <= 2i of
// scores, which has been read by then). With kWeigh the scores become weights on the way, as in Weights, and `used`
// gains the sums of the rounded weights.
template <int NV, bool kWeigh>
HWY_NOINLINE void WeightsToBf16(float* scores, int64_t keys, float factor, const float* reference, float* sum,
                                float* used) {
  const Floats d;
  constexpr int W = NV * kLanes;
  const Vec f = hn::Set(d, factor);
  for (int v = 0; v < NV; ++v) {
    const Vec m = kWeigh ? WeightBias(hn::Load(d, reference + v * kLanes)) : hn::Zero(d);
    const float* s = scores + v * kLanes;
    float* pairs = scores + v * kLanes;
    Vec sum0 = hn::Zero(d), sum1 = hn::Zero(d), used0 = hn::Zero(d), used1 = hn::Zero(d);
    int64_t i = 0;
    for (; i + 4 <= keys; i += 4, s += 4 * W, pairs += 2 * W) {
      Vec a = hn::Load(d, s), b = hn::Load(d, s + W), c = hn::Load(d, s + 2 * W), e = hn::Load(d, s + 3 * W);
      if constexpr (kWeigh) {
        a = Weight<true>(a, f, m);
        b = Weight<true>(b, f, m);
        c = Weight<true>(c, f, m);
        e = Weight<true>(e, f, m);
        sum0 = hn::Add(sum0, hn::Add(a, c));
        sum1 = hn::Add(sum1, hn::Add(b, e));
      }
      const __m512i first = PairToBf16(a, b), second = PairToBf16(c, e);
      if constexpr (kWeigh) {
        used0 = AddPairs(used0, first);
        used1 = AddPairs(used1, second);
      }
      _mm512_store_si512(pairs, first);
      _mm512_store_si512(pairs + W, second);
    }
    for (; i < keys; i += 2, s += 2 * W, pairs += W) {
      Vec a = hn::Load(d, s), b = i + 1 < keys ? hn::Load(d, s + W) : hn::Zero(d);
      if constexpr (kWeigh) {
        a = Weight<true>(a, f, m);
        if (i + 1 < keys) b = Weight<true>(b, f, m);
        sum0 = hn::Add(sum0, hn::Add(a, b));
      }
      const __m512i pair = PairToBf16(a, b);
      if constexpr (kWeigh) used0 = AddPairs(used0, pair);
      _mm512_store_si512(pairs, pair);
    }
    if constexpr (kWeigh) {
      hn::Store(hn::Add(hn::Load(d, sum + v * kLanes), hn::Add(sum0, sum1)), d, sum + v * kLanes);
      hn::Store(hn::Add(hn::Load(d, used + v * kLanes), hn::Add(used0, used1)), d, used + v * kLanes);
    }
  }
}

// Rounds weights to bf16 in place, still as fp32, and adds their sums to `used`: what dropout and masks then work on.
template <int NV>
void RoundWeights(float* weights, int64_t keys, float* used) {
  const Floats d;
  for (int v = 0; v < NV; ++v) {
    Vec total = hn::Zero(d);
    for (int64_t i = 0; i < keys; ++i) {
      float* w = weights + (i * NV + v) * kLanes;
      const __m256i half = (__m256i)_mm512_cvtneps_pbh(hn::Load(d, w).raw);
      const Vec rounded{_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
      hn::Store(rounded, d, w);
      total = hn::Add(total, rounded);
    }
    hn::Store(hn::Add(hn::Load(d, used + v * kLanes), total), d, used + v * kLanes);
  }
}
#endif

}  // namespace tessera::cpu::TESSERA_KERNELS
HWY_AFTER_NAMESPACE();
#endif
