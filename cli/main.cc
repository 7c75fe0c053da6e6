// tessera: the command line. Exit status 0, 1 (failed) or 2 (usage).
#include <algorithm>
#include <csignal>
#include <new>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "command.h"
#include "options.h"
#include "tessera/error.h"
#include "tessera/io.h"
#include "tessera/version.h"

namespace tessera::cli {
namespace {

constexpr int kFailed = 1, kUsage = 2;
constexpr size_t kHelpWidth = 100;  // columns

// Help with descriptions wrapped to the width of a terminal.
class HelpFormatter : public CLI::Formatter {
 public:
  HelpFormatter() { column_width(30); }

  std::string make_option(const CLI::Option* option, bool is_positional) const override {
    return entry("  " + make_option_name(option, is_positional) + make_option_opts(option), make_option_desc(option));
  }
  std::string make_option_opts(const CLI::Option* option) const override {
    std::string text;
    if (!option->get_type_name().empty()) text = " " + option->get_type_name();
    return text;
  }
  std::string make_option_desc(const CLI::Option* option) const override {
    std::string text = option->get_description();
    if (!option->get_default_str().empty()) text += ". Default " + option->get_default_str();
    if (option->get_required()) text += " (required)";
    return text;
  }
  std::string make_subcommand(const CLI::App* command) const override {
    return entry("  " + command->get_name(), command->get_description());
  }
  std::string make_usage(const CLI::App* app, std::string) const override {
    const CLI::App* parent = app->get_parent();
    return parent ? fmt::format("Usage: tessera {} [OPTIONS]\n", app->get_name())
                  : "Usage: tessera COMMAND [OPTIONS]\n";
  }

