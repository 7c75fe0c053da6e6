// Between torch's values and the core's: tensors as views, patterns as tensors, options as arguments, errors.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "tessera/attention.h"
#include "tessera/error.h"

namespace tessera::ops {

using MaybeTensor = std::optional<at::Tensor>;

// What an operator throws where memory is short: MemoryError in Python, as of every std::bad_alloc, but with words.
// (Out of torch's autograd engine it comes as a RuntimeError, like all that torch does not know.)
class MemoryError : public std::bad_alloc {
 public:
  explicit MemoryError(const char* words) : words_(std::make_shared<const std::string>(words)) {}
  const char* what() const noexcept override { return words_->c_str(); }

 private:
  std::shared_ptr<const std::string> words_;  // copying an exception does not throw
};

// Runs f; a tessera::Error becomes a ValueError in Python (c10::ValueError in C++), OutOfMemory a MemoryError, with the
// same words.
template <class F>
auto translate_errors(F f) -> decltype(f()) {
  try {
    return f();
  } catch (const OutOfMemory& e) {
    throw MemoryError(e.what());
  } catch (const Error& e) {
    C10_THROW_ERROR(ValueError, e.what());
  }
}

// Error unless t is an ordinary strided tensor on the CPU.
void check_device(const char* name, const at::Tensor& t);

// int32 or int64 numbers as contiguous ones of type `wanted`; Error for anything else.
at::Tensor integers(const char* name, const at::Tensor& t, at::ScalarType wanted);

// Error for devices and dtypes that the core does not know. A missing or undefined tensor becomes an undefined view.
TensorView view_of(const char* name, const at::Tensor& t);
TensorView view_of(const char* name, const MaybeTensor& t);
MutableTensorView output_view(const char* name, const at::Tensor& t);  // undefined: undefined

// A PatternShape as numbers: seqlen_q, seqlen_k, block_q, block_k, heads, batches, flags (1: causal, 2: q_offset is
// given), q_offset, q_skip.
inline constexpr size_t kShapeNumbers = 9;
std::vector<int64_t> shape_numbers(const PatternShape& shape);
PatternShape shape_of(const char* name, at::IntArrayRef numbers);
int narrow(int64_t n);  // what int cannot hold becomes something that no check allows

// A pattern as tensors: indptr int32 or int64 [batches * heads * rows + 1], indices int32 [entries]; bitmap_index int32
// [entries] and bitmaps int64 [n, block_q, words] or both absent; shape: the numbers of shape_numbers.
struct PatternTensors {
  at::Tensor indptr, indices;
  MaybeTensor bitmap_index, bitmaps;
  std::vector<int64_t> shape;
};

// indptr is int32. Behind it lies the pattern itself, immutable and out of reach of whoever writes into the tensors.
PatternTensors tensors_of(const BlockPattern& pattern);

// The pattern behind indptr if all tensors say what it says: its transposed form, once made, then serves every later
// call. Else one made from the tensors, which may hold anything: O(kept blocks) either way.
BlockPattern pattern_of(const PatternTensors& tensors);

// The options of an operator.
struct OptionArguments {
  std::optional<double> scale;
  std::optional<bool> causal;  // not given: the pattern's own
  std::optional<int64_t> window_left, window_right, q_offset;
  int64_t k_offset = 0;
  MaybeTensor key_lengths;  // int32 or int64 [B]
  bool align_to_key_lengths = false;
  double softcap = 0;
  MaybeTensor alibi_slopes, block_bias, attn_bias, sinks;
  double dropout_p = 0;
  MaybeTensor rng;  // int64 [2]: seed, offset. Needed where dropout_p > 0
};

// Owns what AttentionOptions points to.
class Options {
 public:
  Options(const OptionArguments& a, int64_t batch);
  Options(const OptionArguments& a, const at::Tensor& q) : Options(a, q.dim() > 0 ? q.size(0) : 0) {}
  Options(const Options&) = delete;
  Options& operator=(const Options&) = delete;
  const AttentionOptions& get() const { return options_; }

 private:
  std::vector<int64_t> key_lengths_;
  AttentionOptions options_;
};

// Error for results beyond any memory: they are made before the core looks at what inputs are expanded to.
void check_result(const char* name, at::IntArrayRef sizes, at::ScalarType dtype);

// An output [B, S, H, dim] that lies in memory as `like` does: heads inside tokens, or tokens inside heads.
at::Tensor empty_like_layout(const at::Tensor& like, at::IntArrayRef sizes, at::ScalarType dtype);

}  // namespace tessera::ops
