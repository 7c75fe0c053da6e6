// A bounded fuzz loop over the three readers: good files with bytes flipped, pieces cut, doubled and replaced by what
// formats trip over. Whatever comes is a value or an Error; sanitizers see the rest. Seeds are fixed, so a failure
// comes again; 4,000 files a reader take a second or two.
#include "io_files.h"

#include <functional>
#include <random>

namespace tessera {
namespace {

constexpr int kCases = 4000;

const std::vector<std::string>& pieces() {
  static const std::vector<std::string> list{"0",
                                             "-1",
                                             "1",
                                             "9223372036854775807",
                                             "9223372036854775808",
                                             "18446744073709551615",
                                             "1e308",
                                             "1e999",
                                             "null",
                                             "true",
                                             "[]",
                                             "{}",
                                             "[",
                                             "]",
                                             "{",
                                             "}",
                                             "\"",
                                             "\\u0000",
                                             "\\ud800",
                                             ",",
                                             ":",
                                             "(",
                                             ")",
                                             "'",
                                             "\n",
                                             " ",
                                             "[0,0]",
                                             "\"F64\"",
                                             "\"BOOL\"",
                                             "'>f8'",
                                             "'|O'",
                                             "'|b1'",
                                             "True",
                                             "(4294967296, 4294967296)",
                                             "4294967296",
                                             std::string(1, '\0'),
                                             std::string(8, '\xff'),
                                             std::string("\0\0\0\0\0\0\0\x80", 8),
                                             "\xf0\x9f\x98\x80",
                                             "\xc3\x28",
                                             std::string(300, '['),
                                             std::string(64, ' '),
                                             "1099511627776",
                                             "2147483648",
                                             "-9223372036854775808"};
  return list;
}

std::string mutated(std::string file, std::mt19937_64& random) {
  const auto below = [&](size_t n) { return n == 0 ? 0 : static_cast<size_t>(random() % n); };
  const size_t steps = 1 + below(4);
  for (size_t i = 0; i < steps; ++i) {
    const size_t at = below(file.size() + 1), length = below(std::min<size_t>(16, file.size() - at) + 1);
    switch (random() % 7) {
      case 0:
        if (at < file.size()) file[at] = static_cast<char>(file[at] ^ (1 << random() % 8));
        break;
      case 1:
        if (at < file.size()) file[at] = static_cast<char>(random());
        break;
      case 2: file.erase(at, length); break;
      case 3: file.insert(at, file.substr(at, length)); break;
      case 4: file.replace(at, length, pieces()[below(pieces().size())]); break;
      case 5: file.resize(at); break;
      case 6:  // digits are where sizes live
        for (size_t k = at; k < file.size(); ++k) {
          if (file[k] >= '0' && file[k] <= '9') {
            file[k] = static_cast<char>('0' + random() % 10);
            break;
          }
        }
        break;
    }
  }
  return file;
}

// Number of files that were read; the others threw Error. Anything else escapes and fails the test.
int fuzz(const std::vector<std::string>& seeds, uint64_t seed, const std::function<void(const std::string&)>& read) {
  std::mt19937_64 random(seed);
  int accepted = 0;
  for (int n = 0; n < kCases; ++n) {
    const std::string file = mutated(seeds[static_cast<size_t>(n) % seeds.size()], random);
    try {
      read(file);
      ++accepted;
    } catch (const Error& e) {
      EXPECT_FALSE(std::string(e.what()).empty());
    }
  }
  return accepted;
}

TEST(Fuzz, Safetensors) {
  test::TemporaryFolder folder;
  const std::string path = folder / "seed";
  std::vector<std::string> seeds;
  std::map<std::string, Tensor> tensors;
  write_safetensors(path, tensors);
  seeds.push_back(test::file_content(path));
  for (DType dtype : test::kAllDTypes) {
    tensors.emplace(std::string(name_of(dtype)), test::numbered(dtype, {2, static_cast<int64_t>(tensors.size())}));
    write_safetensors(path, tensors, {{"format", "pt"}});
    seeds.push_back(test::file_content(path));
  }
  const int accepted = fuzz(seeds, 1, [](const std::string& file) {
    size_t bytes = 0;
    for (const auto& [name, tensor] : parse_safetensors(test::as_bytes(file))) bytes += tensor.size_bytes();
    EXPECT_LE(bytes, file.size());
  });
  EXPECT_GT(accepted, 0);  // not everything dies at the door
  EXPECT_LT(accepted, kCases);
}

TEST(Fuzz, Npy) {
  test::TemporaryFolder folder;
  const std::string path = folder / "seed";
  std::vector<std::string> seeds;
  for (DType dtype : test::kAllDTypes) {
    if (dtype == DType::bf16) continue;
    for (const auto& shape : test::all_shapes()) {
      write_npy(path, test::numbered(dtype, shape));
      seeds.push_back(test::file_content(path));
    }
  }
  const int accepted = fuzz(
      seeds, 2, [](const std::string& file) { EXPECT_LE(parse_npy(test::as_bytes(file)).size_bytes(), file.size()); });
  EXPECT_GT(accepted, 0);
  EXPECT_LT(accepted, kCases);
}

TEST(Fuzz, PatternJson) {
  std::vector<std::string> seeds;
  seeds.push_back(pattern_json(BlockPattern()));
  seeds.push_back(pattern_json(BlockPattern::from_csr({100, 70, 32, 16, 1, 1}, {0, 2, 3, 3, 4}, {0, 2, 1, 4})));
  seeds.push_back(
      pattern_json(BlockPattern::from_csr({32, 48, 16, 48, 2, 2}, {0, 1, 1, 2, 3, 4, 4, 4, 5}, {0, 0, 0, 0, 0},
                                          {-1, 0, 1, 0, -1}, std::vector<uint64_t>(32, 0x123456789abc))));
  const int accepted = fuzz(seeds, 3, [](const std::string& file) {
    const BlockPattern p = parse_pattern(file);
    EXPECT_LE(p.num_blocks(), static_cast<int64_t>(file.size()));
    EXPECT_TRUE(parse_pattern(pattern_json(p)) == p);
  });
  EXPECT_GT(accepted, 0);
  EXPECT_LT(accepted, kCases);
}

}  // namespace
}  // namespace tessera
