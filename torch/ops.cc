// torch.ops.tessera: the core's attention as operators. Schemas here, computing in the core. Autograd and
// autocast are in autograd.cc, packed sequences in ops_varlen.cc; fake tensors, vmap and FLOP counts in
// python/tessera/_ops.py.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <string>

#include "arguments.h"
#include "convert.h"
#include "executor.h"
#include "result_memory.h"
#include "schema.h"
#include "tessera/attention.h"
#include "tessera/backward.h"
#include "tessera/dilated.h"

namespace tessera::ops {

namespace {

Dilation dilation_of(at::IntArrayRef segment_lengths, at::IntArrayRef dilation_rates,
                     std::optional<c10::string_view> kind, std::optional<double> density, int64_t block,
                     c10::string_view budget, std::optional<int64_t> window, at::IntArrayRef rates,
                     std::optional<int64_t> global_tokens, std::optional<int64_t> stride, int64_t seed) {
  Dilation d;
  d.segment_lengths = {segment_lengths.data(), segment_lengths.size()};
  d.dilation_rates = {dilation_rates.data(), dilation_rates.size()};
  if (!kind.has_value()) return d;
  PatternSpec spec;
  spec.kind = pattern_kind({kind->data(), kind->size()});
  spec.block_q = spec.block_k = narrow(block);
  spec.budget = budget_of_name({budget.data(), budget.size()});
  spec.density = density;
  spec.window = window;
  spec.dilation_rates = rates.vec();
  spec.global_tokens = global_tokens;
  spec.stride = stride;
  spec.seed = static_cast<uint64_t>(seed);
  d.pattern = spec;
  // What a pattern calls its options, as this operator does.
  d.make = [](const PatternSpec& filled) {
    try {
      return make_pattern(filled);
    } catch (const Error& e) {
      const std::string& name = e.argument();
      const char* ours = name == "window"           ? "pattern_window"
                         : name == "dilation_rates" ? "pattern_rates"
                         : name == "seed"           ? "pattern_seed"
                         : name == "block_q"        ? "block"
                                                    : nullptr;
      if (ours == nullptr) throw;
      throw Error(ours, ours + std::string(e.what()).substr(name.size()));
    }
  };
  return d;
}

std::tuple<at::Tensor, at::Tensor> decode_op(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                             PATTERN_PARAMETERS, const MaybeTensor& page_table, OPTION_PARAMETERS) {
  return translate_errors([&] {
    check_rank("q", q, 4, "[B, Sq, H, D]");
    check_rank("v", v, 4, "[B, Sk, Hkv, Dv], or pages [pages, block_k, Hkv, Dv]");
    const Options options(OPTION_VALUE, q);
    auto [out, lse] = results_of(q, v);
    ForwardArgs args;
    fill_forward(args, q, k, v, out, lse, options);
    args.pattern = pattern_of(PATTERN_VALUE);
    at::Tensor pages;
    if (page_table.has_value()) {
      check_rank("page_table", *page_table, 2, "[B, ceil(Sk / block_k)] int32");
      if (page_table->scalar_type() != at::kInt) {
        fail("page_table", c10::toString(page_table->scalar_type()), "int32");
      }
      pages = integers("page_table", *page_table, at::kInt);
      args.page_table = PageTable{pages.const_data_ptr<int32_t>(), pages.size(0), pages.size(1)};
    }
    forward(args, torch_threads());
    return std::make_tuple(out, lse);
  });
}

std::tuple<at::Tensor, at::Tensor> forward_op(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                              PATTERN_PARAMETERS, OPTION_PARAMETERS) {
  return decode_op(q, k, v, indptr, indices, bitmap_index, bitmaps, pattern_shape, {}, scale, causal, window_left,
                   window_right, q_offset, k_offset, key_lengths, align_to_key_lengths, softcap, alibi_slopes,
                   block_bias, attn_bias, sinks, dropout_p, rng);
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Gradients backward_op(BACKWARD_PARAMETERS, std::array<bool, 6> wanted, PATTERN_PARAMETERS, OPTION_PARAMETERS) {
  return translate_errors([&] {
    const Options options(OPTION_VALUE, q);
    const BackwardTensors tensors(BACKWARD_VALUE);
    BackwardArgs args;
    tensors.fill(args, options);
    args.pattern = pattern_of(PATTERN_VALUE);
    Gradients g{gradient_of("dq", q, wanted[0], args.dq),
                gradient_of("dk", k, wanted[1], args.dk),
                gradient_of("dv", v, wanted[2], args.dv),
                gradient_of("dblock_bias", block_bias, wanted[3], args.dblock_bias, q),
                gradient_of("dattn_bias", attn_bias, wanted[4], args.dattn_bias, q),
                gradient_of("dsinks", sinks, wanted[5], args.dsinks, q)};
    backward(args, torch_threads());
    return g;
  });
}

std::tuple<at::Tensor, at::Tensor> weights_op(const at::Tensor& q, const at::Tensor& k, PATTERN_PARAMETERS,
                                              OPTION_PARAMETERS) {
  return translate_errors([&] {
    const Options options(OPTION_VALUE, q);
    ForwardArgs args;
    args.q = view_of("q", q);
    args.k = view_of("k", k);
    args.v = view_of("k", k);  // not read
    args.pattern = pattern_of(PATTERN_VALUE);
    args.options = options.get();
    const BlockWeights w = attention_weights(args, torch_threads());
    const int64_t n = static_cast<int64_t>(w.indices.size());
    at::Tensor indices = at::empty({n, 4}, at::kLong);
    int64_t* to = indices.mutable_data_ptr<int64_t>();
    for (const auto& i : w.indices) {
      *to++ = i.batch;
      *to++ = i.head;
      *to++ = i.row;
      *to++ = i.col;
    }
    at::Tensor values = empty_result({n, w.block_q, w.block_k}, at::kFloat);
    std::copy(w.values.begin(), w.values.end(), values.mutable_data_ptr<float>());
    return std::make_tuple(indices, values);
  });
}

std::tuple<at::Tensor, at::Tensor> merge_op(const at::Tensor& out_a, const at::Tensor& lse_a, const at::Tensor& out_b,
                                            const at::Tensor& lse_b) {
  return translate_errors([&] {
    const TensorView a = view_of("out_a", out_a), a_lse = view_of("lse_a", lse_a);
    const TensorView b = view_of("out_b", out_b), b_lse = view_of("lse_b", lse_b);
    at::Tensor out = empty_like_layout(out_a, out_a.sizes(), out_a.scalar_type());
    at::Tensor lse = empty_like_layout(lse_a, lse_a.sizes(), lse_a.scalar_type());
    merge(a, a_lse, b, b_lse, output_view("out", out), output_view("lse", lse), torch_threads());
    return std::make_tuple(out, lse);
  });
}

std::tuple<at::Tensor, at::Tensor> dilated_forward_op(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                      DILATION_PARAMETERS, OPTION_PARAMETERS) {
  return translate_errors([&] {
    check_rank("q", q, 4, "[B, S, H, D]");
    check_rank("v", v, 4, "[B, S, Hkv, Dv]");
    const Options options(OPTION_VALUE, q);
    auto [out, lse] = results_of(q, v);
    DilatedForwardArgs args;
    fill_forward(args, q, k, v, out, lse, options);
    args.dilation = DILATION_VALUE;
    dilated_forward(args, torch_threads());
    return std::make_tuple(out, lse);
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> dilated_backward_op(BACKWARD_PARAMETERS,
                                                                               std::array<bool, 4> wanted,
                                                                               DILATION_PARAMETERS, OPTION_PARAMETERS) {
  return translate_errors([&] {
    const Options options(OPTION_VALUE, q);
    const BackwardTensors tensors(BACKWARD_VALUE);
    DilatedBackwardArgs args;
    tensors.fill(args, options);
    args.dilation = DILATION_VALUE;
    auto g = std::make_tuple(gradient_of("dq", q, wanted[0], args.dq), gradient_of("dk", k, wanted[1], args.dk),
                             gradient_of("dv", v, wanted[2], args.dv),
                             gradient_of("dattn_bias", attn_bias, wanted[3], args.dattn_bias, q));
    dilated_backward(args, torch_threads());
    return g;
  });
}

// How many (q, k) pairs a call computes: what effective FLOP counts are made of.
int64_t admitted_pairs_op(int64_t batch, int64_t heads, PATTERN_PARAMETERS, OPTION_PARAMETERS) {
  return translate_errors([&] {
    const Options options(OPTION_VALUE, batch);
    return admitted_pairs(pattern_of(PATTERN_VALUE), options.get(), batch, heads);
  });
}

int64_t dilated_pairs_op(const at::Tensor& q, DILATION_PARAMETERS, OPTION_PARAMETERS) {
  return translate_errors([&] {
    check_rank("q", q, 4, "[B, S, H, D]");
    const Options options(OPTION_VALUE, q);
    return dilated_pairs(q.size(1), DILATION_VALUE, options.get(), q.size(0), q.size(2));
  });
}

// What other devices and sparse tensors come to.
void unsupported(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
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

}  // namespace

TORCH_LIBRARY_FRAGMENT(tessera, m) {
  m.def("admitted_pairs(int batch, int heads, " PATTERN ", " OPTIONS ") -> int");
  m.def("dilated_pairs(Tensor q, " DILATION ", " OPTIONS ") -> int");
  m.def("forward(Tensor q, Tensor k, Tensor v, " PATTERN ", " OPTIONS ") -> (Tensor out, Tensor lse)");
  m.def("backward(" BACKWARD ", bool[6] wanted, " PATTERN ", " OPTIONS
        ") -> (Tensor dq, Tensor dk, Tensor dv, Tensor dblock_bias, Tensor dattn_bias, "
        "Tensor dsinks)");
  // forward without autograd: what eager calls take when no gradient is wanted; also with a paged cache.
  m.def("decode(Tensor q, Tensor k, Tensor v, " PATTERN ", Tensor? page_table=None, " OPTIONS
        ") -> (Tensor out, Tensor lse)");
  m.def("weights(Tensor q, Tensor k, " PATTERN ", " OPTIONS ") -> (Tensor block_indices, Tensor block_values)");
  m.def("merge(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)");
  m.def("dilated_forward(Tensor q, Tensor k, Tensor v, " DILATION ", " OPTIONS ") -> (Tensor out, Tensor lse)");
  m.def("dilated_backward(" BACKWARD ", bool[4] wanted, " DILATION ", " OPTIONS
        ") -> (Tensor dq, Tensor dk, Tensor dv, Tensor dattn_bias)");
}

TORCH_LIBRARY_IMPL(tessera, CPU, m) {
  m.impl("admitted_pairs", admitted_pairs_op);
  m.impl("dilated_pairs", dilated_pairs_op);
  m.impl("forward", forward_op);
  m.impl("backward", backward_op);
  m.impl("decode", decode_op);
  m.impl("weights", weights_op);
  m.impl("merge", merge_op);
  m.impl("dilated_forward", dilated_forward_op);
  m.impl("dilated_backward", dilated_backward_op);
}

constexpr const char* kOperators[] = {
    "forward",         "backward",        "decode",           "weights",        "merge",        "varlen_forward",
    "varlen_backward", "dilated_forward", "dilated_backward", "admitted_pairs", "dilated_pairs"};

TORCH_LIBRARY_IMPL(tessera, CompositeExplicitAutograd, m) {
  for (const char* name : kOperators) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&unsupported>());
}

TORCH_LIBRARY_IMPL(tessera, NestedTensorCPU, m) {
  for (const char* name : kOperators) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&unsupported>());
}

}  // namespace tessera::ops
