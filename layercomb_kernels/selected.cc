// Attention of each query to keys that it finds in buckets, to those near by and to the first ones,
// forward and backward.
//
// A query reads the few keys that it sees where they lie, so no scores are computed in vain, and a
// key that is found several times is left out by a mark. Backwards the queries of a block first
// find their own gradients, and then what they give to keys is added up: each part of the keys by
// one task, in the order of the queries, so that sums do not depend on the number of threads.
//
// Letters: V vectors of a row.

#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "kernels.h"
#include "tiles.h"

namespace layercomb {
namespace {

constexpr float kFar = 1e30f;  // the logsumexp of a query that sees nothing
constexpr int kParts = 8;      // of the keys
constexpr int kPart = 64;      // neighbours that are in one part
constexpr int64_t kAtATime = 1 << 17;  // keys seen by the queries of a block, all together
constexpr int64_t kTogether = 32;      // queries of a task

// Rounds whose keys are in the same buckets: the key of each rank, and the first rank that each
// position sees in each round, and the one after the last. Keys are ranked by bucket and position.
struct Rounds {
  int64_t n;
  std::vector<int32_t> key, low, high;
};

// What the queries of some rounds are told.
struct Window {
  const int32_t *of_queries, *of_keys;  // buckets, those of keys the same in all; null for one
  int64_t n_rounds, n_buckets, n;
  bool first;  // whether the first n are seen instead of the last n
};

class Finder {
 public:
  Finder(const Selection& a, int64_t b)
      : a_(a),
        mask_(a.mask ? a.mask + b * a.length : nullptr),
        segments_(a.segments ? a.segments + b * a.length : nullptr) {}

  Rounds Find(const Window& w) const {
    const int64_t n = a_.length;
    Rounds found{w.n_rounds, std::vector<int32_t>(n), std::vector<int32_t>(n * w.n_rounds),
                 std::vector<int32_t>(n * w.n_rounds)};
    std::vector<int32_t> starts(w.n_buckets + 1), next, begin, document(w.n_buckets, -1);
    for (int64_t t = 0; t < n; ++t) {
      if (Real(t)) ++starts[OfKey(w, t) + 1];
    }
    for (int64_t i = 0; i < w.n_buckets; ++i) starts[i + 1] += starts[i];
    next.assign(starts.begin(), starts.end() - 1);
    begin = next;
    // Where its own document begins in the bucket of a query, and how many keys come up to it.
    for (int64_t t = 0; t < n; ++t) {
      if (!Real(t)) continue;
      const int32_t k = OfKey(w, t);
      if (document[k] != Document(t)) {
        document[k] = Document(t);
        begin[k] = next[k];
      }
      found.key[next[k]++] = int32_t(t);
      for (int64_t r = 0; r < w.n_rounds; ++r) {
        const int32_t q = OfQuery(w, r, t), here = next[q];
        int32_t &low = found.low[t * w.n_rounds + r], &high = found.high[t * w.n_rounds + r];
        low = document[q] == Document(t) ? begin[q] : here;
        high = here;
        if (a_.causal) Cut(w, here, here, low, high);
      }
    }
    if (!a_.causal) CutBothSides(w, next, found);
    return found;
  }

 private:
  // The same for what is seen behind queries too; `next` has the ends of buckets.
  void CutBothSides(const Window& w, std::vector<int32_t> next, Rounds& found) const {
    std::vector<int32_t> document(w.n_buckets, -1), end(w.n_buckets);
    for (int64_t t = a_.length - 1; t >= 0; --t) {
      if (!Real(t)) continue;
      for (int64_t r = 0; r < w.n_rounds; ++r) {
        const int32_t q = OfQuery(w, r, t);
        int32_t &low = found.low[t * w.n_rounds + r], &high = found.high[t * w.n_rounds + r];
        Cut(w, high, document[q] == Document(t) ? end[q] : high, low, high);
      }
      // A key stands before the query of its position, and is counted behind earlier ones.
      const int32_t k = OfKey(w, t);
      if (document[k] != Document(t)) {
        document[k] = Document(t);
        end[k] = next[k];
      }
      --next[k];
    }
  }

