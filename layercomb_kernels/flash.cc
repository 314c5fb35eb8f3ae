// Attention of many queries, forward and backward, a tile of scores at a time (flash attention).
//
// Letters: H heads of queries, G heads of keys and values, C the keys of a tile, Q its queries.
// Forwards a tile of scores is stored by keys, with queries in the lanes; backwards by queries, with
// keys in the lanes. Then what must be transposed is packed once per task, and all else is read as
// it lies. What a query gets does not depend on the other queries, nor on the number of threads.

#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"
#include "tiles.h"

namespace layercomb {
namespace {

constexpr int64_t kQueries = 64, kKeys = 128;  // of a tile
constexpr float kFar = 1e30f;  // the logsumexp of a query that sees nothing
constexpr float kNothing = -std::numeric_limits<float>::infinity();

void Scale(const float* x, int64_t n, float factor, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = factor * x[i];
}

// The least and the greatest segment of some positions.
struct Range {
  int32_t least, most;
};

std::vector<Range> Ranges(const int32_t* segments, int64_t n, int64_t size) {
  std::vector<Range> ranges;
  for (int64_t i = 0; i < n; i += size) {
    const auto [least, most] = std::minmax_element(segments + i, segments + std::min(n, i + size));
    ranges.push_back({*least, *most});
  }
  return ranges;
}

enum class Seen { kNothing, kSome, kAll };

// What the queries of a row see.
class Sight {
 public:
  Sight(const Attention& a, int64_t b)
      : a_(a),
        mask_(a.mask ? a.mask + b * a.n_keys : nullptr),
        segments_(a.segments ? a.segments + b * a.n_keys : nullptr),
        start_(a.offset ? a.offset[b] : 0) {
    if (segments_) {
      of_queries_ = Ranges(segments_, a.n_queries, kQueries);
      of_keys_ = Ranges(segments_, a.n_keys, kKeys);
    }
    for (int64_t c = 0; mask_ && c < a.n_keys; c += kKeys) {
      const bool *first = mask_ + c, *last = mask_ + std::min(a.n_keys, c + kKeys);
      const int64_t n = std::count(first, last, true);
      real_.push_back(n == 0 ? Seen::kNothing : n == last - first ? Seen::kAll : Seen::kSome);
    }
  }

  // What the queries of tile i see of the keys of tile j.
  Seen Tile(int64_t i, int64_t j) const {
    Seen seen = mask_ ? real_[j] : Seen::kAll;
    auto only = [&](bool any, bool all) {
      if (!any) seen = Seen::kNothing;
      if (!all && seen == Seen::kAll) seen = Seen::kSome;
    };
    const int64_t query = start_ + i * kQueries, key = j * kKeys;
    const int64_t last_query = start_ + std::min(a_.n_queries, (i + 1) * kQueries) - 1;
    const int64_t last_key = std::min(a_.n_keys, key + kKeys) - 1;
    if (a_.causal) only(key <= last_query, last_key <= query);
    if (a_.window) only(last_key > query - a_.window, key > last_query - a_.window);
    if (segments_) {
      const Range q = of_queries_[i], k = of_keys_[j];
      only(q.least <= k.most && k.least <= q.most, q.least == k.most && k.least == q.most);
    }
    return seen;
  }

  // The first tile of queries of which one may see the keys of tile j, or of a later one.
  int64_t FirstQueries(int64_t j) const {
    if (!a_.causal || j == 0) return 0;  // the first keys begin the sums of all queries
    return std::max<int64_t>(0, j * kKeys - start_) / kQueries;
  }

  // Makes scores s[c, q] of queries from `query` on and n keys from `key` on, with kQueries queries
  // in a row, nothing where not seen.
  void HideFromQueries(int64_t query, int64_t n_queries, int64_t key, int64_t n, float* s) const {
    for (int64_t q = 0; q < n_queries; q += kLanes) {
      const Ints at = Counted() + int32_t(start_ + query + q);
      Ints its = {};
      if (segments_) its = Load<Ints>(Padded<int32_t>(segments_ + query + q, Left(n_queries - q)).values);
      for (int64_t c = key; c < key + n; ++c) {
        Ints hidden = Ints{} + (mask_ && !mask_[c] ? -1 : 0);
        if (a_.causal) hidden |= int32_t(c) > at;
        if (a_.window) hidden |= at - int32_t(a_.window) >= int32_t(c);
        if (segments_) hidden |= its != segments_[c];
        Hide(hidden, s + (c - key) * kQueries + q);
      }
    }
  }

