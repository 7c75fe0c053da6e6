// What both tensor formats share: sizes that cannot overflow, elements in row-major order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string_view>

#include "io/file.h"
#include "tessera/io.h"

namespace tessera::io {

constexpr size_t kMaxRank = 32;  // of numpy before 2.0

// Bytes of a tensor; nothing for a negative size or where the product of the sizes above 0 does not fit 64 bits.
std::optional<int64_t> checked_bytes(DType dtype, std::span<const int64_t> shape);

// Hands the elements to `sink` in row-major order, all at once where they already lie so.
void for_each_chunk(TensorView view, const std::function<void(std::span<const std::byte>)>& sink);

// Error unless the view can be written.
void check_writable(std::string_view argument, TensorView view);

// A bool whose byte is neither 0 nor 1 is undefined behaviour as soon as somebody loads it.
void check_booleans(const ByteSource& source, std::string_view name, const Tensor& tensor);

}  // namespace tessera::io
