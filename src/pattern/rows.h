// Rows of one batch of a pattern, over some of its keys.
#pragma once

#include <cstdint>

#include "tessera/block_pattern.h"

namespace tessera {

// Queries [begin, end) of `batch` over the first seqlen_k keys, as a pattern of one batch that stands where they stand.
BlockPattern rows_with_keys(const BlockPattern& pattern, int64_t batch, int64_t begin, int64_t end, int64_t seqlen_k);

}  // namespace tessera
