// Rows of storage types to fp32 and back.
#if defined(TESSERA_CPU_CONVERT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TESSERA_CPU_CONVERT_INL_H_
#undef TESSERA_CPU_CONVERT_INL_H_
#else
#define TESSERA_CPU_CONVERT_INL_H_
#endif

#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/vecmath-inl.h"
#include "tessera/dtype.h"

HWY_BEFORE_NAMESPACE();
namespace tessera::cpu::TESSERA_KERNELS {

using HalfBits = hn::Rebind<uint16_t, Floats>;  // as many 16-bit lanes as a vector has floats

HWY_INLINE float ToFloat(float x) { return x; }
HWY_INLINE float ToFloat(bfloat16 x) { return to_float(x); }
HWY_INLINE float ToFloat(float16 x) { return to_float(x); }

// kLanes elements from unaligned memory.
HWY_INLINE Vec LoadFloats(const float* p) { return hn::LoadU(Floats(), p); }
HWY_INLINE Vec LoadFloats(const bfloat16* p) {
  const auto bits = hn::PromoteTo(Uints(), hn::LoadU(HalfBits(), reinterpret_cast<const uint16_t*>(p)));
  return hn::BitCast(Floats(), hn::ShiftLeft<16>(bits));
}
#if HWY_TARGET == HWY_SSE4  // no F16C: Highway's emulation neither rounds to even nor knows NaN and Inf
HWY_INLINE Vec LoadFloats(const float16* p) {
  const Floats d;
  const Uints du;
  const auto half = hn::PromoteTo(du, hn::LoadU(HalfBits(), reinterpret_cast<const uint16_t*>(p)));
  const auto magnitude = hn::And(half, hn::Set(du, 0x7fff));
  const auto sign = hn::ShiftLeft<16>(hn::Sub(half, magnitude));
  const Vec normal = hn::BitCast(d, hn::Add(hn::ShiftLeft<13>(magnitude), hn::Set(du, 112u << 23)));
  // A subnormal half is so many times 2^-24. (Not by a product of its bits, which are a subnormal float:
  // FlushSubnormals.)
  const Vec small = hn::Mul(hn::ConvertTo(d, hn::BitCast(Ints(), magnitude)), hn::Set(d, 0x1p-24f));
  const Vec scaled = hn::IfThenElse(hn::RebindMask(d, hn::Lt(magnitude, hn::Set(du, 0x400))), small, normal);
  const auto special = hn::Gt(magnitude, hn::Set(du, 0x7bff));
  const auto full = hn::IfThenElseZero(special, hn::Set(du, 0x7f800000));
  return hn::BitCast(d, hn::Or(hn::Or(hn::BitCast(du, scaled), full), sign));
}
#else
HWY_INLINE Vec LoadFloats(const float16* p) {
  return hn::PromoteTo(Floats(),
                       hn::LoadU(hn::Rebind<hwy::float16_t, Floats>(), reinterpret_cast<const hwy::float16_t*>(p)));
}
#endif

HWY_INLINE void StoreFloats(Vec x, float* p) { hn::StoreU(x, Floats(), p); }
#if HWY_TARGET == HWY_SSE4
HWY_INLINE void StoreFloats(Vec x, float16* p) {
  // to_float16 (tessera/dtype.h) on vectors.
  const Floats d;
  const Uints du;
  const auto u = hn::BitCast(du, x);
  const auto magnitude = hn::And(u, hn::Set(du, 0x7fffffff));
  const auto sign = hn::ShiftRight<16>(hn::Sub(u, magnitude));
  const auto odd = hn::And(hn::ShiftRight<13>(magnitude), hn::Set(du, 1));
  auto half = hn::ShiftRight<13>(hn::Add(hn::Sub(magnitude, hn::Set(du, (112u << 23) - 0xfff)), odd));
  const auto shifted = hn::BitCast(du, hn::Add(hn::BitCast(d, magnitude), hn::Set(d, 0.5f)));
  const auto subnormal = hn::Lt(magnitude, hn::Set(du, 0x38800000));
  half = hn::IfThenElse(subnormal, hn::Sub(shifted, hn::Set(du, 0x3f000000)), half);
  half = hn::IfThenElse(hn::Gt(magnitude, hn::Set(du, 0x477fefff)), hn::Set(du, 0x7c00), half);
  half = hn::IfThenElse(hn::Gt(magnitude, hn::Set(du, 0x7f800000)), hn::Set(du, 0x7e00), half);
  half = hn::Or(half, sign);
  hn::StoreU(hn::DemoteTo(HalfBits(), hn::BitCast(Ints(), half)), HalfBits(), reinterpret_cast<uint16_t*>(p));
}
#else
HWY_INLINE void StoreFloats(Vec x, float16* p) {
  hn::StoreU(hn::DemoteTo(hn::Rebind<hwy::float16_t, Floats>(), x), hn::Rebind<hwy::float16_t, Floats>(),
             reinterpret_cast<hwy::float16_t*>(p));
}
#endif
HWY_INLINE void StoreFloats(Vec x, bfloat16* p) {
  const Uints du;
  const auto u = hn::BitCast(du, x);
  const auto odd = hn::And(hn::ShiftRight<16>(u), hn::Set(du, 1));
  const auto rounded = hn::Add(hn::Add(u, hn::Set(du, 0x7fff)), odd);
  const auto quiet = hn::Or(u, hn::Set(du, 0x400000));
  const auto is_number = hn::RebindMask(du, hn::Eq(x, x));
  const auto high = hn::ShiftRight<16>(hn::IfThenElse(is_number, rounded, quiet));
  hn::StoreU(hn::DemoteTo(HalfBits(), hn::BitCast(Ints(), high)), HalfBits(), reinterpret_cast<uint16_t*>(p));
}

HWY_INLINE void FromFloat(float x, float* p) { *p = x; }
HWY_INLINE void FromFloat(float x, bfloat16* p) { *p = to_bfloat16(x); }
HWY_INLINE void FromFloat(float x, float16* p) { *p = to_float16(x); }

template <class T>
HWY_INLINE void RowToFloat(const T* HWY_RESTRICT in, int64_t n, float* HWY_RESTRICT out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) hn::StoreU(LoadFloats(in + i), Floats(), out + i);
  for (; i < n; ++i) out[i] = ToFloat(in[i]);
}

