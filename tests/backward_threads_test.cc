// backward() and threads: the same bits for 1, 2, 3 and 5 of them and from run to run; threads that do not run at the
// same time; several callers at once. Sizes give each thread several units, with one head too (the split over blocks).
// Run under TSan.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <thread>

#include "attention_inputs.h"
#include "tessera/backward.h"

namespace tessera {
namespace {

// Announces several threads and runs the workers one after another, in an order of its own: what an executor may do
// whose threads are busy elsewhere. A worker that waits for another one never ends.
class OneAfterAnother final : public Executor {
 public:
  explicit OneAfterAnother(bool backwards) : backwards_(backwards) {}
  int num_threads() const override { return 4; }
  void run(int n, const std::function<void(int)>& worker) override {
    for (int i = 0; i < n; ++i) worker(backwards_ ? n - 1 - i : i);
  }

 private:
  bool backwards_;
};

struct Gradients {
  Numbers dq, dk, dv, dblock_bias, dattn_bias, dsinks;

  bool operator==(const Gradients& o) const {
    return dq.memory == o.dq.memory && dk.memory == o.dk.memory && dv.memory == o.dv.memory &&
           dblock_bias.memory == o.dblock_bias.memory && dattn_bias.memory == o.dattn_bias.memory &&
           dsinks.memory == o.dsinks.memory;
  }
};

// A call with its forward result; all gradients of it.
struct Job {
  Call call;
  Numbers dout, block_bias, attn_bias, sinks;
  bool biases;

  Job(const Shape& s, DType dtype, const BlockPattern& pattern, bool with_biases)
      : call(s, dtype, pattern),
        dout(dtype, {s.batch, s.seqlen_q, s.heads, s.head_dim_v},
             wave(s.batch * s.seqlen_q * s.heads * s.head_dim_v, 1.1, 0.2)),
        block_bias(DType::f32, {1, 1, pattern.num_blocks()}, wave(pattern.num_blocks(), 0.9, 0)),
        attn_bias(DType::f32, {1, 1, 1, s.seqlen_k}, wave(s.seqlen_k, 0.4, 0)),
        sinks(DType::f32, {s.heads}, wave(s.heads, 1, 0)),
        biases(with_biases) {
    call.args.options.causal = true;
    if (biases) {  // their gradients are sums over batches, heads and queries: over units of work
      call.args.options.block_bias = block_bias.view;
      call.args.options.attn_bias = attn_bias.view;
      call.args.options.sinks = sinks.view;
    }
    InlineExecutor executor;
    forward(call.args, executor);
  }

  Gradients run(Executor& executor) const {
    const Shape& s = call.shape;
    const DType dtype = call.args.q.dtype;
    Gradients g{{dtype, {s.batch, s.seqlen_q, s.heads, s.head_dim}},
                {dtype, {s.batch, s.seqlen_k, s.kv_heads, s.head_dim}},
                {dtype, {s.batch, s.seqlen_k, s.kv_heads, s.head_dim_v}}};
    BackwardArgs args{.q = call.args.q,
                      .k = call.args.k,
                      .v = call.args.v,
                      .pattern = call.args.pattern,
                      .out = call.out.view,
                      .lse = call.lse.view,
                      .dout = dout.view,
                      .dq = g.dq.view,
                      .dk = g.dk.view,
                      .dv = g.dv.view,
                      .options = call.args.options};
    if (biases) {
      g.dblock_bias = Numbers(DType::f32, {1, 1, call.args.pattern.num_blocks()});
      g.dattn_bias = Numbers(DType::f32, {1, 1, 1, s.seqlen_k});
      g.dsinks = Numbers(DType::f32, {s.heads});
      args.dblock_bias = g.dblock_bias.view;
      args.dattn_bias = g.dattn_bias.view;
      args.dsinks = g.dsinks.view;
    }
    backward(args, executor);
    return g;
  }
};

BlockPattern sparse_pattern(int64_t tokens, int64_t heads) {
  PatternSpec spec;
  spec.kind = PatternKind::random;
  spec.seqlen_q = spec.seqlen_k = tokens;
  spec.block_q = 32;
  spec.block_k = 48;
  spec.density = 0.4;
  spec.causal = true;
  spec.heads = heads;
  spec.seed = 11;
  return make_pattern(spec);
}

template <class Visit>
void for_each_job(Visit visit) {
  const Shape shapes[] = {
      {.seqlen_q = 400, .seqlen_k = 400, .head_dim = 32, .head_dim_v = 32},  // one head
      {.seqlen_q = 150, .seqlen_k = 150, .heads = 8, .kv_heads = 8, .head_dim = 16, .head_dim_v = 24},
      {.batch = 2, .seqlen_q = 150, .seqlen_k = 150, .heads = 6, .kv_heads = 2, .head_dim = 16, .head_dim_v = 16},
  };
  for (const Shape& s : shapes) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      for (const bool biases : {false, true}) {
        const Job job(s, dtype, sparse_pattern(s.seqlen_q, 1), biases);
        SCOPED_TRACE(testing::Message() << name_of(dtype) << " heads " << s.heads << " biases " << biases);
        visit(job);
      }
    }
  }
}

