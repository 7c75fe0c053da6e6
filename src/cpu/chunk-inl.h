// The keys of a row of blocks as a stream of chunks, and the staging of their K and V rows.
#if defined(TESSERA_CPU_CHUNK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TESSERA_CPU_CHUNK_INL_H_
#undef TESSERA_CPU_CHUNK_INL_H_
#else
#define TESSERA_CPU_CHUNK_INL_H_
#endif

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/convert-inl.h"
#include "cpu/modify-inl.h"
#include "cpu/scratch.h"
#include "cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tessera::cpu::TESSERA_KERNELS {

#if TESSERA_BF16_DOT
template <class T>
using ProductOf = std::conditional_t<std::is_same_v<T, bfloat16>, Bf16Product, Fp32Product>;
#else
template <class T>
using ProductOf = Fp32Product;
#endif

inline constexpr int kChunk = kMostKeys;  // keys; scores [kChunk][W] are 32 KiB on AVX-512

// Consecutive keys of one kept block.
struct Segment {
  int64_t entry = 0, k = 0, keys = 0;
};

// Up to kChunk keys. Full blocks are joined to fill it, neighbours in memory to one segment; what is read in place is
// not joined with what lies elsewhere once it is half full (copying rows cost .05 to .07 of the peak at blocks of 64).
// A segment that needs a mask, a bias or dropout is `alone`.
struct Chunk {
  Segment segments[kChunk];
  int count = 0;
  int64_t keys = 0;
  bool alone = false;
  bool masked = false;
};

// Cuts the kept blocks of a row into chunks.
class ChunkReader {
 public:
  ChunkReader(const Problem& p, int64_t b, int64_t h, int64_t row, const PairMask& mask)
      : mask_(mask),
        in_place_(p.dtype == DType::f32),
        paged_(p.page_table != nullptr),
        q_begin_(p.pattern.shape.query_begin(row)),
        q_end_(p.pattern.shape.query_end(row)),
        special_(ScoreTerms::any(p) || p.dropout.p > 0),
        padded_(p.attn_bias != nullptr && p.attn_bias_stride[2] == 0),
        terms_(p, b, h) {
    const int64_t id = p.pattern.row_id(b, h, row);
    entry_ = p.pattern.indptr[id];
    end_ = p.pattern.indptr[id + 1];
    Open();
  }

  // The keys that Next will start with.
  Segment First() const { return entry_ < end_ ? Segment{entry_, keys_.begin, keys_.size()} : Segment{}; }

  // False at the end of the row.
  bool Next(Chunk& chunk) {
    chunk.count = 0;
    chunk.keys = 0;
    chunk.alone = chunk.masked = false;
    while (entry_ < end_) {
      if (masked_ || special_) {
        if (chunk.count) return true;
        chunk.alone = true;
        chunk.masked = masked_;
        Take(chunk);
        return true;
      }
      Take(chunk);
      if (chunk.keys == kChunk || (in_place_ && chunk.keys >= kChunk / 2 && !Joins(chunk))) return true;
    }
    return chunk.count > 0;
  }

 private:
  // Makes entry_ the next one that has keys to see.
  void Open() {
    for (; entry_ < end_; ++entry_) {
      keys_ = mask_.keys(entry_, q_begin_, q_end_);
      if (keys_.empty() || Closed(keys_)) continue;
      masked_ = !mask_.full(entry_, q_begin_, q_end_, keys_);
      return;
    }
  }

  void Take(Chunk& chunk) {
    const int64_t n = std::min(kChunk - chunk.keys, keys_.size());
    if (Joins(chunk)) {
      chunk.segments[chunk.count - 1].keys += n;
    } else {
      chunk.segments[chunk.count++] = {entry_, keys_.begin, n};
    }
    chunk.keys += n;
    keys_.begin += n;
    if (!keys_.empty()) return;
    ++entry_;
    Open();
  }

  // Does a bias of -inf, the same for all queries (padding), hide every one of these keys? An open one ends the search,
  // most of the time the first.
  bool Closed(const Interval& keys) const {
    if (!padded_) return false;
    for (int64_t k = keys.begin; k < keys.end; ++k) {
      if (terms_.bias(q_begin_, k) != -std::numeric_limits<double>::infinity()) return false;
    }
    return true;
  }

