// tessera info: what this build and this machine can do.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "command.h"
#include "measure.h"
#include "options.h"
#include "tessera/machine.h"
#include "tessera/version.h"

namespace tessera::cli {
namespace {

constexpr Column kPeaks[] = {
    {"isa", "isa", 12, Style::text},
    {"threads", "threads", 7, Style::integer},
    {"fma_gflops", "fp32 FMA GF/s", 13, Style::number},
    {"bf16_dot_gflops", "bf16 dot GF/s", 13, Style::number},
    {"read_gbytes_per_second", "read GB/s", 9, Style::number},
};

std::vector<std::string> names(std::span<const Isa> isas) {
  std::vector<std::string> result;
  for (Isa isa : isas) result.emplace_back(name_of(isa));
  return result;
}

void info(Context& context, bool no_peaks) {
  Record peaks = Record::array();
  if (!no_peaks) {
    const int cpus = available_cpus();
    std::vector<int> counts = {1};
    if (cpus > 1) counts.push_back(cpus);
    for (const int threads : counts) {
      ThreadPool pool(threads);
      for (Isa isa : usable_isas()) {
        context.progress.show(fmt::format("measuring {}, threads: {}", name_of(isa), threads));
        // Bandwidth belongs to the machine, not to the ISA: once a number of threads.
        const bool bandwidth = isa == usable_isas().back();
        const Peaks p = measure_peaks(isa, threads, pool, bandwidth);
        Record r = {{"isa", name_of(isa)}, {"threads", threads}, {"fma_gflops", p.fma_gflops}};
        r["bf16_dot_gflops"] = p.bf16_dot_gflops > 0 ? Record(p.bf16_dot_gflops) : Record();
        r["read_gbytes_per_second"] = bandwidth ? Record(p.read_gbytes_per_second) : Record();
        peaks.push_back(std::move(r));
      }
    }
    context.progress.clear();
  }

  Record record;
  record["version"] = TESSERA_VERSION;
  record["cpu"] = cpu_model();
  record["cpus"] = available_cpus();
  record["isas_compiled"] = names(compiled_isas());
  record["isas_usable"] = names(usable_isas());
  record["isa_automatic"] = name_of(automatic_isa());
  record["isa_automatic_decode"] = name_of(automatic_isa(true));
  record["features"] = {{"cpu_forward", true}, {"cpu_backward", true}, {"cuda", false}, {"torch", false}};
  switch (context.format) {
    case Format::json:
      record["peaks"] = peaks;
      write_json(context.output, record);
      return;
    case Format::csv: {
      // One row a peak, with the machine's own fields repeated, so that it stays one table.
      record["isas_compiled"] = fmt::format("{}", fmt::join(names(compiled_isas()), " "));
      record["isas_usable"] = fmt::format("{}", fmt::join(names(usable_isas()), " "));
      static constexpr Column kCsv[] = {{"version", ""},
                                        {"cpu", ""},
                                        {"cpus", ""},
                                        {"isas_compiled", ""},
                                        {"isas_usable", ""},
                                        {"isa_automatic", ""},
                                        {"isa_automatic_decode", ""},
                                        {"cuda", ""},
                                        {"torch", ""},
                                        {"isa", ""},
                                        {"threads", ""},
                                        {"fma_gflops", ""},
                                        {"bf16_dot_gflops", ""},
                                        {"read_gbytes_per_second", ""}};
      record.erase("features");
      record["cuda"] = record["torch"] = false;
      RecordWriter writer(context.output, context.format, kCsv);
      if (peaks.empty()) peaks.push_back(Record::object());
      for (const Record& peak : peaks) {
        Record row = record;
        row.update(peak);
        writer.add(row);
      }
      writer.finish();
      return;
    }
    case Format::table: break;
  }
  context.output.write(
      fmt::format("tessera        {}\n"
                  "cpu            {}, {} usable\n"
                  "isas compiled  {}\n"
                  "isas usable    {}\n"
                  "automatic      {}, decode: {}\n"
                  "features       CPU forward, backward and decode: yes, CUDA: no, torch: no\n",
                  TESSERA_VERSION, cpu_model(), available_cpus(), fmt::join(names(compiled_isas()), ", "),
                  fmt::join(names(usable_isas()), ", "), name_of(automatic_isa()), name_of(automatic_isa(true))));
  if (peaks.empty()) return;
  context.output.write("\nPeaks measured now\n");
  RecordWriter writer(context.output, context.format, kPeaks);
  for (const Record& peak : peaks) writer.add(peak);
  writer.finish();
}

}  // namespace

void add_info(CLI::App& app, Context& context) {
  CLI::App* command = add_command(app, context, "info", "Version, CPU, instruction sets, measured peaks, features",
                                  "  tessera info\n"
                                  "  tessera info --format json");
  auto no_peaks = std::make_shared<bool>(false);
  command->add_flag("--no-peaks", *no_peaks, "Do not measure the peaks");
  command->callback([&context, no_peaks] { info(context, *no_peaks); });
}

}  // namespace tessera::cli
