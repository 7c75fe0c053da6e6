// Vector types and the few functions that softmax needs, for the instruction set that is being compiled.
#if defined(TESSERA_CPU_VECMATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TESSERA_CPU_VECMATH_INL_H_
#undef TESSERA_CPU_VECMATH_INL_H_
#else
#define TESSERA_CPU_VECMATH_INL_H_
#endif

#include <limits>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace tessera::cpu::TESSERA_KERNELS {
namespace hn = hwy::HWY_NAMESPACE;

// Vectors are as wide as the target; every target here has a fixed width.
using Floats = hn::ScalableTag<float>;
using Ints = hn::RebindToSigned<Floats>;
using Uints = hn::RebindToUnsigned<Floats>;
using Vec = hn::Vec<Floats>;
inline constexpr int kLanes = HWY_MAX_BYTES / sizeof(float);

inline constexpr float kLog2e = 1.442695041f;
inline constexpr double kLog2eDouble = 1.4426950408889634;
inline constexpr double kLn2 = 0.6931471805599453;

// A bias in log2 units. -inf means that there is no key, and no other number may become that: masks of the lowest float
// are common, and a row of nothing else has weights. (Their differences are lost: they all count as -2.35e38.)
inline constexpr double kLowestBias = -2.35e38;
inline float BiasInLog2(double bias) {
  if (bias < kLowestBias && bias != -std::numeric_limits<double>::infinity()) bias = kLowestBias;
  return kLog2e * static_cast<float>(bias);
}

// The larger one, or x if it is NaN. On x86 the second operand of max comes through; NEON's maxnm would drop it.
HWY_INLINE Vec AtLeast(Vec bound, Vec x) {
#if HWY_TARGET == HWY_NEON
  return Vec{vmaxq_f32(bound.raw, x.raw)};
#else
  return hn::Max(bound, x);
#endif
}

// 2^x for x <= 64, relative error < 1.7e-7; NaN stays NaN; below -126 the result is 0 or (AVX-512) the right
// subnormal. Degree-5 polynomial on [-1/2, 1/2] with constant 1, so that 2^integer is exact. Rounding by the magic
// number 1.5 * 2^23, whose low bits then hold the exponent: beside saturated FMA units, adds, max and integer
// operations cost nothing, only the five FMAs do.
HWY_INLINE Vec Exp2(Vec x) {
  const Floats d;
  const Vec magic = hn::Set(d, 12582912.0f);
  const Vec clamped = AtLeast(hn::Set(d, -200.0f), x);
  const Vec shifted = hn::Add(clamped, magic);
  const Vec rounded = hn::Sub(shifted, magic);
  const Vec f = hn::Sub(clamped, rounded);
  Vec y = hn::MulAdd(f, hn::Set(d, 0x1.5bba14p-10f), hn::Set(d, 0x1.3cea88p-7f));
  y = hn::MulAdd(f, y, hn::Set(d, 0x1.c6b752p-5f));
  y = hn::MulAdd(f, y, hn::Set(d, 0x1.ebf9bcp-3f));
  y = hn::MulAdd(f, y, hn::Set(d, 0x1.62e42ap-1f));
  y = hn::MulAdd(f, y, hn::Set(d, 1.0f));
#if HWY_TARGET == HWY_AVX3
  return Vec{_mm512_scalef_ps(y.raw, rounded.raw)};
#else
  const Ints di;
  const auto exponent = hn::ShiftLeft<23>(hn::BitCast(di, shifted));
  const Vec scaled = hn::BitCast(d, hn::Add(hn::BitCast(di, y), exponent));
  // Where the exponent would wrap; NaN compares false and goes through `scaled`, which is NaN then.
  return hn::IfThenZeroElse(hn::Lt(clamped, hn::Set(d, -126.0f)), scaled);
#endif
}

