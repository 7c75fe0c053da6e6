// Pictures of things that lie over the blocks of the score matrix: patterns, heat maps, sheets of both.
#include <algorithm>
#include <cmath>
#include <limits>

#include <fmt/format.h>

#include "pattern/geometry.h"
#include "picture/canvas.h"
#include "tessera/error.h"
#include "tessera/patterns.h"
#include "tessera/picture.h"

namespace tessera {
namespace {

using picture::Box;
using picture::kPadding;
using picture::kTextScale;
using picture::kTick;

constexpr Rgb kFull{0x1d, 0x5c, 0x96};
constexpr Rgb kPartial{0xf0, 0x8c, 0x2e};
constexpr Rgb kSkipped{0xec, 0xef, 0xf3};
constexpr Rgb kExcluded{0xd3, 0xd7, 0xdd};
constexpr Rgb kNoNumber{0x9c, 0x9c, 0x9c};
constexpr int kSwatch = 14;
constexpr int kLegendGap = 12;  // between entries
constexpr int kColourBar = 22;  // pixels wide
constexpr int kPixelsPerTick = 72;

int line_height() { return text_height(kTextScale) + 6; }

void check_size(int size) {
  if (size < 64 || size > 4096) fail("size", std::to_string(size), "64 to 4096 pixels");
}

// Blocks to pixels along one axis: whole pixels a block where there are enough, else blocks share pixels.
struct Axis {
  int64_t blocks = 0;
  int64_t tokens = 0;
  double block = 1;  // tokens a block
  int pixels = 1;

  double pixel_of_block(double b) const { return b * pixels / static_cast<double>(blocks); }
  double pixel_of_token(double t) const { return pixel_of_block(t / block); }
};

// Both axes at one scale (pixels a token), the longer one `size` pixels or a little less.
void scale_axes(Axis& x, Axis& y, int size) {
  const double extent_x = static_cast<double>(x.blocks) * x.block, extent_y = static_cast<double>(y.blocks) * y.block;
  const double scale = size / std::max({extent_x, extent_y, 1.0});
  for (Axis* axis : {&x, &y}) {
    const double per_block = scale * axis->block;
    const double exact = per_block * static_cast<double>(axis->blocks);
    // Rounding down keeps blocks equal, but two axes of unlike blocks must not lose their proportion: 3 pixels or more.
    const bool whole = per_block >= 3 || (per_block >= 1 && x.block == y.block);
    axis->pixels = static_cast<int>(whole ? std::floor(per_block) * static_cast<double>(axis->blocks) : exact);
    axis->pixels = std::clamp(axis->pixels, 1, size);
    axis->blocks = std::max<int64_t>(axis->blocks, 1);
  }
}

// Weight per pixel, [height, width]: what share of the pixel's area the blocks put there cover.
class Coverage {
 public:
  Coverage(const Axis& x, const Axis& y)
      : x_(x), y_(y), weight_(static_cast<size_t>(x.pixels) * static_cast<size_t>(y.pixels), 0.0f) {}

  void add(int64_t row, int64_t column, float value = 1.0f) {
    const double top = y_.pixel_of_block(static_cast<double>(row));
    const double bottom = y_.pixel_of_block(static_cast<double>(row + 1));
    const double left = x_.pixel_of_block(static_cast<double>(column));
    const double right = x_.pixel_of_block(static_cast<double>(column + 1));
    for (int py = static_cast<int>(top); py < std::min<double>(std::ceil(bottom), y_.pixels); ++py) {
      const double height = std::min<double>(bottom, py + 1) - std::max<double>(top, py);
      for (int px = static_cast<int>(left); px < std::min<double>(std::ceil(right), x_.pixels); ++px) {
        const double width = std::min<double>(right, px + 1) - std::max<double>(left, px);
        weight_[static_cast<size_t>(py) * static_cast<size_t>(x_.pixels) + static_cast<size_t>(px)] +=
            value * static_cast<float>(width * height);
      }
    }
  }
  float at(int px, int py) const {
    return weight_[static_cast<size_t>(py) * static_cast<size_t>(x_.pixels) + static_cast<size_t>(px)];
  }

