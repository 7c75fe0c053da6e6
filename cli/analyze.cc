// tessera analyze: how much of the true attention of real queries and keys a pattern keeps.
#include <algorithm>
#include <cmath>
#include <filesystem>

#include <fmt/format.h>

#include "command.h"
#include "options.h"
#include "pictures.h"
#include "tensors.h"
#include "tessera/analysis.h"
#include "tessera/io.h"

namespace tessera::cli {
namespace {

constexpr Column kAnalyzeColumns[] = {
    {"pattern", "pattern", 16, Style::text},
    {"requested_density", ""},
    {"block_q", "block", 5, Style::integer},
    {"block_k", ""},
    {"causal", ""},
    {"head", "head", 4, Style::text},
    {"density", "density", 8, Style::percent},
    {"coverage", "coverage", 8, Style::percent},
    {"coverage_p5", "worst 5%", 8, Style::percent},
    {"coverage_min", ""},
    {"output_error", "out error", 9, Style::percent},
    {"oracle_coverage", "oracle", 8, Style::percent},
    {"oracle_ratio", "of oracle", 9, Style::percent},
    {"locality", "nearest", 8, Style::percent},
    {"efficiency", ""},
    {"rows", ""},
};

constexpr Column kCandidates[] = {
    {"pattern", "pattern", 16, Style::text},
    {"options", "options", 34, Style::text},
    {"block_q", "block", 5, Style::integer},
    {"block_k", ""},
    {"causal", ""},
    {"density", "density", 8, Style::percent},
    {"coverage", "coverage", 8, Style::percent},
    {"reached", "reached", 7, Style::text},
    {"best", "best", 5, Style::text},
    {"target_coverage", ""},
    {"oracle_density", ""},
};

struct AnalyzeFlags {
  InputFlags input;
  PatternOptions pattern;
  std::optional<double> scale, target;
  double softcap = 0;
  int64_t sample_rows = 0;
  int threads = 0;
  bool per_head = false;
  std::string png;
};

struct Judged {
  std::string label;
  Record fields;  // what identifies the pattern
  BlockPattern pattern;
  AttentionOptions options;
  std::optional<Quality> quality;
};

void add_figures(Record& r, const QualityFigures& f) {
  r["density"] = f.density;
  r["coverage"] = f.coverage;
  r["coverage_p5"] = f.coverage_p5;
  r["coverage_min"] = f.coverage_min;
  if (f.output_error) r["output_error"] = *f.output_error;
  r["oracle_coverage"] = f.oracle_coverage;
  r["oracle_ratio"] = f.oracle_ratio;
  r["locality"] = f.locality;
  r["efficiency"] = f.efficiency;
  r["rows"] = f.rows;
}

std::vector<Judged> collect(const AnalyzeFlags& flags, const Qkv& x) {
  AttentionOptions base;
  base.scale = flags.scale;
  base.softcap = flags.softcap;
  std::vector<Judged> all;
  const auto add = [&](std::string label, Record fields, BlockPattern p, bool causal, std::optional<int64_t> window) {
    Judged j{std::move(label), std::move(fields), std::move(p), base, std::nullopt};
    causal = causal || j.pattern.shape().causal;
    if (causal) j.options.causal = true;
    set_token_window(j.options, causal, window);
    j.fields["block_q"] = j.pattern.shape().block_q;
    j.fields["block_k"] = j.pattern.shape().block_k;
    j.fields["causal"] = causal;
    all.push_back(std::move(j));
  };
  for (const PatternChoice& c : flags.pattern.choices()) {
    Record fields = {{"pattern", name_of(c.spec.kind)}};
    if (c.spec.density) fields["requested_density"] = *c.spec.density;
    add(pattern_label(c.spec), std::move(fields), build_pattern(c.spec, x.seqlen_q(), x.seqlen_k(), x.heads()),
        c.spec.causal, c.token_window);
  }
  if (flags.pattern.from_file()) {
    const std::string& file = flags.pattern.file();
    add(file, {{"pattern", file}}, read_pattern(file), flags.pattern.causal(),
        flags.pattern.token_window() ? flags.pattern.token_window() : flags.pattern.window());
  }
  return all;
}

// Patterns under the same attention options go through one pass.
void judge(Context& context, const AnalyzeFlags& flags, const Qkv& x, std::vector<Judged>& all, Executor& executor) {
  size_t done = 0;
  for (Judged& first : all) {
    if (first.quality) continue;
    context.progress.show("quality of " + first.label, static_cast<double>(done) / static_cast<double>(all.size()));
    std::vector<Judged*> group;
    std::vector<BlockPattern> patterns;
    for (Judged& j : all) {
      if (j.quality || j.options.causal != first.options.causal || j.options.window_left != first.options.window_left) {
        continue;
      }
      group.push_back(&j);
      patterns.push_back(j.pattern);
    }
    const AnalysisInput input{x.q_view(), x.k_view(), x.v_view(), first.options};
    const std::vector<Quality> results =
        quality(input, patterns, executor, {.sample_rows = flags.sample_rows, .seed = 0});
    for (size_t i = 0; i < group.size(); ++i) group[i]->quality = results[i];
    done += group.size();
  }
}

Written write_pictures(Context& context, const std::string& folder, const Qkv& x, const std::vector<Judged>& all,
                       Executor& executor) {
  const std::filesystem::path dir(folder);
  make_folder(dir);
  Written written;
  WriteTogether together;
  std::vector<CurvePoint> points;
  for (const Judged& j : all) {
    context.progress.show("drawing " + j.label);
    const PatternShape& s = j.pattern.shape();
    const AnalysisInput input{x.q_view(), x.k_view(), x.v_view(), j.options};
    const MassMap mass = attention_mass(input, s.block_q, s.block_k, executor);
    std::vector<Image> panels = {draw_pattern(j.pattern, {.title = j.label, .causal = j.options.causal})};
    for (int64_t h = 0; h < std::min<int64_t>(x.heads(), 5); ++h) {
      panels.push_back(draw_mass(mass, h, fmt::format("attention mass, head {}", h)));
    }
    const std::string stem = j.fields.contains("requested_density")
                                 ? fmt::format("{}-{}-b{}", j.fields["pattern"].get<std::string>(),
                                               j.fields["requested_density"].get<double>(), s.block_q)
                                 : fmt::format("{}-b{}", std::filesystem::path(j.label).stem().string(), s.block_q);
    written.emplace_back((dir / (stem + ".png")).string(), "the pattern beside the true attention mass");
    write_png(written.back().first, draw_sheet(panels, panels.size() > 4 ? 3 : 2));
    points.push_back(
        {j.fields["pattern"].get<std::string>(), j.quality->density, j.quality->coverage, j.quality->oracle_coverage});
  }
  if (const std::optional<Image> curve = draw_quality_curves(points)) {
    written.emplace_back((dir / "quality.png").string(), "coverage against density");
    write_png(written.back().first, *curve);
  }
  together.commit();
  return written;
}

std::string options_text(const PatternSpec& s) {
  std::string text;
  const auto add = [&](const std::string& item) { text += (text.empty() ? "" : ", ") + item; };
  if (s.density) add(fmt::format("density {:.4g}", *s.density));
  if (s.window) add(fmt::format("window {}", *s.window));
  if (s.global_tokens) add(fmt::format("global-tokens {}", *s.global_tokens));
  if (s.stride) add(fmt::format("stride {}", *s.stride));
  const auto list = [&](const char* name, const std::vector<int64_t>& values) {
    std::string joined;
    for (int64_t v : values) joined += fmt::format("{}{}", joined.empty() ? "" : ",", v);
    if (!values.empty()) add(fmt::format("{} {}", name, joined));
  };
  list("dilation-rates", s.dilation_rates);
  list("segment-lengths", s.segment_lengths);
  if (s.seed != 0) add(fmt::format("seed {}", s.seed));
  return text;
}

void find_cheapest(Context& context, const AnalyzeFlags& flags, const Qkv& x, Executor& executor) {
  const PatternChoice choice = flags.pattern.single();
  AttentionOptions options;
  options.scale = flags.scale;
  options.softcap = flags.softcap;
  options.causal = choice.spec.causal;
  context.progress.show("searching");
  const OptimizeResult result = optimize({x.q_view(), x.k_view(), x.v_view(), options}, choice.spec.block_q,
                                         choice.spec.block_k, {.target_coverage = *flags.target}, executor);
  context.progress.clear();
  RecordWriter writer(context.output, context.format, kCandidates);
  for (const OptimizeResult::Candidate& c : result.candidates) {
    writer.add({{"pattern", name_of(c.spec.kind)},
                {"options", options_text(c.spec)},
                {"block_q", c.spec.block_q},
                {"block_k", c.spec.block_k},
                {"causal", c.spec.causal},
                {"density", c.density},
                {"coverage", c.coverage},
                {"reached", c.reached},
                {"best", c.spec == result.best.spec},
                {"target_coverage", *flags.target},
                {"oracle_density", result.oracle_density}});
  }
  writer.finish();
  if (context.format == Format::table) {
    context.output.write(
        fmt::format("\nbest: --pattern {}, {}\n"
                    "The blocks of most mass, equally many in each row, reach {} at density {}.\n",
                    name_of(result.best.spec.kind), options_text(result.best.spec),
                    styled(*flags.target, Style::percent), styled(result.oracle_density, Style::percent)));
  }
  if (!result.best.reached) {
    complain("no pattern reaches the target coverage");
    context.exit_status = 1;
  }
}

void analyze(Context& context, const AnalyzeFlags& flags) {
  if (flags.scale && !std::isfinite(*flags.scale)) throw UsageError("--scale: allowed: a finite number");
  if (!(flags.softcap >= 0) || std::isinf(flags.softcap)) throw UsageError("--softcap: allowed: a number >= 0");
  if (flags.target && !(*flags.target > 0 && *flags.target <= 1)) {
    throw UsageError(fmt::format("--target-coverage: got {}; allowed: a number in (0, 1]", *flags.target));
  }
  if (flags.target && flags.pattern.from_file()) throw UsageError("--target-coverage searches named patterns");
  (void)flags.pattern.choices();
  if (!flags.png.empty()) check_folder(flags.png);
  context.progress.show("reading");
  const Qkv x = load_qkv(flags.input);
  ThreadPool pool(flags.threads);
  if (flags.target) return find_cheapest(context, flags, x, pool);

  std::vector<Judged> all = collect(flags, x);
  judge(context, flags, x, all, pool);
  Written written;
  if (!flags.png.empty()) written = write_pictures(context, flags.png, x, all, pool);
  context.progress.clear();
  std::vector<Column> columns(std::begin(kAnalyzeColumns), std::end(kAnalyzeColumns));
  if (!flags.per_head) std::ranges::find(columns, "head", &Column::key)->header = {};
  RecordWriter writer(context.output, context.format, columns);
  for (const Judged& j : all) {
    Record r = j.fields;
    if (flags.per_head) r["head"] = "all";
    add_figures(r, *j.quality);
    if (context.format == Format::json) {
      r["heads"] = Record::array();
      for (const QualityFigures& f : j.quality->heads) add_figures(r["heads"].emplace_back(Record::object()), f);
    }
    writer.add(r);
    if (!flags.per_head || context.format == Format::json) continue;
    for (size_t h = 0; h < j.quality->heads.size(); ++h) {
      Record head = j.fields;
      head["head"] = fmt::format("{}", h);
      add_figures(head, j.quality->heads[h]);
      writer.add(head);
    }
  }
  writer.finish();
  list_written(context, written);
}

}  // namespace

void add_analyze(CLI::App& app, Context& context) {
  CLI::App* command = add_command(
      app, context, "analyze", "Quality of patterns against the true attention of real queries and keys",
      "  tessera analyze --input qkv.safetensors --pattern local_window,dilated_sparse --density 0.05,0.1,0.2 \\\n"
      "      --block 64 --causal --png pictures\n"
      "  tessera analyze --input qkv.safetensors --pattern global_local --window 256 --causal --per-head\n"
      "  tessera analyze --input qkv.safetensors --target-coverage 0.9 --block 64 --causal");
  auto flags = std::make_shared<AnalyzeFlags>();
  flags->input.add_to(*command);
  flags->pattern.add_to(*command, {.file = true, .attention = true, .fallback = "local_window"});
  command->add_option("--scale", flags->scale, "Softmax scale. Default 1 / sqrt(head dim)")->type_name("X");
  command->add_option("--softcap", flags->softcap, "Scores become X tanh(score / X). Default: off")->type_name("X");
  command
      ->add_option("--target-coverage", flags->target,
                   "Search all named patterns for the cheapest one that keeps this share of the attention mass")
      ->type_name("C");
  command->add_option("--sample-rows", flags->sample_rows, "Judge about this many rows of each head; 0: all of them")
      ->check(integer(0))
      ->type_name("N")
      ->capture_default_str();
  command->add_flag("--per-head", flags->per_head, "A line for each head too (JSON has them always)");
  add_threads(*command, flags->threads);
  command
      ->add_option("--png", flags->png,
                   "Folder for pictures: each pattern beside the true attention mass, and quality against density")
      ->check(check_folder_name)
      ->type_name("DIR");
  command->callback([&context, flags] { analyze(context, *flags); });
}

}  // namespace tessera::cli