  // The same for scores s[q, c], with kKeys keys in a row.
  void HideKeys(int64_t query, int64_t n_queries, int64_t key, int64_t n, float* s) const {
    for (int64_t c = 0; c < n; c += kLanes) {
      const Ints at = Counted() + int32_t(key + c);
      Ints its = {}, unreal = {};
      if (segments_) its = Load<Ints>(Padded<int32_t>(segments_ + key + c, Left(n - c)).values);
      if (mask_) {
        Padded<int32_t> flags;
        for (int64_t k = 0; k < Left(n - c); ++k) flags.values[k] = mask_[key + c + k] ? 0 : -1;
        unreal = Load<Ints>(flags.values);
      }
      for (int64_t q = query; q < query + n_queries; ++q) {
        const int32_t position = int32_t(start_ + q);
        Ints hidden = unreal;
        if (a_.causal) hidden |= at > position;
        if (a_.window) hidden |= at <= position - int32_t(a_.window);
        if (segments_) hidden |= its != segments_[q];
        Hide(hidden, s + (q - query) * kKeys + c);
      }
    }
  }

 private:
  static int64_t Left(int64_t n) { return std::min<int64_t>(n, kLanes); }
  static void Hide(Ints hidden, float* s) {
    const Floats score = hidden ? Floats{} + kNothing : Load<Floats>(s);
    std::memcpy(s, &score, sizeof score);
  }

  const Attention& a_;
  const bool* mask_;
  const int32_t* segments_;
  const int64_t start_;
  std::vector<Range> of_queries_, of_keys_;
  std::vector<Seen> real_;
};

std::vector<Sight> Sights(const Attention& a) {
  std::vector<Sight> sights;
  for (int64_t b = 0; b < a.n_rows; ++b) sights.emplace_back(a, b);
  return sights;
}

// Calls work(i) for i below n, on as many threads as that many products are worth.
template <typename Work>
void Share(const Pool& pool, const Attention& a, int64_t n, const Work& work) {
  constexpr int64_t kWorthwhile = 1 << 19;
  const int64_t products = a.n_rows * a.n_heads * a.n_queries * a.n_keys * (a.d_key + a.d_value);
  const int64_t n_threads =
      std::clamp<int64_t>(products / kWorthwhile, 1, std::max<int64_t>(1, pool.n_threads));
  InParallel(pool, n_threads, n, work);
}

// What a task keeps while it goes over the keys of some queries. Queries are in the lanes.
class Forward {
 public:
  explicit Forward(const Attention& a)
      : a_(a),
        query_(a.d_key * kQueries),
        scores_(kKeys * kQueries),
        out_(a.d_value * kQueries) {}

  // Queries of tile i of head h, which is counted over all rows.
  void Run(const Sight& sight, int64_t h, int64_t i, float* y, float* z) {
    const int64_t first = i * kQueries, n = std::min(kQueries, a_.n_queries - first);
    const int64_t g = h / a_.group(), n_wide = Whole(n), at = h * a_.n_queries + first;
    Transpose(a_.query + at * a_.d_key, n, a_.d_key, a_.scale, query_.data(), kQueries);
    std::fill(out_.begin(), out_.end(), 0.0f);
    for (int64_t q = 0; q < kQueries; ++q) {
      most_[q] = std::numeric_limits<float>::lowest();
      total_[q] = 0;
    }
    for (int64_t j = 0; j * kKeys < a_.n_keys; ++j) {
      const Seen seen = sight.Tile(i, j);
      if (seen == Seen::kNothing) continue;
      const int64_t key = j * kKeys, n_keys = std::min(kKeys, a_.n_keys - key);
      const int64_t from = g * a_.n_keys + key;
      Multiply({a_.keys + from * a_.d_key, a_.d_key, 1}, {query_.data(), kQueries}, n_keys,
               a_.d_key, n_wide, false, scores_.data(), kQueries);
      if (a_.softcap) CapAll(n_keys, n_wide);
      if (seen == Seen::kSome) sight.HideFromQueries(first, n, key, n_keys, scores_.data());
      Exponents(n_keys, n_wide);
      Multiply({a_.values + from * a_.d_value, 1, a_.d_value}, {scores_.data(), kQueries},
               a_.d_value, n_keys, n_wide, true, out_.data(), kQueries);
    }
    Finish(n, y + at * a_.d_value, z + at);
  }

