#include "options.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace tessera::cli {
namespace {

constexpr double kDefaultDensity = 0.1;
constexpr int kMostThreads = 1024;

// Which flags mean something to which kind (patterns.h says what).
struct Takes {
  bool density = false, window = false, rates = false, segments = false, global = false, stride = false, seed = false,
       ranks = false;
};

Takes takes(PatternKind kind) {
  switch (kind) {
    case PatternKind::dense:
    case PatternKind::causal: return {};
    case PatternKind::local_window: return {.density = true, .window = true};
    case PatternKind::dilated_sparse: return {.density = true, .rates = true};
    case PatternKind::global_local: return {.density = true, .window = true, .global = true};
    case PatternKind::strided: return {.density = true, .stride = true};
    case PatternKind::random: return {.density = true, .seed = true};
    case PatternKind::bigbird: return {.density = true, .window = true, .global = true, .seed = true};
    case PatternKind::dilated_segments: return {.rates = true, .segments = true};
    case PatternKind::hierarchical: return {.density = true, .ranks = true};
  }
  return {};
}

std::string names_where(bool Takes::*option) {
  std::vector<std::string_view> names;
  for (PatternKind kind : all_pattern_kinds()) {
    if (takes(kind).*option) names.push_back(name_of(kind));
  }
  return fmt::format("{}", fmt::join(names, ", "));
}

std::string check_density(const std::string& text) {
  double value = 0;
  if (!CLI::detail::lexical_cast(text, value) || !(value > 0 && value <= 1)) {
    return fmt::format("density: got {}; allowed: a number in (0, 1]", text);
  }
  return {};
}

std::string check_share(const std::string& text) {
  double value = 0;
  if (!CLI::detail::lexical_cast(text, value) || !(value >= 0 && value <= 1)) {
    return fmt::format("density: got {}; allowed: a number in [0, 1]", text);
  }
  return {};
}

std::string check_block(const std::string& text) {
  int64_t value = 0;
  if (!CLI::detail::lexical_cast(text, value) || value < 16 || value > 256 || value % 16 != 0) {
    return fmt::format("got {}; allowed: a multiple of 16 from 16 to 256", text);
  }
  return {};
}

}  // namespace

std::string suggestion(std::string_view text, const std::vector<std::string>& names) {
  std::string best;
  size_t least = std::min<size_t>(3, text.size() / 2 + 1);  // so many letters may differ, less one
  for (const std::string& name : names) {
    std::vector<size_t> row(name.size() + 1);  // Levenshtein's distances from a begin of the text to those of the name
    for (size_t j = 0; j < row.size(); ++j) row[j] = j;
    for (size_t i = 1; i <= text.size(); ++i) {
      size_t diagonal = std::exchange(row[0], i);
      for (size_t j = 1; j < row.size(); ++j) {
        const size_t changed = diagonal + (text[i - 1] != name[j - 1]);
        diagonal = row[j];
        row[j] = std::min({row[j] + 1, row[j - 1] + 1, changed});
      }
    }
    if (row.back() < least) least = row.back(), best = name;
  }
  return best.empty() ? best : fmt::format("; did you mean {}?", best);
}

std::function<std::string(const std::string&)> one_of(std::vector<std::string> names) {
  return [names = std::move(names)](const std::string& text) -> std::string {
    if (std::find(names.begin(), names.end(), text) != names.end()) return {};
    return fmt::format("got {}; allowed: {}{}", text, fmt::join(names, ", "), suggestion(text, names));
  };
}

std::function<std::string(const std::string&)> integer(int64_t min, int64_t max) {
  return [min, max](const std::string& text) -> std::string {
    int64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error == std::errc() && end == text.data() + text.size() && value >= min && value <= max) return {};
    if (max == INT64_MAX) return fmt::format("got {}; allowed: a whole number from {}", text, min);
    return fmt::format("got {}; allowed: a whole number from {} to {}", text, min, max);
  };
}

CLI::Option* counts_tokens(CLI::Option* option) {
  return option->transform(std::function<std::string(std::string)>([](std::string text) {
    const char unit = text.size() > 1 ? text.back() : '0';
    const int64_t factor = unit == 'k' || unit == 'K' ? 1 << 10 : unit == 'M' ? 1 << 20 : 1;
    if (factor == 1) return text;
    int64_t value = 0, product = 0;
    const char* last = text.data() + text.size() - 1;
    const auto [end, error] = std::from_chars(text.data(), last, value);
    const bool whole = error == std::errc() && end == last && !__builtin_mul_overflow(value, factor, &product);
    return whole ? fmt::format("{}", product) : text;  // which the check then refuses as it came
  }));
}

