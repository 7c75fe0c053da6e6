// tessera bench: how fast the kernels are, as a share of what this machine's units can do.
#include <algorithm>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <fmt/format.h>

#include "command.h"
#include "measure.h"
#include "options.h"
#include "tensors.h"
#include "tessera/io.h"
#include "tessera/pattern_statistics.h"

namespace tessera::cli {
namespace {

constexpr Column kBenchColumns[] = {
    {"pass", ""},
    {"dtype", "dtype", 5, Style::text},
    {"batch", ""},
    {"heads", ""},
    {"kv_heads", ""},
    {"queries", ""},
    {"seq", "seq", 7, Style::integer},
    {"head_dim", ""},
    {"head_dim_v", ""},
    {"block", "block", 5, Style::integer},
    {"block_k", ""},
    {"layout", ""},
    {"pattern", "pattern", 16, Style::text},
    {"segment_lengths", ""},
    {"dilation_rates", ""},
    {"requested_density", ""},
    {"causal", ""},
    {"window", ""},
    {"density", "density", 7, Style::percent},
    {"kept_blocks", ""},
    {"pattern_seconds", ""},
    {"threads", "thr", 3, Style::integer},
    {"isa", "isa", 11, Style::text},
    {"repeat", ""},
    {"seconds", "ms", 7, Style::milliseconds},
    {"min_seconds", ""},
    {"max_seconds", ""},
    {"gflops", "GFLOP/s", 7, Style::number},
    {"peak_gflops", ""},
    {"fraction_of_peak", "of peak", 7, Style::percent},
    {"best_fraction_of_peak", ""},
    {"gbytes_per_second", "GB/s", 6, Style::number},
    {"read_gbytes_per_second", ""},
    {"fraction_of_read", "of read", 7, Style::percent},
    {"best_fraction_of_read", ""},
    {"dense_seconds", ""},
    {"speedup_vs_dense", "vs dense", 8, Style::ratio},
    {"scratch_bytes", ""},
    {"peak_rss_bytes", ""},
};

constexpr int kMostDecodeQueries = 16;  // more take the schedule of fwd

struct BenchFlags {
  PatternOptions pattern;
  std::string pass = "fwd", layout = "bhsd", isa;
  std::vector<std::string> dtypes{"fp32"};
  std::vector<int64_t> seqlens{8192};
  CLI::Option* seq = nullptr;
  std::vector<int> threads{0};
  int64_t batch = 1, heads = 8, head_dim = 64;
  std::optional<int64_t> kv_heads, head_dim_v, queries;
  int repeat = 5;
  uint64_t seed = 0;
  bool vs_dense = false;
};

// One point of the sweep, measured.
class Bench {
 public:
  Bench(Context& context, const BenchFlags& flags)
      : context_(context), flags_(flags), isa_(parse_isa(flags.isa)), layout_(parse_layout(flags.layout)) {}

  void run() {
    std::vector<PatternChoice> choices = flags_.pattern.choices();
    if (flags_.pattern.from_file()) choices = {read_file()};
    if (decode() && std::ranges::any_of(choices, &PatternChoice::dilated)) {
      throw UsageError("--segment-lengths: dilated attention has as many queries as keys; --pass decode has not");
    }
    if (!decode() && flags_.queries) throw UsageError("--queries: got it without --pass decode; allowed: with it");
    std::vector<DType> dtypes;
    for (const std::string& name : flags_.dtypes) dtypes.push_back(parse_dtype(name));
    const std::vector<Column> columns = shown_columns();
    RecordWriter writer(context_.output, context_.format, columns);
    const size_t total = dtypes.size() * seqlens().size() * flags_.threads.size() * choices.size();
    size_t done = 0;
    // Threads outermost: one pool each. Inputs are made once for a dtype and a length.
    for (int threads : flags_.threads) {
      ThreadPool pool(threads);
      for (DType dtype : dtypes) {
        for (int64_t seqlen : seqlens()) {
          const QkvShape shape = make_shape(seqlen);
          progress(done, total, fmt::format("inputs, {} tokens", seqlen));
          const Inputs x = make_inputs(shape, dtype, pool);
          dense_.clear();
          for (const PatternChoice& choice : choices) {
            progress(done++, total, fmt::format("{} {} {} tokens", name_of(dtype), label(choice), seqlen));
            const Record record = measure(x, shape, choice, pool);
            context_.progress.clear();
            writer.add(record);
          }
        }
      }
    }
    writer.finish();
  }

