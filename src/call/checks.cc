#include "call/checks.h"

#include <fmt/format.h>

#include <limits>

#include "call/overlap.h"
#include "tessera/error.h"

namespace tessera {

std::string shape_text(const TensorView& t) {
  std::string text = "[";
  for (int i = 0; i < t.rank; ++i) text += fmt::format("{}{}", i ? ", " : "", t.sizes[i]);
  return text + "]";
}

std::string strides_text(const TensorView& t) {
  std::string text = "strides [";
  for (int i = 0; i < t.rank; ++i) text += fmt::format("{}{}", i ? ", " : "", t.strides[i]);
  return text + "]";
}

namespace {
constexpr int64_t kMaxBytes = std::numeric_limits<int64_t>::max();
}

void check_memory(const char* name, const TensorView& t) {
  const int64_t element = static_cast<int64_t>(size_of(t.dtype));
  bool empty = false;
  __int128 elements = 1, low = 0, high = 0;
  for (int i = 0; i < t.rank; ++i) {
    if (t.sizes[i] < 0) fail(name, "shape " + shape_text(t), "sizes >= 0");
    empty = empty || t.sizes[i] == 0;
  }
  if (empty) return;
  for (int i = 0; i < t.rank; ++i) {
    elements *= t.sizes[i];
    const __int128 reach = static_cast<__int128>(t.strides[i]) * (t.sizes[i] - 1) * element;
    (reach < 0 ? low : high) += reach;
    if (elements > kMaxBytes / element || low < -static_cast<__int128>(kMaxBytes) || high > kMaxBytes) {
      fail(name, "shape " + shape_text(t) + ", " + strides_text(t), "offsets below 2^63 bytes");
    }
  }
  if (t.data == nullptr) fail(name, "a null pointer", "memory for shape " + shape_text(t));
  const uintptr_t base = reinterpret_cast<uintptr_t>(t.data);
  if (base % static_cast<uintptr_t>(element) != 0) {
    fail(name, "a base that is not a multiple of its element size",
         fmt::format("{} aligned to {} bytes", name_of(t.dtype), element));
  }
  const __int128 first = static_cast<__int128>(base) + low, last = static_cast<__int128>(base) + high + element;
  if (first < 0 || last > static_cast<__int128>(std::numeric_limits<uintptr_t>::max())) {
    fail(name, strides_text(t), "elements inside the address space");
  }
}

void check_rank(const char* name, const TensorView& t, int rank, std::string_view dims) {
  if (t.rank != rank) fail(name, t.defined() ? fmt::format("rank {}", t.rank) : "no tensor", dims);
}

void check_shape(const char* name, const TensorView& t, std::initializer_list<int64_t> sizes, bool broadcast,
                 std::string_view dims) {
  check_rank(name, t, static_cast<int>(sizes.size()), dims);
  std::string allowed;
  bool good = true;
  int i = 0;
  for (const int64_t size : sizes) {
    good = good && (t.sizes[i] == size || (broadcast && t.sizes[i] == 1));
    allowed += fmt::format("{}{}", i++ ? ", " : "", size);
  }
  if (!good) {
    fail(name, "shape " + shape_text(t), fmt::format("{} = [{}]{}", dims, allowed, broadcast ? ", or 1 for each" : ""));
  }
  check_memory(name, t);
}

void check_dtype(const char* name, const TensorView& t, DType dtype, std::string_view why) {
  if (t.dtype != dtype) fail(name, name_of(t.dtype), fmt::format("{}{}", name_of(dtype), why));
}

void check_contiguous_last(const char* name, const TensorView& t) {
  for (int i = 0; i < t.rank; ++i) {
    if (t.sizes[i] == 0) return;  // nothing to read: frameworks give such tensors any strides
  }
  if (t.sizes[t.rank - 1] > 1 && t.strides[t.rank - 1] != 1) {
    fail(name, strides_text(t), "last stride 1 (head_dim is contiguous)");
  }
}

void check_output(const char* name, const TensorView& t) {
  for (int i = 0; i < t.rank; ++i) {
    if (t.sizes[i] > 1 && t.strides[i] == 0 && t.numel() > 0) {
      fail(name, strides_text(t), "no stride 0 in an output where the size is above 1");
    }
  }
  if (t.numel() > 0 && overlaps_itself(t)) fail(name, strides_text(t), "elements that do not overlap each other");
}

void check_disjoint(const char* name, const TensorView& output, const char* other_name, const TensorView& other) {
  if (output.defined() && other.defined() && shares_memory(output, other)) {
    fail(name, fmt::format("memory that overlaps {}", other_name), fmt::format("memory disjoint from {}", other_name));
  }
}

}  // namespace tessera
