// torch.ops.tessera, patterns: making, joining, judging and drawing them. No autograd; results depend on values, so
// they are made outside of compiled graphs and enter them as tensors (or, by name, inside of them: named_pattern).
#include <ATen/ATen.h>
#include <torch/library.h>

#include <string>

#include "arguments.h"
#include "tessera/io.h"
#include "tessera/pattern_combine.h"
#include "tessera/pattern_custom.h"
#include "tessera/pattern_statistics.h"

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

BlockPattern from_mask(const at::Tensor& mask, int64_t seqlen_q, int64_t seqlen_k, int block_q, int block_k) {
  return pattern_from_mask(integer_view("mask", mask), seqlen_q, seqlen_k, block_q, block_k);
}

BlockPattern from_token_mask(const at::Tensor& mask, int block_q, int block_k) {
  return pattern_from_token_mask(integer_view("mask", mask), block_q, block_k);
}

BlockPattern from_csr(const std::vector<at::Tensor>& indptr, const std::vector<at::Tensor>& indices,
                      const std::vector<at::Tensor>& blocks, const std::vector<int64_t>& pattern_shape, bool sort) {
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
  return pattern_from_csr(shape_of("pattern_shape", pattern_shape), matrices,
                          sort ? ColumnOrder::any : ColumnOrder::ascending);
}

BlockPattern from_flex(const at::Tensor& kv_num_blocks, const at::Tensor& kv_indices,
                       const MaybeTensor& full_kv_num_blocks, const MaybeTensor& full_kv_indices,
                       const at::Tensor& answers, int64_t seqlen_q, int64_t seqlen_k, int block_q, int block_k) {
  FlexBlockMask mask;
  mask.kv_num_blocks = integer_view("kv_num_blocks", kv_num_blocks);
  mask.kv_indices = integer_view("kv_indices", kv_indices);
  if (full_kv_num_blocks) mask.full_kv_num_blocks = integer_view("full_kv_num_blocks", *full_kv_num_blocks);
  if (full_kv_indices) mask.full_kv_indices = integer_view("full_kv_indices", *full_kv_indices);
  mask.answers = integer_view("answers", answers);
  return pattern_from_flex(mask, seqlen_q, seqlen_k, block_q, block_k);
}

BlockPattern canonical(const BlockPattern& pattern) { return pattern; }

Named statistics_op(const BlockPattern& pattern, std::optional<bool> causal) {
  return named(statistics(pattern, causal));
}

uint64_t hash_op(const BlockPattern& pattern) { return pattern.hash(); }

int64_t bytes_op(const BlockPattern& pattern) { return static_cast<int64_t>(pattern.bytes()); }

BlockPattern load_op(const std::string& path) { return read_pattern(path); }
void save_op(const BlockPattern& pattern, const std::string& path) { write_pattern(path, pattern); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(tessera, m) {
  // No backend is to be chosen where there is no tensor among the arguments.
  constexpr auto kNoTensors = c10::DispatchKey::CompositeExplicitAutograd;
  define<&make_pattern>(m, "make_pattern({spec}) -> ({made})", kNoTensors);
  define<&parse_pattern>(m, "pattern_from_json(str json) -> ({made})", kNoTensors);  // the program's files
  define<&load_op>(m, "pattern_load(str path) -> ({made})", kNoTensors);
  // The same from the cache of the Python package, which has its kernel (patterns.py): what traced graphs call.
  m.def(schema_of("named_pattern({spec}) -> ({made})").c_str());

  define<&from_mask>(
      m, "pattern_from_mask(Tensor mask, int seqlen_q, int seqlen_k, int block_q, int block_k) -> ({made})");
  define<&from_token_mask>(m, "pattern_from_token_mask(Tensor mask, int block_q, int block_k) -> ({made})");
  // One CSR (blocks: BSR, [entries, block_q, block_k]) matrix a batch and head, batch first.
  define<&from_csr>(m,
                    "pattern_from_csr(Tensor[] indptr, Tensor[] indices, Tensor[] blocks, SymInt[] pattern_shape, bool "
                    "sort=False) -> ({made})");
  // The lists of a BlockMask, and what its mask_mod says of the blocks of kv_*: bool [blocks, block_q, block_k].
  define<&from_flex>(
      m,
      "pattern_from_flex(Tensor kv_num_blocks, Tensor kv_indices, Tensor? full_kv_num_blocks, Tensor? "
      "full_kv_indices, Tensor answers, int seqlen_q, int seqlen_k, int block_q, int block_k) -> ({made})");
  define<&canonical>(m, "pattern_canonical({pattern}) -> ({made})");  // the same pattern, checked
  define<&unite>(m, "pattern_unite({pattern}, {pattern_b}) -> ({made})");
  define<&intersect>(m, "pattern_intersect({pattern}, {pattern_b}) -> ({made})");
  define<&subtract>(m, "pattern_subtract({pattern}, {pattern_b}) -> ({made})");
  define<&complement>(m, "pattern_complement({pattern}) -> ({made})");
  define<&make_causal>(m, "pattern_make_causal({pattern}, int? q_offset=None) -> ({made})");
  define<&without_causality>(m, "pattern_without_causality({pattern}) -> ({made})");
  define<&for_queries>(m, "pattern_for_queries({pattern}, int begin, int end) -> ({made})");
  define<&slice>(m, "pattern_slice({pattern}, int row_begin, int row_end, int col_begin, int col_end) -> ({made})");
  define<&transpose>(m, "pattern_transpose({pattern}) -> ({made})");
  define<&stack_heads>(m, "pattern_stack_heads({patterns}) -> ({made})");
  define<&stack_batches>(m, "pattern_stack_batches({patterns}) -> ({made})");

  define<&statistics_op>(m, "pattern_statistics({pattern}, bool? causal=None) -> Dict(str, float)");
  define<&hash_op>(m, "pattern_hash({pattern}) -> int");
  define<&bytes_op>(m, "pattern_bytes({pattern}) -> int");  // memory behind the tensors, the transposed form included
  define<&ascii>(m, "pattern_ascii({pattern}, int head=0, int max_width=80, int batch=0) -> str");
  define<&pattern_json>(m, "pattern_json({pattern}) -> str");
  define<&save_op>(m, "pattern_save({pattern}, str path) -> ()");
}

}  // namespace tessera::ops
