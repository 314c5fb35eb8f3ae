// Products of a few rows of activations with a float32 matrix (d, n) that is not transposed.
//
// Its rows are read one after the other, as memory is quickest, and each adds to all outputs. So
// pieces of the sum are computed, each with outputs of its own, which are added up in the end.

#include "products.h"
#include "vectors.h"

namespace layercomb {
namespace {

constexpr int kRows = 8;           // of the matrix, that are added at once
constexpr int64_t kAhead = 4096;   // bytes between what is read and what is fetched for later
constexpr int64_t kStay = 1024;    // columns that stay in the cache while the activations pass

// y[k] += Σ_r x[k][r] w[r] for M rows of x, R rows of w, and n columns.
template <int M, int R>
void AddRows(const float* w, int64_t n_w, const float* x, int64_t n_x, int64_t n, float* y,
             int64_t n_y) {
  const auto add = [&](const auto& row, const auto& sum) {
    Floats rows[R];
    LAYERCOMB_UNROLL
    for (int r = 0; r < R; ++r) rows[r] = Load<Floats>(row(r));
    LAYERCOMB_UNROLL
    for (int k = 0; k < M; ++k) {
      Floats totals[2] = {Load<Floats>(sum(k))};  // an addition waits for the last
      LAYERCOMB_UNROLL
      for (int r = 0; r < R; ++r) totals[r % 2] += x[k * n_x + r] * rows[r];
      totals[0] += totals[1];
      std::memcpy(sum(k), totals, sizeof *totals);
    }
  };
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    for (int r = 0; r < R; ++r) __builtin_prefetch(w + r * n_w + j + kAhead / 4, 0, 2);
    add([&](int r) { return w + r * n_w + j; }, [&](int k) { return y + k * n_y + j; });
  }
  const int64_t rest = n - j;
  if (!rest) return;
  Padded<float> rows[R], sums[M];
  LAYERCOMB_UNROLL
  for (int r = 0; r < R; ++r) rows[r] = {w + r * n_w + j, rest};
  LAYERCOMB_UNROLL
  for (int k = 0; k < M; ++k) sums[k] = {y + k * n_y + j, rest};
  add([&](int r) { return rows[r].values; }, [&](int k) { return sums[k].values; });
  LAYERCOMB_UNROLL
  for (int k = 0; k < M; ++k) std::memcpy(y + k * n_y + j, sums[k].values, rest * sizeof(float));
}

class ColumnProduct final : public Product {
 public:
  ColumnProduct(const float* w, int64_t d, int64_t n, const float* x, int64_t n_x, float* sums,
                float* y)
      : Product(n_x, d, n, d, PieceOf(d), std::max(4 * d * n, n_x * d * n / kProductsToAByte)),
        w_(w), x_(x), sums_(sums), y_(y) {}

  void Prepare(int64_t) override {}

  void Compute(int64_t first, int64_t n) override {
    for (int64_t begin = first; begin < first + n; begin += unit) {
      Piece(begin, std::min(unit, first + n - begin));
    }
  }

  void Finish(int64_t m) override {
    const int64_t n = n_outputs;
    float* y = y_ + m * n;
    std::copy_n(&sums_[m * n], n, y);
    for (int64_t i = 1; i < CeilDiv(d, unit); ++i) {
      const float* its = &sums_[(i * n_x + m) * n];
      for (int64_t j = 0; j < n; ++j) y[j] += its[j];
    }
  }

 private:
  static int64_t PieceOf(int64_t d) { return CeilDiv(CeilDiv(d, kParts), kRows) * kRows; }

  // The part of the sums over `n` rows of w.
  void Piece(int64_t first, int64_t n) {
    float* sums = &sums_[first / unit * n_x * n_outputs];
    std::fill_n(sums, n_x * n_outputs, 0.0f);
    for (int64_t i = 0; i < n_outputs; i += kStay) {
      const int64_t width = std::min(kStay, n_outputs - i);
      int64_t j = first;
      for (; j + kRows <= first + n; j += kRows) AllRows<kRows>(j, i, width, sums);
      for (; j < first + n; ++j) AllRows<1>(j, i, width, sums);
    }
  }

  template <int R>
  void AllRows(int64_t j, int64_t i, int64_t width, float* sums) {
    constexpr int M = kLanes == 16 ? 4 : 2;
    const float* w = w_ + j * n_outputs + i;
    int64_t m = 0;
    const auto add = [&](auto n_m) {
      AddRows<n_m.value, R>(w, n_outputs, x_ + m * d + j, d, width, sums + m * n_outputs + i,
                            n_outputs);
      m += n_m.value;
    };
    while (m + M <= n_x) add(std::integral_constant<int, M>());
    while (m < n_x) add(std::integral_constant<int, 1>());
  }

  const float *const w_, *const x_;
  float *const sums_, *const y_;
};

}  // namespace

std::unique_ptr<Product> OfColumns(const float* w, int64_t d, int64_t n, const float* x,
                                   int64_t n_x, float* sums, float* y) {
  return std::make_unique<ColumnProduct>(w, d, n, x, n_x, sums, y);
}

}  // namespace layercomb