std::string check_seed(const std::string& text) {
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error == std::errc() && end == text.data() + text.size()) return {};
  return fmt::format("got {}; allowed: a whole number from 0 to 2^64 - 1", text);
}

std::function<std::string(const std::string&)> ends_with(std::string extension) {
  return [extension = std::move(extension)](const std::string& text) -> std::string {
    if (text.size() > extension.size() && text.ends_with(extension)) return {};
    return fmt::format("got {}; allowed: a name that ends in {}", text, extension);
  };
}

std::string check_folder_name(const std::string& text) {
  for (const char* picture : {".png", ".jpg", ".jpeg", ".svg", ".pdf"}) {
    if (text.ends_with(picture))
      return fmt::format("got {}; allowed: a folder (its pictures get names of their own)", text);
  }
  return {};
}

void PatternOptions::add_to(CLI::App& app, const PatternFlags& flags) {
  flags_ = flags;
  const std::string group = "Pattern";
  std::vector<std::string> names;
  for (PatternKind kind : all_pattern_kinds()) names.emplace_back(name_of(kind));
  if (!flags.fallback.empty()) patterns_ = {flags.fallback};

  pattern_ = add_list(app, "--pattern", patterns_, fmt::format("One of {}; a list sweeps", fmt::join(names, ", ")))
                 ->check(one_of(names))
                 ->type_name("NAME,..")
                 ->group(group);
  add_list(app, "--density", densities_,
           fmt::format("Share of the admissible block pairs that is kept; a list sweeps. Default {} where the pattern "
                       "needs one",
                       kDefaultDensity))
      ->check(check_density)
      ->type_name("D,..")
      ->group(group);
  app.add_option("--budget", budget_,
                 "even: as many pairs in every row, as far as it has them; proportional: a density of its own pairs in "
                 "every row")
      ->check(one_of({"even", "proportional"}))
      ->type_name("HOW")
      ->capture_default_str()
      ->group(group);
  add_list(app, "--block", blocks_, "Tokens of a block; a list sweeps. Default 128")
      ->check(check_block)
      ->type_name("N,..")
      ->group(group);
  app.add_option("--block-k", block_k_, "Keys of a block. Default: --block")
      ->check(check_block)
      ->type_name("N")
      ->group(group);
  app.add_flag("--causal", causal_, "Only keys at or before the query (aligned to the last key)")->group(group);
  std::string window = "Tokens of the pattern's window (" + names_where(&Takes::window) + ")";
  if (flags.attention) {
    window += ". Every other pattern: the token-exact window, as --token-window";
    counts_tokens(app.add_option("--token-window", token_window_,
                                 "Token-exact attention window with any pattern: causal admits 0 <= q - k <= N, "
                                 "otherwise |q - k| <= N / 2")
                      ->check(integer(0)))
        ->type_name("N")
        ->group(group);
  }
  CLI::Option* window_option = counts_tokens(app.add_option("--window", window_, window)->check(integer(1)));
  window_option->type_name("N")->group(group);
  std::string rates =
      "dilated_sparse: distances in blocks (default 1,2,4,8,16); dilated_segments: one a segment length";
  std::string segments = "dilated_segments: tokens of a segment, one a rate";
  if (flags.dilation) {
    rates += ". With --segment-lengths: those of dilated attention";
    segments +=
        ". Any other pattern: dilated attention (LongNet) over segments of these lengths, one a dilation rate, "
        "with the pattern inside each dilated segment (default here: dense)";
  }
  add_list(app, "--dilation-rates", dilation_rates_, rates)->check(integer(1))->type_name("R,..")->group(group);
  counts_tokens(add_list(app, "--segment-lengths", segment_lengths_, segments)->check(integer(1)))
      ->type_name("N,..")
      ->group(group);
  counts_tokens(app.add_option("--global-tokens", global_tokens_,
                               "Tokens that see and are seen by all (" + names_where(&Takes::global) + ")")
                    ->check(integer(0)))
      ->type_name("N")
      ->group(group);
  app.add_option("--stride", stride_, "strided: blocks")->check(integer(1))->type_name("N")->group(group);
  app.add_option("--seed", seed_, "Seed of the random pairs (" + names_where(&Takes::seed) + ")")
      ->check(check_seed)
      ->type_name("N")
      ->group(group);
  app.add_option("--pattern-heads", heads_,
                 "1: all heads share one pattern; or one a head. Default 1, and one a head "
                 "for dilated_segments")
      ->check(integer(1))
      ->type_name("N")
      ->group(group);
  app.add_option("--ranks", ranks_, "hierarchical: equal shards of the sequence")
      ->check(integer(1))
      ->type_name("N")
      ->group(group);
  app.add_option("--ranks-per-node", ranks_per_node_, "hierarchical")->check(integer(1))->type_name("N")->group(group);
  app.add_option("--local-density", local_density_, "hierarchical: inside a rank")
      ->check(check_density)
      ->type_name("D")
      ->group(group);
  app.add_option("--global-density", global_density_, "hierarchical: inside a node")
      ->check(check_share)
      ->type_name("D")
      ->group(group);
  app.add_option("--inter-node-density", inter_node_density_, "hierarchical: across nodes")
      ->check(check_share)
      ->type_name("D")
      ->group(group);
  for (const CLI::Option* option : app.get_options()) {
    const std::string& name = option->get_lnames().empty() ? "" : option->get_lnames().front();
    const bool of_call = name == "causal" || name == "token-window" || (flags.attention && name == "window");
    if (option->get_group() == group && !of_call) of_named_.push_back(option);
  }
  if (flags.file) {
    app.add_option("--pattern-file", file_, "A pattern as JSON (what `tessera pattern --output` writes)")
        ->type_name("FILE")
        ->group(group);
  }
}

