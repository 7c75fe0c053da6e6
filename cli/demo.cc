// tessera demo: the whole thing on real queries, keys and values: is it right, what does it keep, how fast is it,
// and how far does it scale.
#include "demo.h"

#include <filesystem>

#include <fmt/format.h>
#include <unistd.h>

#include "measure.h"
#include "options.h"
#include "pictures.h"
#include "tessera/io.h"
#include "tessera/version.h"

namespace tessera::cli {
namespace {

constexpr const char* kSampleFile = "byte_lm_qkv.safetensors";

struct DemoFlags {
  bool quick = false;
  std::string out = "tessera-demo", input;
  int threads = 0;
  std::optional<int64_t> longest;
};

constexpr int64_t kQuickLongest = 16384, kLongest = 131072;

// Beside the program as installed (wherever that was moved), in the sources it was built from, or where
// `cmake --install` put it.
std::string find_sample() {
  namespace fs = std::filesystem;
  std::vector<fs::path> places;
  std::error_code error;
  const fs::path program = fs::read_symlink("/proc/self/exe", error);
  if (!error) places.push_back(program.parent_path() / ".." / "share" / "tessera" / kSampleFile);
  places.push_back(fs::path(TESSERA_SOURCE_DATA_DIR) / kSampleFile);
  places.push_back(fs::path(TESSERA_INSTALL_DATA_DIR) / kSampleFile);
  for (const fs::path& place : places) {
    if (fs::exists(place, error)) return place.lexically_normal().string();
  }
  fail("--input", fmt::format("nothing, and no {} beside this program", kSampleFile),
       "a safetensors file with q, k, v of causal self-attention");
}

// All sections as one table: CSV has no other way.
void write_csv(Context& context, const Record& results) {
  static constexpr Column kColumns[] = {{"section", ""},
                                        {"pattern", ""},
                                        {"block", ""},
                                        {"density", ""},
                                        {"seq", ""},
                                        {"dtype", ""},
                                        {"max_error", ""},
                                        {"error_ratio", ""},
                                        {"coverage", ""},
                                        {"coverage_p5", ""},
                                        {"oracle_coverage", ""},
                                        {"oracle_ratio", ""},
                                        {"output_error", ""},
                                        {"seconds", ""},
                                        {"dense_seconds", ""},
                                        {"speedup_vs_dense", ""},
                                        {"gflops", ""},
                                        {"fraction_of_peak", ""},
                                        {"tensor_bytes", ""},
                                        {"scratch_bytes", ""},
                                        {"guide_seconds", ""},
                                        {"speedup_vs_guide", ""},
                                        {"file", ""}};
  RecordWriter writer(context.output, Format::csv, kColumns);
  for (const char* section : {"errors", "quality", "times", "training", "scale", "pictures"}) {
    for (const Record& r : results.at(section)) {
      Record row = {{"section", section}};
      row.update(r);
      writer.add(row);
    }
  }
  writer.finish();
}

void demo(Context& context, const DemoFlags& flags) {
  const std::string path = flags.input.empty() ? find_sample() : flags.input;
  const std::filesystem::path folder(flags.out);
  check_folder(folder);  // before minutes of work, not after
  Pictures pictures;
  ThreadPool pool(flags.threads);
  double seconds = 0;
  Record results;
  seconds = time_once([&] {
    context.progress.show("reading the sample");
    const DemoSample sample = prepare_sample(path, flags.quick, pool);
    const Isa isa = automatic_isa();
    const Peaks peaks = measure_peaks(isa, pool.num_threads(), pool, false);
    results["version"] = TESSERA_VERSION;
    results["cpu"] = cpu_model();
    results["threads"] = pool.num_threads();
    results["isa"] = name_of(isa);
    results["fma_gflops"] = peaks.fma_gflops;
    if (peaks.bf16_dot_gflops > 0) results["bf16_dot_gflops"] = peaks.bf16_dot_gflops;
    results["sample"] = path;
    if (context.format == Format::table) {
      context.progress.clear();
      std::string peak = fmt::format("peak {:.0f} GFLOP/s fp32", peaks.fma_gflops);
      if (peaks.bf16_dot_gflops > 0) peak += fmt::format(", {:.0f} bf16", peaks.bf16_dot_gflops);
      context.output.write(
          fmt::format("Tessera {}: block-sparse attention\n"
                      "Machine  {}, {} thread{}, {}, {}\n"
                      "Sample   q, k, v of a trained causal language model: {} heads of {} numbers, {} tokens\n"
                      "         {}\n",
                      TESSERA_VERSION, cpu_model(), pool.num_threads(), pool.num_threads() > 1 ? "s" : "", name_of(isa),
                      peak, sample.fp32.heads(), sample.fp32.head_dim(), sample.fp32.seqlen_q(), path));
    }
    results["errors"] = demo_errors(context, sample, flags.quick, pool);
    results["quality"] = demo_quality(context, sample, pool);
    results["times"] = demo_times(context, sample, flags.quick, pool);
    results["training"] = demo_training(context, sample, flags.quick, pool);
    results["scale"] = demo_scale(context, flags.longest.value_or(flags.quick ? kQuickLongest : kLongest), pool);
    results["pictures"] = demo_pictures(context, sample, results["scale"], flags.quick, folder, pictures, pool);
  });
  results["seconds"] = seconds;
  const std::string json_path = (folder / "results.json").string();
  // All at once: an interrupted demo leaves nothing half made, and no folder.
  make_folder(folder);
  WriteTogether all;
  for (const auto& [file, png] : pictures) write_file(file, std::as_bytes(std::span(png)));
  write_file(json_path, std::string_view(results.dump(2, ' ', false, Record::error_handler_t::replace) + "\n"));
  all.commit();
  context.progress.clear();

  Written written;
  for (const Record& r : results["pictures"]) written.emplace_back(r["file"], r["shows"]);
  written.emplace_back(json_path, "everything above as JSON");

  bool passed = true;
  for (const Record& r : results["errors"]) passed &= r["passed"].get<bool>();
  switch (context.format) {
    case Format::json: write_json(context.output, results); break;
    case Format::csv: write_csv(context, results); break;
    case Format::table: {
      list_written(context, written);
      context.output.write(fmt::format("\n{:.0f} seconds. {}\n", seconds,
                                       passed
                                           ? "Every result is within the rounding error of its dtype."
                                           : "A result is further from fp64 than rounding explains: see section 1."));
    }
  }
  if (!passed) {
    complain("a result is further from fp64 than rounding explains");
    context.exit_status = 1;
  }
}

}  // namespace

void demo_heading(Context& context, const std::string& heading, const std::string& explanation) {
  if (context.format != Format::table) return;
  context.progress.clear();
  context.output.write(fmt::format("\n{}\n{}\n\n", heading, explanation));
}

void add_demo(CLI::App& app, Context& context) {
  CLI::App* command = add_command(app, context, "demo",
                                  "Errors, quality, speed and scale on real queries, keys and values, with pictures",
                                  "  tessera demo\n"
                                  "  tessera demo --quick --out /tmp/demo\n"
                                  "  tessera demo --format json > demo.json");
  auto flags = std::make_shared<DemoFlags>();
  command->add_flag("--quick", flags->quick,
                    "Fewer patterns, up to 16,384 tokens: some seconds instead of a minute "
                    "or two");
  command->add_option("--out", flags->out, "Folder for the pictures and results.json")
      ->check(check_folder_name)
      ->type_name("DIR")
      ->capture_default_str();
  command
      ->add_option("--input", flags->input,
                   "Other queries, keys and values (safetensors with q, k, v in [B, H, S, D], causal). Default: the "
                   "sample that comes with Tessera")
      ->type_name("FILE");
  counts_tokens(
      command
          ->add_option("--longest", flags->longest, "Longest sequence of the scale table. Default 128k; --quick: 16k")
          ->check(integer(0)))
      ->type_name("N");
  add_threads(*command, flags->threads);
  command->callback([&context, flags] { demo(context, *flags); });
}

}  // namespace tessera::cli
