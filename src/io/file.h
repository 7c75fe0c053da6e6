// Bytes in and out: a source that knows its size before anything is read, and a file that appears whole or not at all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include <sys/types.h>

namespace tessera::io {

// Text from a file as it may stand in a message: printable, at most ~80 characters.
std::string shown(std::string_view text);

// A file or a piece of memory. Reads beyond the end are an Error, never short.
class ByteSource {
 public:
  static ByteSource open(const std::string& path);
  static ByteSource memory(std::span<const std::byte> bytes);
  ByteSource(ByteSource&& other) noexcept;
  ByteSource& operator=(ByteSource&&) = delete;
  ~ByteSource();

  uint64_t size() const { return size_; }
  void read(uint64_t offset, std::span<std::byte> out) const;
  // Throws Error("<name>: <what>").
  [[noreturn]] void reject(const std::string& what) const;

 private:
  ByteSource() = default;
  std::string name_;
  int fd_ = -1;  // -1: memory
  std::span<const std::byte> memory_;
  uint64_t size_ = 0;
};

// Writes into a file without a name in the folder of `path`; commit() syncs it and puts it at `path`. Without commit()
// nothing is left of it, however the process ends, and what stood at `path` is untouched. Where the file system knows
// no files without names it has a temporary one, which remove_temporary_files() knows. Inside a WriteTogether, commit()
// only syncs, and WriteTogether::commit() puts it in its place.
class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path);
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  AtomicFile(AtomicFile&& other) noexcept;
  ~AtomicFile();

  void write(std::span<const std::byte> bytes);
  void write(std::string_view text) { write(std::as_bytes(std::span(text.data(), text.size()))); }
  void commit();
  void put_in_place();  // of a synced one

 private:
  [[noreturn]] void fail_system(const std::string& what) const;
  void open_temporary(mode_t mode);
  void name_temporary();

  std::string path_;       // as the caller named it
  std::string target_;     // with symbolic links followed
  std::string temporary_;  // empty: without a name
  int fd_ = -1;
};

}  // namespace tessera::io
