#include "functional.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/nn/functional/linear.h>

#include <cmath>
#include <limits>
#include <string>

#include "arguments.h"

namespace tessera::nn::functional {

namespace {

using ops::MaybeTensor;
using ops::OptionArguments;
using ops::PatternTensors;

// out and lse of an attention operator.
template <class... Arguments>
std::tuple<at::Tensor, at::Tensor> attend(const char* name, const Arguments&... arguments) {
  const ops::Stack results = ops::call(name, arguments...);
  return {results[0].toTensor(), results[1].toTensor()};
}

// Options of one call: its dropout has a seed.
OptionArguments drawn(OptionArguments o) {
  if (o.dropout_p > 0 && !o.rng.has_value()) o.rng = at::empty({2}, at::kLong).random_();
  return o;
}

MaybeTensor maybe(const at::Tensor& t) { return t.defined() ? MaybeTensor(t) : std::nullopt; }

// A mask as torch's modules take it, as what is added to the scores.
at::Tensor additive(const char* name, const at::Tensor& mask, at::ScalarType dtype) {
  if (mask.scalar_type() == at::kBool) {
    return at::zeros(mask.sizes(), mask.options().dtype(dtype))
        .masked_fill_(mask, -std::numeric_limits<double>::infinity());
  }
  TORCH_CHECK_VALUE(mask.is_floating_point(), name, ": got ", mask.scalar_type(), "; allowed: bool or floating");
  return mask.to(dtype);
}

// Padding [N, S] and mask [L, S] or [N H, L, S], joined: [N or 1, H or 1, L or 1, S], or undefined.
at::Tensor bias_of(const MultiheadArguments& a, int64_t batch, int64_t rows, int64_t keys, at::ScalarType dtype) {
  at::Tensor bias;
  if (a.attn_mask.defined()) {
    const at::Tensor mask = additive("attn_mask", a.attn_mask, dtype);
    const at::IntArrayRef sizes = mask.sizes();
    TORCH_CHECK_VALUE(
        sizes == at::IntArrayRef({rows, keys}) || sizes == at::IntArrayRef({batch * a.num_heads, rows, keys}),
        "attn_mask: got ", sizes, "; allowed: [", rows, ", ", keys, "] or [", batch * a.num_heads, ", ", rows, ", ",
        keys, "]");
    bias = mask.dim() == 2 ? mask.view({1, 1, rows, keys}) : mask.reshape({batch, a.num_heads, rows, keys});
  }
  if (a.key_padding_mask.defined()) {
    const at::Tensor mask = additive("key_padding_mask", a.key_padding_mask, dtype);
    TORCH_CHECK_VALUE(mask.sizes() == at::IntArrayRef({batch, keys}), "key_padding_mask: got ", mask.sizes(),
                      "; allowed: [", batch, ", ", keys, "]");
    const at::Tensor padding = mask.view({batch, 1, 1, keys});
    bias = bias.defined() ? bias + padding : padding;
  }
  return bias;
}

void check_sizes(const char* name, const at::Tensor& t, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(t.defined(), name, ": got none; allowed: a tensor of ", sizes);
  TORCH_CHECK_VALUE(t.sizes() == sizes, name, ": got ", t.sizes(), "; allowed: ", sizes);
}

// What would otherwise end in an error of some product.
void check_multi_head(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                      const MultiheadArguments& a) {
  const std::tuple<const char*, const at::Tensor&, const char*> inputs[] = {
      {"query", query, "[L, N, E]"}, {"key", key, "[S, N, kdim]"}, {"value", value, "[S, N, vdim]"}};
  for (const auto& [name, t, dims] : inputs) {
    TORCH_CHECK_VALUE(t.defined(), name, ": got none; allowed: ", dims);
    TORCH_CHECK_VALUE(t.dim() == 3, name, ": got ", t.dim(), " dimensions; allowed: ", dims);
  }
  const int64_t width = query.size(2);
  TORCH_CHECK_VALUE(a.num_heads > 0 && width > 0 && width % a.num_heads == 0, "num_heads: got ", a.num_heads,
                    "; allowed: a divisor of ", width, ", the width of query");
  check_sizes("out_proj_weight", a.out_proj_weight, {width, width});
  if (a.in_proj_weight.defined()) {
    check_sizes("in_proj_weight", a.in_proj_weight, {3 * width, width});
    check_sizes("key", key, {key.size(0), query.size(1), width});
    check_sizes("value", value, key.sizes());
  } else {
    const auto columns = [](const at::Tensor& weight) {
      return weight.defined() && weight.dim() == 2 ? weight.size(1) : 0;
    };
    check_sizes("q_proj_weight", a.q_proj_weight, {width, width});
    check_sizes("k_proj_weight", a.k_proj_weight, {width, columns(a.k_proj_weight)});
    check_sizes("v_proj_weight", a.v_proj_weight, {width, columns(a.v_proj_weight)});
    check_sizes("key", key, {key.size(0), query.size(1), columns(a.k_proj_weight)});
    check_sizes("value", value, {key.size(0), query.size(1), columns(a.v_proj_weight)});
  }
  if (a.in_proj_bias.defined()) check_sizes("in_proj_bias", a.in_proj_bias, {3 * width});
  if (a.out_proj_bias.defined()) check_sizes("out_proj_bias", a.out_proj_bias, {width});
  if (a.bias_k.defined() || a.bias_v.defined()) {
    check_sizes("bias_k", a.bias_k, {1, 1, width});
    check_sizes("bias_v", a.bias_v, {1, 1, width});
  }
  TORCH_CHECK_VALUE(a.dropout_p >= 0 && a.dropout_p <= 1, "dropout_p: got ", a.dropout_p, "; allowed: 0 <= p <= 1");
  if (at::autocast::is_autocast_enabled(query.device().type())) return;
  for (const auto& [name, t, dims] : inputs) {
    TORCH_CHECK_VALUE(t.scalar_type() == a.out_proj_weight.scalar_type(), name, ": got ", t.scalar_type(),
                      "; allowed: ", a.out_proj_weight.scalar_type(), ", as the parameters");
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> project_in(const at::Tensor& query, const at::Tensor& key,
                                                          const at::Tensor& value, const MultiheadArguments& a) {
  namespace F = torch::nn::functional;
  at::Tensor wq = a.q_proj_weight, wk = a.k_proj_weight, wv = a.v_proj_weight, bq, bk, bv;
  if (a.in_proj_weight.defined()) {
    if (query.is_same(key) && key.is_same(value)) {  // self-attention: one product
      const auto parts = F::linear(query, a.in_proj_weight, a.in_proj_bias).chunk(3, -1);
      return {parts[0], parts[1], parts[2]};
    }
    const auto parts = a.in_proj_weight.chunk(3, 0);
    wq = parts[0], wk = parts[1], wv = parts[2];
  }
  if (a.in_proj_bias.defined()) {
    const auto parts = a.in_proj_bias.chunk(3, 0);
    bq = parts[0], bk = parts[1], bv = parts[2];
  }
  return {F::linear(query, wq, bq), F::linear(key, wk, bk), F::linear(value, wv, bv)};
}

// Projections, masks, extra keys and weights around `attend`: (q, k, v, options) -> (out, lse); `weigh`: (q, k,
// options)
// -> weights [N, H, L, S].
template <class Attend, class Weigh>
std::tuple<at::Tensor, at::Tensor> multi_head(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                              const MultiheadArguments& a, const Attend& attend, const Weigh& weigh) {
  check_multi_head(query, key, value, a);
  const int64_t heads = a.num_heads;
  const bool drops_all = a.dropout_p == 1;  // for which there is no 1 / (1 - p)
  auto [q, k, v] = project_in(query, key, value, a);
  const auto split = [&](const at::Tensor& t) {  // [S, N, E] -> [N, S, H, D], a view
    return t.unflatten(-1, {heads, t.size(-1) / heads}).transpose(0, 1);
  };
  q = split(q), k = split(k), v = split(v);
  const int64_t batch = q.size(0), rows = q.size(1), keys = k.size(1);
  const double scale = 1 / std::sqrt(static_cast<double>(q.size(3)));
  const at::ScalarType exact = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;

  OptionArguments options;
  if (a.causal) options.causal = true;
  options.attn_bias = maybe(bias_of(a, batch, rows, keys, exact));
  options.dropout_p = drops_all ? 0 : a.dropout_p;
  // A key of zeros has score 0 and adds nothing but to the denominator: a sink.
  if (a.add_zero_attn) options.sinks = at::zeros({heads}, q.options().dtype(at::kFloat));
  auto [out, lse] = attend(q, k, v, options);  // [N, L, H, D], [N, H, L]

  at::Tensor added;  // [N, H, L]: weight of the key that is bias_k
  if (a.bias_k.defined()) {
    // One more key, which the pattern does not know: joined to the rest by its own score.
    const at::Tensor bias_k = a.bias_k.view({heads, -1}), bias_v = a.bias_v.view({heads, -1});
    const at::Tensor score = (q * bias_k).sum(-1, false, exact).transpose(1, 2) * scale;  // [N, H, L]
    // Where a row sees no other key, lse is -inf, or 0 where there is a sink (which counts where a key is seen).
    if (a.add_zero_attn) lse = at::where(lse == -std::numeric_limits<double>::infinity(), at::zeros_like(lse), lse);
    added = at::sigmoid(score - lse);
    const at::Tensor weight = added.transpose(1, 2).unsqueeze(-1).to(out.scalar_type());  // [N, L, H, 1]
    out = out * (1 - weight) + at::dropout(weight, a.dropout_p, a.dropout_p > 0) * bias_v;
  }
  if (drops_all) out = out * 0;
  const at::Tensor joined = out.transpose(0, 1).flatten(2);  // [L, N, E]
  const at::Tensor output = torch::nn::functional::linear(joined, a.out_proj_weight, a.out_proj_bias);
  if (!a.need_weights) return {output, at::Tensor()};

  const at::NoGradGuard no_grad;
  at::Tensor weights = weigh(q, k, options);
  if (added.defined()) {
    weights = weights * (1 - added).unsqueeze(-1);
    weights = at::cat({weights, added.unsqueeze(-1)}, -1);
  }
  if (a.add_zero_attn) weights = at::cat({weights, 1 - weights.sum(-1, true)}, -1);
  weights = weights.to(q.scalar_type());
  return {output, a.average_attn_weights ? weights.mean(1) : weights};
}

}  // namespace

PatternTensors pattern_tensors(const BlockPattern& pattern) { return ops::tensors_of(pattern); }

std::tuple<at::Tensor, at::Tensor> block_sparse_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                          const PatternTensors& pattern,
                                                          const OptionArguments& options) {
  return attend("tessera::forward", q, k, v, pattern, drawn(options));
}

std::tuple<at::Tensor, at::Tensor> dilated_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                     const Dilation& dilation, const OptionArguments& options) {
  OptionArguments o = drawn(options);
  if (dilation.pattern && dilation.pattern->causal && !o.causal) o.causal = true;
  return attend("tessera::dilated_forward", q, k, v, ops::DilationArguments::of(dilation, o.causal.value_or(false)), o);
}

std::tuple<at::Tensor, at::Tensor> varlen_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                    const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k,
                                                    const std::vector<PatternTensors>& patterns,
                                                    const OptionArguments& options) {
  TORCH_CHECK_VALUE(!options.q_offset && options.k_offset == 0 && !options.key_lengths && !options.block_bias &&
                        !options.attn_bias && !options.align_to_key_lengths,
                    "options: got positions, key_lengths or a bias; allowed: none of them with packed sequences");
  return attend("tessera::varlen_forward", q, k, v, cu_seqlens_q, cu_seqlens_k, ops::PatternLists::of(patterns),
                ops::PackedOptions{drawn(options)});
}

