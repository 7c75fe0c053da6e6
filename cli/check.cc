// tessera check: every kernel of this machine against fp64, on random cases.
#include "tessera/check.h"

#include <algorithm>

#include <fmt/format.h>

#include "command.h"
#include "options.h"

namespace tessera::cli {
namespace {

constexpr Column kRows[] = {
    {"isa", "isa", 12, Style::text},
    {"pass", "pass", 5, Style::text},
    {"path", "path", 8, Style::text},
    {"dtype", "dtype", 6, Style::text},
    {"cases", "cases", 7, Style::integer},
    {"failures", "failures", 8, Style::integer},
    {"worst", "worst error / tolerance", 23, Style::number},
};

struct CheckFlags {
  int64_t cases = 500;
  uint64_t seed = 0;
  int64_t first_case = 0;
  std::vector<std::string> isas;
  std::string pass = "both";
  int threads = 0;
};

std::string reproduce(const CheckReport& report, const CheckFailure& f) {
  return fmt::format("tessera check --cases 1 --seed {} --first-case {} --isa {} --pass {}", report.seed, f.case_number,
                     name_of(f.isa), name_of(f.pass));
}

void check(Context& context, const CheckFlags& flags) {
  CheckOptions options{.cases = flags.cases, .seed = flags.seed, .first_case = flags.first_case};
  for (const std::string& isa : flags.isas) {
    options.isas.push_back(parse_isa(isa));
    if (options.isas.back() == Isa::automatic) throw UsageError("--isa: got auto; allowed: names of instruction sets");
  }
  for (const CheckPass pass : {CheckPass::fwd, CheckPass::bwd}) {
    if (flags.pass == "both" || flags.pass == name_of(pass)) options.passes.push_back(pass);
  }
  ThreadPool pool(flags.threads);
  const CheckReport report = run_check(options, pool, [&](int64_t done, int64_t total) {
    context.progress.show(fmt::format("case {} of {}", done, total), total > 0 ? double(done) / total : 1);
  });
  context.progress.clear();

  Record rows = Record::array();
  for (const CheckRow& r : report.rows) {
    rows.push_back({{"isa", name_of(r.isa)},
                    {"pass", name_of(r.pass)},
                    {"path", name_of(r.path)},
                    {"dtype", name_of(r.dtype)},
                    {"cases", r.cases},
                    {"failures", r.failures},
                    {"worst", r.worst}});
  }
  if (context.format == Format::json) {
    Record result = {{"passed", report.passed()}, {"seed", report.seed}, {"cases", report.cases}, {"rows", rows}};
    result["failures"] = Record::array();
    for (const CheckFailure& f : report.failures) {
      result["failures"].push_back({{"case", f.case_number},
                                    {"isa", name_of(f.isa)},
                                    {"pass", name_of(f.pass)},
                                    {"path", name_of(f.path)},
                                    {"dtype", name_of(f.dtype)},
                                    {"problem", f.problem},
                                    {"config", f.config},
                                    {"reproduce", reproduce(report, f)}});
    }
    write_json(context.output, result);
  } else {
    RecordWriter writer(context.output, context.format, kRows);
    for (const Record& r : rows) writer.add(r);
    writer.finish();
    if (context.format == Format::table) {
      context.output.write(fmt::format("\n{}: {} cases, seed {}, {} failed\n", report.passed() ? "passed" : "FAILED",
                                       report.cases, report.seed, report.failures.size()));
    }
  }
  if (report.passed()) return;
  context.exit_status = 1;
  constexpr size_t kShown = 10;
  for (size_t i = 0; i < std::min(report.failures.size(), kShown); ++i) {
    const CheckFailure& f = report.failures[i];
    complain(fmt::format("case {} ({} {} {} {}): {}", f.case_number, name_of(f.isa), name_of(f.pass), name_of(f.path),
                         name_of(f.dtype), f.problem));
    complain(fmt::format("  {}", f.config));
    complain(fmt::format("  reproduce: {}", reproduce(report, f)));
  }
}

}  // namespace

void add_check(CLI::App& app, Context& context) {
  CLI::App* command =
      add_command(app, context, "check", "Every kernel of every ISA of this machine against fp64, on random cases",
                  "  tessera check\n"
                  "  tessera check --cases 2000 --seed 7 --isa avx2\n"
                  "  tessera check --cases 1 --seed 7 --first-case 123     (one case alone)");
  auto flags = std::make_shared<CheckFlags>();
  command->add_option("--cases", flags->cases, "Random cases; each runs on each ISA")
      ->check(integer(0))
      ->type_name("N")
      ->capture_default_str();
  command->add_option("--seed", flags->seed, "Seed of the cases")
      ->check(check_seed)
      ->type_name("N")
      ->capture_default_str();
  command->add_option("--first-case", flags->first_case, "Number of the first case")
      ->check(integer(0))
      ->type_name("N")
      ->capture_default_str();
  add_list(*command, "--isa", flags->isas, "Only these instruction sets")->type_name("NAME,..");
  command->add_option("--pass", flags->pass, "fwd, bwd or both")
      ->check(one_of({"fwd", "bwd", "both"}))
      ->type_name("PASS")
      ->capture_default_str();
  add_threads(*command, flags->threads)->description("Threads of the fp64 reference; 0: all CPUs");
  command->callback([&context, flags] { check(context, *flags); });
}

}  // namespace tessera::cli
