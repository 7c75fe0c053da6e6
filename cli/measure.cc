#include "measure.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <string>

#include <sys/resource.h>

namespace tessera::cli {
namespace {

constexpr double kShortestSample = 5e-3;  // seconds

int64_t proc_field(const char* path, const std::string& key, int64_t unit) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (line.rfind(key, 0) == 0) return std::strtoll(line.c_str() + key.size(), nullptr, 10) * unit;
  }
  return 0;
}

}  // namespace

double time_once(const std::function<void()>& call) {
  const auto start = std::chrono::steady_clock::now();
  call();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

Timing time_calls(int repeat, const std::function<void()>& call) {
  call();
  const double first = std::max(1e-9, time_once(call));
  const int inner = std::max(1, static_cast<int>(std::ceil(kShortestSample / first)));
  std::vector<double> samples;
  for (int i = 0; i < repeat; ++i) {
    samples.push_back(time_once([&] {
                        for (int j = 0; j < inner; ++j) call();
                      }) /
                      inner);
  }
  std::sort(samples.begin(), samples.end());
  const size_t n = samples.size();
  return {(samples[(n - 1) / 2] + samples[n / 2]) / 2, samples.front(), samples.back()};
}

double forward_flops(int64_t pairs, int64_t head_dim, int64_t head_dim_v) {
  return 2.0 * static_cast<double>(pairs) * static_cast<double>(head_dim + head_dim_v);
}

double backward_flops(int64_t pairs, int64_t head_dim, int64_t head_dim_v) {
  return static_cast<double>(pairs) * static_cast<double>(6 * head_dim + 4 * head_dim_v);
}

double dilated_density(int64_t pairs, int64_t seqlen, bool causal, int64_t batch, int64_t heads) {
  const double n = static_cast<double>(seqlen), all = causal ? n * (n + 1) / 2 : n * n;
  return all > 0 ? static_cast<double>(pairs) / (all * static_cast<double>(batch * heads)) : 0;
}

int64_t kept_kv_bytes(const BlockPattern& pattern, int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_dim,
                      int64_t head_dim_v, DType dtype) {
  const BlockPatternView p = pattern.view();
  const int64_t rows = p.shape.rows(), cols = p.shape.cols(), group = heads / kv_heads;
  int64_t keys = 0;
  std::vector<char> used(cols);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t kv_head = 0; kv_head < kv_heads; ++kv_head) {
      std::fill(used.begin(), used.end(), 0);
      for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
        const int64_t first = p.row_id(b, h, 0);
        for (int64_t e = p.indptr[first]; e < p.indptr[first + rows]; ++e) used[p.indices[e]] = 1;
      }
      for (int64_t j = 0; j < cols; ++j) {
        if (used[j]) keys += std::min<int64_t>(p.shape.block_k, p.shape.seqlen_k - j * p.shape.block_k);
      }
    }
  }
  return keys * (head_dim + head_dim_v) * static_cast<int64_t>(size_of(dtype));
}

void reset_peak_rss() {
  // Linux 4.0: "5" resets VmHWM. Where it is not permitted, the peak is that of the whole process so far.
  std::ofstream("/proc/self/clear_refs") << "5";
}

int64_t peak_rss_bytes() {
  const int64_t bytes = proc_field("/proc/self/status", "VmHWM:", 1024);
  if (bytes > 0) return bytes;
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<int64_t>(usage.ru_maxrss) * 1024;
}

int64_t available_memory_bytes() { return proc_field("/proc/meminfo", "MemAvailable:", 1024); }

std::string cpu_model() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("model name", 0) != 0) continue;
    const size_t colon = line.find(": ");
    if (colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown";
}

namespace {

// Everything but what the attention attends to.
template <class Call>
void prepare(Call& call, const Qkv& x, const AttentionOptions& options, Isa isa) {
  call.out = Tensor(x.q.dtype(), x.out_shape());
  call.lse = Tensor(DType::f32, {x.batch(), x.heads(), x.seqlen_q()});
  call.args.q = x.q_view();
  call.args.k = x.k_view();
  call.args.v = x.v_view();
  call.args.out = x.as_bshd(call.out);
  call.args.lse = call.lse.view();
  call.args.options = options;
  call.args.isa = isa;
}

}  // namespace

ForwardCall::ForwardCall(const Qkv& x, BlockPattern pattern, AttentionOptions options, Isa isa) {
  prepare(*this, x, options, isa);
  args.pattern = std::move(pattern);
}

DilatedCall::DilatedCall(const Qkv& x, Dilation dilation, AttentionOptions options, Isa isa) {
  prepare(*this, x, options, isa);
  args.dilation = std::move(dilation);
}

namespace {

template <class Call, class Forward>
void prepare_backward(Call& call, const Forward& forward, const Qkv& x, const Tensor& dout) {
  call.dq = Tensor(x.q.dtype(), x.q.shape());
  call.dk = Tensor(x.k.dtype(), x.k.shape());
  call.dv = Tensor(x.v.dtype(), x.v.shape());
  call.args.q = forward.args.q;
  call.args.k = forward.args.k;
  call.args.v = forward.args.v;
  call.args.out = forward.args.out;
  call.args.lse = forward.args.lse;
  call.args.dout = x.as_bshd(dout);
  call.args.dq = x.as_bshd(call.dq);
  call.args.dk = x.as_bshd(call.dk);
  call.args.dv = x.as_bshd(call.dv);
  call.args.options = forward.args.options;
  call.args.isa = forward.args.isa;
}

}  // namespace

