// Which blocks each query likes best: those whose means have the greatest products with it, exactly.
//
// A task multiplies a tile of queries with some means at a time. What is greater than the bound of a
// query, a vector at a time, is put behind its candidates. When these are many, a bound is looked
// for beyond which enough remain, by counting; so few products are moved, and none is sorted but the
// best in the end. Blocks come in their order, so of equal products the first is met first.

#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "kernels.h"
#include "tiles.h"

namespace layercomb {
namespace {

constexpr int64_t kQueries = 60, kMeans = 256;  // of a tile, the former a multiple of kRows
constexpr int64_t kPanel = 64;                  // means that are packed together
constexpr int64_t kSpare = 64;    // room for candidates beyond 2 n_chosen before a cut
constexpr int64_t kLeeway = 8;    // a cut may leave max(this, n_chosen / 4) more than n_chosen
constexpr int64_t kRanked = 512;  // so many are ranked by counting, more are sorted
constexpr int32_t kLeast = std::numeric_limits<int32_t>::min();

// The blocks that a query can choose: of the row, from `low` to `high`, `skipped` left out.
struct Range {
  int64_t low, high, skipped;
};

// The blocks of a row, and what its queries can choose of them.
class RowBlocks {
 public:
  RowBlocks(const Choice& a, int64_t b)
      : a_(a),
        first_(a.document + b * a.n_blocks),
        last_(std::partition_point(first_, first_ + a.n_blocks, IsBlock)),
        ids_(a.ids + b * a.n_queries),
        own_(a.own + b * a.n_queries) {}

  Range Of(int64_t t) const {
    const auto [low, high] = std::equal_range(first_, last_, ids_[t]);
    const int64_t from = low - first_, to = high - first_;
    const int64_t own = from + std::clamp<int64_t>(own_[t], 0, to - from);
    return {from, a_.causal ? own : to, own};
  }

 private:
  static bool IsBlock(int32_t document) { return document >= 0; }

  const Choice& a_;
  const int32_t *first_, *last_, *ids_, *own_;
};

// The best blocks of one query up to now, and others that may be among them, in their order.
class Liked {
 public:
  // `room` has Room(n_chosen) places.
  Liked(int64_t n_chosen, int32_t* room)
      : n_chosen_(n_chosen),
        limit_(Limit(n_chosen)),
        scores_(room),
        numbers_(room + Room(n_chosen) / 2) {}

  static int64_t Room(int64_t n_chosen) { return 2 * (Limit(n_chosen) + kMeans + kLanes); }

  // Takes what is good enough of n products, with blocks from `first` on; n ≤ kMeans, and what is
  // behind them up to a whole vector can be read.
  void Take(const float* s, int64_t n, int64_t first) {
    for (int64_t i = 0; i < n; i += kLanes) {
      const Floats its = Load<Floats>(s + i) + 0.0f;  // −0, which equals 0, becomes it
      uint32_t bits = Bits(its > bound_);
      if (n - i < kLanes) bits &= (1u << (n - i)) - 1;
      if (bits) Put(bits, Ordered(reinterpret_cast<Ints>(its)), Counted() + int32_t(first + i));
    }
    if (n_ > limit_) Cut(n_chosen_ + std::max(kLeeway, n_chosen_ / 4));
  }

  // Writes the n_chosen best blocks, the best first, counted from `first` on; then `nothing`.
  void Finish(int64_t first, int32_t nothing, int32_t* y) {
    if (n_ > n_chosen_) Cut(n_chosen_);
    Pad();
    n_ <= kRanked ? Rank(y) : Sort(y);
    for (int64_t i = 0; i < n_; ++i) y[i] -= int32_t(first);
    std::fill(y + n_, y + n_chosen_, nothing);
  }

 private:
  void Put(uint32_t bits, Ints scores, Ints numbers) {
    Compress(bits, scores, &scores_[n_]);
    Compress(bits, numbers, &numbers_[n_]);
    n_ += __builtin_popcount(bits);
  }

  // Makes the last vector whole, of scores that are less than all.
  void Pad() { std::fill_n(&scores_[n_], kLanes, kLeast); }

  // Leaves `most` at most, of which the n_chosen best are some, and bounds what is taken later.
  void Cut(int64_t most) {
    Pad();
    // Too many scores are beyond low, too few beyond high.
    int32_t low = kLeast, high = Greatest();  // what equals bound_ counts, too
    while (int64_t(high) - low > 1) {
      const int32_t bound = int32_t((int64_t(low) + high) >> 1);
      const int64_t n = Beyond(bound);
      if (n_chosen_ <= n && n <= most) return Retain(bound, 0);
      (n > most ? low : high) = bound;
    }
    Retain(high, n_chosen_ - Beyond(high));
  }

