// Attention of one query: to all keys of a cache, of which only the seen part is read, and what it
// has in common with some keys alone.

#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"
#include "vectors.h"

namespace layercomb {
namespace {

float Dot(const float* a, const float* b, int64_t n) {
  Floats sums[2] = {};  // an addition waits for the last
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    sums[0] += Load<Floats>(a + i) * Load<Floats>(b + i);
    sums[1] += Load<Floats>(a + i + kLanes) * Load<Floats>(b + i + kLanes);
  }
  float total = Sum(sums[0] + sums[1]);
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

// e^x for x ≤ 0 to 3 units in the last place: 2^k times a polynomial in what is left of x, at most
// half a binary place; 0 where that is below the smallest normal number, NaN for NaN.
Floats Exp(Floats x) {
  constexpr float kNearest = 3 << 22;  // the sum's last bits are then the nearest integer
  constexpr float kTaylor[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
  const Floats low = Floats{} - 87;
  const Floats clamped = x < low ? low : x;
  const Floats shifted = clamped * 1.44269504f + kNearest;
  const Floats k = shifted - kNearest;
  const Floats rest = (clamped - k * 0.693359375f) + k * 2.12194440e-4f;  // log 2 in two parts
  Floats y = Floats{} + kTaylor[0];
  LAYERCOMB_UNROLL
  for (int i = 1; i < 7; ++i) y = y * rest + kTaylor[i];
  const Ints power = (reinterpret_cast<Ints>(shifted) << 23) + (127 << 23);
  return x < low ? Floats{} : y * reinterpret_cast<Floats>(power);
}

// Adds Σ_c p[c] rows[c · n + j] for V vectors of columns.
template <int V>
void AddColumns(const float* p, const float* rows, int64_t n_rows, int64_t n, float* y) {
  Floats sums[2][V] = {};
  auto add = [&](int which, int64_t c) {
    LAYERCOMB_UNROLL
    for (int v = 0; v < V; ++v) sums[which][v] += p[c] * Load<Floats>(rows + c * n + v * kLanes);
  };
  int64_t c = 0;
  for (; c + 2 <= n_rows; c += 2) {
    add(0, c);
    add(1, c + 1);
  }
  if (c < n_rows) add(0, c);
  LAYERCOMB_UNROLL
  for (int v = 0; v < V; ++v) {
    const Floats sum = sums[0][v] + sums[1][v];
    std::memcpy(y + v * kLanes, &sum, sizeof sum);
  }
}

// y = Σ_c p[c] rows[c] for rows of n.
void SumOfRows(const float* p, const float* rows, int64_t n_rows, int64_t n, float* y) {
  int64_t j = 0;
  for (; j + 4 * kLanes <= n; j += 4 * kLanes) AddColumns<4>(p, rows + j, n_rows, n, y + j);
  for (; j + kLanes <= n; j += kLanes) AddColumns<1>(p, rows + j, n_rows, n, y + j);
  for (; j < n; ++j) {
    y[j] = 0;
    for (int64_t c = 0; c < n_rows; ++c) y[j] += p[c] * rows[c * n + j];
  }
}

// What one query makes of the first n keys. `p` has room for them, in whole vectors.
void Attend(const Heads& sizes, const float* query, const float* keys, const float* values,
            const bool* seen, int64_t n, float* p, float* y) {
  constexpr float kFar = -std::numeric_limits<float>::infinity();
  const int64_t n_whole = CeilDiv(n, kLanes) * kLanes;
  float most = std::numeric_limits<float>::lowest();
  for (int64_t c = 0; c < n; ++c) {
    p[c] = seen[c] ? Dot(query, keys + c * sizes.d_key, sizes.d_key) : kFar;
    most = p[c] > most ? p[c] : most;
  }
  std::fill(p + n, p + n_whole, kFar);
  Floats totals = {};
  for (int64_t c = 0; c < n_whole; c += kLanes) {
    const Floats e = Exp(Load<Floats>(p + c) - most);
    std::memcpy(p + c, &e, sizeof e);
    totals += e;
  }
  SumOfRows(p, values, n, sizes.d_value, y);
  const float total = Sum(totals);
  for (int64_t j = 0; j < sizes.d_value; ++j) y[j] /= total == 0 ? 1 : total;
}

// The rows that one query asks for, which lie anywhere: no hardware looks ahead.
struct Rows {
  const Some& sizes;
  const int32_t* at;
  const float* rows;

  const float* operator()(int64_t k) const {
    return rows + std::clamp<int64_t>(at[k], 0, sizes.n_keys - 1) * sizes.d;
  }
  void Prefetch(int64_t k) const {
    constexpr int64_t kAhead = 8, kLine = 16;
    if (k + kAhead >= sizes.n_k) return;
    const float* row = (*this)(k + kAhead);
    for (int64_t j = 0; j < sizes.d; j += kLine) __builtin_prefetch(row + j, 0, 3);
  }
};

// Calls work(n, its rows) for each query.
template <typename Work>
void ForRows(const Pool& pool, const Some& sizes, const int32_t* at, const float* rows,
             const Work& work) {
  InPieces(pool, 4 * sizes.n_x * sizes.n_k * sizes.d, sizes.n_x, 1, [&](int64_t first, int64_t n) {
    for (int64_t i = first; i < first + n; ++i) {
      work(i, Rows{sizes, at + i * sizes.n_k, rows + i * sizes.n_keys * sizes.d});
    }
  });
}

}  // namespace

void QueryAttention(const Pool& pool, const Heads& sizes, const float* query, const float* keys,
                    const float* values, const bool* seen, float* y) {
  std::vector<int64_t> n_seen(sizes.n_x, sizes.n_keys);  // and what lies behind them is not read
  int64_t n_read = 0;
  for (int64_t m = 0; m < sizes.n_x; ++m) {
    while (n_seen[m] && !seen[m * sizes.n_keys + n_seen[m] - 1]) --n_seen[m];
    n_read += n_seen[m] * sizes.n_heads;
  }
  const int64_t bytes = 4 * n_read * (sizes.d_key + sizes.d_value);
  InPieces(pool, bytes, sizes.n_x * sizes.n_heads, 1, [&](int64_t first, int64_t n) {
    std::vector<float> p(sizes.n_keys + kLanes);
    for (int64_t i = first; i < first + n; ++i) {
      const int64_t m = i / sizes.n_heads;
      Attend(sizes, query + i * sizes.d_key, keys + i * sizes.n_keys * sizes.d_key,
             values + i * sizes.n_keys * sizes.d_value, seen + m * sizes.n_keys, n_seen[m],
             p.data(), y + i * sizes.d_value);
    }
  });
}

void GatheredCosines(const Pool& pool, const Some& sizes, const float* x, const int32_t* at,
                     const float* keys, float epsilon, float* y) {
  const int64_t d = sizes.d;
  ForRows(pool, sizes, at, keys, [&](int64_t n, const Rows& key) {
    for (int64_t k = 0; k < sizes.n_k; ++k) {
      const float* its = key(k);
      key.Prefetch(k);
      y[n * sizes.n_k + k] = Dot(x + n * d, its, d) / std::sqrt(Dot(its, its, d) + epsilon);
    }
  });
}

void GatheredMeans(const Pool& pool, const Some& sizes, const float* p, const int32_t* at,
                   const float* values, float* y) {
  const int64_t d = sizes.d;
  ForRows(pool, sizes, at, values, [&](int64_t n, const Rows& value) {
    float* sum = y + n * d;
    std::fill_n(sum, d, 0.0f);
    for (int64_t k = 0; k < sizes.n_k; ++k) {
      const float *its = value(k), its_p = p[n * sizes.n_k + k];
      value.Prefetch(k);
      int64_t j = 0;
      for (; j + kLanes <= d; j += kLanes) {
        const Floats total = Load<Floats>(sum + j) + its_p * Load<Floats>(its + j);
        std::memcpy(sum + j, &total, sizeof total);
      }
      for (; j < d; ++j) sum[j] += its_p * its[j];
    }
  });
}

}  // namespace layercomb