template <class T>
HWY_INLINE void RowFromFloat(const float* HWY_RESTRICT in, int64_t n, T* HWY_RESTRICT out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) StoreFloats(hn::LoadU(Floats(), in + i), out + i);
  for (; i < n; ++i) FromFloat(in[i], out + i);
}

// Any NaN or Inf among n elements?
template <class T>
HWY_INLINE bool AnyNonFinite(const T* p, int64_t n) {
  const Floats d;
  const Vec inf = hn::Set(d, std::numeric_limits<float>::infinity());
  auto bad = hn::MaskFromVec(hn::Zero(d));
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec a = hn::Abs(LoadFloats(p + i));
    bad = hn::Or(bad, hn::Not(hn::Lt(a, inf)));
  }
  bool any = !hn::AllFalse(d, bad);
  for (; i < n; ++i) any = any || !(std::abs(ToFloat(p[i])) < std::numeric_limits<float>::infinity());
  return any;
}

#if TESSERA_BF16_DOT
// Rows a and b of n bf16 as pairs (a[i], b[i]); b may be null: zeros.
HWY_INLINE void InterleaveRows(const bfloat16* a, const bfloat16* b, int64_t n, uint32_t* out) {
  alignas(64) static constexpr uint16_t kPairs[2][32] = {
      {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
      {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
       24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
  const __m512i first = _mm512_load_si512(kPairs[0]), second = _mm512_load_si512(kPairs[1]);
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    const __mmask32 some = n - i >= 2 * kLanes ? ~0u : (1u << (n - i)) - 1;
    const __m512i low = _mm512_maskz_loadu_epi16(some, a + i);
    const __m512i high = _mm512_maskz_loadu_epi16(b ? some : 0, b + i);
    _mm512_mask_storeu_epi32(out + i, some & 0xffff, _mm512_permutex2var_epi16(low, first, high));
    _mm512_mask_storeu_epi32(out + i + kLanes, some >> 16, _mm512_permutex2var_epi16(low, second, high));
  }
}

// Two vectors of fp32 to bf16 pairs (a in the lower halves), round to nearest even; subnormals become 0.
HWY_INLINE __m512i PairToBf16(Vec a, Vec b) {
  alignas(64) static constexpr uint16_t kHalves[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b.raw, a.raw);
  return _mm512_permutexvar_epi16(_mm512_load_si512(kHalves), both);
}
#endif

}  // namespace tessera::cpu::TESSERA_KERNELS
HWY_AFTER_NAMESPACE();
#endif
