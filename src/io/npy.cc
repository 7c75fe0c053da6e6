// .npy: magic, version, header length, a Python dict literal, the data.
#include <algorithm>
#include <array>
#include <optional>

#include <fmt/format.h>

#include "io/file.h"
#include "io/tensor_bytes.h"
#include "tessera/error.h"
#include "tessera/io.h"

namespace tessera {
namespace {

using io::ByteSource;

constexpr std::string_view kMagic = "\x93NUMPY";
constexpr uint64_t kMaxHeader = 1 << 20;  // numpy's own default is 10,000 characters
constexpr size_t kAlignment = 64;         // of the data in the file

struct DTypeDescr {
  DType dtype;
  std::string_view descr;
};
constexpr std::array<DTypeDescr, 7> kDescrs{{{DType::f64, "<f8"},
                                             {DType::f32, "<f4"},
                                             {DType::f16, "<f2"},
                                             {DType::i64, "<i8"},
                                             {DType::i32, "<i4"},
                                             {DType::u8, "|u1"},
                                             {DType::boolean, "|b1"}}};

// The header is a dict of exactly 'descr', 'fortran_order', 'shape', in any order, and blanks up to a newline.
class HeaderParser {
 public:
  HeaderParser(const ByteSource& source, std::string_view text, uint64_t file_offset)
      : source_(source), text_(text), file_offset_(file_offset) {}

  std::optional<std::string> descr;
  std::optional<bool> fortran_order;
  std::optional<std::vector<int64_t>> shape;

  void parse() {
    expect('{');
    while (!accept('}')) {
      const std::string key = string();
      expect(':');
      if (key == "descr" && !descr) {
        if (peek() == '[') reject("structured dtypes are not supported");
        descr = string();
      } else if (key == "fortran_order" && !fortran_order) {
        fortran_order = boolean();
      } else if (key == "shape" && !shape) {
        shape = tuple();
      } else {
        reject("key " + io::shown(key) + "; allowed: 'descr', 'fortran_order', 'shape', each once");
      }
      if (!accept(',')) {
        expect('}');
        break;
      }
    }
    peek();
    if (at_ != text_.size()) reject("text after the dict");
    if (!descr || !fortran_order || !shape) reject("'descr', 'fortran_order' and 'shape' must all be there");
  }

 private:
  [[noreturn]] void reject(const std::string& what) const {
    source_.reject(fmt::format("npy header at byte {}: {}", file_offset_ + at_, what));
  }
  char peek() {  // of what is not blank; NUL at the end
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\t' || text_[at_] == '\n')) ++at_;
    return at_ < text_.size() ? text_[at_] : '\0';
  }
  bool accept(char c) {
    if (peek() != c || at_ == text_.size()) return false;
    ++at_;
    return true;
  }
  void expect(char c) {
    if (!accept(c)) reject(std::string("expected '") + c + "'");
  }
  std::string string() {
    const char quote = peek();
    if (quote != '\'' && quote != '"') reject("expected a string");
    const size_t begin = ++at_;
    while (at_ < text_.size() && text_[at_] != quote) {
      if (text_[at_] == '\\' || text_[at_] == '\n') reject("unexpected character in a string");
      ++at_;
    }
    if (at_ == text_.size()) reject("a string without end");
    return std::string(text_.substr(begin, at_++ - begin));
  }
  bool boolean() {
    peek();
    for (const bool value : {false, true}) {
      const std::string_view word = value ? "True" : "False";
      if (text_.substr(at_, word.size()) == word) {
        at_ += word.size();
        return value;
      }
    }
    reject("expected True or False");
  }
  int64_t number() {
    const char first = peek();
    if (first < '0' || first > '9') reject("expected a size, a decimal number >= 0");
    int64_t value = 0;
    for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_) {
      if (__builtin_mul_overflow(value, int64_t{10}, &value) ||
          __builtin_add_overflow(value, int64_t{text_[at_] - '0'}, &value)) {
        reject("a size beyond 64 bits");
      }
    }
    return value;
  }
  std::vector<int64_t> tuple() {
    std::vector<int64_t> sizes;
    expect('(');
    while (!accept(')')) {
      if (sizes.size() == io::kMaxRank) reject("rank above 32");
      sizes.push_back(number());
      if (accept(',')) continue;
      // Python: (3) is a number, (3,) is a tuple.
      if (sizes.size() == 1) reject("expected ',': a tuple of one is (n,)");
      expect(')');
      break;
    }
    return sizes;
  }

