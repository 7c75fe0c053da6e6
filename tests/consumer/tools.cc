// What tessera::tools has beside the core: a pattern through JSON, its quality, a picture, a check of the kernels.
#include <cstdio>
#include <vector>

#include "tessera/analysis.h"
#include "tessera/check.h"
#include "tessera/io.h"
#include "tessera/patterns.h"
#include "tessera/picture.h"

int main() {
  constexpr int64_t kSeqlen = 64;
  const tessera::BlockPattern pattern = tessera::parse_pattern(tessera::pattern_json(tessera::make_pattern(
      {.kind = tessera::PatternKind::dense, .seqlen_q = kSeqlen, .seqlen_k = kSeqlen, .block_q = 16, .block_k = 16})));
  std::vector<float> x(kSeqlen * 8, 0.5f);
  const tessera::TensorView view = tessera::make_view(x.data(), tessera::DType::f32, {1, kSeqlen, 1, 8});
  tessera::ThreadPool pool(2);
  const tessera::Quality quality = tessera::quality({.q = view, .k = view, .v = view}, pattern, pool);
  const std::vector<std::byte> png = tessera::encode_png(tessera::draw_pattern(pattern));
  const tessera::CheckReport report = tessera::run_check({.cases = 1}, pool);
  std::printf("coverage %.3f, %s, %s\n", quality.coverage, !png.empty() && png[1] == std::byte{'P'} ? "PNG" : "no PNG",
              report.passed() ? "passed" : "failed");
  return 0;
}