  int32_t Greatest() const {
    Ints most = Load<Ints>(scores_);
    for (int64_t i = kLanes; i < n_; i += kLanes) {
      const Ints its = Load<Ints>(scores_ + i);
      most = its > most ? its : most;
    }
    int32_t greatest = most[0];
    for (int i = 1; i < kLanes; ++i) greatest = std::max(greatest, most[i]);
    return greatest;
  }

  int64_t Beyond(int32_t bound) const {
    Ints counts = {};
    for (int64_t i = 0; i < n_; i += kLanes) counts -= Load<Ints>(&scores_[i]) > bound;
    int64_t n = 0;
    for (int i = 0; i < kLanes; ++i) n += counts[i];
    return n;
  }

  // Leaves the scores beyond the bound, and the first `n_equal` that are equal to it.
  void Retain(int32_t bound, int64_t n_equal) {
    const int64_t n = n_;
    n_ = 0;
    for (int64_t i = 0; i < n; i += kLanes) {
      const Ints scores = Load<Ints>(&scores_[i]), numbers = Load<Ints>(&numbers_[i]);
      uint32_t bits = Bits(scores > bound);
      for (uint32_t equal = n_equal ? Bits(scores == bound) : 0; equal && n_equal; --n_equal) {
        bits |= equal & -equal;
        equal &= equal - 1;
      }
      Put(bits, scores, numbers);
    }
    bound_ = reinterpret_cast<Floats>(Ordered(Ints{} + bound))[0];
  }

  // Each block at the place that as many have before it as are better.
  void Rank(int32_t* y) const {
    for (int64_t i = 0; i < n_; i += kLanes) {
      const Ints its = Load<Ints>(&scores_[i]);
      const int64_t last = std::min(n_, i + kLanes);
      Ints places = {};
      for (int64_t j = 0; j < i; ++j) places -= scores_[j] >= its;
      for (int64_t j = i; j < last; ++j) {
        places -= (scores_[j] > its) | ((scores_[j] == its) & (Counted() > int32_t(j - i)));
      }
      for (int64_t j = last; j < n_; ++j) places -= scores_[j] > its;
      for (int64_t j = i; j < last; ++j) y[places[j - i]] = numbers_[j];
    }
  }

  void Sort(int32_t* y) const {
    std::vector<std::pair<int64_t, int32_t>> all;
    for (int64_t i = 0; i < n_; ++i) all.emplace_back(-int64_t(scores_[i]), numbers_[i]);
    std::sort(all.begin(), all.end());
    for (int64_t i = 0; i < n_; ++i) y[i] = all[i].second;
  }

  static int64_t Limit(int64_t n_chosen) { return 2 * n_chosen + kSpare; }

  const int64_t n_chosen_, limit_;
  int64_t n_ = 0;
  float bound_ = -std::numeric_limits<float>::infinity();
  int32_t *const scores_, *const numbers_;
};

// The means of all heads by columns, some at a time.
class Panels {
 public:
  Panels(const Pool& pool, const Choice& a)
      : n_(CeilDiv(a.n_blocks, kPanel)),
        size_(a.depth * kPanel),
        values_(new float[a.n_rows * a.n_keyed * n_ * size_]) {
    const int64_t n = a.n_rows * a.n_keyed * n_;
    InPieces(pool, 4 * n * size_, n, 1, [&](int64_t from, int64_t count) {
      for (int64_t i = from; i < from + count; ++i) {
        const int64_t g = i / n_, first = i % n_ * kPanel, its = std::min(kPanel, a.n_blocks - first);
        const float* means = a.means + (g * a.n_blocks + first) * a.depth;
        Transpose(means, its, a.depth, 1, &values_[i * size_], kPanel);
      }
    });
  }
  // That of head g which begins with a mean.
  const float* Of(int64_t g, int64_t mean) const {
    return &values_[(g * n_ + mean / kPanel) * size_];
  }

 private:
  const int64_t n_, size_;
  const std::unique_ptr<float[]> values_;
};

// What a task keeps. Its queries are some of those that share a head of means.
class Chooser {
 public:
  // Without panels, which few queries are not worth, means are multiplied as they lie.
  Chooser(const Choice& a, const Panels* panels)
      : a_(a),
        panels_(panels),
        scores_(new float[kQueries * kMeans + kLanes]),
        chosen_(new int32_t[kQueries * a.n_chosen]),
        room_(new int32_t[kQueries * Liked::Room(a.n_chosen)]) {}

