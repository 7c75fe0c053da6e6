// Pictures: patterns, attention mass, comparison sheets and curves, as RGB images and PNG files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tessera/block_pattern.h"

namespace tessera {

struct Rgb {
  uint8_t r = 255, g = 255, b = 255;
  bool operator==(const Rgb&) const = default;
};

// Row-major pixels, [height, width].
struct Image {
  int width = 0, height = 0;
  std::vector<Rgb> pixels;

  Image() = default;
  Image(int width, int height, Rgb background = {});  // Error beyond 1 <= side <= 32768
  Rgb& at(int x, int y) { return pixels[static_cast<size_t>(y) * width + x]; }
  Rgb at(int x, int y) const { return pixels[static_cast<size_t>(y) * width + x]; }
};

std::vector<std::byte> encode_png(const Image& image);
void write_png(const std::string& path, const Image& image);  // written beside and renamed

// Printable ASCII in a 5x7 font, cells of 6x9 pixels times `scale`; other characters show as a box. Clips at the edges.
int text_width(std::string_view text, int scale = 2);
int text_height(int scale = 2);
void draw_text(Image& image, int x, int y, std::string_view text, Rgb color = {0, 0, 0}, int scale = 2);

// v in [0, 1] (clamped; NaN: 0) to the colours of matplotlib's viridis (van der Walt and Smith 2015), dark to bright.
Rgb viridis(double v);

struct PatternPicture {
  std::string title;
  int64_t batch = 0, head = 0;  // which one of the pattern's
  std::optional<bool> causal;   // shades what causality excludes, and marks the pairs it cuts as partial
  int size = 512;               // pixels of the longer side of the plot itself, 64..4096
  bool legend = true;
};
// Kept blocks full or partial, skipped blocks, tokens on the axes. Patterns with more blocks than pixels are averaged
// by area; the shade is then the square root of the kept share, so that 1 % can still be seen.
Image draw_pattern(const BlockPattern& pattern, const PatternPicture& options = {});

struct HeatMapPicture {
  std::string title;
  int64_t seqlen_q = 0, seqlen_k = 0;  // tokens on the axes; 0: numbers of rows and columns instead
  std::string value_label;             // under the colour bar: what a value is
  std::optional<double> min, max;      // of the colours; default: smallest (log: smallest above 0) and largest value
  bool log_scale = false;              // zero then takes the darkest colour
  int size = 512;                      // as above
};
// values [rows, cols], for instance attention mass per block (analysis.h). Values that are not finite show grey.
Image draw_heat_map(std::span<const float> values, int64_t rows, int64_t cols, const HeatMapPicture& options = {});

// Panels in a grid of `columns`, row by row, cells as large as the largest panel, a title above.
Image draw_sheet(std::span<const Image> panels, int columns, std::string_view title = {});

struct Series {
  std::string name;
  std::vector<double> x, y;  // the same number of points, finite; drawn in the order given
  bool dashed = false;       // for references and bounds
};

struct LinePicture {
  std::string title, x_label, y_label;
  bool log_x = false, log_y = false;  // x, y must then be positive
  std::optional<double> y_min, y_max;
  int width = 760, height = 520;  // of the whole picture, 200..8192
};
// Curves such as quality against density: lines with markers, ticks, grid and legend. At most 12 series.
Image draw_lines(std::span<const Series> series, const LinePicture& options = {});

}  // namespace tessera
