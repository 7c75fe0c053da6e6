#include "io/file.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <system_error>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tessera/error.h"
#include "tessera/io.h"

namespace tessera::io {
namespace {

// read() and write() take at most 0x7ffff000 bytes at once on Linux.
constexpr size_t kChunk = size_t{1} << 30;

std::string system_message(int code) { return std::generic_category().message(code); }

std::string folder_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

std::string temporary_name(const std::string& folder) {
  static std::atomic<uint64_t> counter{0};
  return fmt::format("{}/.tessera-{}-{}.tmp", folder, ::getpid(), counter++);
}

// Names of temporary files that exist, for a signal handler: it may come at any moment, on any thread.
class Unfinished {
 public:
  void enter(const std::string& name) {
    if (name.size() >= sizeof(Slot::name)) return;
    for (Slot& slot : slots_) {
      int expected = kFree;
      if (!slot.state.compare_exchange_strong(expected, kChanging)) continue;
      std::memcpy(slot.name, name.c_str(), name.size() + 1);
      slot.state = kHeld;
      return;
    }
  }
  void leave(const std::string& name) {
    for (Slot& slot : slots_) {
      int expected = kHeld;
      if (slot.state != kHeld || name != slot.name) continue;
      if (slot.state.compare_exchange_strong(expected, kFree)) return;
    }
  }
  void remove_all() const {
    for (const Slot& slot : slots_) {
      if (slot.state == kHeld) ::unlink(slot.name);
    }
  }

