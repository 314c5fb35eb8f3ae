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

inline float WidenedOne(float word) { return word; }
inline float WidenedOne(int8_t word) { return word; }
inline float WidenedOne(uint16_t word) {
  const uint32_t bits = uint32_t{word} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// out[r] = a[r] · b for R rows a of n, and words b, which are read once.
template <typename W, int R>
void DotsOf(const float* a, const typename W::Word* b, int64_t n, float* out) {
  constexpr int kChains = R == 1 ? 2 : 1;  // an addition waits for the last
  Floats sums[kChains][R] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes <= n; i += kChains * kLanes) {
    LAYERCOMB_UNROLL
    for (int k = 0; k < kChains; ++k) {
      const int64_t at = i + k * kLanes;
      const Floats its = Widened<W>(b + at);
      LAYERCOMB_UNROLL
      for (int r = 0; r < R; ++r) sums[k][r] += Load<Floats>(a + r * n + at) * its;
    }
  }
  LAYERCOMB_UNROLL
  for (int r = 0; r < R; ++r) {
    out[r] = Sum(R == 1 ? sums[0][r] + sums[kChains - 1][r] : sums[0][r]);
    for (int64_t j = i; j < n; ++j) out[r] += a[r * n + j] * WidenedOne(b[j]);
  }
}

// out[r] = the products of a[r] with four vectors of words, one after the other.
template <typename W, int R>
void FourDotsOf(const float* a, const typename W::Word* b, int64_t n, Four* out) {
  Floats sums[R][4] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    LAYERCOMB_UNROLL
    for (int k = 0; k < 4; ++k) {
      const Floats its = Widened<W>(b + k * n + i);
      LAYERCOMB_UNROLL
      for (int r = 0; r < R; ++r) sums[r][k] += Load<Floats>(a + r * n + i) * its;
    }
  }
  LAYERCOMB_UNROLL
  for (int r = 0; r < R; ++r) {
    out[r] = Sums(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
    for (int64_t j = i; j < n; ++j) {
      for (int k = 0; k < 4; ++k) out[r][k] += a[r * n + j] * WidenedOne(b[k * n + j]);
    }
  }
}

