#include "io/json.h"

#include <algorithm>
#include <stdexcept>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "io/file.h"
#include "tessera/error.h"

namespace tessera::io {

namespace {

// Makes the tree from nlohmann's events.
class Builder : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit Builder(int max_depth) : max_depth_(max_depth) {}
  Json take() { return std::move(root_); }

  bool null() override { return add(Json()); }
  bool boolean(bool value) override { return add(Json(Json::Value(value))); }
  bool number_integer(int64_t value) override { return add_integer(value); }
  bool number_unsigned(uint64_t value) override {
    return value <= static_cast<uint64_t>(INT64_MAX) ? add_integer(static_cast<int64_t>(value)) : add(Json(value));
  }
  bool number_float(double value, const std::string&) override { return add(Json(Json::Value(value))); }
  bool string(std::string& value) override { return add(Json(std::make_unique<std::string>(std::move(value)))); }
  bool binary(nlohmann::json::binary_t&) override { return false; }  // no JSON text has any

  bool start_array(size_t) override {
    open();
    return true;
  }
  bool end_array() override {
    Frame frame = close();
    if (frame.items.empty()) return add(Json(std::make_unique<Json::Integers>(std::move(frame.integers))));
    return add(Json(std::make_unique<Json::Items>(std::move(frame.items))));
  }
  bool start_object(size_t) override {
    open().is_object = true;
    return true;
  }
  bool key(std::string& name) override {
    open_.back().members.emplace_back(std::move(name), Json());
    return true;
  }
  bool end_object() override {
    Frame frame = close();
    std::vector<std::string_view> names;
    for (const auto& [name, value] : frame.members) names.push_back(name);
    std::sort(names.begin(), names.end());
    const auto twice = std::adjacent_find(names.begin(), names.end());
    if (twice != names.end()) fail("json", "the key " + shown(*twice) + " twice", "each key once");
    return add(Json(std::make_unique<JsonMembers>(std::move(frame.members))));
  }

  bool parse_error(size_t position, const std::string&, const nlohmann::json::exception& error) override {
    // The library's text repeats the input; only where it stopped is of use. Error 406: out of range.
    if (error.id == 406) fail("json", "a number beyond the range of doubles", "JSON in UTF-8");
    fail("json", fmt::format("something that is not JSON at byte {}", position), "JSON in UTF-8");
  }

 private:
  // An array or object that is open.
  struct Frame {
    bool is_object = false;
    Json::Integers integers;  // of an array, while it holds nothing else
    Json::Items items;
    JsonMembers members;
  };

  Frame& open() {
    if (static_cast<int>(open_.size()) >= max_depth_) {
      fail("json", "deeper nesting", fmt::format("{} levels", max_depth_));
    }
    return open_.emplace_back();
  }
  Frame close() {
    Frame frame = std::move(open_.back());
    open_.pop_back();
    return frame;
  }

  bool add_integer(int64_t value) {
    if (open_.empty() || open_.back().is_object || !open_.back().items.empty()) return add(Json(Json::Value(value)));
    open_.back().integers.push_back(value);
    return true;
  }
  bool add(Json value) {
    if (open_.empty()) {
      root_ = std::move(value);
    } else if (Frame& frame = open_.back(); frame.is_object) {
      frame.members.back().second = std::move(value);
    } else {
      for (int64_t number : frame.integers) frame.items.emplace_back(Json::Value(number));
      frame.integers = {};
      frame.items.push_back(std::move(value));
    }
    return true;
  }

  const int max_depth_;
  std::vector<Frame> open_;
  Json root_;
};

}  // namespace

Json parse_json(std::string_view text, int max_depth) {
  // The library takes a NUL for the end and would ignore what follows.
  const size_t nul = text.find('\0');
  if (nul != std::string_view::npos) fail("json", fmt::format("NUL, not JSON, at byte {}", nul), "JSON in UTF-8");
  Builder builder(max_depth);
  if (!nlohmann::json::sax_parse(text, &builder)) fail("json", "something that is not JSON", "JSON in UTF-8");
  return builder.take();
}

const Json* Json::find(std::string_view key) const {
  if (members() == nullptr) return nullptr;
  for (const auto& [name, value] : *members()) {
    if (name == key) return &value;
  }
  return nullptr;
}

std::string Json::brief() const {
  if (integers()) return fmt::format("an array of {}", integers()->size());
  if (items()) return fmt::format("an array of {}", items()->size());
  if (members()) return fmt::format("an object of {}", members()->size());
  if (string()) return shown(*string());
  if (boolean()) return *boolean() ? "true" : "false";
  if (integer()) return fmt::format("{}", *integer());
  if (const auto* number = std::get_if<uint64_t>(&value_)) return fmt::format("{}", *number);
  if (const auto* number = std::get_if<double>(&value_)) return fmt::format("{}", *number);
  return "null";
}

int64_t check_integer(int64_t value, const std::string& argument, int64_t min, int64_t max) {
  if (value < min || value > max) {
    fail(argument, fmt::format("{}", value), fmt::format("an integer in {}..{}", min, max));
  }
  return value;
}

int64_t integer(const Json& value, const std::string& argument, int64_t min, int64_t max) {
  if (value.integer() == nullptr) fail(argument, value.brief(), fmt::format("an integer in {}..{}", min, max));
  return check_integer(*value.integer(), argument, min, max);
}

const Json::Integers& integers(const Json& value, const std::string& argument) {
  if (value.integers() != nullptr) return *value.integers();
  if (value.items() != nullptr) {
    for (const Json& item : *value.items()) {
      if (item.integer() == nullptr) fail(argument, item.brief(), "integers");
    }
  }
  fail(argument, value.brief(), "an array of integers");
}

const Json::Items& items(const Json& value, const std::string& argument) {
  static const Json::Items none;
  if (value.items() != nullptr) return *value.items();
  if (value.integers() == nullptr) fail(argument, value.brief(), "an array");
  if (!value.integers()->empty()) {
    fail(argument + "[0]", fmt::format("{}", value.integers()->front()), "an array or object");
  }
  return none;
}

const JsonMembers& object(const Json& value, const std::string& argument) {
  if (value.members() == nullptr) fail(argument, value.brief(), "an object");
  return *value.members();
}

const Json& member(const Json& object, const char* key, const std::string& where) {
  const Json* found = object.find(key);
  if (found == nullptr) fail(where, std::string("no \"") + key + "\"", std::string("a member \"") + key + "\"");
  return *found;
}

std::string quoted(std::string_view text) {
  try {
    return nlohmann::json(text).dump();
  } catch (const nlohmann::json::exception&) {
    throw std::invalid_argument("not UTF-8");
  }
}

}  // namespace tessera::io
