#include <limits>

#include "call/pair_mask.h"
#include "call/rows.h"
#include "call/scores.h"
#include "check/cases.h"

namespace tessera::check {

void plain_attention(const Problem& p, double* out, double* lse) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const auto round = [&](double x) {
    uint64_t bits = 0;
    store_from_double(&bits, p.dtype, 0, x);
    return load_as_double(&bits, p.dtype, 0);
  };
  const int64_t element = static_cast<int64_t>(size_of(p.dtype)), block_k = p.pattern.shape.block_k;
  std::vector<double> query(p.head_dim), keys, values, weights;
  std::vector<char> loaded;
  std::vector<int64_t> seen;
  for (int64_t b = 0; b < p.batch; ++b) {
    const PairMask mask(p, b);
    for (int64_t h = 0; h < p.heads; ++h) {
      keys.assign(p.seqlen_k * p.head_dim, 0);
      values.assign(p.seqlen_k * p.head_dim_v, 0);
      loaded.assign(p.seqlen_k, 0);
      for (int64_t q = 0; q < p.seqlen_q; ++q) {
        const RowScores<double> scores(p, b, h, q);
        load_row(p.q.at(b, q, h, element), p.dtype, p.head_dim, query.data());
        weights.clear();
        seen.clear();
        double max = -kInfinity;
        mask.for_each_pair(h, q, [&](int64_t entry, int64_t k) {
          double* key = &keys[k * p.head_dim];
          if (!loaded[k]) {
            const int64_t column = k / block_k, offset = k % block_k * element, kv_head = h / p.group();
            load_row(p.k_block(b, column, kv_head) + offset * p.k.seq, p.dtype, p.head_dim, key);
            load_row(p.v_block(b, column, kv_head) + offset * p.v.seq, p.dtype, p.head_dim_v,
                     &values[k * p.head_dim_v]);
            loaded[k] = 1;
          }
          double dot = 0;
          for (int64_t i = 0; i < p.head_dim; ++i) dot += query[i] * key[i];
          const double score = scores.score(dot, entry, k, round);
          if (!(score <= max)) max = score;
          weights.push_back(score);
          seen.push_back(k);
        });
        double* to = out + ((b * p.seqlen_q + q) * p.heads + h) * p.head_dim_v;
        std::fill(to, to + p.head_dim_v, 0.0);
        double* to_lse = lse ? lse + (b * p.heads + h) * p.seqlen_q + q : nullptr;
        if (to_lse) *to_lse = -kInfinity;
        if (max == -kInfinity) continue;
        double sum = p.sinks ? std::exp(*p.sinks.at(0, h) - max) : 0;
        for (double& w : weights) sum += w = std::exp(w - max);
        if (to_lse) *to_lse = max + std::log(sum);
        for (size_t n = 0; n < seen.size(); ++n) {
          const double w = round(weights[n] / sum * keep_factor(p, b, h, q, seen[n]));
          for (int64_t i = 0; i < p.head_dim_v; ++i) to[i] += w * values[seen[n] * p.head_dim_v + i];
        }
        for (int64_t i = 0; i < p.head_dim_v; ++i) to[i] = round(to[i]);
      }
    }
  }
}

}  // namespace tessera::check
