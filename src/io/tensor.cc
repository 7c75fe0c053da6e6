// Tensor: the owning value of the file readers.
#include <cstring>
#include <new>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "io/tensor_bytes.h"
#include "tessera/error.h"
#include "tessera/huge_pages.h"
#include "tessera/io.h"

namespace tessera {
namespace {

constexpr std::align_val_t kAlignment{64};  // a cache line and the widest vector

MutableTensorView view_of(void* data, DType dtype, const std::vector<int64_t>& shape) {
  if (shape.empty() || shape.size() > MutableTensorView::kMaxRank) {
    fail("tensor", fmt::format("rank {}", shape.size()), "rank 1 to 4 for a view");
  }
  MutableTensorView view;
  view.data = data;
  view.dtype = dtype;
  view.rank = static_cast<int>(shape.size());
  int64_t stride = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    view.sizes[i] = shape[i];
    view.strides[i] = stride;
    stride *= shape[i];
  }
  return view;
}

}  // namespace

namespace io {

std::optional<int64_t> checked_bytes(DType dtype, std::span<const int64_t> shape) {
  // A zero makes the product zero, but strides of the other sizes must still fit.
  int64_t product = static_cast<int64_t>(size_of(dtype));
  bool zero = false;
  for (int64_t size : shape) {
    if (size < 0) return std::nullopt;
    if (size == 0) {
      zero = true;
    } else if (__builtin_mul_overflow(product, size, &product)) {
      return std::nullopt;
    }
  }
  return zero ? 0 : product;
}

void for_each_chunk(TensorView view, const std::function<void(std::span<const std::byte>)>& sink) {
  constexpr size_t kBuffer = size_t{1} << 20;
  const size_t element = size_of(view.dtype);
  const int64_t numel = view.numel();
  if (numel == 0) return;
  const auto* base = static_cast<const std::byte*>(view.data);
  bool contiguous = true;
  int64_t expected = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    contiguous &= view.sizes[i] == 1 || view.strides[i] == expected;
    expected *= view.sizes[i];
  }
  if (contiguous) {
    sink({base, static_cast<size_t>(numel) * element});
    return;
  }
  std::vector<std::byte> buffer;
  buffer.reserve(kBuffer);
  std::array<int64_t, TensorView::kMaxRank> index{};
  for (int64_t n = 0; n < numel; ++n) {
    int64_t offset = 0;
    for (int i = 0; i < view.rank; ++i) offset += index[i] * view.strides[i];
    const std::byte* from = base + offset * static_cast<int64_t>(element);
    buffer.insert(buffer.end(), from, from + element);
    if (buffer.size() + element > kBuffer) {
      sink(buffer);
      buffer.clear();
    }
    for (int i = view.rank - 1; i >= 0 && ++index[i] == view.sizes[i]; --i) index[i] = 0;
  }
  if (!buffer.empty()) sink(buffer);
}

void check_writable(std::string_view argument, TensorView view) {
  if (!view.defined()) fail(argument, "an undefined view", "a view of rank 1 to 4");
  const std::span<const int64_t> sizes(view.sizes.data(), static_cast<size_t>(view.rank));
  const std::optional<int64_t> bytes = checked_bytes(view.dtype, sizes);
  if (!bytes) fail(argument, fmt::format("sizes [{}]", fmt::join(sizes, ", ")), "sizes >= 0, 64-bit product");
  if (*bytes > 0 && view.data == nullptr) fail(argument, "no data", "a pointer to the elements");
}

void check_booleans(const ByteSource& source, std::string_view name, const Tensor& tensor) {
  if (tensor.dtype() != DType::boolean) return;
  const std::span<const std::byte> bytes = tensor.bytes();
  for (size_t i = 0; i < bytes.size(); ++i) {
    if (bytes[i] > std::byte{1}) {
      source.reject(
          fmt::format("bool tensor {}: element {} is the byte {}; allowed: 0, 1", name, i, static_cast<int>(bytes[i])));
    }
  }
}

}  // namespace io

void Tensor::Free::operator()(std::byte* p) const { ::operator delete[](p, kAlignment); }

Tensor::Tensor(DType dtype, std::vector<int64_t> shape) : dtype_(dtype), shape_(std::move(shape)) {
  const std::optional<int64_t> bytes = io::checked_bytes(dtype_, shape_);
  if (!bytes) fail("shape", fmt::format("[{}]", fmt::join(shape_, ", ")), "sizes >= 0 whose bytes fit 64 bits");
  if (*bytes == 0) return;
  try {
    data_.reset(static_cast<std::byte*>(::operator new[](static_cast<size_t>(*bytes), kAlignment)));
    advise_huge_pages(data_.get(), static_cast<size_t>(*bytes));
  } catch (const std::bad_alloc&) {
    fail("shape", fmt::format("[{}] of {}, {} bytes", fmt::join(shape_, ", "), name_of(dtype_), *bytes),
         "what fits into memory");
  }
}

Tensor::Tensor(const Tensor& other) : Tensor(other.dtype_, other.shape_) {
  if (data_) std::memcpy(data_.get(), other.data_.get(), size_bytes());
}

Tensor& Tensor::operator=(const Tensor& other) {
  if (this != &other) *this = Tensor(other);
  return *this;
}

int64_t Tensor::numel() const {
  int64_t n = 1;
  for (int64_t size : shape_) {
    if (size == 0) return 0;
    n *= size;
  }
  return n;
}

TensorView Tensor::view() const { return view_of(data_.get(), dtype_, shape_); }
MutableTensorView Tensor::view() { return view_of(data_.get(), dtype_, shape_); }

}  // namespace tessera