TEST(BackwardThreads, SameBitsForAnyNumber) {
  ThreadPool two(2), three(3), five(5);
  InlineExecutor one;
  for_each_job([&](const Job& job) {
    const Gradients first = job.run(one);
    EXPECT_TRUE(job.run(one) == first) << "from run to run";
    EXPECT_TRUE(job.run(two) == first);
    EXPECT_TRUE(job.run(two) == first) << "from run to run";
    EXPECT_TRUE(job.run(three) == first);
    EXPECT_TRUE(job.run(five) == first);
    EXPECT_NE(first.dq.get(first.dq.view.numel() - 1), 0);
  });
}

TEST(BackwardThreads, WorkersOneAfterAnother) {
  InlineExecutor one;
  OneAfterAnother ascending(false), descending(true);
  for_each_job([&](const Job& job) {
    const Gradients first = job.run(one);
    EXPECT_TRUE(job.run(ascending) == first);
    EXPECT_TRUE(job.run(descending) == first);
  });
}

// Callers that share inputs, and a pattern whose transposed form nobody has made yet.
TEST(BackwardThreads, SeveralCallers) {
  const Shape shape{.seqlen_q = 200, .seqlen_k = 200, .heads = 2, .kv_heads = 1, .head_dim = 16, .head_dim_v = 16};
  const Job job(shape, DType::f32, sparse_pattern(200, 2), true);
  std::vector<Gradients> results(4);
  std::vector<std::thread> callers;
  for (Gradients& result : results) {
    callers.emplace_back([&] {
      ThreadPool pool(2);
      result = job.run(pool);
    });
  }
  for (std::thread& t : callers) t.join();
  for (const Gradients& result : results) EXPECT_TRUE(result == results[0]);
}

// deterministic = false allows another order, not another result.
TEST(BackwardThreads, NotDeterministicIsAsRight) {
  ThreadPool pool(3);
  const Shape shape{.seqlen_q = 300, .seqlen_k = 300, .head_dim = 16, .head_dim_v = 16};
  Job job(shape, DType::f32, sparse_pattern(300, 1), false);
  const Gradients first = job.run(pool);
  job.call.args.options.deterministic = false;
  const Gradients other = job.run(pool);
  for (int64_t i = 0; i < first.dk.view.numel(); ++i) {
    ASSERT_NEAR(first.dq.get(i), other.dq.get(i), 1e-4);  // sums of 300 terms of order 1 in fp32
    ASSERT_NEAR(first.dk.get(i), other.dk.get(i), 1e-4);
    ASSERT_NEAR(first.dv.get(i), other.dv.get(i), 1e-4);
  }
}

}  // namespace
}  // namespace tessera