  // Are the entry's keys the neighbours in memory of the last ones of the chunk?
  bool Joins(const Chunk& chunk) const {
    if (chunk.count == 0 || entry_ == end_ || paged_) return false;
    const Segment& last = chunk.segments[chunk.count - 1];
    return last.k + last.keys == keys_.begin;
  }

  const PairMask& mask_;
  const bool in_place_, paged_;
  const int64_t q_begin_, q_end_;
  const bool special_;  // every segment alone
  const bool padded_;
  const ScoreTerms terms_;
  int64_t entry_ = 0, end_ = 0;
  Interval keys_;  // left of the entry
  bool masked_ = false;
};

// Rows to bring into the cache.
struct FetchList {
  struct Rows {
    const char* row = nullptr;
    int64_t stride = 0, bytes = 0, count = 0;
  };
  Rows ranges[4];
  int size = 0;
  int64_t rows = 0;

  void Add(const char* row, int64_t stride, int64_t bytes, int64_t count) {
    ranges[size++] = {row, stride, bytes, count};
    rows += count;
  }
  void FetchRow() {
    while (size > 0 && ranges[size - 1].count == 0) --size;
    if (size == 0) return;
    Rows& r = ranges[size - 1];
    for (int64_t i = 0; i < r.bytes; i += 64) __builtin_prefetch(r.row + i, 0, 2);
    r.row += r.stride;
    --r.count;
  }
};

// Brings the K and V rows of a chunk into the form that the products read: fp32 in dense rows, or bf16 with values in
// pairs of keys. What lies so already is read in place. The rows of the next chunk are staged while the current one is
// computed, a few between two tiles, with a prefetch running ahead of them: rows of [B, S, H, D] lie far apart, where
// no hardware prefetcher follows and few cache sets serve them. (fp32 there, in place: D = 64 .81, D = 128 .88 of
// peak; without prefetch .77, .81.)
template <class T>
class Stager {
  using P = ProductOf<T>;
  using Element = typename P::Element;
  static constexpr bool kPairs = P::kElementsPerStep == 2;
  static constexpr int kLead = 24;  // rows between prefetch and copy

 public:
  struct Staged {
    const Element* k = nullptr;
    const Element* v = nullptr;
    int64_t k_stride = 0, v_stride = 0;  // elements of a key, of a step
  };

  Stager(const Problem& p, int64_t b, int64_t h, Scratch& scratch)
      : p_(p),
        b_(b),
        kv_head_(h / p.group()),
        steps_((p.head_dim + P::kElementsPerStep - 1) / P::kElementsPerStep),
        readable_k_(kPairs ? p.head_dim % 2 == 0 && p.k.seq % 2 == 0 : std::is_same_v<T, float>),
        readable_v_(std::is_same_v<T, float>) {
    const int64_t keys = std::min<int64_t>(kChunk, hwy::RoundUpTo(std::max<int64_t>(p.seqlen_k, 1), 2));
    for (int i = 0; i < 2; ++i) {
      k_rows_[i] = scratch.take<Element>(keys * steps_);
      v_rows_[i] = scratch.take<Element>(keys / P::kElementsPerStep * p.head_dim_v);
    }
  }

  const T* KRow(int64_t k) const {
    const int64_t block = p_.pattern.shape.block_k;
    return reinterpret_cast<const T*>(p_.k_block(b_, k / block, kv_head_)) + (k % block) * p_.k.seq;
  }
  const T* VRow(int64_t k) const {
    const int64_t block = p_.pattern.shape.block_k;
    return reinterpret_cast<const T*>(p_.v_block(b_, k / block, kv_head_)) + (k % block) * p_.v.seq;
  }

  // Starts on the next chunk, to be done within about `visits` calls of Some(). The chunk must stay until Finish().
  void Begin(const Chunk& chunk, int64_t visits) {
    buffer_ ^= 1;
    in_place_k_ = readable_k_ && chunk.count == 1;
    in_place_v_ = readable_v_ && chunk.count == 1;
    k_to_ = k_rows_[buffer_];
    v_to_ = v_rows_[buffer_];
    waiting_ = nullptr;
    first_ = chunk.segments[0].k;
    left_ = chunk.keys;
    quota_ = (chunk.keys + std::max<int64_t>(visits, 1) - 1) / std::max<int64_t>(visits, 1);
    copy_.Start(*this, chunk);
    ahead_.Start(*this, chunk);
    if (!(in_place_k_ && in_place_v_)) {
      for (int64_t i = 0; i < kLead; ++i) FetchAhead();
    }
  }

