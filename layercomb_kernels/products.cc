// Products of a few rows of activations with narrow weights, as handlers of XLA's FFI.
//
// Weights are int8, two int4 in a byte, bfloat16 or float32; activations are float32. What is here
// is bound by the memory that weights are read from: each is read once, in order, and widened in
// registers. Vectors are those of GCC and Clang; only what GCC widens badly is written by hand.
//
// Letters: M rows of activations, D their width, F outputs, K gathered rows, g the size of a group
// of weights, which share one scale. A matrix is an array of words: a word of int4 holds two
// weights, column j in its low half and column j + n in its high one, of n words a row.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));

template <typename V>
inline V Load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// As many bytes, or pairs of bytes, as there are lanes.
#if defined(__AVX512F__)
inline Ints Signed8(const void* from) {
  return reinterpret_cast<Ints>(_mm512_cvtepi8_epi32(Load<__m128i>(from)));
}
inline Ints Unsigned16(const void* from) {
  return reinterpret_cast<Ints>(_mm512_cvtepu16_epi32(Load<__m256i>(from)));
}
#elif defined(__AVX2__)
inline Ints Signed8(const void* from) {
  return reinterpret_cast<Ints>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from))));
}
inline Ints Unsigned16(const void* from) {
  return reinterpret_cast<Ints>(_mm256_cvtepu16_epi32(Load<__m128i>(from)));
}
#else
inline Ints Signed8(const void* from) {
  using Words = int8_t __attribute__((vector_size(kLanes)));
  return __builtin_convertvector(Load<Words>(from), Ints);
}
inline Ints Unsigned16(const void* from) {
  using Words = uint16_t __attribute__((vector_size(2 * kLanes)));
  return __builtin_convertvector(Load<Words>(from), Ints);
}
#endif

// How words become floats. Each makes `parts` of them, and what comes out is to be multiplied by
// `unit`, which is done for a group at once.

struct Float32 {
  using Word = float;
  static constexpr int parts = 1;
  static constexpr float unit[] = {1};
  static void Widen(const Word* from, Floats* to) { to[0] = Load<Floats>(from); }
};

struct Bfloat16 {
  using Word = uint16_t;
  static constexpr int parts = 1;
  static constexpr float unit[] = {1};
  static void Widen(const Word* from, Floats* to) {
    to[0] = reinterpret_cast<Floats>(Unsigned16(from) << 16);
  }
};

struct Int8 {
  using Word = int8_t;
  static constexpr int parts = 1;
  static constexpr float unit[] = {1};
  static void Widen(const Word* from, Floats* to) {
    to[0] = __builtin_convertvector(Signed8(from), Floats);
  }
};

struct Int4 {
  using Word = uint8_t;
  static constexpr int parts = 2;
  static constexpr float unit[] = {1.0f / (1 << 28), 1.0f / 16};  // the halves stay where they are
  static void Widen(const Word* from, Floats* to) {
    const Ints both = Signed8(from);
    to[0] = __builtin_convertvector(both << 28, Floats);
    to[1] = __builtin_convertvector(both & ~15, Floats);
  }
};

// Some values that are no whole vector, with zeros behind them.
template <typename T>
struct Padded {
  T values[kLanes] = {};
  Padded() = default;
  Padded(const T* from, int64_t n) { std::memcpy(values, from, n * sizeof(T)); }
};

// How many words are handled between two looks ahead: those of a line of the cache or more.
template <typename W>
constexpr int LineOf() {
  return std::max<int>(2 * kLanes, 64 / sizeof(typename W::Word));
}

// Asks for a line of the cache of each of the R rows that come next: hardware looks ahead within a
// row, and not far enough for weights that are this quick to use.
template <int R, typename Word>
inline void Prefetch(const Word* const* next, int64_t j) {
  for (int r = 0; r < R; ++r) __builtin_prefetch(next[r] + j, 0, 2);
}

