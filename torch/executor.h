// Torch's own threads as an Executor: torch.set_num_threads counts.
#pragma once

#include "tessera/executor.h"

namespace tessera::ops {

Executor& torch_threads();

}  // namespace tessera::ops
