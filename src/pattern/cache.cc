// PatternCache: a list in the order of use, an index into it, and the builds that are under way.
#include "tessera/pattern_cache.h"

#include <algorithm>
#include <bit>
#include <condition_variable>
#include <list>
#include <mutex>
#include <optional>
#include <thread>
#include <unordered_set>
#include <utility>
#include <vector>

#include "core/fork.h"
#include "pattern/geometry.h"

namespace tessera {

namespace {

// Equal numbers have equal words: 0.0 == -0.0.
uint64_t word_of(double x) { return x == 0 ? 0 : std::bit_cast<uint64_t>(x); }
template <class T>
uint64_t word_of(T x) {
  return static_cast<uint64_t>(x);
}

template <class T>
void hash_field(uint64_t& h, const T& x) {
  h = hash_word(h, word_of(x));
}
template <class T>
void hash_field(uint64_t& h, const std::optional<T>& x) {
  h = hash_word(h, x.has_value());
  if (x) hash_field(h, *x);
}
void hash_field(uint64_t& h, const std::vector<int64_t>& list) {
  h = hash_word(h, list.size());
  for (int64_t x : list) hash_field(h, x);
}

// All fields of a spec. The binding names every one: a field that PatternSpec gains does not compile until it is here.
template <class F>
auto with_fields(const PatternSpec& spec, F&& f) {
  const auto& [kind, seqlen_q, seqlen_k, block_q, block_k, heads, causal, density, budget, q_offset, seqlen_total,
               window, dilation_rates, segment_lengths, global_tokens, stride, seed, ranks, ranks_per_node,
               local_density, global_density, inter_node_density] = spec;
  return f(kind, seqlen_q, seqlen_k, block_q, block_k, heads, causal, density, budget, q_offset, seqlen_total, window,
           dilation_rates, segment_lengths, global_tokens, stride, seed, ranks, ranks_per_node, local_density,
           global_density, inter_node_density);
}

struct SpecHash {
  size_t operator()(const PatternSpec& spec) const {
    uint64_t h = 0;
    with_fields(spec, [&h](const auto&... field) { (hash_field(h, field), ...); });
    return hash_finish(h);
  }
};

template <class T>
size_t heap_bytes(const T&) {
  return 0;
}
size_t heap_bytes(const std::vector<int64_t>& list) { return list.capacity() * sizeof(int64_t); }

size_t key_bytes(const PatternSpec& spec) {
  return sizeof(PatternSpec) +
         with_fields(spec, [](const auto&... field) { return (heap_bytes(field) + ... + size_t{0}); });
}

struct Entry {
  PatternSpec spec;
  BlockPattern pattern;
  size_t key = 0;    // bytes
  size_t bytes = 0;  // key included, as of the last look
};
using EntryList = std::list<Entry>;

// The index holds positions in the list and is asked with specs.
struct EntryHash {
  using is_transparent = void;
  size_t operator()(const PatternSpec& spec) const { return SpecHash()(spec); }
  size_t operator()(EntryList::const_iterator entry) const { return SpecHash()(entry->spec); }
};
struct EntryEqual {
  using is_transparent = void;
  static const PatternSpec& spec_of(const PatternSpec& spec) { return spec; }
  static const PatternSpec& spec_of(EntryList::const_iterator entry) { return entry->spec; }
  bool operator()(const auto& a, const auto& b) const { return spec_of(a) == spec_of(b); }
};

// A pattern that some thread is making.
struct Build {
  PatternSpec spec;
  std::condition_variable ready;
  bool done = false;
  std::optional<BlockPattern> pattern;  // none: the builder threw
  std::thread::id maker = std::this_thread::get_id();
};

}  // namespace

struct PatternCache::State final : ForkAware {
  PatternCacheLimits limits;
  Builder build;

  std::mutex mutex;   // of all below; never held while a pattern is made
  EntryList entries;  // most recently used first
  std::unordered_set<EntryList::iterator, EntryHash, EntryEqual> index;
  std::list<std::shared_ptr<Build>> builds;  // under way: a few at most, so that a search needs no index
  size_t bytes = 0;                          // of all entries, as of the last look at each
  int64_t hits = 0, misses = 0, evictions = 0;

  // A child has what is kept, and makes anew what others were making; a maker that forks goes on in both.
  void before_fork() override { mutex.lock(); }
  void after_fork_in_parent() override { mutex.unlock(); }
  void after_fork_in_child() override {
    builds.remove_if([](const auto& build) { return build->maker != std::this_thread::get_id(); });
    mutex.unlock();
  }

