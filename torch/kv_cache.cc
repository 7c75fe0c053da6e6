// torch.classes.tessera.KvCache: the core's KvCache for tensors. python/tessera/kv_cache.py is its face.
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

using Results = std::tuple<at::Tensor, at::Tensor>;

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

class Cache : public torch::CustomClassHolder {
 public:
  Cache(int64_t batch, int64_t kv_heads, int64_t head_dim, int64_t head_dim_v, const std::string& dtype, int64_t block)
      : cache_(translate_errors(
            [&] { return KvCache(batch, kv_heads, head_dim, head_dim_v, dtype_of_name(dtype), narrow(block)); })) {}

  void append(const at::Tensor& k, const at::Tensor& v, const std::vector<int64_t>& lengths) {
    translate_errors([&] {
      const at::Tensor keys = rows_of("k", k), values = rows_of("v", v);
      cache_.append(view_of("k", keys), view_of("v", values), lengths, torch_threads());
    });
  }

  Results attend(const at::Tensor& q, const std::optional<at::Tensor>& indptr, const std::optional<at::Tensor>& indices,
                 const MaybeTensor& bitmap_index, const MaybeTensor& bitmaps, const std::vector<int64_t>& pattern_shape,
                 std::optional<double> scale, std::optional<int64_t> window_left, std::optional<int64_t> window_right,
                 double softcap, const MaybeTensor& alibi_slopes, const MaybeTensor& sinks) {
    return run(q, {scale, window_left, window_right, softcap, alibi_slopes, sinks}, [&](CacheAttendArgs& args) {
      if (indptr) args.pattern = pattern_of({*indptr, *indices, bitmap_index, bitmaps, pattern_shape});
    });
  }

  Results attend_named(const at::Tensor& q, const std::string& kind, std::optional<double> density,
                       const std::string& budget, std::optional<int64_t> seqlen_total, std::optional<int64_t> window,
                       std::vector<int64_t> dilation_rates, std::optional<int64_t> global_tokens,
                       std::optional<int64_t> stride, int64_t seed, int64_t heads, int64_t block_q,
                       std::optional<double> scale, std::optional<int64_t> window_left,
                       std::optional<int64_t> window_right, double softcap, const MaybeTensor& alibi_slopes,
                       const MaybeTensor& sinks) {
    return run(q, {scale, window_left, window_right, softcap, alibi_slopes, sinks}, [&](CacheAttendArgs& args) {
      PatternSpec spec;
      spec.kind = pattern_kind(kind);
      spec.block_q = narrow(block_q);
      spec.block_k = cache_.block();
      spec.heads = heads;
      spec.density = density;
      spec.budget = budget_of_name(budget);
      spec.seqlen_total = seqlen_total;
      spec.window = window;
      spec.dilation_rates = std::move(dilation_rates);
      spec.global_tokens = global_tokens;
      spec.stride = stride;
      spec.seed = static_cast<uint64_t>(seed);
      args.spec = std::move(spec);
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
  struct Options {
    std::optional<double> scale;
    std::optional<int64_t> window_left, window_right;
    double softcap;
    const MaybeTensor &alibi_slopes, &sinks;
  };

  template <class Fill>
  Results run(const at::Tensor& query, const Options& o, Fill fill) {
    return translate_errors([&] {
      check_rank("q", query, 4, "[B, Sq, H, D]");
      const at::Tensor q = rows_of("q", query);
      at::Tensor out = empty_like_layout(q, {q.size(0), q.size(1), q.size(2), cache_.head_dim_v()}, q.scalar_type());
      at::Tensor lse = at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(lse_type(q)));
      CacheAttendArgs args;
      args.q = view_of("q", q);
      args.out = output_view("out", out);
      args.lse = output_view("lse", lse);
      args.options.scale = o.scale;
      args.options.window_left = o.window_left;
      args.options.window_right = o.window_right;
      args.options.softcap = o.softcap;
      args.options.alibi_slopes = view_of("alibi_slopes", o.alibi_slopes);
      args.options.sinks = view_of("sinks", o.sinks);
      fill(args);
      cache_.attend(args, torch_threads());
      return Results{out, lse};
    });
  }

  KvCache cache_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(tessera, m) {
  m.class_<Cache>("KvCache")
      .def(torch::init<int64_t, int64_t, int64_t, int64_t, const std::string&, int64_t>())
      .def("append", &Cache::append)
      .def("attend", &Cache::attend)
      .def("attend_named", &Cache::attend_named)
      .def("lengths", &Cache::lengths)
      .def("truncate", &Cache::truncate)
      .def("reorder", &Cache::reorder)
      .def("nbytes", &Cache::nbytes)
      .def("summaries", &Cache::summaries);
}

}  // namespace tessera::ops
