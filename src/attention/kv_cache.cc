// KvCache: pages with reference counts, a list of pages for each sequence, and steps as one call on all of them.
#include "tessera/kv_cache.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "attention/device.h"
#include "call/checks.h"
#include "call/rows.h"
#include "core/growing_memory.h"
#include "core/work.h"
#include "pattern/geometry.h"
#include "pattern/rows.h"
#include "tessera/error.h"

namespace tessera {

namespace {

constexpr int64_t kMaxBatch = int64_t{1} << 20, kMaxHeads = int64_t{1} << 16, kMaxHeadDim = 4096;
constexpr int64_t kSlack = 128;  // pages grow by at least one in so many

void check_between(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) fail(name, fmt::to_string(value), fmt::format("{}..{}", low, high));
}

}  // namespace

struct KvCache::State {
  int64_t kv_heads, head_dim, head_dim_v;
  DType dtype;
  int block;
  std::vector<int64_t> lengths;
  std::vector<std::vector<int32_t>> tables;  // pages of each sequence

  // Of each page: keys [Hkv, block, D] and values [Hkv, block, Dv], a head's tokens side by side, as decode reads them;
  // sums fp32, least and largest in the dtype of the cache, each [Hkv, D].
  GrowingMemory keys, values, sums, least, largest;
  std::vector<int32_t> references;
  std::vector<int32_t> free_pages;

  size_t element() const { return size_of(dtype); }
  size_t key_bytes() const { return static_cast<size_t>(kv_heads * block * head_dim) * element(); }
  size_t value_bytes() const { return static_cast<size_t>(kv_heads * block * head_dim_v) * element(); }
  size_t summary() const { return static_cast<size_t>(kv_heads * head_dim); }  // numbers
  int64_t batch() const { return static_cast<int64_t>(lengths.size()); }

  char* key(int32_t page, int64_t h, int64_t slot) const {
    return keys.data() + static_cast<size_t>(page) * key_bytes() +
           static_cast<size_t>((h * block + slot) * head_dim) * element();
  }
  char* value(int32_t page, int64_t h, int64_t slot) const {
    return values.data() + static_cast<size_t>(page) * value_bytes() +
           static_cast<size_t>((h * block + slot) * head_dim_v) * element();
  }

  // Makes room for `more` pages beside those that are free.
  void reserve(int64_t more) {
    const int64_t missing = more - static_cast<int64_t>(free_pages.size());
    if (missing <= 0) return;
    const int64_t held = static_cast<int64_t>(references.size());
    const int64_t pages = held + std::max(missing, held / kSlack);
    if (pages > std::numeric_limits<int32_t>::max()) fail("k", fmt::format("{} pages", pages), "below 2^31");
    const size_t n = static_cast<size_t>(pages);
    keys.grow(n * key_bytes());
    values.grow(n * value_bytes());
    sums.grow(n * summary() * sizeof(float));
    least.grow(n * summary() * element());
    largest.grow(n * summary() * element());
    references.resize(n, 0);
    free_pages.reserve(n);
    for (int64_t p = pages - 1; p >= held; --p) free_pages.push_back(static_cast<int32_t>(p));
  }
  int32_t take() {
    const int32_t page = free_pages.back();
    free_pages.pop_back();
    references[page] = 1;
    return page;
  }
  void release(int32_t page) {
    if (--references[page] == 0) free_pages.push_back(page);
  }

  template <class T>
  static T* of_page(const GrowingMemory& memory, int32_t page, size_t numbers) {
    return reinterpret_cast<T*>(memory.data()) + static_cast<size_t>(page) * numbers;
  }

  // A page of its own for the last tokens of sequence b, if others share it; the room is there.
  void unshare_last(int64_t b) {
    int32_t& page = tables[b].back();
    if (references[page] == 1) return;
    const int32_t copy = take();
    std::memcpy(keys.data() + copy * key_bytes(), keys.data() + page * key_bytes(), key_bytes());
    std::memcpy(values.data() + copy * value_bytes(), values.data() + page * value_bytes(), value_bytes());
    const size_t n = summary();
    std::copy_n(of_page<float>(sums, page, n), n, of_page<float>(sums, copy, n));
    for (GrowingMemory* m : {&least, &largest}) {
      std::memcpy(m->data() + copy * n * element(), m->data() + page * n * element(), n * element());
    }
    release(page);
    page = copy;
  }