 private:
  void CapAll(int64_t n_keys, int64_t n) {
    for (int64_t c = 0; c < n_keys; ++c) {
      for (int64_t q = 0; q < n; q += kLanes) {
        float* at = &scores_[c * kQueries + q];
        const Floats s = Capped(Load<Floats>(at), a_.softcap);
        std::memcpy(at, &s, sizeof s);
      }
    }
  }

  // Makes e^(s − most) of scores, and what was summed before fit a new maximum.
  void Exponents(int64_t n_keys, int64_t n) {
    for (int64_t q = 0; q < n; q += kLanes) {
      const Floats before = Load<Floats>(most_ + q);
      Floats most = before;
      float* s = &scores_[q];
      for (int64_t c = 0; c < n_keys; ++c) most = Larger(Load<Floats>(s + c * kQueries), most);
      Floats total = {};
      for (int64_t c = 0; c < n_keys; ++c) {
        const Floats p = Exp(Load<Floats>(s + c * kQueries) - most);
        std::memcpy(s + c * kQueries, &p, sizeof p);
        total += p;
      }
      const Floats shrink = Exp(before - most);
      total += shrink * Load<Floats>(total_ + q);
      std::memcpy(most_ + q, &most, sizeof most);
      std::memcpy(total_ + q, &total, sizeof total);
      for (int64_t d = 0; d < a_.d_value; ++d) {
        float* at = &out_[d * kQueries + q];
        const Floats out = shrink * Load<Floats>(at);
        std::memcpy(at, &out, sizeof out);
      }
    }
  }

  void Finish(int64_t n, float* y, float* z) {
    for (int64_t q = 0; q < n; ++q) {
      const bool some = !(total_[q] == 0);
      const float inverse = some ? 1 / total_[q] : 1;
      z[q] = some ? most_[q] + std::log(total_[q]) : kFar;
      for (int64_t d = 0; d < a_.d_value; ++d) y[q * a_.d_value + d] = inverse * out_[d * kQueries + q];
    }
  }

  const Attention& a_;
  std::vector<float> query_, scores_, out_;
  float most_[kQueries], total_[kQueries];
};

// What a task keeps while it goes over the queries of some keys, which are in the lanes.
class Backward {
 public:
  Backward(const Attention& a, const Cotangents& ct)
      : a_(a),
        ct_(ct),
        keys_(a.d_key * kKeys),
        scaled_(a.d_key * kKeys),
        values_(a.d_value * kKeys),
        query_(a.d_key * kQueries),
        p_(kQueries * kKeys),
        d_s_(kQueries * kKeys) {}

  // Adds up the gradients of the keys and values of tile j of head g, which is counted over all
  // rows; `turns` has for each tile of queries how many tiles of keys have been added to theirs.
  void Run(const Sight& sight, int64_t g, int64_t j, std::atomic<int64_t>* turns) {
    const int64_t key = j * kKeys, n_keys = std::min(kKeys, a_.n_keys - key);
    const int64_t from = g * a_.n_keys + key, n_tiles = CeilDiv(a_.n_queries, kQueries);
    const float* keys = a_.keys + from * a_.d_key;
    Transpose(keys, n_keys, a_.d_key, 1, keys_.data(), kKeys);
    Transpose(a_.values + from * a_.d_value, n_keys, a_.d_value, 1, values_.data(), kKeys);
    Scale(keys, n_keys * a_.d_key, a_.scale, scaled_.data());
    float *d_keys = ct_.keys + from * a_.d_key, *d_values = ct_.values + from * a_.d_value;
    std::fill_n(d_keys, n_keys * a_.d_key, 0.0f);
    std::fill_n(d_values, n_keys * a_.d_value, 0.0f);
    for (int64_t h = g * a_.group(); h < (g + 1) * a_.group(); ++h) {
      for (int64_t i = sight.FirstQueries(j); i < n_tiles; ++i) {
        const int64_t first = i * kQueries, n = std::min(kQueries, a_.n_queries - first);
        float* d_query = ct_.query + (h * a_.n_queries + first) * a_.d_key;
        std::atomic<int64_t>& turn = turns[h * n_tiles + i];
        const Seen seen = sight.Tile(i, j);
        if (seen != Seen::kNothing) {
          Scores(sight, seen, h, first, n, key, n_keys);
          const float* d_out = ct_.out + (h * a_.n_queries + first) * a_.d_value;
          Multiply({p_.data(), 1, kKeys}, {d_out, a_.d_value}, n_keys, n, a_.d_value, true,
                   d_values, a_.d_value);
          Multiply({d_s_.data(), 1, kKeys}, {query_.data(), a_.d_key}, n_keys, n, a_.d_key, true,
                   d_keys, a_.d_key);
        }
        // Tiles are added in their order, whoever computes them: sums do not depend on threads.
        while (turn.load(std::memory_order_acquire) < j) std::this_thread::yield();
        if (seen != Seen::kNothing) {
          Multiply({d_s_.data(), kKeys, 1}, {scaled_.data(), a_.d_key}, n, n_keys, a_.d_key, j > 0,
                   d_query, a_.d_key);
        } else if (j == 0) {
          std::fill_n(d_query, n * a_.d_key, 0.0f);
        }
        turn.store(j + 1, std::memory_order_release);
      }
    }
  }

