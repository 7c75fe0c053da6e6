// How many pairs a pattern and the masks of a call admit.
#include <fmt/format.h>

#include <algorithm>
#include <bit>

#include "call/pair_mask.h"
#include "core/checked.h"
#include "tessera/error.h"

namespace tessera {

int64_t admitted_pairs(const BlockPattern& pattern, const AttentionOptions& options, int64_t batch, int64_t heads) {
  if (batch < 0) fail("batch", fmt::format("{}", batch), ">= 0");
  if (heads < 0) fail("heads", fmt::format("{}", heads), ">= 0");
  const Problem p = resolve_mask(pattern, options, batch, heads);
  const PatternShape& s = p.pattern.shape;
  // Batches differ by their pattern or their key length, heads by their pattern; the rest is counted once.
  const int64_t distinct_batches = s.batches > 1 || p.key_lengths ? batch : std::min<int64_t>(batch, 1);
  const int64_t distinct_heads = s.heads > 1 ? heads : std::min<int64_t>(heads, 1);
  int64_t pairs = 0;
  for (int64_t b = 0; b < distinct_batches; ++b) {
    const PairMask mask(p, b);
    for (int64_t h = 0; h < distinct_heads; ++h) {
      for (int64_t i = 0; i < s.rows(); ++i) {
        const int64_t q_begin = s.query_begin(i), q_end = s.query_end(i);
        const int64_t row = p.pattern.row_id(b, h, i);
        for (int64_t e = p.pattern.indptr[row]; e < p.pattern.indptr[row + 1]; ++e) {
          const Interval keys = mask.keys(e, q_begin, q_end);
          if (keys.empty()) continue;
          if (mask.full(e, q_begin, q_end, keys)) {
            pairs += (q_end - q_begin) * keys.size();
            continue;
          }
          for (int64_t q = q_begin; q < q_end; ++q) {
            mask.for_each_word(e, q, [&](int64_t, uint64_t word) { pairs += std::popcount(word); });
          }
        }
      }
    }
  }
  const int64_t batch_repeats = distinct_batches == 0 ? 0 : batch / distinct_batches;
  const int64_t head_repeats = distinct_heads == 0 ? 0 : heads / distinct_heads;
  return checked_product("batch", {pairs, batch_repeats, head_repeats});
}

}  // namespace tessera
