// tessera attend: block-sparse attention of tensors in files.
#include <cmath>
#include <filesystem>
#include <system_error>

#include <fmt/format.h>

#include "command.h"
#include "measure.h"
#include "options.h"
#include "tensors.h"
#include "tessera/io.h"
#include "tessera/pattern_statistics.h"

namespace tessera::cli {
namespace {

constexpr Column kFields[] = {
    {"batch", "batch", 0, Style::integer},
    {"heads", "heads", 0, Style::integer},
    {"kv_heads", "kv heads", 0, Style::integer},
    {"seqlen_q", "queries", 0, Style::integer},
    {"seqlen_k", "keys", 0, Style::integer},
    {"head_dim", "head dim", 0, Style::integer},
    {"head_dim_v", "head dim of v", 0, Style::integer},
    {"dtype", "dtype", 0, Style::text},
    {"layout", "layout", 0, Style::text},
    {"pattern", "pattern", 0, Style::text},
    {"segment_lengths", "segment lengths", 0, Style::text},
    {"dilation_rates", "dilation rates", 0, Style::text},
    {"block_q", "block of queries", 0, Style::integer},
    {"block_k", "block of keys", 0, Style::integer},
    {"causal", "causal", 0, Style::text},
    {"token_window", "token window", 0, Style::integer},
    {"density", "density", 0, Style::percent},
    {"kept_blocks", "kept blocks", 0, Style::integer},
    {"isa", "isa", 0, Style::text},
    {"threads", "threads", 0, Style::integer},
    {"seconds", "milliseconds", 0, Style::milliseconds},
    {"gflops", "GFLOP/s", 0, Style::number},
    {"scratch_bytes", "scratch", 0, Style::bytes},
    {"max_error", "largest error against fp64", 0, Style::error},
    {"max_lse_error", "... of lse", 0, Style::error},
    {"error_ratio", "error / bound on rounding", 0, Style::number},
    {"lse_error_ratio", "... of lse", 0, Style::number},
    {"check", "check", 0, Style::text},
    {"output", ""},
};

struct AttendFlags {
  InputFlags input;
  PatternOptions pattern;
  std::string dtype, isa, output;
  std::optional<double> scale;
  double softcap = 0;
  int threads = 0;
  bool check = false;
};

bool ends_with_npy(const std::string& path) { return path.size() > 4 && path.ends_with(".npy"); }

// out in the layout of the input; lse [B, H, Sq]. Both files or none.
Written write_result(const std::string& path, const Tensor& out, const Tensor& lse) {
  if (!ends_with_npy(path)) {
    write_safetensors(path, {{"out", out.view()}, {"lse", lse.view()}});
    return {{path, "out and lse"}};
  }
  const std::string lse_path = path.substr(0, path.size() - 4) + ".lse.npy";
  WriteTogether together;
  write_npy(path, out);
  write_npy(lse_path, lse);
  together.commit();
  return {{path, "out"}, {lse_path, "lse"}};
}

// Runs, times, checks and writes a call of either kind, and adds to the record what came of it.
template <class Call>
Written run(Context& context, const AttendFlags& flags, const Qkv& x, int64_t pairs, Call& call, ThreadPool& pool,
            Record& record) {
  context.progress.show("attention");
  ForwardInfo info;
  const double seconds = time_once([&] { info = call(pool); });
  record["isa"] = x.q.dtype() == DType::f64 ? "fp64 reference" : std::string(name_of(info.isa));
  record["threads"] = pool.num_threads();
  record["seconds"] = seconds;
  record["gflops"] = seconds > 0 ? forward_flops(pairs, x.head_dim(), x.head_dim_v()) / seconds / 1e9 : 0;
  record["scratch_bytes"] = info.scratch_bytes;
  if (flags.check) {
    context.progress.show("checking against fp64");
    const ReferenceError error = compare_to_reference(call, pool);
    record["max_error"] = error.out_error;
    record["max_lse_error"] = error.lse_error;
    record["error_ratio"] = error.out_ratio;
    record["lse_error_ratio"] = error.lse_ratio;
    record["check"] = error.passed ? "passed" : "FAILED";
    if (!error.passed) context.exit_status = 1;
  }
  if (flags.output.empty()) return {};
  context.progress.show("writing");
  record["output"] = flags.output;
  return write_result(flags.output, call.out, call.lse);
}

void attend(Context& context, const AttendFlags& flags) {
  // Everything that can be refused is refused before the files are read.
  const bool from_file = flags.pattern.from_file();
  PatternChoice choice;
  if (from_file) {
    (void)flags.pattern.choices();  // --pattern beside --pattern-file
  } else {
    choice = flags.pattern.single();
  }
  const Isa isa = parse_isa(flags.isa);
  if (flags.scale && !std::isfinite(*flags.scale)) throw UsageError("--scale: allowed: a finite number");
  if (!(flags.softcap >= 0) || std::isinf(flags.softcap)) throw UsageError("--softcap: allowed: a number >= 0");

  if (!flags.output.empty()) {
    if (!ends_with_npy(flags.output) && !flags.output.ends_with(".safetensors")) {
      throw UsageError(fmt::format("--output: got {}; allowed: a .safetensors or a .npy file", flags.output));
    }
    for (const std::string* input : {&flags.input.input, &flags.input.q, &flags.input.k, &flags.input.v}) {
      std::error_code none;
      if (!input->empty() && std::filesystem::equivalent(*input, flags.output, none)) {
        throw UsageError(fmt::format("--output: got {}, which is an input; allowed: another file", flags.output));
      }
    }
  }

  context.progress.show("reading");
  ThreadPool pool(flags.threads);
  Qkv x = load_qkv(flags.input);
  if (!flags.dtype.empty()) x = convert(x, parse_dtype(flags.dtype), pool);
  if (ends_with_npy(flags.output) && x.q.dtype() == DType::bf16) {
    throw UsageError("--output: .npy has no bf16; write a .safetensors file, or choose another --dtype");
  }
  BlockPattern pattern;
  if (from_file) {
    pattern = read_pattern(flags.pattern.file());
  } else if (!choice.dilated()) {
    context.progress.show("pattern");
    pattern = build_pattern(choice.spec, x.seqlen_q(), x.seqlen_k(), x.heads());
  }
  // A pattern that is causal says so itself.
  const bool causal = choice.spec.causal || flags.pattern.causal() || pattern.shape().causal;
  AttentionOptions options;
  if (causal) options.causal = true;
  options.scale = flags.scale;
  options.softcap = flags.softcap;
  std::optional<int64_t> token_window = choice.token_window;
  if (from_file) token_window = flags.pattern.token_window() ? flags.pattern.token_window() : flags.pattern.window();
  set_token_window(options, causal, token_window);
  Record record = {{"batch", x.batch()},
                   {"heads", x.heads()},
                   {"kv_heads", x.kv_heads()},
                   {"seqlen_q", x.seqlen_q()},
                   {"seqlen_k", x.seqlen_k()},
                   {"head_dim", x.head_dim()},
                   {"head_dim_v", x.head_dim_v()},
                   {"dtype", name_of(x.q.dtype())},
                   {"layout", flags.input.layout},
                   {"pattern", from_file ? flags.pattern.file() : std::string(name_of(choice.spec.kind))},
                   {"causal", causal}};
  if (token_window) record["token_window"] = *token_window;

  Written written;
  if (choice.dilated()) {
    const Dilation dilation = choice.dilation();
    const int64_t pairs =
        as_usage([&] { return dilated_pairs(x.seqlen_q(), dilation, options, x.batch(), x.heads()); });
    record["segment_lengths"] = comma_list(choice.segment_lengths);
    record["dilation_rates"] = comma_list(choice.dilation_rates);
    record["block_q"] = choice.spec.block_q;
    record["block_k"] = choice.spec.block_k;
    record["density"] = dilated_density(pairs, x.seqlen_q(), causal, x.batch(), x.heads());
    DilatedCall call(x, dilation, options, isa);
    written = run(context, flags, x, pairs, call, pool, record);
  } else {
    record["block_q"] = pattern.shape().block_q;
    record["block_k"] = pattern.shape().block_k;
    record["density"] = statistics(pattern, options.causal).density;
    record["kept_blocks"] = pattern.num_blocks();
    const int64_t pairs = admitted_pairs(pattern, options, x.batch(), x.heads());
    ForwardCall call(x, pattern, options, isa);
    written = run(context, flags, x, pairs, call, pool, record);
  }
  context.progress.clear();
  write_single(context.output, context.format, record, kFields);
  list_written(context, written);
  if (context.exit_status != 0) complain("the result is further from fp64 than rounding explains");
}

}  // namespace

void add_attend(CLI::App& app, Context& context) {
  CLI::App* command = add_command(
      app, context, "attend", "Block-sparse attention of the queries, keys and values in files",
      "  tessera attend --input qkv.safetensors --pattern dilated_sparse --density 0.1 --block 64 --causal \\\n"
      "      --check --output out.safetensors\n"
      "  tessera attend --q q.npy --k k.npy --v v.npy --layout bshd --pattern local_window --window 512\n"
      "  tessera attend --input qkv.safetensors --pattern-file p.json --dtype bf16\n"
      "  tessera attend --input qkv.safetensors --segment-lengths 1024,2048 --dilation-rates 1,2 --causal");
  auto flags = std::make_shared<AttendFlags>();
  flags->input.add_to(*command);
  flags->pattern.add_to(*command, {.file = true, .attention = true, .dilation = true, .fallback = ""});
  command->add_option("--scale", flags->scale, "Softmax scale. Default 1 / sqrt(head dim)")->type_name("X");
  command->add_option("--softcap", flags->softcap, "Scores become X tanh(score / X). Default: off")->type_name("X");
  command
      ->add_option("--dtype", flags->dtype,
                   "Convert to fp32, bf16, fp16 or fp64 (the slow reference). Default: the input's")
      ->check(one_of({"fp32", "bf16", "fp16", "fp64"}))
      ->type_name("NAME");
  add_threads(*command, flags->threads);
  add_isa(*command, flags->isa);
  command->add_flag("--check", flags->check,
                    "Compare with fp64 on the same pattern; exit status 1 if the error is more than rounding explains");
  command
      ->add_option("--output", flags->output,
                   "Where out (layout of the input) and lse [B, H, Sq] go: a .safetensors file, or a .npy file "
                   "with lse beside it in NAME.lse.npy")
      ->type_name("FILE");
  command->callback([&context, flags] { attend(context, *flags); });
}

}  // namespace tessera::cli
