// Patterns from what a caller already holds: masks of blocks, index lists, CSR/BSR arrays, token masks, and the block
// masks of PyTorch's FlexAttention. Nothing of size seqlen_q x seqlen_k is ever copied.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "tessera/block_pattern.h"
#include "tessera/tensor_view.h"

namespace tessera {

// How the columns of a row come. `ascending` makes any other order an Error; `any` sorts. Duplicates are an Error.
enum class ColumnOrder : uint8_t { ascending, any };

// mask: [rows, cols], [heads, rows, cols] or [batches, heads, rows, cols], any strides; bool or an integer type,
// non-zero keeps the block. rows and cols must be those of the lengths and blocks. A DeepSpeed SparsityConfig layout
// (int64 [heads, rows, cols], block_q == block_k) is such a mask.
BlockPattern pattern_from_mask(const TensorView& mask, int64_t seqlen_q, int64_t seqlen_k, int block_q, int block_k);

// mask: [Sq, Sk], [heads, Sq, Sk] or [batches, heads, Sq, Sk], any strides; bool or an integer type, non-zero admits
// the pair. A block with some pairs only gets a bitmap.
BlockPattern pattern_from_token_mask(const TensorView& mask, int block_q, int block_k);

// lists: [total_rows] the kept columns of each row (batch, head, row order).
BlockPattern pattern_from_lists(const PatternShape& shape, std::span<const std::vector<int32_t>> lists,
                                ColumnOrder order = ColumnOrder::ascending);

// One CSR or BSR matrix, as torch.sparse and SciPy hold them; int32 or int64.
struct CsrMatrix {
  TensorView indptr;   // [rows + 1]
  TensorView indices;  // [entries]
  TensorView blocks;   // undefined (every kept block is full), or bool or integer [entries, block_q, block_k]:
                       // non-zero admits the pair
};
// matrices: [batches * heads], batch first.
BlockPattern pattern_from_csr(const PatternShape& shape, std::span<const CsrMatrix> matrices,
                              ColumnOrder order = ColumnOrder::ascending);

// The tensors of torch.nn.attention.flex_attention.BlockMask; int32 or int64. kv_* list the blocks for which mask_mod
// must be asked, full_kv_* (may be undefined) those that are kept whole. Only the first kv_num_blocks columns of a row
// of kv_indices count; they may come in any order. Rows and columns past the ends of the sequences are left out.
struct FlexBlockMask {
  TensorView kv_num_blocks;       // [batches, heads, rows or more]
  TensorView kv_indices;          // [batches, heads, rows or more, cols or more]
  TensorView full_kv_num_blocks;  // like kv_num_blocks
  TensorView full_kv_indices;     // like kv_indices
  // Which pairs of the blocks of kv_* count; empty: all.
  std::function<bool(int64_t b, int64_t h, int64_t q, int64_t k)> mask_mod;
  // Or its answers: bool [blocks, block_q, block_k] for all blocks that kv_* list, in the order in which they do.
  TensorView answers;
};
BlockPattern pattern_from_flex(const FlexBlockMask& mask, int64_t seqlen_q, int64_t seqlen_k, int block_q, int block_k);

}  // namespace tessera
