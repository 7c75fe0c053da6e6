// What every argument check of an attention call is made of. Each throws Error naming `name`.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "call/backward_problem.h"
#include "call/problem.h"
#include "tessera/backward.h"
#include "tessera/tensor_view.h"

namespace tessera {

std::string shape_text(const TensorView& t);    // "[2, 3]"
std::string strides_text(const TensorView& t);  // "strides [3, 1]"

// Sizes, strides and base of a view are usable: every element's address can be computed in 64 bits.
void check_memory(const char* name, const TensorView& t);

void check_rank(const char* name, const TensorView& t, int rank, std::string_view dims);

// A view whose sizes must be exactly these (or 1, where `broadcast`), in usable memory.
void check_shape(const char* name, const TensorView& t, std::initializer_list<int64_t> sizes, bool broadcast,
                 std::string_view dims);

void check_dtype(const char* name, const TensorView& t, DType dtype, std::string_view why);

void check_contiguous_last(const char* name, const TensorView& t);

// No two elements in one place.
void check_output(const char* name, const TensorView& t);

// Undefined views are disjoint from everything.
void check_disjoint(const char* name, const TensorView& output, const char* other_name, const TensorView& other);

// Stride that is safe to multiply with any index of the broadcast size.
inline int64_t broadcast_stride(const TensorView& t, int dim) { return t.sizes[dim] == 1 ? 0 : t.strides[dim]; }

// A checked [B, S, H, D] view; all null for an undefined one.
inline Strided strided(const TensorView& t) {
  const auto stride = [&](int dim) { return t.sizes[dim] <= 1 ? 0 : t.strides[dim]; };
  return {static_cast<char*>(const_cast<void*>(t.data)), stride(0), stride(1), stride(2)};
}

struct NamedView {
  const char* name;
  TensorView view;
};
// What the options read, key_lengths included; undefined where it is not given.
std::vector<NamedView> inputs_of(const AttentionOptions& options);

// A checked [B, H, S] view of numbers, one a row.
inline Strided strided_numbers(const TensorView& t) {
  return {static_cast<char*>(const_cast<void*>(t.data)), t.strides[0], t.strides[2], t.strides[1]};
}

// resolve() and resolve_backward() of calls that have no pattern of the whole: packed sequences as one of all their
// rows, a sequence that dilated attention cuts up. Neither block_bias nor a page table may be given.
Problem resolve_without_pattern(const ForwardArgs& args, Purpose purpose);
BackwardProblem resolve_without_pattern(const BackwardArgs& args, Purpose purpose);

// A caller's plain array as a view, for the overlap checks.
template <class T>
TensorView array_view(const T* data, int64_t n, DType dtype) {
  return data == nullptr ? TensorView{} : make_view(static_cast<const void*>(data), dtype, {n});
}

}  // namespace tessera
