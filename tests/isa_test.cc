// Which instruction set a call without a wish gets.
#include "cpu/isa.h"

#include <gtest/gtest.h>

#include <vector>

#include "attention_inputs.h"

namespace tessera {
namespace {

using cpu::automatic_of;
using cpu::Bound;

TEST(AutomaticIsa, IsTheLastButForADotThatIsSlow) {
  const std::vector<Isa> intel{Isa::sse4, Isa::avx2, Isa::avx512, Isa::avx512_bf16}, old{Isa::sse4, Isa::avx2};
  EXPECT_EQ(automatic_of(intel, Bound::compute, true), Isa::avx512);
  EXPECT_EQ(automatic_of(intel, Bound::memory, true), Isa::avx512_bf16) << "decode waits for memory";
  EXPECT_EQ(automatic_of(intel, Bound::compute, false), Isa::avx512_bf16);
  EXPECT_EQ(automatic_of(old, Bound::compute, true), Isa::avx2);
}

// What ran is what is said to be automatic, in every dtype, and stays so.
TEST(AutomaticIsa, IsWhatRuns) {
  InlineExecutor executor;
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const int64_t queries : {int64_t{1}, int64_t{40}}) {
      Call call({.seqlen_q = queries, .seqlen_k = 40, .head_dim = 8, .head_dim_v = 8}, dtype,
                dense_pattern(queries, 40));
      const ForwardInfo info = forward(call.args, executor);
      EXPECT_EQ(info.isa, automatic_isa(queries == 1)) << name_of(dtype);
    }
  }
}

}  // namespace
}  // namespace tessera
