// torch.ops.tessera, patterns: making, joining, judging and drawing them. No autograd; results depend on values, so
// they are made outside of compiled graphs and enter them as tensors.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "convert.h"
#include "schema.h"
#include "tessera/io.h"
#include "tessera/pattern_cache.h"
#include "tessera/pattern_combine.h"
#include "tessera/pattern_custom.h"
#include "tessera/pattern_statistics.h"
#include "tessera/patterns.h"

// A second pattern as arguments, and a pattern as a result.
#define PATTERN_B \
  "Tensor indptr_b, Tensor indices_b, Tensor? bitmap_index_b, Tensor? bitmaps_b, SymInt[] pattern_shape_b"
#define PATTERN_RESULT "(Tensor indptr, Tensor indices, Tensor bitmap_index, Tensor bitmaps, int[] pattern_shape)"
#define PATTERN_PARAMETERS_B                                                                  \
  const at::Tensor &indptr_b, const at::Tensor &indices_b, const MaybeTensor &bitmap_index_b, \
      const MaybeTensor &bitmaps_b, at::IntArrayRef pattern_shape_b
#define PATTERN_VALUE_B \
  PatternTensors { indptr_b, indices_b, bitmap_index_b, bitmaps_b, pattern_shape_b.vec() }

// Every field of PatternSpec, in its order.
#define SPEC                                                                                         \
  "str kind, int seqlen_q, int seqlen_k, int block_q, int block_k, int heads=1, bool causal=False, " \
  "float? density=None, str budget='even', int? q_offset=None, int? seqlen_total=None, "             \
  "int? window=None, int[] dilation_rates=[], int[] segment_lengths=[], "                            \
  "int? global_tokens=None, int? stride=None, int seed=0, int ranks=1, int ranks_per_node=1, "       \
  "float? local_density=None, float? global_density=None, float? inter_node_density=None"
#define SPEC_PARAMETERS                                                                                       \
  c10::string_view kind, int64_t seqlen_q, int64_t seqlen_k, int64_t block_q, int64_t block_k, int64_t heads, \
      bool causal, std::optional<double> density, c10::string_view budget, std::optional<int64_t> q_offset,   \
      std::optional<int64_t> seqlen_total, std::optional<int64_t> window, at::IntArrayRef dilation_rates,     \
      at::IntArrayRef segment_lengths, std::optional<int64_t> global_tokens, std::optional<int64_t> stride,   \
      int64_t seed, int64_t ranks, int64_t ranks_per_node, std::optional<double> local_density,               \
      std::optional<double> global_density, std::optional<double> inter_node_density
#define SPEC_VALUE                                                                                                     \
  PatternSpec {                                                                                                        \
    pattern_kind({kind.data(), kind.size()}), seqlen_q, seqlen_k, narrow(block_q), narrow(block_k), heads, causal,     \
        density, budget_of_name({budget.data(), budget.size()}), q_offset, seqlen_total, window, dilation_rates.vec(), \
        segment_lengths.vec(), global_tokens, stride, static_cast<uint64_t>(seed), ranks, ranks_per_node,              \
        local_density, global_density, inter_node_density                                                              \
  }

