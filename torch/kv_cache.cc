// torch.classes.tessera.KvCache: the core's KvCache for tensors. python/tessera/attention/kv_cache.py is its face.
#include "tessera/kv_cache.h"

#include <ATen/ATen.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "arguments.h"
#include "convert.h"
#include "executor.h"

namespace tessera::ops {

namespace {

DType dtype_of_name(const std::string& name) {
  for (const auto& [known, dtype] : {std::pair<const char*, DType>{"float32", DType::f32},
                                     {"bfloat16", DType::bf16},
                                     {"float16", DType::f16},
                                     {"float64", DType::f64}}) {
    if (name == known) return dtype;
  }
  fail("dtype", name, "float32, bfloat16, float16 or float64");
}

// The last dimension contiguous: models give what their projections and rotations leave.
at::Tensor rows_of(const char* name, const at::Tensor& t) {
  check_device(name, t);
  return t.dim() > 0 && t.size(-1) > 1 && t.stride(-1) != 1 ? t.contiguous() : t;
}

// Methods of classes pass torch's own kinds of errors on, and no std::bad_alloc.
template <class F>
auto of_method(F f) -> decltype(f()) {
  try {
    return translate_errors(f);
  } catch (const MemoryError& e) {
    C10_THROW_ERROR(OutOfMemoryError, e.what());
  }
}

class Cache : public torch::CustomClassHolder {
 public:
  Cache(int64_t batch, int64_t kv_heads, int64_t head_dim, int64_t head_dim_v, const std::string& dtype, int64_t block)
      : cache_(translate_errors(
            [&] { return KvCache(batch, kv_heads, head_dim, head_dim_v, dtype_of_name(dtype), narrow(block)); })) {}

  void append(const at::Tensor& k, const at::Tensor& v, const std::vector<int64_t>& lengths) {
    of_method([&] {
      const at::Tensor keys = rows_of("k", k), values = rows_of("v", v);
      cache_.append(view_of("k", keys), view_of("v", values), lengths, torch_threads());
    });
  }

  // pattern: its tensors by name, or what defines it, or nothing. given: options by name.
  using ByName = c10::Dict<std::string, c10::IValue>;
  Results attend(const at::Tensor& query, const ByName& pattern, const ByName& given) {
    return of_method([&] {
      check_rank("q", query, 4, "[B, Sq, H, D]");
      const at::Tensor q = rows_of("q", query);
      const Options options(of_names<OptionArguments>(given), q);
      at::Tensor out = empty_like_layout(q, {q.size(0), q.size(1), q.size(2), cache_.head_dim_v()}, q.scalar_type());
      at::Tensor lse = at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(lse_type(q)));
      CacheAttendArgs args;
      args.q = view_of("q", q);
      args.out = output_view("out", out);
      args.lse = output_view("lse", lse);
      args.options = options.get();
      if (pattern.contains("indptr")) args.pattern = pattern_of(of_names<PatternTensors>(pattern));
      if (pattern.contains("kind")) args.spec = of_names<PatternSpec>(pattern);
      cache_.attend(args, torch_threads());
      return Results{out, lse};
    });
  }

  std::vector<int64_t> lengths() { return {cache_.lengths().begin(), cache_.lengths().end()}; }
  void truncate(const std::vector<int64_t>& lengths) {
    translate_errors([&] { cache_.truncate(lengths); });
  }
  void reorder(const std::vector<int64_t>& index) {
    translate_errors([&] { cache_.reorder(index); });
  }
  int64_t nbytes() { return static_cast<int64_t>(cache_.nbytes()); }

  std::tuple<at::Tensor, at::Tensor, at::Tensor> summaries(int64_t b) {
    return translate_errors([&] {
      const KvCache::Summaries s = cache_.summaries(b);
      const auto tensor = [&](const std::vector<float>& from) {
        at::Tensor t = at::empty({s.blocks, cache_.kv_heads(), cache_.head_dim()}, at::kFloat);
        std::copy(from.begin(), from.end(), t.mutable_data_ptr<float>());
        return t;
      };
      return std::make_tuple(tensor(s.mean), tensor(s.min), tensor(s.max));
    });
  }

 private:
  KvCache cache_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(tessera, m) {
  m.class_<Cache>("KvCache")
      .def(torch::init<int64_t, int64_t, int64_t, int64_t, const std::string&, int64_t>())
      .def("append", &Cache::append)
      .def("attend", &Cache::attend)
      .def("lengths", &Cache::lengths)
      .def("truncate", &Cache::truncate)
      .def("reorder", &Cache::reorder)
      .def("nbytes", &Cache::nbytes)
      .def("summaries", &Cache::summaries);
}

}  // namespace tessera::ops
