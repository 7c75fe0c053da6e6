// Timing, peaks and memory, as bench, demo, attend and info report them.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "tensors.h"
#include "tessera/attention.h"
#include "tessera/backward.h"
#include "tessera/dilated.h"
#include "tessera/machine.h"

namespace tessera::cli {

struct Timing {
  double median = 0, min = 0, max = 0;  // seconds of one call
};

// One warm-up call, then `repeat` samples. A call shorter than a few milliseconds is repeated inside a sample, so
// that the clock and the wake-up of the threads do not count as work.
Timing time_calls(int repeat, const std::function<void()>& call);

// Seconds of one call.
double time_once(const std::function<void()>& call);

// 2 D for the score and 2 Dv for the output of each admitted pair.
double forward_flops(int64_t pairs, int64_t head_dim, int64_t head_dim_v);
// 2 D each for the score, dq and dk, 2 Dv each for the gradient of the weight and dv.
double backward_flops(int64_t pairs, int64_t head_dim, int64_t head_dim_v);

// Bytes of K and V that a call must read: keys of the blocks kept for any head of a group, once a KV head.
int64_t kept_kv_bytes(const BlockPattern& pattern, int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_dim,
                      int64_t head_dim_v, DType dtype);

// Share of all pairs of tokens (causal: of those not after the query) that dilated attention admits; a pair counts for
// each (w, r) that admits it.
double dilated_density(int64_t pairs, int64_t seqlen, bool causal, int64_t batch, int64_t heads);

// Peak resident set of this process, and its reset where the system permits it.
void reset_peak_rss();
int64_t peak_rss_bytes();
int64_t available_memory_bytes();  // 0: unknown
std::string cpu_model();

// Result tensors of a forward call and the call itself, ready to be timed.
struct ForwardCall {
  ForwardArgs args;
  Tensor out, lse;

  ForwardCall(const Qkv& qkv, BlockPattern pattern, AttentionOptions options, Isa isa);
  ForwardCall(const ForwardCall&) = delete;
  ForwardInfo operator()(Executor& executor) { return forward(args, executor); }
};

// The same for dilated attention; `dilation` borrows its lists.
struct DilatedCall {
  DilatedForwardArgs args;
  Tensor out, lse;

  DilatedCall(const Qkv& qkv, Dilation dilation, AttentionOptions options, Isa isa);
  DilatedCall(const DilatedCall&) = delete;
  ForwardInfo operator()(Executor& executor) { return dilated_forward(args, executor); }
};

// Gradient tensors (dtype of q) of a backward call and the call itself. It reads out and lse of `forward`, which must
// have run, and dout, which lies in memory as out does; both must outlive it.
struct BackwardCall {
  BackwardArgs args;
  Tensor dq, dk, dv;

  BackwardCall(const ForwardCall& forward, const Qkv& qkv, const Tensor& dout);
  BackwardCall(const BackwardCall&) = delete;
  BackwardInfo operator()(Executor& executor) { return backward(args, executor); }
};

struct DilatedBackwardCall {
  DilatedBackwardArgs args;
  Tensor dq, dk, dv;

  DilatedBackwardCall(const DilatedCall& forward, const Qkv& qkv, const Tensor& dout);
  DilatedBackwardCall(const DilatedBackwardCall&) = delete;
  BackwardInfo operator()(Executor& executor) { return dilated_backward(args, executor); }
};

enum class Pass : uint8_t { forward, backward, both };

// A pass over one pattern or one dilation, ready to be timed. Where it has a backward part, dout is needed and must
// outlive it, and the constructor runs the forward part once.
class PassCall {
 public:
  struct Info {
    Isa isa = Isa::automatic;
    size_t scratch_bytes = 0;  // at any one time
  };

  PassCall(Pass pass, const Qkv& qkv, const Tensor* dout, BlockPattern pattern, AttentionOptions options, Isa isa,
           Executor& executor);
  PassCall(Pass pass, const Qkv& qkv, const Tensor* dout, Dilation dilation, AttentionOptions options, Isa isa,
           Executor& executor);
  Info operator()(Executor& executor);
  double flops() const { return flops_; }   // of one call
  int64_t pairs() const { return pairs_; }  // admitted, over batch and heads

 private:
  template <class Backward, class Forward>
  void set_up(const Qkv& qkv, const Tensor* dout, std::shared_ptr<Forward> forward, Executor& executor);

  Pass pass_;
  int64_t pairs_ = 0;
  std::function<ForwardInfo(Executor&)> forward_;
  std::function<BackwardInfo(Executor&)> backward_;
  double flops_ = 0;
};

// Error of a result against the fp64 reference on the same pattern and the same inputs.
struct ReferenceError {
  double out_error = 0;  // largest |out - reference|
  double lse_error = 0;
  double out_ratio = 0;  // largest error as a fraction of the bound on the rounding of its element
  double lse_ratio = 0;
  bool passed = true;  // nothing beyond its bound; NaN and infinities where the reference has them
};
ReferenceError compare_to_reference(const ForwardCall& call, Executor& executor);
ReferenceError compare_to_reference(const DilatedCall& call, Executor& executor);

}  // namespace tessera::cli
