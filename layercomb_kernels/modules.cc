// Products of one position, or a few, with the factors and kernels of sparse layers, in float32.
//
// XLA multiplies a few rows by copying the matrix into another order first, which takes as long as
// the product.

#include "kernels.h"
#include "vectors.h"

namespace layercomb {
namespace {

// y[s · n_f + f] = Σ_d x[d] modules[s, d] features[f, d], for n features from `first` on. A product
// of x and a feature serves four modules.
void Factored(const float* x, const float* modules, const float* features, int64_t n_s,
              int64_t n_f, int64_t d, int64_t first, int64_t n, float* y) {
  constexpr int S = 4, R = 3;
  for (int64_t f = first; f < first + n; f += R) {
    const float* feature[R];
    for (int r = 0; r < R; ++r) feature[r] = features + std::min(f + r, first + n - 1) * d;
    for (int64_t s = 0; s < n_s; s += S) {
      const float* module[S];
      for (int i = 0; i < S; ++i) module[i] = modules + std::min(s + i, n_s - 1) * d;
      Floats sums[S][R] = {};
      auto add = [&](const auto& load) {
        const Floats its_x = load(x);
        Floats scaled[R];
        for (int r = 0; r < R; ++r) scaled[r] = its_x * load(feature[r]);
        for (int i = 0; i < S; ++i) {
          const Floats its = load(module[i]);
          for (int r = 0; r < R; ++r) sums[i][r] += its * scaled[r];
        }
      };
      int64_t j = 0;
      for (; j + kLanes <= d; j += kLanes) {
        add([j](const float* from) { return Load<Floats>(from + j); });
      }
      if (const int64_t rest = d - j) {
        add([=](const float* from) { return Load<Floats>(Padded<float>(from + j, rest).values); });
      }
      for (int i = 0; i < S && s + i < n_s; ++i) {
        for (int r = 0; r < R && f + r < first + n; ++r) {
          y[(s + i) * n_f + f + r] = Sum(sums[i][r]);
        }
      }
    }
  }
}

// The sizes of a convolution over modules: n_p positions `width` apart, and n_s windows of n_j
// values, `step` apart, each of which makes n_f.
struct Sizes {
  int64_t n_p, width, n_s, step, n_j, n_f;
};

// V vectors of results, or what is left of one, for four windows from s on.
template <int V, bool kWhole>
void Convolve(const Sizes& n, const float* x, const float* kernel, int64_t s, int64_t f,
              int64_t rest, float* y) {
  constexpr int S = 4, kAhead = 24;  // rows of the kernel that are asked for early
  const float* window[S];
  for (int i = 0; i < S; ++i) window[i] = x + std::min(s + i, n.n_s - 1) * n.step;
  Floats sums[S][V] = {};
  for (int64_t p = 0; p < n.n_p; ++p) {
    for (int64_t j = 0; j < n.n_j; ++j) {
      const float* row = kernel + (p * n.n_j + j) * n.n_f + f;
      __builtin_prefetch(row + kAhead * n.n_f, 0, 2);
      __builtin_prefetch(row + kAhead * n.n_f + V * kLanes - 1, 0, 2);
      Floats weights[V];
      for (int v = 0; v < V; ++v) {
        weights[v] = kWhole ? Load<Floats>(row + v * kLanes)
                            : Load<Floats>(Padded<float>(row, rest).values);
      }
      for (int i = 0; i < S; ++i) {
        const float value = window[i][p * n.width + j];
        for (int v = 0; v < V; ++v) sums[i][v] += value * weights[v];
      }
    }
  }
  for (int i = 0; i < S && s + i < n.n_s; ++i) {
    std::memcpy(y + (s + i) * n.n_f + f, sums[i], 4 * (kWhole ? V * kLanes : rest));
  }
}

}  // namespace

void FactoredProducts(const Pool& pool, const float* x, const float* modules,
                      const float* features, int64_t n_x, int64_t n_s, int64_t n_f, int64_t d,
                      float* y) {
  for (int64_t m = 0; m < n_x; ++m) {
    const int64_t bytes = std::max<int64_t>(4, n_s / kProductsToAByte) * n_f * d;
    InPieces(pool, bytes, n_f, 3, [&](int64_t f, int64_t n) {
      Factored(x + m * d, modules, features, n_s, n_f, d, f, n, y + m * n_s * n_f);
    });
  }
}

void ModuleConvolution(const Pool& pool, const float* x, const float* kernel, int64_t n_x,
                       int64_t n_p, int64_t width, int64_t n_s, int64_t step, int64_t n_j,
                       int64_t n_f, float* y) {
  constexpr int V = 3;
  const Sizes sizes{n_p, width, n_s, step, n_j, n_f};
  const int64_t bytes = std::max<int64_t>(4, n_s / kProductsToAByte) * n_p * n_j * n_f;
  for (int64_t m = 0; m < n_x; ++m) {
    const float* its_x = x + m * n_p * width;
    float* its_y = y + m * n_s * n_f;
    InPieces(pool, bytes, n_f, V * kLanes, [&](int64_t first, int64_t n) {
      int64_t f = first, end = first + n;
      auto convolve = [&](const auto& windows, int64_t size) {
        for (int64_t s = 0; s < n_s; s += 4) {
          windows(sizes, its_x, kernel, s, f, std::min(size, end - f), its_y);
        }
        f += size;
      };
      while (f + V * kLanes <= end) convolve(Convolve<V, true>, V * kLanes);
      while (f + kLanes <= end) convolve(Convolve<1, true>, kLanes);
      if (f < end) convolve(Convolve<1, false>, kLanes);
    });
  }
}

}  // namespace layercomb
