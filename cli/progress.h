// Progress on stderr: a bar where stderr is a terminal, nothing elsewhere. Where TERM=dumb or NO_COLOR ask for no
// escapes, each step is a line of its own.
#pragma once

#include <chrono>
#include <string>
#include <string_view>

namespace tessera::cli {

class Progress {
 public:
  Progress();
  ~Progress() { clear(); }
  // What is being done, and how much of it is done (0..1; negative: unknown).
  void show(std::string_view what, double fraction = -1);
  void clear();  // wipes the line: before anything else is printed

 private:
  bool terminal_, plain_;
  bool visible_ = false;
  std::string shown_;
  std::chrono::steady_clock::time_point last_{};
};

// One line on stderr, whatever state stderr is in.
void complain(std::string_view message);

}  // namespace tessera::cli
