// Products of sizes that come from outside.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

#include "tessera/error.h"

namespace tessera {

// The product, or an Error naming `argument` where it does not fit in 64 bits.
inline int64_t checked_product(std::string_view argument, std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  std::string text;
  bool fits = true;
  for (const int64_t f : factors) {
    fits = !__builtin_mul_overflow(product, f, &product) && fits;
    text += (text.empty() ? "" : " x ") + std::to_string(f);
  }
  if (!fits) fail(argument, text, "a product below 2^63");
  return product;
}

}  // namespace tessera
