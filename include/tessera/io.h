// Tensor files (safetensors, .npy) and pattern files (JSON).
//
// Readers are strict: every size is checked against the file before anything is allocated, and whatever is not
// exactly as the format says is an Error that names the path, what is wrong and, where it helps, the byte offset.
// Writers write a file without a name in the same folder, sync it and put it in place, so a reader never sees half a
// file, and a failure or a signal leaves nothing (file systems that know no files without names:
// remove_temporary_files). Where one replaces another it has the mode of the old one, without set-user-id. Sizes are
// 64-bit: files beyond 4 GiB are ordinary. Files are little-endian, and so must be the machine.
//
// safetensors: https://github.com/huggingface/safetensors (format section).
// npy: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html, versions 1.0, 2.0, 3.0.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tessera/block_pattern.h"
#include "tessera/dtype.h"
#include "tessera/tensor_view.h"

namespace tessera {

// Owns a contiguous row-major tensor of any rank. Movable; copies are deep. Memory is 64-byte aligned.
class Tensor {
 public:
  Tensor() = default;  // rank 1, no elements
  // Uninitialised elements. Error for a negative size, a product beyond 64 bits or more memory than there is.
  Tensor(DType dtype, std::vector<int64_t> shape);
  Tensor(const Tensor& other);
  Tensor& operator=(const Tensor& other);
  Tensor(Tensor&&) noexcept = default;
  Tensor& operator=(Tensor&&) noexcept = default;

  DType dtype() const { return dtype_; }
  const std::vector<int64_t>& shape() const { return shape_; }
  int64_t rank() const { return static_cast<int64_t>(shape_.size()); }
  int64_t numel() const;
  size_t size_bytes() const { return static_cast<size_t>(numel()) * size_of(dtype_); }
  void* data() { return data_.get(); }
  const void* data() const { return data_.get(); }
  std::span<std::byte> bytes() { return {data_.get(), size_bytes()}; }
  std::span<const std::byte> bytes() const { return {data_.get(), size_bytes()}; }

  // Rank 1 to 4; other ranks are an Error (a view of rank 0 would mean "not given").
  TensorView view() const;
  MutableTensorView view();

 private:
  struct Free {
    void operator()(std::byte* p) const;
  };
  DType dtype_ = DType::f32;
  std::vector<int64_t> shape_{0};
  std::unique_ptr<std::byte[], Free> data_;
};

// ---- safetensors -----------------------------------------------------------------------------------------------
// dtypes F64 F32 F16 BF16 I64 I32 U8 BOOL; others are an Error. Limits of the reader: header 100 MB, rank 32.

struct TensorInfo {
  std::string name;
  DType dtype = DType::f32;
  std::vector<int64_t> shape;
  int64_t offset = 0;  // of the first byte, from the start of the file
  int64_t bytes = 0;
};

using Metadata = std::map<std::string, std::string>;

struct NamedTensor {
  std::string name;
  TensorView view;  // strided is fine: the file gets row-major order
};

std::vector<TensorInfo> list_safetensors(const std::string& path);  // in the order of the data
Metadata safetensors_metadata(const std::string& path);             // "__metadata__", empty if there is none
std::map<std::string, Tensor> read_safetensors(const std::string& path);
// Only these; Error naming those that the file has if one is missing. The others' data is not read.
std::map<std::string, Tensor> read_safetensors(const std::string& path, std::span<const std::string> names);
std::map<std::string, Tensor> parse_safetensors(std::span<const std::byte> file);

void write_safetensors(const std::string& path, const std::vector<NamedTensor>& tensors, const Metadata& metadata = {});
void write_safetensors(const std::string& path, const std::map<std::string, Tensor>& tensors,
                       const Metadata& metadata = {});

// ---- npy -------------------------------------------------------------------------------------------------------
// dtypes <f8 <f4 <f2 <i8 <i4 |u1 |b1. Pickled objects, big-endian data and Fortran order (unless of rank <= 1) are an
// Error; so are bytes missing or left over. bf16 has no npy dtype: writing it is an Error.

Tensor read_npy(const std::string& path);
Tensor parse_npy(std::span<const std::byte> file);
void write_npy(const std::string& path, TensorView tensor);
void write_npy(const std::string& path, const Tensor& tensor);

// ---- patterns --------------------------------------------------------------------------------------------------
// {"seqlen_q":, "seqlen_k":, "block_q":, "block_k":,
//  "heads": [{"indptr": [rows + 1], "indices": [..]}, ..]}
// with one entry for all heads, or one a head. Further keys: "causal": true, "q_offset": position of query 0 among the
// keys, "q_skip": queries of the first block row that come before query 0 (PatternShape); "batches": n, where "heads"
// then lists the heads of batch 0, of batch 1, ...; "bitmaps": [[block_q hex strings], ..], where a string is one token
// row of a block, bit k of the number (least significant bit: the last digit's 1) admits key k; and in an entry of
// "heads" "bitmap_index": [one a kept block, -1: full]. Unknown keys are an Error.

BlockPattern read_pattern(const std::string& path);
BlockPattern parse_pattern(std::string_view json);
std::string pattern_json(const BlockPattern& pattern);
void write_pattern(const std::string& path, const BlockPattern& pattern);

// ---- any file --------------------------------------------------------------------------------------------------

// Writes beside and renames, as above.
void write_file(const std::string& path, std::span<const std::byte> content);
void write_file(const std::string& path, std::string_view content);

// While one lives, the files that its thread writes are prepared and put in place by commit(), all of them, or none
// where one cannot be written. (Should renaming itself fail for one of them, those before it are in place.)
class WriteTogether {
 public:
  WriteTogether();
  ~WriteTogether();  // without commit(): nothing was written
  WriteTogether(const WriteTogether&) = delete;
  WriteTogether& operator=(const WriteTogether&) = delete;
  void commit();

 private:
  struct Files;
  std::unique_ptr<Files> files_;
};

// Removes the temporary files of writers that are at work. For the handler of a signal that ends the process: it may be
// called at any moment, on any thread.
void remove_temporary_files();

}  // namespace tessera
