// What every subcommand has at hand, and the subcommands.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>

#include "output.h"
#include "progress.h"

namespace tessera::cli {

// A command line that asks for something impossible: exit status 2. Everything else that goes wrong is 1.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Context {
  Format format = Format::table;
  Output output;
  Progress progress;
  int exit_status = 0;  // 1: the command ran, and what it checked failed
};

// Each adds one subcommand, its options and the callback that runs it.
void add_demo(CLI::App& app, Context& context);
void add_attend(CLI::App& app, Context& context);
void add_pattern(CLI::App& app, Context& context);
void add_analyze(CLI::App& app, Context& context);
void add_bench(CLI::App& app, Context& context);
void add_check(CLI::App& app, Context& context);
void add_info(CLI::App& app, Context& context);
void add_completions(CLI::App& app, Context& context);  // after all others, which it describes
void add_man(CLI::App& app, Context& context);

// Says below a table which files were written, and what they show.
using Written = std::vector<std::pair<std::string, std::string>>;
void list_written(Context& context, const Written& files);

// A subcommand with its description, examples and --format.
CLI::App* add_command(CLI::App& app, Context& context, const std::string& name, const std::string& description,
                      const std::string& examples);

}  // namespace tessera::cli
