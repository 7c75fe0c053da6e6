// The entry points of the forward pass, and the one switch on the device.
#include <span>

#include "attention/device.h"
#include "cpu/cpu.h"
#include "reference/forward.h"
#include "tessera/error.h"

namespace tessera {

ForwardInfo run_forward(std::span<const Problem> problems, DType dtype, Isa isa, Executor& executor) {
  if (dtype != DType::f64) return cpu::forward(problems, isa, executor);
  if (isa != Isa::automatic) fail("isa", name_of(isa), "auto for fp64, which the reference kernel computes");
  for (const Problem& p : problems) reference_attention(p, executor);
  return {};
}

ForwardInfo forward(const ForwardArgs& args, Executor& executor) {
  const Problem problem = resolve(args);
  return run_forward({&problem, 1}, problem.dtype, args.isa, executor);
}

ForwardInfo forward_varlen(const VarlenForwardArgs& args, Executor& executor) {
  return run_forward(resolve_varlen(args), args.q.dtype, args.isa, executor);
}

}  // namespace tessera
