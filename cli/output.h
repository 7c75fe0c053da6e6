// Results on stdout: records as a table for people, as JSON or as CSV.
#pragma once

#include <cstdio>
#include <span>
#include <string>
#include <string_view>
#include <system_error>

#include <nlohmann/json.hpp>

namespace tessera::cli {

enum class Format { table, json, csv };

using Record = nlohmann::ordered_json;

// stdout could not be written. A reader that closed its end early is no mistake of anybody: no message then.
struct OutputError : std::system_error {
  using std::system_error::system_error;
  bool closed_by_reader() const { return code() == std::errc::broken_pipe; }
};

class Output {
 public:
  void write(std::string_view text);  // whole, flushed; throws OutputError
};

enum class Style {
  text,
  integer,
  number,        // four significant digits
  percent,       // of a ratio
  milliseconds,  // of seconds
  bytes,
  error,  // 1.2e-07
  ratio,  // 3.4x
};
std::string styled(const Record& value, Style style);
std::string human_bytes(double bytes);

struct Column {
  std::string_view key;
  std::string_view header;  // empty: only in JSON and CSV
  int width = 0;            // of the table's column
  Style style = Style::text;
};

// Writes records one by one, as they are ready. JSON: an array, closed by finish() or, when an error ends the
// command after the first record, by the destructor, so that what was measured is still readable.
class RecordWriter {
 public:
  RecordWriter(Output& output, Format format, std::span<const Column> columns);
  ~RecordWriter();
  RecordWriter(const RecordWriter&) = delete;
  RecordWriter& operator=(const RecordWriter&) = delete;
  void add(const Record& record);
  void finish();

 private:
  Output& output_;
  Format format_;
  std::span<const Column> columns_;
  bool started_ = false, finished_ = false;
};

// One record alone: a list of its fields, a JSON object, or CSV with one row.
void write_single(Output& output, Format format, const Record& record, std::span<const Column> columns);

// JSON as it is, indented, with a newline.
void write_json(Output& output, const Record& value);

}  // namespace tessera::cli