 private:
  // The probabilities of a tile, and the cotangents of its scores.
  void Scores(const Sight& sight, Seen seen, int64_t h, int64_t first, int64_t n, int64_t key,
              int64_t n_keys) {
    const int64_t at = h * a_.n_queries + first, n_wide = Whole(n_keys);
    Scale(a_.query + at * a_.d_key, n * a_.d_key, a_.scale, query_.data());
    Multiply({query_.data(), a_.d_key, 1}, {keys_.data(), kKeys}, n, a_.d_key, n_wide, false,
             p_.data(), kKeys);
    Multiply({ct_.out + at * a_.d_value, a_.d_value, 1}, {values_.data(), kKeys}, n, a_.d_value,
             n_wide, false, d_s_.data(), kKeys);
    const float cap = a_.softcap, slope = cap ? 1 / cap : 0;
    if (cap) {
      for (int64_t i = 0; i < n * kKeys; i += kLanes) {
        const Floats s = Capped(Load<Floats>(&p_[i]), cap);
        std::memcpy(&p_[i], &s, sizeof s);
      }
    }
    if (seen == Seen::kSome) sight.HideKeys(first, n, key, n_keys, p_.data());
    for (int64_t q = 0; q < n; ++q) {
      const float z = ct_.z[at + q], dot = ct_.dots[at + q];
      for (int64_t c = q * kKeys; c < q * kKeys + n_wide; c += kLanes) {
        const Floats s = Load<Floats>(&p_[c]), p = Exp(s - z);
        Floats d_s = p * (Load<Floats>(&d_s_[c]) - dot);
        if (cap) d_s *= s == kNothing ? Floats{} : 1 - (s * slope) * (s * slope);
        std::memcpy(&p_[c], &p, sizeof p);
        std::memcpy(&d_s_[c], &d_s, sizeof d_s);
      }
    }
  }

  const Attention& a_;
  const Cotangents& ct_;
  std::vector<float> keys_, scaled_, values_, query_, p_, d_s_;
};

}  // namespace

void FlashForward(const Pool& pool, const Attention& a, float* y, float* z) {
  const std::vector<Sight> sights = Sights(a);
  const int64_t n_tiles = CeilDiv(a.n_queries, kQueries), n = a.n_rows * a.n_heads;
  Share(pool, a, n * n_tiles, [&](int64_t i) {
    const int64_t h = i % n, tile = n_tiles - 1 - i / n;  // the last see most keys: first
    Forward(a).Run(sights[h / a.n_heads], h, tile, y, z);
  });
}

void FlashBackward(const Pool& pool, const Attention& a, const float* y, const float* z,
                   const float* d_y, float* d_query, float* d_keys, float* d_values) {
  const std::vector<Sight> sights = Sights(a);
  const int64_t n = a.n_rows * a.n_heads, n_keyed = n / a.group();
  std::vector<float> dots(n * a.n_queries);
  Share(pool, a, n, [&](int64_t h) {
    for (int64_t q = h * a.n_queries; q < (h + 1) * a.n_queries; ++q) {
      Floats sum = {};
      for (int64_t d = q * a.d_value; d < (q + 1) * a.d_value; d += kLanes) {
        sum += Load<Floats>(y + d) * Load<Floats>(d_y + d);
      }
      dots[q] = Sum(sum);
    }
  });
  const Cotangents ct{d_y, z, dots.data(), d_query, d_keys, d_values};
  std::vector<std::atomic<int64_t>> turns(n * CeilDiv(a.n_queries, kQueries));
  Share(pool, a, n_keyed * CeilDiv(a.n_keys, kKeys), [&](int64_t i) {
    const int64_t g = i % n_keyed;
    Backward(a, ct).Run(sights[g * a.group() / a.n_heads], g, i / n_keyed, turns.data());
  });
}

}  // namespace layercomb
