// Files: they appear whole or not at all, and paths that are no regular files are an Error, never a hang.
#include "io_files.h"

#include <csignal>
#include <filesystem>

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

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

// Whoever replaces a file becomes its owner: set-user-id must not go over.
TEST(Files, TheModeIsKeptWithoutSetUserId) {
  test::TemporaryFolder folder;
  write_file(folder / "program", "old");
  ASSERT_EQ(::chmod((folder / "program").c_str(), 06755), 0);
  write_file(folder / "program", "new");
  struct stat info {};
  ASSERT_EQ(::stat((folder / "program").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0755u);
}

TEST(Files, WrittenTogetherOrNotAtAll) {
  test::TemporaryFolder folder;
  const Tensor x = test::numbered(DType::f32, {3}), y = test::numbered(DType::f32, {5});
  write_npy(folder / "a.npy", x);
  {
    WriteTogether all;
    write_npy(folder / "a.npy", y);
    EXPECT_THROW(write_npy(folder / "none/b.npy", y), Error);
    test::expect_equal(read_npy(folder / "a.npy"), x);
  }
  test::expect_equal(read_npy(folder / "a.npy"), x);
  EXPECT_EQ(folder.files(), 1u) << "nothing is left of what was prepared";
  WriteTogether all;
  EXPECT_THROW(WriteTogether(), Error);
  write_npy(folder / "a.npy", y);
  write_npy(folder / "b.npy", x);
  EXPECT_EQ(folder.files(), 1u);
  all.commit();
  test::expect_equal(read_npy(folder / "a.npy"), y);
  test::expect_equal(read_npy(folder / "b.npy"), x);
  write_npy(folder / "c.npy", x);  // as ever after commit()
  EXPECT_EQ(folder.files(), 3u);
}

// A child is killed in the middle of writing, as by the user or by the kernel: nothing is left beside the old file, and
// what is written of a private one is never readable by others.
TEST(Files, NothingIsLeftOfAWriterThatIsKilled) {
  for (const int signal : {SIGINT, SIGTERM, SIGHUP, SIGKILL}) {
    test::TemporaryFolder folder;
    const int nameless = ::open((folder / "").c_str(), O_TMPFILE | O_WRONLY, 0600);
    if (nameless < 0) GTEST_SKIP() << "this file system knows no files without names";
    ::close(nameless);
    const std::string path = folder / "x.npy";
    write_npy(path, test::numbered(DType::f32, {3}));
    ASSERT_EQ(::chmod(path.c_str(), 0600), 0);
    int ready[2];
    ASSERT_EQ(::pipe(ready), 0);
    const pid_t child = ::fork();
    if (child == 0) {
      ::signal(signal, SIG_DFL);
      WriteTogether all;
      write_file(path, std::string(1 << 20, 'x'));
      (void)!::write(ready[1], "x", 1);
      ::pause();
    }
    char byte;
    ASSERT_EQ(::read(ready[0], &byte, 1), 1);
    for (const auto& entry : std::filesystem::directory_iterator(folder / "")) {
      struct stat info {};
      ASSERT_EQ(::stat(entry.path().c_str(), &info), 0);
      EXPECT_EQ(info.st_mode & 0077, 0u) << entry.path();
    }
    ::kill(child, signal);
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    EXPECT_EQ(WTERMSIG(status), signal);
    EXPECT_EQ(folder.files(), 1u) << "after signal " << signal;
    EXPECT_EQ(read_npy(path).numel(), 3);
    ::close(ready[0]);
    ::close(ready[1]);
  }
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
