// Trains a layer of block-sparse attention, forward and backward, with nothing but Tessera's core.
//
// The task is recall. A sequence is made of pairs (letter, digit) in which each letter always stands with the same
// digit, but with another one in every sequence. The model is asked for the digit of each pair: it must look back for a
// pair with this letter, as there is nothing that its weights could learn by heart. A guess is right once in ten times.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iterator>
#include <random>
#include <vector>

#include "tessera/attention.h"
#include "tessera/backward.h"
#include "tessera/pattern_cache.h"
#include "tessera/pattern_combine.h"

namespace {

constexpr int64_t kLetters = 26, kDigits = 10;
constexpr int64_t kBatch = 4, kHeads = 2, kHeadDim = 32, kWidth = kHeads * kHeadDim;
constexpr int64_t kSeqlens[] = {256, 512, 1024}, kWindow = 128;

// A matrix of weights, [rows, kWidth], and what Adam (Kingma & Ba 2015) keeps beside each.
struct Weights {
  std::vector<float> value, gradient, mean, square;

  Weights(int64_t rows, float deviation, std::mt19937& random)
      : value(rows * kWidth), gradient(value.size()), mean(value.size()), square(value.size()) {
    std::normal_distribution<float> normal(0, deviation);
    for (float& x : value) x = normal(random);
  }

  const float* row(int64_t i) const { return &value[i * kWidth]; }
  float* gradient_row(int64_t i) { return &gradient[i * kWidth]; }

  void update(int step, float rate) {
    const float beta1 = 0.9f, beta2 = 0.99f;
    const float unbias1 = 1 / (1 - std::pow(beta1, step)), unbias2 = 1 / (1 - std::pow(beta2, step));
    for (size_t i = 0; i < value.size(); ++i) {
      mean[i] += (1 - beta1) * (gradient[i] - mean[i]);
      square[i] += (1 - beta2) * (gradient[i] * gradient[i] - square[i]);
      value[i] -= rate * unbias1 * mean[i] / (std::sqrt(unbias2 * square[i]) + 1e-8f);
      gradient[i] = 0;
    }
  }
};

void copy_row(const float* from, float* to) { std::copy_n(from, kWidth, to); }
void add_row(const float* from, float* to) {
  for (int64_t i = 0; i < kWidth; ++i) to[i] += from[i];
}

struct Result {
  double loss = 0;   // mean cross-entropy, nats
  double right = 0;  // share of the digits that got the highest score
};

// Scores of the digits are readout * out. Adds to the gradient of the readout and writes that of out.
Result cross_entropy(const std::vector<int>& digits, const std::vector<float>& out, Weights& readout,
                     std::vector<float>& dout) {
  Result result;
  const double share = 1.0 / digits.size();
  for (size_t t = 0; t < digits.size(); ++t) {
    const float* x = &out[t * kWidth];
    float* dx = &dout[t * kWidth];
    double weight[kDigits], sum = 0;
    int best = 0;
    for (int c = 0; c < kDigits; ++c) {
      double score = 0;
      for (int64_t i = 0; i < kWidth; ++i) score += readout.row(c)[i] * x[i];
      sum += weight[c] = std::exp(score);
      if (weight[c] > weight[best]) best = c;
    }
    result.loss += share * std::log(sum / weight[digits[t]]);
    result.right += share * (best == digits[t]);
    std::fill_n(dx, kWidth, 0.0f);
    for (int c = 0; c < kDigits; ++c) {
      const float dscore = static_cast<float>(share * (weight[c] / sum - (c == digits[t])));
      for (int64_t i = 0; i < kWidth; ++i) {
        readout.gradient_row(c)[i] += dscore * x[i];
        dx[i] += dscore * readout.row(c)[i];
      }
    }
  }
  return result;
}

}  // namespace

