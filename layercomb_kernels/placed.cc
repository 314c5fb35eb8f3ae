// Attention of one query to the keys at some positions of a cache, to those near by and to the first
// ones.
//
// The rows lie anywhere, in memory that no cache of the processor has, but all their positions are
// known before the first is needed: each is asked for as soon as it is found.

#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"
#include "vectors.h"

namespace layercomb {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A hash table of positions.
class Seen {
 public:
  explicit Seen(int64_t most) {
    while ((int64_t(1) << bits_) < 2 * most) ++bits_;
    table_.resize(int64_t(1) << bits_);
  }
  void Clear() { std::fill(table_.begin(), table_.end(), -1); }
  // Whether this position was not there yet.
  bool Add(int32_t position) {
    size_t i = uint32_t(position) * 2654435769u >> (32 - bits_);
    while (table_[i] >= 0) {
      if (table_[i] == position) return false;
      i = (i + 1) & (table_.size() - 1);
    }
    table_[i] = position;
    return true;
  }

 private:
  int bits_ = 1;
  std::vector<int32_t> table_;
};

void Fetch(const float* row, int64_t n) {
  constexpr int64_t kLine = 16;
  for (int64_t j = 0; j < n; j += kLine) __builtin_prefetch(row + j, 0, 3);
}

// One query after the other.
class Reader {
 public:
  explicit Reader(const Placed& a)
      : a_(a), seen_(a.most()), at_(a.most()), p_(a.most() + kLanes) {}

  void Attend(int64_t i, float* y) {
    const int64_t first = i / a_.group() * a_.n_keys;  // of its keys
    const float *keys = a_.keys + first * a_.d_key, *values = a_.values + first * a_.d_value;
    Find(i, keys);
    for (int64_t c = 0; c < n_; ++c) {
      p_[c] = a_.scale * Dot(a_.query + i * a_.d_key, keys + at_[c] * a_.d_key, a_.d_key);
      Fetch(values + at_[c] * a_.d_value, a_.d_value);
    }
    Normalize();
    int64_t j = 0;
    constexpr int kMany = 64 / kLanes;
    for (; j + kMany * kLanes <= a_.d_value; j += kMany * kLanes) Add<kMany>(values + j, y + j);
    for (; j + kLanes <= a_.d_value; j += kLanes) Add<1>(values + j, y + j);
    for (; j < a_.d_value; ++j) {
      y[j] = 0;
      for (int64_t c = 0; c < n_; ++c) y[j] += p_[c] * values[at_[c] * a_.d_value + j];
    }
  }

 private:
  // Lists the positions that query i sees.
  void Find(int64_t i, const float* keys) {
    const int64_t b = i / (a_.n_queries / a_.n_rows);
    const int32_t *found = a_.found + i * a_.n_found, *at = a_.at + b * a_.n_keys;
    n_ = 0;
    if (!a_.real[b]) return;
    if (a_.once) seen_.Clear();
    const auto add = [&](int32_t position) {
      if (position < 0) return;
      position = std::min(position, int32_t(a_.n_keys - 1));
      if (a_.once && !seen_.Add(position)) return;
      Fetch(keys + position * a_.d_key, a_.d_key);
      at_[n_++] = position;
    };
    for (int64_t j = 0; j < a_.n_found; ++j) add(found[j]);
    const int64_t n = std::min<int64_t>(a_.n_real[b], a_.n_keys);
    for (int64_t j = n - 1; j >= std::max<int64_t>(n - a_.local_len, 0); --j) add(at[j]);
    for (int64_t j = 0; j < std::min(a_.n_sinks, n); ++j) add(at[j]);
  }

  // Scores become probabilities; zeros where all are −∞.
  void Normalize() {
    float most = -kInfinity;
    for (int64_t c = 0; c < n_; ++c) most = p_[c] > most ? p_[c] : most;
    if (a_.softcap) most = Capped(Floats{} + most, a_.softcap)[0];
    if (most == -kInfinity) most = 0;  // −∞ − 0 counts nothing, −∞ + ∞ would be NaN
    Floats totals = {};
    for (int64_t c = 0; c < n_; c += kLanes) {
      Floats s = Load<Floats>(&p_[c]);
      if (a_.softcap) s = Capped(s, a_.softcap);
      Floats e = Exp(s - most);
      for (int64_t i = n_ - c; i < kLanes; ++i) e[i] = 0;
      std::memcpy(&p_[c], &e, sizeof e);
      totals += e;
    }
    const float total = Sum(totals);
    for (int64_t c = 0; c < n_; ++c) p_[c] /= total == 0 ? 1 : total;
  }

  // V vectors of columns of the weighted sum.
  template <int V>
  void Add(const float* values, float* y) const {
    Floats sums[V] = {};
    for (int64_t c = 0; c < n_; ++c) {
      const float* row = values + at_[c] * a_.d_value;
      LAYERCOMB_UNROLL
      for (int v = 0; v < V; ++v) sums[v] += p_[c] * Load<Floats>(row + v * kLanes);
    }
    std::memcpy(y, sums, sizeof sums);
  }

  const Placed& a_;
  Seen seen_;
  std::vector<int64_t> at_;
  std::vector<float> p_;
  int64_t n_ = 0;
};

}  // namespace

void PlacedAttention(const Pool& pool, const Placed& a, float* y) {
  const int64_t bytes = 4 * a.n_queries * a.most() * (a.d_key + a.d_value);
  InPieces(pool, bytes, a.n_queries, 1, [&](int64_t first, int64_t n) {
    Reader reader(a);
    for (int64_t i = first; i < first + n; ++i) reader.Attend(i, y + i * a.d_value);
  });
}

}  // namespace layercomb
