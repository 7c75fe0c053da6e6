#include "call/overlap.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace tessera {

namespace {

// sum coefficient * x, 0 <= x <= bound, coefficient > 0.
struct Term {
  int64_t coefficient, bound;
};

// Whether sum terms == target has a solution: depth-first from the largest coefficient. With nested strides, as real
// layouts have them, what the smaller terms can reach leaves one or two values of x a level.
class Diophantine {
 public:
  explicit Diophantine(std::vector<Term> terms) : terms_(std::move(terms)) {
    std::sort(terms_.begin(), terms_.end(), [](Term a, Term b) { return a.coefficient > b.coefficient; });
    reach_.resize(terms_.size() + 1);
    divisor_.resize(terms_.size() + 1);
    for (size_t i = terms_.size(); i-- > 0;) {
      reach_[i] = reach_[i + 1] + static_cast<__int128>(terms_[i].coefficient) * terms_[i].bound;
      divisor_[i] = std::gcd(divisor_[i + 1], terms_[i].coefficient);
    }
  }
  bool solvable(__int128 target) { return search(0, target); }

 private:
  bool search(size_t i, __int128 target) {
    if (target < 0 || target > reach_[i]) return false;
    if (target == 0) return true;
    if (target % divisor_[i] != 0) return false;  // target > 0 and reach_ > 0: terms remain
    if (--budget_ < 0) return true;
    const __int128 c = terms_[i].coefficient, rest = reach_[i + 1];
    const __int128 first = target > rest ? (target - rest + c - 1) / c : 0;
    const __int128 last = std::min<__int128>(target / c, terms_[i].bound);
    for (__int128 x = last; x >= first; --x) {
      if (search(i + 1, target - x * c)) return true;
      if (budget_ < 0) return true;
    }
    return false;
  }

  std::vector<Term> terms_;
  std::vector<__int128> reach_;   // largest sum of terms i..
  std::vector<int64_t> divisor_;  // greatest common divisor of coefficients i..
  int64_t budget_ = 100000;
};

// First byte, and the strides made positive.
struct Span {
  __int128 begin = 0, end = 0;
  std::vector<Term> terms;
};

Span span_of(const TensorView& t) {
  const int64_t element = static_cast<int64_t>(size_of(t.dtype));
  Span s;
  s.begin = static_cast<__int128>(reinterpret_cast<uintptr_t>(t.data));
  s.end = s.begin + element;
  for (int i = 0; i < t.rank; ++i) {
    if (t.sizes[i] <= 1 || t.strides[i] == 0) continue;
    const int64_t step = t.strides[i] * element, last = t.sizes[i] - 1;
    if (step < 0) s.begin += static_cast<__int128>(step) * last;
    else s.end += static_cast<__int128>(step) * last;
    s.terms.push_back({step < 0 ? -step : step, last});
  }
  return s;
}

}  // namespace

bool shares_memory(const TensorView& a, const TensorView& b) {
  if (a.data == nullptr || b.data == nullptr || a.numel() == 0 || b.numel() == 0) return false;
  const Span sa = span_of(a), sb = span_of(b);
  if (sa.end <= sb.begin || sb.end <= sa.begin) return false;
  // a.begin + A + i == b.begin + B + j for byte i of a's element, byte j of b's; with B' = max(B) - B:
  // A + B' + i + (size_b - 1 - j) == b.begin - a.begin + max(B) + size_b - 1.
  std::vector<Term> terms = sa.terms;
  terms.insert(terms.end(), sb.terms.begin(), sb.terms.end());
  const int64_t size_a = static_cast<int64_t>(size_of(a.dtype)), size_b = static_cast<int64_t>(size_of(b.dtype));
  terms.push_back({1, size_a - 1 + size_b - 1});
  return Diophantine(std::move(terms)).solvable(sb.end - 1 - sa.begin);
}

bool overlaps_itself(const TensorView& t) {
  if (t.numel() <= 1) return false;
  for (int i = 0; i < t.rank; ++i) {
    if (t.sizes[i] > 1 && t.strides[i] == 0) return true;
  }
  // Two elements differ by d_i in dimension i, |d_i| < size_i; take each dimension in turn as one with d_i >= 1:
  // stride_i (1 + x) + sum of the others == 0, each other d shifted to be >= 0.
  const Span s = span_of(t);
  const int64_t element = static_cast<int64_t>(size_of(t.dtype));
  for (size_t i = 0; i < s.terms.size(); ++i) {
    __int128 target = -s.terms[i].coefficient;
    std::vector<Term> terms{{s.terms[i].coefficient, s.terms[i].bound - 1}};
    for (size_t j = 0; j < s.terms.size(); ++j) {
      if (j == i) continue;
      terms.push_back({s.terms[j].coefficient, 2 * s.terms[j].bound});
      target += static_cast<__int128>(s.terms[j].coefficient) * s.terms[j].bound;
    }
    // Elements are aligned to their size, so that only equal addresses overlap.
    for (Term& term : terms) term.coefficient /= element;
    if (Diophantine(std::move(terms)).solvable(target / element)) return true;
  }
  return false;
}

}  // namespace tessera
