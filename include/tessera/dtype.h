// Storage types and the scalar conversions between them (round to nearest even, IEEE 754 / bfloat16).
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace tessera {

enum class DType : uint8_t { f64, f32, f16, bf16, i64, i32, u8, boolean };

constexpr size_t size_of(DType t) {
  switch (t) {
    case DType::f64:
    case DType::i64: return 8;
    case DType::f32:
    case DType::i32: return 4;
    case DType::f16:
    case DType::bf16: return 2;
    case DType::u8:
    case DType::boolean: return 1;
  }
  return 0;
}

// "fp64", "fp32", "fp16", "bf16", "int64", "int32", "uint8", "bool".
constexpr std::string_view name_of(DType t) {
  switch (t) {
    case DType::f64: return "fp64";
    case DType::f32: return "fp32";
    case DType::f16: return "fp16";
    case DType::bf16: return "bf16";
    case DType::i64: return "int64";
    case DType::i32: return "int32";
    case DType::u8: return "uint8";
    case DType::boolean: return "bool";
  }
  return "?";
}

constexpr bool is_floating(DType t) {
  return t == DType::f64 || t == DType::f32 || t == DType::f16 || t == DType::bf16;
}

// Distance from 1 to the next number.
constexpr double epsilon_of(DType t) {
  switch (t) {
    case DType::f64: return 0x1p-52;
    case DType::f32: return 0x1p-23;
    case DType::f16: return 0x1p-10;
    case DType::bf16: return 0x1p-7;
    default: return 0;
  }
}

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline float to_float(bfloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

inline bfloat16 to_bfloat16(float x) {
  uint32_t u = std::bit_cast<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40u)};  // NaN stays NaN
  u += 0x7fffu + ((u >> 16) & 1u);
  return {static_cast<uint16_t>(u >> 16)};
}

inline float to_float(float16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x400u) return std::bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
  // Subnormal half: value = magnitude * 2^-24, exact in float.
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f));
}

inline float16 to_float16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal half: adding 0.5 rounds at 2^-24 in float's own rounding
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(0.5f)))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13))};
}

// One element of a float tensor as double, and back (fp64 keeps every bit).
inline double load_as_double(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::f64: return static_cast<const double*>(data)[index];
    case DType::f32: return static_cast<const float*>(data)[index];
    case DType::bf16: return to_float(static_cast<const bfloat16*>(data)[index]);
    case DType::f16: return to_float(static_cast<const float16*>(data)[index]);
    default: return 0;
  }
}

inline void store_from_double(void* data, DType dtype, int64_t index, double value) {
  switch (dtype) {
    case DType::f64: static_cast<double*>(data)[index] = value; break;
    case DType::f32: static_cast<float*>(data)[index] = static_cast<float>(value); break;
    case DType::bf16: static_cast<bfloat16*>(data)[index] = to_bfloat16(static_cast<float>(value)); break;
    case DType::f16: static_cast<float16*>(data)[index] = to_float16(static_cast<float>(value)); break;
    default: break;
  }
}

}  // namespace tessera