  const ByteSource& source_;
  std::string_view text_;
  uint64_t file_offset_;
  size_t at_ = 0;
};

DType dtype_of(const ByteSource& source, const std::string& descr) {
  for (const DTypeDescr& known : kDescrs) {
    if (known.descr == descr) return known.dtype;
  }
  std::string why;
  if (descr.find('O') != std::string::npos) {
    why = " (pickled objects are not read: they could run code)";
  } else if (!descr.empty() && descr[0] == '>') {
    why = " (big-endian)";
  }
  source.reject("npy dtype: got " + io::shown(descr) + why + "; allowed: <f8, <f4, <f2, <i8, <i4, |u1, |b1");
}

Tensor read(const ByteSource& source) {
  const uint64_t fixed = kMagic.size() + 2;
  std::array<char, 12> start{};
  if (source.size() < fixed + 2) source.reject(fmt::format("not an npy file: {} bytes", source.size()));
  source.read(0, std::as_writable_bytes(std::span(start)).first(fixed + 2));
  if (std::string_view(start.data(), kMagic.size()) != kMagic) source.reject("not an npy file: no magic at byte 0");
  const int major = static_cast<unsigned char>(start[6]);
  const int minor = static_cast<unsigned char>(start[7]);
  if (major < 1 || major > 3 || minor != 0) {
    source.reject(fmt::format("npy version at byte 6: got {}.{}; allowed: 1.0, 2.0, 3.0", major, minor));
  }
  const size_t length_bytes = major == 1 ? 2 : 4;
  source.read(fixed, std::as_writable_bytes(std::span(start)).subspan(fixed, length_bytes));
  uint64_t length = 0;
  for (size_t i = length_bytes; i-- > 0;) length = length << 8 | static_cast<unsigned char>(start[fixed + i]);
  const uint64_t header_begin = fixed + length_bytes;
  const uint64_t available = source.size() - header_begin;
  if (length > available || length > kMaxHeader) {
    source.reject(fmt::format("npy header length at byte 8: got {}; allowed: at most {} (the file) and {}", length,
                              available, kMaxHeader));
  }
  std::string text(static_cast<size_t>(length), '\0');
  source.read(header_begin, std::as_writable_bytes(std::span(text)));
  if (text.empty() || text.back() != '\n') source.reject("the npy header does not end with a newline");

  HeaderParser header(source, text, header_begin);
  header.parse();
  const DType dtype = dtype_of(source, *header.descr);
  if (*header.fortran_order && header.shape->size() > 1) {
    source.reject("fortran_order: got True; allowed: False (save numpy.ascontiguousarray(x))");
  }
  const std::optional<int64_t> bytes = io::checked_bytes(dtype, *header.shape);
  if (!bytes) source.reject("npy shape: the bytes do not fit 64 bits");
  const uint64_t have = available - length;
  if (static_cast<uint64_t>(*bytes) != have) {
    source.reject(fmt::format("shape and dtype need {} bytes from byte {}, but {} are there ({})", *bytes,
                              header_begin + length, have,
                              have < static_cast<uint64_t>(*bytes) ? "truncated" : "bytes left over"));
  }
  Tensor tensor(dtype, *header.shape);
  source.read(header_begin + length, tensor.bytes());
  io::check_booleans(source, "", tensor);
  return tensor;
}

std::string header_of(DType dtype, std::span<const int64_t> shape) {
  const auto* known = std::find_if(kDescrs.begin(), kDescrs.end(),
                                   [&](const DTypeDescr& candidate) { return candidate.dtype == dtype; });
  if (known == kDescrs.end()) {
    fail("tensor", std::string(name_of(dtype)),
         "fp64, fp32, fp16, int64, int32, uint8, bool: npy has no bf16, use safetensors");
  }
  if (shape.size() > io::kMaxRank) fail("tensor", fmt::format("rank {}", shape.size()), "rank 0 to 32");
  std::string sizes;
  for (size_t i = 0; i < shape.size(); ++i) sizes += fmt::format("{}{}", i ? ", " : "", shape[i]);
  if (shape.size() == 1) sizes += ",";
  std::string dict = fmt::format("{{'descr': '{}', 'fortran_order': False, 'shape': ({}), }}", known->descr, sizes);
  const size_t fixed = kMagic.size() + 4;
  const size_t total = (fixed + dict.size() + 1 + kAlignment - 1) / kAlignment * kAlignment;
  dict.resize(total - fixed - 1, ' ');
  dict += '\n';
  std::string header(kMagic);
  header += '\1';
  header += '\0';
  header += static_cast<char>(dict.size() & 0xff);
  header += static_cast<char>(dict.size() >> 8);
  return header + dict;
}

}  // namespace

Tensor read_npy(const std::string& path) { return read(ByteSource::open(path)); }

Tensor parse_npy(std::span<const std::byte> file) { return read(ByteSource::memory(file)); }

void write_npy(const std::string& path, TensorView tensor) {
  io::check_writable("tensor", tensor);
  const std::string header = header_of(tensor.dtype, {tensor.sizes.data(), static_cast<size_t>(tensor.rank)});
  io::AtomicFile file(path);
  file.write(header);
  io::for_each_chunk(tensor, [&](std::span<const std::byte> bytes) { file.write(bytes); });
  file.commit();
}

void write_npy(const std::string& path, const Tensor& tensor) {
  const std::string header = header_of(tensor.dtype(), tensor.shape());
  io::AtomicFile file(path);
  file.write(header);
  file.write(tensor.bytes());
  file.commit();
}

}  // namespace tessera
