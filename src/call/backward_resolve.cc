// The part of validation that only a backward call has; the rest is `resolve`'s.
#include <fmt/format.h>

#include <cassert>
#include <span>
#include <vector>

#include "call/backward_problem.h"
#include "call/checks.h"
#include "tessera/error.h"

namespace tessera {

namespace {

// [B, H, Sq] numbers of rows: fp32, or fp64 where `fp64` allows it.
void check_row_numbers(const char* name, const TensorView& t, const Problem& p, bool fp64) {
  check_shape(name, t, {p.batch, p.heads, p.seqlen_q}, false, "[B, H, Sq]");
  if (!(fp64 && t.dtype == DType::f64)) check_dtype(name, t, DType::f32, fp64 ? " or fp64" : "");
}

void resolve_inputs(const BackwardArgs& args, Purpose purpose, BackwardProblem& p) {
  Problem& f = p.forward;
  const auto check_rows = [&](const char* name, const TensorView& t) {
    check_shape(name, t, {f.batch, f.seqlen_q, f.heads, f.head_dim_v}, false, "[B, Sq, H, Dv]");
    check_dtype(name, t, f.dtype, ", the dtype of q");
    check_contiguous_last(name, t);
  };
  const bool reference = purpose == Purpose::reference;
  const bool fp64_rows = reference || f.dtype == DType::f64;
  if (!reference) {
    check_rows("out", args.out);
    f.out = strided(args.out);
    check_row_numbers("lse", args.lse, f, fp64_rows);
    f.lse = strided_numbers(args.lse);
    f.lse_dtype = args.lse.dtype;
  }
  f.out_dtype = f.dtype;
  check_rows("dout", args.dout);
  p.dout = strided(args.dout);
  if (args.dlse.defined()) {
    check_row_numbers("dlse", args.dlse, f, fp64_rows);
    if (reference) f.lse_dtype = args.dlse.dtype;
    check_dtype("dlse", args.dlse, f.lse_dtype, ", the dtype of lse");
    p.dlse = strided_numbers(args.dlse);
  }
}

void resolve_gradients(const BackwardArgs& args, Purpose purpose, BackwardProblem& p) {
  const Problem& f = p.forward;
  const DType full = f.dtype == DType::f64 ? DType::f64 : DType::f32;  // what sums are kept in
  const bool reference = purpose == Purpose::reference;
  p.accumulate = args.accumulate;
  p.gradient_dtype = args.accumulate ? full : f.dtype;
  const NamedView* first = nullptr;
  const auto check_gradient = [&](const NamedView& g, int64_t seqlen, int64_t heads, int64_t dim,
                                  std::string_view dims) {
    if (!g.view.defined()) return;
    check_shape(g.name, g.view, {f.batch, seqlen, heads, dim}, false, dims);
    const DType dtype = g.view.dtype;
    const bool fp64 = reference && dtype == DType::f64;
    if (args.accumulate) {
      if (dtype != full && !fp64) {
        fail(g.name, name_of(dtype), fmt::format("{} with accumulate and {} inputs", name_of(full), name_of(f.dtype)));
      }
    } else if (dtype != f.dtype && dtype != DType::f32 && !fp64) {
      fail(g.name, name_of(dtype), fmt::format("{}, the dtype of q, or fp32", name_of(f.dtype)));
    }
    if (first != nullptr && dtype != first->view.dtype) {
      fail(g.name, name_of(dtype), fmt::format("{}, the dtype of {}", name_of(first->view.dtype), first->name));
    }
    check_contiguous_last(g.name, g.view);
    check_output(g.name, g.view);
    p.gradient_dtype = dtype;
    if (first == nullptr) first = &g;
  };
  const NamedView dq{"dq", args.dq}, dk{"dk", args.dk}, dv{"dv", args.dv};
  check_gradient(dq, f.seqlen_q, f.heads, f.head_dim, "[B, Sq, H, D]");
  check_gradient(dk, f.seqlen_k, f.kv_heads, f.head_dim, "[B, Sk, Hkv, D]");
  check_gradient(dv, f.seqlen_k, f.kv_heads, f.head_dim_v, "[B, Sk, Hkv, Dv]");
  p.dq = strided(dq.view);
  p.dk = strided(dk.view);
  p.dv = strided(dv.view);
}

void resolve_bias_gradients(const BackwardArgs& args, Purpose purpose, BackwardProblem& p) {
  const AttentionOptions& o = args.options;
  const auto need = [](const char* name, const TensorView& bias, const char* bias_name) {
    if (!bias.defined()) fail(name, "a tensor", fmt::format("none where there is no {}", bias_name));
  };
  if (const TensorView t = args.dblock_bias; t.defined()) {
    need("dblock_bias", o.block_bias, "block_bias");
    const auto& size = o.block_bias.sizes;
    check_shape("dblock_bias", t, {size[0], size[1], size[2]}, false, "the sizes of block_bias");
    check_dtype("dblock_bias", t, DType::f32, "");
    check_output("dblock_bias", t);
    p.dblock_bias = static_cast<float*>(args.dblock_bias.data);
    p.dbias_batch = broadcast_stride(t, 0);
    p.dbias_head = broadcast_stride(t, 1);
    p.dbias_entry = broadcast_stride(t, 2);
  }
  if (const TensorView t = args.dattn_bias; t.defined()) {
    need("dattn_bias", o.attn_bias, "attn_bias");
    const auto& size = o.attn_bias.sizes;
    check_shape("dattn_bias", t, {size[0], size[1], size[2], size[3]}, false, "the sizes of attn_bias");
    const bool fp64 = purpose == Purpose::reference && t.dtype == DType::f64;
    if (t.dtype != o.attn_bias.dtype && t.dtype != DType::f32 && !fp64) {
      fail("dattn_bias", name_of(t.dtype),
           fmt::format("{}, the dtype of attn_bias, or fp32", name_of(o.attn_bias.dtype)));
    }
    check_output("dattn_bias", t);
    p.dattn_bias = static_cast<char*>(args.dattn_bias.data);
    p.dattn_bias_dtype = t.dtype;
    for (int i = 0; i < 4; ++i) {
      p.dattn_bias_stride[i] = broadcast_stride(t, i);
      p.dattn_bias_size[i] = t.sizes[i];
    }
  }
  if (const TensorView t = args.dsinks; t.defined()) {
    need("dsinks", o.sinks, "sinks");
    check_shape("dsinks", t, {p.forward.heads}, false, "[H]");
    check_dtype("dsinks", t, DType::f32, "");
    check_output("dsinks", t);
    p.dsinks = static_cast<float*>(args.dsinks.data);
    p.dsinks_head = broadcast_stride(t, 0);
  }
}

void check_overlaps(const BackwardArgs& args, Purpose purpose) {
  const bool given = purpose != Purpose::reference;  // the reference reads neither
  std::vector<NamedView> inputs = inputs_of(args.options);
  inputs.insert(inputs.end(), {{"q", args.q},
                               {"k", args.k},
                               {"v", args.v},
                               {"out", given ? args.out : TensorView{}},
                               {"lse", given ? args.lse : TensorView{}},
                               {"dout", args.dout},
                               {"dlse", args.dlse}});
  const NamedView outputs[] = {{"dq", args.dq},
                               {"dk", args.dk},
                               {"dv", args.dv},
                               {"dblock_bias", args.dblock_bias},
                               {"dattn_bias", args.dattn_bias},
                               {"dsinks", args.dsinks}};
  for (size_t i = 0; i < std::size(outputs); ++i) {
    const NamedView& output = outputs[i];
    for (const NamedView& input : inputs) check_disjoint(output.name, output.view, input.name, input.view);
    for (size_t j = 0; j < i; ++j) check_disjoint(output.name, output.view, outputs[j].name, outputs[j].view);
  }
}

// All but what depends on the pattern; `forward` is the forward call resolved.
BackwardProblem resolve_rest(const BackwardArgs& args, Purpose purpose, const Problem& forward) {
  BackwardProblem p;
  p.forward = forward;
  resolve_inputs(args, purpose, p);
  resolve_gradients(args, purpose, p);
  resolve_bias_gradients(args, purpose, p);
  check_overlaps(args, purpose);
  return p;
}

ForwardArgs forward_of(const BackwardArgs& args) {  // no outputs: they are inputs here
  ForwardArgs forward;
  forward.q = args.q;
  forward.k = args.k;
  forward.v = args.v;
  forward.pattern = args.pattern;
  forward.options = args.options;
  return forward;
}

}  // namespace

BackwardProblem resolve_without_pattern(const BackwardArgs& args, Purpose purpose) {
  return resolve_rest(args, purpose, resolve_without_pattern(forward_of(args), Purpose::weights));
}

BackwardProblem resolve_backward(const BackwardArgs& args, Purpose purpose) {
  assert(purpose == Purpose::forward || purpose == Purpose::reference);
  BackwardProblem p = resolve_rest(args, purpose, resolve(forward_of(args), Purpose::weights));
  p.transposed = args.pattern.transposed();
  return p;
}

}  // namespace tessera
