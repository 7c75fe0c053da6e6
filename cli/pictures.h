// Pictures that analyze and demo share.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "tessera/analysis.h"
#include "tessera/picture.h"

namespace tessera::cli {

// A folder for results: said to be possible before minutes of work, made when there is something to put there.
void check_folder(const std::filesystem::path& folder);  // Error if it cannot be made or written into
void make_folder(const std::filesystem::path& folder);   // and its parents; Error likewise

// Attention mass per block of one head of batch 0, logarithmic.
Image draw_mass(const MassMap& mass, int64_t head, const std::string& title, int size = 512);

struct CurvePoint {
  std::string name;  // of the curve
  double density = 0, coverage = 0;
  std::optional<double> oracle_coverage;  // at the same budgets
};
// Coverage against density, a curve a name, and the oracle's dashed. Nothing if no curve has two points.
std::optional<Image> draw_quality_curves(const std::vector<CurvePoint>& points);

}  // namespace tessera::cli