  // Queries from `first` on, of those of head g, which is counted over all rows.
  void Run(const RowBlocks& blocks, int64_t g, int64_t first, int64_t n, int32_t* y) {
    const int64_t at = g * a_.group() * a_.n_queries + first;
    std::vector<Liked> liked;
    Range ranges[kQueries];
    int64_t low = a_.n_blocks, high = 0;
    for (int64_t q = 0; q < n; ++q) {
      ranges[q] = blocks.Of((first + q) % a_.n_queries);
      low = std::min(low, ranges[q].low), high = std::max(high, ranges[q].high);
      liked.emplace_back(a_.n_chosen, &room_[q * Liked::Room(a_.n_chosen)]);
    }
    const float* query = a_.query + at * a_.depth;
    for (int64_t mean = low / kPanel * kPanel; mean < high; mean += kMeans) {
      const int64_t n_means = std::min(kMeans, high - mean);
      panels_ ? Multiplied(query, n, g, mean, n_means) : AsTheyLie(query, n, g, mean, n_means);
      for (int64_t q = 0; q < n; ++q) {
        Take(ranges[q], mean, n_means, &scores_[q * kMeans], liked[q]);
      }
    }
    for (int64_t q = 0; q < n; ++q) {
      liked[q].Finish(ranges[q].low, a_.nothing, &chosen_[q * a_.n_chosen]);
    }
    for (int64_t j = 0; j < a_.n_chosen; ++j) {
      for (int64_t q = 0; q < n; ++q) {
        const int64_t h = (at + q) / a_.n_queries, t = (at + q) % a_.n_queries;
        y[(h * a_.n_chosen + j) * a_.n_queries + t] = chosen_[q * a_.n_chosen + j];
      }
    }
  }

 private:
  // Scores of n queries and n_means means, those of a query in a row.
  void Multiplied(const float* query, int64_t n, int64_t g, int64_t mean, int64_t n_means) {
    for (int64_t i = 0; i < n_means; i += kPanel) {
      Multiply({query, a_.depth, 1}, {panels_->Of(g, mean + i), kPanel}, n, a_.depth, kPanel, false,
               &scores_[i], kMeans);
    }
  }

  void AsTheyLie(const float* query, int64_t n, int64_t g, int64_t mean, int64_t n_means) {
    const float* means = a_.means + (g * a_.n_blocks + mean) * a_.depth;
    std::vector<float> its(a_.depth * kLanes), by_mean(n_means * kLanes);
    Transpose(query, n, a_.depth, 1, its.data(), kLanes);
    Multiply({means, a_.depth, 1}, {its.data(), kLanes}, n_means, a_.depth, kLanes, false,
             by_mean.data(), kLanes);
    for (int64_t q = 0; q < n; ++q) {
      for (int64_t i = 0; i < n_means; ++i) scores_[q * kMeans + i] = by_mean[i * kLanes + q];
    }
  }

  static void Take(const Range& range, int64_t mean, int64_t n_means, const float* scores,
                   Liked& liked) {
    const auto of = [&](int64_t low, int64_t high) {
      low = std::max(low, mean), high = std::min(high, mean + n_means);
      if (low < high) liked.Take(scores + low - mean, high - low, low);
    };
    of(range.low, std::min(range.high, range.skipped));
    if (range.skipped + 1 < range.high) of(range.skipped + 1, range.high);
  }

  const Choice& a_;
  const Panels* panels_;
  const std::unique_ptr<float[]> scores_;
  const std::unique_ptr<int32_t[]> chosen_, room_;
};

}  // namespace

void BestBlocks(const Pool& pool, const Choice& a, int32_t* y) {
  constexpr int64_t kWorthwhile = 1 << 19;
  const int64_t n_shared = a.n_rows * a.n_keyed, n = a.group() * a.n_queries;
  const int64_t n_threads = std::clamp<int64_t>(n_shared * n * a.n_blocks * a.depth / kWorthwhile, 1,
                                                std::max<int64_t>(1, pool.n_threads));
  const auto panels = n > kLanes ? std::make_unique<Panels>(pool, a) : nullptr;
  std::vector<RowBlocks> rows;
  for (int64_t b = 0; b < a.n_rows; ++b) rows.emplace_back(a, b);
  const int64_t n_tiles = CeilDiv(n, kQueries);
  InParallel(pool, n_threads, n_shared * n_tiles, [&](int64_t i) {
    const int64_t g = i / n_tiles, first = i % n_tiles * kQueries;
    Chooser(a, panels.get()).Run(rows[g / a.n_keyed], g, first, std::min(kQueries, n - first), y);
  });
}

}  // namespace layercomb
