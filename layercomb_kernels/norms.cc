// Normalization of a few rows, which is too little work for the six loops that XLA makes of it.

#include <cmath>

#include "kernels.h"
#include "vectors.h"

namespace layercomb {
namespace {

// Σ_i f(x[i]).
template <typename F>
float SumOver(const float* x, int64_t n, const F& f) {
  Floats sums[2] = {};  // an addition waits for the last
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    sums[0] += f(Load<Floats>(x + i));
    sums[1] += f(Load<Floats>(x + i + kLanes));
  }
  float total = Sum(sums[0] + sums[1]);
  for (; i < n; ++i) total += f(x[i]);
  return total;
}

}  // namespace

void Normalize(const float* x, const float* scale, const float* bias, float epsilon, int64_t n_x,
               int64_t d, float* y) {
  for (int64_t m = 0; m < n_x; ++m, x += d, y += d) {
    const float mean = bias ? SumOver(x, d, [](auto v) { return v; }) / d : 0;
    const float square = SumOver(x, d, [mean](auto v) { return (v - mean) * (v - mean); }) / d;
    const float factor = 1 / std::sqrt(square + epsilon);
    if (bias) {
      for (int64_t i = 0; i < d; ++i) y[i] = (x[i] - mean) * factor * scale[i] + bias[i];
    } else {
      for (int64_t i = 0; i < d; ++i) y[i] = x[i] * factor * scale[i];
    }
  }
}

}  // namespace layercomb
