#include "modules.h"

#include <torch/nn/init.h>

#include <cmath>
#include <ostream>
#include <string>
#include <utility>

namespace tessera::nn {

PatternSource::PatternSource(const PatternSpec& spec) : spec_(spec), last_(std::make_shared<Last>()) {}

ops::PatternTensors PatternSource::get(int64_t seqlen_q, int64_t seqlen_k) const {
  // Nobody waits for the lock: who finds it taken (in a child forked at that moment it stays so for ever) makes its
  // own.
  if (const std::unique_lock lock(last_->mutex, std::try_to_lock);
      lock && last_->seqlen_q == seqlen_q && last_->seqlen_k == seqlen_k) {
    return last_->tensors;
  }
  PatternSpec spec = spec_;
  spec.seqlen_q = seqlen_q;
  spec.seqlen_k = seqlen_k;
  ops::PatternTensors made = ops::translate_errors([&] { return functional::pattern_tensors(make_pattern(spec)); });
  if (const std::unique_lock lock(last_->mutex, std::try_to_lock); lock) {
    last_->tensors = made;
    last_->seqlen_q = seqlen_q;
    last_->seqlen_k = seqlen_k;
  }
  return made;
}

namespace {

void check_rank(const char* name, const at::Tensor& t, int64_t rank, const char* dims) {
  TORCH_CHECK_VALUE(t.dim() == rank, name, ": got ", t.dim(), " dimensions; allowed: ", dims);
}

void check_dropout(double p, double most, const char* allowed) {
  TORCH_CHECK_VALUE(p >= 0 && p <= most, "dropout: got ", p, "; allowed: ", allowed);
}

bool is_causal(const PatternSpec& spec) { return spec.causal || spec.kind == PatternKind::causal; }

// The pattern inside segments; all pairs of a segment need none.
Dilation dilation_of(const std::vector<int64_t>& segment_lengths, const std::vector<int64_t>& dilation_rates,
                     const PatternSpec& pattern) {
  Dilation dilation;
  dilation.segment_lengths = segment_lengths;
  dilation.dilation_rates = dilation_rates;
  if (pattern.kind != PatternKind::dense && pattern.kind != PatternKind::causal) dilation.pattern = pattern;
  return dilation;
}

}  // namespace

BlockSparseAttentionImpl::BlockSparseAttentionImpl(BlockSparseAttentionOptions options_)
    : options(std::move(options_)), pattern_(options.pattern) {
  check_dropout(options.dropout, std::nextafter(1.0, 0.0), "0 <= dropout < 1");
}

void BlockSparseAttentionImpl::pretty_print(std::ostream& stream) const {
  stream << "tessera::nn::BlockSparseAttention(pattern=" << name_of(options.pattern.kind)
         << ", block=" << options.pattern.block_q << "x" << options.pattern.block_k << ", causal=" << std::boolalpha
         << is_causal(options.pattern);
  if (!options.segment_lengths.empty()) {
    stream << ", segment_lengths=" << options.segment_lengths << ", dilation_rates=" << options.dilation_rates;
  }
  stream << ")";
}

at::Tensor BlockSparseAttentionImpl::forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                             const at::Tensor& key_lengths) {
  check_rank("q", q, 4, "[B, Sq, H, D]");
  check_rank("k", k, 4, "[B, Sk, Hkv, D]");
  ops::OptionArguments o;
  o.scale = options.scale;
  if (is_causal(options.pattern)) o.causal = true;
  o.window_left = options.window_left;
  o.window_right = options.window_right;
  o.softcap = options.softcap;
  o.dropout_p = is_training() ? options.dropout : 0;
  if (key_lengths.defined()) o.key_lengths = key_lengths;
  if (!options.segment_lengths.empty() || !options.dilation_rates.empty()) {
    const Dilation dilation = dilation_of(options.segment_lengths, options.dilation_rates, options.pattern);
    return std::get<0>(functional::dilated_attention(q, k, v, dilation, o));
  }
  return std::get<0>(functional::block_sparse_attention(q, k, v, pattern_.get(q.size(1), k.size(1)), o));
}

MultiheadAttentionImpl::MultiheadAttentionImpl(const torch::nn::MultiheadAttentionOptions& options_,
                                               const PatternSpec& pattern, std::vector<int64_t> segment_lengths_,
                                               std::vector<int64_t> dilation_rates_)
    : options(options_),
      segment_lengths(std::move(segment_lengths_)),
      dilation_rates(std::move(dilation_rates_)),
      pattern_(pattern) {
  MultiheadAttentionImpl::reset();
}

