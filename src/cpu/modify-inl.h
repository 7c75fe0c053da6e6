// What may happen to a panel of scores between the product and the softmax: softcap, ALiBi, biases; masks; and to the
// weights after it: dropout. None of it is on the plain path.
#if defined(TESSERA_CPU_MODIFY_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TESSERA_CPU_MODIFY_INL_H_
#undef TESSERA_CPU_MODIFY_INL_H_
#else
#define TESSERA_CPU_MODIFY_INL_H_
#endif

#include "call/philox.h"
#include "call/problem.h"
#include "cpu/softmax-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tessera::cpu::TESSERA_KERNELS {

// Where a panel of scores lies in the problem: `rows` queries from `q`, `keys` keys from `k`, all of one kept block.
struct PanelPlace {
  int64_t b = 0, h = 0;
  int64_t q = 0, k = 0;
  int64_t rows = 0, keys = 0;
  int64_t entry = 0;
};

inline bool ModifiesScores(const Problem& p) {
  return p.softcap > 0 || p.alibi != nullptr || p.block_bias != nullptr || p.attn_bias != nullptr;
}

// scores [keys][W] * factor (log2 units) -> softcap, then biases; the result is in log2 units.
template <int NV>
HWY_NOINLINE void ModifyScores(const Problem& p, const PanelPlace& place, float factor, float* scores) {
  const Floats d;
  constexpr int W = NV * kLanes;
  const float cap = static_cast<float>(p.softcap);
  const Vec to_cap = hn::Set(d, p.softcap > 0 ? static_cast<float>(factor * kLn2 / p.softcap) : 0.0f);
  const Vec capped = hn::Set(d, cap * kLog2e);
  const float slope = p.alibi ? -kLog2e * p.alibi[place.b * p.alibi_batch + place.h * p.alibi_head] : 0.0f;
  const float shift =
      p.block_bias
          ? BiasInLog2(p.block_bias[place.b * p.bias_batch + place.h * p.bias_head + place.entry * p.bias_entry])
          : 0.0f;
  const int64_t first_distance = place.q + p.diagonal(place.b) - place.k;
  for (int64_t i = 0; i < place.keys; ++i) {
    const Vec distance = hn::Add(hn::Iota(d, 0), hn::Set(d, static_cast<float>(first_distance - i)));
    for (int v = 0; v < NV; ++v) {
      float* s = scores + i * W + v * kLanes;
      Vec x = hn::Load(d, s);
      x = p.softcap > 0 ? hn::Mul(capped, Tanh(hn::Mul(x, to_cap))) : hn::Mul(x, hn::Set(d, factor));
      if (p.block_bias) x = hn::Add(x, hn::Set(d, shift));
      if (p.alibi) {
        const Vec gap = hn::Abs(hn::Add(distance, hn::Set(d, static_cast<float>(v * kLanes))));
        x = hn::MulAdd(hn::Set(d, slope), gap, x);
      }
      hn::Store(x, d, s);
    }
  }
  if (!p.attn_bias) return;
  const int64_t* stride = p.attn_bias_stride;
  const int64_t base = place.b * stride[0] + place.h * stride[1] + place.k * stride[3];
  for (int64_t r = 0; r < place.rows; ++r) {
    const int64_t row = base + (place.q + r) * stride[2];
    for (int64_t i = 0; i < place.keys; ++i) {
      scores[i * W + r] += BiasInLog2(load_as_double(p.attn_bias, p.attn_bias_dtype, row + i * stride[3]));
    }
  }
}

// Admitted queries of each key of the place, as bits (bit r: query place.q + r): the mask's interval and the bitmap.
// `bitmap`: its row of query place.q, or nullptr.
inline void MaskBits(const MaskGeometry& mask, const uint64_t* bitmap, int block_words, int64_t key_in_block,
                     const PanelPlace& place, uint64_t* bits) {
  for (int64_t i = 0; i < place.keys; ++i) {
    const Interval in = mask.queries_of(place.k + i, place.q, place.q + place.rows);
    bits[i] = 0;
    if (in.empty()) continue;
    const uint64_t upto = in.end - place.q == 64 ? ~uint64_t{0} : (uint64_t{1} << (in.end - place.q)) - 1;
    bits[i] = upto & ~((uint64_t{1} << (in.begin - place.q)) - 1);
  }
  if (bitmap == nullptr) return;
  for (int64_t i = 0; i < place.keys; ++i) {
    const int64_t key = key_in_block + i;
    const uint64_t* word = bitmap + key / 64;
    uint64_t column = 0;
    for (int64_t r = 0; r < place.rows; ++r) column |= ((word[r * block_words] >> (key % 64)) & 1) << r;
    bits[i] &= column;
  }
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
