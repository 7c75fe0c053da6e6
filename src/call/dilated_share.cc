// How much dilated attention keeps of the sequence's own pairs and blocks, each counted once.
#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <utility>
#include <vector>

#include "call/dilated_plan.h"
#include "pattern/geometry.h"
#include "tessera/error.h"

namespace tessera {

namespace {

// Tokens start + offset, + rate, ... < stop: they attend among themselves.
struct Segment {
  int64_t start = 0, stop = 0, rate = 1, offset = 0;
  int64_t begin() const { return start + offset; }
  int64_t length() const { return stop <= begin() ? 0 : ceil_div(stop - begin(), rate); }
};

// The (w, r) over `seqlen` tokens, and the pattern inside their segments, made once a length.
class Segments {
 public:
  Segments(int64_t seqlen, const Dilation& dilation, std::optional<bool> causal, int64_t heads) : dilation_(dilation) {
    AttentionOptions options;
    options.causal = causal;
    const Problem whole = sequence_without_tensors(seqlen, dilation, options, 1, heads);
    causal_ = DilatedPlan(whole, dilation, options, true).causal();
    pairs_ = dilated_pairs(seqlen, dilation, options, 1, heads);
  }

  bool causal() const { return causal_; }
  int64_t pairs() const { return pairs_; }  // counted once for each (w, r)
  size_t size() const { return dilation_.segment_lengths.size(); }
  int64_t width(size_t n) const { return dilation_.segment_lengths[n]; }
  int64_t rate(size_t n) const { return dilation_.dilation_rates[n]; }

  // The segment of (w, r) number n that token `at` lies in, if the sequence ends at `seqlen`.
  Segment segment(size_t n, int64_t at, int64_t head, int64_t seqlen) const {
    const int64_t start = at - at % width(n);
    return {start, std::min(start + width(n), seqlen), rate(n), head % rate(n)};
  }

  const BlockPattern& inside(int64_t length) {
    const auto [found, is_new] = patterns_.try_emplace(length);
    if (is_new) {
      PatternSpec spec = dilation_.pattern.value_or(PatternSpec{});
      spec.seqlen_q = spec.seqlen_k = length;
      spec.causal = spec.causal || causal_;
      const BlockPattern made = dilation_.make ? dilation_.make(spec) : make_pattern(spec);
      if (made.shape().heads != 1 || made.num_bitmaps() > 0) {
        fail("dilation.pattern", fmt::format("{} heads, {} bitmaps", made.shape().heads, made.num_bitmaps()),
             "one head of whole blocks");
      }
      found->second = made;
    }
    return found->second;
  }

  // Calls f(begin, end) for the rows begin .. end - 1 of the segment that row `place` of it sees, causality aside.
  template <class F>
  void for_each_run(const Segment& segment, int64_t place, F f) {
    const BlockPatternView v = inside(segment.length()).view();
    const int64_t line = v.shape.row_of(place);
    for (int64_t e = v.indptr[line]; e < v.indptr[line + 1]; ++e) {
      const int64_t begin = int64_t{v.indices[e]} * v.shape.block_k;
      f(begin, std::min(begin + v.shape.block_k, v.shape.seqlen_k));
    }
  }

 private:
  const Dilation& dilation_;
  bool causal_ = false;
  int64_t pairs_ = 0;
  std::map<int64_t, BlockPattern> patterns_;
};

// Whether a token is a row of its segment, and which one.
bool place_of(const Segment& s, int64_t token, int64_t* place) {
  *place = (token - s.begin()) / s.rate;
  return token >= s.begin() && (token - s.begin()) % s.rate == 0;
}

// How often the (w, r) admit pairs of this head again that one admits already, in a sequence of `length` tokens. Rows
// in one row of blocks of every (w, r) see the same keys, causality aside: such a group is looked at once.
int64_t repeated_pairs(Segments& all, int64_t length, int64_t head) {
  struct Cover {
    Segment segment;
    int64_t place = 0;
  };
  std::map<std::vector<std::pair<int64_t, int64_t>>, std::vector<int64_t>> groups;  // by (w, r): segment, row of blocks
  for (int64_t token = 0; token < length; ++token) {
    std::vector<std::pair<int64_t, int64_t>> key(all.size(), {-1, -1});
    int covers = 0;
    for (size_t n = 0; n < all.size(); ++n) {
      const Segment s = all.segment(n, token, head, length);
      int64_t place = 0;
      if (!place_of(s, token, &place)) continue;
      key[n] = {s.start, all.inside(s.length()).shape().row_of(place)};
      ++covers;
    }
    if (covers > 1) groups[std::move(key)].push_back(token);
  }
  int64_t total = 0;
  for (const auto& [key, tokens] : groups) {
    std::vector<Cover> covers;
    for (size_t n = 0; n < all.size(); ++n) {
      Cover c{all.segment(n, tokens[0], head, length)};
      if (place_of(c.segment, tokens[0], &c.place)) covers.push_back(c);
    }
    // What two admit lies in a segment that is not the widest.
    const auto widest = std::max_element(covers.begin(), covers.end(), [](const Cover& a, const Cover& b) {
      return a.segment.stop - a.segment.start < b.segment.stop - b.segment.start;
    });
    int64_t first = length, stop = 0;
    for (auto c = covers.begin(); c != covers.end(); ++c) {
      if (c == widest) continue;
      first = std::min(first, c->segment.start);
      stop = std::max(stop, c->segment.stop);
    }
    std::vector<int32_t> hits(static_cast<size_t>(stop - first));
    for (const Cover& c : covers) {
      const Segment& s = c.segment;
      all.for_each_run(s, c.place, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) {
          const int64_t token = s.begin() + j * s.rate;
          if (token >= first && token < stop) ++hits[static_cast<size_t>(token - first)];
        }
      });
    }
    // seen: of the keys up to a token.
    int64_t seen = 0;
    size_t next = 0;
    for (int64_t token = first; token < stop; ++token) {
      seen += std::max(0, hits[static_cast<size_t>(token - first)] - 1);
      if (all.causal() && next < tokens.size() && tokens[next] == token) {
        total += seen;
        ++next;
      }
    }
    if (!all.causal()) total += seen * static_cast<int64_t>(tokens.size());
  }
  return total;
}