 private:
  std::string entry(std::string text, const std::string& description) const {
    const size_t indent = column_width_;
    size_t column = text.size();
    if (column + 2 > indent) {
      text += '\n';
      column = 0;
    }
    text.append(indent - column, ' ');
    column = indent;
    size_t begin = 0;
    while (begin < description.size()) {
      const size_t end = std::min(description.find(' ', begin), description.size());
      const std::string word = description.substr(begin, end - begin);
      if (column > indent && column + 1 + word.size() > kHelpWidth) {
        text += '\n' + std::string(indent, ' ');
        column = indent;
      } else if (column > indent) {
        text += ' ';
        ++column;
      }
      text += word;
      column += word.size();
      begin = end + 1;
    }
    return text + '\n';
  }
};

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

// "tessera bench" where a subcommand was named.
std::string help_hint(const CLI::App& app) {
  const auto commands = app.get_subcommands();
  return commands.empty() ? "tessera --help" : fmt::format("tessera {} --help", commands.front()->get_name());
}

int run(int argc, char** argv) {
  Context context;
  CLI::App app("Tessera: block-sparse attention for long sequences.");
  app.formatter(std::make_shared<HelpFormatter>());
  app.set_help_flag("-h,--help", "Print this help");
  app.set_version_flag("--version", "tessera " TESSERA_VERSION, "Print the version");
  app.require_subcommand(1);
  app.footer(
      "`tessera help COMMAND` tells a command's options, with examples.\n"
      "Counts of tokens may be 64k (65,536) or 1M (1,048,576).\n"
      "Results go to stdout, progress to stderr. Exit status: 0, 1 (failed) or 2 (usage).\n\n"
      "Example:\n"
      "  tessera demo --quick");
  add_demo(app, context);
  add_attend(app, context);
  add_pattern(app, context);
  add_analyze(app, context);
  add_bench(app, context);
  add_check(app, context);
  add_info(app, context);
  add_completions(app, context);
  add_man(app, context);

  const auto blame = [&](const std::string& message, int status) {
    context.progress.clear();
    complain(message);
    return status;
  };
  const auto blame_usage = [&](const std::exception& e) {
    return blame(fmt::format("{} (try `{}`)", first_line(e.what()), help_hint(app)), kUsage);
  };
  std::vector<std::string> commands;
  for (const CLI::App* command : app.get_subcommands({})) commands.push_back(command->get_name());
  std::vector<std::string> args(argv + 1, argv + argc);
  if (!args.empty() && args[0] == "help") {  // help, help COMMAND
    args.erase(args.begin());
    args.resize(std::min<size_t>(args.size(), 1));
    args.push_back("--help");
  }
  if (!args.empty() && !args[0].starts_with('-') &&
      std::find(commands.begin(), commands.end(), args[0]) == commands.end()) {
    return blame(fmt::format("no command {}; allowed: {}{} (try `tessera --help`)", args[0], fmt::join(commands, ", "),
                             suggestion(args[0], commands)),
                 kUsage);
  }
  try {
    try {
      app.parse(std::vector<std::string>(args.rbegin(), args.rend()));  // as CLI11 takes them
      return context.exit_status;
    } catch (const CLI::CallForHelp&) {
      const auto commands = app.get_subcommands();
      context.output.write(commands.empty() ? app.help() : commands.front()->help());
      return 0;
    } catch (const CLI::CallForVersion& version) {
      context.output.write(fmt::format("{}\n", version.what()));
      return 0;
    }
  } catch (const CLI::ExtrasError& e) {
    const CLI::App& command = app.get_subcommands().empty() ? app : *app.get_subcommands().front();
    std::vector<std::string> options;
    for (const CLI::Option* option : command.get_options()) {
      for (const std::string& name : option->get_lnames()) options.push_back("--" + name);
    }
    std::string extra = first_line(e.what());
    for (const std::string& word : app.remaining(true)) {
      if (word.starts_with("--")) extra = word;
    }
    extra = extra.substr(extra.rfind(' ') + 1);
    const std::string first = extra.substr(0, extra.find('='));
    return blame(
        fmt::format("got {}; allowed: the options of `{}`{}", extra, help_hint(app), suggestion(first, options)),
        kUsage);
  } catch (const CLI::ParseError& e) {
    return blame_usage(e);
  } catch (const UsageError& e) {
    return blame_usage(e);
  } catch (const OutputError& e) {
    return e.closed_by_reader() ? kFailed : blame(e.what(), kFailed);
  } catch (const std::bad_alloc&) {
    return blame("out of memory", kFailed);
  } catch (const std::exception& e) {
    return blame(first_line(e.what()), kFailed);
  }
}

}  // namespace

void list_written(Context& context, const Written& files) {
  if (files.empty() || context.format != Format::table) return;
  context.progress.clear();
  size_t width = 0;
  for (const auto& [file, shows] : files) width = std::max(width, file.size());
  std::string text = "\nWritten\n";
  for (const auto& [file, shows] : files) text += fmt::format("  {:<{}}  {}\n", file, width, shows);
  context.output.write(text);
}

CLI::App* add_command(CLI::App& app, Context& context, const std::string& name, const std::string& description,
                      const std::string& examples) {
  CLI::App* command = app.add_subcommand(name, description);
  command->footer("Examples:\n" + examples);
  command
      ->add_option_function<std::string>(
          "--format",
          [&context](const std::string& name) {
            context.format = name == "json" ? Format::json : name == "csv" ? Format::csv : Format::table;
          },
          "How results are written: table, json or csv. Default table")
      ->check(one_of({"table", "json", "csv"}))
      ->type_name("FORMAT");
  return command;
}

}  // namespace tessera::cli

// What is being written is gone, and the shell sees what ended the program.
extern "C" void end_by_signal(int signal) {
  tessera::remove_temporary_files();
  std::signal(signal, SIG_DFL);
  (void)std::raise(signal);
}

int main(int argc, char** argv) {
  // A reader that closes the pipe early shows up as a write error, which ends the program quietly.
  std::signal(SIGPIPE, SIG_IGN);
  for (const int signal : {SIGINT, SIGTERM, SIGHUP}) {
    if (std::signal(signal, end_by_signal) == SIG_IGN) std::signal(signal, SIG_IGN);  // nohup
  }
  try {
    return tessera::cli::run(argc, argv);
  } catch (const std::exception& e) {
    tessera::cli::complain(e.what());
    return 1;
  }
}
