// The groups of arguments that operators share, each listed once (fields.h), and what they are to the core: the fields
// that ForwardArgs, VarlenForwardArgs and DilatedForwardArgs have in common, and likewise those of the backward calls.
#pragma once

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "fields.h"
#include "tessera/dilated.h"
#include "tessera/patterns.h"

namespace tessera::ops {

// ---- patterns. In schemas: {pattern} and {pattern_b} in, {patterns} several, {made} out.

template <>
struct Fields<PatternTensors> {
  using T = PatternTensors;
  static constexpr std::tuple list{Field{"Tensor indptr", &T::indptr}, Field{"Tensor indices", &T::indices},
                                   Field{"Tensor? bitmap_index", &T::bitmap_index},
                                   Field{"Tensor? bitmaps", &T::bitmaps}, Field{"SymInt[] pattern_shape", &T::shape}};
};
template <>
struct Value<BlockPattern> {
  static BlockPattern take(const c10::IValue*& at) { return pattern_of(ops::take<PatternTensors>(at)); }
  static void put(Stack& stack, const BlockPattern& pattern);  // absent bitmaps: empty tensors
};

// One tensor each of every pattern; absent bitmaps are empty tensors.
struct PatternLists {
  std::vector<at::Tensor> indptr, indices, bitmap_index, bitmaps;
  std::vector<int64_t> shapes;  // kShapeNumbers each
  static PatternLists of(const std::vector<PatternTensors>& patterns);
  std::vector<BlockPattern> patterns() const;
};
template <>
struct Fields<PatternLists> {
  using T = PatternLists;
  static constexpr std::tuple list{Field{"Tensor[] indptr", &T::indptr}, Field{"Tensor[] indices", &T::indices},
                                   Field{"Tensor[] bitmap_index", &T::bitmap_index},
                                   Field{"Tensor[] bitmaps", &T::bitmaps},
                                   Field{"SymInt[] pattern_shapes", &T::shapes}};
};
template <>
struct Value<std::vector<BlockPattern>> {
  static std::vector<BlockPattern> take(const c10::IValue*& at) { return ops::take<PatternLists>(at).patterns(); }
};

// ---- definitions of named patterns: {spec}

template <>
struct Value<PatternKind> {
  static PatternKind take(const c10::IValue*& at) { return pattern_kind((at++)->toStringView()); }
  static void put(Stack& stack, PatternKind kind) { stack.emplace_back(std::string(name_of(kind))); }
};
template <>
struct Value<Budget> {
  static Budget take(const c10::IValue*& at) { return budget_of_name((at++)->toStringView()); }
  static void put(Stack& stack, Budget budget) { stack.emplace_back(std::string(name_of(budget))); }
};
template <>
struct Fields<PatternSpec> {
  using T = PatternSpec;
  static constexpr std::tuple list{Field{"str kind", &T::kind},
                                   Field{"SymInt seqlen_q", &T::seqlen_q},
                                   Field{"SymInt seqlen_k", &T::seqlen_k},
                                   Field{"int block_q", &T::block_q},
                                   Field{"int block_k", &T::block_k},
                                   Field{"int heads=1", &T::heads},
                                   Field{"bool causal=False", &T::causal},
                                   Field{"float? density=None", &T::density},
                                   Field{"str budget='even'", &T::budget},
                                   Field{"SymInt? q_offset=None", &T::q_offset},
                                   Field{"SymInt? seqlen_total=None", &T::seqlen_total},
                                   Field{"int? window=None", &T::window},
                                   Field{"int[] dilation_rates=[]", &T::dilation_rates},
                                   Field{"int[] segment_lengths=[]", &T::segment_lengths},
                                   Field{"int? global_tokens=None", &T::global_tokens},
                                   Field{"int? stride=None", &T::stride},
                                   Field{"int seed=0", &T::seed},
                                   Field{"int ranks=1", &T::ranks},
                                   Field{"int ranks_per_node=1", &T::ranks_per_node},
                                   Field{"float? local_density=None", &T::local_density},
                                   Field{"float? global_density=None", &T::global_density},
                                   Field{"float? inter_node_density=None", &T::inter_node_density}};
};

// ---- options: {options}, and {packed_options} of packed sequences

template <>
struct Fields<OptionArguments> {
  using T = OptionArguments;
  static constexpr Field scale{"float? scale=None", &T::scale};
  static constexpr Field causal{"bool? causal=None", &T::causal};
  static constexpr Field window_left{"int? window_left=None", &T::window_left};
  static constexpr Field window_right{"int? window_right=None", &T::window_right};
  static constexpr Field q_offset{"SymInt? q_offset=None", &T::q_offset};
  static constexpr Field k_offset{"SymInt k_offset=0", &T::k_offset};
  static constexpr Field key_lengths{"Tensor? key_lengths=None", &T::key_lengths};
  static constexpr Field aligned{"bool align_to_key_lengths=False", &T::align_to_key_lengths};
  static constexpr Field softcap{"float softcap=0.", &T::softcap};
  static constexpr Field alibi_slopes{"Tensor? alibi_slopes=None", &T::alibi_slopes};
  static constexpr Field block_bias{"Tensor? block_bias=None", &T::block_bias};
  static constexpr Field attn_bias{"Tensor? attn_bias=None", &T::attn_bias};
  static constexpr Field sinks{"Tensor? sinks=None", &T::sinks};
  static constexpr Field dropout_p{"float dropout_p=0.", &T::dropout_p};
  static constexpr Field rng{"Tensor? rng=None", &T::rng};
  static constexpr std::tuple list{scale,      causal,      window_left, window_right, q_offset,
                                   k_offset,   key_lengths, aligned,     softcap,      alibi_slopes,
                                   block_bias, attn_bias,   sinks,       dropout_p,    rng};
};
struct PackedOptions : OptionArguments {};
template <>
struct Fields<PackedOptions> {
  using O = Fields<OptionArguments>;
  static constexpr std::tuple list{O::scale,        O::causal, O::window_left, O::window_right, O::softcap,
                                   O::alibi_slopes, O::sinks,  O::dropout_p,   O::rng};
};

// ---- LongNet's segments and the pattern inside: {dilation}

struct DilationArguments {
  std::vector<int64_t> segment_lengths, dilation_rates;
  std::optional<PatternKind> kind;  // none: dense, and the rest says nothing
  std::optional<double> density;
  int block = 128;
  Budget budget = Budget::even;
  std::optional<int64_t> window;
  std::vector<int64_t> rates;
  std::optional<int64_t> global_tokens, stride;
  uint64_t seed = 0;

