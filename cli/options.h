// Groups of options that several commands share, and what they mean as library values.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <CLI/CLI.hpp>

#include "command.h"
#include "tessera/attention.h"
#include "tessera/dilated.h"
#include "tessera/error.h"
#include "tessera/patterns.h"

namespace tessera::cli {

// A value, or a comma list of values: `--seq 4096,8192`.
template <class T>
CLI::Option* add_list(CLI::App& app, const std::string& name, std::vector<T>& values, const std::string& description) {
  return app.add_option(name, values, description)->delimiter(',')->allow_extra_args(false);
}

// "; did you mean NAME?" where one of the names is near enough to what came, else nothing.
std::string suggestion(std::string_view text, const std::vector<std::string>& names);

// A check that a value is one of these.
std::function<std::string(const std::string&)> one_of(std::vector<std::string> names);

// Validator of a whole number in min..max: nothing before it, nothing after it, nothing that overflows.
std::function<std::string(const std::string&)> integer(int64_t min, int64_t max = INT64_MAX);

// Takes 64k and 1M (65,536 and 1,048,576) for what they are, in an option that counts tokens.
CLI::Option* counts_tokens(CLI::Option* option);

// Validator of a seed: 0 to 2^64 - 1.
std::string check_seed(const std::string& text);

// Validator of a file name that must end so, ".png"; nothing is written as something else.
std::function<std::string(const std::string&)> ends_with(std::string extension);

// Validator of the name of a folder for pictures: none that looks like a picture.
std::string check_folder_name(const std::string& text);

struct PatternFlags {
  bool file = false;       // --pattern-file is taken
  bool attention = false;  // the pattern is used by attention: --causal, --window reach token level
  bool dilation = false;   // --segment-lengths may ask for LongNet's dilated attention
  std::string fallback;    // --pattern when not given; empty: it must be given
};

// One point of a sweep over --pattern, --density and --block.
struct PatternChoice {
  PatternSpec spec;  // seqlen_q, seqlen_k still 0, heads 1 unless asked for
  // What attention makes of --window where the pattern has no window of its own, and of --token-window.
  std::optional<int64_t> token_window;
  // Dilated attention, with the pattern inside each dilated segment; empty: ordinary attention. Not with
  // dilated_segments, which takes the same flags for its blocks.
  std::vector<int64_t> segment_lengths, dilation_rates;

  bool dilated() const { return !segment_lengths.empty(); }
  // Borrows the lists of this choice.
  Dilation dilation() const { return {segment_lengths, dilation_rates, spec, {}}; }
};

// Flags -> PatternSpec.
class PatternOptions {
 public:
  void add_to(CLI::App& app, const PatternFlags& flags);

  bool from_file() const { return !file_.empty(); }
  const std::string& file() const { return file_; }
  bool causal() const { return causal_; }
  std::optional<int64_t> token_window() const { return token_window_; }
  std::optional<int64_t> window() const { return window_; }

  // Every combination, --pattern outermost, --block innermost; a pattern that takes no density appears once.
  // UsageError for a flag that none of the patterns takes.
  std::vector<PatternChoice> choices() const;
  // The only combination; UsageError if it is a sweep.
  PatternChoice single() const;
  size_t num_blocks() const { return blocks_.size(); }  // values of --block

 private:
  void refuse_beside_file() const;
  PatternChoice choice(PatternKind kind, std::optional<double> density, int block) const;
  bool dilated(PatternKind kind) const;

  PatternFlags flags_;
  const CLI::Option* pattern_ = nullptr;
  std::vector<const CLI::Option*> of_named_;  // what a --pattern-file says itself
  std::vector<std::string> patterns_;
  std::vector<double> densities_;
  std::vector<int> blocks_{128};
  std::string budget_{"even"};
  std::optional<int> block_k_;
  bool causal_ = false;
  std::optional<int64_t> window_, token_window_, global_tokens_, stride_, heads_;
  std::vector<int64_t> dilation_rates_, segment_lengths_;
  std::optional<uint64_t> seed_;
  std::optional<int64_t> ranks_, ranks_per_node_;
  std::optional<double> local_density_, global_density_, inter_node_density_;
  std::string file_;
};

// The pattern of these lengths. `heads`: query heads, for patterns that differ by head unless --pattern-heads said
// otherwise. What the library refuses here came from the command line: UsageError.
BlockPattern build_pattern(PatternSpec spec, int64_t seqlen_q, int64_t seqlen_k, int64_t heads);
std::string pattern_label(const PatternSpec& spec);          // "dilated_sparse 0.1"
std::string comma_list(const std::vector<int64_t>& values);  // "1,2,4"

// Token-exact window of `tokens`: causal admits q - k in [0, tokens], otherwise |q - k| <= tokens / 2.
void set_token_window(AttentionOptions& options, bool causal, std::optional<int64_t> tokens);

CLI::Option* add_isa(CLI::App& app, std::string& isa);
CLI::Option* add_threads(CLI::App& app, int& threads);
DType parse_dtype(const std::string& name);  // fp32, bf16, fp16, fp64
Layout parse_layout(const std::string& name);
// Error if this machine or build lacks it.
Isa parse_isa(const std::string& name);

// "1.5 is not ..." when the text of a tessera::Error is to blame on the command line.
template <class F>
auto as_usage(F&& call) {
  try {
    return call();
  } catch (const Error& e) {
    throw UsageError(e.what());
  }
}

}  // namespace tessera::cli
