// The parts of the demo on the sample: errors, quality, and times of inference and training.
#include <algorithm>
#include <array>
#include <cmath>
#include <map>

#include <fmt/format.h>

#include "demo.h"
#include "measure.h"
#include "options.h"
#include "pictures.h"
#include "tessera/pattern_statistics.h"

namespace tessera::cli {
namespace {

// Tables show the dtypes side by side; the records have one each.
constexpr Column kErrors[] = {
    {"pattern", "pattern", 20, Style::text},
    {"block", "block", 5, Style::integer},
    {"density", "density", 7, Style::percent},
    {"fp32_max_error", "fp32 error", 10, Style::error},
    {"fp32_error_ratio", "of allowed", 10, Style::percent},
    {"bf16_max_error", "bf16 error", 10, Style::error},
    {"bf16_error_ratio", "of allowed", 10, Style::percent},
};

constexpr Column kQuality[] = {
    {"pattern", "pattern", 20, Style::text},
    {"density", "density", 7, Style::percent},
    {"coverage", "coverage", 8, Style::percent},
    {"coverage_p5", "worst 5 %", 9, Style::percent},
    {"oracle_coverage", "best possible", 13, Style::percent},
    {"oracle_ratio", "of best", 7, Style::percent},
    {"output_error", "output error", 12, Style::percent},
};

constexpr Column kTimes[] = {
    {"pattern", "pattern", 20, Style::text},
    {"density", "density", 7, Style::percent},
    {"fp32_seconds", "fp32 ms", 8, Style::milliseconds},
    {"fp32_speedup_vs_dense", "vs dense", 8, Style::ratio},
    {"fp32_fraction_of_peak", "of peak", 7, Style::percent},
    {"bf16_seconds", "bf16 ms", 8, Style::milliseconds},
    {"bf16_speedup_vs_dense", "vs dense", 8, Style::ratio},
    {"bf16_fraction_of_peak", "of peak", 7, Style::percent},
    {"fp32_scratch_bytes", "scratch", 9, Style::bytes},
};

constexpr int kSampleBlock = 64;  // what the presets use
constexpr int kUltraSparseBlock = 128;

PatternSpec spec_of(PatternKind kind, int block, std::optional<double> density) {
  PatternSpec s;
  s.kind = kind;
  s.block_q = s.block_k = block;
  s.causal = true;
  s.density = density;
  return s;
}

// The guides' preset: the pattern inside the dilated segments of LongNet. Segments beyond the sample are clipped.
DemoPattern ultra_sparse(int64_t seqlen, int64_t batch, int64_t heads) {
  DemoPattern p;
  p.name = "preset ultra_sparse";
  p.choice.spec = spec_of(PatternKind::dilated_sparse, kUltraSparseBlock, 0.01);
  p.choice.segment_lengths = {4096, 8192, 16384};
  p.choice.dilation_rates = {1, 4, 16};
  const Dilation dilation = p.choice.dilation();
  AttentionOptions options;
  options.causal = true;
  p.pattern = dilated_pattern(seqlen, dilation, true, heads, kUltraSparseBlock, kUltraSparseBlock);
  p.density = dilated_density(dilated_pairs(seqlen, dilation, options, batch, heads), seqlen, true, batch, heads);
  return p;
}

template <class Call>
ReferenceError run_and_compare(Call&& call, Executor& executor) {
  call(executor);
  return compare_to_reference(call, executor);
}

// |out - dense| / |dense| (Frobenius) of dilated attention.
double dilated_output_error(const DemoSample& sample, const DemoPattern& p, Executor& executor) {
  DilatedCall call(sample.fp32, p.choice.dilation(), sample.options, Isa::automatic);
  ForwardCall dense(sample.fp32, sample.patterns.front().pattern, sample.options, Isa::automatic);
  call(executor);
  dense(executor);
  const float* got = static_cast<const float*>(call.out.data());
  const float* want = static_cast<const float*>(dense.out.data());
  double error = 0, norm = 0;
  for (int64_t i = 0; i < call.out.numel(); ++i) {
    const double x = want[i], difference = got[i] - x;
    error += difference * difference;
    norm += x * x;
  }
  return norm > 0 ? std::sqrt(error / norm) : 0;
}

}  // namespace

void add_beside(Record& row, const Record& record) {
  const std::string prefix = record.at("dtype").get<std::string>() + "_";
  for (const auto& [key, value] : record.items()) {
    row[key] = value;
    row[prefix + key] = value;
  }
}

DemoSample prepare_sample(const std::string& path, bool quick, Executor& executor) {
  DemoSample sample;
  InputFlags input;
  input.input = path;
  const Qkv x = load_qkv(input);
  sample.fp32 = convert(x, DType::f32, executor);
  sample.bf16 = convert(x, DType::bf16, executor);
  sample.options.causal = true;

  const auto add = [&](std::string name, const PatternSpec& spec) {
    BlockPattern pattern = build_pattern(spec, x.seqlen_q(), x.seqlen_k(), x.heads());
    const double density = statistics(pattern, spec.causal).density;
    sample.patterns.push_back({std::move(name), {.spec = spec}, std::move(pattern), density});
  };
  add("dense", spec_of(PatternKind::causal, kSampleBlock, std::nullopt));
  // The guides' presets.
  PatternSpec local = spec_of(PatternKind::local_window, kSampleBlock, std::nullopt);
  local.window = 256;
  add("preset local", local);
  PatternSpec dilated = spec_of(PatternKind::dilated_sparse, kSampleBlock, 0.1);
  dilated.dilation_rates = {1, 2, 4, 8};
  add("preset dilated", dilated);
  PatternSpec global_local = spec_of(PatternKind::global_local, kSampleBlock, std::nullopt);
  global_local.window = 256;
  global_local.global_tokens = 64;
  add("preset global_local", global_local);
  sample.patterns.push_back(ultra_sparse(x.seqlen_q(), x.batch(), x.heads()));
  std::vector<double> densities = {0.05, 0.1};
  if (!quick) densities = {0.02, 0.05, 0.1, 0.2, 0.4};
  for (const double density : densities) {
    add(fmt::format("local_window {}", density), spec_of(PatternKind::local_window, kSampleBlock, density));
  }
  for (const double density : densities) {
    add(fmt::format("dilated_sparse {}", density), spec_of(PatternKind::dilated_sparse, kSampleBlock, density));
  }
  return sample;
}

Record demo_errors(Context& context, const DemoSample& sample, bool quick, Executor& executor) {
  demo_heading(context, "1. Is it right?",
               "Largest difference to fp64 on the same pattern, and as a share of what rounding may cause.");
  Record records = Record::array();
  RecordWriter writer(context.output, Format::table, kErrors);
  size_t done = 0;
  for (const DemoPattern& p : sample.patterns) {
    // fp64 of dense attention takes longer than the rest of the quick demo.
    if (quick && p.choice.spec.kind == PatternKind::causal) continue;
    Record row;
    for (const Qkv* x : {&sample.fp32, &sample.bf16}) {
      context.progress.show("checking " + p.name, static_cast<double>(done++) / (2.0 * sample.patterns.size()));
      const ReferenceError e =
          p.choice.dilated()
              ? run_and_compare(DilatedCall(*x, p.choice.dilation(), sample.options, Isa::automatic), executor)
              : run_and_compare(ForwardCall(*x, p.pattern, sample.options, Isa::automatic), executor);
      Record r = {{"pattern", p.name},
                  {"block", p.choice.spec.block_q},
                  {"density", p.density},
                  {"dtype", name_of(x->q.dtype())},
                  {"max_error", e.out_error},
                  {"error_ratio", e.out_ratio},
                  {"max_lse_error", e.lse_error},
                  {"lse_error_ratio", e.lse_ratio},
                  {"passed", e.passed}};
      add_beside(row, r);
      records.push_back(std::move(r));
    }
    if (context.format != Format::table) continue;
    context.progress.clear();
    writer.add(row);
  }
  return records;
}

Record demo_quality(Context& context, const DemoSample& sample, Executor& executor) {
  demo_heading(context, "2. What does a pattern keep of dense attention?",
               "Coverage: attention mass kept, mean over rows and at the row worse than 95 %. Best possible: by\n"
               "the best blocks at the same density. Output error: |sparse - dense| / |dense|. ultra_sparse is\n"
               "dilated attention, which chooses tokens, not blocks.");
  context.progress.show("measuring quality");
  std::vector<BlockPattern> patterns;
  for (const DemoPattern& p : sample.patterns) patterns.push_back(p.pattern);
  const AnalysisInput input{sample.fp32.q_view(), sample.fp32.k_view(), sample.fp32.v_view(), sample.options};
  const std::vector<Quality> results = quality(input, patterns, executor);
  context.progress.clear();
  Record records = Record::array();
  RecordWriter writer(context.output, Format::table, kQuality);
  for (size_t i = 0; i < results.size(); ++i) {
    const Quality& q = results[i];
    const DemoPattern& p = sample.patterns[i];
    Record r = {{"pattern", p.name},      {"block", p.choice.spec.block_q}, {"density", p.density},
                {"coverage", q.coverage}, {"coverage_p5", q.coverage_p5},   {"coverage_min", q.coverage_min}};
    if (p.choice.dilated()) {  // chooses pairs, which no choice of blocks compares to
      r["output_error"] = dilated_output_error(sample, p, executor);
    } else {
      r["oracle_coverage"] = q.oracle_coverage;
      r["oracle_ratio"] = q.oracle_ratio;
      r["locality"] = q.locality;
      r["efficiency"] = q.efficiency;
      r["output_error"] = q.output_error.value_or(0);
    }
    r["head_coverage"] = Record::array();
    for (const QualityFigures& f : q.heads) r["head_coverage"].push_back(f.coverage);
    if (context.format == Format::table) writer.add(r);
    records.push_back(std::move(r));
  }
  return records;
}

namespace {

Record measure_times(Context& context, const DemoSample& sample, Pass pass, bool quick, ThreadPool& pool) {
  Record records = Record::array();
  RecordWriter writer(context.output, Format::table, kTimes);
  constexpr int kRepeat = 7;
  size_t done = 0;
  std::map<DType, double> dense;
  std::map<DType, Tensor> dout;
  Peaks peaks;
  for (const DemoPattern& p : sample.patterns) {
    // One sweep over densities is enough there.
    if (pass != Pass::forward && p.choice.spec.kind == PatternKind::local_window && p.choice.spec.density) continue;
    Record row;
    // Other work on the machine comes and goes: the full demo measures the peak beside each pattern.
    if (!quick || dense.empty()) peaks = measure_peaks(automatic_isa(), pool.num_threads(), pool, false);
    for (const Qkv* x : {&sample.fp32, &sample.bf16}) {
      context.progress.show("timing " + p.name, static_cast<double>(done++) / (2.0 * sample.patterns.size()));
      const DType dtype = x->q.dtype();
      if (!dout.contains(dtype)) dout[dtype] = random_normal(dtype, x->out_shape(), 0, pool);
      PassCall call = p.choice.dilated()
                          ? PassCall(pass, *x, &dout[dtype], p.choice.dilation(), sample.options, Isa::automatic, pool)
                          : PassCall(pass, *x, &dout[dtype], p.pattern, sample.options, Isa::automatic, pool);
      PassCall::Info info;
      const Timing timing = time_calls(kRepeat, [&] { info = call(pool); });
      if (!dense.contains(dtype)) dense[dtype] = timing.median;  // the first pattern
      const double gflops = call.flops() / timing.median / 1e9;
      const double peak = peaks.gflops(dtype);
      Record r = {{"pattern", p.name},
                  {"block", p.choice.spec.block_q},
                  {"density", p.density},
                  {"dtype", name_of(dtype)},
                  {"seconds", timing.median},
                  {"dense_seconds", dense[dtype]},
                  {"speedup_vs_dense", dense[dtype] / timing.median},
                  {"gflops", gflops},
                  {"peak_gflops", peak},
                  {"fraction_of_peak", gflops / peak},
                  {"isa", name_of(info.isa)},
                  {"scratch_bytes", info.scratch_bytes}};
      add_beside(row, r);
      records.push_back(std::move(r));
    }
    if (context.format != Format::table) continue;
    context.progress.clear();
    writer.add(row);
  }
  return records;
}

}  // namespace

Record demo_times(Context& context, const DemoSample& sample, bool quick, ThreadPool& pool) {
  demo_heading(context, "3. How fast is it?",
               "Against dense attention by the same kernels; as a share of the peak that was measured beside it.\n"
               "Scratch: all memory that a call takes.");
  return measure_times(context, sample, Pass::forward, quick, pool);
}

Record demo_training(Context& context, const DemoSample& sample, bool quick, ThreadPool& pool) {
  demo_heading(context, "4. What does a training step take?",
               "Forward and backward, with the gradients of q, k and v; against the same with dense attention.\n"
               "Scratch: the larger of the two calls.");
  return measure_times(context, sample, Pass::both, quick, pool);
}

Record demo_pictures(Context& context, const DemoSample& sample, const Record& scale, bool quick,
                     const std::filesystem::path& folder, Pictures& pictures, Executor& executor) {
  Record files = Record::array();
  const auto write = [&](const std::string& name, const Image& image, const std::string& shows) {
    const std::string path = (folder / name).string();
    pictures.emplace_back(path, encode_png(image));
    files.push_back({{"file", path}, {"shows", shows}});
  };
  const AnalysisInput input{sample.fp32.q_view(), sample.fp32.k_view(), {}, sample.options};
  context.progress.show("drawing patterns");
  const int64_t seqlen = sample.fp32.seqlen_q();
  const MassMap mass = attention_mass(input, kSampleBlock, kSampleBlock, executor);
  constexpr int kPanel = 320;         // pixels
  constexpr int64_t kPanelHeads = 4;  // as many as presets, so that the sheet is full
  std::vector<Image> panels;
  for (int64_t h = 0; h < std::min(kPanelHeads, sample.fp32.heads()); ++h) {
    panels.push_back(draw_mass(mass, h, fmt::format("true attention, head {}", h), kPanel));
  }
  while (panels.size() < kPanelHeads) panels.emplace_back(kPanel, kPanel);
  for (const DemoPattern& p : sample.patterns) {
    if (p.name.rfind("preset ", 0) != 0) continue;
    std::string title = p.name.substr(7);
    if (p.choice.dilated()) title += fmt::format(", {:.1f} % of pairs", 100 * p.density);
    panels.push_back(draw_pattern(p.pattern, {.title = title, .causal = true, .size = kPanel}));
  }
  write("patterns.png",
        draw_sheet(panels, kPanelHeads, "True attention mass per block, and what the presets keep of it"),
        "the presets beside the true attention mass");

  context.progress.show("drawing quality curves");
  std::vector<PatternSpec> specs;
  for (PatternKind kind : {PatternKind::local_window, PatternKind::dilated_sparse, PatternKind::global_local,
                           PatternKind::bigbird, PatternKind::random}) {
    specs.push_back(spec_of(kind, kSampleBlock, std::nullopt));
    specs.back().seqlen_q = specs.back().seqlen_k = seqlen;
  }
  std::vector<double> densities = {0.05, 0.1, 0.2, 0.4};
  if (!quick) densities = {0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7};
  std::vector<Series> series;
  for (const QualityCurve& curve : quality_curves(input, specs, densities, kSampleBlock, kSampleBlock, executor)) {
    Series s{curve.name, {}, {}, curve.name == "best possible"};
    for (const QualityCurve::Point& point : curve.points) {
      s.x.push_back(point.density);
      s.y.push_back(point.coverage);
    }
    series.push_back(std::move(s));
  }
  write("quality.png",
        draw_lines(series, {.title = "Attention mass kept, by pattern",
                            .x_label = "density (share of pairs kept)",
                            .y_label = "coverage",
                            .log_x = true,
                            .log_y = false,
                            .y_min = 0,
                            .y_max = 1}),
        "coverage against density, with the best possible choice");

  Series fp32{"fp32, here", {}, {}, false}, bf16{"bf16, here", {}, {}, false};
  Series guide{"GTX 1080, the guides", {}, {}, true};
  for (const Record& r : scale) {
    if (!r.contains("seconds")) continue;
    Series& s = r["dtype"] == "fp32" ? fp32 : bf16;
    s.x.push_back(r["seq"].get<double>());
    s.y.push_back(1e3 * r["seconds"].get<double>());
    if (&s == &fp32) {
      guide.x.push_back(s.x.back());
      guide.y.push_back(1e3 * r["guide_seconds"].get<double>());
    }
  }
  std::vector<Series> curves;
  for (Series& s : std::array{fp32, bf16, guide}) {
    if (!s.x.empty()) curves.push_back(std::move(s));
  }
  if (!curves.empty()) {
    write("scale.png",
          draw_lines(curves, {.title = "Time by length, density 10 % to 0.5 %",
                              .x_label = "tokens",
                              .y_label = "milliseconds",
                              .log_x = true,
                              .log_y = true,
                              .y_min = {},
                              .y_max = {}}),
          "time against length, beside the guides' figures");
  }
  context.progress.clear();
  return files;
}

}  // namespace tessera::cli
