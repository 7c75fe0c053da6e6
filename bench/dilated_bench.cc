// Dilated attention on strided views against the same work as plain calls on contiguous copies, which are made
// beforehand and not counted (bar: at most 1.15 x the time). Segments 2048,4096,8192 with rates 1,2,4; 8,192 tokens,
// 8 heads, head dim 64, one thread.
#include <benchmark/benchmark.h>

#include <cmath>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "tessera/dilated.h"
#include "tessera/io.h"

namespace tessera {
namespace {

constexpr int64_t kTokens = 8192, kHeads = 8, kDim = 64;
constexpr int64_t kSegments[] = {2048, 4096, 8192}, kRates[] = {1, 2, 4};

enum class Pass { forward, backward };

struct Config {
  Pass pass;
  DType dtype;
  Layout layout;
  bool causal;
};

Tensor random_tensor(DType dtype, std::vector<int64_t> sizes, uint64_t seed) {
  Tensor t(dtype, std::move(sizes));
  uint64_t state = seed * 2654435761u + 1;
  for (int64_t i = 0; i < t.numel(); ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    store_from_double(t.data(), dtype, i, static_cast<double>(static_cast<int64_t>(state) >> 11) * 0x1p-52);
  }
  return t;
}

// q, k, v, results, gradients of a call over [B, S, H, D].
struct Tensors {
  Layout layout;
  int64_t batch, seqlen, heads;
  Tensor q, k, v, out, dout, dq, dk, dv, lse;

  Tensors(const Config& c, int64_t batch, int64_t seqlen, int64_t heads)
      : layout(c.layout), batch(batch), seqlen(seqlen), heads(heads), lse(DType::f32, {batch, heads, seqlen}) {
    uint64_t seed = 0;
    for (Tensor* t : {&q, &k, &v, &out, &dout}) *t = random_tensor(c.dtype, {batch, seqlen, heads, kDim}, ++seed);
    if (c.pass == Pass::forward) return;
    for (Tensor* t : {&dq, &dk, &dv}) *t = Tensor(DType::f32, {batch, seqlen, heads, kDim});
  }
  MutableTensorView view(Tensor& t) const {
    return t.numel() == 0 ? MutableTensorView{}
                          : attention_view(t.data(), t.dtype(), layout, batch, seqlen, heads, kDim);
  }
  template <class Args>
  Args args(bool causal) {
    Args a;
    a.q = view(q);
    a.k = view(k);
    a.v = view(v);
    a.out = view(out);
    a.lse = lse.view();
    a.options.causal = causal;
    if constexpr (requires { a.dout; }) {
      a.dout = view(dout);
      a.dq = view(dq);
      a.dk = view(dk);
      a.dv = view(dv);
    }
    return a;
  }
};

void dilated(benchmark::State& state, Config c) {
  InlineExecutor executor;
  Tensors t(c, 1, kTokens, kHeads);
  auto forward_args = t.args<DilatedForwardArgs>(c.causal);
  forward_args.dilation = {kSegments, kRates};
  dilated_forward(forward_args, executor);
  auto backward_args = t.args<DilatedBackwardArgs>(c.causal);
  backward_args.dilation = forward_args.dilation;
  for (auto _ : state) {
    if (c.pass == Pass::forward) dilated_forward(forward_args, executor);
    else dilated_backward(backward_args, executor);
  }
}

void copies(benchmark::State& state, Config c) {
  InlineExecutor executor;
  std::vector<std::unique_ptr<Tensors>> all;
  std::vector<BlockPattern> patterns;
  for (size_t g = 0; g < std::size(kSegments); ++g) {
    for (int64_t offset = 0; offset < kRates[g]; ++offset) {
      PatternSpec spec;
      spec.seqlen_q = spec.seqlen_k = kSegments[g] / kRates[g];
      spec.causal = c.causal;
      patterns.push_back(make_pattern(spec));
      all.push_back(std::make_unique<Tensors>(c, kTokens / kSegments[g], spec.seqlen_q, kHeads / kRates[g]));
    }
  }
  const auto run = [&](Pass pass) {
    for (size_t i = 0; i < all.size(); ++i) {
      if (pass == Pass::forward) {
        auto args = all[i]->args<ForwardArgs>(c.causal);
        args.pattern = patterns[i];
        forward(args, executor);
      } else {
        auto args = all[i]->args<BackwardArgs>(c.causal);
        args.pattern = patterns[i];
        backward(args, executor);
      }
    }
  };
  run(Pass::forward);
  for (auto _ : state) run(c.pass);
}

// Registered before main.
const bool registered = [] {
  for (const Pass pass : {Pass::forward, Pass::backward}) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      for (const Layout layout : {Layout::bshd, Layout::bhsd}) {
        for (const bool causal : {false, true}) {
          const std::string name = std::string(pass == Pass::forward ? "forward/" : "backward/") +
                                   std::string(name_of(dtype)) + (layout == Layout::bshd ? "/bshd" : "/bhsd") +
                                   (causal ? "/causal" : "/full");
          const Config c{pass, dtype, layout, causal};
          benchmark::RegisterBenchmark((name + "/strided").c_str(), dilated, c)->Unit(benchmark::kMillisecond);
          benchmark::RegisterBenchmark((name + "/copies").c_str(), copies, c)->Unit(benchmark::kMillisecond);
        }
      }
    }
  }
  return true;
}();

}  // namespace
}  // namespace tessera