std::tuple<at::Tensor, at::Tensor> decode(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                          const PatternTensors& pattern, const OptionArguments& options,
                                          const at::Tensor& page_table) {
  OptionArguments o = drawn(options);
  o.align_to_key_lengths = o.key_lengths.has_value();
  return attend("tessera::decode", q, k, v, pattern, maybe(page_table), o);
}

std::tuple<at::Tensor, at::Tensor> merge(const at::Tensor& out_a, const at::Tensor& lse_a, const at::Tensor& out_b,
                                         const at::Tensor& lse_b) {
  return attend("tessera::merge", out_a, lse_a, out_b, lse_b);
}

at::Tensor attention_weights(const at::Tensor& q, const at::Tensor& k, const PatternTensors& pattern,
                             const OptionArguments& options) {
  const at::NoGradGuard no_grad;
  OptionArguments o = options;
  o.dropout_p = 0;
  const at::Tensor query = q.detach(), key = k.detach();
  const PatternShape shape = ops::translate_errors([&] { return ops::shape_of("pattern", pattern.shape); });
  auto [indices, values] = attend("tessera::weights", query, key, pattern, o);
  const int64_t block_q = values.size(1), block_k = values.size(2);
  const int64_t batch = q.size(0), heads = q.size(2), seqlen_q = q.size(1), seqlen_k = k.size(1);
  const int64_t rows = shape.rows(), cols = shape.cols(), skip = shape.q_skip;
  at::Tensor dense = at::zeros({batch, heads, rows, block_q, cols, block_k}, values.options());
  const auto at_column = [&](int64_t i) { return std::optional<at::Tensor>(indices.select(1, i)); };
  // A first row that begins inside its block: its queries stand at the end of it.
  const at::Tensor first = (indices.select(1, 2) == 0).view({-1, 1, 1});
  if (skip > 0) values = at::where(first, values.roll(skip, 1), values);
  dense.permute({0, 1, 2, 4, 3, 5}).index_put_({at_column(0), at_column(1), at_column(2), at_column(3)}, values);
  return dense.view({batch, heads, rows * block_q, cols * block_k})
      .slice(2, skip, skip + seqlen_q)
      .slice(3, 0, seqlen_k);
}