bool PatternOptions::dilated(PatternKind kind) const {
  return flags_.dilation && !segment_lengths_.empty() && kind != PatternKind::dilated_segments;
}

PatternChoice PatternOptions::choice(PatternKind kind, std::optional<double> density, int block) const {
  const Takes t = takes(kind);
  PatternChoice c;
  PatternSpec& s = c.spec;
  s.kind = kind;
  s.block_q = block;
  s.block_k = block_k_.value_or(block);
  s.heads = heads_.value_or(1);
  s.causal = causal_ || kind == PatternKind::causal;
  s.density = density;
  s.budget = budget_of_name(budget_);
  if (t.window) s.window = window_;
  if (dilated(kind)) {
    c.segment_lengths = segment_lengths_;
    c.dilation_rates = dilation_rates_;
  } else if (t.rates) {
    s.dilation_rates = dilation_rates_;
  }
  if (t.segments) s.segment_lengths = segment_lengths_;
  if (t.global) s.global_tokens = global_tokens_;
  if (t.stride) s.stride = stride_;
  if (t.seed) s.seed = seed_.value_or(0);
  if (t.ranks) {
    s.ranks = ranks_.value_or(1);
    s.ranks_per_node = ranks_per_node_.value_or(1);
    s.local_density = local_density_;
    s.global_density = global_density_;
    s.inter_node_density = inter_node_density_;
  }
  c.token_window = token_window_;
  if (flags_.attention && !t.window && !c.token_window) c.token_window = window_;
  return c;
}

// What the file says itself is not to be said beside it: it would be dropped.
void PatternOptions::refuse_beside_file() const {
  for (const CLI::Option* option : of_named_) {
    if (option->count() == 0) continue;
    throw UsageError(
        fmt::format("--{}: got it beside --pattern-file; allowed: one of them (the file has the pattern "
                    "whole)",
                    option->get_lnames().front()));
  }
}

