// Gradients and autocast of torch.ops.tessera, once for C++ and Python: nodes of the graph that call the backward
// operators through the dispatcher, so that torch.compile, export and functional transforms see them.
//
// Kernels are boxed: the backward operators take what the forward ones took, in the same order, so one kernel serves
// all.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "convert.h"

namespace tessera::ops {

namespace {

using torch::autograd::collect_next_edges;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::set_history;
using torch::autograd::variable_list;
using torch::jit::Stack;

// A forward operator (q, k, v, rest...) -> (out, lse) and its backward (dout, dlse, q, k, v, out, lse, wanted, rest...)
// -> (dq, ...), wanted being a bool for each result.
struct Differentiable {
  const char* name;
  const char* backward;

  c10::OperatorHandle backward_op() const { return c10::Dispatcher::singleton().findSchemaOrThrow(backward, ""); }
  // The arguments with a gradient, as the results of the backward operator name them.
  std::vector<std::string> arguments() const {
    std::vector<std::string> names;
    for (const c10::Argument& result : backward_op().schema().returns()) names.push_back(result.name().substr(1));
    return names;
  }
};

const Differentiable kForward{"forward", "tessera::backward"};
const Differentiable kVarlen{"varlen_forward", "tessera::varlen_backward"};
const Differentiable kDilated{"dilated_forward", "tessera::dilated_backward"};

at::Tensor tensor_of(const c10::IValue& value) { return value.isTensor() ? value.toTensor() : at::Tensor(); }

// Every tensor among the arguments with its name; undefined where an optional one is absent.
template <class F>
void for_each_tensor(const c10::FunctionSchema& schema, at::ArrayRef<c10::IValue> args, F f) {
  for (size_t i = 0; i < args.size(); ++i) {
    if (args[i].isTensor() && args[i].toTensor().defined()) f(schema.arguments()[i].name(), args[i].toTensor());
  }
}

bool wants_gradient(const c10::FunctionSchema& schema, at::ArrayRef<c10::IValue> args) {
  bool any = false;
  for_each_tensor(schema, args, [&](const std::string& name, const at::Tensor& t) {
    if (torch::autograd::isFwGradDefined(t)) fail(name, "a tangent of forward-mode differentiation", "reverse mode");
    any |= t.requires_grad();
  });
  return any && at::GradMode::is_enabled();
}

// Keeps arguments for backward: tensors as SavedVariable (hooks, version checks), the rest as it is.
class SavedArguments {
 public:
  explicit SavedArguments(at::ArrayRef<c10::IValue> args) : values_(args.begin(), args.end()), is_tensor_(args.size()) {
    for (auto& value : values_) {
      if (!value.isTensor()) continue;
      is_tensor_[&value - values_.data()] = true;
      saved_.emplace_back(value.toTensor(), false);
      value = c10::IValue();
    }
  }
  std::vector<c10::IValue> unpack() {
    std::vector<c10::IValue> values = values_;
    size_t next = 0;
    for (size_t i = 0; i < values.size(); ++i) {
      if (is_tensor_[i]) values[i] = saved_[next++].unpack();
    }
    return values;
  }
  void release() {
    for (auto& s : saved_) s.reset_data();
  }

 private:
  std::vector<c10::IValue> values_;
  std::vector<bool> is_tensor_;
  std::vector<SavedVariable> saved_;
};

class AttentionBackward final : public Node {
 public:
  AttentionBackward(const Differentiable& op, at::ArrayRef<c10::IValue> args)
      : backward_(op.backward_op()), op_(op), arguments_(args) {}

  std::string name() const override { return std::string("Tessera_") + op_.name + "_backward"; }

