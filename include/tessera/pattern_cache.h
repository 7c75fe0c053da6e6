// PatternCache: patterns that were made before, found again by everything that defines them.
//
//   PatternCache cache;                              // one for a program or a model, shared by its threads
//   const BlockPattern pattern = cache.get(spec);    // made once; after that a look-up, a fraction of a microsecond
//
// The key is the whole PatternSpec: a spec that differs in any field is another pattern. As a pattern depends on its
// spec alone, nothing in the cache can be stale. Limited by bytes and by count; the least recently used goes first.
// A pattern that was handed out stays valid whatever the cache does (copies share storage). Safe from several threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "tessera/patterns.h"

namespace tessera {

struct PatternCacheLimits {
  size_t bytes = size_t{256} << 20;  // of the kept patterns and their keys. One that is larger alone is not kept
  size_t entries = 1024;             // 0: nothing is kept
};

struct PatternCacheStats {
  int64_t hits = 0;       // calls served without making a pattern, those that waited for another thread's included
  int64_t misses = 0;     // calls that made one, or failed to
  int64_t evictions = 0;  // patterns that had to go because of a limit; clear() does not count
  size_t entries = 0;     // patterns held now
  size_t bytes = 0;       // what they and their keys hold now, transposed forms included where they exist
};

class PatternCache {
 public:
  // What makes a pattern of a spec. The result must depend on the spec alone. It may ask the cache for other specs.
  using Builder = std::function<BlockPattern(const PatternSpec&)>;

  explicit PatternCache(const PatternCacheLimits& limits = {}, Builder build = make_pattern);
  ~PatternCache();
  PatternCache(const PatternCache&) = delete;
  PatternCache& operator=(const PatternCache&) = delete;

  // The pattern of a spec. Threads that ask for one spec at the same time make it once: the others wait, while other
  // specs are served. What the builder throws (make_pattern: Error for an invalid spec) goes to the caller for whom it
  // ran; one that waited then tries itself.
  BlockPattern get(const PatternSpec& spec);

  // Makes the patterns of these lengths (seqlen_q = seqlen_k = each) ahead of time, in order: if they do not all fit,
  // the last ones stay. transposed: also the form that gradients of keys and values need, which is otherwise made by
  // the first backward pass.
  void warm_up(PatternSpec spec, std::span<const int64_t> seqlens, bool transposed = true);

  // Patterns that exceed the new limits go at once.
  void resize(const PatternCacheLimits& limits);
  PatternCacheLimits limits() const;

  // Drops all patterns. One that is being made at that moment is kept when it is ready. Counts of calls go on.
  void clear();

  // A pattern grows where it lies when its transposed form is made. Sizes are looked up again here, in resize(),
  // whenever a pattern is added, and for a pattern that is hit: then limits hold again.
  PatternCacheStats stats();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace tessera
