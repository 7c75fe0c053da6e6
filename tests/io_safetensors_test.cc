// safetensors: files built by hand byte by byte are read as the format says, each fault of a file is an Error that
// says which, and what is written is read back bit for bit (every dtype, ranks 0 to 5, strided views).
#include "io_files.h"

#include <cmath>
#include <limits>

namespace tessera {
namespace {

using test::as_bytes;
using test::expect_equal;
using test::expect_error;

std::string file_of(const std::string& header, const std::string& data) {
  return test::little_endian(header.size(), 8) + header + data;
}

std::map<std::string, Tensor> parse(const std::string& header, const std::string& data) {
  const std::string file = file_of(header, data);
  return parse_safetensors(as_bytes(file));
}

void expect_bad(const std::string& header, const std::string& data, const std::string& part) {
  SCOPED_TRACE(header);
  expect_error([&] { parse(header, data); }, part);
}

// One U8 tensor "x" of 4 bytes with one field of its entry replaced.
std::string entry(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return "{\"x\":{\"dtype\":" + dtype + ",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}}";
}

TEST(Safetensors, ReadsAFileBuiltByHand) {
  const std::string one_two("\x00\x00\x80\x3f\x00\x00\x00\x40", 8);  // fp32 1, 2
  const auto tensors =
      parse(R"({"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[1,1],"data_offsets":[8,10]},)"
            R"("a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}   )",
            one_two + std::string("\x40\xc0", 2));
  ASSERT_EQ(tensors.size(), 2u);
  const Tensor& a = tensors.at("a");
  EXPECT_EQ(a.dtype(), DType::f32);
  EXPECT_EQ(a.shape(), std::vector<int64_t>{2});
  EXPECT_EQ(static_cast<const float*>(a.data())[0], 1.0f);
  EXPECT_EQ(static_cast<const float*>(a.data())[1], 2.0f);
  const Tensor& b = tensors.at("b");
  EXPECT_EQ(b.dtype(), DType::bf16);
  EXPECT_EQ(to_float(*static_cast<const bfloat16*>(b.data())), -3.0f);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(b.data()) % 64, 0u);
}

TEST(Safetensors, EmptyFilesAndEmptyTensors) {
  EXPECT_TRUE(parse("{}", "").empty());
  const auto tensors = parse(R"({"x":{"dtype":"F64","shape":[0,7],"data_offsets":[0,0]},)"
                             R"("y":{"dtype":"F64","shape":[3,0],"data_offsets":[0,0]}})",
                             "");
  EXPECT_EQ(tensors.at("x").shape(), (std::vector<int64_t>{0, 7}));
  EXPECT_EQ(tensors.at("y").numel(), 0);
}

TEST(Safetensors, FaultsOfTheHeader) {
  expect_error([] { parse_safetensors({}); }, "header's length");
  expect_error([] { parse_safetensors(as_bytes("1234567")); }, "header's length");
  const std::string good = file_of(entry("\"U8\"", "[4]", "[0,4]"), "abcd");
  EXPECT_NO_THROW(parse_safetensors(as_bytes(good)));
  for (size_t length = 0; length < good.size(); ++length) {  // every truncation
    EXPECT_THROW(parse_safetensors(as_bytes(good.substr(0, length))), Error) << length;
  }
  for (uint64_t length : {uint64_t{1000}, uint64_t{100'000'001}, uint64_t{1} << 40, ~uint64_t{0}, ~uint64_t{7}}) {
    const std::string file = test::little_endian(length, 8) + good.substr(8);
    expect_error([&] { parse_safetensors(as_bytes(file)); }, "header length");
  }
  expect_bad("", "", "does not begin with {");
  expect_bad(" {}", "", "does not begin with {");
  expect_bad("[]", "", "does not begin with {");
  expect_bad("{", "", "not JSON");
  expect_bad("{}x", "", "not JSON");
  expect_bad("{\"x\":1}", "", "an object");
  expect_bad("{\"\xff\":{}}", "", "not JSON");
  expect_bad("{\"x\":" + std::string(5000, '[') + std::string(5000, ']') + "}", "", "nesting");
  expect_bad(R"({"x":{"dtype":"U8","shape":[[[1]]],"data_offsets":[0,1]}})", "a", "nesting");
}

