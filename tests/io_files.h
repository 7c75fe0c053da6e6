// Files of the tests: a folder that goes away, bytes built by hand, and what an Error must say.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <unistd.h>

#include "tessera/error.h"
#include "tessera/io.h"

namespace tessera::test {

class TemporaryFolder {
 public:
  TemporaryFolder() {
    static int counter = 0;
    path_ = std::filesystem::temp_directory_path() /
            ("tessera-test-" + std::to_string(::getpid()) + "-" + std::to_string(counter++));
    std::filesystem::create_directories(path_);
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  std::string operator/(const std::string& name) const { return (path_ / name).string(); }
  size_t files() const { return static_cast<size_t>(std::distance(std::filesystem::directory_iterator(path_), {})); }

 private:
  std::filesystem::path path_;
};

inline std::span<const std::byte> as_bytes(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

inline std::string file_content(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

// `bytes` little-endian bytes of a number.
inline std::string little_endian(uint64_t value, int bytes) {
  std::string out;
  for (int i = 0; i < bytes; ++i) out += static_cast<char>(value >> (8 * i) & 0xff);
  return out;
}

// Elements 0, 1, 2, ... as bytes that differ everywhere; booleans stay 0 or 1.
inline Tensor numbered(DType dtype, std::vector<int64_t> shape) {
  Tensor tensor(dtype, std::move(shape));
  const std::span<std::byte> bytes = tensor.bytes();
  for (size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = static_cast<std::byte>(dtype == DType::boolean ? i % 3 == 1 : i * 37 + 11);
  }
  return tensor;
}

inline void expect_equal(const Tensor& a, const Tensor& b) {
  EXPECT_EQ(a.dtype(), b.dtype());
  EXPECT_EQ(a.shape(), b.shape());
  ASSERT_EQ(a.size_bytes(), b.size_bytes());
  if (a.size_bytes() > 0) {
    EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size_bytes()), 0);
  }
}

// Runs f, which must throw an Error whose text holds `part`.
template <class F>
void expect_error(F&& f, const std::string& part) {
  try {
    f();
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << "expected \"" << part << "\" in: " << e.what();
    return;
  }
  ADD_FAILURE() << "no Error; expected one with \"" << part << "\"";
}

constexpr DType kAllDTypes[] = {DType::f64, DType::f32, DType::f16, DType::bf16,
                                DType::i64, DType::i32, DType::u8,  DType::boolean};

// Ranks 0 to 5, no elements, one element.
inline const std::vector<std::vector<int64_t>>& all_shapes() {
  static const std::vector<std::vector<int64_t>> shapes{{},     {1},       {5},       {0},          {3, 4},
                                                        {2, 0}, {2, 3, 4}, {1, 1, 1}, {2, 3, 1, 5}, {2, 1, 2, 1, 3}};
  return shapes;
}

}  // namespace tessera::test