// y[r] = Σ_c p[r][c] rows[c · n + j] for V vectors of columns; every row is read once for R sums.
template <typename W, int R, int V>
void AddColumns(const float* p, int64_t n_p, const typename W::Word* rows, int64_t n_rows,
                int64_t n, float* y, int64_t n_y) {
  constexpr int kChains = R == 1 ? 2 : 1;  // an addition waits for the last
  Floats sums[kChains][R][V] = {};
  auto add = [&](int which, int64_t c) {
    LAYERCOMB_UNROLL
    for (int v = 0; v < V; ++v) {
      const Floats row = Widened<W>(rows + c * n + v * kLanes);
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
template <typename W, int R>
void SumOfRows(const float* p, int64_t n_p, const typename W::Word* rows, int64_t n_rows, int64_t n,
               float* y) {
#if defined(LAYERCOMB_WIDE)
  constexpr int V = 4;  // R · V sums stay in registers
#else
  constexpr int V = R > 2 ? 2 : 4;
#endif
  int64_t j = 0;
  for (; j + V * kLanes <= n; j += V * kLanes) {
    AddColumns<W, R, V>(p, n_p, rows + j, n_rows, n, y + j, n);
  }
  for (; j + kLanes <= n; j += kLanes) AddColumns<W, R, 1>(p, n_p, rows + j, n_rows, n, y + j, n);
  for (; j < n; ++j) {
    for (int r = 0; r < R; ++r) {
      float sum = 0;
      for (int64_t c = 0; c < n_rows; ++c) sum += p[r * n_p + c] * WidenedOne(rows[c * n + j]);
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
template <typename W, int R>
void Attend(const Keys& its, const float* query, int64_t n, float softcap, float* p, float* y) {
  using Word = typename W::Word;
  constexpr float kFar = -std::numeric_limits<float>::infinity();
  const int64_t room = RoomFor(n), d_key = its.keys.d, d_value = its.values.d;
  const Word* keys = static_cast<const Word*>(its.keys.words);
#if defined(LAYERCOMB_WIDE)
  constexpr bool kFours = true;
#else
  constexpr bool kFours = R <= 2;  // sums stay in registers
#endif
  Four most[R];
  std::fill_n(most, R, Four{} + std::numeric_limits<float>::lowest());
  const auto all_seen = [&](int64_t c) {
    return !its.seen || (its.seen[c] & its.seen[c + 1] & its.seen[c + 2] & its.seen[c + 3]);
  };
  for (int64_t c = 0; c < n;) {
    if (kFours && c + 4 <= n && all_seen(c)) {
      Four scores[R];
      FourDotsOf<W, R>(query, keys + c * d_key, d_key, scores);
      LAYERCOMB_UNROLL
      for (int r = 0; r < R; ++r) {
        if constexpr (W::integer) scores[r] *= Load<Four>(its.keys.scales + c);
        std::memcpy(p + r * room + c, &scores[r], sizeof scores[r]);
        most[r] = scores[r] > most[r] ? scores[r] : most[r];
      }
      c += 4;
      continue;
    }
    float scores[R];
    if (!its.seen || its.seen[c]) {
      DotsOf<W, R>(query, keys + c * d_key, d_key, scores);
      if constexpr (W::integer) {
        LAYERCOMB_UNROLL
        for (int r = 0; r < R; ++r) scores[r] *= its.keys.scales[c];
      }
    } else {
      std::fill_n(scores, R, kFar);
    }
    LAYERCOMB_UNROLL
    for (int r = 0; r < R; ++r) {
      most[r][0] = scores[r] > most[r][0] ? scores[r] : most[r][0];
      p[r * room + c] = scores[r];
    }
    ++c;
  }
  float totals[R];
  for (int r = 0; r < R; ++r) {
    const float its_most = std::max({most[r][0], most[r][1], most[r][2], most[r][3]});
    totals[r] = Exponents(p + r * room, n, its_most, softcap);
    if constexpr (W::integer) {
      for (int64_t c = 0; c < n; ++c) p[r * room + c] *= its.values.scales[c];
    }
  }
  SumOfRows<W, R>(p, room, static_cast<const Word*>(its.values.words), n, d_value, y);
  for (int r = 0; r < R; ++r) {
    const float total = totals[r] == 0 ? 1 : totals[r];
    for (int64_t j = 0; j < d_value; ++j) y[r * d_value + j] /= total;
  }
}

template <typename W>
void AttendAs(const Keys& its, const float* query, int64_t r, int64_t n, float softcap, float* p,
              float* y) {
  if (r == 1) Attend<W, 1>(its, query, n, softcap, p, y);
  if (r == 2) Attend<W, 2>(its, query, n, softcap, p, y);
  if (r == 3) Attend<W, 3>(its, query, n, softcap, p, y);
  if (r == 4) Attend<W, 4>(its, query, n, softcap, p, y);
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
  switch (its.keys.kind) {
    case Kind::kBfloat16: return AttendAs<Bfloat16>(its, query, r, n, softcap, p, y);
    case Kind::kInt8: return AttendAs<Int8>(its, query, r, n, softcap, p, y);
    default: return AttendAs<Float32>(its, query, r, n, softcap, p, y);
  }
}

void Store(Kind kind, const float* x, int64_t d, void* words, float* scale) {
  if (kind == Kind::kFloat32) {
    std::memcpy(words, x, d * sizeof(float));
    return;
  }
  if (kind == Kind::kBfloat16) {
    for (int64_t i = 0; i < d; ++i) {
      uint32_t bits;
      std::memcpy(&bits, x + i, sizeof bits);
      const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
      const uint32_t rounded = is_nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
      static_cast<uint16_t*>(words)[i] = static_cast<uint16_t>(rounded >> 16);
    }
    return;
  }
  float largest = 0;
  bool finite = true;
  for (int64_t i = 0; i < d; ++i) {
    largest = std::max(largest, std::abs(x[i]));
    finite &= std::isfinite(x[i]);
  }
  *scale = finite ? largest / 127 : std::numeric_limits<float>::quiet_NaN();
  const float divisor = finite && *scale > 0 ? *scale : 1;
  for (int64_t i = 0; i < d; ++i) {
    const float times = finite ? std::nearbyint(x[i] / divisor) : 0;
    static_cast<int8_t*>(words)[i] = static_cast<int8_t>(std::clamp(times, -127.0f, 127.0f));
  }
}

void QueryAttention(const Pool& pool, const Heads& sizes, const float* query, const Vectors& keys,
                    const Vectors& values, const bool* seen, float softcap, float* y) {
  std::vector<int64_t> n_seen(sizes.n_x, sizes.n_keys);  // and what lies behind them is not read
  int64_t n_read = 0;
  for (int64_t m = 0; m < sizes.n_x; ++m) {
    while (n_seen[m] && !seen[m * sizes.n_keys + n_seen[m] - 1]) --n_seen[m];
    n_read += n_seen[m] * sizes.n_heads / sizes.group;
  }
  const int64_t bytes = 4 * n_read * (keys.d + values.d);
  const int64_t n = sizes.n_x * sizes.n_heads;
  const int64_t unit = Together(pool.n_threads, n, sizes.group);
  InPieces(pool, bytes, n, unit, [&](int64_t first, int64_t count) {
    std::vector<float> p(std::min(kTogether, sizes.group) * RoomFor(sizes.n_keys));
    for (int64_t i = first, r; i < first + count; i += r) {
      r = std::min({kTogether, sizes.group - i % sizes.group, first + count - i});
      const int64_t m = i / sizes.n_heads, at = i / sizes.group * sizes.n_keys;
      const Keys its{keys.From(at), values.From(at), seen + m * sizes.n_keys};
      AttendTogether(its, query + i * keys.d, r, n_seen[m], softcap, p.data(), y + i * values.d);
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