 private:
  // --pattern-file: what it holds, and a choice of nothing but its blocks and causality.
  PatternChoice read_file() {
    file_pattern_ = read_pattern(flags_.pattern.file());
    const PatternShape& shape = file_pattern_->shape();
    PatternChoice choice;
    choice.spec.block_q = shape.block_q;
    choice.spec.block_k = shape.block_k;
    choice.spec.causal = shape.causal || flags_.pattern.causal();
    choice.token_window = flags_.pattern.token_window() ? flags_.pattern.token_window() : flags_.pattern.window();
    const auto must_be = [](const char* flag, int64_t got, const std::string& allowed, bool right) {
      if (!right) throw UsageError(fmt::format("{}: got {}; allowed: {}, as --pattern-file", flag, got, allowed));
    };
    if (flags_.seq->count() > 0) {
      for (int64_t n : flags_.seqlens) must_be("--seq", n, std::to_string(shape.seqlen_k), n == shape.seqlen_k);
    }
    if (!decode() && shape.seqlen_q != shape.seqlen_k) {
      throw UsageError(
          fmt::format("--pattern-file: got {} queries and {} keys; allowed: equally many (or --pass decode)",
                      shape.seqlen_q, shape.seqlen_k));
    }
    if (decode()) {
      must_be("--queries", flags_.queries.value_or(1), std::to_string(shape.seqlen_q),
              flags_.queries.value_or(1) == shape.seqlen_q);
    }
    must_be("--heads", flags_.heads, shape.heads == 1 ? "any" : std::to_string(shape.heads),
            shape.heads == 1 || shape.heads == flags_.heads);
    must_be("--batch", flags_.batch, shape.batches == 1 ? "any" : std::to_string(shape.batches),
            shape.batches == 1 || shape.batches == flags_.batch);
    return choice;
  }
  std::vector<int64_t> seqlens() const {
    return file_pattern_ ? std::vector<int64_t>{file_pattern_->shape().seqlen_k} : flags_.seqlens;
  }
  std::string label(const PatternChoice& choice) const {
    return file_pattern_ ? flags_.pattern.file() : pattern_label(choice.spec);
  }

  // The table leaves out what this sweep does not measure.
  std::vector<Column> shown_columns() const {
    std::vector<Column> columns(std::begin(kBenchColumns), std::end(kBenchColumns));
    for (Column& c : columns) {
      const bool read = c.key == "gbytes_per_second" || c.key == "fraction_of_read";
      const bool one_block = c.key == "block" && flags_.pattern.num_blocks() == 1;
      if (one_block || (read && !decode()) || (c.key == "speedup_vs_dense" && !flags_.vs_dense)) c.header = {};
    }
    return columns;
  }

  bool decode() const { return flags_.pass == "decode"; }

  Pass pass() const {
    if (flags_.pass == "bwd") return Pass::backward;
    return flags_.pass == "fwdbwd" ? Pass::both : Pass::forward;
  }

  struct Inputs {
    Qkv qkv;
    Tensor dout;  // where there is a backward pass
  };

  Inputs make_inputs(const QkvShape& shape, DType dtype, Executor& executor) const {
    Inputs x{random_qkv(shape, dtype, layout_, flags_.seed, executor), {}};
    if (pass() != Pass::forward) x.dout = random_normal(dtype, x.qkv.out_shape(), ~flags_.seed, executor);
    return x;
  }

  // The pattern in the forms that the pass needs.
  BlockPattern make(const PatternSpec& spec, const QkvShape& s) const {
    const BlockPattern pattern = build_pattern(spec, s.seqlen_q, s.seqlen_k, s.heads);
    if (pass() != Pass::forward) pattern.transposed();
    return pattern;
  }

  void progress(size_t done, size_t total, const std::string& what) {
    context_.progress.show(what, static_cast<double>(done) / static_cast<double>(total));
  }

  QkvShape make_shape(int64_t seqlen) const {
    QkvShape s;
    s.batch = flags_.batch;
    s.heads = flags_.heads;
    s.kv_heads = flags_.kv_heads.value_or(flags_.heads);
    s.seqlen_q = decode() ? flags_.queries.value_or(1) : seqlen;
    s.seqlen_k = seqlen;
    s.head_dim = flags_.head_dim;
    s.head_dim_v = flags_.head_dim_v.value_or(flags_.head_dim);
    return s;
  }

