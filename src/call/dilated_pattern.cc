// Dilated attention as a pattern over the sequence: what it admits, not how often.
#include <map>
#include <utility>
#include <vector>

#include "call/dilated_plan.h"
#include "call/pair_mask.h"
#include "pattern/bitmap_table.h"
#include "pattern/geometry.h"

namespace tessera {

namespace {

using Blocks = std::map<std::pair<int64_t, int64_t>, std::vector<uint64_t>>;  // bitmaps by block row and column

// Sets the bits of the pairs that head `h` of the part's own heads admits.
void add_pairs(const DilatedPlan& plan, const DilatedPart& part, int64_t h, const PatternShape& shape, Blocks& blocks) {
  const DilatedGroup& group = plan.groups()[part.group];
  const Problem p = plan.problem(part);
  for (int64_t b = 0; b < p.batch; ++b) {
    const PairMask mask(p, b);
    const int64_t first = (part.segment + b) * group.segment + part.offset;
    for (int64_t i = 0; i < p.seqlen_q; ++i) {
      const int64_t q = first + i * group.rate;
      mask.for_each_pair(h, i, [&](int64_t, int64_t j) {
        const int64_t k = first + j * group.rate;
        std::vector<uint64_t>& bits = blocks[{q / shape.block_q, k / shape.block_k}];
        if (bits.empty()) bits.resize(shape.block_q * shape.bitmap_words());
        const int64_t slot = k % shape.block_k;
        bits[q % shape.block_q * shape.bitmap_words() + slot / 64] |= uint64_t{1} << (slot % 64);
      });
    }
  }
}

}  // namespace

BlockPattern dilated_pattern(int64_t seqlen, const Dilation& dilation, std::optional<bool> causal, int64_t heads,
                             int block_q, int block_k) {
  PatternShape shape{seqlen, seqlen, block_q, block_k, heads};
  check_shape(shape);
  AttentionOptions options;
  options.causal = causal;
  const Problem whole = sequence_without_tensors(seqlen, dilation, options, 1, heads);
  const DilatedPlan plan(whole, dilation, options, true);
  shape.causal = plan.causal();

  BitmapTable table(shape);
  std::vector<int64_t> indptr{0};
  std::vector<int32_t> indices, bitmap_index;
  for (int64_t h = 0; h < heads; ++h) {
    Blocks blocks;
    for (const DilatedPart& part : plan.parts()) {
      const int64_t step = h - part.head;
      if (step >= 0 && step % part.head_step == 0 && step / part.head_step < part.heads) {
        add_pairs(plan, part, step / part.head_step, shape, blocks);
      }
    }
    auto next = blocks.begin();
    for (int64_t i = 0; i < shape.rows(); ++i) {
      for (; next != blocks.end() && next->first.first == i; ++next) {
        indices.push_back(static_cast<int32_t>(next->first.second));
        bitmap_index.push_back(table.intern(next->second.data(), i, next->first.second));
      }
      indptr.push_back(static_cast<int64_t>(indices.size()));
    }
  }
  return BlockPattern::from_csr(shape, std::move(indptr), std::move(indices), std::move(bitmap_index), table.take());
}

}  // namespace tessera