int main() {
  std::mt19937 random(1);
  Weights query(kLetters, 1.0f, random), key(kLetters, 1.0f, random), value(kDigits, 1.0f, random);
  Weights readout(kDigits, 0.1f, random);

  // Blocks within 128 tokens back are kept: of the longest sequences one pair of blocks in four.
  tessera::PatternSpec spec{
      .kind = tessera::PatternKind::local_window, .block_q = 32, .block_k = 32, .causal = true, .window = kWindow};
  tessera::PatternCache patterns;
  patterns.warm_up(spec, kSeqlens);
  // A pair must not see its own digit: keys stand one position later, so that causal means "before" here. That is the
  // call's business, so the pattern gives its blocks only.
  const tessera::AttentionOptions options{.k_offset = 1, .causal = true};
  tessera::ThreadPool pool(0);

  constexpr int kSteps = 120, kReport = 20;
  Result recent;
  double possible = 0;  // share of the digits whose letter stood within the window before
  for (int step = 1; step <= kSteps; ++step) {
    const int64_t seqlen = kSeqlens[step % std::size(kSeqlens)], tokens = kBatch * seqlen;
    std::vector<int> letters(tokens), digits(tokens);
    int digit_of[kLetters];
    int64_t last[kLetters];
    for (int64_t t = 0; t < tokens; ++t) {
      if (t % seqlen == 0) {
        for (int& digit : digit_of) digit = static_cast<int>(random() % kDigits);
        std::fill_n(last, kLetters, t - kWindow - 1);
      }
      letters[t] = static_cast<int>(random() % kLetters);
      digits[t] = digit_of[letters[t]];
      if (t - last[letters[t]] <= kWindow) possible += 1.0 / tokens / kReport;
      last[letters[t]] = t;
    }

    std::vector<float> q(tokens * kWidth), k(q.size()), v(q.size()), out(q.size()), lse(tokens * kHeads);
    for (int64_t t = 0; t < tokens; ++t) {
      copy_row(query.row(letters[t]), &q[t * kWidth]);
      copy_row(key.row(letters[t]), &k[t * kWidth]);
      copy_row(value.row(digits[t]), &v[t * kWidth]);
    }
    const auto view = [&](std::vector<float>& x) {
      return tessera::make_view(x.data(), tessera::DType::f32, {kBatch, seqlen, kHeads, kHeadDim});
    };
    const auto lse_view = tessera::make_view(lse.data(), tessera::DType::f32, {kBatch, kHeads, seqlen});
    spec.seqlen_q = spec.seqlen_k = seqlen;
    const tessera::BlockPattern pattern = tessera::blocks_only(patterns.get(spec));
    tessera::forward({.q = view(q),
                      .k = view(k),
                      .v = view(v),
                      .pattern = pattern,
                      .out = view(out),
                      .lse = lse_view,
                      .options = options},
                     pool);

    std::vector<float> dout(q.size()), dq(q.size()), dk(q.size()), dv(q.size());
    const Result result = cross_entropy(digits, out, readout, dout);
    tessera::backward({.q = view(q),
                       .k = view(k),
                       .v = view(v),
                       .pattern = pattern,
                       .out = view(out),
                       .lse = lse_view,
                       .dout = view(dout),
                       .dq = view(dq),
                       .dk = view(dk),
                       .dv = view(dv),
                       .options = options},
                      pool);
    for (int64_t t = 0; t < tokens; ++t) {
      add_row(&dq[t * kWidth], query.gradient_row(letters[t]));
      add_row(&dk[t * kWidth], key.gradient_row(letters[t]));
      add_row(&dv[t * kWidth], value.gradient_row(digits[t]));
    }
    for (Weights* w : {&query, &key, &value, &readout}) w->update(step, 0.02f);

    recent.loss += result.loss / kReport;
    recent.right += result.right / kReport;
    if (step % kReport == 0) {
      std::printf("step %3d  loss %.3f  right %4.1f %%, possible %4.1f %%\n", step, recent.loss, 100 * recent.right,
                  100 * possible);
      if (step < kSteps) recent = {}, possible = 0;
    }
  }
  const tessera::PatternCacheStats s = patterns.stats();
  std::printf("%zu patterns, made once each: %lld found, %lld made\n", s.entries, static_cast<long long>(s.hits),
              static_cast<long long>(s.misses));
  return recent.right > 0.97 * possible ? 0 : 1;
}
