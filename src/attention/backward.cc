// The entry points of the backward pass, and its switch on the device.
#include <span>
#include <vector>

#include "attention/device.h"
#include "cpu/cpu.h"
#include "reference/backward.h"
#include "tessera/error.h"

namespace tessera {

BackwardInfo run_backward(std::span<const BackwardProblem> problems, DType dtype, Isa isa, Executor& executor) {
  if (dtype != DType::f64) return cpu::backward(problems, isa, executor);
  if (isa != Isa::automatic) fail("isa", name_of(isa), "auto for fp64, which the reference kernel computes");
  fp64_backward(problems, executor);
  return {};
}

BackwardInfo backward(const BackwardArgs& args, Executor& executor) {
  const BackwardProblem problem = resolve_backward(args);
  return run_backward({&problem, 1}, problem.forward.dtype, args.isa, executor);
}

BackwardInfo backward_varlen(const VarlenBackwardArgs& args, Executor& executor) {
  const std::vector<BackwardProblem> problems = resolve_backward_varlen(args);
  // The sum over no sequences, which no problem writes.
  for (int64_t h = 0; problems.empty() && args.dsinks.defined() && h < args.dsinks.sizes[0]; ++h) {
    static_cast<float*>(args.dsinks.data)[h * args.dsinks.strides[0]] = 0;
  }
  return run_backward(problems, args.q.dtype, args.isa, executor);
}

}  // namespace tessera
