// Attention over 16,384 tokens that computes one block pair in ten.
#include <cmath>
#include <cstdio>
#include <vector>

#include "tessera/attention.h"
#include "tessera/patterns.h"

int main() {
  const int64_t heads = 8, seqlen = 16384, head_dim = 64;
  std::vector<float> q(seqlen * heads * head_dim), k(q.size()), v(q.size()), out(q.size()), lse(heads * seqlen);
  for (size_t i = 0; i < q.size(); ++i) {
    q[i] = std::sin(0.1f * i), k[i] = std::cos(0.3f * i), v[i] = 1 + i % head_dim;  // each row of v is 1, 2, ..., 64
  }

  const tessera::BlockPattern pattern = tessera::make_pattern({.kind = tessera::PatternKind::dilated_sparse,
                                                               .seqlen_q = seqlen,
                                                               .seqlen_k = seqlen,
                                                               .causal = true,
                                                               .density = 0.1});
  auto bshd = [&](std::vector<float>& x) {
    return tessera::make_view(x.data(), tessera::DType::f32, {1, seqlen, heads, head_dim});
  };
  tessera::ThreadPool pool(0);
  tessera::forward({.q = bshd(q),
                    .k = bshd(k),
                    .v = bshd(v),
                    .pattern = pattern,
                    .out = bshd(out),
                    .lse = tessera::make_view(lse.data(), tessera::DType::f32, {1, heads, seqlen})},
                   pool);

  // One softmax over all kept keys: the weights of a row sum to 1, so rows that are all alike come out unchanged.
  float worst = 0;
  for (size_t i = 0; i < out.size(); ++i) worst = std::max(worst, std::abs(out[i] / v[i] - 1));
  std::printf("%lld block pairs on %d threads; rows sum to 1 within %.1g\n",
              static_cast<long long>(pattern.num_blocks()), pool.num_threads(), worst);
  return worst < 1e-4f ? 0 : 1;
}
