// torch.ops.tessera: the core's attention as operators. Schemas and computing are here and in the other ops_*.cc;
// autograd and autocast in autograd.cc; fake tensors, vmap and FLOP counts in python/tessera.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <string>

#include "arguments.h"
#include "executor.h"
#include "result_memory.h"
#include "tessera/attention.h"
#include "tessera/backward.h"
#include "tessera/version.h"

namespace tessera::ops {

namespace {

Results attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const BlockPattern& pattern,
               const MaybeTensor& page_table, const OptionArguments& given) {
  check_rank("q", q, 4, "[B, Sq, H, D]");
  check_rank("v", v, 4, "[B, Sk, Hkv, Dv], or pages [pages, block_k, Hkv, Dv]");
  const Options options(given, q);
  Results results = results_of(q, v);
  ForwardArgs args;
  fill_forward(args, q, k, v, results, options);
  args.pattern = pattern;
  at::Tensor pages;
  if (page_table.has_value()) {
    check_rank("page_table", *page_table, 2, "[B, ceil(Sk / block_k)] int32");
    if (page_table->scalar_type() != at::kInt) fail("page_table", c10::toString(page_table->scalar_type()), "int32");
    pages = integers("page_table", *page_table, at::kInt);
    args.page_table = PageTable{pages.const_data_ptr<int32_t>(), pages.size(0), pages.size(1)};
  }
  forward(args, torch_threads());
  return results;
}

Results forward_op(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const BlockPattern& pattern,
                   const OptionArguments& options) {
  return attend(q, k, v, pattern, {}, options);
}

Results decode_op(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                  const BlockPattern& pattern, const MaybeTensor& page_table, const OptionArguments& options) {
  try {
    return attend(q, k_cache, v_cache, pattern, page_table, options);
  } catch (const Error& e) {
    if (e.argument() != "k" && e.argument() != "v") throw;
    throw e.renamed(e.argument() + "_cache");
  }
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Gradients backward_op(const BackwardArguments& given, std::array<bool, 6> wanted, const BlockPattern& pattern,
                      const OptionArguments& o) {
  const Options options(o, given.q);
  const BackwardArguments t = prepared(given);
  BackwardArgs args;
  fill_backward(args, t, options);
  args.pattern = pattern;
  Gradients g{gradient_of("dq", t.q, wanted[0], args.dq),
              gradient_of("dk", t.k, wanted[1], args.dk),
              gradient_of("dv", t.v, wanted[2], args.dv),
              gradient_of("dblock_bias", o.block_bias, wanted[3], args.dblock_bias, t.q),
              gradient_of("dattn_bias", o.attn_bias, wanted[4], args.dattn_bias, t.q),
              gradient_of("dsinks", o.sinks, wanted[5], args.dsinks, t.q)};
  backward(args, torch_threads());
  return g;
}

Results weights_op(const at::Tensor& q, const at::Tensor& k, const BlockPattern& pattern, const OptionArguments& o) {
  const Options options(o, q);
  ForwardArgs args;
  args.q = view_of("q", q);
  args.k = args.v = view_of("k", k);  // v is not read
  args.pattern = pattern;
  args.options = options.get();
  return tensors_of(attention_weights(args, torch_threads()));
}

Results merge_op(const at::Tensor& out_a, const at::Tensor& lse_a, const at::Tensor& out_b, const at::Tensor& lse_b) {
  const TensorView a = view_of("out_a", out_a), a_lse = view_of("lse_a", lse_a);
  const TensorView b = view_of("out_b", out_b), b_lse = view_of("lse_b", lse_b);
  at::Tensor out = empty_like_layout(out_a, out_a.sizes(), out_a.scalar_type());
  at::Tensor lse = empty_like_layout(lse_a, lse_a.sizes(), lse_a.scalar_type());
  merge(a, a_lse, b, b_lse, output_view("out", out), output_view("lse", lse), torch_threads());
  return {out, lse};
}

// How many (q, k) pairs a call computes: what effective FLOP counts are made of.
int64_t admitted_pairs_op(int64_t batch, int64_t heads, const BlockPattern& pattern, const OptionArguments& options) {
  return admitted_pairs(pattern, Options(options, batch).get(), batch, heads);
}

// What other devices and sparse tensors come to.
void unsupported(const c10::OperatorHandle& op, Stack* stack) {
  translate_errors([&] {
    const auto args = torch::jit::last(*stack, op.schema().arguments().size());
    for (size_t i = 0; i < args.size(); ++i) {
      const std::string& name = op.schema().arguments()[i].name();
      if (args[i].isTensor()) check_device(name.c_str(), args[i].toTensor());
      if (!args[i].isTensorList()) continue;
      for (const at::Tensor& t : args[i].toTensorVector()) check_device(name.c_str(), t);
    }
    fail("tensors", "a device or a layout without a kernel", "strided tensors on cpu");
  });
}

void refuse_other_devices(torch::Library& m) {
  for (const char* name : {"forward", "infer", "backward", "decode", "weights", "merge", "varlen_forward",
                           "varlen_backward", "dilated_forward", "dilated_backward", "admitted_pairs"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&unsupported>());
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tessera, m) {
  define<&forward_op>(m, "forward(Tensor q, Tensor k, Tensor v, {pattern}, {options}) -> (Tensor out, Tensor lse)");
  // The same without autograd: what eager calls take when no gradient is wanted.
  define<&forward_op>(m, "infer(Tensor q, Tensor k, Tensor v, {pattern}, {options}) -> (Tensor out, Tensor lse)");
  define<&backward_op>(m,
                       "backward({backward}, bool[6] wanted, {pattern}, {options}) -> (Tensor dq, Tensor dk, "
                       "Tensor dv, Tensor dblock_bias, Tensor dattn_bias, Tensor dsinks)");
  define<&decode_op>(m,
                     "decode(Tensor q, Tensor k_cache, Tensor v_cache, {pattern}, Tensor? page_table=None, {options}) "
                     "-> (Tensor out, Tensor lse)");
  define<&weights_op>(m,
                      "weights(Tensor q, Tensor k, {pattern}, {options}) -> (Tensor block_indices, "
                      "Tensor block_values)");
  define<&merge_op>(m, "merge(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)");
  define<&admitted_pairs_op>(m, "admitted_pairs(int batch, int heads, {pattern}, {options}) -> int");
  m.def("version() -> str", [] { return std::string(TESSERA_VERSION); });
}

TORCH_LIBRARY_IMPL(tessera, CompositeExplicitAutograd, m) { refuse_other_devices(m); }
TORCH_LIBRARY_IMPL(tessera, NestedTensorCPU, m) { refuse_other_devices(m); }

}  // namespace tessera::ops
