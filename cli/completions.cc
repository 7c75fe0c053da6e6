// tessera completions, tessera man: what shells and `man` know of the program, from its own options.
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "command.h"
#include "options.h"
#include "tessera/version.h"

namespace tessera::cli {
namespace {

// The values of an option that takes one of a few.
std::vector<std::string> values_of(const CLI::Option& option) {
  const std::string name = option.get_lnames().empty() ? "" : option.get_lnames().front();
  std::vector<std::string> values;
  if (name == "pattern") {
    for (PatternKind kind : all_pattern_kinds()) values.emplace_back(name_of(kind));
  } else if (name == "isa") {
    for (Isa isa : compiled_isas()) values.emplace_back(name_of(isa));
  } else if (name == "dtype") {
    values = {"fp32", "bf16", "fp16", "fp64"};
  } else if (name == "format") {
    values = {"table", "json", "csv"};
  } else if (name == "budget") {
    values = {"even", "proportional"};
  } else if (const std::string type = option.get_type_name(); type.find('|') != std::string::npos) {
    for (size_t begin = 0; begin <= type.size();) {
      const size_t end = std::min(type.find('|', begin), type.size());
      values.push_back(type.substr(begin, end - begin));
      begin = end + 1;
    }
  }
  return values;
}

bool takes_file(const CLI::Option& option) {
  return option.get_type_name() == "FILE" || option.get_type_name() == "DIR";
}

std::vector<const CLI::App*> commands_of(const CLI::App& app) {
  return app.get_subcommands([](const CLI::App*) { return true; });
}

std::string bash(const CLI::App& app) {
  std::string cases;
  std::vector<std::string> names{"help"};
  for (const CLI::App* command : commands_of(app)) {
    names.push_back(command->get_name());
    std::vector<std::string> options;
    std::string values;
    for (const CLI::Option* option : command->get_options()) {
      for (const std::string& name : option->get_lnames()) options.push_back("--" + name);
      const std::vector<std::string> some = values_of(*option);
      if (option->get_lnames().empty() || (some.empty() && !takes_file(*option))) continue;
      values += some.empty()
                    ? fmt::format("        --{}) compopt -o default; return ;;\n", option->get_lnames().front())
                    : fmt::format("        --{}) COMPREPLY=($(compgen -W \"{}\" -- \"$current\")); return ;;\n",
                                  option->get_lnames().front(), fmt::join(some, " "));
    }
    std::string words = fmt::format("{}", fmt::join(options, " "));
    if (command->get_name() == "completions") words += " bash zsh";
    cases += fmt::format("    {})\n      case \"$previous\" in\n{}      esac\n      words=\"{}\" ;;\n",
                         command->get_name(), values, words);
  }
  return fmt::format(R"(# bash completion of tessera; `tessera completions bash` writes it
_tessera() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ] || [ "${{COMP_WORDS[1]}}" = help ]; then
    COMPREPLY=($(compgen -W "{} --help --version" -- "$current"))
    return
  fi
  case "${{COMP_WORDS[1]}}" in
{}  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -F _tessera tessera
)",
                     fmt::join(names, " "), cases);
}

// Text inside zsh's '[...]'.
std::string zsh_text(const std::string& text) {
  std::string out;
  for (char c : text) {
    if (c == '\'') {
      out += "'\\''";
      continue;
    }
    if (c == '[' || c == ']' || c == ':' || c == '\\') out += '\\';
    out += c;
  }
  return out;
}

