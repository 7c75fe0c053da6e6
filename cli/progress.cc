#include "progress.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include <fmt/format.h>
#include <unistd.h>

namespace tessera::cli {
namespace {

constexpr int kBar = 24;                                   // characters
constexpr auto kInterval = std::chrono::milliseconds(50);  // between two updates of the same line

void put(std::string_view text) {
  // A stderr that cannot be written is no reason to stop.
  (void)!std::fwrite(text.data(), 1, text.size(), stderr);
  std::fflush(stderr);
}

}  // namespace

Progress::Progress() : terminal_(isatty(STDERR_FILENO) == 1) {
  const char *term = std::getenv("TERM"), *no_color = std::getenv("NO_COLOR");
  plain_ = (term != nullptr && std::string_view(term) == "dumb") || (no_color != nullptr && *no_color != 0);
}

void Progress::show(std::string_view what, double fraction) {
  if (!terminal_) return;
  if (plain_) {
    if (what != shown_) put(fmt::format("tessera: {}\n", what));
    shown_ = what;
    return;
  }
  const auto now = std::chrono::steady_clock::now();
  if (visible_ && what == shown_ && fraction < 1 && now - last_ < kInterval) return;
  last_ = now;
  shown_ = what;
  visible_ = true;
  std::string line = "\r\033[K";
  if (fraction >= 0) {
    const int filled = static_cast<int>(std::clamp(fraction, 0.0, 1.0) * kBar + 0.5);
    line += fmt::format("[{:#>{}}{:.>{}}] {:3.0f} %  ", "", filled, "", kBar - filled, 100 * std::min(fraction, 1.0));
  }
  put(line.append(what.substr(0, 60)));
}

void Progress::clear() {
  if (visible_) put("\r\033[K");
  visible_ = false;
}

void complain(std::string_view message) { put(fmt::format("tessera: {}\n", message)); }

}  // namespace tessera::cli
