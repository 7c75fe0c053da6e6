// torch.ops.tessera: the core's attention as operators. Schemas here, computing in the core. Autograd and
// autocast are in autograd.cc; fake tensors, vmap and FLOP counts in python/tessera/_ops.py.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <string>

#include "convert.h"
#include "executor.h"
#include "schema.h"
#include "tessera/attention.h"
#include "tessera/backward.h"
#include "tessera/dilated.h"

namespace tessera::ops {

namespace {

at::ScalarType lse_type(const at::Tensor& q) { return q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

void check_rank(const char* name, const at::Tensor& t, int64_t rank, const char* dims) {
  if (t.dim() != rank) fail(name, std::to_string(t.dim()) + " dimensions", dims);
}

Dilation dilation_of(at::IntArrayRef segment_lengths, at::IntArrayRef dilation_rates,
                     std::optional<c10::string_view> kind, std::optional<double> density, int64_t block,
                     std::optional<int64_t> window, at::IntArrayRef rates, std::optional<int64_t> global_tokens,
                     std::optional<int64_t> stride, int64_t seed) {
  Dilation d;
  d.segment_lengths = {segment_lengths.data(), segment_lengths.size()};
  d.dilation_rates = {dilation_rates.data(), dilation_rates.size()};
  if (!kind.has_value()) return d;
  PatternSpec spec;
  spec.kind = pattern_kind({kind->data(), kind->size()});
  spec.block_q = spec.block_k = static_cast<int>(std::clamp<int64_t>(block, -1, 1 << 20));
  spec.density = density;
  spec.window = window;
  spec.dilation_rates = rates.vec();
  spec.global_tokens = global_tokens;
  spec.stride = stride;
  spec.seed = static_cast<uint64_t>(seed);
  d.pattern = spec;
  return d;
}

std::tuple<at::Tensor, at::Tensor> decode_op(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                             PATTERN_PARAMETERS, const MaybeTensor& page_table, OPTION_PARAMETERS) {
  return translate_errors([&] {
    check_rank("q", q, 4, "[B, Sq, H, D]");
    check_rank("v", v, 4, "[B, Sk, Hkv, Dv], or pages [pages, block_k, Hkv, Dv]");
    const Options options(OPTION_VALUE);
    at::Tensor out = empty_like_layout(q, {q.size(0), q.size(1), q.size(2), v.size(3)}, q.scalar_type());
    at::Tensor lse = at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(lse_type(q)));
    ForwardArgs args;
    args.q = view_of("q", q);
    args.k = view_of("k", k);
    args.v = view_of("v", v);
    args.pattern = pattern_of(PATTERN_VALUE);
    args.out = output_view("out", out);
    args.lse = output_view("lse", lse);
    args.options = options.get();
    at::Tensor pages;
    if (page_table.has_value()) {
      check_rank("page_table", *page_table, 2, "[B, ceil(Sk / block_k)] int32");
      if (page_table->scalar_type() != at::kInt) {
        fail("page_table", c10::toString(page_table->scalar_type()), "int32");
      }
      pages = page_table->contiguous();
      args.page_table = PageTable{pages.const_data_ptr<int32_t>(), pages.size(0), pages.size(1)};
    }
    forward(args, torch_threads());
    return std::make_tuple(out, lse);
  });
}

std::tuple<at::Tensor, at::Tensor> forward_op(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                              PATTERN_PARAMETERS, OPTION_PARAMETERS) {
  return decode_op(q, k, v, indptr, indices, bitmap_index, bitmaps, pattern_shape, {}, scale, causal, window_left,
                   window_right, q_offset, k_offset, key_lengths, align_to_key_lengths, softcap, alibi_slopes, block_bias,
                   attn_bias, sinks, dropout_p, rng);
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Gradients backward_op(const at::Tensor& dout, const MaybeTensor& dlse, const at::Tensor& q, const at::Tensor& k,
                      const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse, std::array<bool, 6> wanted,
                      PATTERN_PARAMETERS, OPTION_PARAMETERS) {
  return translate_errors([&] {
    check_rank("q", q, 4, "[B, Sq, H, D]");
    const Options options(OPTION_VALUE);
    const auto like = [](bool want, const at::Tensor& t) {
      return want ? empty_like_layout(t, t.sizes(), t.scalar_type()) : at::empty({0}, t.options());
    };
    const auto like_option = [&](bool want, const MaybeTensor& t) {
      return want && t.has_value() ? at::empty(t->sizes(), t->options()) : at::empty({0}, q.options());
    };
    at::Tensor dq = like(wanted[0], q), dk = like(wanted[1], k), dv = like(wanted[2], v);
    at::Tensor dblock = like_option(wanted[3], block_bias), dattn = like_option(wanted[4], attn_bias);
    at::Tensor dsinks = like_option(wanted[5], sinks);
    // The core wants the head dim contiguous; autograd may hand in anything.
    const at::Tensor grad = dout.stride(-1) == 1 ? dout : dout.contiguous();
    BackwardArgs args;
    args.q = view_of("q", q);
    args.k = view_of("k", k);
    args.v = view_of("v", v);
    args.pattern = pattern_of(PATTERN_VALUE);
    args.out = view_of("out", out);
    args.lse = view_of("lse", lse);
    args.dout = view_of("dout", grad);
    at::Tensor grad_lse;
    if (dlse.has_value()) {
      grad_lse = dlse->to(lse.scalar_type());
      args.dlse = view_of("dlse", grad_lse);
    }
    if (wanted[0]) args.dq = output_view("dq", dq);
    if (wanted[1]) args.dk = output_view("dk", dk);
    if (wanted[2]) args.dv = output_view("dv", dv);
    if (wanted[3]) args.dblock_bias = output_view("dblock_bias", dblock);
    if (wanted[4]) args.dattn_bias = output_view("dattn_bias", dattn);
    if (wanted[5]) args.dsinks = output_view("dsinks", dsinks);
    args.options = options.get();
    backward(args, torch_threads());
    return Gradients{dq, dk, dv, dblock, dattn, dsinks};
  });
}

std::tuple<at::Tensor, at::Tensor> weights_op(const at::Tensor& q, const at::Tensor& k, PATTERN_PARAMETERS,
                                              OPTION_PARAMETERS) {
  return translate_errors([&] {
    const Options options(OPTION_VALUE);
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
    at::Tensor values = at::empty({n, w.block_q, w.block_k}, at::kFloat);
    std::copy(w.values.begin(), w.values.end(), values.mutable_data_ptr<float>());
    return std::make_tuple(indices, values);
  });
}

std::tuple<at::Tensor, at::Tensor> merge_op(const at::Tensor& out_a, const at::Tensor& lse_a, const at::Tensor& out_b,
                                            const at::Tensor& lse_b) {
  return translate_errors([&] {
    at::Tensor out = empty_like_layout(out_a, out_a.sizes(), out_a.scalar_type());
    at::Tensor lse = at::empty(lse_a.sizes(), lse_a.options());
    merge(view_of("out_a", out_a), view_of("lse_a", lse_a), view_of("out_b", out_b), view_of("lse_b", lse_b),
          output_view("out", out), output_view("lse", lse), torch_threads());
    return std::make_tuple(out, lse);
  });
}

// Patterns of packed sequences: tensors one a sequence, shapes flattened to [N * 6].
std::vector<BlockPattern> patterns_of(at::TensorList indptrs, at::TensorList indices, at::IntArrayRef shapes) {
  if (indptrs.size() != indices.size() || shapes.size() != 6 * indptrs.size()) {
    fail("patterns", std::to_string(indptrs.size()) + " indptr, " + std::to_string(indices.size()) + " indices, " +
         std::to_string(shapes.size()) + " numbers of shapes", "N, N and 6 N");
  }
  std::vector<BlockPattern> patterns;
  for (size_t i = 0; i < indptrs.size(); ++i) {
    patterns.push_back(pattern_of({indptrs[i], indices[i], {}, {}, shapes.slice(6 * i, 6).vec()}));
  }
  return patterns;
}

#define VARLEN_PATTERNS "Tensor[] indptrs, Tensor[] indices, SymInt[] pattern_shapes"
#define VARLEN_OPTIONS                                                                                        \
  "float? scale=None, bool causal=False, int? window_left=None, int? window_right=None, float softcap=0., " \
  "Tensor? alibi_slopes=None, Tensor? sinks=None, float dropout_p=0., Tensor? rng=None"
#define VARLEN_OPTION_PARAMETERS                                                                               \
  std::optional<double> scale, bool causal, std::optional<int64_t> window_left, std::optional<int64_t> window_right, \
      double softcap, const MaybeTensor &alibi_slopes, const MaybeTensor &sinks, double dropout_p,                    \
      const MaybeTensor &rng
#define VARLEN_OPTION_VALUE                                                                                          \
  OptionArguments{scale, causal, window_left, window_right, {}, 0, {}, false, softcap, alibi_slopes, {}, {}, sinks, \
                  dropout_p, rng}

std::vector<int64_t> offsets_of(const char* name, const at::Tensor& t) {
  if (t.dim() != 1 || (t.scalar_type() != at::kInt && t.scalar_type() != at::kLong)) {
    fail(name, std::string(c10::toString(t.scalar_type())) + " with " + std::to_string(t.dim()) + " dimensions",
         "[N + 1] int32 or int64");
  }
  const at::Tensor wide = t.to(at::kCPU, at::kLong).contiguous();
  return {wide.const_data_ptr<int64_t>(), wide.const_data_ptr<int64_t>() + wide.numel()};
}

std::tuple<at::Tensor, at::Tensor> varlen_forward_op(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                     const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k,
                                                     at::TensorList indptrs, at::TensorList indices,
                                                     at::IntArrayRef pattern_shapes, VARLEN_OPTION_PARAMETERS) {
  return translate_errors([&] {
    check_rank("q", q, 3, "[total_q, H, D]");
    check_rank("v", v, 3, "[total_k, Hkv, Dv]");
    const Options options(VARLEN_OPTION_VALUE);
    const auto offsets_q = offsets_of("cu_seqlens_q", cu_seqlens_q);
    const auto offsets_k = offsets_of("cu_seqlens_k", cu_seqlens_k);
    const auto patterns = patterns_of(indptrs, indices, pattern_shapes);
    at::Tensor out = at::empty({q.size(0), q.size(1), v.size(2)}, q.options());
    at::Tensor lse = at::empty({q.size(1), q.size(0)}, q.options().dtype(lse_type(q)));
    VarlenForwardArgs args;
    args.q = view_of("q", q);
    args.k = view_of("k", k);
    args.v = view_of("v", v);
    args.out = output_view("out", out);
    args.lse = output_view("lse", lse);
    args.cu_seqlens_q = offsets_q;
    args.cu_seqlens_k = offsets_k;
    args.patterns = patterns;
    args.options = options.get();
    forward_varlen(args, torch_threads());
    return std::make_tuple(out, lse);
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> varlen_backward_op(
    const at::Tensor& dout, const MaybeTensor& dlse, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& out, const at::Tensor& lse, const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k,
    at::TensorList indptrs, at::TensorList indices, at::IntArrayRef pattern_shapes, VARLEN_OPTION_PARAMETERS) {
  return translate_errors([&] {
    const Options options(VARLEN_OPTION_VALUE);
    const auto offsets_q = offsets_of("cu_seqlens_q", cu_seqlens_q);
    const auto offsets_k = offsets_of("cu_seqlens_k", cu_seqlens_k);
    const auto patterns = patterns_of(indptrs, indices, pattern_shapes);
    at::Tensor dq = at::empty(q.sizes(), q.options()), dk = at::empty(k.sizes(), k.options());
    at::Tensor dv = at::empty(v.sizes(), v.options());
    at::Tensor dsinks = sinks.has_value() ? at::empty(sinks->sizes(), sinks->options()) : at::empty({0}, q.options());
    const at::Tensor grad = dout.stride(-1) == 1 ? dout : dout.contiguous();
    VarlenBackwardArgs args;
    args.q = view_of("q", q);
    args.k = view_of("k", k);
    args.v = view_of("v", v);
    args.out = view_of("out", out);
    args.dout = view_of("dout", grad);
    args.lse = view_of("lse", lse);
    at::Tensor grad_lse;
    if (dlse.has_value()) {
      grad_lse = dlse->to(lse.scalar_type());
      args.dlse = view_of("dlse", grad_lse);
    }
    args.dq = output_view("dq", dq);
    args.dk = output_view("dk", dk);
    args.dv = output_view("dv", dv);
    if (sinks.has_value()) args.dsinks = output_view("dsinks", dsinks);
    args.cu_seqlens_q = offsets_q;
    args.cu_seqlens_k = offsets_k;
    args.patterns = patterns;
    args.options = options.get();
    backward_varlen(args, torch_threads());
    return std::make_tuple(dq, dk, dv, dsinks);
  });
}

std::tuple<at::Tensor, at::Tensor> dilated_forward_op(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                      DILATION_PARAMETERS, OPTION_PARAMETERS) {
  return translate_errors([&] {
    check_rank("q", q, 4, "[B, S, H, D]");
    check_rank("v", v, 4, "[B, S, Hkv, Dv]");
    const Options options(OPTION_VALUE);
    at::Tensor out = empty_like_layout(q, {q.size(0), q.size(1), q.size(2), v.size(3)}, q.scalar_type());
    at::Tensor lse = at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(lse_type(q)));
    DilatedForwardArgs args;
    args.q = view_of("q", q);
    args.k = view_of("k", k);
    args.v = view_of("v", v);
    args.out = output_view("out", out);
    args.lse = output_view("lse", lse);
    args.dilation = DILATION_VALUE;
    args.options = options.get();
    dilated_forward(args, torch_threads());
    return std::make_tuple(out, lse);
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> dilated_backward_op(const at::Tensor& dout, const MaybeTensor& dlse,
                                                                   const at::Tensor& q, const at::Tensor& k,
                                                                   const at::Tensor& v, const at::Tensor& out,
                                                                   const at::Tensor& lse, DILATION_PARAMETERS,
                                                                   OPTION_PARAMETERS) {
  return translate_errors([&] {
    check_rank("q", q, 4, "[B, S, H, D]");
    const Options options(OPTION_VALUE);
    at::Tensor dq = empty_like_layout(q, q.sizes(), q.scalar_type());
    at::Tensor dk = empty_like_layout(k, k.sizes(), k.scalar_type());
    at::Tensor dv = empty_like_layout(v, v.sizes(), v.scalar_type());
    const at::Tensor grad = dout.stride(-1) == 1 ? dout : dout.contiguous();
    DilatedBackwardArgs args;
    args.q = view_of("q", q);
    args.k = view_of("k", k);
    args.v = view_of("v", v);
    args.out = view_of("out", out);
    args.lse = view_of("lse", lse);
    args.dout = view_of("dout", grad);
    at::Tensor grad_lse;
    if (dlse.has_value()) {
      grad_lse = dlse->to(lse.scalar_type());
      args.dlse = view_of("dlse", grad_lse);
    }
    args.dq = output_view("dq", dq);
    args.dk = output_view("dk", dk);
    args.dv = output_view("dv", dv);
    args.dilation = DILATION_VALUE;
    args.options = options.get();
    dilated_backward(args, torch_threads());
    return std::make_tuple(dq, dk, dv);
  });
}

// How many (q, k) pairs a call computes: what effective FLOP counts are made of.
int64_t admitted_pairs_op(int64_t batch, int64_t heads, PATTERN_PARAMETERS, OPTION_PARAMETERS) {
  return translate_errors([&] {
    const Options options(OPTION_VALUE);
    return admitted_pairs(pattern_of(PATTERN_VALUE), options.get(), batch, heads);
  });
}

int64_t dilated_pairs_op(const at::Tensor& q, DILATION_PARAMETERS, OPTION_PARAMETERS) {
  return translate_errors([&] {
    check_rank("q", q, 4, "[B, S, H, D]");
    const Options options(OPTION_VALUE);
    return dilated_pairs(q.size(1), DILATION_VALUE, options.get(), q.size(0), q.size(2));
  });
}

// What other devices and sparse tensors come to.
void unsupported(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  translate_errors([&] {
    const auto args = torch::jit::last(*stack, op.schema().arguments().size());
    for (size_t i = 0; i < args.size(); ++i) {
      if (args[i].isTensor()) check_device(op.schema().arguments()[i].name().c_str(), args[i].toTensor());
    }
    fail("tensors", "a device or a layout without a kernel", "strided tensors on cpu");
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tessera, m) {
  m.def("admitted_pairs(int batch, int heads, " PATTERN ", " OPTIONS ") -> int");
  m.def("dilated_pairs(Tensor q, " DILATION ", " OPTIONS ") -> int");
  m.def("forward(Tensor q, Tensor k, Tensor v, " PATTERN ", " OPTIONS ") -> (Tensor out, Tensor lse)");
  m.def("backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool[6] wanted, "
        PATTERN ", " OPTIONS ") -> (Tensor dq, Tensor dk, Tensor dv, Tensor dblock_bias, Tensor dattn_bias, "
        "Tensor dsinks)");
  // forward without autograd: what eager calls take when no gradient is wanted; also with a paged cache.
  m.def("decode(Tensor q, Tensor k, Tensor v, " PATTERN ", Tensor? page_table=None, " OPTIONS
        ") -> (Tensor out, Tensor lse)");
  m.def("weights(Tensor q, Tensor k, " PATTERN ", " OPTIONS ") -> (Tensor block_indices, Tensor block_values)");
  m.def("merge(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)");
  m.def("varlen_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, " VARLEN_PATTERNS
        ", " VARLEN_OPTIONS ") -> (Tensor out, Tensor lse)");
  m.def("varlen_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        "Tensor cu_seqlens_q, Tensor cu_seqlens_k, " VARLEN_PATTERNS ", " VARLEN_OPTIONS
        ") -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)");
  m.def("dilated_forward(Tensor q, Tensor k, Tensor v, " DILATION ", " OPTIONS ") -> (Tensor out, Tensor lse)");
  m.def("dilated_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, " DILATION
        ", " OPTIONS ") -> (Tensor dq, Tensor dk, Tensor dv)");
}

TORCH_LIBRARY_IMPL(tessera, CPU, m) {
  m.impl("admitted_pairs", admitted_pairs_op);
  m.impl("dilated_pairs", dilated_pairs_op);
  m.impl("forward", forward_op);
  m.impl("backward", backward_op);
  m.impl("decode", decode_op);
  m.impl("weights", weights_op);
  m.impl("merge", merge_op);
  m.impl("varlen_forward", varlen_forward_op);
  m.impl("varlen_backward", varlen_backward_op);
  m.impl("dilated_forward", dilated_forward_op);
  m.impl("dilated_backward", dilated_backward_op);
}

TORCH_LIBRARY_IMPL(tessera, CompositeExplicitAutograd, m) {
  for (const char* name : {"forward", "backward", "decode", "weights", "merge", "varlen_forward", "varlen_backward",
                           "dilated_forward", "dilated_backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&unsupported>());
  }
}

}  // namespace tessera::ops
