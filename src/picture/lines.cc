// Line plots.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include <fmt/format.h>

#include "picture/canvas.h"
#include "tessera/error.h"
#include "tessera/picture.h"

namespace tessera {
namespace {

using picture::Box;
using picture::kPadding;
using picture::kTextScale;
using picture::kTick;

// Okabe and Ito's colours (told apart by colour-blind readers; yellow left out on white), then darker ones.
constexpr std::array<Rgb, 12> kColors{{{0x00, 0x72, 0xb2},
                                       {0xd5, 0x5e, 0x00},
                                       {0x00, 0x9e, 0x73},
                                       {0xcc, 0x79, 0xa7},
                                       {0xe6, 0x9f, 0x00},
                                       {0x56, 0xb4, 0xe9},
                                       {0x44, 0x44, 0x44},
                                       {0x7a, 0x3e, 0x9d},
                                       {0x8c, 0x56, 0x4b},
                                       {0x5f, 0x8a, 0x1f},
                                       {0xb2, 0x18, 0x2b},
                                       {0x1b, 0x3a, 0x6b}}};
constexpr double kLineWidth = 2.4, kMarkerRadius = 4.0, kDash = 7.0;
constexpr int kSample = 28;   // length of a line in the legend
constexpr int kLabelGap = 6;  // pixels between tick labels

struct Scale {
  double low = 0, high = 1;
  bool log = false;