  void save_results(const at::Tensor& out, const at::Tensor& lse) {
    out_ = SavedVariable(out, true);
    lse_ = SavedVariable(lse, true);
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list result(backward_.schema().returns().size());
    if (!grads[0].defined() && !grads[1].defined()) return result;
    const std::vector<c10::IValue> args = arguments_.unpack();
    const auto self = c10::intrusive_ptr<Node>::unsafe_reclaim_from_nonowning(this);
    const at::Tensor out = out_.unpack(self), lse = lse_.unpack(self);
    Stack stack;
    stack.emplace_back(grads[0].defined() ? grads[0] : at::zeros_like(out));
    stack.emplace_back(grads[1].defined() ? c10::IValue(grads[1]) : c10::IValue());
    stack.insert(stack.end(), args.begin(), args.begin() + 3);
    stack.emplace_back(out);
    stack.emplace_back(lse);
    c10::List<bool> wanted;
    for (size_t i = 0; i < result.size(); ++i) wanted.push_back(task_should_compute_output(i));
    stack.emplace_back(wanted);
    stack.insert(stack.end(), args.begin() + 3, args.end());
    backward_.callBoxed(stack);
    for (size_t i = 0; i < result.size(); ++i) {
      if (task_should_compute_output(i)) result[i] = stack[i].toTensor();
    }
    return result;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    arguments_.release();
    out_.reset_data();
    lse_.reset_data();
  }

