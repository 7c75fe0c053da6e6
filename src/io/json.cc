#include "io/json.h"

#include <set>
#include <vector>

#include <fmt/format.h>

#include "io/file.h"
#include "tessera/error.h"

namespace tessera::io {

using nlohmann::json;

json parse_json(std::string_view text, int max_depth) {
  std::vector<std::set<std::string>> keys;
  const auto watch = [&](int depth, json::parse_event_t event, json& parsed) {
    switch (event) {
      case json::parse_event_t::object_start:
      case json::parse_event_t::array_start:
        if (depth >= max_depth) fail("json", "deeper nesting", fmt::format("{} levels", max_depth));
        if (event == json::parse_event_t::object_start) keys.emplace_back();
        break;
      case json::parse_event_t::object_end: keys.pop_back(); break;
      case json::parse_event_t::key:
        if (!keys.back().insert(parsed.get_ref<const std::string&>()).second) {
          fail("json", "the key " + shown(parsed.get_ref<const std::string&>()) + " twice", "each key once");
        }
        break;
      default: break;
    }
    return true;
  };
  // The library takes a NUL for the end and would ignore what follows.
  const size_t nul = text.find('\0');
  if (nul != std::string_view::npos) fail("json", fmt::format("NUL, not JSON, at byte {}", nul), "JSON in UTF-8");
  try {
    return json::parse(text, watch);
  } catch (const json::parse_error& e) {
    // The library's text repeats the input; only where it stopped is of use.
    fail("json", fmt::format("something that is not JSON at byte {}", e.byte), "JSON in UTF-8");
  } catch (const json::exception&) {
    fail("json", "a number beyond the range of doubles", "JSON in UTF-8");
  }
}

std::string brief(const json& value) {
  switch (value.type()) {
    case json::value_t::array: return fmt::format("an array of {}", value.size());
    case json::value_t::object: return fmt::format("an object of {}", value.size());
    case json::value_t::string: return shown(value.get_ref<const std::string&>());
    case json::value_t::number_float: return fmt::format("{}", value.get<double>());
    default: return value.dump();
  }
}

int64_t integer(const json& value, const std::string& argument, int64_t min, int64_t max) {
  if (value.is_number_integer()) {  // true for unsigned, too
    const bool fits = !value.is_number_unsigned() || value.get<uint64_t>() <= static_cast<uint64_t>(INT64_MAX);
    if (fits && value.get<int64_t>() >= min && value.get<int64_t>() <= max) return value.get<int64_t>();
  }
  fail(argument, brief(value), fmt::format("an integer in {}..{}", min, max));
}

const json& array(const json& value, const std::string& argument) {
  if (!value.is_array()) fail(argument, brief(value), "an array");
  return value;
}

const json& object(const json& value, const std::string& argument) {
  if (!value.is_object()) fail(argument, brief(value), "an object");
  return value;
}

const json& member(const json& object, const char* key, const std::string& where) {
  const auto found = object.find(key);
  if (found == object.end()) fail(where, std::string("no \"") + key + "\"", std::string("a member \"") + key + "\"");
  return *found;
}

}  // namespace tessera::io