// Blocks of the whole sequence that hold a pair of this head. Rows of a block inside at most a block apart touch all
// the blocks that it touches.
int64_t touched_blocks(Segments& all, int64_t seqlen, int64_t head, int block) {
  std::vector<std::pair<int64_t, int64_t>> found;
  for (size_t n = 0; n < all.size(); ++n) {
    for (int64_t start = 0; start < seqlen; start += all.width(n)) {
      const Segment s = all.segment(n, start, head, seqlen);
      if (s.length() == 0) continue;
      const BlockPatternView v = all.inside(s.length()).view();
      const auto touched = [&](int64_t begin, int64_t end) {
        std::vector<int64_t> blocks;
        const int64_t step = std::max<int64_t>(1, block / s.rate);
        for (int64_t i = begin; i < end; i += step) blocks.push_back((s.begin() + i * s.rate) / block);
        blocks.push_back((s.begin() + (end - 1) * s.rate) / block);
        blocks.erase(std::unique(blocks.begin(), blocks.end()), blocks.end());
        return blocks;
      };
      for (int64_t i = 0; i < v.shape.rows(); ++i) {
        const std::vector<int64_t> rows = touched(v.shape.query_begin(i), v.shape.query_end(i));
        for (int64_t e = v.indptr[i]; e < v.indptr[i + 1]; ++e) {
          const int64_t begin = int64_t{v.indices[e]} * v.shape.block_k;
          for (const int64_t col : touched(begin, std::min(begin + v.shape.block_k, v.shape.seqlen_k))) {
            for (const int64_t row : rows) {
              if (row >= col || !all.causal()) found.emplace_back(row, col);
            }
          }
        }
      }
    }
    std::sort(found.begin(), found.end());
    found.erase(std::unique(found.begin(), found.end()), found.end());
  }
  return static_cast<int64_t>(found.size());
}

}  // namespace

DilatedShare dilated_share(int64_t seqlen, const Dilation& dilation, std::optional<bool> causal, int64_t heads,
                           int block) {
  Segments all(seqlen, dilation, causal, heads);
  if (block < 1) fail("block", fmt::to_string(block), "1 or more");
  // Every (w, r) starts anew with each period.
  int64_t period = 1;
  for (size_t n = 0; n < all.size() && period < seqlen; ++n) {
    const int64_t factor = all.width(n) / std::gcd(period, all.width(n));
    period = factor > seqlen / period ? seqlen : period * factor;
  }
  // Heads with the same offsets keep the same.
  std::map<std::vector<int64_t>, std::pair<int64_t, int64_t>> alike;  // a head, how many
  for (int64_t h = 0; h < heads; ++h) {
    std::vector<int64_t> offsets;
    for (size_t n = 0; n < all.size(); ++n) offsets.push_back(h % all.rate(n));
    ++alike.try_emplace(std::move(offsets), h, 0).first->second.second;
  }
  DilatedShare share{all.pairs(), 0};
  if (seqlen == 0) return share;
  for (const auto& [offsets, which] : alike) {
    const auto [head, count] = which;
    share.blocks += count * touched_blocks(all, seqlen, head, block);
    if (all.size() < 2) continue;
    share.pairs -= count * (seqlen / period) * repeated_pairs(all, period, head);
    if (seqlen % period != 0) share.pairs -= count * repeated_pairs(all, seqlen % period, head);
  }
  return share;
}

std::vector<uint8_t> dilated_keys(int64_t seqlen, const Dilation& dilation, std::optional<bool> causal, int64_t head,
                                  int64_t query) {
  Segments all(seqlen, dilation, causal, std::max<int64_t>(head, 0) + 1);
  if (head < 0) fail("head", fmt::to_string(head), "0 or more");
  if (query < 0 || query >= seqlen) fail("query", fmt::to_string(query), fmt::format("0..{}", seqlen - 1));
  std::vector<uint8_t> keys(static_cast<size_t>(seqlen));
  for (size_t n = 0; n < all.size(); ++n) {
    const Segment s = all.segment(n, query, head, seqlen);
    int64_t place = 0;
    if (!place_of(s, query, &place)) continue;
    all.for_each_run(s, place, [&](int64_t begin, int64_t end) {
      if (all.causal()) end = std::min(end, place + 1);
      for (int64_t j = begin; j < end; ++j) keys[static_cast<size_t>(s.begin() + j * s.rate)] = 1;
    });
  }
  return keys;
}

}  // namespace tessera