TEST(Safetensors, FaultsOfATensor) {
  EXPECT_NO_THROW(parse(entry("\"U8\"", "[4]", "[0,4]"), "abcd"));
  for (const char* dtype : {"\"F8_E4M3\"", "\"f32\"", "\"I16\"", "\"\"", "4", "null", "[\"U8\"]"}) {
    expect_bad(entry(dtype, "[4]", "[0,4]"), "abcd", "dtype");
  }
  for (const char* shape :
       {"4", "null", "[-4]", "[4.0]", "[\"4\"]", "[18446744073709551615]", "[1e1]", "[99999999999999999999]"}) {
    expect_bad(entry("\"U8\"", shape, "[0,4]"), "abcd", "shape");
  }
  expect_bad(entry("\"U8\"", "[4294967296,4294967296]", "[0,4]"), "abcd", "64 bits");
  expect_bad(entry("\"U8\"", "[4294967296,4294967296,0]", "[0,0]"), "", "64 bits");
  expect_bad(entry("\"F64\"", "[2305843009213693952]", "[0,4]"), "abcd", "64 bits");
  expect_bad(entry("\"U8\"", "[3]", "[0,4]"), "abcd", "hold 4 bytes");
  expect_bad(entry("\"U8\"", "[1000000000000]", "[0,4]"), "abcd", "hold 4 bytes");
  expect_bad(entry("\"F32\"", "[4]", "[0,4]"), "abcd", "hold 4 bytes");
  for (const char* offsets : {"[0]", "[0,4,4]", "[4,0]", "[-1,3]", "[0,5]", "[0,4.0]", "[0,null]", "0", "{}",
                              "[0,18446744073709551615]", "[18446744073709551612,4]"}) {
    expect_bad(entry("\"U8\"", "[4]", offsets), "abcd", "data_offsets");
  }
  std::string rank33 = "[1";
  for (int i = 1; i < 33; ++i) rank33 += ",1";
  expect_bad(entry("\"U8\"", rank33 + "]", "[0,1]"), "a", "rank 33");
  expect_bad(R"({"x":{"dtype":"U8","shape":[4]}})", "abcd", "data_offsets");
  expect_bad(R"({"x":{"shape":[4],"data_offsets":[0,4]}})", "abcd", "dtype");
  expect_bad(R"({"x":{"dtype":"U8","data_offsets":[0,4]}})", "abcd", "shape");
  expect_bad(R"({"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4],"more":1}})", "abcd", "unknown key \"more\"");
  expect_bad(R"({"a\u0000b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", "abcd", "NUL");
  expect_bad(entry("\"BOOL\"", "[4]", "[0,4]"), std::string("\0\1\2\1", 4), "element 2 is the byte 2");
}

TEST(Safetensors, DuplicateNamesAndKeys) {
  const std::string x = R"("x":{"dtype":"U8","shape":[2],"data_offsets":[0,2]})";
  const std::string again = R"("x":{"dtype":"U8","shape":[2],"data_offsets":[2,4]})";
  expect_bad("{" + x + "," + again + "}", "abcd", "\"x\" twice");
  expect_bad(R"({"x":{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}})", "abcd", "\"dtype\" twice");
  expect_bad(R"({"__metadata__":{"a":"1","a":"2"}})", "", "\"a\" twice");
}

TEST(Safetensors, OffsetsMustTileTheData) {
  const auto two = [](const std::string& first, const std::string& second) {
    return R"({"x":{"dtype":"U8","shape":[2],"data_offsets":)" + first +
           R"(},"y":{"dtype":"U8","shape":[2],"data_offsets":)" + second + "}}";
  };
  EXPECT_NO_THROW(parse(two("[0,2]", "[2,4]"), "abcd"));
  EXPECT_NO_THROW(parse(two("[2,4]", "[0,2]"), "abcd"));
  expect_bad(two("[0,2]", "[1,3]"), "abcd", "overlap");
  expect_bad(two("[0,2]", "[0,2]"), "ab", "overlap");
  expect_bad(two("[0,2]", "[3,5]"), "abcde", "gap");
  expect_bad(two("[1,3]", "[3,5]"), "abcde", "gap");
  expect_bad(two("[0,2]", "[2,4]"), "abcde", "1 bytes after the last tensor");
  expect_bad("{}", "a", "1 bytes after the last tensor");
}

TEST(Safetensors, Metadata) {
  test::TemporaryFolder folder;
  const std::string path = folder / "m.safetensors";
  const Metadata metadata{{"format", "pt"}, {"quote\"", "line\nbreak \xc3\xa4"}};
  write_safetensors(path, std::vector<NamedTensor>{}, metadata);
  EXPECT_EQ(safetensors_metadata(path), metadata);
  EXPECT_TRUE(read_safetensors(path).empty());
  expect_bad(R"({"__metadata__":{"a":1}})", "", "a string");
  expect_bad(R"({"__metadata__":[]})", "", "an object");
}

TEST(Safetensors, RoundTripOfEveryDTypeAndRank) {
  test::TemporaryFolder folder;
  std::map<std::string, Tensor> tensors;
  for (DType dtype : test::kAllDTypes) {
    for (const auto& shape : test::all_shapes()) {
      tensors.emplace(std::string(name_of(dtype)) + "/" + std::to_string(tensors.size()), test::numbered(dtype, shape));
    }
  }
  const std::string path = folder / "all.safetensors";
  write_safetensors(path, tensors);
  EXPECT_EQ(folder.files(), 1u);
  const auto back = read_safetensors(path);
  ASSERT_EQ(back.size(), tensors.size());
  for (const auto& [name, tensor] : tensors) {
    SCOPED_TRACE(name);
    expect_equal(back.at(name), tensor);
  }
  for (const TensorInfo& info : list_safetensors(path)) {  // as a memory map of the file would need it
    EXPECT_EQ(info.offset % static_cast<int64_t>(size_of(info.dtype)), 0) << info.name;
  }
}

