// Errors a caller can cause. Every public function of Tessera reports a mistake by throwing Error; nothing prints
// or aborts.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <string_view>

namespace tessera {

// `argument()` names what was wrong ("q", "density", "indices"); what() is a full sentence with what came and what
// is allowed.
class Error : public std::runtime_error {
 public:
  Error(std::string argument, const std::string& message)
      : std::runtime_error(message), argument_(std::move(argument)) {}
  const std::string& argument() const noexcept { return argument_; }

  // The same error for callers who know the argument under another name ("k" as "k_cache").
  Error renamed(const std::string& argument) const {
    const std::string_view words = what();
    const bool named = words.starts_with(argument_ + ":");
    return Error(argument,
                 argument + (named ? std::string(words.substr(argument_.size())) : ": " + std::string(words)));
  }

 private:
  std::string argument_;
};

// Memory of a call (scratch, partial results, a cache, a tensor of a file) that cannot be had; argument() is "memory".
// What the standard library allocates fails as std::bad_alloc.
class OutOfMemory : public Error {
 public:
  OutOfMemory(size_t bytes, std::string_view what)
      : Error("memory", "memory: could not allocate " + std::to_string(bytes) + " bytes of " + std::string(what)) {}
};

// Throws Error("<argument>: got <got>; allowed: <allowed>"), or a kind of Error that callers tell apart.
template <class E = Error>
[[noreturn]] inline void fail(std::string_view argument, std::string_view got, std::string_view allowed) {
  std::string message(argument);
  message.append(": got ").append(got).append("; allowed: ").append(allowed);
  throw E(std::string(argument), message);
}

}  // namespace tessera