  void look(Entry& entry) {
    const size_t now = entry.pattern.bytes() + entry.key;
    bytes += now - entry.bytes;
    entry.bytes = now;
  }

  void look_at_all() {
    for (Entry& entry : entries) look(entry);
  }

  void evict(EntryList::iterator entry) {
    bytes -= entry->bytes;
    index.erase(index.find(entry));
    entries.erase(entry);
    ++evictions;
  }

  void keep_limits() {
    if (bytes <= limits.bytes && entries.size() <= limits.entries) return;
    // One that has outgrown the limit alone must not drive out the others first.
    for (auto e = entries.begin(); e != entries.end();) {
      const auto entry = e++;
      if (entry->bytes > limits.bytes) evict(entry);
    }
    while (bytes > limits.bytes || entries.size() > limits.entries) evict(std::prev(entries.end()));
  }

  void add(const PatternSpec& spec, const BlockPattern& pattern) {
    const size_t key = key_bytes(spec);
    if (limits.entries == 0 || pattern.bytes() + key > limits.bytes) return;
    entries.push_front({spec, pattern, key, 0});
    try {
      index.insert(entries.begin());
    } catch (...) {
      entries.pop_front();
      throw;
    }
    look_at_all();
    keep_limits();
  }

  const ForkRegistration registration{this};
};

PatternCache::PatternCache(const PatternCacheLimits& limits, Builder build) : state_(std::make_unique<State>()) {
  state_->limits = limits;
  state_->build = std::move(build);
}

PatternCache::~PatternCache() = default;

BlockPattern PatternCache::get(const PatternSpec& spec) {
  State& s = *state_;
  std::unique_lock lock(s.mutex);
  for (;;) {
    if (const auto found = s.index.find(spec); found != s.index.end()) {
      const EntryList::iterator entry = *found;
      BlockPattern pattern = entry->pattern;
      s.entries.splice(s.entries.begin(), s.entries, entry);
      s.look(*entry);
      s.keep_limits();
      ++s.hits;
      return pattern;
    }
    const auto under_way = std::ranges::find_if(s.builds, [&](const auto& build) { return build->spec == spec; });
    if (under_way == s.builds.end()) break;
    const std::shared_ptr<Build> build = *under_way;
    build->ready.wait(lock, [&] { return build->done; });
    if (build->pattern) {  // also where it was too large to be kept
      ++s.hits;
      return *build->pattern;
    }
  }

  ++s.misses;
  const auto build = std::make_shared<Build>();
  build->spec = spec;
  const auto under_way = s.builds.insert(s.builds.end(), build);  // stays valid while others come and go
  const auto finish = [&] {                                       // with the lock held
    s.builds.erase(under_way);
    build->done = true;
    build->ready.notify_all();
  };
  lock.unlock();
  std::optional<BlockPattern> pattern;
  try {
    pattern = s.build(spec);
  } catch (...) {
    lock.lock();
    finish();
    throw;
  }
  lock.lock();
  build->pattern = pattern;
  finish();
  s.add(spec, *pattern);
  return *pattern;
}

void PatternCache::warm_up(PatternSpec spec, std::span<const int64_t> seqlens, bool transposed) {
  for (int64_t seqlen : seqlens) {
    spec.seqlen_q = spec.seqlen_k = seqlen;
    const BlockPattern pattern = get(spec);
    if (!transposed) continue;
    pattern.transposed();
    const std::scoped_lock lock(state_->mutex);
    state_->look_at_all();
    state_->keep_limits();
  }
}

void PatternCache::resize(const PatternCacheLimits& limits) {
  const std::scoped_lock lock(state_->mutex);
  state_->limits = limits;
  state_->look_at_all();
  state_->keep_limits();
}

PatternCacheLimits PatternCache::limits() const {
  const std::scoped_lock lock(state_->mutex);
  return state_->limits;
}

void PatternCache::clear() {
  EntryList dropped;  // freed without the lock
  const std::scoped_lock lock(state_->mutex);
  state_->index.clear();
  state_->entries.swap(dropped);
  state_->bytes = 0;
}

PatternCacheStats PatternCache::stats() {
  State& s = *state_;
  const std::scoped_lock lock(s.mutex);
  s.look_at_all();
  s.keep_limits();
  return {.hits = s.hits, .misses = s.misses, .evictions = s.evictions, .entries = s.entries.size(), .bytes = s.bytes};
}

}  // namespace tessera
