// The backward call of a case: its memory.
#include <algorithm>
#include <cmath>
#include <limits>

#include "call/pair_mask.h"
#include "check/cases.h"

namespace tessera::check {

namespace {

// Some key of the row has a weight above 0: admitted, and not -inf by its bias.
bool sees_a_key(const Problem& p, const PairMask& mask, int64_t b, int64_t h, int64_t q) {
  bool any = false;
  mask.for_each_pair(h, q, [&](int64_t, int64_t k) { any = any || admits_by_bias(p, b, h, q, k); });
  return any;
}

}  // namespace

bool admits_by_bias(const Problem& p, int64_t b, int64_t h, int64_t q, int64_t k) {
  if (p.attn_bias == nullptr) return true;
  const int64_t* stride = p.attn_bias_stride;
  const int64_t at = b * stride[0] + h * stride[1] + q * stride[2] + k * stride[3];
  return load_as_double(p.attn_bias, p.attn_bias_dtype, at) != -std::numeric_limits<double>::infinity();
}

void Case::make_backward() {
  const CaseConfig& c = config_;
  const bool varlen = c.path == CheckPath::varlen;
  const int64_t batch = q_.view.sizes[0], seqlen_q = q_.view.sizes[1], seqlen_k = k_.view.sizes[1];
  dout_ = tensor(c.dtype, {batch, seqlen_q, c.heads, c.head_dim_v}, false, true);
  if (c.dlse) dlse_ = tensor(DType::f32, {batch, c.heads, seqlen_q}, false, false);
  std::array<Tensor, kGradients>& g = gradients_;
  const bool accumulate = c.accumulate && !varlen;
  const DType dtype = accumulate ? DType::f32 : c.gradient_dtype;
  if (c.dq) g[kDq] = tensor(dtype, {batch, seqlen_q, c.heads, c.head_dim}, true, false);
  if (c.dk) g[kDk] = tensor(dtype, {batch, seqlen_k, c.kv_heads, c.head_dim}, true, false);
  if (c.dv) g[kDv] = tensor(dtype, {batch, seqlen_k, c.kv_heads, c.head_dim_v}, true, false);
  if (c.block_bias && c.dblock_bias) {
    const auto& n = block_bias_.view.sizes;
    g[kDBlockBias] = tensor(DType::f32, {n[0], n[1], n[2]}, true, false);
  }
  if (c.attn_bias && c.dattn_bias) {
    const auto& n = attn_bias_.view.sizes;
    g[kDAttnBias] = tensor(c.dattn_bias_fp32 ? DType::f32 : c.attn_bias_dtype, {n[0], n[1], n[2], n[3]}, true, false);
  }
  if (c.sinks && c.dsinks) g[kDSinks] = tensor(DType::f32, {c.heads}, true, false);
  for (const int i : {kDq, kDk, kDv}) {
    if (accumulate) fill(g[i], [&] { return random_.normal(); });
  }
  for (int i = 0; i < kGradients; ++i) before_[i] = g[i].memory;

  if (c.path == CheckPath::dilated) {
    make_dilated_backward();
  } else if (varlen) {
    VarlenBackwardArgs& a = varlen_backward_;
    a.q = varlen_.q;
    a.k = varlen_.k;
    a.v = varlen_.v;
    a.out = varlen_.out;
    a.lse = varlen_.lse;
    a.dout = squeeze_batch<TensorView>(dout_.view);
    a.dlse = squeeze_batch<TensorView>(dlse_.view);
    a.dq = squeeze_batch(g[kDq].view);
    a.dk = squeeze_batch(g[kDk].view);
    a.dv = squeeze_batch(g[kDv].view);
    a.dsinks = g[kDSinks].view;
    a.cu_seqlens_q = cu_seqlens_q_;
    a.cu_seqlens_k = cu_seqlens_k_;
    a.patterns = patterns_;
    a.options = options_;
    backward_problems_ = resolve_backward_varlen(a);
  } else {
    BackwardArgs& a = backward_;
    a.q = args_.q;
    a.k = args_.k;
    a.v = args_.v;
    a.pattern = args_.pattern;
    a.out = args_.out;
    a.lse = args_.lse;
    a.dout = dout_.view;
    a.dlse = dlse_.view;
    a.dq = g[kDq].view;
    a.dk = g[kDk].view;
    a.dv = g[kDv].view;
    a.accumulate = accumulate;
    a.dblock_bias = g[kDBlockBias].view;
    a.dattn_bias = g[kDAttnBias].view;
    a.dsinks = g[kDSinks].view;
    a.options = options_;
    backward_problems_.push_back(resolve_backward(a));
  }
  fill_backward();
}

void Case::fill_backward() {
  const bool denormal = config_.values == Values::denormal && random_.chance(0.5);
  struct Row {
    const BackwardProblem* problem;
    int64_t b, q, h;
  };
  std::vector<Row> seen;
  for (const BackwardProblem& bp : backward_problems_) {
    const Problem& p = bp.forward;
    for (int64_t b = 0; b < p.batch; ++b) {
      const PairMask mask(p, b);
      for (int64_t h = 0; h < p.heads; ++h) {
        for (int64_t q = 0; q < p.seqlen_q; ++q) {
          if (!sees_a_key(p, mask, b, h, q)) continue;
          char* row = bp.dout.at(b, q, h, size_of(p.dtype));
          for (int64_t i = 0; i < p.head_dim_v; ++i) {
            const double x = random_.normal();
            store_from_double(row, p.dtype, i, denormal ? x * (p.dtype == DType::f16 ? 0x1p-18 : 0x1p-130) : x);
          }
          if (bp.dlse.data) store_from_double(bp.dlse.at(b, q, h, sizeof(float)), DType::f32, 0, random_.normal());
          seen.push_back({&bp, b, q, h});
        }
      }
    }
  }
  if (!config_.visible_nan || !config_.nan_in_dout || seen.empty()) return;
  const Row& row = seen[random_.below(static_cast<int64_t>(seen.size()))];
  store_from_double(
      row.problem->dout.at(row.b, row.q, row.h, size_of(config_.dtype)), config_.dtype,
      random_.below(config_.head_dim_v),
      random_.chance(0.5) ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity());
}

BackwardInfo Case::run_backward(Isa isa, Executor& executor) {
  for (int i = 0; i < kGradients; ++i) std::copy(before_[i].begin(), before_[i].end(), gradients_[i].memory.begin());
  if (config_.path == CheckPath::varlen) {
    varlen_backward_.isa = isa;
    return backward_varlen(varlen_backward_, executor);
  }
  if (config_.path == CheckPath::dilated) {
    dilated_backward_.isa = isa;
    return dilated_backward(dilated_backward_, executor);
  }
  backward_.isa = isa;
  return backward(backward_, executor);
}

double Case::before(int g, int64_t offset) const {
  const bool accumulates = (backward_.accumulate || dilated_backward_.accumulate) && g <= kDv;
  return accumulates ? load_as_double(before_[g].data() + offset, gradients_[g].view.dtype, 0) : 0;
}

bool Case::gradient_surroundings_intact() const {
  return std::all_of(gradients_.begin(), gradients_.end(), [](const Tensor& t) { return intact(t); });
}

std::vector<std::byte> Case::gradient_memory() const {
  std::vector<std::byte> all;
  for (const Tensor& t : gradients_) all.insert(all.end(), t.memory.begin(), t.memory.end());
  return all;
}

}  // namespace tessera::check
