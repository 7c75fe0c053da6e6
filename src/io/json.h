// Strict JSON: depth limit, no duplicate keys, integers only where integers are meant.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

namespace tessera::io {

// Throws Error("json", ...) with the byte where parsing stopped. max_depth 1 allows one array or object.
nlohmann::json parse_json(std::string_view text, int max_depth);

// An integer in [min, max], else Error(argument).
int64_t integer(const nlohmann::json& value, const std::string& argument, int64_t min, int64_t max);

// An array, an object, else Error(argument).
const nlohmann::json& array(const nlohmann::json& value, const std::string& argument);
const nlohmann::json& object(const nlohmann::json& value, const std::string& argument);

// The member, else Error.
const nlohmann::json& member(const nlohmann::json& object, const char* key, const std::string& where);

// A few characters that say what came.
std::string brief(const nlohmann::json& value);

}  // namespace tessera::io
