// Images, text and the strokes that all pictures share.
#include "tessera/picture.h"

#include <algorithm>
#include <array>
#include <cmath>

#include <fmt/format.h>

#include "picture/canvas.h"
#include "picture/font.h"
#include "tessera/error.h"

namespace tessera {
namespace {

constexpr int kMaxSide = 32768;

const picture::Glyph& glyph_of(char c) {
  if (c < picture::kFirstGlyph || c > picture::kLastGlyph) return picture::kUnknownGlyph;
  return picture::kGlyphs[static_cast<size_t>(c - picture::kFirstGlyph)];
}

}  // namespace

Image::Image(int w, int h, Rgb background) : width(w), height(h) {
  if (w < 1 || h < 1 || w > kMaxSide || h > kMaxSide) {
    fail("image", fmt::format("{} x {} pixels", w, h), fmt::format("sides of 1 to {}", kMaxSide));
  }
  pixels.assign(static_cast<size_t>(w) * static_cast<size_t>(h), background);
}

int text_width(std::string_view text, int scale) {
  return text.empty() ? 0 : (static_cast<int>(text.size()) * (picture::kGlyphColumns + 1) - 1) * scale;
}

int text_height(int scale) { return picture::kGlyphRows * scale; }

void draw_text(Image& image, int x, int y, std::string_view text, Rgb color, int scale) {
  for (char c : text) {
    const picture::Glyph& glyph = glyph_of(c);
    for (int row = 0; row < picture::kGlyphRows; ++row) {
      for (int column = 0; column < picture::kGlyphColumns; ++column) {
        if (glyph[row] >> (picture::kGlyphColumns - 1 - column) & 1) {
          picture::fill(image, {x + column * scale, y + row * scale, scale, scale}, color);
        }
      }
    }
    x += (picture::kGlyphColumns + 1) * scale;
  }
}

Rgb viridis(double v) {
  // Every tenth of the published table, straight lines between them.
  static constexpr std::array<Rgb, 11> kStops{{{0x44, 0x01, 0x54},
                                               {0x48, 0x24, 0x75},
                                               {0x41, 0x44, 0x87},
                                               {0x35, 0x5f, 0x8d},
                                               {0x2a, 0x78, 0x8e},
                                               {0x21, 0x91, 0x8c},
                                               {0x22, 0xa8, 0x84},
                                               {0x44, 0xbf, 0x70},
                                               {0x7a, 0xd1, 0x51},
                                               {0xbd, 0xdf, 0x26},
                                               {0xfd, 0xe7, 0x25}}};
  if (!(v > 0)) return kStops.front();
  if (v >= 1) return kStops.back();
  const double at = v * (kStops.size() - 1);
  const auto i = static_cast<size_t>(at);
  return picture::mix(kStops[i], kStops[i + 1], at - static_cast<double>(i));
}

namespace picture {

Rgb mix(Rgb a, Rgb b, double share) {
  const double s = std::clamp(share, 0.0, 1.0);
  const auto channel = [s](uint8_t from, uint8_t to) {
    return static_cast<uint8_t>(std::lround(from + s * (to - from)));
  };
  return {channel(a.r, b.r), channel(a.g, b.g), channel(a.b, b.b)};
}

void fill(Image& image, Box box, Rgb color) {
  const int left = std::max(0, box.x), right = std::min(image.width, box.right());
  for (int y = std::max(0, box.y); y < std::min(image.height, box.bottom()); ++y) {
    for (int x = left; x < right; ++x) image.at(x, y) = color;
  }
}

void frame(Image& image, Box box, Rgb color) {
  fill(image, {box.x - 1, box.y - 1, box.width + 2, 1}, color);
  fill(image, {box.x - 1, box.bottom(), box.width + 2, 1}, color);
  fill(image, {box.x - 1, box.y - 1, 1, box.height + 2}, color);
  fill(image, {box.right(), box.y - 1, 1, box.height + 2}, color);
}

void paste(Image& image, int x, int y, const Image& part) {
  for (int row = 0; row < part.height; ++row) {
    for (int column = 0; column < part.width; ++column) {
      const int to_x = x + column, to_y = y + row;
      if (to_x >= 0 && to_y >= 0 && to_x < image.width && to_y < image.height) {
        image.at(to_x, to_y) = part.at(column, row);
      }
    }
  }
}

void stroke(Image& image, double x0, double y0, double x1, double y1, double width, Rgb color, double dash,
            double phase) {
  const double dx = x1 - x0, dy = y1 - y0, length = std::hypot(dx, dy), half = width / 2;
  // How far from the line, along a row, a pixel may still be covered.
  const double reach = std::abs(dy) > 1e-9 ? (half + 1) * length / std::abs(dy) + 1 : image.width;
  const int left = std::max(0, static_cast<int>(std::floor(std::min(x0, x1) - half - 1)));
  const int right = std::min(image.width - 1, static_cast<int>(std::ceil(std::max(x0, x1) + half + 1)));
  const int top = std::max(0, static_cast<int>(std::floor(std::min(y0, y1) - half - 1)));
  const int bottom = std::min(image.height - 1, static_cast<int>(std::ceil(std::max(y0, y1) + half + 1)));
  for (int y = top; y <= bottom; ++y) {
    const double middle = std::abs(dy) > 1e-9 ? x0 + (y + 0.5 - y0) * dx / dy : (x0 + x1) / 2;
    const int first = static_cast<int>(std::clamp<double>(middle - reach, left, right + 1));
    const int last = static_cast<int>(std::clamp<double>(middle + reach, left - 1, right));
    for (int x = first; x <= last; ++x) {
      const double px = x + 0.5 - x0, py = y + 0.5 - y0;
      const double along = length > 0 ? std::clamp((px * dx + py * dy) / length, 0.0, length) : 0;
      if (dash > 0 && std::fmod(phase + along, 2 * dash) >= dash) continue;
      const double nearest_x = length > 0 ? along * dx / length : 0, nearest_y = length > 0 ? along * dy / length : 0;
      const double coverage = half + 0.5 - std::hypot(px - nearest_x, py - nearest_y);
      if (coverage > 0) image.at(x, y) = mix(image.at(x, y), color, coverage);
    }
  }
}

void disc(Image& image, double x, double y, double radius, Rgb color) { stroke(image, x, y, x, y, 2 * radius, color); }

void text_centred(Image& image, int x, int y, std::string_view text, Rgb color) {
  draw_text(image, x - text_width(text, kTextScale) / 2, y, text, color, kTextScale);
}

void text_ended(Image& image, int x, int y, std::string_view text, Rgb color) {
  draw_text(image, x - text_width(text, kTextScale), y, text, color, kTextScale);
}

void text_upwards(Image& image, int x, int y_centre, std::string_view text, Rgb color) {
  if (text.empty()) return;
  const Rgb background{};
  Image line(text_width(text, kTextScale), text_height(kTextScale), background);
  draw_text(line, 0, 0, text, color, kTextScale);
  for (int row = 0; row < line.height; ++row) {
    for (int column = 0; column < line.width; ++column) {
      if (line.at(column, row) == background) continue;
      fill(image, {x + row, y_centre + line.width / 2 - column, 1, 1}, color);
    }
  }
}

std::string fitted(std::string_view text, int width) {
  size_t kept = std::min<size_t>(text.size(), std::max(width, 0));  // a character takes more than a pixel
  if (kept == text.size() && text_width(text, kTextScale) <= width) return std::string(text);
  while (kept > 0 && text_width(std::string(text.substr(0, kept)) + "..", kTextScale) > width) --kept;
  return kept > 0 ? std::string(text.substr(0, kept)) + ".." : "";
}

std::vector<Tick> linear_ticks(double min, double max, int at_most) {
  const double least = (max - min) / std::max(1, at_most);
  const double decade = std::pow(10, std::floor(std::log10(least)));
  double step = 10 * decade;
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (factor * decade >= least * (1 - 1e-9)) {
      step = factor * decade;
      break;
    }
  }
  std::vector<Tick> ticks;
  for (double n = std::ceil(min / step - 1e-9); n * step <= max + 1e-9 * step; ++n) {
    ticks.push_back({n * step, fmt::format("{:.6g}", n == 0 ? 0.0 : n * step)});
    if (ticks.size() > 100) break;  // a step lost in rounding
  }
  return ticks;
}

std::vector<Tick> log_ticks(double min, double max) {
  const bool between = std::log10(max / min) < 3;  // wider: powers of ten alone
  std::vector<Tick> ticks;
  for (double exponent = std::floor(std::log10(min)); exponent <= std::ceil(std::log10(max)); ++exponent) {
    for (const double factor : {1.0, 2.0, 5.0}) {
      const double value = factor * std::pow(10, exponent);
      if (factor > 1 && !between) continue;
      if (value < min * (1 - 1e-9) || value > max * (1 + 1e-9)) continue;
      ticks.push_back({value, fmt::format("{:.6g}", value)});
    }
  }
  return ticks;
}

std::vector<Tick> token_ticks(int64_t tokens, int at_most) {
  int64_t step = 1;
  while (tokens / step > std::max(1, at_most)) step *= 2;
  std::vector<Tick> ticks;
  for (int64_t t = 0; t <= tokens; t += step) {
    const bool kilo = tokens >= 16384 && t % 1024 == 0;
    ticks.push_back({static_cast<double>(t), t > 0 && kilo ? fmt::format("{}k", t / 1024) : std::to_string(t)});
  }
  return ticks;
}

}  // namespace picture
}  // namespace tessera
