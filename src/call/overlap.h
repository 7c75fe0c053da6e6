// Whether strided views share memory, decided exactly.
#pragma once

#include "tessera/tensor_view.h"

namespace tessera {

// True iff some byte belongs to an element of both. Interleaved views (slices of one packed tensor) that share no
// byte give false. A search that finds no answer within its budget of steps gives true: strides that no layout of a
// tensor has. Both views must have passed resolve's size checks.
bool shares_memory(const TensorView& a, const TensorView& b);

// True iff two different elements of the view lie in the same place.
bool overlaps_itself(const TensorView& a);

}  // namespace tessera
