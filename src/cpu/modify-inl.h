// What may happen to a panel of scores between the product and the softmax: softcap, ALiBi, biases; masks; and to the
// weights after it: dropout. None of it is on the plain path.
#if defined(TESSERA_CPU_MODIFY_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TESSERA_CPU_MODIFY_INL_H_
#undef TESSERA_CPU_MODIFY_INL_H_
#else
#define TESSERA_CPU_MODIFY_INL_H_
#endif

#include <algorithm>

#include "call/pair_mask.h"
#include "call/philox.h"
#include "call/scores.h"
#include "cpu/panel-inl.h"
#include "cpu/softmax-inl.h"
#include "cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tessera::cpu::TESSERA_KERNELS {

inline constexpr int kMostKeys = 128;  // of a panel of scores

// Where a panel of scores lies in the problem: `rows` queries from `q`, `keys` keys from `k`, all of one kept block.
struct PanelPlace {
  int64_t b = 0, h = 0;
  int64_t q = 0, k = 0;
  int64_t rows = 0, keys = 0;
  int64_t entry = 0;
};

// The terms of call/scores.h for a vector of pairs, in log2 units; `factor` takes products there. What belongs to a
// pair alone (ScoreTerms::bias) its user adds.
struct LaneScores {
  LaneScores(const ScoreTerms& t, int64_t entry, float product_factor)
      : capped(t.softcap > 0), sloped(t.has_slope), shifted(t.has_shift) {
    const Floats d;
    factor = hn::Set(d, product_factor);
    // A quotient beyond fp32 saturates tanh as 1e38 does.
    const double quotient = capped ? std::clamp(product_factor * kLn2 / t.softcap, -1e38, 1e38) : 0.0;
    to_cap = hn::Set(d, static_cast<float>(quotient));
    cap = hn::Set(d, static_cast<float>(t.softcap) * kLog2e);
    slope = hn::Set(d, Slope(t));
    shift = hn::Set(d, BiasInLog2(t.shift(entry)));
  }
  static float Slope(const ScoreTerms& t) { return kLog2e * static_cast<float>(t.slope); }

  // `derivative`: of the score by the scaled product.
  HWY_INLINE Vec Score(Vec product, Vec distance, Vec& derivative) const {
    const Vec one = hn::Set(Floats(), 1.0f);
    Vec x;
    if (capped) {
      const Vec t = Tanh(hn::Mul(product, to_cap));
      x = hn::Mul(t, cap);
      derivative = hn::NegMulAdd(t, t, one);
    } else {
      x = hn::Mul(product, factor);
      derivative = one;
    }
    if (shifted) x = hn::Add(x, shift);
    if (sloped) x = hn::MulAdd(slope, hn::Abs(distance), x);
    return x;
  }

  bool capped, sloped, shifted;
  Vec factor, to_cap, cap;
  Vec slope, shift;  // of one head, or of each lane's
};

// BiasInLog2 of a vector.
HWY_INLINE Vec BiasInLog2(Vec bias) {
  const Floats d;
  const Vec bounded = AtLeast(hn::Set(d, static_cast<float>(kLowestBias)), bias);
  return hn::Mul(hn::Set(d, kLog2e), hn::IfThenElse(hn::Eq(bias, hn::Set(d, kNegInf)), bias, bounded));
}

template <class T>
HWY_INLINE void BiasRow(const T* from, int64_t n, float* to) {
  const Floats d;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) hn::StoreU(BiasInLog2(LoadFloats(from + i)), d, to + i);
  for (; i < n; ++i) to[i] = BiasInLog2(double{ToFloat(from[i])});
}

// Biases of query q and n keys from k on, in log2 units.
HWY_INLINE void LoadBiasRow(const Problem& p, const ScoreTerms& terms, int64_t q, int64_t k, int64_t n, float* to) {
  if (p.attn_bias_stride[3] == 0 && n > 0) {
    std::fill_n(to, n, BiasInLog2(terms.bias(q, k)));
    return;
  }
  if (p.attn_bias_stride[3] == 1) {
    const int64_t at = terms.bias_index(q, k);
    switch (p.attn_bias_dtype) {
      case DType::f32: return BiasRow(reinterpret_cast<const float*>(p.attn_bias) + at, n, to);
      case DType::bf16: return BiasRow(reinterpret_cast<const bfloat16*>(p.attn_bias) + at, n, to);
      case DType::f16: return BiasRow(reinterpret_cast<const float16*>(p.attn_bias) + at, n, to);
      default: break;
    }
  }
  for (int64_t i = 0; i < n; ++i) to[i] = BiasInLog2(terms.bias(q, k + i));
}

// Biases of a panel as vectors of queries: a row of them for each key, or one number where all queries have the same.
class PanelBias {
 public:
  PanelBias(const Problem& p, const ScoreTerms& terms, const PanelPlace& place, int64_t width) : width_(width) {
    if (!terms.has_bias) return;
    if (p.attn_bias_stride[2] == 0) {
      kind_ = kOfKey;
      LoadBiasRow(p, terms, place.q, place.k, place.keys, lanes_);
      return;
    }
    kind_ = kOfPair;
    HWY_ALIGN float rows[kLanes * kMostKeys];
    for (int64_t r = 0; r < width; r += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, place.rows - r);
      for (int64_t i = 0; i < count; ++i) {
        LoadBiasRow(p, terms, place.q + r + i, place.k, place.keys, rows + i * kMostKeys);
      }
      RowsToLanes<1>(static_cast<const float*>(rows), kMostKeys, count, place.keys, 1.0f, lanes_ + r, width);
    }
  }

  // Of key i and the queries of vector v.
  HWY_INLINE Vec Add(Vec x, int64_t i, int v) const {
    const Floats d;
    if (kind_ == kOfKey) return hn::Add(x, hn::Set(d, lanes_[i]));
    return kind_ == kOfPair ? hn::Add(x, hn::Load(d, lanes_ + i * width_ + v * kLanes)) : x;
  }

 private:
  enum Kind { kNone, kOfKey, kOfPair };
  Kind kind_ = kNone;
  const int64_t width_;
  HWY_ALIGN float lanes_[kMostKeys * kMaxPanel];  // [keys][width], or [keys]
};

