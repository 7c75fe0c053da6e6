// Readers and writers where memory is short: an exception, never the end of the process. Each limit is tried in a
// child.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <functional>
#include <new>

#include "io_files.h"
#include "tessera/patterns.h"

namespace tessera {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || defined(TESSERA_EMULATED)
constexpr bool kSkip = true;  // sanitizers' own memory is beyond any such limit, and qemu-user does not keep it
#else
constexpr bool kSkip = false;
#endif

size_t address_space() {
  size_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  return pages * static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

enum Ending { kDone = 0, kOutOfMemory = 1, kOther = 2 };

// How `work` ends where no more than `extra` bytes can be had.
int ending_within(size_t extra, const std::function<void()>& work) {
  const pid_t child = fork();
  if (child == 0) {
    const rlimit limit{address_space() + extra, address_space() + extra};
    setrlimit(RLIMIT_AS, &limit);
    try {
      work();
    } catch (const std::bad_alloc&) {
      _exit(kOutOfMemory);
    } catch (const Error&) {
      _exit(kOutOfMemory);
    } catch (...) {
      _exit(kOther);
    }
    _exit(kDone);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

// Some limit is too small and some is not; none ends the process.
void expect_survives(const std::function<void()>& work) {
  if (kSkip) GTEST_SKIP();
  bool failed = false, done = false;
  for (size_t extra = 0; extra <= size_t{256} << 20; extra += extra < size_t{8} << 20 ? 1 << 19 : 4 << 20) {
    const int ending = ending_within(extra, work);
    ASSERT_TRUE(ending == kDone || ending == kOutOfMemory) << "with " << extra << " bytes it ended with " << ending;
    (ending == kDone ? done : failed) = true;
    if (done) break;
  }
  EXPECT_TRUE(failed && done) << failed << done;
}

std::string zeros(int64_t n) {
  std::string text =
      "{\"seqlen_q\":16,\"seqlen_k\":16,\"block_q\":16,\"block_k\":16,\"heads\":[{\"indptr\":[0,0],\"indices\":[";
  for (int64_t i = 0; i < n; ++i) text += i ? ",0" : "0";
  return text + "]}]}";
}

std::string header_of(int64_t tensors) {
  std::string header = "{";
  for (int64_t i = 0; i < tensors; ++i) {
    header += (i ? ",\"t" : "\"t") + std::to_string(i) + R"(":{"dtype":"U8","shape":[0],"data_offsets":[0,0]})";
  }
  return header + "}";
}

void tolerate(const std::function<void()>& parse) {
  try {
    parse();
  } catch (const Error& e) {  // what is wrong with the file itself
    if (e.argument() == "memory") throw;
  }
}

TEST(Memory, APatternOfManyNumbers) {
  const std::string text = zeros(1'000'000);
  expect_survives([&] { tolerate([&] { parse_pattern(text); }); });
}

TEST(Memory, APatternOfManyEmptyArrays) {
  std::string text = R"({"seqlen_q":16,"seqlen_k":16,"block_q":16,"block_k":16,"heads":[)";
  for (int i = 0; i < 500'000; ++i) text += i ? ",[]" : "[]";
  text += "]}";
  expect_survives([&] { tolerate([&] { parse_pattern(text); }); });
}

TEST(Memory, AHeaderOfManyTensors) {
  const std::string header = header_of(30'000);
  const std::string file = test::little_endian(header.size(), 8) + header;
  expect_survives([&] { parse_safetensors(test::as_bytes(file)); });
}

TEST(Memory, WritingAHeaderOfManyTensors) {
  test::TemporaryFolder folder;
  std::map<std::string, Tensor> tensors;
  for (int i = 0; i < 30'000; ++i) tensors.emplace("tensor" + std::to_string(i), Tensor(DType::u8, {0}));
  expect_survives([&] { write_safetensors(folder / "x.safetensors", tensors); });
}

TEST(Memory, WritingAPattern) {
  const BlockPattern pattern = make_pattern(
      {.kind = PatternKind::dense, .seqlen_q = 1 << 14, .seqlen_k = 1 << 14, .block_q = 16, .block_k = 16});
  expect_survives([&] { pattern_json(pattern); });
}

// A file that is all hole has no text: nothing of its size is made. (It was read whole: 6 GB took 6.3 GB and 103 s.)
TEST(Memory, ASparseFileIsNoPattern) {
  test::TemporaryFolder folder;
  const std::string path = folder / "hole.json";
  write_file(path, std::string_view());
  ASSERT_EQ(truncate(path.c_str(), off_t{6} << 30), 0);
  test::expect_error([&] { read_pattern(path); }, "NUL");
}

// Linear in the number of tensors: 40,000 took 33 s when it was quadratic.
TEST(Memory, AHeaderOf40000Tensors) {
  const std::string header = header_of(40'000);
  const std::string file = test::little_endian(header.size(), 8) + header;
  EXPECT_EQ(parse_safetensors(test::as_bytes(file)).size(), 40'000u);
}

}  // namespace
}  // namespace tessera