 private:
  c10::OperatorHandle backward_;
  const Differentiable& op_;
  SavedArguments arguments_;
  SavedVariable out_, lse_;
};

void run_below(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

template <const Differentiable& differentiable>
void autograd_kernel(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  translate_errors([&] {
    const auto& schema = op.schema();
    const auto args = torch::jit::last(*stack, schema.arguments().size());
    if (!wants_gradient(schema, args)) return run_below(op, keys, stack);
    static const std::vector<std::string> arguments = differentiable.arguments();
    for_each_tensor(schema, args, [&](const std::string& name, const at::Tensor& t) {
      if (t.requires_grad() && std::find(arguments.begin(), arguments.end(), name) == arguments.end()) {
        fail(name, "a tensor that requires grad", "one that does not (there is no gradient for it)");
      }
    });
    variable_list inputs;
    for (const std::string& name : arguments) {
      inputs.push_back(tensor_of(args[*schema.argumentIndexWithName(name)]));
    }
    const auto node = c10::make_intrusive<AttentionBackward>(differentiable, args);
    node->set_next_edges(collect_next_edges(at::TensorList(inputs)));
    run_below(op, keys, stack);
    at::Tensor lse = torch::jit::pop(*stack).toTensor(), out = torch::jit::pop(*stack).toTensor();
    set_history(out, node);
    set_history(lse, node);
    node->save_results(out, lse);
    torch::jit::push(*stack, std::move(out), std::move(lse));
  });
}

// Operators whose results have no gradient: they compute, and whoever differentiates them is told.
void no_gradient_kernel(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  translate_errors([&] {
    const auto& schema = op.schema();
    const auto args = torch::jit::last(*stack, schema.arguments().size());
    if (!wants_gradient(schema, args)) return run_below(op, keys, stack);
    variable_list inputs;
    for_each_tensor(schema, args, [&](const std::string&, const at::Tensor& t) { inputs.push_back(t); });
    const std::string name = schema.operator_name().name;
    const bool second = name.size() >= 8 && name.compare(name.size() - 8, 8, "backward") == 0;
    const auto node = c10::make_intrusive<torch::autograd::Error>(
        second ? name + ": got a second derivative; allowed: first derivatives"
               : name +
                     ": got a backward pass; allowed: none, its results have no gradient "
                     "(block_sparse_attention has)",
        collect_next_edges(at::TensorList(inputs)));
    run_below(op, keys, stack);
    for (auto& value : torch::jit::last(*stack, schema.returns().size())) {
      const at::Tensor t = tensor_of(value);
      if (t.defined() && at::isFloatingType(t.scalar_type())) set_history(t, node);
    }
  });
}

// merge: with w_x = exp(lse_x - lse), out = w_a out_a + w_b out_b. Plain tensor operators, so that it may be
// differentiated again.
class MergeBackward final : public Node {
 public:
  std::string name() const override { return "Tessera_merge_backward"; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list result(4);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    const auto self = c10::intrusive_ptr<Node>::unsafe_reclaim_from_nonowning(this);
    const at::Tensor out = saved[4].unpack(self), lse = saved[5].unpack(self);
    const at::Tensor nothing = at::zeros({}, lse.options());
    for (int side = 0; side < 2; ++side) {
      if (!task_should_compute_output(2 * side) && !task_should_compute_output(2 * side + 1)) continue;
      const at::Tensor out_x = saved[2 * side].unpack(), lse_x = saved[2 * side + 1].unpack();
      const at::Tensor absent = lse_x.isinf().logical_and(lse_x.lt(0));
      const at::Tensor weight =
          at::where(absent, nothing, (lse_x - at::where(absent, nothing, lse)).exp());  // [B, H, S]
      const at::Tensor column = weight.transpose(1, 2).unsqueeze(-1);                   // [B, S, H, 1]
      at::Tensor dlse = grads[1].defined() ? grads[1] * weight : at::Tensor();
      if (grads[0].defined()) {
        if (task_should_compute_output(2 * side)) result[2 * side] = (grads[0] * column).to(out.scalar_type());
        const at::Tensor wide = grads[0].to(lse.scalar_type());
        // Whatever an absent side holds (NaN) must not come through.
        const at::Tensor difference =
            at::where(absent.transpose(1, 2).unsqueeze(-1), nothing, (out_x - out).to(lse.scalar_type()));
        const at::Tensor through = (wide * difference).sum(-1).transpose(1, 2) * weight;
        dlse = dlse.defined() ? dlse + through : through;
      }
      result[2 * side + 1] = dlse;
    }
    return result;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& s : saved) s.reset_data();
  }

  std::vector<SavedVariable> saved;  // out_a, lse_a, out_b, lse_b, out, lse
};

void merge_kernel(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  translate_errors([&] {
    const auto args = torch::jit::last(*stack, 4);
    if (!wants_gradient(op.schema(), args)) return run_below(op, keys, stack);
    variable_list inputs;
    for (const auto& value : args) inputs.push_back(value.toTensor());
    const auto node = c10::make_intrusive<MergeBackward>();
    node->set_next_edges(collect_next_edges(at::TensorList(inputs)));
    for (const auto& t : inputs) node->saved.emplace_back(t, false);
    run_below(op, keys, stack);
    at::Tensor lse = torch::jit::pop(*stack).toTensor(), out = torch::jit::pop(*stack).toTensor();
    set_history(out, node);
    set_history(lse, node);
    node->saved.emplace_back(out, true);
    node->saved.emplace_back(lse, true);
    torch::jit::push(*stack, std::move(out), std::move(lse));
  });
}

// Autocast: q, k (and v) to the autocast dtype; biases, sinks and offsets as they are.
template <int tensors>
void autocast_kernel(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKeySet(c10::DispatchKey::AutocastCPU));
  const size_t first = stack->size() - op.schema().arguments().size();
  for (size_t i = first; i < first + tensors; ++i) {
    (*stack)[i] =
        at::autocast::cached_cast(at::autocast::get_autocast_dtype(at::kCPU), (*stack)[i].toTensor(), at::kCPU);
  }
  op.callBoxed(stack);
}

template <auto kernel>
torch::CppFunction boxed() {
  return torch::CppFunction::makeFromBoxedFunction<kernel>();
}

}  // namespace

TORCH_LIBRARY_IMPL(tessera, Autograd, m) {
  m.impl("forward", boxed<&autograd_kernel<kForward>>());
  m.impl("varlen_forward", boxed<&autograd_kernel<kVarlen>>());
  m.impl("dilated_forward", boxed<&autograd_kernel<kDilated>>());
  m.impl("merge", boxed<&merge_kernel>());
  for (const char* name : {"infer", "decode", "weights", "backward", "varlen_backward", "dilated_backward"}) {
    m.impl(name, boxed<&no_gradient_kernel>());
  }
}

TORCH_LIBRARY_IMPL(tessera, AutocastCPU, m) {
  for (const char* name : {"forward", "infer", "decode", "varlen_forward", "dilated_forward"}) {
    m.impl(name, boxed<&autocast_kernel<3>>());
  }
  m.impl("weights", boxed<&autocast_kernel<2>>());
}

}  // namespace tessera::ops
