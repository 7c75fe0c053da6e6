// Names and checks of PatternSpec.
#include <fmt/format.h>

#include <array>
#include <cmath>
#include <string>

#include "pattern/geometry.h"
#include "pattern/row_builders.h"
#include "tessera/error.h"
#include "tessera/patterns.h"

namespace tessera {

namespace {

struct NamedKind {
  PatternKind kind;
  std::string_view name;
};
constexpr std::array kKinds = {
    NamedKind{PatternKind::dense, "dense"},
    NamedKind{PatternKind::causal, "causal"},
    NamedKind{PatternKind::local_window, "local_window"},
    NamedKind{PatternKind::dilated_sparse, "dilated_sparse"},
    NamedKind{PatternKind::global_local, "global_local"},
    NamedKind{PatternKind::strided, "strided"},
    NamedKind{PatternKind::random, "random"},
    NamedKind{PatternKind::bigbird, "bigbird"},
    NamedKind{PatternKind::dilated_segments, "dilated_segments"},
    NamedKind{PatternKind::hierarchical, "hierarchical"},
};

// Rates and segments cost time in every row; nobody has meant more than a handful.
constexpr size_t kMaxListLength = 256;
constexpr int64_t kMaxRanks = int64_t{1} << 20;

void check_density(std::string_view argument, const std::optional<double>& density, bool zero_allowed) {
  if (!density) return;
  const bool fits = zero_allowed ? *density >= 0 : *density > 0;
  if (!fits || !(*density <= 1)) {  // NaN fails both
    fail(argument, fmt::to_string(*density), zero_allowed ? "0 <= density <= 1" : "0 < density <= 1");
  }
}

void check_at_least(std::string_view argument, const std::optional<int64_t>& value, int64_t least) {
  if (value && *value < least) fail(argument, fmt::to_string(*value), fmt::format("at least {}", least));
}

void check_list(std::string_view argument, const std::vector<int64_t>& list) {
  if (list.size() > kMaxListLength) {
    fail(argument, fmt::format("{} values", list.size()), fmt::format("at most {}", kMaxListLength));
  }
  for (int64_t x : list) check_at_least(argument, x, 1);
}

}  // namespace

std::string_view name_of(PatternKind kind) {
  for (const NamedKind& k : kKinds) {
    if (k.kind == kind) return k.name;
  }
  fail("pattern", fmt::format("kind {}", static_cast<int>(kind)), "a PatternKind");
}

std::span<const PatternKind> all_pattern_kinds() {
  static constexpr auto kinds = [] {
    std::array<PatternKind, kKinds.size()> list{};
    for (size_t i = 0; i < kKinds.size(); ++i) list[i] = kKinds[i].kind;
    return list;
  }();
  return kinds;
}

PatternKind pattern_kind(std::string_view name) {
  std::string allowed;
  for (const NamedKind& k : kKinds) {
    if (k.name == name) return k.kind;
    allowed.append(allowed.empty() ? "" : ", ").append(k.name);
  }
  fail("pattern", fmt::format("\"{}\"", name), allowed);
}

std::string_view name_of(Budget budget) {
  switch (budget) {
    case Budget::even: return "even";
    case Budget::proportional: return "proportional";
  }
  fail("budget", fmt::to_string(static_cast<int>(budget)), "a Budget");
}

Budget budget_of_name(std::string_view name) {
  if (name == "even") return Budget::even;
  if (name == "proportional") return Budget::proportional;
  fail("budget", fmt::format("\"{}\"", name), "even, proportional");
}

void check_spec(const PatternSpec& spec) {
  using enum PatternKind;
  const std::string_view kind = name_of(spec.kind);

  const auto takes = [&](std::string_view argument, bool given, std::initializer_list<PatternKind> takers) {
    if (!given) return;
    std::string names;
    for (PatternKind k : takers) {
      if (k == spec.kind) return;
      names.append(names.empty() ? "" : ", ").append(name_of(k));
    }
    fail(argument, fmt::format("a value for pattern {}", kind), fmt::format("only with {}", names));
  };
  takes("density", spec.density.has_value(),
        {local_window, dilated_sparse, global_local, strided, random, bigbird, hierarchical});
  takes("window", spec.window.has_value(), {local_window, global_local, bigbird});
  takes("dilation_rates", !spec.dilation_rates.empty(), {dilated_sparse, dilated_segments});
  takes("segment_lengths", !spec.segment_lengths.empty(), {dilated_segments});
  takes("global_tokens", spec.global_tokens.has_value(), {global_local, bigbird});
  takes("stride", spec.stride.has_value(), {strided});
  takes("ranks", spec.ranks != 1, {hierarchical});
  takes("ranks_per_node", spec.ranks_per_node != 1, {hierarchical});
  takes("local_density", spec.local_density.has_value(), {hierarchical});
  takes("global_density", spec.global_density.has_value(), {hierarchical});
  takes("inter_node_density", spec.inter_node_density.has_value(), {hierarchical});

  const auto needs = [&](std::string_view argument, bool given, std::string_view what) {
    if (!given) fail(argument, fmt::format("none for pattern {}", kind), what);
  };
  switch (spec.kind) {
    case dense:
    case causal: break;
    case local_window:
    case global_local: needs("window", spec.window || spec.density, "window (tokens) or density"); break;
    case dilated_sparse:
    case random:
    case bigbird: needs("density", spec.density.has_value(), "0 < density <= 1"); break;
    case strided: needs("stride", spec.stride || spec.density, "stride (blocks) or density"); break;
    case dilated_segments:
      needs("segment_lengths", !spec.segment_lengths.empty(), "at least one length in tokens");
      needs("dilation_rates", !spec.dilation_rates.empty(), "one for each of segment_lengths");
      if (spec.segment_lengths.size() != spec.dilation_rates.size()) {
        fail("dilation_rates", fmt::format("{} values", spec.dilation_rates.size()),
             fmt::format("{}, one for each of segment_lengths", spec.segment_lengths.size()));
      }
      break;
    case hierarchical:
      needs("local_density", spec.local_density || spec.density, "local_density, or density for all parts");
      needs("global_density", spec.global_density || spec.density, "global_density, or density for all parts");
      needs("inter_node_density", spec.inter_node_density || spec.density,
            "inter_node_density, or density for all parts");
      break;
  }

  name_of(spec.budget);
  check_density("density", spec.density, false);
  check_density("local_density", spec.local_density, false);
  check_density("global_density", spec.global_density, true);
  check_density("inter_node_density", spec.inter_node_density, true);
  check_at_least("window", spec.window, 1);
  check_at_least("global_tokens", spec.global_tokens, 0);
  check_at_least("stride", spec.stride, 1);
  check_list("dilation_rates", spec.dilation_rates);
  check_list("segment_lengths", spec.segment_lengths);
  check_at_least("ranks", spec.ranks, 1);
  if (spec.ranks > kMaxRanks) fail("ranks", fmt::to_string(spec.ranks), "at most 2^20");
  check_at_least("ranks_per_node", spec.ranks_per_node, 1);
}

}  // namespace tessera
