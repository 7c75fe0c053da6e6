// Patterns as JSON; the format stands in tessera/io.h.
#include <algorithm>
#include <climits>
#include <iterator>

#include <fmt/format.h>

#include "io/file.h"
#include "io/json.h"
#include "tessera/error.h"
#include "tessera/io.h"

namespace tessera {
namespace {

using io::Json;

constexpr int kMaxDepth = 4;                      // the file, "heads", an entry, its indptr
constexpr int64_t kMaxSeqlen = int64_t{1} << 40;  // far beyond any use, and sums and roundings stay inside 64 bits

void allow_keys(const Json& object, const std::string& where, std::initializer_list<std::string_view> allowed) {
  for (const auto& [key, value] : io::object(object, where)) {
    if (std::find(allowed.begin(), allowed.end(), key) == allowed.end()) {
      std::string list;
      for (std::string_view name : allowed) list.append(list.empty() ? "" : ", ").append(name);
      fail(where, "the key " + io::shown(key), list);
    }
  }
}

// One token row of a bitmap, block_k bits, most significant digit first, into words of 64 bits.
void parse_bitmap_row(const Json& row, const std::string& where, int block_k, std::vector<uint64_t>& words) {
  const size_t digits = static_cast<size_t>(block_k) / 4;
  if (row.string() == nullptr || row.string()->size() != digits) {
    fail(where, row.brief(), fmt::format("a string of block_k / 4 = {} hex digits", digits));
  }
  const std::string& text = *row.string();
  const size_t begin = words.size();
  words.resize(begin + static_cast<size_t>(block_k + 63) / 64, 0);
  for (size_t i = 0; i < digits; ++i) {
    const char c = text[digits - 1 - i];
    uint64_t value = 0;
    if (c >= '0' && c <= '9') {
      value = static_cast<uint64_t>(c - '0');
    } else if (c >= 'a' && c <= 'f') {
      value = static_cast<uint64_t>(c - 'a' + 10);
    } else {
      fail(where, row.brief(), "digits 0-9 and a-f");
    }
    words[begin + i / 16] |= value << (i % 16 * 4);
  }
}

std::vector<uint64_t> parse_bitmaps(const Json& list, const PatternShape& shape) {
  std::vector<uint64_t> words;
  const Json::Items& bitmaps = io::items(list, "bitmaps");
  for (size_t n = 0; n < bitmaps.size(); ++n) {
    const std::string where = fmt::format("bitmaps[{}]", n);
    const Json::Items& rows = io::items(bitmaps[n], where);
    if (rows.size() != static_cast<size_t>(shape.block_q)) {
      fail(where, fmt::format("{} rows", rows.size()), fmt::format("block_q = {} rows", shape.block_q));
    }
    for (const Json& row : rows) parse_bitmap_row(row, where, shape.block_k, words);
  }
  return words;
}

struct Csr {
  std::vector<int64_t> indptr{0};
  std::vector<int32_t> indices;
  std::vector<int32_t> bitmap_index;  // empty, or as long as indices
};

void append_head(const Json& entry, const std::string& where, const PatternShape& shape, Csr& csr) {
  allow_keys(entry, where, {"indptr", "indices", "bitmap_index"});
  const Json::Integers& indptr = io::integers(io::member(entry, "indptr", where), where + ".indptr");
  const Json::Integers& indices = io::integers(io::member(entry, "indices", where), where + ".indices");
  const auto count = static_cast<int64_t>(indices.size());
  if (indptr.size() != static_cast<size_t>(shape.rows()) + 1) {
    fail(where + ".indptr", fmt::format("{} numbers", indptr.size()), fmt::format("rows + 1 = {}", shape.rows() + 1));
  }
  const auto base = static_cast<int64_t>(csr.indices.size());
  for (const int64_t& value : indptr) {
    const int64_t begin = io::check_integer(value, where + ".indptr", 0, count);
    if (&value == &indptr.front()) {
      if (begin != 0) fail(where + ".indptr", fmt::format("{} first", begin), "0 first");
    } else {
      csr.indptr.push_back(base + begin);
    }
  }
  if (csr.indptr.back() - base != count) {
    fail(where + ".indptr", fmt::format("{} last", csr.indptr.back() - base), fmt::format("the {} indices", count));
  }
  const int64_t last_col = std::min<int64_t>(shape.cols() - 1, INT32_MAX);
  for (const int64_t value : indices) {
    csr.indices.push_back(static_cast<int32_t>(io::check_integer(value, where + ".indices", 0, last_col)));
  }
  const Json* given = entry.find("bitmap_index");
  if (given == nullptr) {
    if (!csr.bitmap_index.empty()) csr.bitmap_index.resize(csr.indices.size(), -1);
    return;
  }
  const Json::Integers& bitmap_index = io::integers(*given, where + ".bitmap_index");
  if (bitmap_index.size() != indices.size()) {
    fail(where + ".bitmap_index", fmt::format("{} numbers", bitmap_index.size()),
         fmt::format("{}, one a block", count));
  }
  csr.bitmap_index.resize(static_cast<size_t>(base), -1);
  for (const int64_t value : bitmap_index) {
    csr.bitmap_index.push_back(static_cast<int32_t>(io::check_integer(value, where + ".bitmap_index", -1, INT32_MAX)));
  }
}

void append_bitmap(std::string& text, const uint64_t* bitmap, const PatternShape& shape) {
  text += '[';
  for (int row = 0; row < shape.block_q; ++row) {
    const uint64_t* words = bitmap + row * shape.bitmap_words();
    text += row ? ",\"" : "\"";
    for (int digit = shape.block_k / 4 - 1; digit >= 0; --digit) {
      text += "0123456789abcdef"[words[digit / 16] >> (digit % 16 * 4) & 15];
    }
    text += '"';
  }
  text += ']';
}

template <class T>
void append_numbers(std::string& text, const char* key, const T* begin, const T* end, T base) {
  fmt::format_to(std::back_inserter(text), "\"{}\":[", key);
  for (const T* p = begin; p != end; ++p) {
    const fmt::format_int number(*p - base);
    if (p != begin) text += ',';
    text.append(number.data(), number.size());
  }
  text += ']';
}

}  // namespace

BlockPattern parse_pattern(std::string_view text) {
  const Json root = io::parse_json(text, kMaxDepth);
  allow_keys(
      root, "pattern",
      {"seqlen_q", "seqlen_k", "block_q", "block_k", "causal", "q_offset", "q_skip", "batches", "heads", "bitmaps"});
  PatternShape shape;
  shape.seqlen_q = io::integer(io::member(root, "seqlen_q", "pattern"), "seqlen_q", 0, kMaxSeqlen);
  shape.seqlen_k = io::integer(io::member(root, "seqlen_k", "pattern"), "seqlen_k", 0, kMaxSeqlen);
  for (const auto& [key, block] : {std::pair{"block_q", &shape.block_q}, std::pair{"block_k", &shape.block_k}}) {
    *block = static_cast<int>(io::integer(io::member(root, key, "pattern"), key, 16, 256));
    if (*block % 16 != 0) fail(key, std::to_string(*block), "a multiple of 16 in 16..256");
  }
  if (const Json* causal = root.find("causal")) {
    if (causal->boolean() == nullptr) fail("causal", causal->brief(), "true or false");
    shape.causal = *causal->boolean();
  }
  if (const Json* at = root.find("q_offset")) shape.q_offset = io::integer(*at, "q_offset", -kMaxSeqlen, kMaxSeqlen);
  if (const Json* skip = root.find("q_skip")) {
    shape.q_skip = static_cast<int>(io::integer(*skip, "q_skip", 0, shape.block_q - 1));
  }
  const Json::Items& heads = io::items(io::member(root, "heads", "pattern"), "heads");
  if (const Json* batches = root.find("batches")) shape.batches = io::integer(*batches, "batches", 1, INT32_MAX);
  const auto entries = static_cast<int64_t>(heads.size());
  if (entries == 0 || entries % shape.batches != 0) {
    fail("heads", fmt::format("{} entries", entries),
         fmt::format("a multiple of the {} batches, at least 1", shape.batches));
  }
  shape.heads = entries / shape.batches;

  Csr csr;
  for (int64_t i = 0; i < entries; ++i) append_head(heads[i], fmt::format("heads[{}]", i), shape, csr);
  std::vector<uint64_t> bitmaps;
  if (const Json* list = root.find("bitmaps")) bitmaps = parse_bitmaps(*list, shape);
  return BlockPattern::from_csr(shape, std::move(csr.indptr), std::move(csr.indices), std::move(csr.bitmap_index),
                                std::move(bitmaps));
}

BlockPattern read_pattern(const std::string& path) {
  // A piece at a time: no file makes more memory than it holds text, and binary ones end at their first piece.
  constexpr uint64_t kPiece = 1 << 20;
  const io::ByteSource source = io::ByteSource::open(path);
  std::string text;
  while (text.size() < source.size()) {
    const size_t begin = text.size();
    text.resize(begin + std::min(kPiece, source.size() - begin));
    source.read(begin, std::as_writable_bytes(std::span(text).subspan(begin)));
    const size_t nul = text.find('\0', begin);
    if (nul != std::string::npos)
      source.reject(fmt::format("got NUL, not JSON, at byte {}; allowed: JSON in UTF-8", nul));
  }
  try {
    return parse_pattern(text);
  } catch (const Error& e) {
    throw Error(e.argument(), path + ": " + e.what());
  }
}

std::string pattern_json(const BlockPattern& pattern) {
  const PatternShape& shape = pattern.shape();
  const BlockPatternView view = pattern.view();
  std::string text = fmt::format("{{\"seqlen_q\":{},\"seqlen_k\":{},\"block_q\":{},\"block_k\":{}", shape.seqlen_q,
                                 shape.seqlen_k, shape.block_q, shape.block_k);
  if (shape.causal) text += ",\"causal\":true";
  if (shape.q_offset) fmt::format_to(std::back_inserter(text), ",\"q_offset\":{}", *shape.q_offset);
  if (shape.q_skip != 0) fmt::format_to(std::back_inserter(text), ",\"q_skip\":{}", shape.q_skip);
  if (shape.batches != 1) fmt::format_to(std::back_inserter(text), ",\"batches\":{}", shape.batches);
  text += ",\"heads\":[";
  for (int64_t i = 0; i < shape.batches * shape.heads; ++i) {
    const int64_t* indptr = view.indptr + i * shape.rows();
    const int64_t begin = indptr[0], end = indptr[shape.rows()];
    text += i ? ",\n{" : "\n{";
    append_numbers<int64_t>(text, "indptr", indptr, indptr + shape.rows() + 1, begin);
    text += ',';
    append_numbers<int32_t>(text, "indices", view.indices + begin, view.indices + end, 0);
    if (view.bitmap_index != nullptr) {
      text += ',';
      append_numbers<int32_t>(text, "bitmap_index", view.bitmap_index + begin, view.bitmap_index + end, 0);
    }
    text += '}';
  }
  text += ']';
  if (pattern.num_bitmaps() > 0) {
    text += ",\n\"bitmaps\":[";
    const int64_t words = int64_t{shape.block_q} * shape.bitmap_words();
    for (int64_t n = 0; n < pattern.num_bitmaps(); ++n) {
      text += n ? ",\n" : "\n";
      append_bitmap(text, view.bitmaps + n * words, shape);
    }
    text += ']';
  }
  text += "}\n";
  return text;
}

void write_pattern(const std::string& path, const BlockPattern& pattern) { write_file(path, pattern_json(pattern)); }

}  // namespace tessera
