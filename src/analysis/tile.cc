#include "analysis/tile.h"

#include <cmath>
#include <limits>

// Vectors of SVE have no size, so no arrays: there the accumulators would not stay in registers. NEON serves.
#undef HWY_DISABLED_TARGETS
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "analysis/tile.cc"
#include "hwy/foreach_target.h"

#include "hwy/highway.h"

#include "hwy/contrib/math/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tessera::analysis {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Tag = hn::CappedTag<float, static_cast<size_t>(kTileColumns)>;

// Rows x 2 vectors of accumulators: 8 chains for 4 rows hide the latency of two FMA units.
template <int kRows>
HWY_INLINE void multiply_rows(const float* HWY_RESTRICT a, const float* HWY_RESTRICT b, float* HWY_RESTRICT c,
                              int64_t inner, int64_t cols) {
  const Tag d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t j = 0;
  for (; j + 2 * lanes <= cols; j += 2 * lanes) {
    hn::Vec<Tag> sum0[kRows], sum1[kRows];
    for (int r = 0; r < kRows; ++r) sum0[r] = sum1[r] = hn::Zero(d);
    for (int64_t i = 0; i < inner; ++i) {
      const auto b0 = hn::LoadU(d, b + i * cols + j);
      const auto b1 = hn::LoadU(d, b + i * cols + j + lanes);
      for (int r = 0; r < kRows; ++r) {
        const auto x = hn::Set(d, a[r * inner + i]);
        sum0[r] = hn::MulAdd(x, b0, sum0[r]);
        sum1[r] = hn::MulAdd(x, b1, sum1[r]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      hn::StoreU(sum0[r], d, c + r * cols + j);
      hn::StoreU(sum1[r], d, c + r * cols + j + lanes);
    }
  }
  for (; j < cols; j += lanes) {
    hn::Vec<Tag> sum[kRows];
    for (int r = 0; r < kRows; ++r) sum[r] = hn::Zero(d);
    for (int64_t i = 0; i < inner; ++i) {
      const auto b0 = hn::LoadU(d, b + i * cols + j);
      for (int r = 0; r < kRows; ++r) sum[r] = hn::MulAdd(hn::Set(d, a[r * inner + i]), b0, sum[r]);
    }
    for (int r = 0; r < kRows; ++r) hn::StoreU(sum[r], d, c + r * cols + j);
  }
}

void multiply(const float* a, const float* b, float* c, int64_t rows, int64_t inner, int64_t cols) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) multiply_rows<4>(a + r * inner, b, c + r * cols, inner, cols);
  for (; r < rows; ++r) multiply_rows<1>(a + r * inner, b, c + r * cols, inner, cols);
}

bool softmax_numerators(float* s, int64_t rows, int64_t cols, const int32_t* begin, const int32_t* end, float* max,
                        float* rescale, float* sum) {
  const Tag d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const float infinity = std::numeric_limits<float>::infinity();
  const auto lowest = hn::Set(d, -infinity);
  bool finite = true;
  for (int64_t r = 0; r < rows; ++r) {
    float* row = s + r * cols;
    const auto first = hn::Set(d, static_cast<float>(begin[r]));
    const auto limit = hn::Set(d, static_cast<float>(end[r]));
    const auto in_range = [&](int64_t j) HWY_ATTR {
      const auto index = hn::Iota(d, static_cast<float>(j));
      return hn::And(hn::Ge(index, first), hn::Lt(index, limit));
    };
    auto top = lowest;
    for (int64_t j = 0; j < cols; j += lanes) {
      const auto x = hn::IfThenElse(in_range(j), hn::LoadU(d, row + j), lowest);
      finite = finite && hn::AllTrue(d, hn::Lt(x, hn::Set(d, infinity)));
      hn::StoreU(x, d, row + j);
      top = hn::Max(top, x);
    }
    const float tile_max = hn::GetLane(hn::MaxOfLanes(d, top));
    rescale[r] = 1;
    // Written so that the first finite score of a row, met by a maximum of -inf, always enters.
    if (tile_max > max[r] + kMaxSlack) {
      rescale[r] = std::exp(max[r] - tile_max);
      max[r] = tile_max;
    }
    // A row that has met no key yet holds only -inf here: any finite maximum turns those into zeros.
    const auto shift = hn::Set(d, max[r] == -infinity ? 0.0f : max[r]);
    auto total = hn::Zero(d);
    for (int64_t j = 0; j < cols; j += lanes) {
      const auto x = hn::LoadU(d, row + j);
      const auto p = hn::IfThenElseZero(hn::Gt(x, lowest), hn::Exp(d, hn::Sub(x, shift)));
      hn::StoreU(p, d, row + j);
      total = hn::Add(total, p);
    }
    sum[r] = hn::GetLane(hn::SumOfLanes(d, total));
  }
  return finite;
}

void add_to(float* y, const float* x, int64_t n) {
  const Tag d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t i = 0; i < n; i += lanes) hn::StoreU(hn::Add(hn::LoadU(d, y + i), hn::LoadU(d, x + i)), d, y + i);
}

void scale_by(float* y, float factor, int64_t n) {
  const Tag d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto f = hn::Set(d, factor);
  for (int64_t i = 0; i < n; i += lanes) hn::StoreU(hn::Mul(hn::LoadU(d, y + i), f), d, y + i);
}

}  // namespace HWY_NAMESPACE
}  // namespace tessera::analysis
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tessera::analysis {
HWY_EXPORT(multiply);
HWY_EXPORT(softmax_numerators);
HWY_EXPORT(add_to);
HWY_EXPORT(scale_by);

void multiply(const float* a, const float* b, float* c, int64_t rows, int64_t inner, int64_t cols) {
  HWY_DYNAMIC_DISPATCH(multiply)(a, b, c, rows, inner, cols);
}
bool softmax_numerators(float* s, int64_t rows, int64_t cols, const int32_t* begin, const int32_t* end, float* max,
                        float* rescale, float* sum) {
  return HWY_DYNAMIC_DISPATCH(softmax_numerators)(s, rows, cols, begin, end, max, rescale, sum);
}
void add_to(float* y, const float* x, int64_t n) { HWY_DYNAMIC_DISPATCH(add_to)(y, x, n); }
void scale_by(float* y, float factor, int64_t n) { HWY_DYNAMIC_DISPATCH(scale_by)(y, factor, n); }
}  // namespace tessera::analysis
#endif
