// Two sequences of different lengths that grow token by token. Each step reads one key block in five, and a token gets
// what one pass over its whole sequence gives it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "tessera/kv_cache.h"

int main() {
  const int64_t batch = 2, heads = 8, kv_heads = 2, dim = 64, prompt[] = {3000, 1700}, steps = 100;
  const int64_t longest = 4096;  // that a sequence may become: budgets are even over the whole of it
  const int block = 64;
  // Queries, keys and values of all tokens, [B, S, heads, D], where a model would compute them.
  auto numbers = [&](int64_t n, float step) {
    std::vector<float> x(batch * longest * n * dim);
    for (size_t i = 0; i < x.size(); ++i) x[i] = std::sin(step * static_cast<float>(i % 100003));
    return x;
  };
  std::vector<float> q = numbers(heads, 0.7f), k = numbers(kv_heads, 1.3f), v = numbers(kv_heads, 0.9f);
  auto tokens = [&](std::vector<float>& x, int64_t h, int64_t b, int64_t t, int64_t n) {
    return tessera::make_view(x.data() + (b * longest + t) * h * dim, tessera::DType::f32, {1, n, h, dim});
  };

  const tessera::PatternSpec spec{.kind = tessera::PatternKind::dilated_sparse,
                                  .block_q = block,
                                  .block_k = block,
                                  .causal = true,
                                  .density = 0.2,
                                  .seqlen_total = longest};
  tessera::ThreadPool pool(0);
  tessera::KvCache cache(batch, kv_heads, dim, dim, tessera::DType::f32, block);
  std::vector<float> k_step(batch * kv_heads * dim), v_step(k_step.size()), q_step(batch * heads * dim);
  std::vector<float> out(q_step.size()), last(heads * dim);

  // The prompts in one call: [B, 3000, ...], of which each sequence takes its own.
  auto all = [&](std::vector<float>& x, int64_t n, int64_t h) {
    tessera::MutableTensorView view = tessera::make_view(x.data(), tessera::DType::f32, {batch, n, h, dim});
    view.strides[0] = longest * h * dim;
    return view;
  };
  cache.append(all(k, prompt[0], kv_heads), all(v, prompt[0], kv_heads), prompt, pool);
  for (int64_t step = 0; step < steps; ++step) {
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t t = cache.lengths()[b];
      std::copy_n(&k[(b * longest + t) * kv_heads * dim], kv_heads * dim, &k_step[b * kv_heads * dim]);
      std::copy_n(&v[(b * longest + t) * kv_heads * dim], kv_heads * dim, &v_step[b * kv_heads * dim]);
      std::copy_n(&q[(b * longest + t) * heads * dim], heads * dim, &q_step[b * heads * dim]);
    }
    auto one = [&](std::vector<float>& x, int64_t h) {
      return tessera::make_view(x.data(), tessera::DType::f32, {batch, 1, h, dim});
    };
    cache.append(one(k_step, kv_heads), one(v_step, kv_heads), {}, pool);
    cache.attend({.q = one(q_step, heads), .out = one(out, heads), .spec = spec}, pool);
  }

  // The last token of each sequence, by a call on its whole sequence.
  float worst = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t n = cache.lengths()[b];
    tessera::PatternSpec whole = spec;
    whole.seqlen_q = 1, whole.seqlen_k = n, whole.q_offset = n - 1;
    const tessera::BlockPattern pattern = tessera::make_pattern(whole);
    tessera::forward({.q = tokens(q, heads, b, n - 1, 1),
                      .k = tokens(k, kv_heads, b, 0, n),
                      .v = tokens(v, kv_heads, b, 0, n),
                      .pattern = pattern,
                      .out = tessera::make_view(last.data(), tessera::DType::f32, {1, 1, heads, dim})},
                     pool);
    for (int64_t i = 0; i < heads * dim; ++i) worst = std::max(worst, std::abs(last[i] - out[b * heads * dim + i]));
  }
  std::printf("%lld and %lld tokens in %.1f MB; the last ones are those of whole calls within %.1g\n",
              static_cast<long long>(cache.lengths()[0]), static_cast<long long>(cache.lengths()[1]),
              static_cast<double>(cache.nbytes()) / 1e6, worst);
  return worst < 1e-5f ? 0 : 1;
}
