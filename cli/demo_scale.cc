// The last part of the demo: the guides' scale table, measured here.
#include <fmt/format.h>

#include "demo.h"
#include "measure.h"
#include "options.h"
#include "tessera/pattern_statistics.h"

namespace tessera::cli {
namespace {

struct GuideRow {
  int64_t seqlen;
  double density;
  double seconds;  // GTX 1080, 8 heads of 64, fp16 forward: guides/sparsity-ratio-fix.md, "Performance Results"
};
constexpr GuideRow kGuide[] = {
    {4096, 0.10, 50.4e-3},   {8192, 0.05, 105.6e-3},   {16384, 0.05, 196.4e-3},
    {32768, 0.02, 415.4e-3}, {65536, 0.01, 1003.6e-3}, {131072, 0.005, 2472.2e-3},
};
constexpr int kHeads = 8, kHeadDim = 64, kScaleBlock = 128;

constexpr Column kScaleColumns[] = {
    {"seq", "tokens", 7, Style::integer},
    {"density", "density", 7, Style::percent},
    {"fp32_seconds", "fp32 ms", 7, Style::milliseconds},
    {"fp32_fraction_of_peak", "of peak", 7, Style::percent},
    {"bf16_seconds", "bf16 ms", 7, Style::milliseconds},
    {"bf16_fraction_of_peak", "of peak", 7, Style::percent},
    {"guide_seconds", "GTX 1080", 8, Style::milliseconds},
    {"fp32_speedup_vs_guide", "fp32", 6, Style::ratio},
    {"bf16_speedup_vs_guide", "bf16", 6, Style::ratio},
    {"fp32_tensor_bytes", "tensors", 9, Style::bytes},
    {"fp32_scratch_bytes", "scratch", 9, Style::bytes},
};

// What the call needs at its peak, with room for the pattern and the scratch.
int64_t needed_bytes(int64_t tensor_bytes) { return tensor_bytes + tensor_bytes / 4 + (int64_t{64} << 20); }

Record measure(const GuideRow& row, DType dtype, ThreadPool& pool) {
  PatternSpec spec;
  spec.kind = PatternKind::dilated_sparse;
  spec.block_q = spec.block_k = kScaleBlock;
  spec.density = row.density;
  QkvShape shape;
  shape.heads = shape.kv_heads = kHeads;
  shape.head_dim = shape.head_dim_v = kHeadDim;
  shape.seqlen_q = shape.seqlen_k = row.seqlen;
  const int64_t lse_bytes = shape.batch * kHeads * row.seqlen * 4;
  const int64_t tensor_bytes =
      (shape.q_elements() + shape.kv_elements() + shape.out_elements()) * static_cast<int64_t>(size_of(dtype)) +
      lse_bytes;
  Record r = {{"seq", row.seqlen},           {"pattern", "dilated_sparse"},      {"block", kScaleBlock},
              {"dtype", name_of(dtype)},     {"requested_density", row.density}, {"guide_seconds", row.seconds},
              {"tensor_bytes", tensor_bytes}};
  const int64_t available = available_memory_bytes();
  if (available > 0 && available < needed_bytes(tensor_bytes)) {
    r["skipped"] = fmt::format("needs {} of memory, {} available", human_bytes(double(needed_bytes(tensor_bytes))),
                               human_bytes(double(available)));
    return r;
  }
  const BlockPattern pattern = build_pattern(spec, row.seqlen, row.seqlen, kHeads);
  const Qkv x = random_qkv(shape, dtype, Layout::bshd, 0, pool);
  ForwardCall call(x, pattern, {}, Isa::automatic);
  ForwardInfo info = call(pool);
  const Peaks peaks = measure_peaks(info.isa, pool.num_threads(), pool, false);
  constexpr int kRepeat = 3;
  const Timing timing = time_calls(kRepeat, [&] { info = call(pool); });
  const double gflops = forward_flops(admitted_pairs(pattern, {}, 1, kHeads), kHeadDim, kHeadDim) / timing.median / 1e9;
  const double peak = peaks.gflops(dtype);
  r["density"] = statistics(pattern).density;
  r["threads"] = pool.num_threads();
  r["isa"] = name_of(info.isa);
  r["seconds"] = timing.median;
  r["gflops"] = gflops;
  r["peak_gflops"] = peak;
  r["fraction_of_peak"] = gflops / peak;
  r["speedup_vs_guide"] = row.seconds / timing.median;
  r["scratch_bytes"] = info.scratch_bytes;
  return r;
}

}  // namespace

Record demo_scale(Context& context, int64_t longest, ThreadPool& pool) {
  Record records = Record::array();
  if (longest < kGuide[0].seqlen) return records;
  demo_heading(context, "5. How far does it scale?",
               fmt::format("{} heads of {} numbers, dilated_sparse, blocks of {}, not causal, random inputs. Beside\n"
                           "it the guides' milliseconds on a GTX 1080, and how many times faster. Tensors: in fp32.",
                           kHeads, kHeadDim, kScaleBlock));
  RecordWriter writer(context.output, Format::table, kScaleColumns);
  size_t done = 0;
  for (const GuideRow& guide : kGuide) {
    if (guide.seqlen > longest) break;
    Record row;
    std::string skipped;
    for (DType dtype : {DType::f32, DType::bf16}) {
      context.progress.show(fmt::format("{} tokens, {}", guide.seqlen, name_of(dtype)),
                            static_cast<double>(done++) / (2.0 * std::size(kGuide)));
      Record r = measure(guide, dtype, pool);
      if (r.contains("skipped")) skipped += fmt::format("  {}: {}\n", name_of(dtype), r["skipped"].get<std::string>());
      add_beside(row, r);
      records.push_back(std::move(r));
    }
    if (context.format != Format::table) continue;
    context.progress.clear();
    writer.add(row);
    if (!skipped.empty()) context.output.write(skipped);
  }
  return records;
}

}  // namespace tessera::cli