  Record measure(const Inputs& x, const QkvShape& s, const PatternChoice& choice, ThreadPool& pool) {
    const PatternSpec& spec = choice.spec;
    const DType dtype = x.qkv.q.dtype();
    BlockPattern pattern;  // dilated attention makes its own
    const double pattern_seconds = choice.dilated() ? 0 : time_once([&] {
      pattern = file_pattern_ ? *file_pattern_ : make(spec, s);
      if (pass() != Pass::forward) pattern.transposed();
    });
    AttentionOptions options;
    if (spec.causal) options.causal = true;
    set_token_window(options, spec.causal, choice.token_window);

    PassCall call =
        choice.dilated()
            ? as_usage([&] { return PassCall(pass(), x.qkv, &x.dout, choice.dilation(), options, isa_, pool); })
            : PassCall(pass(), x.qkv, &x.dout, pattern, options, isa_, pool);
    const int threads = pool.num_threads();
    PassCall::Info info = call(pool);
    // Other work on the machine comes and goes: the peak is the better of one taken before and one after.
    const Isa ran = info.isa;
    const bool has_peak = dtype != DType::f64;
    Peaks peaks;
    if (has_peak) peaks = measure_peaks(ran, threads, pool, decode());
    reset_peak_rss();  // the buffer that bandwidth was measured on does not count
    const Timing timing = time_calls(flags_.repeat, [&] { info = call(pool); });
    const int64_t rss = peak_rss_bytes();
    if (has_peak) {
      const Peaks after = measure_peaks(ran, threads, pool, decode());
      peaks.fma_gflops = std::max(peaks.fma_gflops, after.fma_gflops);
      peaks.bf16_dot_gflops = std::max(peaks.bf16_dot_gflops, after.bf16_dot_gflops);
      peaks.read_gbytes_per_second = std::max(peaks.read_gbytes_per_second, after.read_gbytes_per_second);
    }
    const double flops = call.flops();
    const double peak = peaks.gflops(dtype);

    Record r = {
        {"pass", flags_.pass},     {"dtype", name_of(dtype)},
        {"batch", s.batch},        {"heads", s.heads},
        {"kv_heads", s.kv_heads},  {"seq", s.seqlen_k},
        {"head_dim", s.head_dim},  {"head_dim_v", s.head_dim_v},
        {"block", spec.block_q},   {"block_k", spec.block_k},
        {"layout", flags_.layout}, {"pattern", file_pattern_ ? flags_.pattern.file() : std::string(name_of(spec.kind))},
        {"causal", spec.causal}};
    if (decode()) r["queries"] = s.seqlen_q;
    if (spec.density) r["requested_density"] = *spec.density;
    if (choice.token_window) r["window"] = *choice.token_window;
    else if (spec.window) r["window"] = *spec.window;
    if (choice.dilated()) {
      r["segment_lengths"] = comma_list(choice.segment_lengths);
      r["dilation_rates"] = comma_list(choice.dilation_rates);
      r["density"] = dilated_density(call.pairs(), s.seqlen_q, spec.causal, s.batch, s.heads);
    } else {
      r["density"] = statistics(pattern, spec.causal).density;
      r["kept_blocks"] = pattern.num_blocks();
      r["pattern_seconds"] = pattern_seconds;
    }
    r["threads"] = threads;
    r["isa"] = has_peak ? std::string(name_of(ran)) : "reference";
    r["repeat"] = flags_.repeat;
    r["seconds"] = timing.median;
    r["min_seconds"] = timing.min;
    r["max_seconds"] = timing.max;
    r["gflops"] = flops / timing.median / 1e9;
    if (has_peak) {
      r["peak_gflops"] = peak;
      r["fraction_of_peak"] = flops / timing.median / 1e9 / peak;
      r["best_fraction_of_peak"] = flops / timing.min / 1e9 / peak;
    }
    if (decode()) {
      const double gbytes = 1e-9 * static_cast<double>(kept_kv_bytes(pattern, s.batch, s.heads, s.kv_heads, s.head_dim,
                                                                     s.head_dim_v, dtype));
      r["gbytes_per_second"] = gbytes / timing.median;
      if (has_peak) {
        r["read_gbytes_per_second"] = peaks.read_gbytes_per_second;
        r["fraction_of_read"] = gbytes / timing.median / peaks.read_gbytes_per_second;
        r["best_fraction_of_read"] = gbytes / timing.min / peaks.read_gbytes_per_second;
      }
    }
    if (flags_.vs_dense) {
      const double dense = dense_seconds(x, s, spec, pool);
      r["dense_seconds"] = dense;
      r["speedup_vs_dense"] = dense / timing.median;
    }
    r["scratch_bytes"] = info.scratch_bytes;
    r["peak_rss_bytes"] = rss;
    return r;
  }

  // Median seconds of the dense pattern with the same block sizes and causality, once for these inputs.
  double dense_seconds(const Inputs& x, const QkvShape& s, const PatternSpec& spec, ThreadPool& pool) {
    const auto key = std::tuple(spec.block_q, spec.block_k, spec.causal);
    if (const auto known = dense_.find(key); known != dense_.end()) return known->second;
    context_.progress.show(fmt::format("{} dense {} tokens", name_of(x.qkv.q.dtype()), s.seqlen_k));
    PatternSpec dense;
    dense.kind = spec.causal ? PatternKind::causal : PatternKind::dense;
    dense.block_q = spec.block_q;
    dense.block_k = spec.block_k;
    dense.causal = spec.causal;
    AttentionOptions options;
    options.causal = spec.causal;
    PassCall call(pass(), x.qkv, &x.dout, make(dense, s), options, isa_, pool);
    return dense_[key] = time_calls(std::min(flags_.repeat, 3), [&] { call(pool); }).median;
  }

