#include "pictures.h"

#include <algorithm>
#include <limits>
#include <map>
#include <span>
#include <vector>

#include <fmt/format.h>
#include <unistd.h>

#include "tessera/error.h"

namespace tessera::cli {

void check_folder(const std::filesystem::path& folder) {
  std::error_code error;
  std::filesystem::path place = std::filesystem::absolute(folder, error);
  while (!std::filesystem::exists(place, error) && place.has_relative_path()) place = place.parent_path();
  if (!std::filesystem::is_directory(place, error)) {
    fail("output folder", fmt::format("{} ({} is no folder)", folder.string(), place.string()),
         "a folder that can be made");
  }
  if (access(place.c_str(), W_OK | X_OK) != 0) {
    fail("output folder", fmt::format("{} (no permission to write into {})", folder.string(), place.string()),
         "a folder that can be written into");
  }
}

void make_folder(const std::filesystem::path& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) {
    fail("output folder", fmt::format("{} ({})", folder.string(), error.message()), "a folder that can be made");
  }
  if (access(folder.c_str(), W_OK | X_OK) != 0) {
    fail("output folder", folder.string() + " (no permission to write)", "a folder that can be written into");
  }
}

Image draw_mass(const MassMap& mass, int64_t head, const std::string& title, int size) {
  const PatternShape& s = mass.shape;
  HeatMapPicture options;
  options.title = title;
  options.seqlen_q = s.seqlen_q;
  options.seqlen_k = s.seqlen_k;
  options.value_label = "share of a row's attention";
  options.min = 1e-4;
  options.max = 1;
  options.log_scale = true;
  options.size = size;
  // Blocks that no query may see (the future) are not those that have no mass: they get no colour.
  const std::span<const float> values = mass.head(0, head);
  std::vector<float> shown(values.begin(), values.end());
  for (int64_t i = 0; i < s.rows(); ++i) {
    const auto row = shown.begin() + i * s.cols();
    std::fill(row, row + mass.first[i], std::numeric_limits<float>::quiet_NaN());
    std::fill(row + mass.last[i], row + s.cols(), std::numeric_limits<float>::quiet_NaN());
  }
  return draw_heat_map(shown, s.rows(), s.cols(), options);
}

std::optional<Image> draw_quality_curves(const std::vector<CurvePoint>& points) {
  std::vector<Series> series;
  std::map<double, double> oracle;
  for (const CurvePoint& p : points) {
    auto it = std::ranges::find(series, p.name, &Series::name);
    if (it == series.end()) it = series.insert(series.end(), Series{p.name, {}, {}, false});
    it->x.push_back(p.density);
    it->y.push_back(p.coverage);
    // Patterns of uneven rows have the same density with other budgets: the best of them bounds.
    if (p.oracle_coverage) oracle[p.density] = std::max(oracle[p.density], *p.oracle_coverage);
  }
  bool any = false;
  for (Series& s : series) {
    any |= s.x.size() > 1;
    std::vector<std::pair<double, double>> sorted;
    for (size_t i = 0; i < s.x.size(); ++i) sorted.emplace_back(s.x[i], s.y[i]);
    std::ranges::sort(sorted);
    for (size_t i = 0; i < sorted.size(); ++i) std::tie(s.x[i], s.y[i]) = sorted[i];
  }
  if (!any) return std::nullopt;
  if (!oracle.empty()) {
    Series best{"best possible", {}, {}, true};
    for (const auto& [density, coverage] : oracle) {
      best.x.push_back(density);
      best.y.push_back(coverage);
    }
    series.push_back(std::move(best));
  }
  constexpr size_t kMostSeries = 12;
  if (series.size() > kMostSeries) series.resize(kMostSeries);
  LinePicture options;
  options.title = "attention mass kept";
  options.x_label = "density (share of block pairs kept)";
  options.y_label = "coverage";
  options.log_x = true;
  options.y_min = 0;
  options.y_max = 1;
  return draw_lines(series, options);
}

}  // namespace tessera::cli
