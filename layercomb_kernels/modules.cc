// Products of one position, or a few, with the factors and kernels of sparse layers, in float32.
//
// XLA multiplies a few rows by copying the matrix into another order first, which takes as long as
// the product.

#include "kernels.h"
#include "vectors.h"

namespace layercomb {
namespace {

constexpr int kLine = 16;  // floats in a line of the cache

// y[s · n_f + f] = Σ_d x[d] modules[s, d] features[f, d], for n features from `first` on. A product
// of x and a feature serves four modules.
void Factored(const float* x, const float* modules, const float* features, int64_t n_s,
              int64_t n_f, int64_t d, int64_t first, int64_t n, float* y) {
  constexpr int S = 4, R = 3;
  for (int64_t s = 0; s < n_s; s += S) {
    const float* module[S];
    for (int i = 0; i < S; ++i) module[i] = modules + std::min(s + i, n_s - 1) * d;
    for (int64_t f = first; f < first + n; f += R) {
      const float *feature[R], *next[R];
      for (int r = 0; r < R; ++r) {
        feature[r] = features + std::min(f + r, first + n - 1) * d;
        next[r] = features + std::min(f + R + r, first + n - 1) * d;
      }
      Floats sums[S][R] = {};
      auto add = [&](const auto& load) {
        Floats its_x = load(x);
        Keep(its_x);
        Floats scaled[R];
        LAYERCOMB_UNROLL
        for (int r = 0; r < R; ++r) scaled[r] = its_x * load(feature[r]);
        LAYERCOMB_UNROLL
        for (int i = 0; i < S; ++i) {
          Floats its = load(module[i]);
          Keep(its);
          LAYERCOMB_UNROLL
          for (int r = 0; r < R; ++r) sums[i][r] += its * scaled[r];
        }
      };
      auto add_at = [&](int64_t j) {
        add([j](const float* from) { return Load<Floats>(from + j); });
      };
      int64_t j = 0;
      for (; j + kLine <= d; j += kLine) {
        Prefetch<R>(next, j);
        LAYERCOMB_UNROLL
        for (int i = 0; i < kLine; i += kLanes) add_at(j + i);
      }
      for (; j + kLanes <= d; j += kLanes) add_at(j);
      if (const int64_t rest = d - j) {
        add([=](const float* from) { return Load<Floats>(Padded<float>(from + j, rest).values); });
      }
      LAYERCOMB_UNROLL
      for (int i = 0; i < S; ++i) {
        LAYERCOMB_UNROLL
        for (int r = 0; r < R; ++r) {
          if (s + i < n_s && f + r < first + n) y[(s + i) * n_f + f + r] = Sum(sums[i][r]);
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

// Adds what R rows of the kernel make of each window: n results from f on.
template <int R>
void Convolve(const Sizes& sizes, const float* x, const float* kernel, int64_t f, int64_t n,
              float* y) {
  auto add = [&](const auto& load, const auto& store, int64_t f) {
    Floats weights[R];
    LAYERCOMB_UNROLL
    for (int r = 0; r < R; ++r) {
      weights[r] = load(kernel + r * sizes.n_f + f);
      __builtin_prefetch(kernel + (R + r) * sizes.n_f + f, 0, 2);
    }
    const float* window = x;
    float* sum = y + f;
    for (int64_t s = 0; s < sizes.n_s; ++s, window += sizes.step, sum += sizes.n_f) {
      Floats total = load(sum);
      LAYERCOMB_UNROLL
      for (int r = 0; r < R; ++r) total += window[r] * weights[r];
      store(sum, total);
    }
  };
  const int64_t end = f + n;
  for (; f + kLanes <= end; f += kLanes) {
    add([](const float* from) { return Load<Floats>(from); },
        [](float* to, Floats v) { std::memcpy(to, &v, sizeof v); }, f);
  }
  if (const int64_t rest = end - f) {
    add([=](const float* from) { return Load<Floats>(Padded<float>(from, rest).values); },
        [=](float* to, Floats v) { std::memcpy(to, &v, 4 * rest); }, f);
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
  constexpr int kRows = 8, kColumns = 32;
  const Sizes sizes{n_p, width, n_s, step, n_j, n_f};
  const int64_t bytes = std::max<int64_t>(4, n_s / kProductsToAByte) * n_p * n_j * n_f;
  std::fill_n(y, n_x * n_s * n_f, 0.0f);
  for (int64_t m = 0; m < n_x; ++m) {
    InPieces(pool, bytes, n_f, kColumns, [&](int64_t f, int64_t n) {
      for (int64_t p = 0; p < n_p; ++p) {
        const float* its_x = x + (m * n_p + p) * width;
        const float* its_kernel = kernel + p * n_j * n_f;
        float* its_y = y + m * n_s * n_f;
        int64_t j = 0;
        for (; j + kRows <= n_j; j += kRows) {
          Convolve<kRows>(sizes, its_x + j, its_kernel + j * n_f, f, n, its_y);
        }
        for (; j < n_j; ++j) Convolve<1>(sizes, its_x + j, its_kernel + j * n_f, f, n, its_y);
      }
    });
  }
}

}  // namespace layercomb