  bool Real(int64_t t) const { return !mask_ || mask_[t]; }
  int32_t Document(int64_t t) const { return segments_ ? segments_[t] : 0; }
  int32_t OfQuery(const Window& w, int64_t r, int64_t t) const {
    return w.of_queries ? w.of_queries[r * a_.length + t] : 0;
  }
  static int32_t OfKey(const Window& w, int64_t t) { return w.of_keys ? w.of_keys[t] : 0; }

  // From where its document begins in the bucket, the ranks up to the query, and where it ends: what
  // is seen.
  void Cut(const Window& w, int32_t here, int32_t end, int32_t& low, int32_t& high) const {
    const int32_t begin = low, n = int32_t(w.n);
    if (w.first) {
      high = std::min(end, begin + n);
      return;
    }
    const int32_t before = a_.causal ? n : (n + 1) / 2;
    low = std::max(begin, here - before);
    high = a_.causal ? here : std::min(end, here + n - before);
  }

  const Selection& a_;
  const bool* mask_;
  const int32_t* segments_;
};

std::vector<Rounds> AllRounds(const Selection& a, int64_t h) {
  const int64_t b = h / a.n_heads, g = h / a.group(), n = a.n_rounds * a.length;
  const int32_t *of_queries = a.of_queries + h * n, *of_keys = a.of_keys + g * n;
  const Finder finder(a, b);
  std::vector<Rounds> rounds;
  for (int64_t r = 0, last; r < a.n_rounds; r = last) {
    const int32_t* its = of_keys + r * a.length;
    for (last = r + 1; last < a.n_rounds; ++last) {
      if (!std::equal(its, its + a.length, of_keys + last * a.length)) break;
    }
    rounds.push_back(finder.Find({of_queries + r * a.length, its, last - r, a.n_buckets, a.n_keys, false}));
  }
  if (a.local_len) rounds.push_back(finder.Find({nullptr, nullptr, 1, 1, a.local_len, false}));
  if (a.n_sinks) rounds.push_back(finder.Find({nullptr, nullptr, 1, 1, a.n_sinks, true}));
  return rounds;
}

// Which keys have been found for the present query: those with its stamp. They are kept for a thread,
// since to make them anew takes as long as many queries.
struct Marks {
  std::vector<uint32_t> stamps;
  uint32_t stamp = 0;

  void Next(int64_t n) {
    if (int64_t(stamps.size()) < n || ++stamp == 0) {
      stamps.assign(std::max<int64_t>(n, stamps.size()), 0);
      stamp = 1;
    }
  }
  bool Found(int32_t key) { return std::exchange(stamps[key], stamp) == stamp; }
};

// The keys of one query after the other.
class List {
 public:
  List(const Selection& a, const std::vector<Rounds>& rounds, const float* keys, const float* values)
      : a_(a), rounds_(rounds), keys_(keys), values_(values) {}

  // Writes the keys of query t to `at`, and returns how many there are; there is room for one more.
  int64_t Make(int64_t t, int32_t* at) const {
    static thread_local Marks marks;
    if (a_.once) marks.Next(a_.length);
    int64_t total = 0;
    for (const Rounds& its : rounds_) {
      for (int64_t r = t * its.n; r < (t + 1) * its.n; ++r) {
        for (int32_t i = its.low[r]; i < its.high[r]; ++i) {
          const int32_t key = its.key[i];
          __builtin_prefetch(keys_ + key * a_.depth, 0, 2);
          __builtin_prefetch(values_ + key * a_.depth, 0, 2);
          at[total] = key;
          total += !a_.once || !marks.Found(key);
        }
      }
    }
    return total;
  }

