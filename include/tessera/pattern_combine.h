// Patterns from patterns. All work on kept blocks only; bitmaps are combined exactly, token by token.
//
// Two patterns go together if lengths and block sizes agree and their heads (and batches) agree or one of them has 1,
// which then stands for all. Anything else is an Error that names the field.
#pragma once

#include <cstdint>
#include <span>

#include "tessera/block_pattern.h"

namespace tessera {

// Admits what either admits / what both admit.
BlockPattern unite(const BlockPattern& a, const BlockPattern& b);
BlockPattern intersect(const BlockPattern& a, const BlockPattern& b);

// Block rows [row_begin, row_end) and block columns [col_begin, col_end). The lengths are those of the tokens in
// range, ragged ends included. The slice counts from its own first token: attention over it needs q_offset and
// k_offset wherever positions matter.
BlockPattern slice(const BlockPattern& pattern, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end);

// Heads (batches) of all patterns one after the other. At least one pattern; lengths, block sizes and batches (heads)
// must be the same.
BlockPattern stack_heads(std::span<const BlockPattern> patterns);
BlockPattern stack_batches(std::span<const BlockPattern> patterns);

// Rows become columns: seqlen_q and seqlen_k, block_q and block_k change places, bitmaps are transposed.
BlockPattern transpose(const BlockPattern& pattern);

}  // namespace tessera