 private:
  Axis x_, y_;
  std::vector<float> weight_;
};

// Margins around a plot of the two axes: title and subtitle above, labels left and below.
struct Frame {
  Image image;
  Box plot;
};

Frame make_frame(const Axis& x, const Axis& y, const std::string& title, const std::string& subtitle, int room_right,
                 int room_below, const char* unit) {
  const int least_across = 3 * kPixelsPerTick;
  const auto x_ticks = picture::token_ticks(x.tokens, std::max(1, std::min(x.pixels / kPixelsPerTick, 8)));
  const auto y_ticks = picture::token_ticks(y.tokens, std::max(1, std::min(y.pixels / 40, 8)));
  int label_width = 0;
  for (const picture::Tick& tick : y_ticks) label_width = std::max(label_width, text_width(tick.label));
  const int last_label = x_ticks.empty() ? 0 : text_width(x_ticks.back().label) / 2;

  Frame f;
  f.plot.x = kPadding + text_height() + 8 + label_width + kTick + 4;
  f.plot.y = kPadding + (title.empty() ? 0 : line_height()) + (subtitle.empty() ? 0 : line_height()) + 4;
  f.plot.width = x.pixels;
  f.plot.height = y.pixels;
  const int width = f.plot.x + std::max(x.pixels, least_across) + std::max(room_right, last_label) + kPadding;
  const int height = f.plot.bottom() + kTick + 4 + 2 * line_height() + room_below + kPadding;
  f.image = Image(width, height);

  int text_y = kPadding;
  if (!title.empty()) {
    draw_text(f.image, f.plot.x, text_y, picture::fitted(title, width - f.plot.x - kPadding), picture::kInk);
    text_y += line_height();
  }
  if (!subtitle.empty()) {
    draw_text(f.image, f.plot.x, text_y, picture::fitted(subtitle, width - f.plot.x - kPadding), picture::kFaint);
  }
  for (const picture::Tick& tick : x_ticks) {
    const int at = f.plot.x + static_cast<int>(std::lround(x.pixel_of_token(tick.value)));
    picture::fill(f.image, {at, f.plot.bottom() + 1, 1, kTick}, picture::kFrame);
    picture::text_centred(f.image, at, f.plot.bottom() + kTick + 4, tick.label, picture::kFaint);
  }
  for (const picture::Tick& tick : y_ticks) {
    const int at = f.plot.y + static_cast<int>(std::lround(y.pixel_of_token(tick.value)));
    picture::fill(f.image, {f.plot.x - 1 - kTick, at, kTick, 1}, picture::kFrame);
    picture::text_ended(f.image, f.plot.x - kTick - 5, at - text_height() / 2 + kTextScale, tick.label,
                        picture::kFaint);
  }
  const std::string keys = fmt::format("key {}", unit), queries = fmt::format("query {}", unit);
  picture::text_centred(f.image, f.plot.x + std::max(x.pixels, text_width(keys)) / 2,
                        f.plot.bottom() + kTick + 4 + line_height(), keys);
  picture::text_upwards(f.image, kPadding, f.plot.y + std::max(y.pixels, text_width(queries)) / 2, queries);
  return f;
}

// Separators where blocks are large enough to be counted.
void draw_cell_lines(Image& image, const Axis& x, const Axis& y, const Box& plot) {
  constexpr int kLeastCell = 7;
  if (x.pixels / x.blocks < kLeastCell || y.pixels / y.blocks < kLeastCell) return;
  for (int64_t j = 1; j < x.blocks; ++j) {
    const int at = plot.x + static_cast<int>(x.pixel_of_block(static_cast<double>(j)));
    picture::fill(image, {at, plot.y, 1, plot.height}, {});
  }
  for (int64_t i = 1; i < y.blocks; ++i) {
    const int at = plot.y + static_cast<int>(y.pixel_of_block(static_cast<double>(i)));
    picture::fill(image, {plot.x, at, plot.width, 1}, {});
  }
}

struct LegendEntry {
  const char* name;
  Rgb color;
};

// Number of lines that the entries take at this width, drawing them if an image is given.
int draw_legend(std::span<const LegendEntry> entries, int x, int y, int width, Image* image) {
  int at = x, lines = 1;
  for (const LegendEntry& entry : entries) {
    const int wide = kSwatch + 6 + text_width(entry.name) + kLegendGap;
    if (at > x && at + wide - kLegendGap > x + width) {
      at = x;
      ++lines;
    }
    if (image != nullptr) {
      const Box swatch{at, y + (lines - 1) * line_height(), kSwatch, kSwatch};
      picture::fill(*image, swatch, entry.color);
      picture::frame(*image, swatch, picture::kFrame);
      draw_text(*image, at + kSwatch + 6, swatch.y, entry.name, picture::kInk, kTextScale);
    }
    at += wide;
  }
  return lines;
}

}  // namespace

Image draw_pattern(const BlockPattern& pattern, const PatternPicture& options) {
  check_size(options.size);
  const PatternShape& shape = pattern.shape();
  if (options.batch < 0 || options.batch >= shape.batches) {
    fail("batch", std::to_string(options.batch), fmt::format("0 to {}", shape.batches - 1));
  }
  if (options.head < 0 || options.head >= shape.heads) {
    fail("head", std::to_string(options.head), fmt::format("0 to {}", shape.heads - 1));
  }
  const BlockPatternView view = pattern.view();
  Axis x{shape.cols(), shape.seqlen_k, static_cast<double>(shape.block_k), 1};
  Axis y{shape.rows(), shape.seqlen_q, static_cast<double>(shape.block_q), 1};
  scale_axes(x, y, options.size);
  const int64_t diagonal = shape.diagonal();  // query q sees keys up to q + diagonal
  const bool causal = resolve_causal(shape, options.causal);

  Coverage full(x, y), partial(x, y);
  int64_t kept = 0, admissible = 0;
  bool any_partial = false;
  for (int64_t i = 0; i < shape.rows(); ++i) {
    const int64_t first_query = shape.query_begin(i);
    admissible += admissible_cols(shape, causal, i);
    const int64_t row = view.row_id(options.batch, options.head, i);
    for (int64_t entry = view.indptr[row]; entry < view.indptr[row + 1]; ++entry) {
      const int64_t j = view.indices[entry];
      const int64_t block_end = std::min((j + 1) * shape.block_k, shape.seqlen_k);
      const bool cut = causal && block_end - 1 > first_query + diagonal;
      const bool is_partial = cut || view.bitmap(entry) != nullptr;
      any_partial |= is_partial;
      (is_partial ? partial : full).add(i, j);
      ++kept;
    }
  }

  const bool averaged = x.blocks > x.pixels || y.blocks > y.pixels;
  const std::string subtitle =
      fmt::format("{} of {} blocks, {:.3g} %", kept, admissible,
                  admissible > 0 ? 100.0 * static_cast<double>(kept) / static_cast<double>(admissible) : 0.0);
  std::vector<LegendEntry> legend{{"kept", kFull}};
  if (any_partial) legend.push_back({"partial", kPartial});
  legend.push_back({"skipped", kSkipped});
  if (causal) legend.push_back({"future", kExcluded});
  // Past the plot by what the right margin leaves anyway.
  const int legend_width = std::max(x.pixels, 3 * kPixelsPerTick) + kPadding;
  const int legend_lines = options.legend ? draw_legend(legend, 0, 0, legend_width, nullptr) : 0;
  const int legend_height = legend_lines > 0 ? 8 + legend_lines * line_height() : 0;
  Frame f = make_frame(x, y, options.title, subtitle, 0, legend_height, "tokens");

  for (int py = 0; py < y.pixels; ++py) {
    const double query = (py + 0.5) * static_cast<double>(y.blocks) / y.pixels;
    const int64_t last_query = shape.query_end(static_cast<int64_t>(query)) - 1;
    for (int px = 0; px < x.pixels; ++px) {
      const auto column = static_cast<int64_t>((px + 0.5) * static_cast<double>(x.blocks) / x.pixels);
      const bool excluded = causal && column * shape.block_k > last_query + diagonal;
      const float a = full.at(px, py), b = partial.at(px, py), both = a + b;
      Rgb color = excluded ? kExcluded : kSkipped;
      if (both > 0) {
        const Rgb kept_color = picture::mix(kFull, kPartial, b / both);
        color = picture::mix(color, kept_color, averaged ? std::sqrt(both) : both);
      }
      f.image.at(f.plot.x + px, f.plot.y + py) = color;
    }
  }
  draw_cell_lines(f.image, x, y, f.plot);
  picture::frame(f.image, f.plot, picture::kFrame);
  if (options.legend) {
    draw_legend(legend, f.plot.x, f.plot.bottom() + kTick + 4 + 2 * line_height() + 8, legend_width, &f.image);
  }
  return std::move(f.image);
}

Image draw_heat_map(std::span<const float> values, int64_t rows, int64_t cols, const HeatMapPicture& options) {
  check_size(options.size);
  if (rows < 1 || cols < 1 || rows > int64_t{1} << 31 || cols > int64_t{1} << 31 ||
      static_cast<uint64_t>(rows) * static_cast<uint64_t>(cols) != values.size()) {
    fail("values", fmt::format("{} values for {} x {}", values.size(), rows, cols),
         "rows * cols values, rows, cols >= 1");
  }
  if (options.seqlen_q < 0 || options.seqlen_k < 0) fail("seqlen", "a negative number", "tokens, or 0: none given");
  double low = std::numeric_limits<double>::infinity(), high = -low;
  for (float v : values) {
    if (!std::isfinite(v) || (options.log_scale && v <= 0)) continue;
    low = std::min<double>(low, v);
    high = std::max<double>(high, v);
  }
  if (low > high) low = options.log_scale ? 1e-3 : 0, high = 1;  // nothing to be seen: any scale does
  low = options.min.value_or(low);
  high = options.max.value_or(high);
  if (!std::isfinite(low) || !std::isfinite(high) || (options.log_scale && (low <= 0 || high <= 0))) {
    fail("min", fmt::format("{} to {}", low, high), options.log_scale ? "positive numbers" : "finite numbers");
  }
  if (!(high > low)) high = options.log_scale ? low * 10 : low + 1;
  const auto shade = [&](double v) {
    if (!options.log_scale) return (v - low) / (high - low);
    return v > 0 ? std::log(v / low) / std::log(high / low) : 0.0;
  };

  const bool tokens = options.seqlen_q > 0 && options.seqlen_k > 0;
  const auto axis = [&](int64_t blocks, int64_t seqlen) {
    const double block = tokens ? std::ceil(static_cast<double>(seqlen) / static_cast<double>(blocks)) : 1.0;
    return Axis{blocks, tokens ? seqlen : blocks, block, 1};
  };
  Axis x = axis(cols, options.seqlen_k), y = axis(rows, options.seqlen_q);
  scale_axes(x, y, options.size);
  Coverage sum(x, y), unknown(x, y);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      const float v = values[static_cast<size_t>(i * cols + j)];
      if (std::isfinite(v)) {
        sum.add(i, j, v);
      } else {
        unknown.add(i, j);
      }
    }
  }

  const std::vector<picture::Tick> ticks =
      options.log_scale ? picture::log_ticks(low, high) : picture::linear_ticks(low, high, std::max(2, y.pixels / 60));
  int label_width = 0;
  for (const picture::Tick& tick : ticks) label_width = std::max(label_width, text_width(tick.label));
  const int bar_at = kPadding + kColourBar + kTick + 4;
  const int label_at = bar_at + label_width + 8;
  const int room_right = label_at + (options.value_label.empty() ? 0 : text_height());
  Frame f = make_frame(x, y, options.title, {}, room_right, 0, tokens ? "tokens" : "blocks");
  for (int py = 0; py < y.pixels; ++py) {
    for (int px = 0; px < x.pixels; ++px) {
      const double known = 1.0 - unknown.at(px, py);
      f.image.at(f.plot.x + px, f.plot.y + py) = known < 0.5 ? kNoNumber : viridis(shade(sum.at(px, py) / known));
    }
  }
  picture::frame(f.image, f.plot, picture::kFrame);

  const Box bar{f.plot.right() + kPadding, f.plot.y, kColourBar, std::max(2, f.plot.height)};
  for (int py = 0; py < bar.height; ++py) {
    picture::fill(f.image, {bar.x, bar.bottom() - 1 - py, bar.width, 1}, viridis((py + 0.5) / bar.height));
  }
  picture::frame(f.image, bar, picture::kFrame);
  int last_y = std::numeric_limits<int>::max();
  for (const picture::Tick& tick : ticks) {
    const int at = bar.bottom() - 1 - static_cast<int>(std::lround(shade(tick.value) * (bar.height - 1)));
    if (last_y - at < text_height()) continue;  // log ticks crowd where the range is wide
    last_y = at;
    picture::fill(f.image, {bar.right() + 1, at, kTick, 1}, picture::kFrame);
    draw_text(f.image, bar.right() + kTick + 5, at - text_height() / 2 + kTextScale, tick.label, picture::kFaint,
              kTextScale);
  }
  picture::text_upwards(f.image, f.plot.right() + label_at,
                        bar.y + std::max(bar.height, text_width(options.value_label)) / 2, options.value_label);
  return std::move(f.image);
}