// What softmax does to a score: 2^(s * factor - m), as Exp2 of that but cheaper where the target allows. `bias` is
// WeightBias(m). On AVX-512 the bias includes -1/2, so that rounding to nearest is the floor that vreduce and scalef
// agree on: 8 operations instead of 11, and no clamp, as both know infinities. Relative error < 1.8e-7.
HWY_INLINE Vec WeightBias(Vec m) {
#if HWY_TARGET == HWY_AVX3
  return hn::Sub(m, hn::Set(Floats(), 0.5f));
#else
  return m;
#endif
}
template <bool kScaled>  // false: factor is 1
HWY_INLINE Vec Weight(Vec s, Vec factor, Vec bias) {
  [[maybe_unused]] const Floats d;
  Vec x;
  if constexpr (kScaled) {
    x = hn::MulSub(s, factor, bias);
  } else {
    x = hn::Sub(s, bias);
  }
#if HWY_TARGET == HWY_AVX3
  const Vec t{_mm512_reduce_ps(x.raw, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};  // x - floor(x)
  // 2^(t - 1/2) on [0, 1)
  Vec y = hn::MulAdd(t, hn::Set(d, 0x1.5c08e6p-10f), hn::Set(d, 0x1.a09316p-8f));
  y = hn::MulAdd(t, y, hn::Set(d, 0x1.43616ep-5f));
  y = hn::MulAdd(t, y, hn::Set(d, 0x1.5bc792p-3f));
  y = hn::MulAdd(t, y, hn::Set(d, 0x1.f5e57cp-2f));
  y = hn::MulAdd(t, y, hn::Set(d, 0x1.6a09e4p-1f));
  return Vec{_mm512_scalef_ps(y.raw, x.raw)};
#else
  return Exp2(x);
#endif
}

// tanh(x), relative error a few epsilon: odd polynomial near 0 (Taylor terms to x^13), 1 - 2 / (e^2x + 1) elsewhere.
HWY_INLINE Vec Tanh(Vec x) {
  const Floats d;
  const Vec a = hn::Abs(x);
  const Vec e = Exp2(hn::Min(hn::Mul(a, hn::Set(d, 2 * kLog2e)), hn::Set(d, 60.0f)));
  const Vec one = hn::Set(d, 1.0f);
  const Vec large = hn::CopySign(hn::Sub(one, hn::Div(hn::Set(d, 2.0f), hn::Add(e, one))), x);
  const Vec s = hn::Mul(x, x);
  Vec p = hn::Set(d, 21844.0f / 6081075.0f);
  p = hn::MulAdd(p, s, hn::Set(d, -1382.0f / 155925.0f));
  p = hn::MulAdd(p, s, hn::Set(d, 62.0f / 2835.0f));
  p = hn::MulAdd(p, s, hn::Set(d, -17.0f / 315.0f));
  p = hn::MulAdd(p, s, hn::Set(d, 2.0f / 15.0f));
  p = hn::MulAdd(p, s, hn::Set(d, -1.0f / 3.0f));
  const Vec small = hn::MulAdd(hn::Mul(x, s), p, x);
  const Vec finite = hn::IfThenElse(hn::Lt(a, hn::Set(d, 0.35f)), small, large);
  return hn::IfThenElse(hn::Eq(x, x), finite, x);
}

// The smaller one, or x if it is NaN.
HWY_INLINE Vec AtMost(Vec bound, Vec x) {
#if HWY_TARGET == HWY_NEON
  return Vec{vminq_f32(bound.raw, x.raw)};
#else
  return hn::Min(bound, x);
#endif
}

// Lane masks for the low kLanes bits of `bits`.
HWY_INLINE hn::Mask<Floats> MaskOfBits(uint32_t bits) {
  const Uints du;
  const auto lane_bit = hn::Shl(hn::Set(du, 1), hn::Iota(du, 0));
  return hn::RebindMask(Floats(), hn::Ne(hn::And(hn::Set(du, bits), lane_bit), hn::Zero(du)));
}

}  // namespace tessera::cpu::TESSERA_KERNELS
HWY_AFTER_NAMESPACE();
#endif