std::tuple<at::Tensor, at::Tensor> multi_head_attention(const at::Tensor& query, const at::Tensor& key,
                                                        const at::Tensor& value, const PatternTensors& pattern,
                                                        const MultiheadArguments& arguments) {
  return multi_head(
      query, key, value, arguments,
      [&](const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionArguments& o) {
        return block_sparse_attention(q, k, v, pattern, o);
      },
      [&](const at::Tensor& q, const at::Tensor& k, const OptionArguments& o) {
        return attention_weights(q, k, pattern, o);
      });
}

std::tuple<at::Tensor, at::Tensor> multi_head_attention(const at::Tensor& query, const at::Tensor& key,
                                                        const at::Tensor& value, const Dilation& dilation,
                                                        const MultiheadArguments& arguments) {
  TORCH_CHECK_VALUE(!arguments.need_weights, "need_weights: got true; allowed: false over segments");
  TORCH_CHECK_VALUE(!arguments.add_zero_attn, "add_zero_attn: got true; allowed: false over segments");
  return multi_head(
      query, key, value, arguments,
      [&](const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionArguments& o) {
        return dilated_attention(q, k, v, dilation, o);
      },
      [](const at::Tensor&, const at::Tensor&, const OptionArguments&) { return at::Tensor(); });
}

}  // namespace tessera::nn::functional
