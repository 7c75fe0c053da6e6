// Huge pages for large arrays: K/V caches, inputs, results. What the library allocates has them already.
#pragma once

#include <cstddef>

namespace tessera {

inline constexpr size_t kCacheLine = 64;
inline constexpr size_t kHugePage = size_t{2} << 20;

// Arrays of this many bytes and more are worth huge pages.
inline constexpr size_t kHugeArray = 4 * kHugePage;

// Alignment, in bytes, of a new array of that size: where it is large, its begin leaves no part of a huge page over.
constexpr size_t alignment_for(size_t bytes) { return bytes < kHugeArray ? kCacheLine : kHugePage; }

// Asks for huge pages under an array that is just allocated, if it is large. A key of [B, S, H, D] then does not cost a
// page walk every few rows (decode: 5 to 10 %), and the first touch of 8 MiB takes 0.2 ms, not 3. Advice only: where
// there are none everything works the same.
void advise_huge_pages(void* data, size_t bytes);

}  // namespace tessera