std::vector<PatternChoice> PatternOptions::choices() const {
  if (from_file()) {
    refuse_beside_file();
    return {};
  }
  std::vector<std::string> patterns = patterns_;
  if (pattern_->count() == 0 && dilated(PatternKind::dense)) patterns = {std::string(name_of(PatternKind::dense))};
  if (patterns.empty()) {
    throw UsageError(fmt::format("--pattern is required{}", flags_.file ? " (or --pattern-file)" : ""));
  }
  std::vector<PatternKind> kinds;
  for (const std::string& name : patterns) kinds.push_back(as_usage([&] { return pattern_kind(name); }));

  // A flag that no pattern of the sweep takes is a mistake, not something to skip over.
  const auto require = [&](bool given, bool Takes::*option, const char* flag) {
    if (!given) return;
    for (PatternKind kind : kinds) {
      if (takes(kind).*option) return;
    }
    throw UsageError(fmt::format("{}: {} does not take it; the patterns that do: {}", flag, fmt::join(patterns, ", "),
                                 names_where(option)));
  };
  require(!densities_.empty(), &Takes::density, "--density");
  require(window_ && !flags_.attention, &Takes::window, "--window");
  if (!std::ranges::any_of(kinds, [&](PatternKind kind) { return dilated(kind); })) {
    require(!dilation_rates_.empty(), &Takes::rates, "--dilation-rates");
    require(!segment_lengths_.empty(), &Takes::segments, "--segment-lengths");
  } else if (segment_lengths_.size() != dilation_rates_.size()) {
    throw UsageError(fmt::format("--dilation-rates: got {}; allowed: one for each of the {} --segment-lengths",
                                 dilation_rates_.size(), segment_lengths_.size()));
  }
  require(global_tokens_.has_value(), &Takes::global, "--global-tokens");
  require(stride_.has_value(), &Takes::stride, "--stride");
  require(seed_.has_value(), &Takes::seed, "--seed");
  require(ranks_ || ranks_per_node_ || local_density_ || global_density_ || inter_node_density_, &Takes::ranks,
          "--ranks and the densities of ranks");

  std::vector<PatternChoice> all;
  for (PatternKind kind : kinds) {
    const Takes t = takes(kind);
    std::vector<std::optional<double>> densities(densities_.begin(), densities_.end());
    if (!t.density) {
      densities = {std::nullopt};
    } else if (densities.empty()) {
      bool geometry = t.window && window_;
      if (kind == PatternKind::bigbird) geometry = false;  // the rest of its budget is random
      if (kind == PatternKind::strided) geometry = stride_.has_value();
      if (kind == PatternKind::hierarchical) geometry = local_density_ && global_density_ && inter_node_density_;
      densities = {geometry ? std::nullopt : std::optional<double>(kDefaultDensity)};
    }
    for (const std::optional<double>& density : densities) {
      for (int block : blocks_) all.push_back(choice(kind, density, block));
    }
  }
  return all;
}

PatternChoice PatternOptions::single() const {
  const std::vector<PatternChoice> all = choices();
  if (all.size() != 1) throw UsageError("--pattern, --density, --block: one value each here, no list");
  return all.front();
}

BlockPattern build_pattern(PatternSpec spec, int64_t seqlen_q, int64_t seqlen_k, int64_t heads) {
  spec.seqlen_q = seqlen_q;
  spec.seqlen_k = seqlen_k;
  if (spec.kind == PatternKind::dilated_segments && spec.heads == 1) spec.heads = heads;
  return as_usage([&] { return make_pattern(spec); });
}

std::string pattern_label(const PatternSpec& spec) {
  std::string label(name_of(spec.kind));
  if (spec.density) label += fmt::format(" {}", *spec.density);
  return label;
}

std::string comma_list(const std::vector<int64_t>& values) { return fmt::format("{}", fmt::join(values, ",")); }

void set_token_window(AttentionOptions& options, bool causal, std::optional<int64_t> tokens) {
  if (!tokens) return;
  options.window_left = causal ? *tokens : *tokens / 2;
  if (!causal) options.window_right = *tokens / 2;
}

CLI::Option* add_isa(CLI::App& app, std::string& isa) {
  std::vector<std::string_view> names;
  for (Isa i : compiled_isas()) names.push_back(name_of(i));
  return app
      .add_option("--isa", isa,
                  fmt::format("Instruction set to use: {}. Default: the best this CPU has", fmt::join(names, ", ")))
      ->type_name("NAME");
}

CLI::Option* add_threads(CLI::App& app, int& threads) {
  return app.add_option("--threads", threads, "Threads; 0: all CPUs")
      ->check(integer(0, kMostThreads))
      ->type_name("N")
      ->capture_default_str();
}

DType parse_dtype(const std::string& name) {
  for (DType t : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
    if (name == name_of(t)) return t;
  }
  throw UsageError(fmt::format("--dtype: got {}; allowed: fp32, bf16, fp16, fp64", name));
}

Layout parse_layout(const std::string& name) { return name == "bshd" ? Layout::bshd : Layout::bhsd; }

Isa parse_isa(const std::string& name) {
  if (name.empty()) return Isa::automatic;
  std::vector<std::string> known;
  for (Isa i : compiled_isas()) known.emplace_back(name_of(i));
  const std::string wrong = name == "auto" ? "" : one_of(known)(name);
  if (!wrong.empty() && !suggestion(name, known).empty()) throw UsageError("--isa: " + wrong);
  const Isa isa = as_usage([&] { return isa_of(name); });
  if (isa == Isa::automatic || std::ranges::count(usable_isas(), isa) > 0) return isa;
  std::vector<std::string_view> names;
  for (Isa i : usable_isas()) names.push_back(name_of(i));
  throw UsageError(fmt::format("--isa: got {}; this machine can run: {}", name, fmt::join(names, ", ")));
}

}  // namespace tessera::cli
