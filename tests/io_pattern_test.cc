// Pattern JSON: a literal file means what the format says, round trips are exact (heads, batches, bitmaps, blocks that
// differ, ragged and empty sizes), and hostile JSON is an Error.
#include "io_files.h"

#include <random>

namespace tessera {
namespace {

using test::expect_error;

constexpr const char* kSmall =
    R"({"seqlen_q":48,"seqlen_k":33,"block_q":32,"block_k":16,"heads":[{"indptr":[0,2,3],"indices":[0,2,1]}]})";

// kSmall with one piece of text replaced.
std::string with(const std::string& from, const std::string& to) {
  std::string text = kSmall;
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

void expect_bad(const std::string& json, const std::string& part) {
  SCOPED_TRACE(json.substr(0, 300));
  expect_error([&] { parse_pattern(json); }, part);
}

TEST(PatternJson, ReadsALiteral) {
  const BlockPattern p = parse_pattern(kSmall);
  EXPECT_EQ(p.shape(), (PatternShape{48, 33, 32, 16, 1, 1}));
  EXPECT_EQ(p.num_blocks(), 3);
  const BlockPatternView view = p.view();
  EXPECT_EQ(std::vector<int64_t>(view.indptr, view.indptr + 3), (std::vector<int64_t>{0, 2, 3}));
  EXPECT_EQ(std::vector<int32_t>(view.indices, view.indices + 3), (std::vector<int32_t>{0, 2, 1}));
}

TEST(PatternJson, ReadsWhereItStands) {
  EXPECT_FALSE(parse_pattern(kSmall).shape().placed());
  const BlockPattern p = parse_pattern(with("\"heads\"", "\"causal\":true,\"q_offset\":-5,\"q_skip\":16,\"heads\""));
  EXPECT_TRUE(p.shape().causal);
  EXPECT_EQ(p.shape().q_offset, -5);
  EXPECT_EQ(p.shape().q_skip, 16);
  EXPECT_FALSE(parse_pattern(with("\"heads\"", "\"causal\":false,\"heads\"")).shape().causal);
}

TEST(PatternJson, BitmapDigitsMeanKeys) {
  std::string rows = "\"0001\"";
  for (int i = 1; i < 15; ++i) rows += ",\"0000\"";
  rows += ",\"8f02\"";
  const BlockPattern p = parse_pattern(R"({"seqlen_q":16,"seqlen_k":16,"block_q":16,"block_k":16,)"
                                       R"("heads":[{"indptr":[0,1],"indices":[0],"bitmap_index":[0]}],"bitmaps":[[)" +
                                       rows + "]]}");
  ASSERT_EQ(p.num_bitmaps(), 1);
  const uint64_t* bitmap = p.view().bitmap(0);
  EXPECT_EQ(bitmap[0], 1u);  // query 0 sees key 0
  EXPECT_EQ(bitmap[1], 0u);
  EXPECT_EQ(bitmap[15], 0x8f02u);  // keys 1, 8..11, 15
}

TEST(PatternJson, RoundTripsAreExact) {
  std::mt19937_64 random(7);
  test::TemporaryFolder folder;
  const std::string path = folder / "p.json";
  int with_bitmaps = 0;
  for (int n = 0; n < 120; ++n) {
    PatternShape shape;
    shape.block_q = 16 * static_cast<int>(1 + random() % 16);
    shape.block_k = 16 * static_cast<int>(1 + random() % 16);
    shape.seqlen_q = static_cast<int64_t>(random() % 700) * (n % 7 != 0);
    shape.seqlen_k = static_cast<int64_t>(random() % 700) * (n % 11 != 0);
    shape.heads = 1 + static_cast<int64_t>(random() % 3);
    shape.batches = 1 + static_cast<int64_t>(random() % 2);
    shape.causal = random() % 2;
    if (random() % 2) shape.q_offset = static_cast<int64_t>(random() % 900) - 100;
    if (random() % 2) shape.q_skip = static_cast<int>(random() % static_cast<uint64_t>(shape.block_q));
    const auto bitmaps = static_cast<int64_t>(random() % 3);
    std::vector<int64_t> indptr{0};
    std::vector<int32_t> indices, bitmap_index;
    for (int64_t r = 0; r < shape.total_rows(); ++r) {
      for (int64_t j = 0; j < shape.cols(); ++j) {
        if (random() % 2) continue;
        indices.push_back(static_cast<int32_t>(j));
        if (bitmaps > 0) bitmap_index.push_back(static_cast<int32_t>(random() % (bitmaps + 1)) - 1);
      }
      indptr.push_back(static_cast<int64_t>(indices.size()));
    }
    std::vector<uint64_t> words(static_cast<size_t>(bitmaps * shape.block_q * shape.bitmap_words()));
    for (size_t i = 0; i < words.size(); ++i) {
      const int bits = shape.block_k - static_cast<int>(i % shape.bitmap_words()) * 64;
      words[i] = random() & (bits >= 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1);
    }
    const BlockPattern p = BlockPattern::from_csr(shape, indptr, indices, bitmap_index, words);
    with_bitmaps += p.num_bitmaps() > 0;
    const BlockPattern back = parse_pattern(pattern_json(p));
    EXPECT_TRUE(back == p) << n;
    EXPECT_EQ(back.hash(), p.hash());
    EXPECT_EQ(pattern_json(back), pattern_json(p));
    if (n % 10) continue;  // a synced file takes milliseconds
    write_pattern(path, p);
    EXPECT_TRUE(read_pattern(path) == p);
  }
  EXPECT_GT(with_bitmaps, 20);
}

TEST(PatternJson, FaultsOfTheShape) {
  EXPECT_NO_THROW(parse_pattern(kSmall));
  for (const char* key : {"seqlen_q", "seqlen_k", "block_q", "block_k", "heads", "indptr", "indices"}) {
    expect_bad(with("\"" + std::string(key) + "\"", "\"other\""), "other");
  }
  for (const char* value : {"-1", "1.5", "1e2", "\"48\"", "null", "[48]", "9223372036854775807", "18446744073709551615",
                            "99999999999999999999999"}) {
    expect_bad(with("\"seqlen_q\":48", "\"seqlen_q\":" + std::string(value)), "seqlen_q");
    expect_bad(with("\"seqlen_k\":33", "\"seqlen_k\":" + std::string(value)), "seqlen_k");
  }
  for (const char* value : {"0", "-16", "8", "24", "272", "4294967312", "null"}) {
    expect_bad(with("\"block_q\":32", "\"block_q\":" + std::string(value)), "block_q");
    expect_bad(with("\"block_k\":16", "\"block_k\":" + std::string(value)), "block_k");
  }
  // A sequence of 2^40 tokens in a file of a hundred bytes must not be believed.
  expect_bad(with("\"seqlen_q\":48", "\"seqlen_q\":1099511627776"), "indptr");
}

TEST(PatternJson, FaultsOfTheBlocks) {
  for (const char* indptr :
       {"[]", "[0,3]", "[0,2,3,3]", "[1,2,3]", "[0,2,2]", "[0,4,3]", "[0,2,4]", "[0,-1,3]", "[0,2.0,3]", "null",
        "[0,null,3]", "[0,9223372036854775807,3]", "[0,18446744073709551615,3]"}) {
    expect_bad(with("[0,2,3]", indptr), "indptr");
  }
  for (const char* indices :
       {"[0,2]", "[0,3,1]", "[2,0,1]", "[0,0,1]", "[0,-1,1]", "[0,4294967296,1]", "[0,2,1.5]", "[0,2,\"1\"]", "{}"}) {
    SCOPED_TRACE(indices);
    EXPECT_THROW(parse_pattern(with("[0,2,1]", indices)), Error);
  }
  expect_bad(with("[{\"indptr\":[0,2,3],\"indices\":[0,2,1]}]", "[]"), "heads");
  expect_bad(with("[{\"indptr\":[0,2,3],\"indices\":[0,2,1]}]", "{}"), "heads");
  expect_bad(with("[{\"indptr\":[0,2,3],\"indices\":[0,2,1]}]", "[7]"), "heads[0]");
  expect_bad(with("\"heads\"", "\"batches\":2,\"heads\""), "batches");
  expect_bad(with("\"heads\"", "\"batches\":0,\"heads\""), "batches");
  expect_bad(with("\"heads\"", "\"block_q\":32,\"heads\""), "\"block_q\" twice");
  for (const char* bad : {"1", "null", "\"true\""}) {
    expect_bad(with("\"heads\"", "\"causal\":" + std::string(bad) + ",\"heads\""), "causal");
  }
  expect_bad(with("\"heads\"", "\"q_offset\":1.5,\"heads\""), "q_offset");
  expect_bad(with("\"heads\"", "\"q_offset\":9000000000000,\"heads\""), "q_offset");
  expect_bad(with("\"heads\"", "\"q_skip\":-1,\"heads\""), "q_skip");
  expect_bad(with("\"heads\"", "\"q_skip\":32,\"heads\""), "q_skip");
  expect_bad(with("\"heads\"", "\"q_skip\":17,\"heads\""), "indptr");  // 17 + 48 queries: three rows
}

TEST(PatternJson, FaultsOfBitmaps) {
  const std::string row = "\"0001\"";
  std::string rows = "[" + row;
  for (int i = 1; i < 32; ++i) rows += "," + row;
  rows += "]";
  const auto file = [](const std::string& index, const std::string& bitmaps) {
    return with("[0,2,1]}]", "[0,2,1],\"bitmap_index\":" + index + "}],\"bitmaps\":" + bitmaps);
  };
  EXPECT_EQ(parse_pattern(file("[-1,0,0]", "[" + rows + "]")).num_bitmaps(), 1);
  for (const char* index : {"[0,0]", "[0,0,0,0]", "[0,0,-2]", "[0,0,1]", "[0,0,2147483648]", "null", "[0,0,0.5]"}) {
    expect_bad(file(index, "[" + rows + "]"), "bitmap_index");
  }
  for (const char* bad : {"\"001\"", "\"00001\"", "\"000G\"", "\"000F\"", "\"0x01\"", "1", "null", "\"\""}) {
    expect_bad(file("[0,0,0]", "[[" + std::string(bad) + rows.substr(7) + "]"), "bitmaps[0]");
  }
  expect_bad(file("[0,0,0]", "[[]]"), "32 rows");
  expect_bad(file("[0,0,0]", "[[" + row + "]]"), "32 rows");
  expect_bad(file("[0,0,0]", "{}"), "bitmaps");
  expect_bad(file("[0,0,0]", "[]"), "bitmap");
}

TEST(PatternJson, FaultsOfTheText) {
  for (const char* text : {"", "{", "nul", "{}}", "[]", "3", "\"x\"", "{\"seqlen_q\"", "\xff", "{'a':1}"}) {
    SCOPED_TRACE(text);
    EXPECT_THROW(parse_pattern(text), Error);
  }
  const std::string text = kSmall;
  for (size_t length = 0; length < text.size(); ++length) {
    EXPECT_THROW(parse_pattern(text.substr(0, length)), Error) << length;
  }
  expect_bad(std::string(1'000'000, '['), "nesting");
  expect_bad(with("[0,2,1]", "[[0],2,1]"), "nesting");
  expect_bad(text + std::string("\0", 1), "not JSON");
  test::TemporaryFolder folder;
  write_file(folder / "bad.json", "{}");
  expect_error([&] { read_pattern(folder / "bad.json"); }, folder / "bad.json");
}

}  // namespace
}  // namespace tessera
