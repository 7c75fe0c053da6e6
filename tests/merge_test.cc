// merge(): two halves of the keys, attended apart and merged, are the whole; and the rules at -inf. 70 rows: more than
// one unit of work (64 rows); Dv 5 and 33: tails.
#include <gtest/gtest.h>

#include <limits>

#include "attention_inputs.h"

namespace tessera {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Partial {
  Numbers out, lse;
  Partial(DType dtype, int64_t b, int64_t s, int64_t h, int64_t d)
      : out(dtype, {b, s, h, d}), lse(DType::f32, {b, h, s}) {}
};

TEST(Merge, HalvesMakeTheWhole) {
  InlineExecutor executor;
  ThreadPool pool(3);
  const Shape s{.batch = 2, .seqlen_q = 70, .seqlen_k = 64, .heads = 2, .kv_heads = 2, .head_dim = 8, .head_dim_v = 33};
  const auto half = [&](bool second) {
    const PatternShape shape{70, 64, 16, 32};
    std::vector<int64_t> indptr{0};
    std::vector<int32_t> indices;
    for (int64_t i = 0; i < shape.rows(); ++i) {
      if (!(second && i == 1)) indices.push_back(second);  // block row 1 has nothing in the second half
      indptr.push_back(static_cast<int64_t>(indices.size()));
    }
    return BlockPattern::from_csr(shape, indptr, indices);
  };
  const BlockPattern both = BlockPattern::from_csr({70, 64, 16, 32}, {0, 2, 3, 5, 7, 9}, {0, 1, 0, 0, 1, 0, 1, 0, 1});
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    const DType lse = dtype == DType::f64 ? DType::f64 : DType::f32;
    Call a(s, dtype, half(false), dtype, lse), b(s, dtype, half(true), dtype, lse), whole(s, dtype, both, dtype, lse);
    for (Call* c : {&a, &b, &whole}) reference_forward(c->args, executor);
    Call joined(s, dtype, both, dtype, lse);
    merge(a.out.view, a.lse.view, b.out.view, b.lse.view, joined.out.view, joined.lse.view, executor);
    // Three roundings to the dtype (a, b, result) of numbers at most 1; lse is up to 5.
    for (int64_t i = 0; i < joined.out.view.numel(); ++i) {
      ASSERT_NEAR(joined.out.get(i), whole.out.get(i), 3 * epsilon_of(dtype)) << name_of(dtype) << " " << i;
    }
    for (int64_t i = 0; i < joined.lse.view.numel(); ++i) {
      ASSERT_NEAR(joined.lse.get(i), whole.lse.get(i), 8 * epsilon_of(lse)) << name_of(dtype) << " " << i;
    }
    // In place, and on threads: the same bits.
    merge(a.out.view, a.lse.view, b.out.view, b.lse.view, a.out.view, a.lse.view, pool);
    EXPECT_EQ(a.out.memory, joined.out.memory) << name_of(dtype);
    EXPECT_EQ(a.lse.memory, joined.lse.memory) << name_of(dtype);
  }
}

TEST(Merge, SidesWithoutKeys) {
  InlineExecutor executor;
  Partial a(DType::f32, 1, 4, 1, 5), b(DType::f32, 1, 4, 1, 5), to(DType::f32, 1, 4, 1, 5);
  for (int64_t i = 0; i < 20; ++i) {
    a.out.set(i, i / 5 % 2 == 0 ? std::nan("") : 2);  // rows 0 and 2 of a, 0 and 1 of b: whatever
    b.out.set(i, i / 5 < 2 ? kInfinity : 4);
    to.out.set(i, 99);
  }
  for (int64_t q = 0; q < 4; ++q) {
    a.lse.set(q, q % 2 == 0 ? -kInfinity : 0);
    b.lse.set(q, q < 2 ? -kInfinity : 0);
  }
  merge(a.out.view, a.lse.view, b.out.view, b.lse.view, to.out.view, to.lse.view, executor);
  for (int64_t i = 0; i < 5; ++i) {
    EXPECT_EQ(to.out.get(i), 0);
    EXPECT_EQ(to.out.get(5 + i), 2);
    EXPECT_EQ(to.out.get(10 + i), 4);
    EXPECT_EQ(to.out.get(15 + i), 3);
  }
  EXPECT_EQ(to.lse.get(0), -kInfinity);
  EXPECT_EQ(to.lse.get(1), 0);
  EXPECT_EQ(to.lse.get(2), 0);
  EXPECT_NEAR(to.lse.get(3), std::log(2), 1e-7);
}

