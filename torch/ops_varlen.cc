// torch.ops.tessera, packed sequences: patterns are lists of tensors, one a sequence.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "arguments.h"
#include "executor.h"
#include "tessera/attention.h"
#include "tessera/backward.h"

namespace tessera::ops {

namespace {

std::vector<int64_t> offsets_of(const char* name, const at::Tensor& t) {
  check_rank(name, t, 1, "[N + 1] int32 or int64");
  const at::Tensor wide = integers(name, t, at::kLong);
  return {wide.const_data_ptr<int64_t>(), wide.const_data_ptr<int64_t>() + wide.numel()};
}

// Where sequences lie, as the core takes it. Valid as long as this is.
struct Sequences {
  Sequences(const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k)
      : q(offsets_of("cu_seqlens_q", cu_seqlens_q)), k(offsets_of("cu_seqlens_k", cu_seqlens_k)) {}
  template <class Args>
  void fill(Args& args, const std::vector<BlockPattern>& patterns) const {
    args.cu_seqlens_q = q;
    args.cu_seqlens_k = k;
    args.patterns = patterns;
  }
  std::vector<int64_t> q, k;
};

Results varlen_forward_op(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& cu_seqlens_q,
                          const at::Tensor& cu_seqlens_k, const std::vector<BlockPattern>& patterns,
                          const PackedOptions& given) {
  check_rank("q", q, 3, "[total_q, H, D]");
  check_rank("v", v, 3, "[total_k, Hkv, Dv]");
  const Options options(given, q);
  const Sequences sequences(cu_seqlens_q, cu_seqlens_k);
  Results results = results_of(q, v);
  VarlenForwardArgs args;
  fill_forward(args, q, k, v, results, options);
  sequences.fill(args, patterns);
  forward_varlen(args, torch_threads());
  return results;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> varlen_backward_op(
    const BackwardArguments& given, std::array<bool, 4> wanted, const at::Tensor& cu_seqlens_q,
    const at::Tensor& cu_seqlens_k, const std::vector<BlockPattern>& patterns, const PackedOptions& o) {
  const Options options(o, given.q);
  const Sequences sequences(cu_seqlens_q, cu_seqlens_k);
  const BackwardArguments t = prepared(given);
  VarlenBackwardArgs args;
  fill_backward(args, t, options);
  sequences.fill(args, patterns);
  auto g = std::make_tuple(gradient_of("dq", t.q, wanted[0], args.dq), gradient_of("dk", t.k, wanted[1], args.dk),
                           gradient_of("dv", t.v, wanted[2], args.dv),
                           gradient_of("dsinks", o.sinks, wanted[3], args.dsinks, t.q));
  backward_varlen(args, torch_threads());
  return g;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tessera, m) {
  define<&varlen_forward_op>(m,
                             "varlen_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
                             "{patterns}, {packed_options}) -> (Tensor out, Tensor lse)");
  define<&varlen_backward_op>(m,
                              "varlen_backward({backward}, bool[4] wanted, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
                              "{patterns}, {packed_options}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)");
}

}  // namespace tessera::ops
