// Patterns from patterns. All work on kept blocks only; bitmaps are combined exactly, token by token.
//
// Two patterns go together if lengths and block sizes agree, they stand at the same position where both say theirs, and
// their heads (and batches) agree or one of them has 1, which then stands for all. Anything else is an Error that names
// the field.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "tessera/block_pattern.h"

namespace tessera {

// Admits what either admits / what both admit / what a admits and b does not. A union of a causal pattern with one that
// is not is an Error (the causal one would admit more than it does), and so is taking a causal one from one that is
// not; the intersection of the two is causal.
BlockPattern unite(const BlockPattern& a, const BlockPattern& b);
BlockPattern intersect(const BlockPattern& a, const BlockPattern& b);
BlockPattern subtract(const BlockPattern& a, const BlockPattern& b);

// The admissible pairs (all, or those of causality) that the pattern does not admit. O(admissible blocks).
BlockPattern complement(const BlockPattern& pattern);

// The same blocks, causal to the token: query i admits keys up to position q_offset + i (default: where the pattern
// stands, else bottom-right alignment).
BlockPattern make_causal(const BlockPattern& pattern, std::optional<int64_t> q_offset = std::nullopt);
// The same pairs without the mark: causality becomes bitmaps of the blocks that it cuts.
BlockPattern without_causality(const BlockPattern& pattern);

// The same blocks, neither causal nor made for a position: which pairs of a block count is left to the call.
BlockPattern blocks_only(const BlockPattern& pattern);

// Rows of a longer sequence: the pattern of queries [begin, end), over the keys up to the position of the last of them
// if causal, else over all keys. It carries its position (q_offset), and its first block row may begin inside a block
// (q_skip): every query sees the same pairs as in the whole. What a decode step or a chunk of a prefill takes.
BlockPattern for_queries(const BlockPattern& pattern, int64_t begin, int64_t end);

// Block rows [row_begin, row_end) and block columns [col_begin, col_end). The lengths are those of the tokens in
// range, ragged ends included. The slice counts from its own first token; one of a pattern that is causal or has a
// position carries the distance between its first query and its first key (q_offset).
BlockPattern slice(const BlockPattern& pattern, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end);

// Heads (batches) of all patterns one after the other. At least one pattern; lengths, block sizes and batches (heads)
// must be the same.
BlockPattern stack_heads(std::span<const BlockPattern> patterns);
BlockPattern stack_batches(std::span<const BlockPattern> patterns);

// Rows become columns: seqlen_q and seqlen_k, block_q and block_k change places, bitmaps are transposed, and causality
// becomes bitmaps. Error for a pattern whose first row begins inside a block.
BlockPattern transpose(const BlockPattern& pattern);

}  // namespace tessera
