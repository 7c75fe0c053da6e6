// The operators through torch's dispatcher, and a module, in a program without Python.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <tessera/patterns.h>
#include <tessera/torch/functional.h>
#include <tessera/torch/modules.h>

#include <cstdio>

int main() {
  at::manual_seed(1);
  const at::Tensor q = at::randn({1, 80, 2, 16}), k = at::randn({1, 80, 2, 16}), v = at::randn({1, 80, 2, 16});

  // As torch.ops.tessera.forward(...) does it: a stack of values, defaults for what is left out.
  const tessera::BlockPattern pattern = tessera::make_pattern({.kind = tessera::PatternKind::local_window,
                                                               .seqlen_q = 80,
                                                               .seqlen_k = 80,
                                                               .block_q = 16,
                                                               .block_k = 16,
                                                               .density = 0.01});
  const auto tensors = tessera::nn::functional::pattern_tensors(pattern);
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("tessera::forward", "");
  torch::jit::Stack stack{q, k, v, tensors.indptr, tensors.indices, c10::IValue(), c10::IValue(), tensors.shape};
  for (size_t i = stack.size(); i < op.schema().arguments().size(); ++i) {
    stack.push_back(*op.schema().arguments()[i].default_value());
  }
  op.callBoxed(&stack);
  // Each query sees its own block of 16 keys: attention of five short sequences.
  const auto short_ones = [](const at::Tensor& t) { return t.view({5, 16, 2, 16}).transpose(1, 2); };
  const at::Tensor expected = at::scaled_dot_product_attention(short_ones(q), short_ones(k), short_ones(v))
                                  .transpose(1, 2)
                                  .reshape({1, 80, 2, 16});
  std::printf("operator %s\n", at::allclose(stack[0].toTensor(), expected, 1e-4, 1e-5) ? "right" : "wrong");

  tessera::nn::MultiheadAttention attention(32, 2);
  const at::Tensor x = at::randn({80, 1, 32}).requires_grad_();
  const auto [out, weights] = attention->forward(x, x, x);
  out.sum().backward();
  std::printf("module %s, gradient %s\n", out.sizes() == x.sizes() && weights.size(2) == 80 ? "right" : "wrong",
              x.grad().defined() && x.grad().isfinite().all().item<bool>() ? "there" : "missing");

  try {
    tessera::nn::functional::block_sparse_attention(q, k.slice(1, 0, 64), v, tensors);
  } catch (const c10::ValueError& error) {
    std::printf("refused\n");
  }
  return 0;
}