 private:
  const Selection& a_;
  const std::vector<Rounds>& rounds_;
  const float *keys_, *values_;
};

// Puts the keys of a part together, and writes to `ends` how many there are up to the end of each.
void Part(int64_t n, int32_t* at, int32_t* ends) {
  const auto part = [](int32_t key) { return key / kPart % kParts; };
  static thread_local std::vector<int32_t> all;
  all.assign(at, at + n);
  int32_t next[kParts + 1] = {};
  for (const int32_t key : all) ++next[part(key) + 1];
  for (int i = 0; i < kParts; ++i) ends[i] = next[i + 1] += next[i];
  for (const int32_t key : all) at[next[part(key)]++] = key;
}

// y[i] = x · rows[at[i]] for rows of V vectors.
template <int V>
void Products(const float* x, const float* rows, const int32_t* at, int64_t n, float* y) {
  constexpr int64_t d = V * kLanes;
  Floats its[V];
  LAYERCOMB_UNROLL
  for (int v = 0; v < V; ++v) its[v] = Load<Floats>(x + v * kLanes);
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    Floats sums[4];
    LAYERCOMB_UNROLL
    for (int r = 0; r < 4; ++r) sums[r] = its[0] * Load<Floats>(rows + at[i + r] * d);
    LAYERCOMB_UNROLL
    for (int v = 1; v < V; ++v) {
      LAYERCOMB_UNROLL
      for (int r = 0; r < 4; ++r) sums[r] += its[v] * Load<Floats>(rows + at[i + r] * d + v * kLanes);
    }
    LAYERCOMB_UNROLL
    for (int r = 0; r < 4; ++r) y[i + r] = Sum(sums[r]);
  }
  for (; i < n; ++i) {
    Floats sum = its[0] * Load<Floats>(rows + at[i] * d);
    LAYERCOMB_UNROLL
    for (int v = 1; v < V; ++v) sum += its[v] * Load<Floats>(rows + at[i] * d + v * kLanes);
    y[i] = Sum(sum);
  }
}

// y = Σ_i p[i] rows[at[i]].
template <int V>
void Sums(const float* p, const float* rows, const int32_t* at, int64_t n, float* y) {
  constexpr int64_t d = V * kLanes;
  Floats sums[V] = {};
  for (int64_t i = 0; i < n; ++i) {
    LAYERCOMB_UNROLL
    for (int v = 0; v < V; ++v) sums[v] += p[i] * Load<Floats>(rows + at[i] * d + v * kLanes);
  }
  std::memcpy(y, sums, sizeof sums);
}

// rows[at[i]] += p[i] x.
template <int V>
void Spread(const float* p, const float* x, const int32_t* at, int64_t n, float* rows) {
  constexpr int64_t d = V * kLanes;
  Floats its[V];
  LAYERCOMB_UNROLL
  for (int v = 0; v < V; ++v) its[v] = Load<Floats>(x + v * kLanes);
  for (int64_t i = 0; i < n; ++i) {
    float* to = rows + at[i] * d;
    LAYERCOMB_UNROLL
    for (int v = 0; v < V; ++v) {
      const Floats sum = Load<Floats>(to + v * kLanes) + p[i] * its[v];
      std::memcpy(to + v * kLanes, &sum, sizeof sum);
    }
  }
}

// The attention of one head, whose queries, keys and values are V vectors each.
template <int V>
class Head {
 public:
  Head(const Selection& a, int64_t h)
      : a_(a),
        h_(h),
        query_(a.query + h * a.length * a.depth),
        keys_(a.keys + h / a.group() * a.length * a.depth),
        values_(a.values + h / a.group() * a.length * a.depth),
        rounds_(AllRounds(a, h)) {}

