// Products of rows of activations with a matrix, in steps that threads can share.

#pragma once

#include <memory>

#include "kernels.h"

namespace layercomb {

// y = x wᵀ. All rows of x are prepared first, for instance rounded. Then parts are computed, some at
// a time, each for all rows of x. In the end rows are finished. x, weights and y are the caller's, and
// must outlive it.
class Product {
 public:
  virtual ~Product() = default;
  // Prepares row m of x, which may be written until then.
  virtual void Prepare(int64_t m) = 0;
  // Computes n parts from `first` on, a multiple of `unit`; n is one, too, but at the end.
  virtual void Compute(int64_t first, int64_t n) = 0;
  // Finishes row m of y.
  virtual void Finish(int64_t) {}

  const int64_t n_x, d, n_outputs;
  const int64_t n_parts;  // outputs, or what each output is a sum of
  const int64_t unit;     // parts that are computed together
  const int64_t bytes;    // reading so many takes as long as the product

 protected:
  Product(int64_t n_x, int64_t d, int64_t n_outputs, int64_t n_parts, int64_t unit, int64_t bytes)
      : n_x(n_x), d(d), n_outputs(n_outputs), n_parts(n_parts), unit(unit), bytes(bytes) {}
};

std::unique_ptr<Product> OfPanels(const PanelWeights& w, const float* x, int64_t n_x, int n_bytes,
                                  float* y);
// Few rows of x: see `RowProducts`.
std::unique_ptr<Product> OfRows(const Weights& w, const float* x, int64_t n_x, float* y);
// w is (d, n) float32, not transposed. Each output is a sum of kParts at most, which have room at
// `sums` (kParts, n_x, n).
constexpr int64_t kParts = 16;
std::unique_ptr<Product> OfColumns(const float* w, int64_t d, int64_t n, const float* x,
                                   int64_t n_x, float* sums, float* y);

// Products of rows of x with rows of a matrix that are chosen; x is prepared first, row by row.
class ChosenRows {
 public:
  virtual ~ChosenRows() = default;
  virtual void Prepare(int64_t m) = 0;
  // Asks for a row of w, which is multiplied soon.
  virtual void Fetch(int64_t row) const = 0;
  // y[k] = Σ_d x[m, d] w[at[k], d] for n of them.
  virtual void Multiply(int64_t m, const int32_t* at, int64_t n, float* y) const = 0;
};
std::unique_ptr<ChosenRows> OfChosenRows(const Weights& w, const float* x, int64_t n_x);
// Asks for a row of a matrix that is read soon.
inline void FetchRow(const Weights& w, int64_t row) {
  const auto fetch = [row](const void* matrix, int64_t bytes) {
    const char* from = static_cast<const char*>(matrix) + row * bytes;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
  };
  fetch(w.words, w.n_bytes / w.n_rows);
  if (w.n_groups) fetch(w.scales, 4 * w.n_groups);
}
// y[d] = Σ_k h[k] w[at[k], d] for n words of each row from j on, whole groups.
void SumOfChosenRows(const Weights& w, const float* h, const int32_t* at, int64_t n_k, int64_t j,
                     int64_t n, float* y);
// How many words of a row a task of `SumOfChosenRows` takes at least.
inline int64_t WordsTogether(const Weights& w) {
  return w.n_groups ? CeilDiv(w.n * (w.kind == Kind::kInt4 ? 2 : 1), w.n_groups) : 64;
}
// at[b] = the number of the largest of the n_block logits that begin at b · n_block, counted from 0
// over all `n_units`, for n blocks b from `first` on; the logits are x second, with second
// (rank, n_units).
void LargestUnits(const float* x, const float* second, int64_t rank, int64_t n_units,
                  int64_t n_block, int64_t first, int64_t n, int32_t* at);

// Does all of it.
inline void ComputeAll(const Pool& pool, Product& product) {
  InPieces(pool, product.n_x * product.d * 2, product.n_x, 1, [&](int64_t first, int64_t n) {
    for (int64_t m = first; m < first + n; ++m) product.Prepare(m);
  });
  InPieces(pool, product.bytes, product.n_parts, product.unit,
           [&](int64_t first, int64_t n) { product.Compute(first, n); });
  for (int64_t m = 0; m < product.n_x; ++m) product.Finish(m);
}

}  // namespace layercomb
