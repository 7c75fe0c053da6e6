// torch.ops.tessera, packed sequences: patterns are lists of tensors, one a sequence.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <string>

#include "arguments.h"
#include "convert.h"
#include "executor.h"
#include "schema.h"
#include "tessera/attention.h"
#include "tessera/backward.h"

#define VARLEN "Tensor cu_seqlens_q, Tensor cu_seqlens_k, " PATTERN_LISTS
#define VARLEN_OPTIONS                                                                                      \
  "float? scale=None, bool? causal=None, int? window_left=None, int? window_right=None, float softcap=0., " \
  "Tensor? alibi_slopes=None, Tensor? sinks=None, float dropout_p=0., Tensor? rng=None"
#define VARLEN_PARAMETERS const at::Tensor &cu_seqlens_q, const at::Tensor &cu_seqlens_k, PATTERN_LISTS_PARAMETERS
#define VARLEN_OPTION_PARAMETERS                                                                                      \
  std::optional<double> scale, std::optional<bool> causal, std::optional<int64_t> window_left,                        \
      std::optional<int64_t> window_right, double softcap, const MaybeTensor &alibi_slopes, const MaybeTensor &sinks, \
      double dropout_p, const MaybeTensor &rng
#define VARLEN_OPTION_VALUE                                                                                          \
  OptionArguments {                                                                                                  \
    scale, causal, window_left, window_right, {}, 0, {}, false, softcap, alibi_slopes, {}, {}, sinks, dropout_p, rng \
  }

namespace tessera::ops {

namespace {

std::vector<int64_t> offsets_of(const char* name, const at::Tensor& t) {
  check_rank(name, t, 1, "[N + 1] int32 or int64");
  const at::Tensor wide = integers(name, t, at::kLong);
  return {wide.const_data_ptr<int64_t>(), wide.const_data_ptr<int64_t>() + wide.numel()};
}

// What both directions have: sequences, and the patterns of each.
struct Sequences {
  std::vector<int64_t> q, k;
  std::vector<BlockPattern> patterns;

  explicit Sequences(VARLEN_PARAMETERS)
      : q(offsets_of("cu_seqlens_q", cu_seqlens_q)),
        k(offsets_of("cu_seqlens_k", cu_seqlens_k)),
        patterns(PATTERN_LISTS_VALUE) {}

  template <class Args>
  void fill(Args& args) const {
    args.cu_seqlens_q = q;
    args.cu_seqlens_k = k;
    args.patterns = patterns;
  }
};
#define SEQUENCES_VALUE cu_seqlens_q, cu_seqlens_k, indptr, indices, bitmap_index, bitmaps, pattern_shapes

std::tuple<at::Tensor, at::Tensor> varlen_forward_op(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                     VARLEN_PARAMETERS, VARLEN_OPTION_PARAMETERS) {
  return translate_errors([&] {
    check_rank("q", q, 3, "[total_q, H, D]");
    check_rank("v", v, 3, "[total_k, Hkv, Dv]");
    const Options options(VARLEN_OPTION_VALUE, q);
    const Sequences sequences(SEQUENCES_VALUE);
    at::Tensor out = empty_like_layout(q, {q.size(0), q.size(1), v.size(2)}, q.scalar_type());
    at::Tensor lse = at::empty({q.size(1), q.size(0)}, q.options().dtype(lse_type(q)));
    VarlenForwardArgs args;
    fill_forward(args, q, k, v, out, lse, options);
    sequences.fill(args);
    forward_varlen(args, torch_threads());
    return std::make_tuple(out, lse);
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> varlen_backward_op(BACKWARD_PARAMETERS,
                                                                              std::array<bool, 4> wanted,
                                                                              VARLEN_PARAMETERS,
                                                                              VARLEN_OPTION_PARAMETERS) {
  return translate_errors([&] {
    const Options options(VARLEN_OPTION_VALUE, q);
    const Sequences sequences(SEQUENCES_VALUE);
    const BackwardTensors tensors(BACKWARD_VALUE);
    VarlenBackwardArgs args;
    tensors.fill(args, options);
    sequences.fill(args);
    auto g = std::make_tuple(gradient_of("dq", q, wanted[0], args.dq), gradient_of("dk", k, wanted[1], args.dk),
                             gradient_of("dv", v, wanted[2], args.dv),
                             gradient_of("dsinks", sinks, wanted[3], args.dsinks, q));
    backward_varlen(args, torch_threads());
    return g;
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tessera, m) {
  m.def("varlen_forward(Tensor q, Tensor k, Tensor v, " VARLEN ", " VARLEN_OPTIONS ") -> (Tensor out, Tensor lse)");
  m.def("varlen_backward(" BACKWARD ", bool[4] wanted, " VARLEN ", " VARLEN_OPTIONS
        ") -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)");
}

TORCH_LIBRARY_IMPL(tessera, CPU, m) {
  m.impl("varlen_forward", varlen_forward_op);
  m.impl("varlen_backward", varlen_backward_op);
}

}  // namespace tessera::ops