// sums[i][j] += Σ_r x[i][r] rows[r][j], where i = m · parts + part, for n words of R rows.
template <typename W, int M, int R>
inline void AddRows(const typename W::Word* const* rows, const typename W::Word* const* next,
                    int64_t n, const float* const* x, float* const* sums) {
  constexpr int kSums = M * W::parts, kChains = R % 2 ? 1 : 2;  // an addition waits for the last
  constexpr int kLine = LineOf<W>();
  auto add = [x](const auto& row, const auto& sum) {
    Floats w[R][W::parts];
    for (int r = 0; r < R; ++r) W::Widen(row(r), w[r]);
    for (int i = 0; i < kSums; ++i) {
      Floats totals[2] = {Load<Floats>(sum(i))};
      for (int r = 0; r < R; ++r) totals[r % kChains] += x[i][r] * w[r][i % W::parts];
      totals[0] += totals[1];
      std::memcpy(sum(i), totals, sizeof *totals);
    }
  };
  int64_t j = 0;
  for (; j + kLine <= n; j += kLine) {
    Prefetch<R>(next, j);
    for (int64_t k = j; k < j + kLine; k += kLanes) {
      add([=](int r) { return rows[r] + k; }, [=](int i) { return sums[i] + k; });
    }
  }
  for (; j + kLanes <= n; j += kLanes) {
    add([=](int r) { return rows[r] + j; }, [=](int i) { return sums[i] + j; });
  }
  if (j == n) return;
  Padded<typename W::Word> row[R];
  Padded<float> sum[kSums];
  for (int r = 0; r < R; ++r) row[r] = {rows[r] + j, n - j};
  for (int i = 0; i < kSums; ++i) sum[i] = {sums[i] + j, n - j};
  add([&](int r) { return row[r].values; }, [&](int i) { return sum[i].values; });
  for (int i = 0; i < kSums; ++i) std::memcpy(sums[i] + j, sum[i].values, 4 * (n - j));
}

