// Products of tiles, whose sums stay in registers. A sum is added up in the order of its terms,
// however the rows are taken together, and whichever factor is in the lanes.

#pragma once

#include "kernels.h"
#include "vectors.h"

namespace layercomb {

// Sums that stay in registers: kRows rows of kVectors vectors.
#if defined(LAYERCOMB_WIDE) || defined(__aarch64__)
constexpr int kVectors = 4, kRows = 6;
#elif defined(__AVX__)
constexpr int kVectors = 2, kRows = 6;
#else
constexpr int kVectors = 2, kRows = 4;
#endif

// A factor of a product, by rows, of which the elements of a column are `step` apart.
struct Left {
  const float* at;
  int64_t row, step;
};

// Rows of vectors.
struct Right {
  const float* at;
  int64_t row;
};

// y[r] = (y[r] if add) + Σ_i a[r, i] b[i] for R rows of V vectors, of which the next is at y + row.
template <int R, int V>
void Block(Left a, Right b, int64_t n, bool add, float* y, int64_t row) {
  Floats sums[R][V] = {};
  for (int64_t i = 0; i < n; ++i, a.at += a.step, b.at += b.row) {
    Floats its[V];
    LAYERCOMB_UNROLL
    for (int v = 0; v < V; ++v) its[v] = Load<Floats>(b.at + v * kLanes);
    LAYERCOMB_UNROLL
    for (int r = 0; r < R; ++r) {
      const float factor = a.at[r * a.row];
      LAYERCOMB_UNROLL
      for (int v = 0; v < V; ++v) sums[r][v] += factor * its[v];
    }
  }
  LAYERCOMB_UNROLL
  for (int r = 0; r < R; ++r) {
    LAYERCOMB_UNROLL
    for (int v = 0; v < V; ++v) {
      float* to = y + r * row + v * kLanes;
      const Floats sum = add ? Load<Floats>(to) + sums[r][v] : sums[r][v];
      std::memcpy(to, &sum, sizeof sum);
    }
  }
}

// The same for n_rows rows, R at a time.
template <int R, int V>
void Rows(Left a, Right b, int64_t n_rows, int64_t n, bool add, float* y, int64_t row) {
  for (; n_rows >= R; n_rows -= R, a.at += R * a.row, y += R * row) {
    Block<R, V>(a, b, n, add, y, row);
  }
  if constexpr (R > 1) {
    if (n_rows) Rows<R / 2, V>(a, b, n_rows, n, add, y, row);
  }
}

// y[r, j] = (y[r, j] if add) + Σ_i a[r, i] b[i, j], for n_rows rows r, and columns j of which there
// are a whole number of vectors.
template <int V = kVectors>
void Multiply(Left a, Right b, int64_t n_rows, int64_t n, int64_t n_columns, bool add, float* y,
              int64_t row) {
  int64_t j = 0;
  for (; j + V * kLanes <= n_columns; j += V * kLanes) {
    Rows<kRows, V>(a, {b.at + j, b.row}, n_rows, n, add, y + j, row);
  }
  if constexpr (V > 1) {
    if (j < n_columns) {
      Multiply<V / 2>(a, {b.at + j, b.row}, n_rows, n, n_columns - j, add, y + j, row);
    }
  }
}

// y[j, i] = factor · x[i, j] for n_x rows of n, with zeros behind them up to `row`.
inline void Transpose(const float* x, int64_t n_x, int64_t n, float factor, float* y, int64_t row) {
  constexpr int64_t kTogether = 8;
  for (int64_t first = 0; first < n_x; first += kTogether) {
    const int64_t count = std::min(kTogether, n_x - first);
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t i = first; i < first + count; ++i) y[j * row + i] = factor * x[i * n + j];
    }
  }
  if (n_x < row) {
    for (int64_t j = 0; j < n; ++j) std::fill(y + j * row + n_x, y + (j + 1) * row, 0.0f);
  }
}

inline int64_t Whole(int64_t n) { return CeilDiv(n, kLanes) * kLanes; }

// The numbers 0, 1, 2 … in the lanes.
inline Ints Counted() {
  int32_t numbers[kLanes];
  for (int i = 0; i < kLanes; ++i) numbers[i] = i;
  return Load<Ints>(numbers);
}

}  // namespace layercomb
