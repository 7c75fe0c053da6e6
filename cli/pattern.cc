// tessera pattern: builds patterns and says what they look like.
#include <fmt/format.h>

#include "command.h"
#include "measure.h"
#include "options.h"
#include "tessera/io.h"
#include "tessera/pattern_statistics.h"
#include "tessera/picture.h"

namespace tessera::cli {
namespace {

constexpr Column kPatternColumns[] = {
    {"pattern", "pattern", 16, Style::text},
    {"requested_density", ""},
    {"block_q", "block", 5, Style::integer},
    {"block_k", ""},
    {"seqlen_q", ""},
    {"seqlen_k", ""},
    {"pattern_heads", ""},
    {"pattern_batches", ""},
    {"causal", ""},
    {"rows", ""},
    {"cols", ""},
    {"kept_blocks", "kept", 8, Style::integer},
    {"partial_blocks", ""},
    {"admissible_blocks", ""},
    {"density", "density", 7, Style::percent},
    {"sparsity", ""},
    {"row_density_mean", ""},
    {"row_density_min", "row min", 7, Style::percent},
    {"row_density_max", "row max", 7, Style::percent},
    {"row_density_std", ""},
    {"column_density_mean", ""},
    {"column_density_min", ""},
    {"column_density_max", ""},
    {"column_density_std", ""},
    {"diagonal_density", "diagonal", 8, Style::percent},
    {"empty_rows", "empty", 5, Style::integer},
    {"load_imbalance", "imbalance", 9, Style::ratio},
    {"bytes", "memory", 9, Style::bytes},
    {"build_seconds", ""},
};

struct PatternFlagsValues {
  PatternOptions pattern;
  int64_t seqlen = 0;
  std::optional<int64_t> seqlen_k;
  int64_t heads = 1;
  std::string output, png;
  CLI::Option *seq = nullptr, *seq_k = nullptr, *heads_option = nullptr;
  bool ascii = false;
};

void add_spread(Record& record, const std::string& name, const Spread& s) {
  record[name + "_mean"] = s.mean;
  record[name + "_min"] = s.min;
  record[name + "_max"] = s.max;
  record[name + "_std"] = s.std;
}

Record describe(const BlockPattern& p, bool causal) {
  const PatternShape& shape = p.shape();
  const PatternStatistics s = statistics(p, causal);
  Record r = {{"block_q", shape.block_q},
              {"block_k", shape.block_k},
              {"seqlen_q", shape.seqlen_q},
              {"seqlen_k", shape.seqlen_k},
              {"pattern_heads", shape.heads},
              {"pattern_batches", shape.batches},
              {"causal", causal},
              {"rows", s.rows},
              {"cols", s.cols},
              {"kept_blocks", s.kept_blocks},
              {"partial_blocks", s.partial_blocks},
              {"admissible_blocks", s.admissible_blocks},
              {"density", s.density},
              {"sparsity", s.sparsity}};
  add_spread(r, "row_density", s.row_density);
  add_spread(r, "column_density", s.column_density);
  r["diagonal_density"] = s.diagonal_density;
  r["empty_rows"] = s.empty_rows;
  r["load_imbalance"] = s.load_imbalance;
  r["bytes"] = p.bytes();
  return r;
}

void show(Context& context, const PatternFlagsValues& flags) {
  const std::vector<PatternChoice> choices = flags.pattern.choices();
  const bool from_file = flags.pattern.from_file();
  if (!from_file && flags.seqlen < 1) throw UsageError("--seq is required");
  for (const CLI::Option* option : {flags.seq, flags.seq_k, flags.heads_option}) {
    if (!from_file || option->count() == 0) continue;
    throw UsageError(fmt::format("--{}: got it beside --pattern-file; allowed: one of them (the file has its own)",
                                 option->get_lnames().front()));
  }
  if (choices.size() > 1 && !flags.output.empty()) {
    throw UsageError("--output takes one pattern; this command line sweeps over several");
  }
  if (flags.ascii && context.format == Format::csv) throw UsageError("--ascii goes with --format table or json");

  RecordWriter writer(context.output, context.format, kPatternColumns);
  std::vector<Image> panels;
  WriteTogether together;
  for (size_t i = 0; i < std::max<size_t>(1, choices.size()); ++i) {
    BlockPattern pattern;
    Record record;
    bool causal = flags.pattern.causal();
    std::string label;
    if (from_file) {
      pattern = read_pattern(flags.pattern.file());
      label = flags.pattern.file();
      record["pattern"] = label;
      causal = causal || pattern.shape().causal;
    } else {
      const PatternSpec& spec = choices[i].spec;
      label = pattern_label(spec);
      context.progress.show(label, static_cast<double>(i) / static_cast<double>(choices.size()));
      const int64_t seqlen_k = flags.seqlen_k.value_or(flags.seqlen);
      causal = spec.causal;
      record["pattern"] = name_of(spec.kind);
      if (spec.density) record["requested_density"] = *spec.density;
      record["build_seconds"] = time_once([&] { pattern = build_pattern(spec, flags.seqlen, seqlen_k, flags.heads); });
    }
    record.update(describe(pattern, causal));
    if (flags.ascii && context.format == Format::json) record["ascii"] = ascii(pattern, 0, 100);
    if (!flags.output.empty()) write_pattern(flags.output, pattern);
    if (!flags.png.empty()) {
      panels.push_back(draw_pattern(pattern, {.title = label, .causal = causal, .legend = choices.size() < 2}));
    }
    context.progress.clear();
    writer.add(record);
    if (flags.ascii && context.format == Format::table) context.output.write(ascii(pattern, 0, 100));
  }
  if (panels.size() == 1) {
    write_png(flags.png, panels.front());
  } else if (!panels.empty()) {
    write_png(flags.png, draw_sheet(panels, panels.size() > 4 ? 3 : 2));
  }
  together.commit();
  writer.finish();
  Written written;
  if (!flags.output.empty()) written.emplace_back(flags.output, "the pattern as JSON");
  if (!flags.png.empty())
    written.emplace_back(flags.png, panels.size() > 1 ? "the patterns, drawn" : "the pattern, drawn");
  list_written(context, written);
}

}  // namespace

void add_pattern(CLI::App& app, Context& context) {
  CLI::App* command = add_command(
      app, context, "pattern", "Statistics and pictures of patterns; patterns as JSON",
      "  tessera pattern --pattern dilated_sparse --seq 4096 --density 0.1 --block 128 --ascii\n"
      "  tessera pattern --pattern local_window,bigbird --seq 65536 --density 0.05,0.1 --causal --png sheet.png\n"
      "  tessera pattern --pattern global_local --seq 8192 --window 512 --global-tokens 64 --output p.json");
  auto flags = std::make_shared<PatternFlagsValues>();
  flags->seq = counts_tokens(
      command->add_option("--seq", flags->seqlen, "Tokens: queries, and keys unless --seq-k")->check(integer(0)));
  flags->seq->type_name("N");
  flags->seq_k = counts_tokens(command->add_option("--seq-k", flags->seqlen_k, "Keys")->check(integer(0)));
  flags->seq_k->type_name("N");
  flags->heads_option = command->add_option("--heads", flags->heads, "Query heads, for patterns that differ by head")
                            ->check(integer(1))
                            ->type_name("N")
                            ->capture_default_str();
  flags->pattern.add_to(*command, {.file = true, .attention = false, .fallback = ""});
  command->add_option("--output", flags->output, "Write the pattern as JSON, a .json file")
      ->check(ends_with(".json"))
      ->type_name("FILE");
  command->add_option("--png", flags->png, "Draw the pattern, a .png file; a sweep becomes one sheet")
      ->check(ends_with(".png"))
      ->type_name("FILE");
  command->add_flag("--ascii", flags->ascii, "Draw it in characters ('#' kept, '+' partial, '.' skipped)");
  command->callback([&context, flags] { show(context, *flags); });
}

}  // namespace tessera::cli