// scores [keys][W] * factor (log2 units) become scores with all their terms; their column maxima go to `max`.
template <int NV>
HWY_NOINLINE void ModifyScores(const Problem& p, const PanelPlace& place, float factor, float* scores, float* max) {
  const Floats d;
  constexpr int W = NV * kLanes;
  const ScoreTerms terms(p, place.b, place.h);
  const LaneScores lanes(terms, place.entry, factor);
  const PanelBias bias(p, terms, place, W);
  const int64_t first_distance = place.q + terms.diagonal - place.k;
  Vec derivative, most[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) most[v] = hn::Set(d, kNegInf);
  for (int64_t i = 0; i < place.keys; ++i) {
    const Vec distance = hn::Add(hn::Iota(d, 0), hn::Set(d, static_cast<float>(first_distance - i)));
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float* s = scores + i * W + v * kLanes;
      const Vec gap = hn::Add(distance, hn::Set(d, static_cast<float>(v * kLanes)));
      const Vec x = bias.Add(lanes.Score(hn::Load(d, s), gap, derivative), i, v);
      hn::Store(x, d, s);
      most[v] = hn::Max(most[v], x);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) hn::Store(most[v], d, max + v * kLanes);
}

// Writes `value` where a query does not admit a key.
template <int NV>
void MaskPanel(const uint64_t* bits, int64_t keys, float value, float* scores) {
  const Floats d;
  for (int64_t i = 0; i < keys; ++i) {
    for (int v = 0; v < NV; ++v) {
      float* s = scores + (i * NV + v) * kLanes;
      const auto admitted = MaskOfBits(static_cast<uint32_t>(bits[i] >> (v * kLanes)));
      hn::Store(hn::IfThenElse(admitted, hn::Load(d, s), hn::Set(d, value)), d, s);
    }
  }
}

struct Philox4 {
  hn::Vec<Uints> word[4];
};

// High and low halves of a * m, m constant.
HWY_INLINE void MultiplyWide(hn::Vec<Uints> a, uint32_t m, hn::Vec<Uints>& high, hn::Vec<Uints>& low) {
  const Uints du;
  const auto factor = hn::Set(du, m);
  const auto even = hn::BitCast(du, hn::MulEven(a, factor));
  const hn::Repartition<uint64_t, Uints> dw;
  const auto odd_lanes = hn::BitCast(du, hn::ShiftRight<32>(hn::BitCast(dw, a)));
  const auto odd = hn::BitCast(du, hn::MulEven(odd_lanes, factor));
  low = hn::OddEven(hn::BitCast(du, hn::ShiftLeft<32>(hn::BitCast(dw, odd))), even);
  high = hn::OddEven(odd, hn::BitCast(du, hn::ShiftRight<32>(hn::BitCast(dw, even))));
}

// call/philox.h on vectors: one counter a lane; `x` is the counters.
HWY_INLINE Philox4 PhiloxWords(Philox4 x, Philox::Key key) {
  const Uints du;
  for (int round = 0; round < Philox::kRounds; ++round) {
    hn::Vec<Uints> high0, low0, high1, low1;
    MultiplyWide(x.word[0], Philox::kMultiplier0, high0, low0);
    MultiplyWide(x.word[2], Philox::kMultiplier1, high1, low1);
    x.word[0] = hn::Xor(hn::Xor(high1, x.word[1]), hn::Set(du, key[0]));
    x.word[2] = hn::Xor(hn::Xor(high0, x.word[3]), hn::Set(du, key[1]));
    x.word[1] = low1;
    x.word[3] = low0;
    key[0] += Philox::kWeyl0;
    key[1] += Philox::kWeyl1;
  }
  return x;
}

// Zeroes the dropped weights. Same numbers as dropout_random (call/problem.h), which says what is hashed.
template <int NV>
HWY_NOINLINE void DropWeights(const Problem& p, const PanelPlace& place, float* weights) {
  const Floats d;
  const Uints du;
  const auto threshold = hn::Set(du, drop_threshold(p.dropout.p));
  const uint64_t stream = p.dropout_stream(place.b, place.h);
  const Philox::Key key = dropout_key(p.dropout);
  const int64_t first = p.dropout_k(place.k), last = first + place.keys;
  for (int64_t group = first >> 2; group <= (last - 1) >> 2; ++group) {
    for (int v = 0; v < NV; ++v) {
      const Philox::Counter first_of = dropout_counter(p.dropout, stream, p.dropout_q(place.q + v * kLanes), group * 4);
      const Philox4 random = PhiloxWords(
          {{hn::Set(du, first_of[0]), hn::Iota(du, first_of[1]), hn::Set(du, first_of[2]), hn::Set(du, first_of[3])}},
          key);
      for (int w = 0; w < 4; ++w) {
        const int64_t i = group * 4 + w - first;
        if (i < 0 || i >= place.keys) continue;
        float* s = weights + (i * NV + v) * kLanes;
        const auto dropped = hn::RebindMask(d, hn::Lt(random.word[w], threshold));
        hn::Store(hn::IfThenZeroElse(dropped, hn::Load(d, s)), d, s);
      }
    }
  }
}

}  // namespace tessera::cpu::TESSERA_KERNELS
HWY_AFTER_NAMESPACE();
#endif