namespace tessera::ops {

namespace {

TensorView integer_view(const char* name, const at::Tensor& t) {
  TensorView v;
  if (!t.device().is_cpu() || t.layout() != at::kStrided)
    fail(name, "a tensor on " + t.device().str(), "a dense tensor on cpu");
  switch (t.scalar_type()) {
    case at::kLong: v.dtype = DType::i64; break;
    case at::kInt: v.dtype = DType::i32; break;
    case at::kByte: v.dtype = DType::u8; break;
    case at::kBool: v.dtype = DType::boolean; break;
    default: fail(name, std::string("dtype ") + c10::toString(t.scalar_type()), "bool, uint8, int32 or int64");
  }
  if (t.dim() < 1 || t.dim() > TensorView::kMaxRank) {
    fail(name, std::to_string(t.dim()) + " dimensions", "1 to " + std::to_string(TensorView::kMaxRank));
  }
  v.data = t.const_data_ptr();
  v.rank = static_cast<int>(t.dim());
  for (int i = 0; i < v.rank; ++i) {
    v.sizes[i] = t.size(i);
    v.strides[i] = t.stride(i);
  }
  return v;
}

PatternCache& cache() {
  static PatternCache patterns;
  return patterns;
}

PatternResult make_pattern_op(SPEC_PARAMETERS) {
  return translate_errors([&] { return tensors_of(make_pattern(SPEC_VALUE)); });
}

PatternResult cached_pattern_op(SPEC_PARAMETERS) {
  return translate_errors([&] { return tensors_of(cache().get(SPEC_VALUE)); });
}

void cache_warm_up_op(at::IntArrayRef seqlens, SPEC_PARAMETERS) {
  translate_errors([&] { cache().warm_up(SPEC_VALUE, {seqlens.data(), seqlens.size()}); });
}

std::vector<int64_t> cache_stats_op() {
  const PatternCacheStats s = cache().stats();
  const PatternCacheLimits l = cache().limits();
  return {s.hits,
          s.misses,
          s.evictions,
          static_cast<int64_t>(s.entries),
          static_cast<int64_t>(s.bytes),
          static_cast<int64_t>(l.entries),
          static_cast<int64_t>(l.bytes)};
}

void cache_resize_op(int64_t entries, int64_t bytes) {
  translate_errors([&] {
    if (entries < 0) fail("entries", std::to_string(entries), "0 or more");
    if (bytes < 0) fail("bytes", std::to_string(bytes), "0 or more");
    cache().resize({static_cast<size_t>(bytes), static_cast<size_t>(entries)});
  });
}

void cache_clear_op() { cache().clear(); }

PatternResult from_mask_op(const at::Tensor& mask, int64_t seqlen_q, int64_t seqlen_k, int64_t block_q,
                           int64_t block_k) {
  return translate_errors([&] {
    return tensors_of(
        pattern_from_mask(integer_view("mask", mask), seqlen_q, seqlen_k, narrow(block_q), narrow(block_k)));
  });
}

PatternResult from_token_mask_op(const at::Tensor& mask, int64_t block_q, int64_t block_k) {
  return translate_errors([&] {
    return tensors_of(pattern_from_token_mask(integer_view("mask", mask), narrow(block_q), narrow(block_k)));
  });
}

// The same pattern, checked and canonical.
PatternResult canonical_op(PATTERN_PARAMETERS) {
  return translate_errors([&] { return tensors_of(pattern_of(PATTERN_VALUE)); });
}

PatternResult from_csr_op(at::TensorList indptr, at::TensorList indices, at::TensorList blocks,
                          at::IntArrayRef pattern_shape, bool sort) {
  return translate_errors([&] {
    if (indptr.size() != indices.size() || (!blocks.empty() && blocks.size() != indptr.size())) {
      fail("indices",
           std::to_string(indptr.size()) + " indptr, " + std::to_string(indices.size()) + " indices, " +
               std::to_string(blocks.size()) + " blocks",
           "equally many (blocks: or none)");
    }
    std::vector<CsrMatrix> matrices(indptr.size());
    for (size_t i = 0; i < matrices.size(); ++i) {
      matrices[i].indptr = integer_view("indptr", indptr[i]);
      matrices[i].indices = integer_view("indices", indices[i]);
      if (!blocks.empty()) matrices[i].blocks = integer_view("blocks", blocks[i]);
    }
    return tensors_of(pattern_from_csr(shape_of("pattern_shape", pattern_shape), matrices,
                                       sort ? ColumnOrder::any : ColumnOrder::ascending));
  });
}

PatternResult unite_op(PATTERN_PARAMETERS, PATTERN_PARAMETERS_B) {
  return translate_errors([&] { return tensors_of(unite(pattern_of(PATTERN_VALUE), pattern_of(PATTERN_VALUE_B))); });
}

PatternResult intersect_op(PATTERN_PARAMETERS, PATTERN_PARAMETERS_B) {
  return translate_errors(
      [&] { return tensors_of(intersect(pattern_of(PATTERN_VALUE), pattern_of(PATTERN_VALUE_B))); });
}

PatternResult subtract_op(PATTERN_PARAMETERS, PATTERN_PARAMETERS_B) {
  return translate_errors([&] { return tensors_of(subtract(pattern_of(PATTERN_VALUE), pattern_of(PATTERN_VALUE_B))); });
}

PatternResult complement_op(PATTERN_PARAMETERS) {
  return translate_errors([&] { return tensors_of(complement(pattern_of(PATTERN_VALUE))); });
}

PatternResult make_causal_op(PATTERN_PARAMETERS, std::optional<int64_t> q_offset) {
  return translate_errors([&] { return tensors_of(make_causal(pattern_of(PATTERN_VALUE), q_offset)); });
}

PatternResult without_causality_op(PATTERN_PARAMETERS) {
  return translate_errors([&] { return tensors_of(without_causality(pattern_of(PATTERN_VALUE))); });
}

PatternResult for_queries_op(PATTERN_PARAMETERS, int64_t begin, int64_t end) {
  return translate_errors([&] { return tensors_of(for_queries(pattern_of(PATTERN_VALUE), begin, end)); });
}

std::string json_op(PATTERN_PARAMETERS) {
  return translate_errors([&] { return pattern_json(pattern_of(PATTERN_VALUE)); });
}

PatternResult from_json_op(c10::string_view json) {
  return translate_errors([&] { return tensors_of(parse_pattern({json.data(), json.size()})); });
}

void save_op(PATTERN_PARAMETERS, c10::string_view path) {
  translate_errors([&] { write_pattern({path.data(), path.size()}, pattern_of(PATTERN_VALUE)); });
}

PatternResult load_op(c10::string_view path) {
  return translate_errors([&] { return tensors_of(read_pattern({path.data(), path.size()})); });
}

PatternResult slice_op(PATTERN_PARAMETERS, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end) {
  return translate_errors(
      [&] { return tensors_of(slice(pattern_of(PATTERN_VALUE), row_begin, row_end, col_begin, col_end)); });
}

PatternResult transpose_op(PATTERN_PARAMETERS) {
  return translate_errors([&] { return tensors_of(transpose(pattern_of(PATTERN_VALUE))); });
}

PatternResult stack_op(at::TensorList indptr, at::TensorList indices, at::TensorList bitmap_index,
                       at::TensorList bitmaps, at::IntArrayRef pattern_shapes, bool batches) {
  return translate_errors([&] {
    const auto patterns = patterns_of(indptr, indices, bitmap_index, bitmaps, pattern_shapes);
    return tensors_of(batches ? stack_batches(patterns) : stack_heads(patterns));
  });
}

std::vector<double> statistics_op(PATTERN_PARAMETERS, std::optional<bool> causal) {
  return translate_errors([&] {
    const PatternStatistics s = statistics(pattern_of(PATTERN_VALUE), causal);
    const auto d = [](int64_t x) { return static_cast<double>(x); };
    return std::vector<double>{d(s.rows),
                               d(s.cols),
                               d(s.kept_blocks),
                               d(s.partial_blocks),
                               d(s.admissible_blocks),
                               s.density,
                               s.sparsity,
                               s.row_density.mean,
                               s.row_density.min,
                               s.row_density.max,
                               s.row_density.std,
                               s.column_density.mean,
                               s.column_density.min,
                               s.column_density.max,
                               s.column_density.std,
                               s.diagonal_density,
                               d(s.empty_rows),
                               s.load_imbalance};
  });
}

int64_t hash_op(PATTERN_PARAMETERS) {
  return translate_errors([&] { return static_cast<int64_t>(pattern_of(PATTERN_VALUE).hash()); });
}

std::string ascii_op(PATTERN_PARAMETERS, int64_t head, int64_t max_width, int64_t batch) {
  return translate_errors([&] { return ascii(pattern_of(PATTERN_VALUE), head, max_width, batch); });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tessera, m) {
  m.def("make_pattern(" SPEC ") -> " PATTERN_RESULT);
  m.def("cached_pattern(" SPEC ") -> " PATTERN_RESULT);
  m.def("cache_warm_up(int[] seqlens, " SPEC ") -> ()");
  m.def("cache_stats() -> int[]");  // hits, misses, evictions, entries, bytes, limit of entries, limit of bytes
  m.def("cache_resize(int entries, int bytes) -> ()");
  m.def("cache_clear() -> ()");
  m.def("pattern_from_mask(Tensor mask, int seqlen_q, int seqlen_k, int block_q, int block_k) -> " PATTERN_RESULT);
  m.def("pattern_from_token_mask(Tensor mask, int block_q, int block_k) -> " PATTERN_RESULT);
  m.def("pattern_canonical(" PATTERN ") -> " PATTERN_RESULT);
  // One CSR (blocks: BSR, [entries, block_q, block_k]) matrix a batch and head, batch first.
  m.def(
      "pattern_from_csr(Tensor[] indptr, Tensor[] indices, Tensor[] blocks, SymInt[] pattern_shape, bool sort=False) "
      "-> " PATTERN_RESULT);
  m.def("pattern_unite(" PATTERN ", " PATTERN_B ") -> " PATTERN_RESULT);
  m.def("pattern_intersect(" PATTERN ", " PATTERN_B ") -> " PATTERN_RESULT);
  m.def("pattern_subtract(" PATTERN ", " PATTERN_B ") -> " PATTERN_RESULT);
  m.def("pattern_complement(" PATTERN ") -> " PATTERN_RESULT);
  m.def("pattern_make_causal(" PATTERN ", int? q_offset=None) -> " PATTERN_RESULT);
  m.def("pattern_without_causality(" PATTERN ") -> " PATTERN_RESULT);
  m.def("pattern_for_queries(" PATTERN ", int begin, int end) -> " PATTERN_RESULT);
  m.def("pattern_json(" PATTERN ") -> str");  // the program's files (tessera/io.h)
  m.def("pattern_from_json(str json) -> " PATTERN_RESULT);
  m.def("pattern_save(" PATTERN ", str path) -> ()");
  m.def("pattern_load(str path) -> " PATTERN_RESULT);
  m.def("pattern_slice(" PATTERN ", int row_begin, int row_end, int col_begin, int col_end) -> " PATTERN_RESULT);
  m.def("pattern_transpose(" PATTERN ") -> " PATTERN_RESULT);
  // Absent bitmaps: empty tensors. Heads, or batches, one after the other.
  m.def(
      "pattern_stack(Tensor[] indptr, Tensor[] indices, Tensor[] bitmap_index, Tensor[] bitmaps, "
      "SymInt[] pattern_shapes, bool batches=False) -> " PATTERN_RESULT);
  m.def("pattern_statistics(" PATTERN ", bool? causal=None) -> float[]");  // the fields of PatternStatistics in order
  m.def("pattern_hash(" PATTERN ") -> int");
  m.def("pattern_ascii(" PATTERN ", int head=0, int max_width=80, int batch=0) -> str");
}

// No backend is to be chosen where there is no tensor among the arguments; the rest checks that its tensors are on the
// CPU.
TORCH_LIBRARY_IMPL(tessera, CompositeExplicitAutograd, m) {
  m.impl("make_pattern", make_pattern_op);
  m.impl("cached_pattern", cached_pattern_op);
  m.impl("cache_warm_up", cache_warm_up_op);
  m.impl("cache_stats", cache_stats_op);
  m.impl("cache_resize", cache_resize_op);
  m.impl("cache_clear", cache_clear_op);
  m.impl("pattern_from_json", from_json_op);
  m.impl("pattern_load", load_op);
}

TORCH_LIBRARY_IMPL(tessera, CPU, m) {
  m.impl("pattern_from_mask", from_mask_op);
  m.impl("pattern_from_token_mask", from_token_mask_op);
  m.impl("pattern_canonical", canonical_op);
  m.impl("pattern_from_csr", from_csr_op);
  m.impl("pattern_unite", unite_op);
  m.impl("pattern_intersect", intersect_op);
  m.impl("pattern_subtract", subtract_op);
  m.impl("pattern_complement", complement_op);
  m.impl("pattern_make_causal", make_causal_op);
  m.impl("pattern_without_causality", without_causality_op);
  m.impl("pattern_for_queries", for_queries_op);
  m.impl("pattern_json", json_op);
  m.impl("pattern_save", save_op);
  m.impl("pattern_slice", slice_op);
  m.impl("pattern_transpose", transpose_op);
  m.impl("pattern_stack", stack_op);
  m.impl("pattern_statistics", statistics_op);
  m.impl("pattern_hash", hash_op);
  m.impl("pattern_ascii", ascii_op);
}

}  // namespace tessera::ops
