// The two inner loops of the analysis, in fp32, vectorised for the best instruction set of this CPU.
#pragma once

#include <cstdint>

namespace tessera::analysis {

// Columns of every tile are a multiple of this many floats: the longest vector used.
inline constexpr int64_t kTileColumns = 16;

// c [rows, cols] = a [rows, inner] * b [inner, cols], all contiguous; cols a multiple of kTileColumns.
void multiply(const float* a, const float* b, float* c, int64_t rows, int64_t inner, int64_t cols);

// Scores to softmax numerators, in place: s [rows, cols] becomes exp(s - max[row]) at columns begin[row] .. end[row]
// and 0 elsewhere, whatever stood there. max [rows], the running maxima (start: -inf), grow only when a score exceeds
// them by more than kMaxSlack, so that most tiles need no rescaling. rescale [rows]: the factor that earlier sums of
// the row must be multiplied by. sum [rows]: the row's sum in this tile. False if a score in range is NaN or +inf.
inline constexpr float kMaxSlack = 8;  // exp(8) * 256 columns is far from fp32's end
bool softmax_numerators(float* s, int64_t rows, int64_t cols, const int32_t* begin, const int32_t* end, float* max,
                        float* rescale, float* sum);

// y [n] += x [n], and y [n] *= factor; n a multiple of kTileColumns.
void add_to(float* y, const float* x, int64_t n);
void scale_by(float* y, float factor, int64_t n);

}  // namespace tessera::analysis
