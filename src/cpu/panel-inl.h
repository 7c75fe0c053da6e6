// Rows as they lie in memory to the lanes of a panel, and back: the transposes that products with one query (forward)
// or one key (backward) a lane need, once per row or column of blocks.
#if defined(TESSERA_CPU_PANEL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TESSERA_CPU_PANEL_INL_H_
#undef TESSERA_CPU_PANEL_INL_H_
#else
#define TESSERA_CPU_PANEL_INL_H_
#endif

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>

#include "cpu/convert-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tessera::cpu::TESSERA_KERNELS {

// Lane j of v[i] and lane i of v[j] change places. Any 32-bit elements.
HWY_INLINE void Transpose(Vec (&v)[kLanes]) {
  const Floats d;
  const hn::Repartition<double, Floats> d2;
  // 4 x 4 inside every block of 128 bits,
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
    const auto a = hn::BitCast(d2, hn::InterleaveLower(d, v[i], v[i + 1]));
    const auto b = hn::BitCast(d2, hn::InterleaveLower(d, v[i + 2], v[i + 3]));
    const auto c = hn::BitCast(d2, hn::InterleaveUpper(d, v[i], v[i + 1]));
    const auto e = hn::BitCast(d2, hn::InterleaveUpper(d, v[i + 2], v[i + 3]));
    v[i] = hn::BitCast(d, hn::InterleaveLower(d2, a, b));
    v[i + 1] = hn::BitCast(d, hn::InterleaveUpper(d2, a, b));
    v[i + 2] = hn::BitCast(d, hn::InterleaveLower(d2, c, e));
    v[i + 3] = hn::BitCast(d, hn::InterleaveUpper(d2, c, e));
  }
  // then the blocks.
#if HWY_MAX_BYTES == 64
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vec a = hn::ConcatLowerLower(d, v[i + 8], v[i]), b = hn::ConcatLowerLower(d, v[i + 12], v[i + 4]);
    const Vec c = hn::ConcatUpperUpper(d, v[i + 8], v[i]), e = hn::ConcatUpperUpper(d, v[i + 12], v[i + 4]);
    v[i] = hn::OddEvenBlocks(hn::SwapAdjacentBlocks(b), a);
    v[i + 4] = hn::OddEvenBlocks(b, hn::SwapAdjacentBlocks(a));
    v[i + 8] = hn::OddEvenBlocks(hn::SwapAdjacentBlocks(e), c);
    v[i + 12] = hn::OddEvenBlocks(e, hn::SwapAdjacentBlocks(c));
  }
#elif HWY_MAX_BYTES == 32
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vec a = v[i], b = v[i + 4];
    v[i] = hn::ConcatLowerLower(d, b, a);
    v[i + 4] = hn::ConcatUpperUpper(d, b, a);
  }
#endif
}

// What a product reads in one step: an element times `scale`, or (kStep = 2) the bits of a pair of bf16, their signs
// flipped where scale < 0. kLanes steps from step i on, and one step of a row of n elements.
template <int kStep, class T>
HWY_INLINE Vec Steps(const T* row, int64_t i, float scale) {
  const Floats d;
  if constexpr (kStep == 2) {
    const Vec pairs = hn::LoadU(d, reinterpret_cast<const float*>(row) + i);
    return scale < 0 ? hn::Xor(pairs, hn::BitCast(d, hn::Set(Uints(), 0x80008000u))) : pairs;
  } else {
    return hn::Mul(LoadFloats(row + i), hn::Set(d, scale));
  }
}
template <int kStep, class T>
HWY_INLINE float Step(const T* row, int64_t n, int64_t i, float scale) {
  if constexpr (kStep == 2) {
    uint32_t bits = row[2 * i].bits;
    if (2 * i + 1 < n) bits |= uint32_t{row[2 * i + 1].bits} << 16;  // an odd n ends in half a pair
    return std::bit_cast<float>(scale < 0 ? bits ^ 0x80008000u : bits);
  } else {
    return ToFloat(row[i]) * scale;
  }
}

// `count` rows of n elements, stride apart, into the first kLanes lanes of a panel [ceil(n / kStep)][width]; lanes past
// count become 0.
template <int kStep, class T>
HWY_INLINE void RowsToLanes(const T* from, int64_t stride, int64_t count, int64_t n, float scale, float* to,
                            int64_t width) {
  const Floats d;
  count = std::min<int64_t>(count, kLanes);
  int64_t i = 0;
  for (; (i + kLanes) * kStep <= n; i += kLanes) {
    Vec v[kLanes];
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) v[r] = Steps<kStep>(from + std::min<int64_t>(r, count - 1) * stride, i, scale);
    for (int64_t r = count; r < kLanes; ++r) v[r] = hn::Zero(d);
    Transpose(v);
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) hn::Store(v[r], d, to + (i + r) * width);
  }
  for (; i * kStep < n; ++i) {
    for (int64_t r = 0; r < kLanes; ++r) {
      to[i * width + r] = r < count ? Step<kStep>(from + r * stride, n, i, scale) : 0.0f;
    }
  }
}

// The first `count` lanes (at most kLanes) of a panel [n][width], times their factors, into rows of n elements, stride
// apart. A lane whose factor is 0 becomes 0, whatever it holds.
template <class T>
HWY_INLINE void LanesToRows(const float* from, int64_t width, int64_t n, Vec factor, int64_t count, T* to,
                            int64_t stride) {
  const Floats d;
  count = std::min<int64_t>(count, kLanes);
  const auto zero = hn::Eq(factor, hn::Zero(d));
  const auto finished = [&](int64_t c) HWY_ATTR {
    return hn::IfThenZeroElse(zero, hn::Mul(hn::Load(d, from + c * width), factor));
  };
  int64_t c = 0;
#if TESSERA_BF16_DOT
  if constexpr (std::is_same_v<T, bfloat16>) {  // two values an element: half as many shuffles, and whole cache lines
    for (; c + 2 * kLanes <= n; c += 2 * kLanes) {
      Vec v[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        v[i] = Vec{_mm512_castsi512_ps(PairToBf16(finished(c + 2 * i), finished(c + 2 * i + 1)))};
      }
      Transpose(v);
      for (int64_t r = 0; r < count; ++r) hn::StoreU(v[r], d, reinterpret_cast<float*>(to + r * stride + c));
    }
  }
#endif
  for (; c + kLanes <= n; c += kLanes) {
    Vec v[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = finished(c + i);
    Transpose(v);
    for (int64_t r = 0; r < count; ++r) StoreFloats(v[r], to + r * stride + c);
  }
  HWY_ALIGN float lanes[kLanes];
  for (; c < n; ++c) {
    hn::Store(finished(c), d, lanes);
    for (int64_t r = 0; r < count; ++r) FromFloat(lanes[r], to + r * stride + c);
  }
}

}  // namespace tessera::cpu::TESSERA_KERNELS
HWY_AFTER_NAMESPACE();
#endif