  double share(double v) const { return log ? std::log(v / low) / std::log(high / low) : (v - low) / (high - low); }
  void include(double v) {
    low = std::min(low, v);
    high = std::max(high, v);
  }
  // A little room on both sides, and never an empty range.
  void widen(double share_of_range) {
    if (log) {
      const double factor = high > low ? std::pow(high / low, share_of_range) : 2;
      low /= factor;
      high *= factor;
    } else {
      const double room = high > low ? (high - low) * share_of_range : std::max(std::abs(high) * 0.1, 0.5);
      low -= room;
      high += room;
    }
  }
  std::vector<picture::Tick> ticks(int at_most) const {
    return log ? picture::log_ticks(low, high) : picture::linear_ticks(low, high, at_most);
  }
};

bool is_decade(double v) {
  const double exponent = std::log10(v);
  return std::abs(exponent - std::round(exponent)) < 1e-9;
}

// Quotients of two numbers on a log axis stay finite.
bool drawable(double v, bool log) { return log ? v >= 1e-100 && v <= 1e100 : std::isfinite(v); }

struct Point {
  double x, y;
};

// Of neighbours in one column of pixels the first, the lowest, the highest and the last: what the line covers there.
std::vector<Point> one_a_pixel(const std::vector<Point>& points) {
  std::vector<Point> kept;
  for (size_t begin = 0, end; begin < points.size(); begin = end) {
    const double column = std::floor(points[begin].x);
    size_t low = begin, high = begin;
    for (end = begin; end < points.size() && std::floor(points[end].x) == column; ++end) {
      if (points[end].y < points[low].y) low = end;
      if (points[end].y > points[high].y) high = end;
    }
    std::array<size_t, 4> some{begin, std::min(low, high), std::max(low, high), end - 1};
    for (size_t i = 0; i < some.size(); ++i) {
      if (i == 0 || some[i] != some[i - 1]) kept.push_back(points[some[i]]);
    }
  }
  return kept;
}

void check(std::span<const Series> series, const LinePicture& options) {
  if (options.width < 200 || options.width > 8192 || options.height < 200 || options.height > 8192) {
    fail("width", fmt::format("{} x {}", options.width, options.height), "200 to 8192 pixels a side");
  }
  if (series.size() > kColors.size()) {
    fail("series", std::to_string(series.size()), fmt::format("at most {}", kColors.size()));
  }
  for (const Series& s : series) {
    if (s.x.size() != s.y.size()) {
      fail("series", fmt::format("{} x and {} y", s.x.size(), s.y.size()), "as many x as y");
    }
    for (size_t i = 0; i < s.x.size(); ++i) {
      if (!drawable(s.x[i], options.log_x) || !drawable(s.y[i], options.log_y)) {
        fail("series", fmt::format("({}, {}) in \"{}\"", s.x[i], s.y[i], s.name),
             "finite numbers, on log axes 1e-100 to 1e100");
      }
    }
  }
  for (const std::optional<double>& bound : {options.y_min, options.y_max}) {
    if (bound && !drawable(*bound, options.log_y)) {
      fail("y_min", fmt::format("{}", *bound), "a finite number, on a log axis 1e-100 to 1e100");
    }
  }
}

}  // namespace

Image draw_lines(std::span<const Series> series, const LinePicture& options) {
  check(series, options);
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  Scale x{kInfinity, -kInfinity, options.log_x}, y{kInfinity, -kInfinity, options.log_y};
  for (const Series& s : series) {
    for (double v : s.x) x.include(v);
    for (double v : s.y) y.include(v);
  }
  if (x.low > x.high) x.low = x.high = y.low = y.high = 1;  // no points: empty axes
  x.widen(0.03);
  y.widen(0.05);
  y.low = options.y_min.value_or(y.low);
  y.high = options.y_max.value_or(y.high);
  if (!(y.high > y.low)) fail("y_min", fmt::format("{} to {}", y.low, y.high), "y_min below y_max");

  const int text = text_height(kTextScale);
  const std::vector<picture::Tick> x_ticks = x.ticks(std::max(2, options.width / 110));
  const std::vector<picture::Tick> y_ticks = y.ticks(std::max(2, options.height / 60));
  int label_width = 0, legend_width = 0;
  for (const picture::Tick& tick : y_ticks) label_width = std::max(label_width, text_width(tick.label, kTextScale));
  const int legend_most = options.width * 2 / 5;
  for (const Series& s : series) {
    if (!s.name.empty()) {
      const std::string name = picture::fitted(s.name, legend_most);
      legend_width = std::max(legend_width, std::min(legend_most, kSample + 8 + text_width(name, kTextScale)));
    }
  }
  Image image(options.width, options.height);
  Box plot;
  plot.x = kPadding + (options.y_label.empty() ? 0 : text + 8) + label_width + kTick + 5;
  plot.y = kPadding + (options.title.empty() ? 0 : text + 12);
  plot.width = options.width - kPadding - (legend_width > 0 ? legend_width + kPadding : 8) - plot.x;
  plot.height = options.height - kPadding - (options.x_label.empty() ? 0 : text + 8) - text - kTick - 4 - plot.y;
  if (plot.width < 60 || plot.height < 60) {
    fail("width", fmt::format("{} x {}", options.width, options.height),
         "more: labels and legend leave no room to plot");
  }
  const auto to_x = [&](double v) { return plot.x + x.share(v) * (plot.width - 1) + 0.5; };
  const auto to_y = [&](double v) { return plot.bottom() - 0.5 - y.share(v) * (plot.height - 1); };

  picture::text_centred(image, options.width / 2, kPadding,
                        picture::fitted(options.title, options.width - 2 * kPadding));
  for (const picture::Tick& tick : x_ticks) {
    const int at = static_cast<int>(to_x(tick.value));
    picture::fill(image, {at, plot.y, 1, plot.height}, picture::kGrid);
    picture::fill(image, {at, plot.bottom() + 1, 1, kTick}, picture::kFrame);
  }
  // Labels of log axes crowd: powers of ten first, then what still finds room.
  std::vector<std::pair<int, int>> taken;
  for (const bool decades : {true, false}) {
    for (const picture::Tick& tick : x_ticks) {
      if (options.log_x && is_decade(tick.value) != decades) continue;
      const int at = static_cast<int>(to_x(tick.value)), half = text_width(tick.label, kTextScale) / 2;
      const bool free = std::all_of(taken.begin(), taken.end(), [&](const std::pair<int, int>& other) {
        return at - half >= other.second + kLabelGap || at + half + kLabelGap <= other.first;
      });
      if (!free || at + half > options.width - 2) continue;
      picture::text_centred(image, at, plot.bottom() + kTick + 5, tick.label, picture::kFaint);
      taken.emplace_back(at - half, at + half);
    }
  }
  int last_y = std::numeric_limits<int>::max();
  for (const picture::Tick& tick : y_ticks) {
    const int at = static_cast<int>(to_y(tick.value));
    picture::fill(image, {plot.x, at, plot.width, 1}, picture::kGrid);
    picture::fill(image, {plot.x - 1 - kTick, at, kTick, 1}, picture::kFrame);
    if (last_y - at < text) continue;
    picture::text_ended(image, plot.x - kTick - 5, at - text / 2 + kTextScale, tick.label, picture::kFaint);
    last_y = at;
  }
  picture::frame(image, plot, picture::kFrame);
  picture::text_centred(image, plot.x + plot.width / 2, options.height - kPadding - text + 4,
                        picture::fitted(options.x_label, plot.width));
  picture::text_upwards(image, kPadding - 4, plot.y + plot.height / 2, picture::fitted(options.y_label, plot.height));

  Image clipped = image;  // curves are clipped to the plot by drawing beside and copying the plot's part
  for (size_t n = 0; n < series.size(); ++n) {
    const Series& s = series[n];
    double phase = 0;
    // Far outside the plot a stroke has nothing to draw but would take its time.
    const auto near = [&](double v) { return std::clamp(v, -4.0 * options.height, 5.0 * options.height); };
    std::vector<Point> points;
    points.reserve(s.x.size());
    for (size_t i = 0; i < s.x.size(); ++i) points.push_back({to_x(s.x[i]), near(to_y(s.y[i]))});
    points = one_a_pixel(points);
    const Point* marked = nullptr;
    for (size_t i = 0; i < points.size(); ++i) {
      const Point& to = points[i];
      if (i > 0) {
        const Point& from = points[i - 1];
        picture::stroke(clipped, from.x, from.y, to.x, to.y, kLineWidth, kColors[n], s.dashed ? kDash : 0, phase);
        phase += std::hypot(to.x - from.x, to.y - from.y);
      }
      if (s.dashed || (marked != nullptr && std::hypot(to.x - marked->x, to.y - marked->y) < 1)) continue;
      picture::disc(clipped, to.x, to.y, kMarkerRadius, kColors[n]);
      marked = &to;
    }
  }
  for (int py = plot.y; py < plot.bottom(); ++py) {
    for (int px = plot.x; px < plot.right(); ++px) image.at(px, py) = clipped.at(px, py);
  }

  int legend_y = plot.y + 2;
  for (size_t n = 0; n < series.size(); ++n) {
    if (series[n].name.empty()) continue;
    const int at = plot.right() + kPadding;
    const double middle = legend_y + text / 2.0 - kTextScale;
    picture::stroke(image, at, middle, at + kSample, middle, kLineWidth, kColors[n], series[n].dashed ? kDash : 0);
    if (!series[n].dashed) picture::disc(image, at + kSample / 2.0, middle, kMarkerRadius, kColors[n]);
    draw_text(image, at + kSample + 8, legend_y, picture::fitted(series[n].name, legend_width - kSample - 8),
              picture::kInk, kTextScale);
    legend_y += text + 8;
  }
  return image;
}

}  // namespace tessera
