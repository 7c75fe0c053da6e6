// Backward: from products to weights P = 2^(score - lse) and to dscores = P * (dP - delta), a row of queries at a time,
// one key a lane.
#if defined(TESSERA_CPU_PAIR_WEIGHTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TESSERA_CPU_PAIR_WEIGHTS_INL_H_
#undef TESSERA_CPU_PAIR_WEIGHTS_INL_H_
#else
#define TESSERA_CPU_PAIR_WEIGHTS_INL_H_
#endif

#include <algorithm>
#include <limits>

#include "cpu/modify-inl.h"
#include "cpu/softmax-inl.h"
#include "cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tessera::cpu::TESSERA_KERNELS {

// weights [rows][stride]: scores in log2 units become P; dscores: dP becomes dscores. NV vectors a row.
template <int NV>
HWY_NOINLINE void PairWeights(float* HWY_RESTRICT weights, float* HWY_RESTRICT dscores, int64_t rows, int64_t stride,
                              const float* HWY_RESTRICT lse2, const float* HWY_RESTRICT delta) {
  const Floats d;
  const Vec one = hn::Set(d, 1.0f);
  for (int64_t r = 0; r < rows; ++r, weights += stride, dscores += stride) {
    const Vec bias = WeightBias(hn::Set(d, lse2[r])), mean = hn::Set(d, delta[r]);
    Vec p[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) p[v] = Weight<false>(hn::Load(d, weights + v * kLanes), one, bias);
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      hn::Store(p[v], d, weights + v * kLanes);
      const Vec centered = hn::Sub(hn::Load(d, dscores + v * kLanes), mean);
      hn::Store(hn::Mul(p[v], centered), d, dscores + v * kLanes);
    }
  }
}

#if TESSERA_BF16_DOT
// Rows of P and dscores as the bf16 products read them.
struct PairsOut {
  uint32_t* weights = nullptr;       // [pairs of queries][stride]
  uint32_t* dscores = nullptr;       // [pairs of queries][stride]
  uint32_t* dscores_rows = nullptr;  // [queries][stride / 2]: pairs of keys
};

// kWeigh: the arrays hold products, and become P and dscores on the way; otherwise they hold those already.
template <int NV, bool kWeigh>
HWY_NOINLINE void WeightsToPairs(const float* weights, const float* dscores, int64_t rows, int64_t stride, float factor,
                                 const float* lse2, const float* delta, const PairsOut& out) {
  const Floats d;
  const Vec f = hn::Set(d, factor);
  for (int64_t r = 0; r < rows; r += 2) {
    Vec p[2][NV], ds[2][NV];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      if (r + i == rows) {
        for (int v = 0; v < NV; ++v) p[i][v] = ds[i][v] = hn::Zero(d);
        break;
      }
      const float* w = weights + (r + i) * stride;
      const float* s = dscores + (r + i) * stride;
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        p[i][v] = hn::Load(d, w + v * kLanes);
        ds[i][v] = hn::Load(d, s + v * kLanes);
      }
      if constexpr (kWeigh) {
        const Vec bias = WeightBias(hn::Set(d, lse2[r + i])), mean = hn::Set(d, delta[r + i]);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
          p[i][v] = Weight<true>(p[i][v], f, bias);
          ds[i][v] = hn::Mul(p[i][v], hn::Sub(ds[i][v], mean));
        }
      }
      uint32_t* row = out.dscores_rows + (r + i) * (stride / 2);
#pragma GCC unroll 8
      for (int v = 0; v + 1 < NV; v += 2) {
        _mm512_storeu_si512(row + v * kLanes / 2, (__m512i)_mm512_cvtne2ps_pbh(ds[i][v + 1].raw, ds[i][v].raw));
      }
      if constexpr (NV % 2 != 0) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + (NV - 1) * kLanes / 2),
                            (__m256i)_mm512_cvtneps_pbh(ds[i][NV - 1].raw));
      }
    }
    uint32_t* pairs = out.weights + r / 2 * stride;
    uint32_t* dpairs = out.dscores + r / 2 * stride;
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      _mm512_store_si512(pairs + v * kLanes, PairToBf16(p[0][v], p[1][v]));
      _mm512_store_si512(dpairs + v * kLanes, PairToBf16(ds[0][v], ds[1][v]));
    }
  }
}
#endif

// One row of a panel: query q against `width` keys from k on, of which those of `admitted` count.
struct RowPlace {
  int64_t q = 0, k = 0, width = 0;
  uint64_t admitted = 0;
  float lse2 = 0, delta = 0;
};

// Softcap, biases, masks and dropout of one block pair: the long way.
class ScoreModifier {
 public:
  ScoreModifier(const Problem& p, int64_t b, int64_t h, int64_t entry, float factor)
      : p_(p), b_(b), h_(h), terms_(p, b, h), lanes_(terms_, entry, factor) {}