BackwardCall::BackwardCall(const ForwardCall& forward, const Qkv& x, const Tensor& dout) {
  prepare_backward(*this, forward, x, dout);
  args.pattern = forward.args.pattern;
}

DilatedBackwardCall::DilatedBackwardCall(const DilatedCall& forward, const Qkv& x, const Tensor& dout) {
  prepare_backward(*this, forward, x, dout);
  args.dilation = forward.args.dilation;
}

template <class Backward, class Forward>
void PassCall::set_up(const Qkv& x, const Tensor* dout, std::shared_ptr<Forward> forward, Executor& executor) {
  forward_ = [forward](Executor& e) { return (*forward)(e); };
  if (pass_ != Pass::backward) flops_ += forward_flops(pairs_, x.head_dim(), x.head_dim_v());
  if (pass_ == Pass::forward) return;
  flops_ += backward_flops(pairs_, x.head_dim(), x.head_dim_v());
  forward_(executor);
  backward_ = [call = std::make_shared<Backward>(*forward, x, *dout)](Executor& e) { return (*call)(e); };
}

PassCall::PassCall(Pass pass, const Qkv& x, const Tensor* dout, BlockPattern pattern, AttentionOptions options, Isa isa,
                   Executor& executor)
    : pass_(pass), pairs_(admitted_pairs(pattern, options, x.batch(), x.heads())) {
  set_up<BackwardCall>(x, dout, std::make_shared<ForwardCall>(x, std::move(pattern), options, isa), executor);
}

PassCall::PassCall(Pass pass, const Qkv& x, const Tensor* dout, Dilation dilation, AttentionOptions options, Isa isa,
                   Executor& executor)
    : pass_(pass), pairs_(dilated_pairs(x.seqlen_q(), dilation, options, x.batch(), x.heads())) {
  set_up<DilatedBackwardCall>(x, dout, std::make_shared<DilatedCall>(x, std::move(dilation), options, isa), executor);
}

PassCall::Info PassCall::operator()(Executor& executor) {
  Info info;
  if (pass_ != Pass::backward) {
    const ForwardInfo f = forward_(executor);
    info = {f.isa, f.scratch_bytes};
  }
  if (backward_) {
    const BackwardInfo b = backward_(executor);
    info = {b.isa, std::max(info.scratch_bytes, b.scratch_bytes)};
  }
  return info;
}

namespace {

// Compares out and lse of a call with what `reference` makes of the same call in fp64.
template <class Args, class Reference>
ReferenceError compare_outputs(const Args& a, Reference reference) {
  const int64_t batch = a.q.sizes[0], seqlen = a.q.sizes[1], heads = a.q.sizes[2], dim = a.v.sizes[3];
  Tensor out(DType::f64, {batch, seqlen, heads, dim}), lse(DType::f64, {batch, heads, seqlen});
  std::vector<float> out_bound(out.numel()), lse_bound(lse.numel());
  Args wide = a;
  wide.out = out.view();
  wide.lse = lse.view();
  reference(wide, out_bound.data(), lse_bound.data());

  ReferenceError result;
  const auto compare = [&](double got, double want, double bound, double& error, double& ratio) {
    if (std::isnan(want) ? std::isnan(got) : got == want) return;
    const double difference = std::abs(got - want);
    if (!(difference <= bound)) result.passed = false;  // also when difference is NaN
    if (std::isnan(difference)) return;
    if (!(difference <= error)) error = difference;  // a NaN, too
    ratio = std::max(ratio, bound > 0 ? difference / bound : std::numeric_limits<double>::infinity());
  };
  const double* want = static_cast<const double*>(out.data());
  for (int64_t b = 0, i = 0; b < batch; ++b) {
    for (int64_t s = 0; s < seqlen; ++s) {
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t row = b * a.out.strides[0] + s * a.out.strides[1] + h * a.out.strides[2];
        for (int64_t d = 0; d < dim; ++d, ++i) {
          compare(load_as_double(a.out.data, a.out.dtype, row + d), want[i], out_bound[i], result.out_error,
                  result.out_ratio);
        }
      }
    }
  }
  want = static_cast<const double*>(lse.data());
  for (int64_t i = 0; i < lse.numel(); ++i) {
    compare(load_as_double(a.lse.data, a.lse.dtype, i), want[i], lse_bound[i], result.lse_error, result.lse_ratio);
  }
  return result;
}

}  // namespace

ReferenceError compare_to_reference(const ForwardCall& call, Executor& executor) {
  return compare_outputs(call.args, [&](const ForwardArgs& args, float* out_bound, float* lse_bound) {
    reference_forward(args, executor, out_bound, lse_bound);
  });
}

ReferenceError compare_to_reference(const DilatedCall& call, Executor& executor) {
  return compare_outputs(call.args, [&](const DilatedForwardArgs& wide, float* out_bound, float* lse_bound) {
    reference_dilated_forward(wide, executor, out_bound, lse_bound);
  });
}

}  // namespace tessera::cli
