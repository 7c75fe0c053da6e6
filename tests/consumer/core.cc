// Attention of one head over 80 tokens, keeping each query's own block of 16 keys, against the textbook formula.
#include <cmath>
#include <cstdio>
#include <vector>

#include "tessera/tessera.h"

int main() {
  constexpr int64_t kSeqlen = 80, kHeadDim = 8, kBlock = 16;
  std::vector<float> q(kSeqlen * kHeadDim), k(q.size()), v(q.size()), out(q.size());
  for (size_t i = 0; i < q.size(); ++i) {
    q[i] = std::sin(1.3f * i), k[i] = std::cos(0.7f * i), v[i] = std::sin(0.2f * i * i);
  }
  auto view = [&](std::vector<float>& x) {
    return tessera::make_view(x.data(), tessera::DType::f32, {1, kSeqlen, 1, kHeadDim});
  };
  const tessera::BlockPattern pattern = tessera::make_pattern({.kind = tessera::PatternKind::local_window,
                                                               .seqlen_q = kSeqlen,
                                                               .seqlen_k = kSeqlen,
                                                               .block_q = kBlock,
                                                               .block_k = kBlock,
                                                               .density = 0.01});
  tessera::ThreadPool pool(2);
  tessera::forward({.q = view(q), .k = view(k), .v = view(v), .pattern = pattern, .out = view(out)}, pool);

  double worst = 0;
  for (int64_t i = 0; i < kSeqlen; ++i) {
    double sum = 0, expected[kHeadDim] = {};
    for (int64_t j = i / kBlock * kBlock; j < (i / kBlock + 1) * kBlock; ++j) {
      double score = 0;
      for (int64_t d = 0; d < kHeadDim; ++d) score += double{q[i * kHeadDim + d]} * k[j * kHeadDim + d];
      const double weight = std::exp(score / std::sqrt(double{kHeadDim}));
      sum += weight;
      for (int64_t d = 0; d < kHeadDim; ++d) expected[d] += weight * v[j * kHeadDim + d];
    }
    for (int64_t d = 0; d < kHeadDim; ++d) {
      worst = std::max(worst, std::abs(out[i * kHeadDim + d] - expected[d] / sum));
    }
  }
  std::printf("%lld blocks, %s\n", static_cast<long long>(pattern.num_blocks()), worst < 1e-5 ? "right" : "wrong");

  try {
    tessera::forward({.q = view(q), .k = view(k), .v = view(v), .out = view(out)}, pool);  // no pattern
  } catch (const tessera::Error& error) {
    std::printf("refused: %s\n", error.argument().c_str());
  }
  return 0;
}