  // Biases of query q and `keys` keys from k on, in log2 units; 0 up to width. False: there are none.
  bool LoadBias(int64_t q, int64_t k, int64_t keys, int64_t width, float* to) const {
    if (terms_.has_bias) LoadBiasRow(p_, terms_, q, k, keys, to);
    std::fill(to + keys, to + width, 0.0f);
    return terms_.has_bias;
  }

  // What dropout multiplies the weights of `width` keys with: 0 or 1 / (1 - p). The numbers of dropout_random.
  void LoadKeep(int64_t q, int64_t k, int64_t width, float* to) const {
    const Floats d;
    const Uints du;
    const uint64_t stream = p_.dropout_stream(b_, h_);
    const Philox::Key key = dropout_key(p_.dropout);
    const uint32_t threshold = drop_threshold(p_.dropout.p);
    const int64_t first = p_.dropout_k(k), group = first >> 2, skip = first - group * 4;
    HWY_ALIGN uint32_t random[kMaxPanel + 4 * kLanes + 4];
    for (int64_t i = 0; i < width + skip; i += 4 * kLanes) {  // four numbers a counter, of four keys in a row
      const Philox::Counter c = dropout_counter(p_.dropout, stream, p_.dropout_q(q), group * 4 + i);
      const Philox4 x =
          PhiloxWords({{hn::Iota(du, c[0]), hn::Set(du, c[1]), hn::Set(du, c[2]), hn::Set(du, c[3])}}, key);
      hn::StoreInterleaved4(x.word[0], x.word[1], x.word[2], x.word[3], du, random + i);
    }
    const Vec kept = hn::Set(d, static_cast<float>(1.0 / (1.0 - p_.dropout.p)));
    for (int64_t i = 0; i < width; i += kLanes) {
      const auto dropped = hn::Lt(hn::LoadU(du, random + skip + i), hn::Set(du, threshold));
      hn::Store(hn::IfThenZeroElse(hn::RebindMask(d, dropped), kept), d, to + i);
    }
  }

  // Products in `weights` and `dscores` become P (after dropout) and dscores; their sum before softcap joins bias_sum.
  // `bias`: or nullptr.
  // Returns the admitted keys; one with a bias of -inf is none.
  uint64_t Row(const RowPlace& place, const float* bias, const float* keep, bool through_softcap, float* weights,
               float* dscores, Vec& bias_sum) const {
    const Floats d;
    const Vec one = hn::Set(d, 1.0f), minus_inf = hn::Set(d, kNegInf);
    const Vec lse2 = hn::Set(d, place.lse2), lse = WeightBias(lse2), mean = hn::Set(d, place.delta);
    const Vec gap = hn::Add(hn::Iota(d, 0), hn::Set(d, static_cast<float>(place.k - place.q - terms_.diagonal)));
    uint64_t seen = 0;
    for (int64_t i = 0; i < place.width; i += kLanes) {
      Vec derivative;
      Vec x = lanes_.Score(hn::Load(d, weights + i), hn::Add(gap, hn::Set(d, static_cast<float>(i))), derivative);
      if (bias != nullptr) x = hn::Add(x, hn::Load(d, bias + i));
      // Not Ne: that is false for NaN on AVX, and a NaN score must spread.
      const auto absent = hn::Eq(x, minus_inf);
      const auto admitted = hn::AndNot(absent, MaskOfBits(static_cast<uint32_t>(place.admitted >> i)));
      // No weight exceeds 1, though a score and an lse of large magnitude may be rounded apart.
      x = AtMost(lse2, x);
      Vec p = Weight<false>(x, one, lse), dp = hn::Load(d, dscores + i), used = p;
      if (p_.dropout.p > 0) {
        const Vec kept = hn::Load(d, keep + i);
        used = hn::Mul(p, kept);
        dp = hn::Mul(dp, kept);
      }
      const Vec ds = hn::IfThenElseZero(admitted, hn::Mul(p, hn::Sub(dp, mean)));
      bias_sum = hn::Add(bias_sum, ds);
      const Vec through = through_softcap ? hn::IfThenElseZero(admitted, hn::Mul(ds, derivative)) : ds;
      hn::Store(hn::IfThenElseZero(admitted, used), d, weights + i);
      hn::Store(through, d, dscores + i);
      uint8_t bits[8] = {};
      hn::StoreMaskBits(d, admitted, bits);
      for (int n = 0; n * 8 < kLanes; ++n) seen |= uint64_t{bits[n]} << (i + n * 8);
    }
    return seen;
  }

 private:
  const Problem& p_;
  const int64_t b_, h_;
  const ScoreTerms terms_;
  const LaneScores lanes_;
};

}  // namespace tessera::cpu::TESSERA_KERNELS
HWY_AFTER_NAMESPACE();
#endif
