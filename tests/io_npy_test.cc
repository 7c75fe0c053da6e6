// .npy: files built by hand in all three versions, each fault an Error that says which, round trips of every dtype and
// rank. The header literals are what numpy 1.24 writes, byte for byte where it matters.
#include "io_files.h"

namespace tessera {
namespace {

using test::as_bytes;
using test::expect_equal;
using test::expect_error;

std::string file_of(const std::string& dict, const std::string& data, int version = 1) {
  const std::string header = dict + "\n";
  return std::string("\x93NUMPY") + static_cast<char>(version) + '\0' +
         test::little_endian(header.size(), version == 1 ? 2 : 4) + header + data;
}

std::string dict_of(const std::string& descr, const std::string& shape, const std::string& order = "False") {
  return "{'descr': " + descr + ", 'fortran_order': " + order + ", 'shape': " + shape + ", }";
}

Tensor parse(const std::string& file) { return parse_npy(as_bytes(file)); }

void expect_bad(const std::string& dict, const std::string& data, const std::string& part) {
  SCOPED_TRACE(dict);
  expect_error([&] { parse(file_of(dict, data)); }, part);
}

TEST(Npy, ReadsWhatNumpyWrites) {
  // numpy.save("x.npy", numpy.array([[1, -2, 3]], "<i4"))
  const std::string file = std::string("\x93NUMPY\x01\x00\x76\x00", 10) +
                           "{'descr': '<i4', 'fortran_order': False, 'shape': (1, 3), }" + std::string(58, ' ') + "\n" +
                           std::string("\1\0\0\0\xfe\xff\xff\xff\3\0\0\0", 12);
  ASSERT_EQ(file.size(), 140u);
  const Tensor x = parse(file);
  EXPECT_EQ(x.dtype(), DType::i32);
  EXPECT_EQ(x.shape(), (std::vector<int64_t>{1, 3}));
  const auto* values = static_cast<const int32_t*>(x.data());
  EXPECT_EQ(values[0], 1);
  EXPECT_EQ(values[1], -2);
  EXPECT_EQ(values[2], 3);

  // And the writer makes the very same bytes.
  test::TemporaryFolder folder;
  write_npy(folder / "x.npy", x);
  EXPECT_EQ(test::file_content(folder / "x.npy"), file);
  expect_equal(read_npy(folder / "x.npy"), x);
}

TEST(Npy, AllVersionsAndSpellings) {
  for (int version : {1, 2, 3}) {
    const Tensor x = parse(file_of(dict_of("'<f2'", "(2,)"), "abcd", version));
    EXPECT_EQ(x.dtype(), DType::f16);
    EXPECT_EQ(x.shape(), std::vector<int64_t>{2});
  }
  EXPECT_EQ(parse(file_of("{\"shape\":(2,2),\"descr\":\"|u1\",\"fortran_order\":False}", "abcd")).rank(), 2);
  EXPECT_EQ(parse(file_of(dict_of("'|u1'", "()"), "a")).rank(), 0);
  EXPECT_EQ(parse(file_of(dict_of("'|u1'", "(2,2,)"), "abcd")).rank(), 2);
  EXPECT_EQ(parse(file_of(dict_of("'|u1'", "(0, 9)"), "")).numel(), 0);
  EXPECT_EQ(parse(file_of(dict_of("'|u1'", "(4,)", "True"), "abcd")).numel(), 4);  // rank 1: the orders agree
}

TEST(Npy, FaultsOfTheFrame) {
  const std::string good = file_of(dict_of("'|u1'", "(4,)"), "abcd");
  EXPECT_NO_THROW(parse(good));
  for (size_t length = 0; length < good.size(); ++length) {
    EXPECT_THROW(parse(good.substr(0, length)), Error) << length;
  }
  expect_error([&] { parse(good + "e"); }, "left over");
  expect_error([&] { parse(good.substr(0, good.size() - 1)); }, "truncated");
  expect_error([&] { parse("\x94" + good.substr(1)); }, "magic");
  for (const auto& [major, minor] : {std::pair{0, 0}, {4, 0}, {1, 1}, {255, 0}}) {
    std::string file = good;
    file[6] = static_cast<char>(major);
    file[7] = static_cast<char>(minor);
    expect_error([&] { parse(file); }, "version");
  }
  const std::string huge = std::string("\x93NUMPY\x02\x00\xff\xff\xff\xff", 12) + good.substr(10);
  expect_error([&] { parse(huge); }, "header length");
  std::string no_newline = good;
  no_newline[good.size() - 5] = ' ';
  expect_error([&] { parse(no_newline); }, "newline");
}

TEST(Npy, FaultsOfTheHeader) {
  const std::string data = "abcd";
  expect_bad(dict_of("'|u1'", "(2, 2)", "True"), data, "fortran_order");
  expect_bad(dict_of("'>f4'", "(1,)"), data, "big-endian");
  expect_bad(dict_of("'|O'", "(1,)"), data, "pickled");
  expect_bad(dict_of("[('a', '<f4')]", "(1,)"), data, "structured");
  for (const char* descr :
       {"'<c8'", "'=f4'", "'f4'", "'<U1'", "'|S4'", "'<u4'", "'|i1'", "'<M8[ns]'", "''", "'<f16'"}) {
    expect_bad(dict_of(descr, "(1,)"), data, "dtype");
  }
  for (const char* shape : {"(-4,)", "(4.0,)", "(0x4,)", "(4L,)", "[4]", "4", "(4)", "(4,,)", "(,)", "(4, 1", "('4',)",
                            "None", "(99999999999999999999,)", "(4,) + (1,)", "((4,),)"}) {
    SCOPED_TRACE(shape);
    EXPECT_THROW(parse(file_of(dict_of("'|u1'", shape), data)), Error);
  }
  expect_bad(dict_of("'<f8'", "(4294967296, 4294967296)"), data, "64 bits");
  expect_bad(dict_of("'<f8'", "(0, 4294967296, 4294967296)"), "", "64 bits");
  expect_bad(dict_of("'|u1'", "(1000000000000,)"), data, "truncated");
  std::string rank33 = "(4, ";
  for (int i = 1; i < 33; ++i) rank33 += "1, ";
  expect_bad(dict_of("'|u1'", rank33 + ")"), data, "rank above 32");
  expect_bad("{'descr': '|u1', 'fortran_order': False}", data, "must all be there");
  expect_bad("{'descr': '|u1', 'descr': '|u1', 'fortran_order': False, 'shape': (4,)}", data, "each once");
  expect_bad("{'descr': '|u1', 'fortran_order': False, 'shape': (4,), 'more': 1}", data, "\"more\"");
  expect_bad(dict_of("'|u1'", "(4,)") + " x", data, "after the dict");
  expect_bad(dict_of("'|u1'", "(4,)", "false"), data, "True or False");
  expect_bad(dict_of("'|u1'", "(4,)", "0"), data, "True or False");
  expect_bad("{'descr': '|u1", data, "string");
  expect_bad("{'descr' '|u1'}", data, "':'");
  expect_bad("", data, "'{'");
  expect_bad(std::string("{\0}", 3), data, "a string");
  expect_bad(dict_of("'|b1'", "(4,)"), std::string("\0\1\1\3", 4), "element 3 is the byte 3");
}

TEST(Npy, RoundTripOfEveryDTypeAndRank) {
  test::TemporaryFolder folder;
  const std::string path = folder / "x.npy";
  for (DType dtype : test::kAllDTypes) {
    for (const auto& shape : test::all_shapes()) {
      const Tensor x = test::numbered(dtype, shape);
      SCOPED_TRACE(std::string(name_of(dtype)) + " rank " + std::to_string(shape.size()));
      if (dtype == DType::bf16) {
        expect_error([&] { write_npy(path, x); }, "bf16");
        continue;
      }
      write_npy(path, x);
      expect_equal(read_npy(path), x);
      if (x.rank() >= 1 && x.rank() <= 4) {
        write_npy(path, x.view());
        expect_equal(read_npy(path), x);
      }
      EXPECT_EQ((test::file_content(path).size() - x.size_bytes()) % 64, 0u);
    }
  }
  EXPECT_EQ(folder.files(), 1u);
}

TEST(Npy, TransposedViewIsWrittenInOrder) {
  test::TemporaryFolder folder;
  const Tensor x = test::numbered(DType::u8, {2, 3});
  TensorView transposed = make_view(x.data(), DType::u8, {3, 2});
  transposed.strides = {1, 3};
  write_npy(folder / "t.npy", transposed);
  const Tensor back = read_npy(folder / "t.npy");
  EXPECT_EQ(back.shape(), (std::vector<int64_t>{3, 2}));
  for (size_t i = 0; i < 3; ++i) {
    for (size_t j = 0; j < 2; ++j) EXPECT_EQ(back.bytes()[i * 2 + j], x.bytes()[j * 3 + i]);
  }
}

}  // namespace
}  // namespace tessera