  std::optional<BlockPattern> file_pattern_;
  Context& context_;
  const BenchFlags& flags_;
  Isa isa_;
  Layout layout_;
  std::map<std::tuple<int, int, bool>, double> dense_;
};

void bench(Context& context, const BenchFlags& flags) {
  const int64_t kv_heads = flags.kv_heads.value_or(flags.heads);
  if (flags.heads % kv_heads != 0) {
    throw UsageError(fmt::format("--kv-heads: got {}; allowed: a divisor of --heads {}", kv_heads, flags.heads));
  }
  Bench(context, flags).run();
}

}  // namespace

void add_bench(CLI::App& app, Context& context) {
  CLI::App* command = add_command(
      app, context, "bench", "Time, FLOP/s and share of the measured peak; comma lists sweep",
      "  tessera bench --seq 8192 --pattern dilated_sparse --density 0.1,0.05 --vs-dense\n"
      "  tessera bench --dtype fp32,bf16 --seq 4096 --heads 4 --pattern dense --threads 1,2 --format json\n"
      "  tessera bench --pass fwdbwd --seq 8192 --pattern dilated_sparse --density 0.1 --vs-dense\n"
      "  tessera bench --pass fwdbwd --pattern dense --segment-lengths 2048,4096,8192 --dilation-rates 1,2,4\n"
      "  tessera bench --pass decode --seq 16384 --heads 32 --kv-heads 8 --head-dim 128 --pattern dense");
  auto flags = std::make_shared<BenchFlags>();
  const auto positive = integer(1);
  command->add_option("--pass", flags->pass, "Forward, backward, both, or decode: a few queries against --seq keys")
      ->check(one_of({"fwd", "bwd", "fwdbwd", "decode"}))
      ->type_name("fwd|bwd|fwdbwd|decode")
      ->capture_default_str();
  add_list(*command, "--dtype", flags->dtypes, "fp32, bf16, fp16 or fp64 (the slow reference). Default fp32")
      ->check(one_of({"fp32", "bf16", "fp16", "fp64"}))
      ->type_name("NAME,..");
  flags->seq = counts_tokens(add_list(*command, "--seq", flags->seqlens,
                                      "Tokens; decode: keys. Default 8192, or the lengths of --pattern-file")
                                 ->check(positive));
  flags->seq->type_name("N,..");
  command->add_option("--queries", flags->queries, "decode: queries, up to 16. Default 1")
      ->check(integer(1, kMostDecodeQueries))
      ->type_name("N");
  command->add_option("--batch", flags->batch, "Batch")->check(positive)->type_name("N")->capture_default_str();
  command->add_option("--heads", flags->heads, "Query heads")->check(positive)->type_name("N")->capture_default_str();
  command->add_option("--kv-heads", flags->kv_heads, "Key and value heads. Default: --heads")
      ->check(positive)
      ->type_name("N");
  command->add_option("--head-dim", flags->head_dim, "Head dim of q and k")
      ->check(positive)
      ->type_name("N")
      ->capture_default_str();
  command->add_option("--head-dim-v", flags->head_dim_v, "Head dim of v. Default: --head-dim")
      ->check(positive)
      ->type_name("N");
  command->add_option("--layout", flags->layout, "How tensors lie in memory")
      ->check(one_of({"bshd", "bhsd"}))
      ->type_name("bshd|bhsd")
      ->capture_default_str();
  flags->pattern.add_to(*command, {.file = true, .attention = true, .dilation = true, .fallback = "dilated_sparse"});
  add_list(*command, "--threads", flags->threads, "Threads; 0: all CPUs. Default 0")
      ->check(integer(0, 1024))
      ->type_name("N,..");
  add_isa(*command, flags->isa);
  command->add_option("--repeat", flags->repeat, "Timed runs after the warm-up; seconds is their median")
      ->check(positive)
      ->type_name("N")
      ->capture_default_str();
  command->add_option("--input-seed", flags->seed, "Seed of the random inputs")
      ->check(check_seed)
      ->type_name("N")
      ->capture_default_str();
  command->add_flag("--vs-dense", flags->vs_dense, "Time the dense pattern too");
  command->callback([&context, flags] { bench(context, *flags); });
}

}  // namespace tessera::cli
