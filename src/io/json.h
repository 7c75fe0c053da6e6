// Strict JSON: depth limit, no duplicate keys, integers only where integers are meant.
//
// The parser is nlohmann's; the tree is our own. Theirs allocates when it is destroyed, and so ends the process where
// memory is short. This one takes 16 bytes a value, 8 an integer in an array of integers, and its destruction takes
// nothing.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace tessera::io {

class Json;
using JsonMembers = std::vector<std::pair<std::string, Json>>;  // in the order of the text

class Json {
 public:
  struct Null {};
  using Integers = std::vector<int64_t>;  // an array of nothing but integers that fit; also the empty array
  using Items = std::vector<Json>;        // any other array
  template <class T>
  using Box = std::unique_ptr<T>;
  using Value = std::variant<Null, bool, int64_t, uint64_t, double, Box<std::string>, Box<Integers>, Box<Items>,
                             Box<JsonMembers>>;  // uint64_t: an integer beyond int64_t

  Json() = default;
  explicit Json(Value value) : value_(std::move(value)) {}

  const bool* boolean() const { return std::get_if<bool>(&value_); }
  const int64_t* integer() const { return std::get_if<int64_t>(&value_); }
  const std::string* string() const { return boxed<std::string>(); }
  const Integers* integers() const { return boxed<Integers>(); }
  const Items* items() const { return boxed<Items>(); }
  const JsonMembers* members() const { return boxed<JsonMembers>(); }
  const Json* find(std::string_view key) const;  // a member of an object, nullptr without one

  // A few characters that say what it is.
  std::string brief() const;

 private:
  template <class T>
  const T* boxed() const {
    const Box<T>* box = std::get_if<Box<T>>(&value_);
    return box == nullptr ? nullptr : box->get();
  }
  Value value_;
};

// Throws Error("json", ...) with the byte where parsing stopped. max_depth 1 allows one array or object.
Json parse_json(std::string_view text, int max_depth);

// An integer in [min, max], else Error(argument).
int64_t integer(const Json& value, const std::string& argument, int64_t min, int64_t max);
int64_t check_integer(int64_t value, const std::string& argument, int64_t min, int64_t max);

// The numbers of an array of integers, the items of any other array, the members of an object, else Error(argument). An
// empty array is both kinds.
const Json::Integers& integers(const Json& value, const std::string& argument);
const Json::Items& items(const Json& value, const std::string& argument);
const JsonMembers& object(const Json& value, const std::string& argument);

// The member, else Error.
const Json& member(const Json& object, const char* key, const std::string& where);

// Text in quotes, as JSON writes it. Throws std::invalid_argument where it is not UTF-8.
std::string quoted(std::string_view text);

}  // namespace tessera::io
