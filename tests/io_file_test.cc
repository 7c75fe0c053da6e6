// Files: they appear whole or not at all, and paths that are no regular files are an Error, never a hang.
#include "io_files.h"

#include <filesystem>

#include <sys/stat.h>

namespace tessera {
namespace {

using test::expect_error;

TEST(Files, ReplacesAndLeavesNothingBeside) {
  test::TemporaryFolder folder;
  write_file(folder / "a.txt", "one");
  write_file(folder / "a.txt", "two, longer");
  EXPECT_EQ(test::file_content(folder / "a.txt"), "two, longer");
  EXPECT_EQ(folder.files(), 1u);
}

TEST(Files, FailureKeepsTheOldFile) {
  test::TemporaryFolder folder;
  const std::string path = folder / "x.npy";
  const Tensor x = test::numbered(DType::u8, {3});
  write_npy(path, x);
  EXPECT_THROW(write_npy(path, test::numbered(DType::bf16, {3})), Error);
  test::expect_equal(read_npy(path), x);
  EXPECT_EQ(folder.files(), 1u);
}

TEST(Files, FollowsLinksAndKeepsTheMode) {
  test::TemporaryFolder folder;
  write_file(folder / "target", "old");
  ASSERT_EQ(::chmod((folder / "target").c_str(), 0640), 0);
  std::filesystem::create_symlink(folder / "target", folder / "link");
  write_file(folder / "link", "new");
  EXPECT_TRUE(std::filesystem::is_symlink(folder / "link"));
  EXPECT_EQ(test::file_content(folder / "target"), "new");
  struct stat info {};
  ASSERT_EQ(::stat((folder / "target").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0640u);
}

TEST(Files, WhatCannotBeWritten) {
  test::TemporaryFolder folder;
  expect_error([&] { write_file(folder / "no/such/a.txt", "x"); }, "No such file");
  expect_error([&] { write_file("", "x"); }, "path");
  expect_error([&] { write_file(folder / "", "x"); }, "path");
  expect_error([&] { write_file("/dev/null", "x"); }, "not a regular file");
  std::filesystem::create_directory(folder / "d");
  expect_error([&] { write_file(folder / "d", "x"); }, "not a regular file");
  std::filesystem::create_symlink(folder / "nowhere", folder / "dangling");
  expect_error([&] { write_file(folder / "dangling", "x"); }, "leads nowhere");
}

TEST(Files, WhatCannotBeRead) {
  test::TemporaryFolder folder;
  expect_error([&] { read_npy(folder / "none.npy"); }, folder / "none.npy");
  expect_error([&] { read_npy(folder / "none.npy"); }, "No such file");
  expect_error([&] { read_safetensors("/"); }, "not a regular file");
  expect_error([&] { read_safetensors("/dev/zero"); }, "not a regular file");
  expect_error([&] { read_npy(std::string("a\0b", 3)); }, "path");
  ASSERT_EQ(::mkfifo((folder / "fifo").c_str(), 0600), 0);
  expect_error([&] { read_npy(folder / "fifo"); }, "not a regular file");  // and does not wait for a writer
}

// A sparse file of 6 GiB: sizes and offsets beyond 32 bits, without reading or keeping the bytes.
TEST(Files, BeyondFourGiB) {
  test::TemporaryFolder folder;
  const std::string path = folder / "big.safetensors";
  const int64_t large = int64_t{6} << 30;
  const std::string header = R"({"big":{"dtype":"U8","shape":[)" + std::to_string(large) + R"(],"data_offsets":[0,)" +
                             std::to_string(large) + R"(]},"end":{"dtype":"I32","shape":[1],"data_offsets":[)" +
                             std::to_string(large) + "," + std::to_string(large + 4) + "]}}";
  write_file(path, test::little_endian(header.size(), 8) + header);
  std::filesystem::resize_file(path, 8 + header.size() + static_cast<uint64_t>(large) + 4);
  {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(8 + header.size() + static_cast<uint64_t>(large)));
    file.write("\x2a\0\0\0", 4);
    ASSERT_TRUE(file.good());
  }
  const std::vector<std::string> names{"end"};
  EXPECT_EQ(*static_cast<const int32_t*>(read_safetensors(path, names).at("end").data()), 42);
  EXPECT_EQ(list_safetensors(path).at(0).bytes, large);
}

}  // namespace
}  // namespace tessera
