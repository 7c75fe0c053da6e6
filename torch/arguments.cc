#include "arguments.h"

#include <ATen/ATen.h>

#include "result_memory.h"

namespace tessera::ops {

namespace {

template <Group T>
std::string text_of(const std::string& suffix = "") {
  std::string text;
  for_each_field<T>(
      [&](const auto& field) { text += (text.empty() ? "" : ", ") + std::string(field.schema) + suffix; });
  return text;
}

std::string group(std::string_view name) {
  if (name == "pattern") return text_of<PatternTensors>();
  if (name == "pattern_b") return text_of<PatternTensors>("_b");
  if (name == "patterns") return text_of<PatternLists>();
  if (name == "made")
    return "Tensor indptr, Tensor indices, Tensor bitmap_index, Tensor bitmaps, SymInt[] pattern_shape";
  if (name == "spec") return text_of<PatternSpec>();
  if (name == "options") return text_of<OptionArguments>();
  if (name == "packed_options") return text_of<PackedOptions>();
  if (name == "dilation") return text_of<DilationArguments>();
  if (name == "backward") return text_of<BackwardArguments>();
  if (name == "mass") return "Tensor values, Tensor row_tokens, Tensor first, Tensor last, int[] mass_shape";
  TORCH_INTERNAL_ASSERT(false, "no group ", name);
}

}  // namespace

std::string schema_of(std::string_view text) {
  std::string schema;
  for (size_t at = 0; at < text.size();) {
    const size_t open = std::min(text.find('{', at), text.size());
    schema += text.substr(at, open - at);
    if (open == text.size()) break;
    const size_t close = text.find('}', open);
    schema += group(text.substr(open + 1, close - open - 1));
    at = close + 1;
  }
  return schema;
}

void Value<BlockPattern>::put(Stack& stack, const BlockPattern& pattern) {
  PatternTensors t = tensors_of(pattern);
  const PatternShape& s = pattern.shape();
  stack.emplace_back(std::move(t.indptr));
  stack.emplace_back(std::move(t.indices));
  stack.emplace_back(t.bitmap_index ? *t.bitmap_index : at::empty({0}, at::kInt));
  stack.emplace_back(t.bitmaps ? *t.bitmaps : at::empty({0, s.block_q, s.bitmap_words()}, at::kLong));
  stack.emplace_back(std::move(t.shape));
}

PatternLists PatternLists::of(const std::vector<PatternTensors>& patterns) {
  PatternLists lists;
  for (const PatternTensors& p : patterns) {
    lists.indptr.push_back(p.indptr);
    lists.indices.push_back(p.indices);
    lists.bitmap_index.push_back(p.bitmap_index.value_or(at::empty({0}, at::kInt)));
    lists.bitmaps.push_back(p.bitmaps.value_or(at::empty({0}, at::kLong)));
    lists.shapes.insert(lists.shapes.end(), p.shape.begin(), p.shape.end());
  }
  return lists;
}

std::vector<BlockPattern> PatternLists::patterns() const {
  const size_t n = indptr.size();
  if (indices.size() != n || bitmap_index.size() != n || bitmaps.size() != n || shapes.size() != kShapeNumbers * n) {
    fail("patterns", std::to_string(n) + " indptr, " + std::to_string(shapes.size()) + " numbers of shapes",
         "N of every tensor and 9 N numbers");
  }
  std::vector<BlockPattern> patterns;
  for (size_t i = 0; i < n; ++i) {
    const auto shape = shapes.begin() + static_cast<std::ptrdiff_t>(kShapeNumbers * i);
    patterns.push_back(
        pattern_of({indptr[i], indices[i], bitmap_index[i], bitmaps[i], {shape, shape + kShapeNumbers}}));
  }
  return patterns;
}

DilationArguments DilationArguments::of(const Dilation& dilation, bool causal) {
  TORCH_CHECK_VALUE(!dilation.make, "dilation.make: got a function; allowed: none (an operator takes the spec)");
  DilationArguments a;
  a.segment_lengths = {dilation.segment_lengths.begin(), dilation.segment_lengths.end()};
  a.dilation_rates = {dilation.dilation_rates.begin(), dilation.dilation_rates.end()};
  if (!dilation.pattern) return a;
  const PatternSpec& spec = *dilation.pattern;
  TORCH_CHECK_VALUE(spec.block_q == spec.block_k, "dilation.pattern: got blocks of ", spec.block_q, " x ", spec.block_k,
                    "; allowed: square ones");
  a.kind = spec.kind;
  a.density = spec.density;
  a.block = spec.block_q;
  a.budget = spec.budget;
  a.window = spec.window;
  a.rates = spec.dilation_rates;
  a.global_tokens = spec.global_tokens;
  a.stride = spec.stride;
  a.seed = spec.seed;
  PatternSpec taken = *a.dilation().pattern;
  taken.seqlen_q = spec.seqlen_q;  // filled in by the core
  taken.seqlen_k = spec.seqlen_k;
  taken.causal = causal && spec.causal;
  TORCH_CHECK_VALUE(
      spec == taken,
      "dilation.pattern: got heads, causal beside options.causal = false, a position, segment_lengths, ranks or "
      "hierarchical densities; allowed: kind, block, density, budget, window, dilation_rates, global_tokens, stride, "
      "seed");
  return a;
}

Dilation DilationArguments::dilation() const {
  Dilation d;
  d.segment_lengths = segment_lengths;
  d.dilation_rates = dilation_rates;
  if (!kind) return d;
  d.pattern = PatternSpec{.kind = *kind,
                          .block_q = block,
                          .block_k = block,
                          .density = density,
                          .budget = budget,
                          .window = window,
                          .dilation_rates = rates,
                          .global_tokens = global_tokens,
                          .stride = stride,
                          .seed = seed};
  d.make = [](const PatternSpec& filled) {
    try {
      return make_pattern(filled);
    } catch (const Error& e) {
      for (const auto& [theirs, ours] : {std::pair{"window", "pattern_window"},
                                         {"dilation_rates", "pattern_rates"},
                                         {"seed", "pattern_seed"},
                                         {"block_q", "block"}}) {
        if (e.argument() == theirs) throw e.renamed(ours);
      }
      throw;
    }
  };
  return d;
}

void check_rank(const char* name, const at::Tensor& t, int64_t rank, const char* dims) {
  check_device(name, t);
  if (t.dim() != rank) fail(name, std::to_string(t.dim()) + " dimensions", dims);
}

Results results_of(const at::Tensor& q, const at::Tensor& v) {
  std::vector<int64_t> out = q.sizes().vec(), lse = out;
  out.back() = v.size(-1);
  lse.pop_back();
  std::swap(lse[lse.size() - 2], lse[lse.size() - 1]);
  return {empty_like_layout(q, out, q.scalar_type()), at::empty(lse, q.options().dtype(lse_type(q)))};
}

Results tensors_of(const BlockWeights& w) {
  at::Tensor indices = at::empty({static_cast<int64_t>(w.indices.size()), 4}, at::kLong);
  int64_t* to = indices.mutable_data_ptr<int64_t>();
  for (const auto& i : w.indices) {
    for (const int64_t x : {i.batch, i.head, i.row, i.col}) *to++ = x;
  }
  at::Tensor values = empty_result({indices.size(0), w.block_q, w.block_k}, at::kFloat);
  std::copy(w.values.begin(), w.values.end(), values.mutable_data_ptr<float>());
  return {indices, values};
}

BackwardArguments prepared(const BackwardArguments& given) {
  BackwardArguments t = given;
  for_each_field<BackwardArguments>([&](const auto& field) {
    const MaybeTensor x = t.*field.member;
    if (x) check_device(std::string(field.name()).c_str(), *x);
  });
  // The core wants the head dim contiguous, and dlse as lse; autograd may hand in anything.
  if (t.dout.dim() > 0 && t.dout.stride(-1) != 1 && t.dout.sizes() == t.out.sizes()) t.dout = t.dout.contiguous();
  if (t.dlse) t.dlse = t.dlse->to(t.lse.scalar_type());
  return t;
}

at::Tensor gradient_of(const char* name, const at::Tensor& t, bool wanted, MutableTensorView& view) {
  if (!wanted) return at::empty({0}, t.options());
  at::Tensor g = empty_like_layout(t, t.sizes(), t.scalar_type());
  view = output_view(name, g);
  return g;
}

at::Tensor gradient_of(const char* name, const MaybeTensor& t, bool wanted, MutableTensorView& view,
                       const at::Tensor& q) {
  if (!wanted || !t.has_value()) return at::empty({0}, q.options());
  check_result(name, t->sizes(), t->scalar_type());
  at::Tensor g = at::empty(t->sizes(), t->options());
  view = output_view(name, g);
  return g;
}

}  // namespace tessera::ops
