// Small contiguous attention calls for the tests: inputs are waves, so that a number in a test can be made again by
// anyone (tests/attention_reference_test.cc says how).
#pragma once

#include <cmath>
#include <vector>

#include "tessera/attention.h"
#include "tessera/error.h"
#include "tessera/patterns.h"

namespace tessera {

// sin(a i + b), i = 0, 1, ...
inline std::vector<double> wave(int64_t n, double a, double b) {
  std::vector<double> x(n);
  for (int64_t i = 0; i < n; ++i) x[i] = std::sin(a * static_cast<double>(i) + b);
  return x;
}

struct Shape {
  int64_t batch = 1, seqlen_q = 1, seqlen_k = 1, heads = 1, kv_heads = 1, head_dim = 1, head_dim_v = 1;
};

// A tensor of any floating dtype with the values of a wave.
struct Numbers {
  std::vector<char> memory;
  MutableTensorView view;

  Numbers() = default;
  Numbers(DType dtype, std::initializer_list<int64_t> sizes, const std::vector<double>& values = {}) {
    view = make_view(static_cast<void*>(nullptr), dtype, sizes);
    memory.assign(view.numel() * size_of(dtype) + 1, 0);
    view.data = memory.data();
    for (size_t i = 0; i < values.size(); ++i) set(static_cast<int64_t>(i), values[i]);
  }
  double get(int64_t i) const { return load_as_double(memory.data(), view.dtype, i); }
  void set(int64_t i, double x) { store_from_double(memory.data(), view.dtype, i, x); }
  std::vector<double> values() const {
    std::vector<double> v(view.numel());
    for (size_t i = 0; i < v.size(); ++i) v[i] = get(static_cast<int64_t>(i));
    return v;
  }
};

// Not copyable: args point into the other members.
struct Call {
  Shape shape;
  Numbers q, k, v, out, lse;
  ForwardArgs args;

  Call(const Shape& s, DType dtype, const BlockPattern& pattern, DType out_dtype, DType lse_dtype = DType::f32)
      : shape(s),
        q(dtype, {s.batch, s.seqlen_q, s.heads, s.head_dim},
          wave(s.batch * s.seqlen_q * s.heads * s.head_dim, 0.7, 0.1)),
        k(dtype, {s.batch, s.seqlen_k, s.kv_heads, s.head_dim},
          wave(s.batch * s.seqlen_k * s.kv_heads * s.head_dim, 0.3, 1.0)),
        v(dtype, {s.batch, s.seqlen_k, s.kv_heads, s.head_dim_v},
          wave(s.batch * s.seqlen_k * s.kv_heads * s.head_dim_v, 1.3, 0.5)),
        out(out_dtype, {s.batch, s.seqlen_q, s.heads, s.head_dim_v}),
        lse(lse_dtype, {s.batch, s.heads, s.seqlen_q}) {
    args.q = q.view;
    args.k = k.view;
    args.v = v.view;
    args.out = out.view;
    args.lse = lse.view;
    args.pattern = pattern;
  }
  Call(const Shape& s, DType dtype, const BlockPattern& pattern) : Call(s, dtype, pattern, dtype) {}
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
};

inline BlockPattern dense_pattern(int64_t seqlen_q, int64_t seqlen_k, int block_q = 16, int block_k = 16) {
  const PatternShape shape{seqlen_q, seqlen_k, block_q, block_k};
  std::vector<int64_t> indptr{0};
  std::vector<int32_t> indices;
  for (int64_t i = 0; i < shape.rows(); ++i) {
    for (int64_t j = 0; j < shape.cols(); ++j) indices.push_back(static_cast<int32_t>(j));
    indptr.push_back(static_cast<int64_t>(indices.size()));
  }
  return BlockPattern::from_csr(shape, indptr, indices);
}

// The argument that the Error of `call` names; "" if there is none.
template <class F>
std::string error_argument(F call) {
  try {
    call();
  } catch (const Error& e) {
    return e.argument();
  }
  return "";
}

}  // namespace tessera
