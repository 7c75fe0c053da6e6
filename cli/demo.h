// The parts of `tessera demo`: what they measure, as records, and how they are shown.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "command.h"
#include "options.h"
#include "tensors.h"
#include "tessera/analysis.h"
#include "tessera/executor.h"

namespace tessera::cli {

// One pattern that the demo judges on the sample.
struct DemoPattern {
  std::string name;      // of the preset or the pattern
  PatternChoice choice;  // a pattern, or dilated attention with it
  BlockPattern pattern;  // of dilated attention: the pairs of tokens that it admits
  double density = 0;    // of blocks; of dilated attention: of pairs
};

struct DemoSample {
  Qkv fp32, bf16;
  AttentionOptions options;
  std::vector<DemoPattern> patterns;  // the first is dense
};
DemoSample prepare_sample(const std::string& path, bool quick, Executor& executor);

// Each writes its table (if the format is table) as it goes and returns the records.
Record demo_errors(Context& context, const DemoSample& sample, bool quick, Executor& executor);
Record demo_quality(Context& context, const DemoSample& sample, Executor& executor);
Record demo_times(Context& context, const DemoSample& sample, bool quick, ThreadPool& pool);
Record demo_training(Context& context, const DemoSample& sample, bool quick, ThreadPool& pool);
Record demo_scale(Context& context, int64_t longest, ThreadPool& pool);  // rows up to `longest` tokens

using Pictures = std::vector<std::pair<std::string, std::vector<std::byte>>>;  // file, PNG

// Adds the pictures to be written into the folder, and returns {file, what it shows} records.
Record demo_pictures(Context& context, const DemoSample& sample, const Record& scale, bool quick,
                     const std::filesystem::path& folder, Pictures& pictures, Executor& executor);

// A table's row from the records of the dtypes: every field also as DTYPE_field.
void add_beside(Record& row, const Record& record);

// A heading and an explanation, where the format is table.
void demo_heading(Context& context, const std::string& heading, const std::string& explanation);

}  // namespace tessera::cli
