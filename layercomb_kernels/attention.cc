// Attention of one query: to all keys of a cache, of which only the seen part is read, and what it
// has in common with some keys alone.

#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"
#include "queries.h"
#include "vectors.h"

namespace layercomb {
namespace {

// y[r] = Σ_c p[r][c] rows[c · n + j] for V vectors of columns; every row is read once for R sums.
template <int R, int V>
void AddColumns(const float* p, int64_t n_p, const float* rows, int64_t n_rows, int64_t n, float* y,
                int64_t n_y) {
  constexpr int kChains = R == 1 ? 2 : 1;  // an addition waits for the last
  Floats sums[kChains][R][V] = {};
  auto add = [&](int which, int64_t c) {
    LAYERCOMB_UNROLL
    for (int v = 0; v < V; ++v) {
      const Floats row = Load<Floats>(rows + c * n + v * kLanes);
      LAYERCOMB_UNROLL
      for (int r = 0; r < R; ++r) sums[which][r][v] += p[r * n_p + c] * row;
    }
  };
  int64_t c = 0;
  for (; c + 2 <= n_rows; c += 2) {
    add(0, c);
    add(kChains - 1, c + 1);
  }
  if (c < n_rows) add(0, c);
  LAYERCOMB_UNROLL
  for (int r = 0; r < R; ++r) {
    LAYERCOMB_UNROLL
    for (int v = 0; v < V; ++v) {
      const Floats sum = R == 1 ? sums[0][r][v] + sums[kChains - 1][r][v] : sums[0][r][v];
      std::memcpy(y + r * n_y + v * kLanes, &sum, sizeof sum);
    }
  }
}

// y[r] = Σ_c p[r][c] rows[c] for rows of n, and R of n_p values p.
template <int R>
void SumOfRows(const float* p, int64_t n_p, const float* rows, int64_t n_rows, int64_t n, float* y) {
#if defined(LAYERCOMB_WIDE)
  constexpr int V = 4;  // R · V sums stay in registers
#else
  constexpr int V = R > 2 ? 2 : 4;
#endif
  int64_t j = 0;
  for (; j + V * kLanes <= n; j += V * kLanes) {
    AddColumns<R, V>(p, n_p, rows + j, n_rows, n, y + j, n);
  }
  for (; j + kLanes <= n; j += kLanes) AddColumns<R, 1>(p, n_p, rows + j, n_rows, n, y + j, n);
  for (; j < n; ++j) {
    for (int r = 0; r < R; ++r) {
      float sum = 0;
      for (int64_t c = 0; c < n_rows; ++c) sum += p[r * n_p + c] * rows[c * n + j];
      y[r * n + j] = sum;
    }
  }
}

// Scores to what is to be normalized, in place: e^(s − most) for the first n, in whole vectors.
// Returns their sum.
float Exponents(float* p, int64_t n, float most, float softcap) {
  constexpr float kFar = -std::numeric_limits<float>::infinity();
  const int64_t n_whole = CeilDiv(n, kLanes) * kLanes;
  std::fill(p + n, p + n_whole, kFar);
  if (softcap) most = Capped(Floats{} + most, softcap)[0];
  Floats totals = {};
  for (int64_t c = 0; c < n_whole; c += kLanes) {
    Floats s = Load<Floats>(p + c);
    if (softcap) s = s == kFar ? s : Capped(s, softcap);
    const Floats e = Exp(s - most);
    std::memcpy(p + c, &e, sizeof e);
    totals += e;
  }
  return Sum(totals);
}

// What R queries of neighbouring heads, which share keys, make of n keys; `p` has room for them.
template <int R>
void Attend(const Keys& its, const float* query, int64_t n, float softcap, float* p, float* y) {
  constexpr float kFar = -std::numeric_limits<float>::infinity();
  const int64_t room = RoomFor(n), d_value = its.d_value;
  float most[R];
  std::fill_n(most, R, std::numeric_limits<float>::lowest());
  for (int64_t c = 0; c < n; ++c) {
    float scores[R];
    if (!its.seen || its.seen[c]) {
      Dots<R>(query, its.keys + c * its.d_key, its.d_key, scores);
    } else {
      std::fill_n(scores, R, kFar);
    }
    LAYERCOMB_UNROLL
    for (int r = 0; r < R; ++r) {
      most[r] = scores[r] > most[r] ? scores[r] : most[r];
      p[r * room + c] = scores[r];
    }
  }
  float totals[R];
  for (int r = 0; r < R; ++r) totals[r] = Exponents(p + r * room, n, most[r], softcap);
  SumOfRows<R>(p, room, its.values, n, d_value, y);
  for (int r = 0; r < R; ++r) {
    const float total = totals[r] == 0 ? 1 : totals[r];
    for (int64_t j = 0; j < d_value; ++j) y[r * d_value + j] /= total;
  }
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
      const float* its = rows + i / sizes.group * sizes.n_keys * sizes.d;
      work(i, Rows{sizes, at + i * sizes.n_k, its});
    }
  });
}

}  // namespace

void AttendTogether(const Keys& its, const float* query, int64_t r, int64_t n, float softcap,
                    float* p, float* y) {
  if (r == 1) Attend<1>(its, query, n, softcap, p, y);
  if (r == 2) Attend<2>(its, query, n, softcap, p, y);
  if (r == 3) Attend<3>(its, query, n, softcap, p, y);
  if (r == 4) Attend<4>(its, query, n, softcap, p, y);
}

void QueryAttention(const Pool& pool, const Heads& sizes, const float* query, const float* keys,
                    const float* values, const bool* seen, float softcap, float* y) {
  std::vector<int64_t> n_seen(sizes.n_x, sizes.n_keys);  // and what lies behind them is not read
  int64_t n_read = 0;
  for (int64_t m = 0; m < sizes.n_x; ++m) {
    while (n_seen[m] && !seen[m * sizes.n_keys + n_seen[m] - 1]) --n_seen[m];
    n_read += n_seen[m] * sizes.n_heads / sizes.group;
  }
  const int64_t bytes = 4 * n_read * (sizes.d_key + sizes.d_value);
  const int64_t n = sizes.n_x * sizes.n_heads;
  InPieces(pool, bytes, n, Together(pool.n_threads, n, sizes.group), [&](int64_t first, int64_t count) {
    std::vector<float> p(std::min(kTogether, sizes.group) * RoomFor(sizes.n_keys));
    for (int64_t i = first, r; i < first + count; i += r) {
      r = std::min({kTogether, sizes.group - i % sizes.group, first + count - i});
      const int64_t m = i / sizes.n_heads, at = i / sizes.group * sizes.n_keys;
      const Keys its{keys + at * sizes.d_key, values + at * sizes.d_value,
                     seen + m * sizes.n_keys, sizes.d_key, sizes.d_value};
      AttendTogether(its, query + i * sizes.d_key, r, n_seen[m], softcap, p.data(),
                     y + i * sizes.d_value);
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
