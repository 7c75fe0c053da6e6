// torch.ops.tessera, judging patterns against true attention (analysis.h), and pictures (picture.h) as uint8
// [height, width, 3] tensors.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <string>

#include "convert.h"
#include "executor.h"
#include "schema.h"
#include "tessera/analysis.h"
#include "tessera/picture.h"

#define PATTERN_RESULT "(Tensor indptr, Tensor indices, Tensor bitmap_index, Tensor bitmaps, int[] pattern_shape)"
// attention_mass' result
#define MASS "Tensor values, Tensor row_tokens, Tensor first, Tensor last, int[] mass_shape"
#define MASS_PARAMETERS                                                                                    \
  const at::Tensor &values, const at::Tensor &row_tokens, const at::Tensor &first, const at::Tensor &last, \
      at::IntArrayRef mass_shape
#define MASS_VALUE mass_of(values, row_tokens, first, last, mass_shape)

namespace tessera::ops {

namespace {

std::string text_of(c10::string_view s) { return {s.data(), s.size()}; }

AnalysisInput input_of(const at::Tensor& q, const at::Tensor& k, const MaybeTensor& v, const Options& options) {
  AnalysisInput input;
  input.q = view_of("q", q);
  input.k = view_of("k", k);
  input.v = view_of("v", v);
  input.options = options.get();
  return input;
}

// [patterns, 1 + B * H, 11]: all together first, then heads; columns are the fields of QualityFigures, a missing output
// error NaN.
at::Tensor quality_op(const at::Tensor& q, const at::Tensor& k, const MaybeTensor& v, PATTERN_LISTS_PARAMETERS,
                      int64_t sample_rows, int64_t sample_seed, OPTION_PARAMETERS) {
  return translate_errors([&] {
    const Options options(OPTION_VALUE, q);
    const auto patterns = PATTERN_LISTS_VALUE;
    const auto found = quality(input_of(q, k, v, options), patterns, torch_threads(),
                               {.sample_rows = sample_rows, .seed = static_cast<uint64_t>(sample_seed)});
    const int64_t heads = found.empty() ? 0 : static_cast<int64_t>(found[0].heads.size());
    at::Tensor figures = at::empty({static_cast<int64_t>(found.size()), 1 + heads, 11}, at::kDouble);
    double* to = figures.mutable_data_ptr<double>();
    const auto write = [&](const QualityFigures& f) {
      for (double x :
           {f.coverage, f.coverage_p5, f.coverage_min, f.density, f.efficiency, f.locality, f.oracle_coverage,
            f.oracle_ratio, f.bound_coverage, f.output_error.value_or(std::numeric_limits<double>::quiet_NaN()),
            static_cast<double>(f.rows)}) {
        *to++ = x;
      }
    };
    for (const Quality& x : found) {
      write(x);
      for (const QualityFigures& f : x.heads) write(f);
    }
    return figures;
  });
}

using MassResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, std::vector<int64_t>>;

MassResult attention_mass_op(const at::Tensor& q, const at::Tensor& k, int64_t block_q, int64_t block_k,
                             int64_t max_bytes, OPTION_PARAMETERS) {
  return translate_errors([&] {
    if (max_bytes < 0) fail("max_bytes", std::to_string(max_bytes), "0 or more");
    const Options options(OPTION_VALUE, q);
    const MassMap m = attention_mass(input_of(q, k, {}, options), narrow(block_q), narrow(block_k), torch_threads(),
                                     static_cast<size_t>(max_bytes));
    const PatternShape& s = m.shape;
    at::Tensor values = at::empty({s.batches, s.heads, s.rows(), s.cols()}, at::kFloat);
    at::Tensor row_tokens = at::empty({s.batches, s.heads, s.rows()}, at::kInt);
    at::Tensor first = at::empty({s.batches, s.rows()}, at::kInt), last = at::empty({s.batches, s.rows()}, at::kInt);
    std::copy(m.values.begin(), m.values.end(), values.mutable_data_ptr<float>());
    std::copy(m.row_tokens.begin(), m.row_tokens.end(), row_tokens.mutable_data_ptr<int32_t>());
    std::copy(m.first.begin(), m.first.end(), first.mutable_data_ptr<int32_t>());
    std::copy(m.last.begin(), m.last.end(), last.mutable_data_ptr<int32_t>());
    return MassResult{values, row_tokens, first, last, shape_numbers(s)};
  });
}

template <class T>
std::vector<T> numbers(const char* name, const at::Tensor& t, at::ScalarType dtype, int64_t count) {
  if (!t.device().is_cpu() || t.scalar_type() != dtype || t.numel() != count) {
    fail(name, std::to_string(t.numel()) + " of " + c10::toString(t.scalar_type()),
         std::to_string(count) + " of " + c10::toString(dtype) + " on cpu, as attention_mass made them");
  }
  const at::Tensor c = t.contiguous();
  return {c.const_data_ptr<T>(), c.const_data_ptr<T>() + count};
}

MassMap mass_of(MASS_PARAMETERS) {
  MassMap m;
  PatternShape& s = m.shape;
  s = shape_of("mass_shape", mass_shape);
  check_shape(s);
  // What cannot be held was not made; below that all products fit.
  constexpr int64_t kMostValues = int64_t{1} << 40;
  if (s.cols() > 0 && s.total_rows() > kMostValues / s.cols()) {
    fail("mass_shape", c10::str(s.total_rows(), " x ", s.cols(), " blocks"), "at most 2^40");
  }
  m.values = numbers<float>("values", values, at::kFloat, s.total_rows() * s.cols());
  m.row_tokens = numbers<int32_t>("row_tokens", row_tokens, at::kInt, s.total_rows());
  m.first = numbers<int32_t>("first", first, at::kInt, s.batches * s.rows());
  m.last = numbers<int32_t>("last", last, at::kInt, s.batches * s.rows());
  for (size_t i = 0; i < m.first.size(); ++i) {
    if (m.first[i] < 0 || m.first[i] > m.last[i] || m.last[i] > s.cols()) {
      fail("first", std::to_string(m.first[i]) + " .. " + std::to_string(m.last[i]), "within the columns");
    }
  }
  return m;
}

Budget budget_of(c10::string_view name) { return budget_of_name({name.data(), name.size()}); }

PatternResult oracle_pattern_op(MASS_PARAMETERS, double density, c10::string_view budget) {
  return translate_errors([&] { return tensors_of(oracle_pattern(MASS_VALUE, density, budget_of(budget))); });
}

PatternResult bound_pattern_op(MASS_PARAMETERS, double density) {
  return translate_errors([&] { return tensors_of(bound_pattern(MASS_VALUE, density)); });
}

std::vector<double> mass_densities_op(MASS_PARAMETERS, double coverage, c10::string_view budget) {
  return translate_errors([&] {
    const MassMap m = MASS_VALUE;
    return std::vector<double>{oracle_density(m, coverage, budget_of(budget)), bound_density(m, coverage)};
  });
}

double oracle_coverage_op(MASS_PARAMETERS, double density, c10::string_view budget) {
  return translate_errors([&] { return oracle_coverage(MASS_VALUE, density, budget_of(budget)); });
}

std::vector<double> coverage_op(MASS_PARAMETERS, PATTERN_PARAMETERS) {
  return translate_errors([&] {
    const Coverage c = coverage_of(MASS_VALUE, pattern_of(PATTERN_VALUE));
    return std::vector<double>{c.coverage, c.density};
  });
}

std::string list_text(const std::vector<int64_t>& values) {
  std::string text = "[";
  for (size_t i = 0; i < values.size(); ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

// Names and numbers only: nothing that JSON would have to escape.
std::string spec_text(const PatternSpec& s) {
  std::string text = "{\"name\": \"" + std::string(name_of(s.kind)) + "\"";
  const auto add = [&](const char* name, const std::string& value) {
    text += std::string(", \"") + name + "\": " + value;
  };
  if (s.density) add("density", c10::str(*s.density));
  if (s.window) add("window", std::to_string(*s.window));
  if (!s.dilation_rates.empty()) add("dilation_rates", list_text(s.dilation_rates));
  if (!s.segment_lengths.empty()) add("segment_lengths", list_text(s.segment_lengths));
  if (s.global_tokens) add("global_tokens", std::to_string(*s.global_tokens));
  if (s.stride) add("stride", std::to_string(*s.stride));
  if (s.seed) add("seed", std::to_string(s.seed));
  if (s.budget != Budget::even) add("budget", '"' + std::string(name_of(s.budget)) + '"');
  add("causal", s.causal ? "true" : "false");
  add("heads", std::to_string(s.heads));
  return text + "}";
}

// The specs as JSON, best first and then the candidates; [1 + candidates, 3]: coverage, density, reached; oracle
// density, bound density, patterns evaluated.
using OptimizeTensors = std::tuple<std::string, at::Tensor, double, double, int64_t>;
OptimizeTensors optimize_op(MASS_PARAMETERS, bool mass_causal, double target_coverage,
                            const c10::List<std::string>& kinds, int64_t pattern_seed) {
  return translate_errors([&] {
    OptimizeOptions options;
    options.target_coverage = target_coverage;
    for (const std::string& kind : kinds.vec()) options.kinds.push_back(pattern_kind(kind));
    options.seed = static_cast<uint64_t>(pattern_seed);
    const OptimizeResult r = optimize(MASS_VALUE, mass_causal, options);
    at::Tensor figures = at::empty({1 + static_cast<int64_t>(r.candidates.size()), 3}, at::kDouble);
    double* to = figures.mutable_data_ptr<double>();
    std::string text = "[";
    const auto write = [&](const OptimizeResult::Candidate& c) {
      text += (text.size() > 1 ? ", " : "") + spec_text(c.spec);
      for (double x : {c.coverage, c.density, c.reached ? 1. : 0.}) *to++ = x;
    };
    write(r.best);
    for (const auto& c : r.candidates) write(c);
    return OptimizeTensors{text + "]", figures, r.oracle_density, r.bound_density, r.evaluated};
  });
}

at::Tensor tensor_of(const Image& image) {
  at::Tensor t = at::empty({image.height, image.width, 3}, at::kByte);
  uint8_t* to = t.mutable_data_ptr<uint8_t>();
  for (const Rgb& p : image.pixels) {
    *to++ = p.r;
    *to++ = p.g;
    *to++ = p.b;
  }
  return t;
}

Image image_of(const at::Tensor& t) {
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

at::Tensor draw_pattern_op(PATTERN_PARAMETERS, c10::string_view title, int64_t batch, int64_t head,
                           std::optional<bool> causal, int64_t size, bool legend) {
  return translate_errors([&] {
    return tensor_of(
        draw_pattern(pattern_of(PATTERN_VALUE), {text_of(title), batch, head, causal, narrow(size), legend}));
  });
}

at::Tensor draw_heat_map_op(const at::Tensor& values, c10::string_view title, int64_t seqlen_q, int64_t seqlen_k,
                            c10::string_view value_label, std::optional<double> min, std::optional<double> max,
                            bool log_scale, int64_t size) {
  return translate_errors([&] {
    if (values.dim() != 2) fail("values", std::to_string(values.dim()) + " dimensions", "2, [rows, cols]");
    const at::Tensor c = values.to(at::kCPU, at::kFloat).contiguous();
    HeatMapPicture options;
    options.title = text_of(title);
    options.seqlen_q = seqlen_q;
    options.seqlen_k = seqlen_k;
    options.value_label = text_of(value_label);
    options.min = min;
    options.max = max;
    options.log_scale = log_scale;
    options.size = narrow(size);
    return tensor_of(
        draw_heat_map({c.const_data_ptr<float>(), static_cast<size_t>(c.numel())}, c.size(0), c.size(1), options));
  });
}

at::Tensor draw_sheet_op(at::TensorList images, int64_t columns, c10::string_view title) {
  return translate_errors([&] {
    std::vector<Image> panels;
    for (const at::Tensor& t : images) panels.push_back(image_of(t));
    return tensor_of(draw_sheet(panels, narrow(columns), text_of(title)));
  });
}

at::Tensor draw_lines_op(const c10::List<std::string>& names, at::TensorList x, at::TensorList y,
                         at::IntArrayRef dashed, c10::string_view title, c10::string_view x_label,
                         c10::string_view y_label, bool log_x, bool log_y) {
  return translate_errors([&] {
    if (names.size() != x.size() || names.size() != y.size())
      fail("names", std::to_string(names.size()), "one a series");
    std::vector<Series> series(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      const at::Tensor xs = x[i].to(at::kCPU, at::kDouble).contiguous(),
                       ys = y[i].to(at::kCPU, at::kDouble).contiguous();
      series[i].name = names.get(i);
      series[i].x.assign(xs.const_data_ptr<double>(), xs.const_data_ptr<double>() + xs.numel());
      series[i].y.assign(ys.const_data_ptr<double>(), ys.const_data_ptr<double>() + ys.numel());
      series[i].dashed = std::find(dashed.begin(), dashed.end(), static_cast<int64_t>(i)) != dashed.end();
    }
    LinePicture options;
    options.title = text_of(title);
    options.x_label = text_of(x_label);
    options.y_label = text_of(y_label);
    options.log_x = log_x;
    options.log_y = log_y;
    return tensor_of(draw_lines(series, options));
  });
}

at::Tensor encode_png_op(const at::Tensor& image) {
  return translate_errors([&] {
    const std::vector<std::byte> bytes = encode_png(image_of(image));
    at::Tensor t = at::empty({static_cast<int64_t>(bytes.size())}, at::kByte);
    std::copy(bytes.begin(), bytes.end(), reinterpret_cast<std::byte*>(t.mutable_data_ptr<uint8_t>()));
    return t;
  });
}

void write_png_op(const at::Tensor& image, c10::string_view path) {
  translate_errors([&] { write_png(text_of(path), image_of(image)); });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tessera, m) {
  m.def("quality(Tensor q, Tensor k, Tensor? v, " PATTERN_LISTS ", int sample_rows=0, int sample_seed=0, " OPTIONS
        ") -> Tensor");
  m.def("attention_mass(Tensor q, Tensor k, int block_q, int block_k, int max_bytes=4294967296, " OPTIONS ") -> (" MASS
        ")");
  m.def("mass_coverage(" MASS ", " PATTERN ") -> float[]");                         // coverage, density
  m.def("mass_densities(" MASS ", float coverage, str budget='even') -> float[]");  // of the oracle, and the bound
  m.def("oracle_coverage(" MASS ", float density, str budget='even') -> float");
  m.def("oracle_pattern(" MASS ", float density, str budget='even') -> " PATTERN_RESULT);
  m.def("bound_pattern(" MASS ", float density) -> " PATTERN_RESULT);
  m.def("optimize(" MASS
        ", bool mass_causal, float target_coverage, str[] kinds, int pattern_seed=0) -> "
        "(str specs, Tensor figures, float oracle_density, float bound_density, int evaluated)");
  m.def("draw_pattern(" PATTERN
        ", str title='', int batch=0, int head=0, bool? causal=None, int size=512, "
        "bool legend=True) -> Tensor");
  m.def(
      "draw_heat_map(Tensor values, str title='', int seqlen_q=0, int seqlen_k=0, str value_label='', "
      "float? min=None, float? max=None, bool log_scale=False, int size=512) -> Tensor");
  m.def("draw_sheet(Tensor[] images, int columns, str title='') -> Tensor");
  m.def(
      "draw_lines(str[] names, Tensor[] x, Tensor[] y, int[] dashed=[], str title='', str x_label='', "
      "str y_label='', bool log_x=False, bool log_y=False) -> Tensor");
  m.def("encode_png(Tensor image) -> Tensor");
  m.def("write_png(Tensor image, str path) -> ()");
}

TORCH_LIBRARY_IMPL(tessera, CPU, m) {
  m.impl("quality", quality_op);
  m.impl("attention_mass", attention_mass_op);
  m.impl("mass_coverage", coverage_op);
  m.impl("mass_densities", mass_densities_op);
  m.impl("oracle_coverage", oracle_coverage_op);
  m.impl("oracle_pattern", oracle_pattern_op);
  m.impl("bound_pattern", bound_pattern_op);
  m.impl("optimize", optimize_op);
  m.impl("draw_pattern", draw_pattern_op);
  m.impl("draw_heat_map", draw_heat_map_op);
  m.impl("draw_sheet", draw_sheet_op);
  m.impl("draw_lines", draw_lines_op);
  m.impl("encode_png", encode_png_op);
  m.impl("write_png", write_png_op);
}

}  // namespace tessera::ops