  // Adds keys begin .. end - 1 of a page to its summary, begun anew where begin is 0.
  void summarise(int32_t page, int64_t begin, int64_t end) {
    const size_t n = summary(), width = static_cast<size_t>(head_dim);
    std::vector<double> row(width), low(width), high(width);
    char* least_of_page = least.data() + static_cast<size_t>(page) * n * element();
    char* largest_of_page = largest.data() + static_cast<size_t>(page) * n * element();
    for (int64_t h = 0; h < kv_heads; ++h) {
      float* sum = of_page<float>(sums, page, n) + h * head_dim;
      const size_t at = static_cast<size_t>(h) * width * element();
      if (begin == 0) {
        std::fill_n(sum, width, 0.0f);
        std::fill(low.begin(), low.end(), std::numeric_limits<double>::infinity());
        std::fill(high.begin(), high.end(), -std::numeric_limits<double>::infinity());
      } else {
        load_row(least_of_page + at, dtype, head_dim, low.data());
        load_row(largest_of_page + at, dtype, head_dim, high.data());
      }
      for (int64_t slot = begin; slot < end; ++slot) {
        load_row(key(page, h, slot), dtype, head_dim, row.data());
        for (size_t d = 0; d < width; ++d) {
          sum[d] += static_cast<float>(row[d]);
          low[d] = std::min(low[d], row[d]);
          high[d] = std::max(high[d], row[d]);
        }
      }
      for (int64_t d = 0; d < head_dim; ++d) {
        store_from_double(least_of_page + at, dtype, d, low[static_cast<size_t>(d)]);
        store_from_double(largest_of_page + at, dtype, d, high[static_cast<size_t>(d)]);
      }
    }
  }
};

KvCache::KvCache(int64_t batch, int64_t kv_heads, int64_t head_dim, int64_t head_dim_v, DType dtype, int block) {
  check_between("batch", batch, 0, kMaxBatch);
  check_between("kv_heads", kv_heads, 1, kMaxHeads);
  check_between("head_dim", head_dim, 1, kMaxHeadDim);
  check_between("head_dim_v", head_dim_v, 1, kMaxHeadDim);
  if (block < 16 || block > 256 || block % 16 != 0) fail("block", fmt::to_string(block), "a multiple of 16 in 16..256");
  if (!is_floating(dtype)) fail("dtype", name_of(dtype), "fp32, bf16, fp16 or fp64");
  state_ = std::make_unique<State>();
  state_->kv_heads = kv_heads;
  state_->head_dim = head_dim;
  state_->head_dim_v = head_dim_v;
  state_->dtype = dtype;
  state_->block = block;
  state_->lengths.assign(static_cast<size_t>(batch), 0);
  state_->tables.resize(static_cast<size_t>(batch));
}

KvCache::~KvCache() = default;
KvCache::KvCache(KvCache&&) noexcept = default;
KvCache& KvCache::operator=(KvCache&&) noexcept = default;

int64_t KvCache::batch() const { return state_->batch(); }
int64_t KvCache::kv_heads() const { return state_->kv_heads; }
int64_t KvCache::head_dim() const { return state_->head_dim; }
int64_t KvCache::head_dim_v() const { return state_->head_dim_v; }
DType KvCache::dtype() const { return state_->dtype; }
int KvCache::block() const { return state_->block; }
std::span<const int64_t> KvCache::lengths() const { return state_->lengths; }