std::string zsh(const CLI::App& app) {
  std::string commands, cases;
  for (const CLI::App* command : commands_of(app)) {
    commands += fmt::format("    '{}:{}'\n", command->get_name(), zsh_text(command->get_description()));
    cases += fmt::format("    {})\n      _arguments", command->get_name());
    for (const CLI::Option* option : command->get_options()) {
      for (const std::string& name : option->get_lnames()) {
        cases += fmt::format(" \\\n        '--{}[{}]", name, zsh_text(option->get_description()));
        const std::vector<std::string> values = values_of(*option);
        if (!values.empty()) {
          cases += fmt::format(":{}:({})", zsh_text(option->get_type_name()), fmt::join(values, " "));
        } else if (option->get_type_name() == "FILE") {
          cases += ":file:_files";
        } else if (option->get_type_name() == "DIR") {
          cases += ":folder:_files -/";
        } else if (!option->get_type_name().empty()) {
          cases += fmt::format(":{}:", zsh_text(option->get_type_name()));
        }
        cases += '\'';
      }
    }
    if (command->get_name() == "completions") cases += " \\\n        '1:shell:(bash zsh)'";
    cases += " ;;\n";
  }
  return fmt::format(R"(#compdef tessera
# zsh completion of tessera; `tessera completions zsh` writes it
_tessera() {{
  local -a commands
  commands=(
{}    'help:The options of a command'
  )
  if (( CURRENT == 2 )) || [[ ${{words[2]}} == help ]]; then
    _describe command commands
    return
  fi
  local command=${{words[2]}}
  shift words
  (( CURRENT-- ))
  case $command in
{}  esac
}}
_tessera "$@"
)",
                     commands, cases);
}

// Text for roff: hyphens of options stay hyphens, and no line begins with a dot.
std::string roff(const std::string& text) {
  std::string out;
  for (char c : text) {
    if (c == '\\') {
      out += "\\e";
    } else if (c == '-') {
      out += "\\-";
    } else if ((c == '.' || c == '\'') && (out.empty() || out.back() == '\n')) {
      out += "\\&";
      out += c;
    } else {
      out += c;
    }
  }
  return out;
}

std::string man(const CLI::App& app) {
  std::string text = fmt::format(
      ".\\\" written by `tessera man`\n"
      ".TH TESSERA 1 \"\" \"Tessera {}\" \"User Commands\"\n"
      ".SH NAME\ntessera \\- {}\n"
      ".SH SYNOPSIS\n.B tessera\n.I COMMAND\n[\\fIOPTIONS\\fR]\n"
      ".SH DESCRIPTION\n"
      "Results go to standard output, progress to standard error. Counts of tokens may be written 64k (65,536) and 1M "
      "(1,048,576). Exit status: 0, 1 (failed) or 2 (usage).\n",
      TESSERA_VERSION, roff("block-sparse attention for long sequences"));
  for (const CLI::App* command : commands_of(app)) {
    text += fmt::format(".SH tessera {}\n{}.\n", roff(command->get_name()), roff(command->get_description()));
    for (const CLI::Option* option : command->get_options()) {
      if (option->get_lnames().empty()) continue;
      std::string names;
      for (const std::string& name : option->get_snames()) names += "\\-" + name + ", ";
      names += "\\-\\-" + roff(option->get_lnames().front());
      text += fmt::format(".TP\n\\fB{}\\fR", names);
      if (!option->get_type_name().empty()) text += fmt::format(" \\fI{}\\fR", roff(option->get_type_name()));
      std::string what = option->get_description();
      if (!option->get_default_str().empty()) what += ". Default " + option->get_default_str();
      text += '\n' + roff(what) + '\n';
    }
    if (const std::string footer = command->get_footer(); !footer.empty()) {
      const size_t first = footer.find('\n');
      text += ".PP\n" + roff(footer.substr(0, first)) + "\n.PP\n.nf\n" +
              roff(footer.substr(std::min(first, footer.size() - 1) + 1)) + "\n.fi\n";
    }
  }
  return text;
}

}  // namespace

void add_completions(CLI::App& app, Context& context) {
  CLI::App* command = app.add_subcommand("completions", "What a shell completes of this program, as its script");
  command->footer(
      "Examples:\n  source <(tessera completions bash)\n  tessera completions zsh > \"${fpath[1]}/_tessera\"");
  auto shell = std::make_shared<std::string>();
  command->add_option("SHELL", *shell, "bash or zsh")->check(one_of({"bash", "zsh"}))->required();
  command->callback([&app, &context, shell] { context.output.write(*shell == "bash" ? bash(app) : zsh(app)); });
}

void add_man(CLI::App& app, Context& context) {
  CLI::App* command = app.add_subcommand("man", "The manual page of this program, for man(1)");
  command->footer("Examples:\n  tessera man | man -l -");
  command->callback([&app, &context] { context.output.write(man(app)); });
}

}  // namespace tessera::cli
