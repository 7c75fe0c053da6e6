// merge(): two partial results become one.
#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "attention/row_join.h"
#include "call/overlap.h"
#include "core/work.h"
#include "tessera/error.h"

namespace tessera {

namespace {

void check(const char* name, const TensorView& t, std::initializer_list<int64_t> sizes, std::string_view dims) {
  int i = 0;
  bool good = t.rank == static_cast<int>(sizes.size());
  for (const int64_t size : sizes) good = good && size >= 0 && t.sizes[i++] == size;
  if (!good) {
    std::string got = fmt::format("rank {}, sizes", t.rank), allowed(dims);
    for (i = 0; i < t.rank; ++i) got += fmt::format(" {}", t.sizes[i]);
    allowed += " of";
    for (const int64_t size : sizes) allowed += fmt::format(" {}", size);
    fail(name, got, allowed);
  }
  if (t.numel() > 0 && t.data == nullptr) fail(name, "a null pointer", dims);
}

bool same_place(const TensorView& a, const TensorView& b) {
  if (a.data != b.data || a.dtype != b.dtype) return false;
  for (int i = 0; i < a.rank; ++i) {
    if (a.sizes[i] > 1 && a.strides[i] != b.strides[i]) return false;
  }
  return true;
}

void check_writable(const char* name, const TensorView& out, std::initializer_list<TensorView> inputs) {
  if (overlaps_itself(out)) fail(name, "elements that overlap each other", "an output without stride 0");
  for (const TensorView& in : inputs) {
    if (shares_memory(out, in) && !same_place(out, in)) {
      fail(name, "memory that overlaps an input", "an input itself (in place), or memory of its own");
    }
  }
}

int64_t offset3(const TensorView& t, int64_t i, int64_t j, int64_t k) {
  return i * t.strides[0] + j * t.strides[1] + k * t.strides[2];
}

char* row(const TensorView& t, int64_t b, int64_t s, int64_t h) {
  return static_cast<char*>(const_cast<void*>(t.data)) + offset3(t, b, s, h) * static_cast<int64_t>(size_of(t.dtype));
}

// T is float unless a tensor is fp64.
template <class T>
void merge_rows(const TensorView& out_a, const TensorView& lse_a, const TensorView& out_b, const TensorView& lse_b,
                const MutableTensorView& out, const MutableTensorView& lse, Executor& executor) {
  const int64_t seqlen = out.sizes[1], heads = out.sizes[2];
  constexpr int64_t kRowsPerUnit = 64;  // a few tens of microseconds of work
  const int64_t chunks = (seqlen + kRowsPerUnit - 1) / kRowsPerUnit;
  const auto number = [](const TensorView& t, int64_t b, int64_t h, int64_t s) {
    return static_cast<T>(load_as_double(t.data, t.dtype, offset3(t, b, h, s)));
  };
  parallel_for(
      executor, out.sizes[0] * chunks, [&](int) { return RowJoin<T>(out.sizes[3]); },
      [&](RowJoin<T>& join, int64_t unit) {
        const int64_t b = unit / chunks, begin = unit % chunks * kRowsPerUnit;
        for (int64_t s = begin; s < std::min(seqlen, begin + kRowsPerUnit); ++s) {
          for (int64_t h = 0; h < heads; ++h) {
            join.add(row(out_a, b, s, h), out_a.dtype, number(lse_a, b, h, s));
            join.add(row(out_b, b, s, h), out_b.dtype, number(lse_b, b, h, s));
            store_from_double(lse.data, lse.dtype, offset3(lse, b, h, s), join.finish(row(out, b, s, h), out.dtype));
          }
        }
      });
}

}  // namespace

void merge(TensorView out_a, TensorView lse_a, TensorView out_b, TensorView lse_b, MutableTensorView out,
           MutableTensorView lse, Executor& executor) {
  if (out_a.rank != 4) fail("out_a", fmt::format("rank {}", out_a.rank), "[B, S, H, Dv]");
  const int64_t b = out_a.sizes[0], s = out_a.sizes[1], h = out_a.sizes[2], d = out_a.sizes[3];
  const std::pair<const char*, const TensorView> outs[] = {{"out_a", out_a}, {"out_b", out_b}, {"out", out}};
  for (const auto& [name, t] : outs) {
    check(name, t, {b, s, h, d}, "[B, S, H, Dv]");
    if (!is_floating(t.dtype)) fail(name, name_of(t.dtype), "fp32, bf16, fp16 or fp64");
    if (t.sizes[3] > 1 && t.strides[3] != 1) fail(name, fmt::format("last stride {}", t.strides[3]), "last stride 1");
  }
  const std::pair<const char*, const TensorView> lses[] = {{"lse_a", lse_a}, {"lse_b", lse_b}, {"lse", lse}};
  bool wide = out.dtype == DType::f64 || out_a.dtype == DType::f64 || out_b.dtype == DType::f64;
  for (const auto& [name, t] : lses) {
    check(name, t, {b, h, s}, "[B, H, S]");
    if (t.dtype != DType::f32 && t.dtype != DType::f64) fail(name, name_of(t.dtype), "fp32, or fp64");
    wide = wide || t.dtype == DType::f64;
  }
  check_writable("out", out, {out_a, out_b});
  check_writable("lse", lse, {lse_a, lse_b});
  if (shares_memory(out, lse)) fail("lse", "memory that overlaps out", "memory of its own");
  for (const TensorView& in : {lse_a, lse_b}) {
    if (shares_memory(out, in)) fail("out", "memory that overlaps an lse", "memory disjoint from it");
  }
  for (const TensorView& in : {out_a, out_b}) {
    if (shares_memory(lse, in)) fail("lse", "memory that overlaps an out", "memory disjoint from it");
  }
  if (wide) merge_rows<double>(out_a, lse_a, out_b, lse_b, out, lse, executor);
  else merge_rows<float>(out_a, lse_a, out_b, lse_b, out, lse, executor);
}

}  // namespace tessera
