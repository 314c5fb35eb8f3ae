// Products of one position, or a few, with the factors and kernels of sparse layers.
//
// XLA multiplies a few rows by copying the matrix into another order first, which takes as long as
// the product.

#include "matrices.h"

namespace layercomb {
namespace {

// y[s · n_rows + f] = Σ_d x[d] modules[s, d] w[f, d], for n rows of w from `first` on. A product of x
// and a weight serves four modules.
template <typename W>
void Factored(const Matrix<W>& w, const float* x, const float* modules, int64_t n_s, int64_t first,
              int64_t n, float* y) {
  constexpr int S = 4, R = 3, P = W::parts, kLine = 64 / sizeof(typename W::Word);
  for (int64_t s = 0; s < n_s; s += S) {
    const float* module[S];
    for (int i = 0; i < S; ++i) module[i] = modules + std::min(s + i, n_s - 1) * w.n * P;
    for (int64_t f = first; f < first + n; f += R) {
      const typename W::Word *row[R], *next[R];
      for (int r = 0; r < R; ++r) {
        row[r] = w.Row(std::min(f + r, first + n - 1));
        next[r] = w.Row(std::min(f + R + r, first + n - 1));
      }
      Floats sums[S][R] = {};
      for (int64_t j = 0; j < w.n; j += w.g) {
        float scales[R][P];
        for (int r = 0; r < R; ++r) {
          const int64_t its = std::min(f + r, first + n - 1);
          for (int p = 0; p < P; ++p) {
            scales[r][p] = w.scales ? W::unit[p] * w.Scales(its)[(p * w.n + j) / w.g] : 1;
          }
        }
        // `its_row` are the words of row r, and `load` what belongs to them of a row of floats.
        auto add = [&](const auto& its_row, const auto& load) {
          Floats weights[R][P];
          LAYERCOMB_UNROLL
          for (int r = 0; r < R; ++r) W::Widen(its_row(r), weights[r]);
          LAYERCOMB_UNROLL
          for (int p = 0; p < P; ++p) {
            Floats its_x = load(x + p * w.n);
            Keep(its_x);
            Floats scaled[R];
            LAYERCOMB_UNROLL
            for (int r = 0; r < R; ++r) {
              scaled[r] = its_x * weights[r][p];
              if constexpr (W::integer) scaled[r] *= scales[r][p];
            }
            LAYERCOMB_UNROLL
            for (int i = 0; i < S; ++i) {
              Floats its = load(module[i] + p * w.n);
              Keep(its);
              LAYERCOMB_UNROLL
              for (int r = 0; r < R; ++r) sums[i][r] += its * scaled[r];
            }
          }
        };
        auto add_at = [&](int64_t at) {
          add([&](int r) { return row[r] + at; },
              [&](const float* from) { return Load<Floats>(from + at); });
        };
        int64_t at = j;
        for (; at + kLine <= j + w.g; at += kLine) {
          Prefetch<R>(next, at);
          for (int i = 0; i < kLine; i += kLanes) add_at(at + i);
        }
        for (; at + kLanes <= j + w.g; at += kLanes) add_at(at);
        if (const int64_t rest = j + w.g - at) {
          Padded<typename W::Word> ends[R];
          LAYERCOMB_UNROLL
          for (int r = 0; r < R; ++r) ends[r] = {row[r] + at, rest};
          add([&](int r) { return ends[r].values; },
              [&](const float* from) {
                return Load<Floats>(Padded<float>(from + at, rest).values);
              });
        }
      }
      LAYERCOMB_UNROLL
      for (int i = 0; i < S; ++i) {
        LAYERCOMB_UNROLL
        for (int r = 0; r < R; ++r) {
          if (s + i < n_s && f + r < first + n) y[(s + i) * w.n_rows + f + r] = Sum(sums[i][r]);
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

void FactoredProducts(const Pool& pool, const Weights& weights, const float* x,
                      const float* modules, int64_t n_x, int64_t n_s, float* y) {
  WithMatrix(weights, [&](const auto& w) {
    const int64_t d = w.n * w.parts, products = n_s * w.n_rows * d;
    const int64_t bytes = std::max(weights.n_bytes, products / kProductsToAByte);
    for (int64_t m = 0; m < n_x; ++m) {
      InPieces(pool, bytes, w.n_rows, 3, [&](int64_t f, int64_t n) {
        Factored(w, x + m * d, modules, n_s, f, n, y + m * n_s * w.n_rows);
      });
    }
  });
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
