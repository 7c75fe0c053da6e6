// torch.ops.tessera, dilated attention (LongNet).
#include <ATen/ATen.h>
#include <torch/library.h>

#include "arguments.h"
#include "executor.h"

namespace tessera::ops {

namespace {

Results dilated_forward_op(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const DilationArguments& dilation, const OptionArguments& given) {
  check_rank("q", q, 4, "[B, S, H, D]");
  check_rank("v", v, 4, "[B, S, Hkv, Dv]");
  const Options options(given, q);
  Results results = results_of(q, v);
  DilatedForwardArgs args;
  fill_forward(args, q, k, v, results, options);
  args.dilation = dilation.dilation();
  dilated_forward(args, torch_threads());
  return results;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> dilated_backward_op(const BackwardArguments& given,
                                                                               std::array<bool, 4> wanted,
                                                                               const DilationArguments& dilation,
                                                                               const OptionArguments& o) {
  const Options options(o, given.q);
  const BackwardArguments t = prepared(given);
  DilatedBackwardArgs args;
  fill_backward(args, t, options);
  args.dilation = dilation.dilation();
  auto g = std::make_tuple(gradient_of("dq", t.q, wanted[0], args.dq), gradient_of("dk", t.k, wanted[1], args.dk),
                           gradient_of("dv", t.v, wanted[2], args.dv),
                           gradient_of("dattn_bias", o.attn_bias, wanted[3], args.dattn_bias, t.q));
  dilated_backward(args, torch_threads());
  return g;
}

int64_t dilated_pairs_op(const at::Tensor& q, const DilationArguments& dilation, const OptionArguments& options) {
  check_rank("q", q, 4, "[B, S, H, D]");
  return dilated_pairs(q.size(1), dilation.dilation(), Options(options, q).get(), q.size(0), q.size(2));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tessera, m) {
  define<&dilated_forward_op>(
      m, "dilated_forward(Tensor q, Tensor k, Tensor v, {dilation}, {options}) -> (Tensor out, Tensor lse)");
  define<&dilated_backward_op>(m,
                               "dilated_backward({backward}, bool[4] wanted, {dilation}, {options}) -> (Tensor dq, "
                               "Tensor dk, Tensor dv, Tensor dattn_bias)");
  define<&dilated_pairs_op>(m, "dilated_pairs(Tensor q, {dilation}, {options}) -> int");
}

}  // namespace tessera::ops