  void Forward(const Pool& pool, float* y, float* z) const {
    y += h_ * a_.length * a_.depth;
    z += h_ * a_.length;
    const int64_t room = Whole(a_.most() + 1);
    InParallel(pool, pool.n_threads, CeilDiv(a_.length, kTogether), [&](int64_t task) {
      const List list(a_, rounds_, keys_, values_);
      std::vector<int32_t> at(room);
      std::vector<float> p(room);
      const int64_t last = std::min(a_.length, (task + 1) * kTogether);
      for (int64_t t = task * kTogether; t < last; ++t) {
        const int64_t n = list.Make(t, at.data());
        Scores(t, at.data(), n, p.data());
        z[t] = n ? Softmax(n, p.data()) : kFar;
        Sums<V>(p.data(), values_, at.data(), n, y + t * a_.depth);
      }
    });
  }

  // Adds to the gradients of keys and values, and writes those of queries.
  void Backward(const Pool& pool, const float* y, const Cotangents& ct) const {
    const int64_t room = Whole(a_.most() + 1), at_a_time = std::max(4 * kTogether, kAtATime / std::max<int64_t>(1, room));
    y += h_ * a_.length * a_.depth;
    const float *d_y = ct.out + h_ * a_.length * a_.depth, *z = ct.z + h_ * a_.length;
    float* d_query = ct.query + h_ * a_.length * a_.depth;
    float* d_keys = ct.keys + h_ / a_.group() * a_.length * a_.depth;
    float* d_values = ct.values + h_ / a_.group() * a_.length * a_.depth;
    const int64_t n_block = std::min(at_a_time, a_.length);
    std::vector<int32_t> at(n_block * room), ends(n_block * kParts);
    std::vector<float> p(n_block * room), d_s(n_block * room);
    for (int64_t first = 0; first < a_.length; first += n_block) {
      const int64_t n_here = std::min(n_block, a_.length - first);
      InParallel(pool, pool.n_threads, CeilDiv(n_here, kTogether), [&](int64_t task) {
        const List list(a_, rounds_, keys_, values_);
        const int64_t last = std::min(n_here, (task + 1) * kTogether);
        for (int64_t i = task * kTogether; i < last; ++i) {
          const int64_t t = first + i;
          int32_t* its = &at[i * room];
          const int64_t n = list.Make(t, its);
          Part(n, its, &ends[i * kParts]);
          Scores(t, its, n, &p[i * room]);
          Products<V>(d_y + t * a_.depth, values_, its, n, &d_s[i * room]);
          Cotangent(n, z[t], Dot(y + t * a_.depth, d_y + t * a_.depth), &p[i * room], &d_s[i * room]);
          Sums<V>(&d_s[i * room], keys_, its, n, d_query + t * a_.depth);
        }
      });
      InParallel(pool, pool.n_threads, kParts, [&](int64_t part) {
        for (int64_t i = 0; i < n_here; ++i) {
          const int64_t t = first + i, from = part ? ends[i * kParts + part - 1] : 0;
          const int64_t n = ends[i * kParts + part] - from, to = i * room + from;
          Spread<V>(&d_s[to], query_ + t * a_.depth, &at[to], n, d_keys);
          Spread<V>(&p[to], d_y + t * a_.depth, &at[to], n, d_values);
        }
      });
    }
  }

 private:
  void Scores(int64_t t, const int32_t* at, int64_t n, float* s) const {
    Products<V>(query_ + t * a_.depth, keys_, at, n, s);
    for (int64_t i = n; i < Whole(n); ++i) s[i] = 0;
    for (int64_t i = 0; i < n; i += kLanes) {
      Floats its = a_.scale * Load<Floats>(s + i);
      if (a_.softcap) its = Capped(its, a_.softcap);
      std::memcpy(s + i, &its, sizeof its);
    }
    for (int64_t i = n; i < Whole(n); ++i) s[i] = -std::numeric_limits<float>::infinity();
  }