  // Instead of a next chunk: fetches rows into the cache, within about `visits` calls of Some().
  void Fetch(const FetchList& list, int64_t visits) {
    list_ = list;
    quota_ = (list.rows + std::max<int64_t>(visits, 1) - 1) / std::max<int64_t>(visits, 1);
  }

  void Some() {
    for (int64_t i = 0; i < quota_ && left_ > 0; ++i) CopyRow();
    for (int64_t i = 0; i < quota_ && list_.size > 0; ++i) list_.FetchRow();
  }

  Staged Finish() {
    while (left_ > 0 && !(in_place_k_ && in_place_v_)) CopyRow();
    if constexpr (kPairs) {
      if (waiting_) InterleaveRows(waiting_, nullptr, p_.head_dim_v, v_to_);
    }
    Staged s;
    s.k = in_place_k_ ? reinterpret_cast<const Element*>(KRow(first_)) : k_rows_[buffer_];
    s.k_stride = in_place_k_ ? p_.k.seq / P::kElementsPerStep : steps_;
    s.v = in_place_v_ ? reinterpret_cast<const Element*>(VRow(first_)) : v_rows_[buffer_];
    s.v_stride = in_place_v_ ? p_.v.seq : p_.head_dim_v;
    return s;
  }

 private:
  // Walks the rows of a chunk.
  struct Cursor {
    const Stager* stager = nullptr;
    const Segment* segment = nullptr;
    int segments = 0;
    int64_t rows = 0;  // left in the segment
    const T* k = nullptr;
    const T* v = nullptr;

    void Start(const Stager& s, const Chunk& chunk) {
      stager = &s;
      segment = chunk.segments;
      segments = chunk.count;
      Open();
    }
    void Open() {
      rows = segment->keys;
      k = stager->KRow(segment->k);
      v = stager->VRow(segment->k);
    }
    void Step() {
      k += stager->p_.k.seq;
      v += stager->p_.v.seq;
      if (--rows > 0 || --segments == 0) return;
      ++segment;
      Open();
    }
    bool done() const { return segments == 0; }
  };

  void FetchAhead() {
    if (ahead_.done()) return;
    for (int64_t i = 0; i < p_.head_dim * int64_t{sizeof(T)}; i += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(ahead_.k) + i, 0, 2);
    }
    for (int64_t i = 0; i < p_.head_dim_v * int64_t{sizeof(T)}; i += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(ahead_.v) + i, 0, 2);
    }
    ahead_.Step();
  }

  void CopyRow() {
    FetchAhead();
    if (!in_place_k_) {
      if constexpr (kPairs) {
        k_to_[steps_ - 1] = 0;  // an odd head dim ends in half a pair
        std::memcpy(k_to_, copy_.k, p_.head_dim * sizeof(T));
      } else {
        RowToFloat(copy_.k, p_.head_dim, k_to_);
      }
      k_to_ += steps_;
    }
    if constexpr (kPairs) {
      if (waiting_ == nullptr) {
        waiting_ = copy_.v;
      } else {
        InterleaveRows(waiting_, copy_.v, p_.head_dim_v, v_to_);
        waiting_ = nullptr;
        v_to_ += p_.head_dim_v;
      }
    } else if (!in_place_v_) {
      RowToFloat(copy_.v, p_.head_dim_v, v_to_);
      v_to_ += p_.head_dim_v;
    }
    copy_.Step();
    --left_;
  }

  const Problem& p_;
  const int64_t b_, kv_head_;
  const int64_t steps_;  // elements of a staged k row
  const bool readable_k_, readable_v_;
  Element* k_rows_[2] = {};
  Element* v_rows_[2] = {};
  int buffer_ = 0;
  bool in_place_k_ = false, in_place_v_ = false;
  int64_t first_ = 0, left_ = 0, quota_ = 0;
  Cursor copy_, ahead_;
  FetchList list_;
  Element* k_to_ = nullptr;
  Element* v_to_ = nullptr;
  const T* waiting_ = nullptr;  // first value row of a pair
};

}  // namespace tessera::cpu::TESSERA_KERNELS
HWY_AFTER_NAMESPACE();
#endif