 private:
  enum State { kFree, kChanging, kHeld };
  struct Slot {
    std::atomic<int> state{kFree};
    char name[4096] = {};
  };
  std::array<Slot, 16> slots_;
};
constinit Unfinished unfinished_files;  // there before a handler may ask
Unfinished& unfinished() { return unfinished_files; }

// Where this thread's WriteTogether collects.
thread_local std::vector<AtomicFile>* together = nullptr;

}  // namespace

std::string shown(std::string_view text) {
  std::string out = "\"";
  for (char c : text.substr(0, 80)) {
    if (c >= 0x20 && c < 0x7f) {
      out += c;
    } else {
      out += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
    }
  }
  return out + (text.size() > 80 ? "...\"" : "\"");
}

ByteSource ByteSource::open(const std::string& path) {
  ByteSource source;
  source.name_ = path;
  // A name with a NUL would open the file named by its first part.
  if (path.empty() || path.find('\0') != std::string::npos) {
    throw Error("path", "path: got " + shown(path) + "; allowed: the name of a file");
  }
  source.fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a FIFO must not block here
  if (source.fd_ < 0) source.reject("cannot be opened: " + system_message(errno));
  struct stat info {};
  if (::fstat(source.fd_, &info) != 0) source.reject("cannot be examined: " + system_message(errno));
  if (!S_ISREG(info.st_mode)) source.reject("is not a regular file");
  source.size_ = static_cast<uint64_t>(info.st_size);
  return source;
}

ByteSource ByteSource::memory(std::span<const std::byte> bytes) {
  ByteSource source;
  source.name_ = "file in memory";
  source.memory_ = bytes;
  source.size_ = bytes.size();
  return source;
}

ByteSource::ByteSource(ByteSource&& other) noexcept
    : name_(std::move(other.name_)), fd_(std::exchange(other.fd_, -1)), memory_(other.memory_), size_(other.size_) {}

ByteSource::~ByteSource() {
  if (fd_ >= 0) ::close(fd_);
}

void ByteSource::reject(const std::string& what) const { throw Error("path", name_ + ": " + what); }

void ByteSource::read(uint64_t offset, std::span<std::byte> out) const {
  if (offset > size_ || out.size() > size_ - offset) {
    reject(fmt::format("ends at byte {}, but bytes {} to {} are needed", size_, offset, offset + out.size()));
  }
  if (out.empty()) return;
  if (fd_ < 0) {
    std::memcpy(out.data(), memory_.data() + offset, out.size());
    return;
  }
  for (size_t done = 0; done < out.size();) {
    const ssize_t n =
        ::pread(fd_, out.data() + done, std::min(kChunk, out.size() - done), static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) reject(fmt::format("cannot be read at byte {}: {}", offset + done, system_message(errno)));
    if (n == 0) reject(fmt::format("became shorter while it was read (at byte {})", offset + done));
    done += static_cast<size_t>(n);
  }
}

void AtomicFile::fail_system(const std::string& what) const {
  throw Error("path", path_ + ": " + what + ": " + system_message(errno));
}

AtomicFile::AtomicFile(const std::string& path) : path_(path), target_(path) {
  if (path.empty() || path.find('\0') != std::string::npos || path.back() == '/') {
    throw Error("path", "path: got " + shown(path) + "; allowed: the name of a file");
  }
  // A rename would replace a link or a device itself, which nobody means.
  mode_t mode = 0666;
  bool exists = false;
  struct stat info {};
  if (::lstat(path.c_str(), &info) == 0) {
    if (S_ISLNK(info.st_mode)) {
      const std::unique_ptr<char, void (*)(void*)> real(::realpath(path.c_str(), nullptr), &std::free);
      if (!real) fail_system("is a link that leads nowhere");
      target_ = real.get();
      if (::stat(target_.c_str(), &info) != 0) fail_system("cannot be examined");
    }
    if (!S_ISREG(info.st_mode)) throw Error("path", path_ + ": exists and is not a regular file");
    mode = info.st_mode & 0777;
    exists = true;
  }
  // Private until its mode is known to be another; never more than the old file's, nor set-user-id: the owner is new.
  open_temporary(exists ? 0600 : 0666);
  if (exists) (void)::fchmod(fd_, mode);  // somebody else's file system may not know modes: the content counts
}

void AtomicFile::open_temporary(mode_t mode) {
#ifdef O_TMPFILE
  fd_ = ::open(folder_of(target_).c_str(), O_TMPFILE | O_WRONLY | O_CLOEXEC, mode);
  if (fd_ >= 0) return;
#endif
  for (int attempt = 0; attempt < 1000; ++attempt) {
    temporary_ = temporary_name(folder_of(target_));
    unfinished().enter(temporary_);
    fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
    if (fd_ >= 0) return;
    const int code = errno;
    unfinished().leave(temporary_);
    temporary_.clear();
    errno = code;
    if (code != EEXIST) break;
  }
  fail_system("cannot be written (no temporary file beside it)");
}

AtomicFile::AtomicFile(AtomicFile&& other) noexcept
    : path_(std::move(other.path_)),
      target_(std::move(other.target_)),
      temporary_(std::exchange(other.temporary_, {})),
      fd_(std::exchange(other.fd_, -1)) {}

AtomicFile::~AtomicFile() {
  if (fd_ >= 0) ::close(fd_);
  if (temporary_.empty()) return;
  ::unlink(temporary_.c_str());
  unfinished().leave(temporary_);
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  for (size_t done = 0; done < bytes.size();) {
    const ssize_t n = ::write(fd_, bytes.data() + done, std::min(kChunk, bytes.size() - done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_system("cannot be written");
    done += static_cast<size_t>(n);
  }
}

void AtomicFile::commit() {
  if (::fsync(fd_) != 0) fail_system("cannot be synced");
  if (together != nullptr) {
    together->push_back(std::move(*this));
  } else {
    put_in_place();
  }
}

// A name for the file that has none, which only a rename can put over another.
void AtomicFile::name_temporary() {
  const std::string from = fmt::format("/proc/self/fd/{}", fd_);
  for (int attempt = 0; attempt < 1000; ++attempt) {
    std::string name = temporary_name(folder_of(target_));
    unfinished().enter(name);
    if (::linkat(AT_FDCWD, from.c_str(), AT_FDCWD, name.c_str(), AT_SYMLINK_FOLLOW) == 0) {
      temporary_ = std::move(name);
      return;
    }
    const int code = errno;
    unfinished().leave(name);
    errno = code;
    if (code != EEXIST) break;
  }
  fail_system("cannot be renamed into place");
}

void AtomicFile::put_in_place() {
  if (temporary_.empty()) name_temporary();
  const int fd = std::exchange(fd_, -1);
  if (::close(fd) != 0) fail_system("cannot be written");
  if (::rename(temporary_.c_str(), target_.c_str()) != 0) fail_system("cannot be renamed into place");
  unfinished().leave(temporary_);
  temporary_.clear();
  // The file is whole by now; the folder's sync only makes the name survive a power cut.
  const int folder = ::open(folder_of(target_).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder >= 0) {
    (void)::fsync(folder);
    ::close(folder);
  }
}

}  // namespace tessera::io

namespace tessera {

struct WriteTogether::Files {
  std::vector<io::AtomicFile> list;
};

WriteTogether::WriteTogether() : files_(std::make_unique<Files>()) {
  if (io::together != nullptr) fail("WriteTogether", "a second one on this thread", "one at a time");
  io::together = &files_->list;
}

WriteTogether::~WriteTogether() {
  if (files_ != nullptr) io::together = nullptr;
}

void WriteTogether::commit() {
  io::together = nullptr;
  const std::unique_ptr<Files> files = std::move(files_);
  for (io::AtomicFile& file : files->list) file.put_in_place();
}

void remove_temporary_files() { io::unfinished().remove_all(); }

void write_file(const std::string& path, std::span<const std::byte> content) {
  io::AtomicFile file(path);
  file.write(content);
  file.commit();
}

void write_file(const std::string& path, std::string_view content) {
  write_file(path, std::as_bytes(std::span(content.data(), content.size())));
}

}  // namespace tessera
