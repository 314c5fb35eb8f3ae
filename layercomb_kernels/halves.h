// Products of many rows of floats with bfloat16 weights, by instructions that multiply pairs of those.
//
// An activation is rounded to bfloat16, and what is left of it, at most a 256th, to a byte, with a
// scale for each group of columns. Weights are rounded to bytes, too, to multiply that byte. So 16
// bits of an activation count, for one and a half times the instructions that 8 bits take; a second
// bfloat16 would take two. What is not finite has nothing left, and stays what it is.

#pragma once

#include "matrices.h"

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(LAYERCOMB_WIDE)
#define LAYERCOMB_HALVES 1

namespace layercomb {

// y = x wᵀ for any number of rows of x, of which n_bytes bytes count, 2 or 1.
void HalfProducts(const Pool& pool, const Matrix<Bfloat16>& w, const float* x, int64_t n_x,
                      int n_bytes, float* y);

}  // namespace layercomb

#endif
