// Products of rows of activations with a matrix, in two steps that threads can share.

#pragma once

#include <memory>

#include "kernels.h"

namespace layercomb {

// y = x wᵀ. All rows of x are prepared first, for instance rounded; then outputs are computed, some
// at a time, each for all rows. x, weights and y are the caller's, and must outlive it.
class Product {
 public:
  virtual ~Product() = default;
  // Prepares row m of x, which may be written until then.
  virtual void Prepare(int64_t m) = 0;
  // Computes n outputs of each row from `first` on, a multiple of `unit`; n is one, too, but at the
  // end.
  virtual void Compute(int64_t first, int64_t n) = 0;

  int64_t n_x, d, n_outputs;
  int64_t unit;   // outputs that are best computed together
  int64_t bytes;  // reading so many takes as long as the product

 protected:
  Product(int64_t n_x, int64_t d, int64_t n_outputs, int64_t unit, int64_t bytes)
      : n_x(n_x), d(d), n_outputs(n_outputs), unit(unit), bytes(bytes) {}
};

std::unique_ptr<Product> OfPanels(const PanelWeights& w, const float* x, int64_t n_x, int n_bytes,
                                  float* y);
// Few rows of x: see `RowProducts`.
std::unique_ptr<Product> OfRows(const Weights& w, const float* x, int64_t n_x, float* y);
// w is (d, n) float32, not transposed.
std::unique_ptr<Product> OfColumns(const float* w, int64_t d, int64_t n, const float* x,
                                   int64_t n_x, float* y);

// Does all of it.
inline void ComputeAll(const Pool& pool, Product& product) {
  InPieces(pool, product.n_x * product.d * 2, product.n_x, 1, [&](int64_t first, int64_t n) {
    for (int64_t m = first; m < first + n; ++m) product.Prepare(m);
  });
  InPieces(pool, product.bytes, product.n_outputs, product.unit,
           [&](int64_t first, int64_t n) { product.Compute(first, n); });
}

}  // namespace layercomb