TEST(Merge, NanAndHugeLse) {
  InlineExecutor executor;
  Partial a(DType::f32, 1, 3, 1, 1), b(DType::f32, 1, 3, 1, 1), to(DType::f32, 1, 3, 1, 1);
  const double lse_a[] = {std::nan(""), 1e4, 3e38}, lse_b[] = {0, -1e4, 3e38};
  for (int64_t q = 0; q < 3; ++q) {
    a.out.set(q, 1);
    b.out.set(q, 3);
    a.lse.set(q, lse_a[q]);
    b.lse.set(q, lse_b[q]);
  }
  for (int swap = 0; swap < 2; ++swap) {
    merge(a.out.view, a.lse.view, b.out.view, b.lse.view, to.out.view, to.lse.view, executor);
    EXPECT_TRUE(std::isnan(to.out.get(0)) && std::isnan(to.lse.get(0)));
    EXPECT_EQ(to.out.get(1), swap ? 3 : 1);
    EXPECT_EQ(to.lse.get(1), 1e4f);
    EXPECT_EQ(to.out.get(2), 2);
    std::swap(a.lse, b.lse);
    std::swap(a.lse.view, b.lse.view);  // views follow their memory: a std::vector keeps it when it is swapped
    a.lse.view.data = a.lse.memory.data();
    b.lse.view.data = b.lse.memory.data();
  }
}

TEST(Merge, OutputsOfAnotherDtype) {  // partial results in fp32, the last merge to bf16
  InlineExecutor executor;
  Partial a(DType::f32, 1, 1, 1, 2), b(DType::f32, 1, 1, 1, 2), to(DType::bf16, 1, 1, 1, 2);
  a.out.set(0, 1), a.out.set(1, 0.3), b.out.set(0, 2), b.out.set(1, 0.3);
  merge(a.out.view, a.lse.view, b.out.view, b.lse.view, to.out.view, to.lse.view, executor);
  EXPECT_EQ(to.out.get(0), 1.5);
  EXPECT_EQ(to.out.get(1), to_float(to_bfloat16(0.3f)));
}

TEST(Merge, MistakesAreNamed) {
  InlineExecutor executor;
  Partial a(DType::f32, 1, 4, 2, 5), b(DType::f32, 1, 4, 2, 5), to(DType::f32, 1, 4, 2, 5);
  struct Args {
    TensorView out_a, lse_a, out_b, lse_b;
    MutableTensorView out, lse;
  };
  const auto argument = [&](auto change) {
    Args x{a.out.view, a.lse.view, b.out.view, b.lse.view, to.out.view, to.lse.view};
    change(x);
    return error_argument([&] { merge(x.out_a, x.lse_a, x.out_b, x.lse_b, x.out, x.lse, executor); });
  };
  EXPECT_EQ(argument([](Args&) {}), "");
  EXPECT_EQ(argument([](Args& x) { x.out.rank = 3; }), "out");
  EXPECT_EQ(argument([](Args& x) { x.out_a.rank = 3; }), "out_a");
  EXPECT_EQ(argument([](Args& x) { x.out_b.sizes[1] = 3; }), "out_b");  // not as out_a
  EXPECT_EQ(argument([](Args& x) { x.out.sizes[1] = 3; }), "out");
  EXPECT_EQ(argument([](Args& x) { x.out_b.dtype = DType::i32; }), "out_b");
  EXPECT_EQ(argument([](Args& x) { x.lse_a.sizes[1] = 1; }), "lse_a");
  EXPECT_EQ(argument([](Args& x) { x.lse_b = {}; }), "lse_b");
  EXPECT_EQ(argument([](Args& x) { x.lse.dtype = DType::bf16; }), "lse");
  EXPECT_EQ(argument([](Args& x) { x.out_a.data = nullptr; }), "out_a");
  EXPECT_EQ(argument([](Args& x) { x.out_a.strides[3] = 2; }), "out_a");
  EXPECT_EQ(argument([](Args& x) { x.out.strides[1] = 0; }), "out");
  EXPECT_EQ(argument([&](Args& x) { x.out.data = a.out.memory.data() + 4; }), "out");
  EXPECT_EQ(argument([&](Args& x) { x.lse.data = to.out.memory.data(); }), "lse");
}

}  // namespace
}  // namespace tessera