void KvCache::append(const TensorView& k, const TensorView& v, std::span<const int64_t> lengths, Executor& executor) {
  State& s = *state_;
  check_rank("k", k, 4, "[B, S, Hkv, D]");
  check_rank("v", v, 4, "[B, S, Hkv, Dv]");
  check_dtype("k", k, s.dtype, ", the dtype of the cache");
  check_dtype("v", v, s.dtype, ", the dtype of the cache");
  const int64_t batch = s.batch(), count = k.sizes[1];
  check_shape("k", k, {batch, count, s.kv_heads, s.head_dim}, false, "[B, S, Hkv, D]");
  check_shape("v", v, {batch, count, s.kv_heads, s.head_dim_v}, false, "[B, S, Hkv, Dv]");
  check_memory("k", k);
  check_memory("v", v);
  check_contiguous_last("k", k);
  check_contiguous_last("v", v);
  if (!lengths.empty() && static_cast<int64_t>(lengths.size()) != batch) {
    fail("lengths", fmt::format("{} numbers", lengths.size()), fmt::format("one a sequence, B = {}", batch));
  }
  std::vector<int64_t> added(lengths.begin(), lengths.end());
  if (lengths.empty()) added.assign(static_cast<size_t>(batch), count);
  int64_t needed = 0;  // pages
  for (int64_t b = 0; b < batch; ++b) {
    if (added[b] < 0 || added[b] > count) {
      fail("lengths", fmt::format("{} for sequence {}", added[b], b), fmt::format("0..S = {}", count));
    }
    if (s.lengths[b] + added[b] > kMaxSeqlen) fail("k", "a sequence beyond 2^40 tokens", "at most that");
    const bool partial = added[b] > 0 && s.lengths[b] % s.block != 0;
    needed += ceil_div(s.lengths[b] + added[b], s.block) - static_cast<int64_t>(s.tables[b].size()) +
              (partial && s.references[s.tables[b].back()] > 1);
  }
  // A table whose growth fails would leave pages that nobody owns: all that can throw comes first.
  s.reserve(needed);
  for (int64_t b = 0; b < batch; ++b) {
    s.tables[b].reserve(static_cast<size_t>(ceil_div(s.lengths[b] + added[b], s.block)));
  }

  struct Fill {  // tokens [from, to) of sequence b into a page, from `slot` on
    int64_t b, from, to, slot;
    int32_t page;
  };
  std::vector<Fill> fills;
  fills.reserve(static_cast<size_t>(needed + batch));
  for (int64_t b = 0; b < batch; ++b) {
    if (added[b] > 0 && s.lengths[b] % s.block != 0) s.unshare_last(b);
    for (int64_t from = 0; from < added[b];) {
      const int64_t slot = (s.lengths[b] + from) % s.block;
      if (slot == 0) s.tables[b].push_back(s.take());
      const int64_t to = std::min(added[b], from + s.block - slot);
      fills.push_back({b, from, to, slot, s.tables[b].back()});
      from = to;
    }
    s.lengths[b] += added[b];
  }
  const auto copy = [&](const TensorView& t, const Fill& f, int64_t width, auto row) {
    const int64_t element = static_cast<int64_t>(s.element());
    for (int64_t h = 0; h < s.kv_heads; ++h) {
      const char* from =
          static_cast<const char*>(t.data) + (f.b * t.strides[0] + f.from * t.strides[1] + h * t.strides[2]) * element;
      for (int64_t i = 0; i < f.to - f.from; ++i, from += t.strides[1] * element) {
        std::memcpy(row(f.page, h, f.slot + i), from, static_cast<size_t>(width * element));
      }
    }
  };
  parallel_for(executor, static_cast<int64_t>(fills.size()), [&](int64_t unit) {
    const Fill& f = fills[static_cast<size_t>(unit)];
    copy(k, f, s.head_dim, [&](int32_t page, int64_t h, int64_t slot) { return s.key(page, h, slot); });
    copy(v, f, s.head_dim_v, [&](int32_t page, int64_t h, int64_t slot) { return s.value(page, h, slot); });
    s.summarise(f.page, f.slot, f.slot + f.to - f.from);
  });
}

namespace {

// Rows begin .. end - 1 of the pattern of one sequence, over its first `end` keys.
BlockPattern rows_of(const CacheAttendArgs& args, int64_t b, int64_t begin, int64_t end, int block) {
  if (args.pattern) {
    const PatternShape& s = args.pattern->shape();
    if (s.block_k != block) {
      fail("pattern", fmt::format("block_k {}", s.block_k), fmt::format("{}, the block of the cache", block));
    }
    if (s.seqlen_q < end || s.seqlen_k < end) {
      fail("pattern", fmt::format("{} x {} tokens", s.seqlen_q, s.seqlen_k),
           fmt::format("at least the {} tokens of sequence {}", end, b));
    }
    return rows_with_keys(*args.pattern, s.batches == 1 ? 0 : b, begin, end, end);
  }
  PatternSpec spec = args.spec.value_or(PatternSpec{.kind = PatternKind::causal, .block_q = 16});
  if (args.spec && spec.block_k != block) {
    fail("spec", fmt::format("block_k {}", spec.block_k), fmt::format("{}, the block of the cache", block));
  }
  spec.block_k = block;
  spec.causal = true;
  spec.seqlen_q = end - begin;
  spec.seqlen_k = end;
  if (args.spec) spec.q_offset = begin;
  if (args.spec && spec.seqlen_total && *spec.seqlen_total < end) {
    fail("seqlen_total", fmt::to_string(*spec.seqlen_total),
         fmt::format("at least the {} tokens of sequence {}", end, b));
  }
  return make_pattern(spec);
}

void check_options(const AttentionOptions& o) {
  const auto refuse = [](const char* name, bool given, const char* got) {
    if (given) fail(name, got, "none: the cache says where tokens stand");
  };
  refuse("q_offset", o.q_offset.has_value(), "a position");
  refuse("k_offset", o.k_offset != 0, "a position");
  refuse("key_lengths", !o.key_lengths.empty() || o.align_to_key_lengths, "lengths");
  const auto missing = [](const char* name, bool given) {
    if (given) fail(name, "a value", "none in attention over a cache");
  };
  missing("block_bias", o.block_bias.defined());
  missing("attn_bias", o.attn_bias.defined());
  missing("dropout", o.dropout.p != 0);
  if (o.causal && !*o.causal) fail("causal", "false", "true: a token sees itself and what came before");
}

}  // namespace

