// safetensors: 8 bytes little-endian header length, a JSON header, the data.
#include <algorithm>
#include <array>
#include <cstring>
#include <iterator>
#include <set>
#include <stdexcept>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "io/file.h"
#include "io/json.h"
#include "io/tensor_bytes.h"
#include "tessera/error.h"
#include "tessera/io.h"

namespace tessera {
namespace {

using io::ByteSource;
using io::Json;

constexpr uint64_t kLengthBytes = 8;
constexpr uint64_t kMaxHeader = 100'000'000;  // the limit of the format's own implementation
constexpr int kMaxDepth = 3;                  // the header, a tensor, its shape
constexpr const char* kMetadata = "__metadata__";

struct DTypeName {
  DType dtype;
  std::string_view name;
};
constexpr std::array<DTypeName, 8> kDTypeNames{{{DType::f64, "F64"},
                                                {DType::f32, "F32"},
                                                {DType::f16, "F16"},
                                                {DType::bf16, "BF16"},
                                                {DType::i64, "I64"},
                                                {DType::i32, "I32"},
                                                {DType::u8, "U8"},
                                                {DType::boolean, "BOOL"}}};

struct Header {
  std::vector<TensorInfo> tensors;  // in the order of the data
  Metadata metadata;
};

TensorInfo parse_tensor(const ByteSource& source, const std::string& name, const Json& entry, uint64_t data_begin,
                        uint64_t data_bytes) {
  const std::string where = "tensor " + io::shown(name);
  if (name.find('\0') != std::string::npos) source.reject(where + ": a name must not hold NUL");
  for (const auto& [key, value] : io::object(entry, where)) {
    if (key != "dtype" && key != "shape" && key != "data_offsets") {
      source.reject(where + ": unknown key " + io::shown(key) + "; allowed: dtype, shape, data_offsets");
    }
  }
  TensorInfo info;
  info.name = name;

  const Json& dtype = io::member(entry, "dtype", where);
  const auto* known = std::find_if(kDTypeNames.begin(), kDTypeNames.end(), [&](const DTypeName& candidate) {
    return dtype.string() != nullptr && *dtype.string() == candidate.name;
  });
  if (known == kDTypeNames.end()) {
    source.reject(where + ": dtype: got " + dtype.brief() + "; allowed: F64, F32, F16, BF16, I64, I32, U8, BOOL");
  }
  info.dtype = known->dtype;

  const Json::Integers& shape = io::integers(io::member(entry, "shape", where), where + ": shape");
  if (shape.size() > io::kMaxRank) source.reject(fmt::format("{}: rank {}; allowed: 0 to 32", where, shape.size()));
  for (const int64_t size : shape) info.shape.push_back(io::check_integer(size, where + ": shape", 0, INT64_MAX));
  const std::optional<int64_t> bytes = io::checked_bytes(info.dtype, info.shape);
  if (!bytes) {
    source.reject(fmt::format("{}: shape [{}] does not fit 64 bits", where, fmt::join(info.shape, ", ")));
  }

  const Json::Integers& offsets = io::integers(io::member(entry, "data_offsets", where), where + ": data_offsets");
  if (offsets.size() != 2) {
    source.reject(fmt::format("{}: data_offsets: got {} numbers; allowed: 2", where, offsets.size()));
  }
  const auto limit = static_cast<int64_t>(data_bytes);
  const int64_t begin = io::check_integer(offsets[0], where + ": data_offsets", 0, limit);
  const int64_t end = io::check_integer(offsets[1], where + ": data_offsets", begin, limit);
  if (end - begin != *bytes) {
    source.reject(fmt::format("{}: data_offsets [{}, {}] hold {} bytes, but {} [{}] needs {}", where, begin, end,
                              end - begin, known->name, fmt::join(info.shape, ", "), *bytes));
  }
  info.offset = static_cast<int64_t>(data_begin) + begin;
  info.bytes = *bytes;
  return info;
}

Metadata parse_metadata(const ByteSource& source, const Json& entry) {
  Metadata metadata;
  for (const auto& [key, value] : io::object(entry, kMetadata)) {
    if (value.string() == nullptr) {
      source.reject(fmt::format("{}: {}: got {}; allowed: a string", kMetadata, io::shown(key), value.brief()));
    }
    metadata[key] = *value.string();
  }
  return metadata;
}

Header parse_header(const ByteSource& source) {
  if (source.size() < kLengthBytes) {
    source.reject(fmt::format("not a safetensors file: {} bytes, the header's length alone takes 8", source.size()));
  }
  std::array<unsigned char, kLengthBytes> prefix{};
  source.read(0, std::as_writable_bytes(std::span(prefix)));
  uint64_t length = 0;
  for (size_t i = kLengthBytes; i-- > 0;) length = length << 8 | prefix[i];
  const uint64_t available = source.size() - kLengthBytes;
  if (length > kMaxHeader || length > available) {
    source.reject(fmt::format("header length at byte 0: got {}; allowed: at most {} (the file) and {}", length,
                              available, kMaxHeader));
  }
  std::string text(static_cast<size_t>(length), '\0');
  source.read(kLengthBytes, std::as_writable_bytes(std::span(text)));
  if (text.empty() || text[0] != '{') source.reject("the header at byte 8 does not begin with {");

  Header header;
  const uint64_t data_begin = kLengthBytes + length;
  const uint64_t data_bytes = source.size() - data_begin;
  try {
    const Json root = io::parse_json(text, kMaxDepth);
    for (const auto& [name, entry] : io::object(root, "header")) {
      if (name == kMetadata) {
        header.metadata = parse_metadata(source, entry);
      } else {
        header.tensors.push_back(parse_tensor(source, name, entry, data_begin, data_bytes));
      }
    }
  } catch (const Error& e) {
    if (e.argument() == "path") throw;  // names the file already
    source.reject(std::string("header: ") + e.what());
  }

  // Sorted by place, the tensors must tile the data.
  std::sort(header.tensors.begin(), header.tensors.end(), [](const TensorInfo& a, const TensorInfo& b) {
    return std::tuple(a.offset, a.bytes, std::string_view(a.name)) <
           std::tuple(b.offset, b.bytes, std::string_view(b.name));
  });
  auto at = static_cast<int64_t>(data_begin);
  for (const TensorInfo& info : header.tensors) {
    if (info.offset != at) {
      source.reject(fmt::format("tensor {} begins at byte {}, but the tensors before it end at byte {} ({})",
                                io::shown(info.name), info.offset, at, info.offset < at ? "overlap" : "gap"));
    }
    at += info.bytes;
  }
  if (static_cast<uint64_t>(at) != source.size()) {
    source.reject(
        fmt::format("{} bytes after the last tensor, from byte {}", source.size() - static_cast<uint64_t>(at), at));
  }
  return header;
}

Tensor read_tensor(const ByteSource& source, const TensorInfo& info) {
  Tensor tensor(info.dtype, info.shape);
  source.read(static_cast<uint64_t>(info.offset), tensor.bytes());
  io::check_booleans(source, io::shown(info.name), tensor);
  return tensor;
}

std::map<std::string, Tensor> read_all(const ByteSource& source) {
  std::map<std::string, Tensor> tensors;
  for (const TensorInfo& info : parse_header(source).tensors) tensors.emplace(info.name, read_tensor(source, info));
  return tensors;
}

// A tensor to be written: its shape, and how to get at its elements.
struct Item {
  std::string name;
  DType dtype;
  std::vector<int64_t> shape;
  int64_t bytes = 0;
  std::function<void(io::AtomicFile&)> write;
};

std::string quoted(std::string_view text, const char* argument) {
  try {
    return io::quoted(text);
  } catch (const std::invalid_argument&) {
    fail(argument, io::shown(text) + ", which is not UTF-8", "UTF-8");
  }
}

// The name of the next member of the header.
void append_member(std::string& header, std::string_view name, const char* argument) {
  if (header.size() > 1) header += ',';
  header += quoted(name, argument) + ':';
}

void write_items(const std::string& path, std::vector<Item> items, const Metadata& metadata) {
  // Wide elements first, so that each tensor is aligned to its element (the header is padded to 8).
  std::stable_sort(items.begin(), items.end(),
                   [](const Item& a, const Item& b) { return size_of(a.dtype) > size_of(b.dtype); });
  std::string text = "{";
  std::set<std::string_view> names;
  if (!metadata.empty()) {
    append_member(text, kMetadata, "metadata");
    for (char separator = '{'; const auto& [key, value] : metadata) {
      text += std::exchange(separator, ',');
      text += quoted(key, "metadata") + ':' + quoted(value, "metadata");
    }
    text += '}';
  }
  int64_t offset = 0;
  for (const Item& item : items) {
    if (item.name == kMetadata || item.name.find('\0') != std::string::npos || !names.insert(item.name).second) {
      fail("tensors", "the name " + io::shown(item.name), "names that differ, without NUL, and not __metadata__");
    }
    const auto* known = std::find_if(kDTypeNames.begin(), kDTypeNames.end(),
                                     [&](const DTypeName& candidate) { return candidate.dtype == item.dtype; });
    int64_t end = 0;
    if (__builtin_add_overflow(offset, item.bytes, &end)) fail("tensors", "more than 2^63 bytes", "what a file holds");
    append_member(text, item.name, "tensors");
    fmt::format_to(std::back_inserter(text), "{{\"dtype\":\"{}\",\"shape\":[{}],\"data_offsets\":[{},{}]}}",
                   known->name, fmt::join(item.shape, ","), offset, end);
    offset = end;
  }
  text += '}';
  text.resize((text.size() + 7) / 8 * 8, ' ');
  if (text.size() > kMaxHeader) fail("tensors", fmt::format("a header of {} bytes", text.size()), "at most 100 MB");
  std::string prefix(kLengthBytes, '\0');
  for (size_t i = 0; i < kLengthBytes; ++i) prefix[i] = static_cast<char>(text.size() >> (8 * i) & 0xff);

  io::AtomicFile file(path);
  file.write(prefix);
  file.write(text);
  for (const Item& item : items) item.write(file);
  file.commit();
}

}  // namespace

std::vector<TensorInfo> list_safetensors(const std::string& path) {
  return parse_header(ByteSource::open(path)).tensors;
}

Metadata safetensors_metadata(const std::string& path) { return parse_header(ByteSource::open(path)).metadata; }

std::map<std::string, Tensor> read_safetensors(const std::string& path) { return read_all(ByteSource::open(path)); }

std::map<std::string, Tensor> read_safetensors(const std::string& path, std::span<const std::string> names) {
  const ByteSource source = ByteSource::open(path);
  const Header header = parse_header(source);
  std::map<std::string, Tensor> tensors;
  for (const std::string& name : names) {
    const auto info = std::find_if(header.tensors.begin(), header.tensors.end(),
                                   [&](const TensorInfo& candidate) { return candidate.name == name; });
    if (info == header.tensors.end()) {
      std::string listed;
      for (size_t i = 0; i < header.tensors.size() && i < 20; ++i) {
        listed += (i ? ", " : "") + io::shown(header.tensors[i].name);
      }
      if (header.tensors.size() > 20) listed += ", ...";
      source.reject("no tensor " + io::shown(name) + "; it has: " + (listed.empty() ? "none" : listed));
    }
    if (!tensors.contains(name)) tensors.emplace(name, read_tensor(source, *info));
  }
  return tensors;
}

std::map<std::string, Tensor> parse_safetensors(std::span<const std::byte> file) {
  return read_all(ByteSource::memory(file));
}

void write_safetensors(const std::string& path, const std::vector<NamedTensor>& tensors, const Metadata& metadata) {
  std::vector<Item> items;
  for (const NamedTensor& tensor : tensors) {
    const TensorView view = tensor.view;
    io::check_writable("tensor " + io::shown(tensor.name), view);
    Item item{tensor.name, view.dtype, {view.sizes.begin(), view.sizes.begin() + view.rank}, 0, nullptr};
    item.bytes = *io::checked_bytes(item.dtype, item.shape);
    item.write = [view](io::AtomicFile& file) {
      io::for_each_chunk(view, [&](std::span<const std::byte> bytes) { file.write(bytes); });
    };
    items.push_back(std::move(item));
  }
  write_items(path, std::move(items), metadata);
}

void write_safetensors(const std::string& path, const std::map<std::string, Tensor>& tensors,
                       const Metadata& metadata) {
  std::vector<Item> items;
  for (const auto& [name, tensor] : tensors) {
    items.push_back({name, tensor.dtype(), tensor.shape(), static_cast<int64_t>(tensor.size_bytes()),
                     [&tensor = tensor](io::AtomicFile& file) { file.write(tensor.bytes()); }});
  }
  write_items(path, std::move(items), metadata);
}

}  // namespace tessera
