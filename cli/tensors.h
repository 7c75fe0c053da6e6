// Queries, keys and values: from files, or random.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include "tessera/executor.h"
#include "tessera/io.h"
#include "tessera/tensor_view.h"

namespace tessera::cli {

// --input FILE or --q --k --v, and --layout.
struct InputFlags {
  std::string input, q, k, v;
  std::string layout = "bhsd";

  void add_to(CLI::App& app);
};

struct Qkv {
  Tensor q, k, v;
  Layout layout = Layout::bhsd;

  // [B, S, H, D]
  TensorView q_view() const { return as_bshd(q); }
  TensorView k_view() const { return as_bshd(k); }
  TensorView v_view() const { return as_bshd(v); }
  int64_t batch() const { return q_view().sizes[0]; }
  int64_t seqlen_q() const { return q_view().sizes[1]; }
  int64_t seqlen_k() const { return k_view().sizes[1]; }
  int64_t heads() const { return q_view().sizes[2]; }
  int64_t kv_heads() const { return k_view().sizes[2]; }
  int64_t head_dim() const { return q_view().sizes[3]; }
  int64_t head_dim_v() const { return v_view().sizes[3]; }
  std::vector<int64_t> out_shape() const;  // of the result, in this layout
  TensorView as_bshd(const Tensor& t) const;
  MutableTensorView as_bshd(Tensor& t) const;
};

// UsageError where flags are missing or contradict each other; Error for what is wrong with the files.
Qkv load_qkv(const InputFlags& flags);

// The same numbers in another dtype.
Tensor convert(const Tensor& tensor, DType dtype, Executor& executor);
Qkv convert(const Qkv& qkv, DType dtype, Executor& executor);

struct QkvShape {
  int64_t batch = 1, heads = 8, kv_heads = 8, seqlen_q = 0, seqlen_k = 0, head_dim = 64, head_dim_v = 64;

  int64_t q_elements() const { return batch * heads * seqlen_q * head_dim; }
  int64_t kv_elements() const { return batch * kv_heads * seqlen_k * (head_dim + head_dim_v); }
  int64_t out_elements() const { return batch * heads * seqlen_q * head_dim_v; }
};
// Standard normal numbers, the same for any number of threads.
Tensor random_normal(DType dtype, std::vector<int64_t> shape, uint64_t seed, Executor& executor);
Qkv random_qkv(const QkvShape& shape, DType dtype, Layout layout, uint64_t seed, Executor& executor);

}  // namespace tessera::cli