  // ValueError where the dilation says what an operator does not take.
  static DilationArguments of(const Dilation& dilation, bool causal);
  Dilation dilation() const;  // valid as long as this is. Errors of its patterns have the names of the schema
};
template <>
struct Fields<DilationArguments> {
  using T = DilationArguments;
  static constexpr std::tuple list{Field{"SymInt[] segment_lengths", &T::segment_lengths},
                                   Field{"SymInt[] dilation_rates", &T::dilation_rates},
                                   Field{"str? pattern_kind=None", &T::kind},
                                   Field{"float? density=None", &T::density},
                                   Field{"int block=128", &T::block},
                                   Field{"str budget='even'", &T::budget},
                                   Field{"int? pattern_window=None", &T::window},
                                   Field{"int[] pattern_rates=[]", &T::rates},
                                   Field{"int? global_tokens=None", &T::global_tokens},
                                   Field{"int? stride=None", &T::stride},
                                   Field{"int pattern_seed=0", &T::seed}};
};

// ---- calls

inline at::ScalarType lse_type(const at::Tensor& q) {
  return q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_rank(const char* name, const at::Tensor& t, int64_t rank, const char* dims);

// out [B, Sq, H, Dv], lying as q does, and lse [B, H, Sq]; of packed sequences [total_q, H, Dv] and [H, total_q].
using Results = std::tuple<at::Tensor, at::Tensor>;
Results results_of(const at::Tensor& q, const at::Tensor& v);

template <class Args>
void fill_forward(Args& args, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Results& results,
                  const Options& options) {
  args.q = view_of("q", q);
  args.k = view_of("k", k);
  args.v = view_of("v", v);
  args.out = output_view("out", std::get<0>(results));
  args.lse = output_view("lse", std::get<1>(results));
  args.options = options.get();
}

// block_indices int64 [blocks, 4] and block_values [blocks, block_q, block_k].
Results tensors_of(const BlockWeights& weights);

// What every backward call takes: {backward}.
struct BackwardArguments {
  at::Tensor dout;
  MaybeTensor dlse;
  at::Tensor q, k, v, out, lse;
};
template <>
struct Fields<BackwardArguments> {
  using T = BackwardArguments;
  static constexpr std::tuple list{Field{"Tensor dout", &T::dout}, Field{"Tensor? dlse", &T::dlse},
                                   Field{"Tensor q", &T::q},       Field{"Tensor k", &T::k},
                                   Field{"Tensor v", &T::v},       Field{"Tensor out", &T::out},
                                   Field{"Tensor lse", &T::lse}};
};
// The same in the form that the core takes.
BackwardArguments prepared(const BackwardArguments& given);

template <class Args>
void fill_backward(Args& args, const BackwardArguments& t, const Options& options) {
  args.q = view_of("q", t.q);
  args.k = view_of("k", t.k);
  args.v = view_of("v", t.v);
  args.out = view_of("out", t.out);
  args.lse = view_of("lse", t.lse);
  args.dout = view_of("dout", t.dout);
  args.dlse = view_of("dlse", t.dlse);
  args.options = options.get();
}

// A gradient of `t` for the core to write, in `view`; nothing, and an empty tensor, where it is not wanted.
at::Tensor gradient_of(const char* name, const at::Tensor& t, bool wanted, MutableTensorView& view);
at::Tensor gradient_of(const char* name, const MaybeTensor& t, bool wanted, MutableTensorView& view,
                       const at::Tensor& q);

}  // namespace tessera::ops
