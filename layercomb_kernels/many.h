// Products of many rows of activations with rows of floats.

#pragma once

#include "matrices.h"

namespace layercomb {

// y[m, f] = Σ_d x[m, d] w[f, d]; W is Float32 or Bfloat16. The result of a row does not depend on
// other rows.
template <typename W>
void ManyProducts(const Pool& pool, const Matrix<W>& w, const float* x, int64_t n_x, float* y);

}  // namespace layercomb