  // Makes probabilities of scores, and returns their logsumexp.
  static float Softmax(int64_t n, float* s) {
    float most = s[0];
    for (int64_t i = 1; i < n; ++i) most = s[i] > most ? s[i] : most;
    Floats sum = {};
    for (int64_t i = 0; i < n; i += kLanes) {
      const Floats p = Exp(Load<Floats>(s + i) - most);
      std::memcpy(s + i, &p, sizeof p);
      sum += p;
    }
    const float total = Sum(sum), inverse = 1 / total;
    for (int64_t i = 0; i < n; ++i) s[i] *= inverse;
    return most + std::log(total);
  }

  // Makes probabilities of scores, and of the cotangents of probabilities those of products.
  void Cotangent(int64_t n, float z, float dot, float* p, float* d) const {
    const float slope = a_.softcap ? 1 / a_.softcap : 0;
    for (int64_t i = n; i < Whole(n); ++i) d[i] = 0;
    for (int64_t i = 0; i < n; i += kLanes) {
      const Floats s = Load<Floats>(p + i), its = Exp(s - z);
      Floats d_s = a_.scale * its * (Load<Floats>(d + i) - dot);
      if (slope) d_s *= 1 - (s * slope) * (s * slope);
      std::memcpy(p + i, &its, sizeof its);
      std::memcpy(d + i, &d_s, sizeof d_s);
    }
  }

  static float Dot(const float* a, const float* b) {
    Floats sum = {};
    for (int v = 0; v < V; ++v) sum += Load<Floats>(a + v * kLanes) * Load<Floats>(b + v * kLanes);
    return Sum(sum);
  }

  const Selection& a_;
  const int64_t h_;
  const float *query_, *keys_, *values_;
  const std::vector<Rounds> rounds_;
};

// Calls work(head, pool) for each head: heads that share keys one after the other, others at once
// where there are enough of them.
template <int V, typename Work>
void ForHeads(const Pool& pool, const Selection& a, const Work& work) {
  constexpr int64_t kWorthwhile = 1 << 19;
  const int64_t n = a.n_rows * a.n_keyed, n_heads = a.n_rows * a.n_heads;
  const int64_t products = n_heads * a.length * a.most() * 2 * a.depth;
  Pool its = pool;
  its.n_threads = std::clamp<int64_t>(products / kWorthwhile, 1, std::max<int64_t>(1, pool.n_threads));
  Pool inner = its;
  const bool at_once = n >= 2 * its.n_threads;
  (at_once ? inner : its).n_threads = 1;
  InParallel(its, its.n_threads, n, [&](int64_t g) {
    for (int64_t h = g * a.group(); h < (g + 1) * a.group(); ++h) work(Head<V>(a, h), inner);
  });
}

// Calls work(V) with the number of vectors of a row, of 16, 32, 64 or 128 floats.
template <typename Work>
void ForDepth(int64_t depth, const Work& work) {
  if (depth == 16) work(std::integral_constant<int, 16 / kLanes>());
  if (depth == 32) work(std::integral_constant<int, 32 / kLanes>());
  if (depth == 64) work(std::integral_constant<int, 64 / kLanes>());
  if (depth == 128) work(std::integral_constant<int, 128 / kLanes>());
}

}  // namespace

void SelectedForward(const Pool& pool, const Selection& a, float* y, float* z) {
  ForDepth(a.depth, [&](auto v) {
    ForHeads<v>(pool, a, [&](const auto& head, const Pool& its) { head.Forward(its, y, z); });
  });
}

void SelectedBackward(const Pool& pool, const Selection& a, const float* y, const Cotangents& ct) {
  std::fill_n(ct.keys, a.n_rows * a.n_keyed * a.length * a.depth, 0.0f);
  std::fill_n(ct.values, a.n_rows * a.n_keyed * a.length * a.depth, 0.0f);
  ForDepth(a.depth, [&](auto v) {
    ForHeads<v>(pool, a, [&](const auto& head, const Pool& its) { head.Backward(its, y, ct); });
  });
}

}  // namespace layercomb
