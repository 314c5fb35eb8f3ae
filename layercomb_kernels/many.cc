// Products of many rows of activations with rows of floats, by panels.
//
// A thread takes some rows of weights, widens them with their columns in order, so that a vector has a
// column of several rows, and multiplies all activations by that panel, which stays in its cache. What
// it costs to make a panel is little beside what many rows multiply by it, and no sum goes across
// lanes.

#include "many.h"

#include <memory>

#include "tiles.h"

namespace layercomb {
namespace {

constexpr int64_t kOutputs = kVectors * kLanes;  // of a panel
constexpr int64_t kDeep = 1024;                  // columns that are multiplied before the next ones

// Rows of weights in the lanes.
struct alignas(64) Panel {
  float columns[kDeep][kOutputs];
};

// Writes n columns, at most kLanes, of kLanes rows.
template <typename W>
void Interleave(const typename W::Word* const (&rows)[kLanes], int64_t j, int64_t n,
                float (*to)[kOutputs]) {
  Floats wide[kLanes];
  LAYERCOMB_UNROLL
  for (int r = 0; r < kLanes; ++r) {
    if (n == kLanes) {
      W::Widen(rows[r] + j, &wide[r]);
    } else {
      W::Widen(Padded<typename W::Word>(rows[r] + j, n).values, &wide[r]);
    }
  }
#if defined(LAYERCOMB_WIDE)
  Transpose(wide);
  for (int64_t i = 0; i < n; ++i) std::memcpy(to[i], &wide[i], sizeof wide[i]);
#else
  float values[kLanes][kLanes];
  std::memcpy(values, wide, sizeof values);
  for (int64_t i = 0; i < n; ++i) {
    LAYERCOMB_UNROLL
    for (int r = 0; r < kLanes; ++r) to[i][r] = values[r][i];
  }
#endif
}

// Fills a panel with n columns from j on, of rows from `first` on; behind the last row is the last.
template <typename W>
void Fill(const Matrix<W>& w, int64_t first, int64_t j, int64_t n, Panel& panel) {
  for (int64_t v = 0; v < kOutputs; v += kLanes) {
    const typename W::Word* rows[kLanes];
    for (int r = 0; r < kLanes; ++r) rows[r] = w.Row(w.Clamped(first + v + r)) + j;
    for (int64_t i = 0; i < n; i += kLanes) {
      auto* to = reinterpret_cast<float(*)[kOutputs]>(&panel.columns[i][v]);
      Interleave<W>(rows, i, std::min<int64_t>(kLanes, n - i), to);
    }
  }
}

// y[m] = (y[m] if add) + the products of rows of x with n columns of a panel, of n_y outputs.
void MultiplyPanel(Left x, const Panel& panel, int64_t n_x, int64_t n, bool add, float* y,
                   int64_t row, int64_t n_y) {
  const Right columns{panel.columns[0], kOutputs};
  if (n_y == kOutputs) return Multiply(x, columns, n_x, n, kOutputs, add, y, row);
  float sums[kRows * kOutputs];
  for (; n_x > 0; n_x -= kRows, x.at += kRows * x.row, y += kRows * row) {
    const int64_t n_m = std::min<int64_t>(n_x, kRows);
    for (int64_t m = 0; add && m < n_m; ++m) {
      std::copy_n(y + m * row, n_y, sums + m * kOutputs);
      std::fill_n(sums + m * kOutputs + n_y, kOutputs - n_y, 0.0f);
    }
    Multiply(x, columns, n_m, n, kOutputs, add, sums, kOutputs);
    for (int64_t m = 0; m < n_m; ++m) std::copy_n(sums + m * kOutputs, n_y, y + m * row);
  }
}

}  // namespace

template <typename W>
void ManyProducts(const Pool& pool, const Matrix<W>& w, const float* x, int64_t n_x, float* y) {
  const int64_t bytes = n_x * w.n_rows * w.n / kProductsToAByte;
  InParallel(pool, WorthWaking(pool, bytes), CeilDiv(w.n_rows, kOutputs), [&](int64_t task) {
    const std::unique_ptr<Panel> panel(new Panel);
    const int64_t i = task * kOutputs, n_y = std::min(kOutputs, w.n_rows - i);
    for (int64_t j = 0; j < w.n; j += kDeep) {
      const int64_t depth = std::min<int64_t>(kDeep, w.n - j);
      Fill(w, i, j, depth, *panel);
      MultiplyPanel({x + j, w.n, 1}, *panel, n_x, depth, j > 0, y + i, w.n_rows, n_y);
    }
  });
}

template void ManyProducts(const Pool&, const Matrix<Float32>&, const float*, int64_t, float*);
template void ManyProducts(const Pool&, const Matrix<Bfloat16>&, const float*, int64_t, float*);

}  // namespace layercomb
