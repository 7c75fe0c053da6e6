// torch.ops.tessera, judging patterns against true attention (analysis.h), and pictures (picture.h) as uint8
// [height, width, 3] tensors.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <charconv>
#include <string>

#include "arguments.h"
#include "executor.h"
#include "tessera/analysis.h"
#include "tessera/picture.h"

namespace tessera::ops {

// ---- mass maps: {mass}

template <>
struct Value<MassMap> {
  static MassMap take(const c10::IValue*& at) {
    const auto values = ops::take<at::Tensor>(at), row_tokens = ops::take<at::Tensor>(at);
    const auto first = ops::take<at::Tensor>(at), last = ops::take<at::Tensor>(at);
    MassMap m;
    PatternShape& s = m.shape;
    s = shape_of("mass_shape", ops::take<std::vector<int64_t>>(at));
    check_shape(s);
    // What cannot be held was not made; below that all products fit.
    constexpr int64_t kMostValues = int64_t{1} << 40;
    if (s.cols() > 0 && s.total_rows() > kMostValues / s.cols()) {
      fail("mass_shape", c10::str(s.total_rows(), " x ", s.cols(), " blocks"), "at most 2^40");
    }
    m.values = numbers<float>("values", values, s.total_rows() * s.cols());
    m.row_tokens = numbers<int32_t>("row_tokens", row_tokens, s.total_rows());
    m.first = numbers<int32_t>("first", first, s.batches * s.rows());
    m.last = numbers<int32_t>("last", last, s.batches * s.rows());
    for (size_t i = 0; i < m.first.size(); ++i) {
      if (m.first[i] < 0 || m.first[i] > m.last[i] || m.last[i] > s.cols()) {
        fail("first", std::to_string(m.first[i]) + " .. " + std::to_string(m.last[i]), "within the columns");
      }
    }
    return m;
  }
  static void put(Stack& stack, const MassMap& m) {
    const PatternShape& s = m.shape;
    stack.emplace_back(tensor(m.values, {s.batches, s.heads, s.rows(), s.cols()}));
    stack.emplace_back(tensor(m.row_tokens, {s.batches, s.heads, s.rows()}));
    stack.emplace_back(tensor(m.first, {s.batches, s.rows()}));
    stack.emplace_back(tensor(m.last, {s.batches, s.rows()}));
    stack.emplace_back(shape_numbers(s));
  }

