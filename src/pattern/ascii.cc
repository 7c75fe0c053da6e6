#include <fmt/format.h>

#include <algorithm>
#include <string_view>
#include <vector>

#include "pattern/geometry.h"
#include "tessera/error.h"
#include "tessera/pattern_statistics.h"

namespace tessera {

std::string ascii(const BlockPattern& pattern, int64_t head, int64_t max_width, int64_t batch) {
  const BlockPatternView view = pattern.view();
  const PatternShape& shape = view.shape;
  const auto check_index = [](std::string_view name, int64_t index, int64_t size) {
    if (index < 0 || index >= size) fail(name, fmt::to_string(index), fmt::format("0..{}", size - 1));
  };
  check_index("head", head, shape.heads);
  check_index("batch", batch, shape.batches);
  if (max_width < 1) fail("max_width", fmt::to_string(max_width), "at least 1");

  const int64_t rows = shape.rows(), cols = shape.cols();
  if (rows == 0 || cols == 0) return {};
  const int64_t cell = cols <= max_width ? 1 : (cols - 1) / max_width + 1;  // block pairs a character, each way
  const int64_t width = ceil_div(cols, cell);
  constexpr std::string_view kShades = ".:-=+*#%@";
  constexpr int64_t kBetween = static_cast<int64_t>(kShades.size()) - 2;  // shades for "some but not all"

  std::string text;
  std::vector<int64_t> kept(width);
  for (int64_t top = 0; top < rows; top += cell) {
    const int64_t bottom = std::min(rows, top + cell);
    const size_t line = text.size();
    text.append(static_cast<size_t>(width), '.').push_back('\n');
    std::fill(kept.begin(), kept.end(), 0);
    for (int64_t i = top; i < bottom; ++i) {
      const int64_t r = view.row_id(batch, head, i);
      for (int64_t e = view.indptr[r]; e < view.indptr[r + 1]; ++e) {
        if (cell == 1) {
          text[line + view.indices[e]] = view.bitmap(e) ? '+' : '#';
        } else {
          ++kept[view.indices[e] / cell];
        }
      }
    }
    if (cell == 1) continue;
    for (int64_t c = 0; c < width; ++c) {
      const int64_t pairs = (bottom - top) * (std::min(cols, (c + 1) * cell) - c * cell);
      int64_t shade = 0;
      if (kept[c] == pairs) {
        shade = kBetween + 1;
      } else if (kept[c] > 0) {
        shade = 1 + kept[c] * kBetween / pairs;
      }
      text[line + c] = kShades[shade];
    }
  }
  return text;
}

}  // namespace tessera