ForwardInfo KvCache::attend(const CacheAttendArgs& args, Executor& executor) const {
  const State& s = *state_;
  const TensorView out = args.out, lse = args.lse;
  check_options(args.options);
  if (args.pattern && args.spec) fail("spec", "a spec beside a pattern", "one of them, or none");
  check_rank("q", args.q, 4, "[B, Sq, H, D]");
  check_memory("q", args.q);
  check_dtype("q", args.q, s.dtype, ", the dtype of the cache");
  const int64_t batch = s.batch(), queries = args.q.sizes[1], heads = args.q.sizes[2];
  check_shape("q", args.q, {batch, queries, heads, s.head_dim}, false, "[B, Sq, H, D]");
  if (heads % s.kv_heads != 0) {
    fail("q", fmt::format("{} heads", heads), fmt::format("a multiple of the cache's {}", s.kv_heads));
  }
  check_shape("out", out, {batch, queries, heads, s.head_dim_v}, false, "[B, Sq, H, Dv]");
  check_dtype("out", out, s.dtype, ", the dtype of the cache");
  check_contiguous_last("out", out);
  check_output("out", out);
  if (lse.defined()) {
    check_shape("lse", lse, {batch, heads, queries}, false, "[B, H, Sq]");
    if (!(lse.dtype == DType::f64 && s.dtype == DType::f64)) check_dtype("lse", lse, DType::f32, "");
    check_output("lse", lse);
  }
  if (args.pattern && args.pattern->shape().batches != 1 && args.pattern->shape().batches != batch) {
    fail("pattern", fmt::format("{} batches", args.pattern->shape().batches), fmt::format("1 or B = {}", batch));
  }
  const TensorView& slopes = args.options.alibi_slopes;
  if (slopes.rank == 2) check_shape("alibi_slopes", slopes, {batch, heads}, false, "[H] or [B, H]");

  std::vector<BlockPattern> patterns;  // problems borrow them
  std::vector<Problem> problems;
  patterns.reserve(static_cast<size_t>(batch));
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t end = s.lengths[b], before = std::max<int64_t>(0, queries - end);
    const auto rows = [&](auto view, int seq) {  // queries before .. of batch b
      auto part = view;
      if (!view.defined()) return part;
      part.sizes[0] = 1;
      part.sizes[seq] = queries - before;
      using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(part.data)>>, const char, char>;
      part.data = static_cast<Byte*>(view.data) +
                  (b * view.strides[0] + before * view.strides[seq]) * static_cast<int64_t>(size_of(view.dtype));
      return part;
    };
    for (int64_t q = 0; q < before; ++q) {
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t at = b * out.strides[0] + q * out.strides[1] + h * out.strides[2];
        for (int64_t d = 0; d < s.head_dim_v; ++d) store_from_double(args.out.data, s.dtype, at + d, 0.0);
        if (!lse.defined()) continue;
        store_from_double(args.lse.data, lse.dtype, b * lse.strides[0] + h * lse.strides[1] + q * lse.strides[2],
                          -std::numeric_limits<double>::infinity());
      }
    }
    if (before == queries) continue;
    patterns.push_back(rows_of(args, b, end - (queries - before), end, s.block));
    ForwardArgs one;
    one.q = rows(args.q, 1);
    one.k = key_pages();
    one.v = value_pages();
    one.out = rows(args.out, 1);
    one.lse = rows(args.lse, 2);
    one.pattern = patterns.back();
    one.page_table = PageTable{s.tables[b].data(), 1, static_cast<int64_t>(s.tables[b].size())};
    one.options = args.options;
    one.options.causal = true;
    if (slopes.rank == 2) {
      one.options.alibi_slopes.sizes[0] = 1;
      one.options.alibi_slopes.data = static_cast<const char*>(slopes.data) + b * slopes.strides[0] * 4;
    }
    try {
      problems.push_back(resolve(one));
    } catch (const Error& e) {
      throw Error(e.argument(), fmt::format("{} (sequence {})", e.what(), b));
    }
  }
  return run_forward(problems, s.dtype, args.isa, executor);
}

