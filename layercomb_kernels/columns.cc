// Products of a few rows of activations with a float32 matrix (d, n) that is not transposed.

#include "products.h"
#include "vectors.h"

namespace layercomb {
namespace {

constexpr int kVectors = 4;                  // of a block of columns
constexpr int kBlock = kVectors * kLanes;    // its columns
constexpr int kChains = 4;                   // sums of a column, since an addition waits for the last
constexpr int64_t kAhead = 16;               // rows of w between what is read and what is fetched

// y[k] = x[k] · the V vectors of columns that begin at w, for M rows.
template <int M, int V>
void Block(const float* w, int64_t n, const float* x, int64_t d, float* y) {
  constexpr int C = M == 1 ? kChains : 1;
  Floats sums[C][M][V] = {};
  const auto add = [&](int chain, int64_t j) {
    const float* row = w + j * n;
    Floats its[V];
    LAYERCOMB_UNROLL
    for (int v = 0; v < V; ++v) its[v] = Load<Floats>(row + v * kLanes);
    LAYERCOMB_UNROLL
    for (int k = 0; k < M; ++k) {
      LAYERCOMB_UNROLL
      for (int v = 0; v < V; ++v) sums[chain][k][v] += x[k * d + j] * its[v];
    }
  };
  int64_t j = 0;
  for (; j + C <= d; j += C) {
    LAYERCOMB_UNROLL
    for (int c = 0; c < C; ++c) {
      const int64_t ahead = std::min(j + c + kAhead, d - 1);
      LAYERCOMB_UNROLL
      for (int v = 0; v < V; v += 16 / kLanes) __builtin_prefetch(w + ahead * n + v * kLanes, 0, 2);
      add(c, j + c);
    }
  }
  for (; j < d; ++j) add(0, j);
  LAYERCOMB_UNROLL
  for (int k = 0; k < M; ++k) {
    LAYERCOMB_UNROLL
    for (int v = 0; v < V; ++v) {
      Floats sum = sums[0][k][v];
      LAYERCOMB_UNROLL
      for (int c = 1; c < C; ++c) sum += sums[c][k][v];
      std::memcpy(y + k * n + v * kLanes, &sum, sizeof sum);
    }
  }
}

class ColumnProduct final : public Product {
 public:
  ColumnProduct(const float* w, int64_t d, int64_t n, const float* x, int64_t n_x, float* y)
      : Product(n_x, d, n, kBlock, std::max(4 * d * n, n_x * d * n / kProductsToAByte)), w_(w),
        x_(x), y_(y) {}

  void Prepare(int64_t) override {}

  void Compute(int64_t first, int64_t n) override {
    const int64_t last = first + n;
    int64_t i = first;
    for (; i + kBlock <= last; i += kBlock) Rows<kVectors>(i);
    for (; i + kLanes <= last; i += kLanes) Rows<1>(i);
    for (; i < last; ++i) {
      for (int64_t m = 0; m < n_x; ++m) {
        float sum = 0;
        for (int64_t j = 0; j < d; ++j) sum += x_[m * d + j] * w_[j * n_outputs + i];
        y_[m * n_outputs + i] = sum;
      }
    }
  }

 private:
  template <int V>
  void Rows(int64_t i) {
    constexpr int M = kLanes == 16 ? 4 : 2;
    int64_t m = 0;
    for (; m + M <= n_x; m += M) {
      Block<M, V>(w_ + i, n_outputs, x_ + m * d, d, y_ + m * n_outputs + i);
    }
    for (; m < n_x; ++m) Block<1, V>(w_ + i, n_outputs, x_ + m * d, d, y_ + m * n_outputs + i);
  }

  const float *const w_, *const x_;
  float* const y_;
};

}  // namespace

std::unique_ptr<Product> OfColumns(const float* w, int64_t d, int64_t n, const float* x,
                                   int64_t n_x, float* y) {
  return std::make_unique<ColumnProduct>(w, d, n, x, n_x, y);
}

}  // namespace layercomb
