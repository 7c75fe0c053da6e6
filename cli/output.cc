#include "output.h"

#include <algorithm>
#include <cerrno>
#include <cmath>

#include <fmt/format.h>

namespace tessera::cli {

void Output::write(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
    throw OutputError(errno, std::generic_category(), "standard output");
  }
}

std::string human_bytes(double bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  while (bytes >= 1024 && unit < 4) {
    bytes /= 1024;
    ++unit;
  }
  if (unit == 0) return fmt::format("{:.0f} B", bytes);
  return fmt::format("{:.{}f} {}", bytes, bytes < 10 ? 2 : 1, kUnits[unit]);
}

namespace {

// File names need not be UTF-8.
std::string json_text(const Record& value, int indent) {
  return value.dump(indent, ' ', false, Record::error_handler_t::replace);
}

std::string plain(const Record& value) {
  if (value.is_null()) return "";
  if (value.is_string()) return value.get<std::string>();
  if (value.is_number_float()) {
    const double x = value.get<double>();
    return std::isfinite(x) ? fmt::format("{}", x) : "";
  }
  return value.dump();
}

std::string csv_field(const Record& value) {
  std::string text = plain(value);
  if (text.find_first_of(",\"\n\r") == std::string::npos) return text;
  std::string quoted = "\"";
  for (char c : text) quoted += c == '"' ? std::string("\"\"") : std::string(1, c);
  return quoted + '"';
}

const Record& field(const Record& record, std::string_view key) {
  static const Record kNone;
  const auto it = record.find(std::string(key));
  return it == record.end() ? kNone : *it;
}

std::string csv_header(std::span<const Column> columns) {
  std::string line;
  for (const Column& c : columns) line += fmt::format("{}{}", line.empty() ? "" : ",", c.key);
  return line + "\n";
}

std::string csv_row(const Record& record, std::span<const Column> columns) {
  std::string line;
  for (size_t i = 0; i < columns.size(); ++i) {
    line += fmt::format("{}{}", i == 0 ? "" : ",", csv_field(field(record, columns[i].key)));
  }
  return line + "\n";
}

std::string table_line(std::span<const Column> columns, auto&& cell) {
  std::string line;
  for (const Column& c : columns) {
    if (c.header.empty()) continue;
    if (!line.empty()) line += "  ";
    const std::string text = cell(c);
    line += c.style == Style::text ? fmt::format("{:<{}}", text, c.width) : fmt::format("{:>{}}", text, c.width);
  }
  while (!line.empty() && line.back() == ' ') line.pop_back();
  return line + "\n";
}

}  // namespace

std::string styled(const Record& value, Style style) {
  if (value.is_null()) return "-";
  if (!value.is_number()) return plain(value);
  const double x = value.get<double>();
  if (!std::isfinite(x)) return "-";
  switch (style) {
    case Style::text:
    case Style::integer: return plain(value);
    case Style::number: return fmt::format("{:.4g}", x);
    case Style::percent: return fmt::format("{:.{}f} %", 100 * x, std::abs(x) < 0.0995 ? 2 : 1);
    case Style::milliseconds: {
      const double ms = 1e3 * x;
      return fmt::format("{:.{}f}", ms, ms < 1 ? 4 : ms < 10 ? 3 : ms < 100 ? 2 : ms < 1000 ? 1 : 0);
    }
    case Style::bytes: return human_bytes(x);
    case Style::error: return fmt::format("{:.1e}", x);
    case Style::ratio: return fmt::format("{:.{}f}x", x, x < 10 ? 2 : 1);
  }
  return plain(value);
}

RecordWriter::RecordWriter(Output& output, Format format, std::span<const Column> columns)
    : output_(output), format_(format), columns_(columns) {}

RecordWriter::~RecordWriter() {
  if (!started_) return;  // an error before the first record: stdout stays empty
  try {
    finish();
  } catch (const OutputError&) {
    // Another error is on its way already.
  }
}

void RecordWriter::add(const Record& record) {
  switch (format_) {
    case Format::table:
      if (!started_) output_.write(table_line(columns_, [](const Column& c) { return std::string(c.header); }));
      output_.write(table_line(columns_, [&](const Column& c) { return styled(field(record, c.key), c.style); }));
      break;
    case Format::json: output_.write((started_ ? ",\n  " : "[\n  ") + json_text(record, -1)); break;
    case Format::csv: output_.write((started_ ? "" : csv_header(columns_)) + csv_row(record, columns_)); break;
  }
  started_ = true;
}

void RecordWriter::finish() {
  if (finished_) return;
  finished_ = true;
  if (format_ == Format::json) output_.write(started_ ? "\n]\n" : "[]\n");
}

void write_json(Output& output, const Record& value) { output.write(json_text(value, 2) + "\n"); }

void write_single(Output& output, Format format, const Record& record, std::span<const Column> columns) {
  switch (format) {
    case Format::json: write_json(output, record); return;
    case Format::csv: output.write(csv_header(columns) + csv_row(record, columns)); return;
    case Format::table: break;
  }
  size_t width = 0;
  for (const Column& c : columns) {
    if (record.contains(std::string(c.key))) width = std::max(width, c.header.size());
  }
  std::string text;
  for (const Column& c : columns) {
    if (c.header.empty() || !record.contains(std::string(c.key))) continue;
    text += fmt::format("{:<{}}  {}\n", c.header, width, styled(field(record, c.key), c.style));
  }
  output.write(text);
}

}  // namespace tessera::cli