void KvCache::truncate(std::span<const int64_t> lengths) {
  State& s = *state_;
  if (static_cast<int64_t>(lengths.size()) != s.batch()) {
    fail("lengths", fmt::format("{} numbers", lengths.size()), fmt::format("one a sequence, B = {}", s.batch()));
  }
  const std::vector<int64_t> kept(lengths.begin(), lengths.end());
  int64_t shared = 0;  // pages that are cut while others see more of them
  for (int64_t b = 0; b < s.batch(); ++b) {
    if (kept[b] < 0 || kept[b] > s.lengths[b]) {
      fail("lengths", fmt::format("{} for sequence {}", kept[b], b), fmt::format("0..{}, its tokens", s.lengths[b]));
    }
    shared += kept[b] < s.lengths[b] && kept[b] % s.block != 0;
  }
  s.reserve(shared);
  for (int64_t b = 0; b < s.batch(); ++b) {
    if (kept[b] == s.lengths[b]) continue;
    std::vector<int32_t>& table = s.tables[b];
    while (static_cast<int64_t>(table.size()) > ceil_div(kept[b], s.block)) {
      s.release(table.back());
      table.pop_back();
    }
    s.lengths[b] = kept[b];
    if (kept[b] % s.block == 0) continue;
    s.unshare_last(b);
    s.summarise(table.back(), 0, kept[b] % s.block);
  }
}

void KvCache::reorder(std::span<const int64_t> index) {
  State& s = *state_;
  if (static_cast<int64_t>(index.size()) > kMaxBatch)
    fail("index", fmt::format("{} numbers", index.size()), "at most 2^20");
  std::vector<std::vector<int32_t>> tables;
  std::vector<int64_t> lengths;
  for (const int64_t i : std::vector<int64_t>(index.begin(), index.end())) {
    if (i < 0 || i >= s.batch()) fail("index", fmt::to_string(i), fmt::format("0..{}", s.batch() - 1));
    tables.push_back(s.tables[i]);
    lengths.push_back(s.lengths[i]);
  }
  for (const auto& table : tables) {
    for (const int32_t page : table) ++s.references[page];
  }
  for (const auto& table : s.tables) {
    for (const int32_t page : table) s.release(page);
  }
  s.tables = std::move(tables);
  s.lengths = std::move(lengths);
}

size_t KvCache::nbytes() const {
  const State& s = *state_;
  size_t bytes = s.keys.size() + s.values.size() + s.sums.size() + s.least.size() + s.largest.size();
  bytes += (s.references.capacity() + s.free_pages.capacity()) * sizeof(int32_t);
  for (const auto& table : s.tables) bytes += table.capacity() * sizeof(int32_t);
  return bytes;
}

KvCache::Summaries KvCache::summaries(int64_t b) const {
  const State& s = *state_;
  check_between("b", b, 0, s.batch() - 1);
  const size_t n = s.summary();
  Summaries found;
  found.blocks = static_cast<int64_t>(s.tables[b].size());
  for (int64_t j = 0; j < found.blocks; ++j) {
    const int32_t page = s.tables[b][j];
    const double keys = static_cast<double>(std::min<int64_t>(s.block, s.lengths[b] - j * s.block));
    const float* sum = State::of_page<float>(s.sums, page, n);
    const char* low = s.least.data() + static_cast<size_t>(page) * n * s.element();
    const char* high = s.largest.data() + static_cast<size_t>(page) * n * s.element();
    for (size_t i = 0; i < n; ++i) {
      found.mean.push_back(static_cast<float>(sum[i] / keys));
      found.min.push_back(static_cast<float>(load_as_double(low, s.dtype, static_cast<int64_t>(i))));
      found.max.push_back(static_cast<float>(load_as_double(high, s.dtype, static_cast<int64_t>(i))));
    }
  }
  return found;
}

namespace {

TensorView pages_view(const char* data, DType dtype, int64_t pages, int64_t block, int64_t heads, int64_t width) {
  TensorView v = make_view(static_cast<const void*>(data), dtype, {pages, block, heads, width});
  v.strides = {heads * block * width, width, block * width, 1};
  return v;
}

}  // namespace

TensorView KvCache::key_pages() const {
  const State& s = *state_;
  return pages_view(s.keys.data(), s.dtype, static_cast<int64_t>(s.references.size()), s.block, s.kv_heads, s.head_dim);
}
TensorView KvCache::value_pages() const {
  const State& s = *state_;
  return pages_view(s.values.data(), s.dtype, static_cast<int64_t>(s.references.size()), s.block, s.kv_heads,
                    s.head_dim_v);
}
std::span<const int32_t> KvCache::pages(int64_t b) const {
  check_between("b", b, 0, state_->batch() - 1);
  return state_->tables[b];
}

}  // namespace tessera