 private:
  template <class T>
  static std::vector<T> numbers(const char* name, const at::Tensor& t, int64_t count) {
    constexpr at::ScalarType dtype = c10::CppTypeToScalarType<T>::value;
    if (!t.device().is_cpu() || t.scalar_type() != dtype || t.numel() != count) {
      fail(name, std::to_string(t.numel()) + " of " + c10::toString(t.scalar_type()),
           std::to_string(count) + " of " + c10::toString(dtype) + " on cpu, as attention_mass made them");
    }
    const at::Tensor c = t.contiguous();
    return {c.const_data_ptr<T>(), c.const_data_ptr<T>() + count};
  }
  template <class T>
  static at::Tensor tensor(const std::vector<T>& numbers, at::IntArrayRef sizes) {
    at::Tensor t = at::empty(sizes, c10::CppTypeToScalarType<T>::value);
    std::copy(numbers.begin(), numbers.end(), t.mutable_data_ptr<T>());
    return t;
  }
};

// ---- images

template <>
struct Value<Image> {
  static Image take(const c10::IValue*& at) { return image_of(ops::take<at::Tensor>(at)); }
  static void put(Stack& stack, const Image& image) {
    at::Tensor t = at::empty({image.height, image.width, 3}, at::kByte);
    uint8_t* to = t.mutable_data_ptr<uint8_t>();
    for (const Rgb& p : image.pixels) {
      for (const uint8_t x : {p.r, p.g, p.b}) *to++ = x;
    }
    stack.emplace_back(std::move(t));
  }
  static Image image_of(const at::Tensor& t) {
    if (t.dim() != 3 || t.size(2) != 3 || t.scalar_type() != at::kByte || !t.device().is_cpu()) {
      fail("image", c10::str(t.scalar_type(), " ", t.sizes()), "uint8 [height, width, 3] on cpu");
    }
    Image image(narrow(t.size(1)), narrow(t.size(0)));
    const at::Tensor c = t.contiguous();
    const uint8_t* from = c.const_data_ptr<uint8_t>();
    for (Rgb& p : image.pixels) {
      p = {from[0], from[1], from[2]};
      from += 3;
    }
    return image;
  }
};
template <>
struct Value<std::vector<Image>> {
  static std::vector<Image> take(const c10::IValue*& at) {
    std::vector<Image> images;
    for (const at::Tensor& t : ops::take<std::vector<at::Tensor>>(at)) images.push_back(Value<Image>::image_of(t));
    return images;
  }
};

namespace {

AnalysisInput input_of(const at::Tensor& q, const at::Tensor& k, const MaybeTensor& v, const Options& options) {
  return {view_of("q", q), view_of("k", k), view_of("v", v), options.get()};
}

// Names of figures, and the figures [patterns, 1 + B * H, names]: all together first, then heads. With skip_not_finite
// no figures at all where scores or values are not finite.
std::tuple<std::vector<std::string>, at::Tensor> quality_op(const at::Tensor& q, const at::Tensor& k,
                                                            const MaybeTensor& v,
                                                            const std::vector<BlockPattern>& patterns,
                                                            int64_t sample_rows, uint64_t sample_seed,
                                                            bool skip_not_finite, const OptionArguments& given) {
  const Options options(given, q);
  std::vector<std::string> names;
  for (const auto& [name, value] : named(QualityFigures{})) names.push_back(name);
  const auto width = static_cast<int64_t>(names.size());
  std::vector<Quality> found;
  try {
    found = quality(input_of(q, k, v, options), patterns, torch_threads(),
                    {.sample_rows = sample_rows, .seed = sample_seed});
  } catch (const NotFinite&) {
    if (!skip_not_finite) throw;
  }
  const int64_t heads = found.empty() ? 0 : static_cast<int64_t>(found[0].heads.size());
  at::Tensor figures = at::empty({static_cast<int64_t>(found.size()), 1 + heads, width}, at::kDouble);
  double* to = figures.mutable_data_ptr<double>();
  const auto write = [&](const QualityFigures& f) {
    for (const auto& [name, value] : named(f)) *to++ = value;
  };
  for (const Quality& x : found) {
    write(x);
    for (const QualityFigures& f : x.heads) write(f);
  }
  return {names, figures};
}

MassMap attention_mass_op(const at::Tensor& q, const at::Tensor& k, int block_q, int block_k, int64_t max_bytes,
                          const OptionArguments& given) {
  if (max_bytes < 0) fail("max_bytes", std::to_string(max_bytes), "0 or more");
  const Options options(given, q);
  return attention_mass(input_of(q, k, {}, options), block_q, block_k, torch_threads(), static_cast<size_t>(max_bytes));
}

Named coverage_op(const MassMap& mass, const BlockPattern& pattern) {
  const Coverage c = coverage_of(mass, pattern);
  return {{"coverage", c.coverage}, {"density", c.density}};
}

// ---- the search, as JSON: names and numbers only, nothing that would have to be escaped

std::string json_of(double x) {
  char text[32];
  return {text, std::to_chars(text, text + sizeof text, x).ptr};
}
std::string json_of(int64_t x) { return std::to_string(x); }
std::string json_of(int x) { return std::to_string(x); }
std::string json_of(uint64_t x) { return std::to_string(x); }
std::string json_of(bool x) { return x ? "true" : "false"; }
std::string json_of(PatternKind x) { return '"' + std::string(name_of(x)) + '"'; }
std::string json_of(Budget x) { return '"' + std::string(name_of(x)) + '"'; }
std::string json_of(const OptimizeResult::Candidate& candidate);
template <class T>
std::string json_of(const std::vector<T>& values) {
  std::string text;
  for (const T& x : values) text += (text.empty() ? "" : ", ") + json_of(x);
  return '[' + text + ']';
}
template <class T>
std::string json_of(const std::optional<T>& x) {
  return x ? json_of(*x) : "null";
}

// What is not as it is by default, and always heads and causal; lengths and blocks are those of the mass.
std::string json_of(const PatternSpec& spec) {
  PatternSpec plain;
  plain.seqlen_q = spec.seqlen_q, plain.seqlen_k = spec.seqlen_k;
  plain.block_q = spec.block_q, plain.block_k = spec.block_k;
  std::string text;
  for_each_field<PatternSpec>([&](const auto& field) {
    const std::string_view name = field.name();
    const bool always = name == "kind" || name == "heads" || name == "causal";
    if (!always && spec.*field.member == plain.*field.member) return;
    text += (text.empty() ? "\"" : ", \"") + std::string(name) + "\": " + json_of(spec.*field.member);
  });
  return '{' + text + '}';
}

std::string json_of(const OptimizeResult::Candidate& c) {
  return "{\"spec\": " + json_of(c.spec) + ", \"coverage\": " + json_of(c.coverage) +
         ", \"density\": " + json_of(c.density) + ", \"reached\": " + json_of(c.reached) + '}';
}

std::string optimize_op(const MassMap& mass, bool mass_causal, double target_coverage,
                        const std::vector<std::string>& kinds, uint64_t pattern_seed) {
  OptimizeOptions options;
  options.target_coverage = target_coverage;
  for (const std::string& kind : kinds) options.kinds.push_back(pattern_kind(kind));
  options.seed = pattern_seed;
  const OptimizeResult r = optimize(mass, mass_causal, options);
  return "{\"best\": " + json_of(r.best) + ", \"candidates\": " + json_of(r.candidates) +
         ", \"oracle_density\": " + json_of(r.oracle_density) + ", \"bound_density\": " + json_of(r.bound_density) +
         ", \"evaluated\": " + json_of(r.evaluated) + '}';
}

// ---- pictures

Image draw_pattern_op(const BlockPattern& pattern, const std::string& title, int64_t batch, int64_t head,
                      std::optional<bool> causal, int size, bool legend) {
  return draw_pattern(pattern, {title, batch, head, causal, size, legend});
}

Image draw_heat_map_op(const at::Tensor& values, const std::string& title, int64_t seqlen_q, int64_t seqlen_k,
                       const std::string& value_label, std::optional<double> min, std::optional<double> max,
                       bool log_scale, int size) {
  if (values.dim() != 2) fail("values", std::to_string(values.dim()) + " dimensions", "2, [rows, cols]");
  const at::Tensor c = values.to(at::kCPU, at::kFloat).contiguous();
  return draw_heat_map({c.const_data_ptr<float>(), static_cast<size_t>(c.numel())}, c.size(0), c.size(1),
                       {title, seqlen_q, seqlen_k, value_label, min, max, log_scale, size});
}

std::vector<double> doubles(const at::Tensor& t) {
  const at::Tensor c = t.to(at::kCPU, at::kDouble).contiguous();
  return {c.const_data_ptr<double>(), c.const_data_ptr<double>() + c.numel()};
}

Image draw_lines_op(const std::vector<std::string>& names, const std::vector<at::Tensor>& x,
                    const std::vector<at::Tensor>& y, const std::vector<int64_t>& dashed, const std::string& title,
                    const std::string& x_label, const std::string& y_label, bool log_x, bool log_y) {
  if (names.size() != x.size() || names.size() != y.size()) {
    fail("names", std::to_string(names.size()), "one a series");
  }
  std::vector<Series> series(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const bool dash = std::find(dashed.begin(), dashed.end(), static_cast<int64_t>(i)) != dashed.end();
    series[i] = {names[i], doubles(x[i]), doubles(y[i]), dash};
  }
  return draw_lines(series, {title, x_label, y_label, log_x, log_y});
}

at::Tensor encode_png_op(const Image& image) {
  const std::vector<std::byte> bytes = encode_png(image);
  at::Tensor t = at::empty({static_cast<int64_t>(bytes.size())}, at::kByte);
  std::copy(bytes.begin(), bytes.end(), reinterpret_cast<std::byte*>(t.mutable_data_ptr<uint8_t>()));
  return t;
}

void write_png_op(const Image& image, const std::string& path) { write_png(path, image); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(tessera, m) {
  define<&quality_op>(m,
                      "quality(Tensor q, Tensor k, Tensor? v, {patterns}, int sample_rows=0, int sample_seed=0, bool "
                      "skip_not_finite=False, {options}) -> (str[] names, Tensor figures)");
  define<&attention_mass_op>(m,
                             "attention_mass(Tensor q, Tensor k, int block_q, int block_k, int max_bytes=4294967296, "
                             "{options}) -> ({mass})");
  define<&coverage_op>(m, "mass_coverage({mass}, {pattern}) -> Dict(str, float)");
  define<&oracle_coverage>(m, "oracle_coverage({mass}, float density, str budget='even') -> float");
  define<&oracle_density>(m, "oracle_density({mass}, float coverage, str budget='even') -> float");
  define<&oracle_pattern>(m, "oracle_pattern({mass}, float density, str budget='even') -> ({made})");
  define<&bound_density>(m, "bound_density({mass}, float coverage) -> float");
  define<&bound_pattern>(m, "bound_pattern({mass}, float density) -> ({made})");
  define<&optimize_op>(m,
                       "optimize({mass}, bool mass_causal, float target_coverage, str[] kinds, int pattern_seed=0) -> "
                       "str");
  define<&draw_pattern_op>(m,
                           "draw_pattern({pattern}, str title='', int batch=0, int head=0, bool? causal=None, int "
                           "size=512, bool legend=True) -> Tensor");
  define<&draw_heat_map_op>(m,
                            "draw_heat_map(Tensor values, str title='', int seqlen_q=0, int seqlen_k=0, str "
                            "value_label='', float? min=None, float? max=None, bool log_scale=False, int size=512) -> "
                            "Tensor");
  define<&draw_sheet>(m, "draw_sheet(Tensor[] images, int columns, str title='') -> Tensor");
  define<&draw_lines_op>(m,
                         "draw_lines(str[] names, Tensor[] x, Tensor[] y, int[] dashed=[], str title='', str "
                         "x_label='', str y_label='', bool log_x=False, bool log_y=False) -> Tensor");
  define<&encode_png_op>(m, "encode_png(Tensor image) -> Tensor");
  define<&write_png_op>(m, "write_png(Tensor image, str path) -> ()");
}

}  // namespace tessera::ops
