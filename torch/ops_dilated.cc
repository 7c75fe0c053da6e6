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

// Pairs and blocks that the (w, r) keep between them.
Named dilated_share_op(int64_t seqlen, int64_t heads, int block, std::optional<bool> causal,
                       const DilationArguments& dilation) {
  const DilatedShare share = dilated_share(seqlen, dilation.dilation(), causal, heads, block);
  return {{"pairs", static_cast<double>(share.pairs)}, {"blocks", static_cast<double>(share.blocks)}};
}

at::Tensor dilated_keys_op(int64_t seqlen, int64_t head, int64_t query, std::optional<bool> causal,
                           const DilationArguments& dilation) {
  const std::vector<uint8_t> keys = dilated_keys(seqlen, dilation.dilation(), causal, head, query);
  at::Tensor mask = at::empty({seqlen}, at::kBool);
  std::copy(keys.begin(), keys.end(), mask.mutable_data_ptr<bool>());
  return mask;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tessera, m) {
  define<&dilated_forward_op>(
      m, "dilated_forward(Tensor q, Tensor k, Tensor v, {dilation}, {options}) -> (Tensor out, Tensor lse)");
  define<&dilated_backward_op>(m,
                               "dilated_backward({backward}, bool[4] wanted, {dilation}, {options}) -> (Tensor dq, "
                               "Tensor dk, Tensor dv, Tensor dattn_bias)");
  define<&dilated_pairs_op>(m, "dilated_pairs(Tensor q, {dilation}, {options}) -> int");
  constexpr auto kNoTensors = c10::DispatchKey::CompositeExplicitAutograd;
  define<&dilated_share_op>(
      m, "dilated_share(int seqlen, int heads, int block_size, bool? causal, {dilation}) -> Dict(str, float)",
      kNoTensors);
  define<&dilated_keys_op>(m, "dilated_keys(int seqlen, int head, int query, bool? causal, {dilation}) -> Tensor",
                           kNoTensors);
}

}  // namespace tessera::ops