Image draw_sheet(std::span<const Image> panels, int columns, std::string_view title) {
  if (panels.empty()) fail("panels", "none", "at least one");
  if (columns < 1) fail("columns", std::to_string(columns), "at least 1");
  columns = std::min(columns, static_cast<int>(std::min<size_t>(panels.size(), 1 << 20)));
  int64_t cell_width = 1, cell_height = 1;
  for (const Image& panel : panels) {
    cell_width = std::max<int64_t>(cell_width, panel.width);
    cell_height = std::max<int64_t>(cell_height, panel.height);
  }
  const int64_t rows = (static_cast<int64_t>(panels.size()) + columns - 1) / columns;
  const int top = title.empty() ? 0 : kPadding + line_height();
  const int64_t width = std::min<int64_t>(cell_width * columns, std::numeric_limits<int>::max());
  const int64_t height = std::min<int64_t>(cell_height * rows + top, std::numeric_limits<int>::max());
  Image sheet(static_cast<int>(width), static_cast<int>(height));  // Error where that is too large
  if (!title.empty()) {
    picture::text_centred(sheet, sheet.width / 2, kPadding, picture::fitted(title, sheet.width - 2 * kPadding));
  }
  for (size_t i = 0; i < panels.size(); ++i) {
    const auto column = static_cast<int>(i) % columns, row = static_cast<int>(i) / columns;
    picture::paste(sheet, column * static_cast<int>(cell_width), top + row * static_cast<int>(cell_height), panels[i]);
  }
  return sheet;
}

}  // namespace tessera