void MultiheadAttentionImpl::reset() {
  const int64_t dim = options.embed_dim(), heads = options.num_heads();
  TORCH_CHECK_VALUE(heads > 0 && dim > 0 && dim % heads == 0, "embed_dim: got ", dim, " for ", heads,
                    " heads; allowed: positive, a multiple of num_heads");
  for (const auto& [name, width] : {std::pair{"kdim", options.kdim()}, std::pair{"vdim", options.vdim()}}) {
    TORCH_CHECK_VALUE(width > 0, name, ": got ", width, "; allowed: positive");
  }
  check_dropout(options.dropout(), 1, "0 <= dropout <= 1");
  const bool one_weight = options.kdim() == dim && options.vdim() == dim;
  const auto parameter = [&](const char* name, bool present, at::IntArrayRef sizes) {
    return present ? register_parameter(name, torch::empty(sizes)) : register_parameter(name, {}, false);
  };
  in_proj_weight = parameter("in_proj_weight", one_weight, {3 * dim, dim});
  q_proj_weight = parameter("q_proj_weight", !one_weight, {dim, dim});
  k_proj_weight = parameter("k_proj_weight", !one_weight, {dim, options.kdim()});
  v_proj_weight = parameter("v_proj_weight", !one_weight, {dim, options.vdim()});
  in_proj_bias = parameter("in_proj_bias", options.bias(), {3 * dim});
  out_proj = register_module("out_proj", torch::nn::Linear(torch::nn::LinearOptions(dim, dim).bias(options.bias())));
  bias_k = parameter("bias_k", options.add_bias_kv(), {1, 1, dim});
  bias_v = parameter("bias_v", options.add_bias_kv(), {1, 1, dim});
  for (at::Tensor* weight : {&in_proj_weight, &q_proj_weight, &k_proj_weight, &v_proj_weight}) {
    if (weight->defined()) torch::nn::init::xavier_uniform_(*weight);
  }
  for (at::Tensor* bias : {&in_proj_bias, &out_proj->bias}) {
    if (bias->defined()) torch::nn::init::constant_(*bias, 0);
  }
  for (at::Tensor* extra : {&bias_k, &bias_v}) {
    if (extra->defined()) torch::nn::init::xavier_normal_(*extra);
  }
}

std::tuple<at::Tensor, at::Tensor> MultiheadAttentionImpl::forward(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& key_padding_mask,
    std::optional<bool> need_weights, const at::Tensor& attn_mask, bool average_attn_weights) {
  check_rank("query", query, 3, "[L, N, embed_dim]");
  check_rank("key", key, 3, "[S, N, kdim]");
  check_rank("value", value, 3, "[S, N, vdim]");
  functional::MultiheadArguments a;
  a.num_heads = options.num_heads();
  a.in_proj_weight = in_proj_weight;
  a.q_proj_weight = q_proj_weight;
  a.k_proj_weight = k_proj_weight;
  a.v_proj_weight = v_proj_weight;
  a.in_proj_bias = in_proj_bias;
  a.bias_k = bias_k;
  a.bias_v = bias_v;
  a.add_zero_attn = options.add_zero_attn();
  a.out_proj_weight = out_proj->weight;
  a.out_proj_bias = out_proj->bias;
  a.dropout_p = is_training() ? options.dropout() : 0;
  a.key_padding_mask = key_padding_mask;
  a.attn_mask = attn_mask;
  a.causal = is_causal(pattern_.spec());
  const PatternKind kind = pattern_.spec().kind;
  const bool dense = (kind == PatternKind::dense || kind == PatternKind::causal) && segment_lengths.empty();
  a.need_weights = need_weights.value_or(dense);
  a.average_attn_weights = average_attn_weights;
  if (!segment_lengths.empty() || !dilation_rates.empty()) {
    const Dilation dilation = dilation_of(segment_lengths, dilation_rates, pattern_.spec());
    return functional::multi_head_attention(query, key, value, dilation, a);
  }
  return functional::multi_head_attention(query, key, value, pattern_.get(query.size(0), key.size(0)), a);
}

}  // namespace tessera::nn
