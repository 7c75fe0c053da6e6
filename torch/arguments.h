// Tensors of an operator as the arguments of a call of the core: the fields that ForwardArgs, VarlenForwardArgs and
// DilatedForwardArgs have in common, and likewise those of the backward calls.
#pragma once

#include <ATen/ATen.h>

#include <string>
#include <tuple>
#include <utility>

#include "convert.h"

namespace tessera::ops {

inline at::ScalarType lse_type(const at::Tensor& q) {
  return q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_rank(const char* name, const at::Tensor& t, int64_t rank, const char* dims) {
  check_device(name, t);
  if (t.dim() != rank) fail(name, std::to_string(t.dim()) + " dimensions", dims);
}

// out [B, Sq, H, Dv], lying as q does, and lse [B, H, Sq].
inline std::tuple<at::Tensor, at::Tensor> results_of(const at::Tensor& q, const at::Tensor& v) {
  return {empty_like_layout(q, {q.size(0), q.size(1), q.size(2), v.size(3)}, q.scalar_type()),
          at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(lse_type(q)))};
}

template <class Args>
void fill_forward(Args& args, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
                  const at::Tensor& lse, const Options& options) {
  args.q = view_of("q", q);
  args.k = view_of("k", k);
  args.v = view_of("v", v);
  args.out = output_view("out", out);
  args.lse = output_view("lse", lse);
  args.options = options.get();
}

// What every backward call takes; owns the copies that the core needs.
class BackwardTensors {
 public:
  BackwardTensors(const at::Tensor& dout, const MaybeTensor& dlse, const at::Tensor& q, const at::Tensor& k,
                  const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse)
      : q_(q), k_(k), v_(v), out_(out), lse_(lse) {
    using Named = std::pair<const char*, const at::Tensor*>;
    for (const auto& [name, t] :
         {Named{"dout", &dout}, {"q", &q}, {"k", &k}, {"v", &v}, {"out", &out}, {"lse", &lse}}) {
      check_device(name, *t);
    }
    if (dlse.has_value()) check_device("dlse", *dlse);
    // The core wants the head dim contiguous, and dlse as lse; autograd may hand in anything.
    dout_ = dout.dim() > 0 && dout.stride(-1) != 1 && dout.sizes() == out.sizes() ? dout.contiguous() : dout;
    if (dlse.has_value()) dlse_ = dlse->to(lse.scalar_type());
  }

  template <class Args>
  void fill(Args& args, const Options& options) const {
    args.q = view_of("q", q_);
    args.k = view_of("k", k_);
    args.v = view_of("v", v_);
    args.out = view_of("out", out_);
    args.lse = view_of("lse", lse_);
    args.dout = view_of("dout", dout_);
    args.dlse = view_of("dlse", dlse_);
    args.options = options.get();
  }

 private:
  const at::Tensor &q_, &k_, &v_, &out_, &lse_;
  at::Tensor dout_, dlse_;
};

// A gradient of `t` for the core to write, in `view`; nothing, and an empty tensor, where it is not wanted.
inline at::Tensor gradient_of(const char* name, const at::Tensor& t, bool wanted, MutableTensorView& view) {
  if (!wanted) return at::empty({0}, t.options());
  at::Tensor g = empty_like_layout(t, t.sizes(), t.scalar_type());
  view = output_view(name, g);
  return g;
}
inline at::Tensor gradient_of(const char* name, const MaybeTensor& t, bool wanted, MutableTensorView& view,
                              const at::Tensor& q) {
  if (!wanted || !t.has_value()) return at::empty({0}, q.options());
  check_result(name, t->sizes(), t->scalar_type());
  at::Tensor g = at::empty(t->sizes(), t->options());
  view = output_view(name, g);
  return g;
}

}  // namespace tessera::ops
