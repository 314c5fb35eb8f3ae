// The buckets of a few vectors: which rotation of a head, or its negative, each is nearest to.
//
// Rotations are read once, in order, however many vectors a head has, and no score leaves the cache.

#include <limits>
#include <vector>

#include "kernels.h"
#include "vectors.h"

namespace layercomb {
namespace {

// y = rows · x for n rows of d.
void Scores(const float* rows, const float* x, int64_t n, int64_t d, float* y) {
  constexpr int R = 4;
  int64_t f = 0;
  for (; f + R <= n; f += R) Dots<R>(rows + f * d, x, d, y + f);
  for (; f < n; ++f) y[f] = Dot(rows + f * d, x, d);
}

// The first of the largest of n numbers and, behind these, of their negatives; the last one where
// there is NaN.
int32_t Nearest(const float* y, int64_t n) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  float high = -kInfinity, low = kInfinity;
  int64_t at_high = 0, at_low = 0;
  bool known = true;
  for (int64_t f = 0; f < n; ++f) {
    if (y[f] > high) high = y[f], at_high = f;
    if (y[f] < low) low = y[f], at_low = f;
    known &= y[f] == y[f];
  }
  return int32_t(!known ? 2 * n - 1 : high >= -low ? at_high : n + at_low);
}

}  // namespace

void NearestRotations(const Pool& pool, const Rotations& a, const float* x, int64_t n_x,
                      int32_t* y) {
  const int64_t n = a.n_heads * a.n_rounds, size = a.width * a.d;
  InPieces(pool, 4 * n * size, n, 1, [&](int64_t first, int64_t count) {
    std::vector<float> scores(a.width);
    for (int64_t i = first; i < first + count; ++i) {  // a round of a head
      for (int64_t m = 0; m < n_x; ++m) {
        const int64_t row = m * a.n_heads + i / a.n_rounds;
        Scores(a.rotations + i * size, x + row * a.d, a.width, a.d, scores.data());
        int32_t bucket = 0;
        const float* its = scores.data();
        for (int64_t f = 0; f < a.n_factors; ++f) {
          const int32_t factor = a.factors[f];
          if (factor == 1) continue;
          bucket = bucket * factor + Nearest(its, factor / 2);
          its += factor / 2;
        }
        y[row * a.n_rounds + i % a.n_rounds] = bucket;
      }
    }
  });
}

}  // namespace layercomb
