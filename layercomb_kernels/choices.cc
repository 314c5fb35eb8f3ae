// Which unit of each block a controller of low rank chooses.

#include <vector>

#include "products.h"
#include "vectors.h"

namespace layercomb {
namespace {

// y[f] += Σ_r x[r] w[r · stride + f] for n values and R rows.
template <int R>
void AddRows(const float* x, const float* w, int64_t stride, int64_t n, float* y) {
  int64_t f = 0;
  for (; f + kLanes <= n; f += kLanes) {
    Floats total = Load<Floats>(y + f);
    LAYERCOMB_UNROLL
    for (int r = 0; r < R; ++r) total += x[r] * Load<Floats>(w + r * stride + f);
    std::memcpy(y + f, &total, sizeof total);
  }
  for (; f < n; ++f) {
    for (int r = 0; r < R; ++r) y[f] += x[r] * w[r * stride + f];
  }
}

// y = x w for n columns of w, whose rows are `stride` long, in the order in which it is kept.
void Multiply(const float* x, const float* w, int64_t n_rows, int64_t stride, int64_t n, float* y) {
  constexpr int R = 8;
  std::fill_n(y, n, 0.0f);
  int64_t r = 0;
  for (; r + R <= n_rows; r += R) AddRows<R>(x + r, w + r * stride, stride, n, y);
  for (; r < n_rows; ++r) AddRows<1>(x + r, w + r * stride, stride, n, y);
}

// The first of the largest of n; the last one where there is NaN.
int64_t Largest(const float* c, int64_t n) {
  int64_t best = 0;
  bool known = true;
  for (int64_t i = 0; i < n; ++i) {
    if (c[i] > c[best]) best = i;
    known &= c[i] == c[i];
  }
  return known ? best : n - 1;
}

}  // namespace

void LargestUnits(const float* x, const float* second, int64_t rank, int64_t n_units,
                  int64_t n_block, int64_t first, int64_t n, int32_t* at) {
  std::vector<float> logits(n * n_block);
  Multiply(x, second + first * n_block, rank, n_units, n * n_block, logits.data());
  for (int64_t b = 0; b < n; ++b) {
    const int64_t best = Largest(&logits[b * n_block], n_block);
    at[first + b] = static_cast<int32_t>((first + b) * n_block + best);
  }
}

void ChosenUnits(const Pool& pool, const float* x, const float* first, const float* second,
                 int64_t n_x, int64_t d, int64_t rank, int64_t n, int64_t n_block, int32_t* y) {
  std::vector<float> inner(rank);
  for (int64_t m = 0; m < n_x; ++m, y += n / n_block) {
    Multiply(x + m * d, first, d, rank, rank, inner.data());
    InPieces(pool, 4 * rank * n, n / n_block, 8, [&](int64_t b, int64_t n_b) {
      LargestUnits(inner.data(), second, rank, n, n_block, b, n_b, y);
    });
  }
}

}  // namespace layercomb
