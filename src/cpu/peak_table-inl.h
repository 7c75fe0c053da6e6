// The loops that measure the peaks of one instruction set.
#if defined(TESSERA_CPU_PEAK_TABLE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TESSERA_CPU_PEAK_TABLE_INL_H_
#undef TESSERA_CPU_PEAK_TABLE_INL_H_
#else
#define TESSERA_CPU_PEAK_TABLE_INL_H_
#endif

#include "cpu/kernel_table.h"
#include "cpu/vecmath-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tessera::cpu::TESSERA_KERNELS {

// Twelve chains hide the latency of two FMA units. Each starts elsewhere, or the compiler would keep one of them.
inline constexpr int kChains = 12;

double FmaBurn(int64_t iterations) {
  const Floats d;
  const Vec a = hn::Set(d, 0.999999f), b = hn::Set(d, 1e-6f);
  Vec x[kChains];
#pragma GCC unroll 12
  for (int j = 0; j < kChains; ++j) x[j] = hn::Set(d, 1.0f + static_cast<float>(j));
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) x[j] = hn::MulAdd(x[j], a, b);
  }
  Vec sum = x[0];
#pragma GCC unroll 12
  for (int j = 1; j < kChains; ++j) sum = hn::Add(sum, x[j]);
  volatile float keep = hn::GetLane(sum);
  (void)keep;
  return 2.0 * kChains * kLanes * static_cast<double>(iterations);
}

#if TESSERA_BF16_DOT
double Bf16Burn(int64_t iterations) {
  const __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f00), b = (__m512bh)_mm512_set1_epi16(0x1000);
  __m512 x[kChains];
#pragma GCC unroll 12
  for (int j = 0; j < kChains; ++j) x[j] = _mm512_set1_ps(static_cast<float>(j));
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) x[j] = _mm512_dpbf16_ps(x[j], a, b);
  }
  __m512 sum = x[0];
#pragma GCC unroll 12
  for (int j = 1; j < kChains; ++j) sum = _mm512_add_ps(sum, x[j]);
  volatile float keep = _mm512_cvtss_f32(sum);
  (void)keep;
  return 4.0 * kChains * kLanes * static_cast<double>(iterations);
}
#endif

uint64_t Read(const std::byte* data, size_t n) {
  const hn::ScalableTag<uint64_t> d;
  constexpr size_t kBytes = kLanes * sizeof(float);
  auto s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0;
  for (size_t i = 0; i + 4 * kBytes <= n; i += 4 * kBytes) {
    const auto* p = reinterpret_cast<const uint64_t*>(data + i);
    const size_t step = kBytes / sizeof(uint64_t);
    s0 = hn::Add(s0, hn::LoadU(d, p));
    s1 = hn::Add(s1, hn::LoadU(d, p + step));
    s2 = hn::Add(s2, hn::LoadU(d, p + 2 * step));
    s3 = hn::Add(s3, hn::LoadU(d, p + 3 * step));
  }
  return hn::GetLane(hn::Add(hn::Add(s0, s1), hn::Add(s2, s3)));
}

const PeakKernels* Table(const PeakKernels*) {
#if TESSERA_BF16_DOT
  constexpr auto bf16_burn = Bf16Burn;
#else
  constexpr double (*bf16_burn)(int64_t) = nullptr;
#endif
  static constexpr PeakKernels table{.fma_burn = FmaBurn, .bf16_burn = bf16_burn, .read = Read};
  return &table;
}

}  // namespace tessera::cpu::TESSERA_KERNELS
HWY_AFTER_NAMESPACE();
#endif