// out[m][r] = Σ_j x[m][j] rows[r][j] scales[r][j / g], for R whole rows of n words. Groups that
// are a whole number of lines of the cache, as they nearly always are, have no ends to see to.
template <typename W, int M, int R, bool kWholeLines>
inline void Dots(const typename W::Word* const* rows, const typename W::Word* const* next,
                 int64_t n, int64_t g, const float* const* x, const float* const* scales,
                 float* const* out) {
  constexpr int P = W::parts, kChains = M * R * P <= 4 ? 2 : 1;  // an addition waits for the last
  constexpr int kLine = LineOf<W>();
  const int64_t n_groups = n / g;
  Floats totals[M][R] = {};
  for (int64_t group = 0; group < n_groups; ++group) {
    Floats sums[kChains][M][R][P] = {};
    auto add = [](auto& sums, const auto& row, const auto& its_x) {
      Floats values[M][P];
      for (int m = 0; m < M; ++m) {
        for (int p = 0; p < P; ++p) values[m][p] = Load<Floats>(its_x(m, p));
      }
      for (int r = 0; r < R; ++r) {
        Floats w[P];
        W::Widen(row(r), w);
        for (int m = 0; m < M; ++m) {
          for (int p = 0; p < P; ++p) sums[m][r][p] += w[p] * values[m][p];
        }
      }
    };
    const int64_t end = (group + 1) * g;
    int64_t j = group * g;
    for (; j + kLine <= end; j += kLine) {
      Prefetch<R>(next, j);
      for (int64_t first = j; first < j + kLine; first += kChains * kLanes) {
        for (int c = 0; c < kChains; ++c) {
          const int64_t k = first + c * kLanes;
          add(sums[c], [=](int r) { return rows[r] + k; },
              [=](int m, int p) { return x[m] + p * n + k; });
        }
      }
    }
    if constexpr (!kWholeLines) {
      for (; j + kLanes <= end; j += kLanes) {
        add(sums[0], [=](int r) { return rows[r] + j; },
            [=](int m, int p) { return x[m] + p * n + j; });
      }
      if (const int64_t rest = end - j) {
        Padded<typename W::Word> row[R];
        Padded<float> its_x[M][P];
        for (int r = 0; r < R; ++r) row[r] = {rows[r] + j, rest};
        for (int m = 0; m < M; ++m) {
          for (int p = 0; p < P; ++p) its_x[m][p] = {x[m] + p * n + j, rest};
        }
        add(sums[0], [&](int r) { return row[r].values; },
            [&](int m, int p) { return its_x[m][p].values; });
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int p = 0; p < P; ++p) {
        const float scale = W::unit[p] * (scales ? scales[r][p * n_groups + group] : 1);
        for (int m = 0; m < M; ++m) {
          for (int c = 0; c < kChains; ++c) totals[m][r] += scale * sums[c][m][r][p];
        }
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int r = 0; r < R; ++r) {
      float sum = 0;
      for (int i = 0; i < kLanes; ++i) sum += totals[m][r][i];
      out[m][r] = sum;
    }
  }
}

// Calls `work(i)` for each i below n, on threads of XLA's pool and on this one. Whoever is free
// takes the next, so this thread waits for nothing but work that has begun.
template <typename Work>
void InParallel(ffi::ThreadPool& pool, int64_t n_threads, int64_t n, const Work& work) {
  struct Counters {
    std::atomic<int64_t> taken{0}, done{0};
  };
  // Shared, since a task may start when all has been done; then it does not touch `work`.
  const auto counters = std::make_shared<Counters>();
  const auto run = [counters, n, &work] {
    for (int64_t i; (i = counters->taken.fetch_add(1)) < n;) {
      work(i);
      counters->done.fetch_add(1);
    }
  };
  for (int64_t i = 1; i < std::min(n_threads, n); ++i) pool.Schedule([run] { run(); });
  run();
  while (counters->done.load() < n) std::this_thread::yield();
}

// How many threads are worth waking to read so many bytes of weights.
int64_t Threads(const ffi::ThreadPool& pool, int64_t bytes) {
  constexpr int64_t kWorthwhile = 1 << 20;
  return std::clamp<int64_t>(bytes / kWorthwhile, 1, std::max<int64_t>(1, pool.num_threads()));
}

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A matrix: n_rows rows of n words, and a float for every g weights, down a column or along a row.
template <typename W>
struct Matrix {
  static constexpr int parts = W::parts;
  const typename W::Word* words;
  const float* scales;  // null if there are none
  int64_t n_rows, n, g;

  const typename W::Word* Row(int64_t i) const { return words + i * n; }
  const float* Scales(int64_t i) const {
    return scales ? scales + i * (n * W::parts / g) : nullptr;
  }
  int64_t Clamped(int64_t i) const { return std::clamp<int64_t>(i, 0, n_rows - 1); }
};

constexpr int64_t kSums = 1 << 12;  // of one task: they stay in the first cache, weights pass by
constexpr int64_t kUnit = 64;       // words, of which a task has a whole number
constexpr int64_t kMostRows = kSums / (2 * kUnit);  // of x at once

// y[m, f] = Σ_d x[m, d] w[d, f], for n words of each row from j on. Scales are (D / g, F).
template <typename W>
void Columns(const Matrix<W>& w, const float* x, int64_t n_x, float* y, int64_t n_y, int64_t j,
             int64_t n) {
  constexpr int P = W::parts, R = 4;
  alignas(64) float sums[kSums];
  // Rows [d, d + R) of w, for rows [m, m + M) of x.
  auto add = [&](auto n_m, auto n_r, int64_t m, int64_t d) {
    constexpr int M = n_m.value, R = n_r.value;
    const typename W::Word *rows[R], *next[R];
    const float* its_x[M * P];
    float* its_sums[M * P];
    for (int r = 0; r < R; ++r) {
      rows[r] = w.Row(d + r) + j;
      next[r] = w.Row(w.Clamped(d + R + r)) + j;
    }
    for (int i = 0; i < M * P; ++i) {
      its_x[i] = x + (m + i / P) * w.n_rows + d;
      its_sums[i] = sums + (m * P + i) * n;
    }
    AddRows<W, M, R>(rows, next, n, its_x, its_sums);
  };
  auto add_all = [&](auto n_r, int64_t d) {
    int64_t m = 0;
    for (; m + 4 <= n_x; m += 4) add(std::integral_constant<int, 4>(), n_r, m, d);
    for (; m < n_x; ++m) add(std::integral_constant<int, 1>(), n_r, m, d);
  };
  for (int64_t first = 0; first < w.n_rows; first += w.g) {
    std::fill_n(sums, n_x * P * n, 0.0f);
    int64_t d = first;
    for (; d + R <= first + w.g; d += R) add_all(std::integral_constant<int, R>(), d);
    for (; d < first + w.g; ++d) add_all(std::integral_constant<int, 1>(), d);
    for (int64_t i = 0; i < n_x * P; ++i) {
      const int64_t column = i % P * w.n + j;
      const int64_t count = std::min(n, n_y - column);  // the last half word may be empty
      const float* scales = w.scales ? w.scales + first / w.g * n_y + column : nullptr;
      float* out = y + i / P * n_y + column;
      for (int64_t k = 0; k < count; ++k) {
        const float sum = sums[i * n + k] * W::unit[i % P] * (scales ? scales[k] : 1);
        out[k] = first ? out[k] + sum : sum;
      }
    }
  }
}

// y[m, i] = Σ_d x[m, d] w[row(i), d] for n_m rows of x and n rows of w. Scales are (F, D / g).
template <typename W, typename Index>
void Rows(const Matrix<W>& w, const float* x, int64_t n_m, float* y, int64_t n_y, int64_t first,
          int64_t n, const Index& row) {
  constexpr int P = W::parts, R = 4 / P;
  auto dot = [&](auto n_x, auto n_r, int64_t m, int64_t i) {
    constexpr int M = n_x.value, R = n_r.value;
    const typename W::Word *rows[R], *next[R];
    const float *scales[R], *its_x[M];
    float* out[M];
    for (int r = 0; r < R; ++r) {
      rows[r] = w.Row(row(i + r));
      next[r] = w.Row(row(std::min(i + R + r, first + n - 1)));
      scales[r] = w.Scales(row(i + r));
    }
    for (int k = 0; k < M; ++k) {
      its_x[k] = x + (m + k) * w.n * P;
      out[k] = y + (m + k) * n_y + i;
    }
    const int64_t g = w.scales ? w.g : w.n;
    const auto dots = g % LineOf<W>() ? Dots<W, M, R, false> : Dots<W, M, R, true>;
    dots(rows, next, w.n, g, its_x, w.scales ? scales : nullptr, out);
  };
  auto dot_all = [&](auto n_r, int64_t i) {
    int64_t m = 0;
    for (; m + 2 <= n_m; m += 2) dot(std::integral_constant<int, 2>(), n_r, m, i);
    for (; m < n_m; ++m) dot(std::integral_constant<int, 1>(), n_r, m, i);
  };
  int64_t i = first;
  for (; i + R <= first + n; i += R) dot_all(std::integral_constant<int, R>(), i);
  for (; i < first + n; ++i) dot_all(std::integral_constant<int, 1>(), i);
}

// y[d] = Σ_k h[k] w[at[k], d], for n words of each row from j on, whole groups. Scales (F, D / g).
template <typename W>
void SumOfRows(const Matrix<W>& w, const float* h, const int32_t* at, int64_t n_k, float* y,
               int64_t j, int64_t n) {
  constexpr int P = W::parts, R = 4;
  const int64_t g = w.scales ? w.g : n;
  for (int p = 0; p < P; ++p) std::fill_n(y + p * w.n + j, n, 0.0f);
  auto add = [&](auto n_r, int64_t k) {
    constexpr int R = n_r.value;
    int64_t row[R];
    const typename W::Word *rows[R], *next[R];
    for (int r = 0; r < R; ++r) row[r] = w.Clamped(at[k + r]);
    for (int64_t first = j; first < j + n; first += g) {
      float scaled[P][R], *sums[P];
      const float* x[P];
      for (int p = 0; p < P; ++p) {
        const int64_t column = p * w.n + first;
        for (int r = 0; r < R; ++r) {
          rows[r] = w.Row(row[r]) + first;
          next[r] = w.Row(w.Clamped(at[std::min(k + R + r, n_k - 1)])) + first;
          scaled[p][r] = h[k + r] * W::unit[p] * (w.scales ? w.Scales(row[r])[column / g] : 1);
        }
        x[p] = scaled[p];
        sums[p] = y + column;
      }
      AddRows<W, 1, R>(rows, next, g, x, sums);
    }
  };
  int64_t k = 0;
  for (; k + R <= n_k; k += R) add(std::integral_constant<int, R>(), k);
  for (; k < n_k; ++k) add(std::integral_constant<int, 1>(), k);
}

using Array = ffi::AnyBuffer;
using FloatArray = ffi::Buffer<ffi::F32>;
using IntArray = ffi::Buffer<ffi::S32>;
using Result = ffi::Result<FloatArray>;

// Calls `work` with the matrix that `words` (n_rows, n) and `scales` make.
template <typename Work>
ffi::Error WithMatrix(const Array& words, const FloatArray& scales, bool along_rows,
                      const Work& work) {
  auto call = [&](auto kind) {
    using W = decltype(kind);
    const int64_t n_rows = words.dimensions()[0], n = words.dimensions()[1];
    const bool scaled = scales.element_count() > 0;
    const int64_t whole = along_rows ? n * W::parts : n_rows;
    const int64_t g = scaled ? whole / scales.dimensions()[along_rows ? 1 : 0] : whole;
    using Word = typename W::Word;
    work(Matrix<W>{static_cast<const Word*>(words.untyped_data()),
                   scaled ? scales.typed_data() : nullptr, n_rows, n, g});
    return ffi::Error::Success();
  };
  switch (words.element_type()) {
    case ffi::F32: return call(Float32());
    case ffi::BF16: return call(Bfloat16());
    case ffi::S8: return call(Int8());
    case ffi::U8: return call(Int4());
    default: return ffi::Error::InvalidArgument("weights must be float32, bfloat16, int8 or uint8");
  }
}

// Cuts n words or rows into tasks of at most `most`, a multiple of `unit`, and some to each thread.
template <typename Work>
void InPieces(ffi::ThreadPool& pool, int64_t bytes, int64_t n, int64_t most, int64_t unit,
              const Work& work) {
  const int64_t n_threads = Threads(pool, bytes);
  const int64_t share = n_threads == 1 ? n : CeilDiv(n, 2 * n_threads);
  const int64_t size = std::max<int64_t>(1, std::min(CeilDiv(share, unit), most / unit)) * unit;
  InParallel(pool, n_threads, CeilDiv(n, size), [&](int64_t i) {
    work(i * size, std::min(size, n - i * size));
  });
}

ffi::Error ColumnProducts(ffi::ThreadPool pool, FloatArray x, Array words, FloatArray scales,
                          Result y) {
  const int64_t d = x.dimensions()[1], n_y = y->dimensions()[1];
  return WithMatrix(words, scales, false, [&](const auto& w) {
    for (int64_t m = 0; m < x.dimensions()[0]; m += kMostRows) {
      const int64_t n_x = std::min(kMostRows, x.dimensions()[0] - m);
      const int64_t most = kSums / (n_x * w.parts);
      InPieces(pool, words.size_bytes(), w.n, most, kUnit, [&](int64_t j, int64_t n) {
        Columns(w, x.typed_data() + m * d, n_x, y->typed_data() + m * n_y, n_y, j, n);
      });
    }
  });
}

ffi::Error RowProducts(ffi::ThreadPool pool, FloatArray x, Array words, FloatArray scales,
                       Result y) {
  return WithMatrix(words, scales, true, [&](const auto& w) {
    InPieces(pool, words.size_bytes(), w.n_rows, w.n_rows, 16, [&](int64_t i, int64_t n) {
      Rows(w, x.typed_data(), x.dimensions()[0], y->typed_data(), w.n_rows, i, n,
           [](int64_t i) { return i; });
    });
  });
}

ffi::Error GatheredProducts(ffi::ThreadPool pool, FloatArray x, IntArray at, Array words,
                            FloatArray scales, Result y) {
  const int64_t n_x = at.dimensions()[0], n_k = at.dimensions()[1];
  return WithMatrix(words, scales, true, [&](const auto& w) {
    const int64_t d = x.dimensions()[1], row_bytes = words.size_bytes() / w.n_rows;
    for (int64_t m = 0; m < n_x; ++m) {
      const int32_t* its = at.typed_data() + m * n_k;
      InPieces(pool, n_k * row_bytes, n_k, n_k, 4, [&](int64_t i, int64_t n) {
        Rows(w, x.typed_data() + m * d, 1, y->typed_data() + m * n_k, n_k, i, n,
             [&](int64_t i) { return w.Clamped(its[i]); });
      });
    }
  });
}

ffi::Error GatheredSums(ffi::ThreadPool pool, FloatArray h, IntArray at, Array words,
                        FloatArray scales, Result y) {
  const int64_t n_x = at.dimensions()[0], n_k = at.dimensions()[1], d = y->dimensions()[1];
  return WithMatrix(words, scales, true, [&](const auto& w) {
    const int64_t row_bytes = words.size_bytes() / w.n_rows;
    for (int64_t m = 0; m < n_x; ++m) {
      InPieces(pool, n_k * row_bytes, w.n, w.n, w.scales ? w.g : kUnit, [&](int64_t j, int64_t n) {
        SumOfRows(w, h.typed_data() + m * n_k, at.typed_data() + m * n_k, n_k,
                  y->typed_data() + m * d, j, n);
      });
    }
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(layercomb_column_products, ColumnProducts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<FloatArray>()
                                  .Arg<Array>()
                                  .Arg<FloatArray>()
                                  .Ret<FloatArray>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(layercomb_row_products, RowProducts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<FloatArray>()
                                  .Arg<Array>()
                                  .Arg<FloatArray>()
                                  .Ret<FloatArray>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(layercomb_gathered_products, GatheredProducts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<FloatArray>()
                                  .Arg<IntArray>()
                                  .Arg<Array>()
                                  .Arg<FloatArray>()
                                  .Ret<FloatArray>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(layercomb_gathered_sums, GatheredSums,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<FloatArray>()
                                  .Arg<IntArray>()
                                  .Arg<Array>()
                                  .Arg<FloatArray>()
                                  .Ret<FloatArray>());