TEST(Safetensors, NamesPickTensors) {
  test::TemporaryFolder folder;
  const std::string path = folder / "x.safetensors";
  std::map<std::string, Tensor> tensors;
  for (const char* name : {"q", "k", "v"}) tensors.emplace(name, test::numbered(DType::f16, {2, 3}));
  write_safetensors(path, tensors);
  const std::vector<std::string> names{"v", "q"};
  const auto some = read_safetensors(path, names);
  EXPECT_EQ(some.size(), 2u);
  expect_equal(some.at("v"), tensors.at("v"));
  const std::vector<std::string> missing{"q", "bias"};
  expect_error([&] { read_safetensors(path, missing); }, "no tensor \"bias\"; it has: \"k\", \"q\", \"v\"");
  expect_error([&] { read_safetensors(path, missing); }, path);
}

TEST(Safetensors, StridedViewsAreWrittenInOrder) {
  test::TemporaryFolder folder;
  const std::string path = folder / "s.safetensors";
  // [B, S, H, D] = [2, 300, 3, 500] kept as bhsd: 900,000 elements, so the copy buffer of 1 MiB wraps.
  Tensor store(DType::f32, {2, 3, 300, 500});
  auto* values = static_cast<float*>(store.data());
  for (int64_t i = 0; i < store.numel(); ++i) values[i] = static_cast<float>(i);
  const TensorView view = attention_view(store.data(), DType::f32, Layout::bhsd, 2, 300, 3, 500);
  TensorView expanded = make_view(static_cast<const void*>(values + 7), DType::f32, {4, 2});
  expanded.strides = {0, -1};
  write_safetensors(path, {{"bshd", view}, {"expanded", expanded}});
  const auto back = read_safetensors(path);
  const auto* got = static_cast<const float*>(back.at("bshd").data());
  int64_t n = 0, wrong = 0;
  for (int64_t b = 0; b < 2; ++b)
    for (int64_t s = 0; s < 300; ++s)
      for (int64_t h = 0; h < 3; ++h)
        for (int64_t d = 0; d < 500; ++d) wrong += got[n++] != static_cast<float>(((b * 3 + h) * 300 + s) * 500 + d);
  EXPECT_EQ(wrong, 0);
  const auto* rows = static_cast<const float*>(back.at("expanded").data());
  for (int i = 0; i < 8; ++i) EXPECT_EQ(rows[i], i % 2 ? 6.0f : 7.0f);
}

TEST(Safetensors, BadThingsToWrite) {
  test::TemporaryFolder folder;
  const std::string path = folder / "w.safetensors";
  const Tensor x = test::numbered(DType::u8, {2});
  expect_error([&] { write_safetensors(path, {{"x", x.view()}, {"x", x.view()}}); }, "\"x\"");
  expect_error([&] { write_safetensors(path, {{"__metadata__", x.view()}}); }, "__metadata__");
  expect_error([&] { write_safetensors(path, {{std::string("a\0b", 3), x.view()}}); }, "NUL");
  expect_error([&] { write_safetensors(path, {{"\xff", x.view()}}); }, "UTF-8");
  expect_error([&] { write_safetensors(path, {{"x", TensorView{}}}); }, "undefined");
  expect_error([&] { write_safetensors(path, {{"x", make_view(static_cast<const void*>(nullptr), DType::u8, {2})}}); },
               "no data");
  EXPECT_EQ(folder.files(), 0u);
}

TEST(Tensor, SizesThatCannotBe) {
  EXPECT_THROW(Tensor(DType::f32, {-1}), Error);
  EXPECT_THROW(Tensor(DType::f32, {int64_t{1} << 62}), Error);
  EXPECT_THROW(Tensor(DType::u8, {int64_t{1} << 32, int64_t{1} << 32}), Error);
  EXPECT_THROW(Tensor(DType::f32, {}).view(), Error);
  EXPECT_THROW(Tensor(DType::f32, {1, 1, 1, 1, 1}).view(), Error);
  EXPECT_EQ(Tensor().numel(), 0);
}

TEST(Tensor, CopiesAreDeep) {
  Tensor a = test::numbered(DType::i32, {2, 3});
  Tensor b = a;
  expect_equal(a, b);
  b.bytes()[0] = std::byte{99};
  EXPECT_NE(a.bytes()[0], b.bytes()[0]);
  a = b;
  expect_equal(a, b);
  EXPECT_EQ(a.view().strides[0], 3);
}

}  // namespace
}  // namespace tessera
