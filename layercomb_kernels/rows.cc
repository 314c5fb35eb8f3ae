// Products of rows of activations with rows of narrow weights.
//
// Products of few rows are bound by the memory that weights are read from: each is read once, in
// order, and widened in registers. Floats are multiplied as such, or bfloat16 in pairs, by
// instructions for them; many rows by floats are multiplied in many.cc and halves.cc. Integers are
// multiplied with activations rounded to int16, which takes half of the instructions: a sum over pairs
// of products at once, no conversion of a weight, and a scale for each lane of each piece of a group.

#include <vector>

#include "halves.h"
#include "many.h"
#include "products.h"

namespace layercomb {
namespace {

// Rows of w that are multiplied at once.
template <typename W>
constexpr int kRows = W::integer ? 2 : 4;

// R rows of w, those that come after them, their scales, and where M rows of results go.
template <typename W, int M>
struct Block {
  static constexpr int R = kRows<W>;
  const typename W::Word *rows[R], *next[R];
  const float* scales[R];
  float* out[M][R];
};

template <int M, int R>
void Store(const Floats (&totals)[M][R], float* const (&out)[M][R]) {
  LAYERCOMB_UNROLL
  for (int m = 0; m < M; ++m) {
    LAYERCOMB_UNROLL
    for (int r = 0; r < R; ++r) *out[m][r] = Sum(totals[m][r]);
  }
}

// Activations as they are.
template <typename W>
class AsFloats {
 public:
  AsFloats(const Matrix<W>& w, const float* x, int64_t) : w_(w), x_(x) {}

  void Prepare(int64_t) {}

  // out[k][r] = Σ_j x[m + k][j] rows[r][j] scales[r][j / g].
  template <int M>
  void Multiply(const Block<W, M>& block, int64_t m) const {
    constexpr int P = W::parts, R = Block<W, M>::R, kChains = M * R * P <= 4 ? 2 : 1;
    constexpr int kStep = std::max<int>(kChains * kLanes, 64 / sizeof(typename W::Word));
    const int64_t n = w_.n, n_groups = w_.n / w_.g;
    const float* x = x_ + m * n * P;
    Floats totals[M][R] = {};
    for (int64_t group = 0; group < n_groups; ++group) {
      Floats sums[kChains][M][R][P] = {};  // an addition waits for the last
      auto add = [&](auto& sums, const auto& row, const auto& its_x) {
        Floats values[M][P];
        LAYERCOMB_UNROLL
        for (int k = 0; k < M; ++k) {
          LAYERCOMB_UNROLL
          for (int p = 0; p < P; ++p) values[k][p] = Load<Floats>(its_x(k, p));
        }
        LAYERCOMB_UNROLL
        for (int r = 0; r < R; ++r) {
          Floats weights[P];
          W::Widen(row(r), weights);
          LAYERCOMB_UNROLL
          for (int k = 0; k < M; ++k) {
            LAYERCOMB_UNROLL
            for (int p = 0; p < P; ++p) sums[k][r][p] += weights[p] * values[k][p];
          }
        }
      };
      auto add_at = [&](int chain, int64_t j) {
        add(sums[chain], [&](int r) { return block.rows[r] + j; },
            [&](int k, int p) { return x + (k * P + p) * n + j; });
      };
      const int64_t end = (group + 1) * w_.g;
      int64_t j = group * w_.g;
      for (; j + kStep <= end; j += kStep) {
        Prefetch<R>(block.next, j);
        LAYERCOMB_UNROLL
        for (int i = 0; i < kStep / kLanes; ++i) add_at(i % kChains, j + i * kLanes);
      }
      for (; j + kLanes <= end; j += kLanes) add_at(0, j);
      if (const int64_t rest = end - j) {
        Padded<typename W::Word> row[R];
        Padded<float> its_x[M][P];
        LAYERCOMB_UNROLL
        for (int r = 0; r < R; ++r) row[r] = {block.rows[r] + j, rest};
        LAYERCOMB_UNROLL
        for (int k = 0; k < M; ++k) {
          LAYERCOMB_UNROLL
          for (int p = 0; p < P; ++p) its_x[k][p] = {x + (k * P + p) * n + j, rest};
        }
        add(sums[0], [&](int r) { return row[r].values; },
            [&](int k, int p) { return its_x[k][p].values; });
      }
      LAYERCOMB_UNROLL
      for (int r = 0; r < R; ++r) {
        LAYERCOMB_UNROLL
        for (int p = 0; p < P; ++p) {
          const float scale =
              W::unit[p] * (w_.scales ? block.scales[r][p * n_groups + group] : 1);
          LAYERCOMB_UNROLL
          for (int k = 0; k < M; ++k) {
            LAYERCOMB_UNROLL
            for (int c = 0; c < kChains; ++c) totals[k][r] += scale * sums[c][k][r][p];
          }
        }
      }
    }
    Store<M, R>(totals, block.out);
  }

 private:
  const Matrix<W>& w_;
  const float* x_;
};

#if defined(LAYERCOMB_HALVES)
// Activations as the sums of two bfloat16, which keep 16 bits of them: these are multiplied with the
// weights as they are, two columns at once.
class AsHalves {
 public:
  AsHalves(const Matrix<Bfloat16>& w, const float* x, int64_t n_x)
      : w_(w), x_(x), size_(CeilDiv(w.n, kColumns) * kColumns), values_(2 * n_x * size_) {}

  // Cuts row m; behind its end are zeros. What is not finite is in the first alone.
  void Prepare(int64_t m) {
    uint16_t* high = &values_[2 * m * size_];
    for (int64_t j = 0; j < size_; j += kLanes) {
      const float* from = x_ + m * w_.n + j;
      const int64_t count = std::clamp<int64_t>(w_.n - j, 0, kLanes);
      const Floats its =
          count == kLanes ? Load<Floats>(from) : Load<Floats>(Padded<float>(from, count).values);
      // What rounding would make infinite is cut instead.
      const Ints finite = its - its == 0;
      Floats near = finite & (its > kMost) ? Floats{} + kMost : its;
      near = finite & (its < -kMost) ? Floats{} - kMost : near;
      const Floats left = its - Round(near, high + j);
      Round(left - left == 0 ? left : Floats{}, high + size_ + j);
    }
  }

  // out[k][r] = Σ_j x[m + k][j] rows[r][j].
  template <int M>
  void Multiply(const Block<Bfloat16, M>& block, int64_t m) const {
    constexpr int R = Block<Bfloat16, M>::R, kChains = M == 1 ? 2 : 1;
    const int64_t whole = w_.n / kColumns * kColumns;
    __m512 sums[kChains][M][R];
    LAYERCOMB_UNROLL
    for (int c = 0; c < kChains; ++c) {
      LAYERCOMB_UNROLL
      for (int k = 0; k < M; ++k) {
        LAYERCOMB_UNROLL
        for (int r = 0; r < R; ++r) sums[c][k][r] = _mm512_setzero_ps();
      }
    }
    const auto add = [&](int64_t j, const auto& row) {
      __m512bh weights[R];
      LAYERCOMB_UNROLL
      for (int r = 0; r < R; ++r) weights[r] = row(r);
      LAYERCOMB_UNROLL
      for (int part = 0; part < 2; ++part) {
        LAYERCOMB_UNROLL
        for (int k = 0; k < M; ++k) {
          const auto its = Load<__m512bh>(&values_[(2 * (m + k) + part) * size_ + j]);
          LAYERCOMB_UNROLL
          for (int r = 0; r < R; ++r) {
            __m512& sum = sums[part % kChains][k][r];
            sum = _mm512_dpbf16_ps(sum, weights[r], its);
          }
        }
      }
    };
    for (int64_t j = 0; j < whole; j += kColumns) {
      Prefetch<R>(block.next, j);
      add(j, [&](int r) { return Load<__m512bh>(block.rows[r] + j); });
    }
    if (whole < w_.n) {
      const auto mask = (uint32_t{1} << (w_.n - whole)) - 1;
      add(whole, [&](int r) {
        return (__m512bh)_mm512_maskz_loadu_epi16(mask, block.rows[r] + whole);
      });
    }
    Floats totals[M][R];
    LAYERCOMB_UNROLL
    for (int k = 0; k < M; ++k) {
      LAYERCOMB_UNROLL
      for (int r = 0; r < R; ++r) {
        totals[k][r] = reinterpret_cast<Floats>(sums[0][k][r]);
        if (kChains > 1) totals[k][r] += reinterpret_cast<Floats>(sums[kChains - 1][k][r]);
      }
    }
    Store<M, R>(totals, block.out);
  }

 private:
  static constexpr int kColumns = 32;                // of a vector
  static constexpr float kMost = 3.3895313892515355e38f;  // the largest bfloat16

  // Writes the nearest bfloat16 of each, and returns them.
  static Floats Round(Floats x, uint16_t* to) {
    const __m256bh rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(x));
    std::memcpy(to, &rounded, sizeof rounded);
    return reinterpret_cast<Floats>(Unsigned16(&rounded) << 16);
  }

  const Matrix<Bfloat16>& w_;
  const float* x_;
  const int64_t size_;
  std::vector<uint16_t> values_;
};
#endif

#if defined(LAYERCOMB_SHORTS)
// Activations rounded to int16. Groups are cut into pieces, short enough for sums of int32, in
// which each lane has a scale: the largest value there becomes 32767. What a piece lacks of a whole
// number of vectors is zeros.
template <typename W>
class AsShorts {
 public:
  AsShorts(const Matrix<W>& w, const float* x, int64_t n_x)
      : w_(w),
        x_(x),
        piece_(std::min(w.g, kMost)),
        n_pieces_(CeilDiv(w.g, piece_)),
        size_(CeilDiv(piece_, kPair) * kPair),
        row_(w.n / w.g * W::parts * n_pieces_),
        values_(n_x * row_ * size_),
        scales_(n_x * row_ * kLanes) {}

  // Rounds row m.
  void Prepare(int64_t m) {
    const int64_t n_groups = row_ / n_pieces_;
    for (int64_t i = m * n_groups; i < (m + 1) * n_groups; ++i) {
      for (int64_t piece = 0; piece < n_pieces_; ++piece) {
        const int64_t at = i * n_pieces_ + piece, first = piece * piece_;
        Round(x_ + i * w_.g + first, std::min(piece_, w_.g - first), &values_[at * size_],
              &scales_[at * kLanes]);
      }
    }
  }

  // out[k][r] = Σ_j x[m + k][j] rows[r][j] scales[r][j / g].
  template <int M>
  void Multiply(const Block<W, M>& block, int64_t m) const {
    size_ == piece_ && n_pieces_ == 1 && size_ % kLine == 0 ? MultiplyLines<M>(block, m)
                                                            : MultiplyAny<M>(block, m);
  }

 private:
  static constexpr int P = W::parts;
  static constexpr int kPair = 2 * kLanes;     // words in a vector of int16
  static constexpr int kLine = 64;             // words in a line of the cache
  static constexpr int64_t kMost = 8 * kLine;  // words in a piece

  // Groups are pieces, and whole lines of the cache, as they nearly always are.
  template <int M>
  void MultiplyLines(const Block<W, M>& block, int64_t m) const {
    constexpr int R = Block<W, M>::R;
    const int64_t n = w_.n, g = w_.g, n_groups = row_ / P;
    const int16_t* x = &values_[m * row_ * g];
    const float* x_scales = &scales_[m * row_ * kLanes];
    Floats totals[M][R] = {};
    for (int64_t group = 0; group < n_groups; ++group) {
      Ints sums[P][M][R] = {};
      for (int64_t j = group * g; j < (group + 1) * g; j += kLine) {
        Prefetch<R>(block.next, j);
        LAYERCOMB_UNROLL
        for (int i = 0; i < kLine; i += kPair) {
          Add<M, R>([&](int r) { return block.rows[r] + j + i; },
                    [&](int k, int p) { return x + (k * P + p) * n + j + i; }, sums);
        }
      }
      Scale<M, R>(sums, x_scales + group * kLanes, n_groups, block.scales, group, n_groups, totals);
    }
    Store<M, R>(totals, block.out);
  }

  template <int M>
  void MultiplyAny(const Block<W, M>& block, int64_t m) const {
    constexpr int R = Block<W, M>::R;
    const int64_t n_groups = w_.n / w_.g;
    Floats totals[M][R] = {};
    for (int64_t i = 0; i < n_groups * n_pieces_; ++i) {
      const int64_t group = i / n_pieces_, within = i % n_pieces_ * piece_;
      const int64_t count = std::min(piece_, w_.g - within);
      const int16_t* x = &values_[(m * row_ + i) * size_];
      Ints sums[P][M][R] = {};
      for (int64_t j = 0; j < count; j += kPair) {
        Padded<typename W::Word, kPair> words[R];
        for (int r = 0; r < R; ++r) {
          const typename W::Word* from = block.rows[r] + group * w_.g + within + j;
          words[r] = {from, std::min<int64_t>(kPair, count - j)};
        }
        Add<M, R>([&](int r) { return words[r].values; },
                  [&](int k, int p) {
                    return x + (k * row_ + p * n_groups * n_pieces_) * size_ + j;
                  },
                  sums);
      }
      Scale<M, R>(sums, &scales_[(m * row_ + i) * kLanes], n_groups * n_pieces_, block.scales,
                  group, n_groups, totals);
    }
    Store<M, R>(totals, block.out);
  }

  template <int M, int R, typename Row, typename Values>
  static void Add(const Row& row, const Values& x, Ints (&sums)[P][M][R]) {
    LAYERCOMB_UNROLL
    for (int r = 0; r < R; ++r) {
      Shorts weights[P];
      W::Widen(row(r), weights);
      LAYERCOMB_UNROLL
      for (int p = 0; p < P; ++p) {
        LAYERCOMB_UNROLL
        for (int k = 0; k < M; ++k) {
          sums[p][k][r] += SumOfPairs(weights[p], Load<Shorts>(x(k, p)));
        }
      }
    }
  }

  // Adds the sums of a piece, times the scales of its activations, of which there are n a part, and
  // of its group.
  template <int M, int R>
  static void Scale(const Ints (&sums)[P][M][R], const float* x_scales, int64_t n,
                    const float* const (&scales)[R], int64_t group, int64_t n_groups,
                    Floats (&totals)[M][R]) {
    LAYERCOMB_UNROLL
    for (int p = 0; p < P; ++p) {
      LAYERCOMB_UNROLL
      for (int k = 0; k < M; ++k) {
        const Floats x_scale = Load<Floats>(x_scales + (k * P + p) * n * kLanes);
        LAYERCOMB_UNROLL
        for (int r = 0; r < R; ++r) {
          totals[k][r] += scales[r][p * n_groups + group] *
                          (x_scale * __builtin_convertvector(sums[p][k][r], Floats));
        }
      }
    }
  }

  static void Round(const float* x, int64_t n, int16_t* values, float* scales) {
    using Halves = int16_t __attribute__((vector_size(2 * kLanes)));
    constexpr float kNearest = 3 << 22;  // the sum's last bits are then the nearest integer
    auto load = [=](int64_t j) {
      return j + kLanes <= n ? Load<Floats>(x + j)
                             : Load<Floats>(Padded<float>(x + j, std::max<int64_t>(n - j, 0)).values);
    };
    Floats most[2] = {}, unknown = {};
    for (int64_t j = 0; j < n; j += kLanes) {
      const Floats its = load(j);
      Floats& so_far = most[j / kLanes % 2];
      so_far = Larger(its < 0 ? -its : its, so_far);
      unknown += 0 * its;  // NaN where there is NaN, or infinity
    }
    Floats inverse[2], pairs[2];
    LAYERCOMB_UNROLL
    for (int i = 0; i < 2; ++i) {
      const Floats pair = Larger(most[i], NeighboursSwapped(most[i]));
      inverse[i] = pair > 0 ? 32767 / pair : Floats{};
      pairs[i] = pair / 32767 + Sum(unknown);
    }
    float ends[kPair];  // both of a pair have the same
    std::memcpy(ends, pairs, sizeof ends);
    for (int i = 0; i < kLanes; ++i) scales[i] = ends[2 * i];
    for (int64_t j = 0; j < (n + kPair - 1) / kPair * kPair; j += kLanes) {
      const Floats sum = load(j) * inverse[j / kLanes % 2] + kNearest;
      const Halves whole = __builtin_convertvector(reinterpret_cast<Ints>(sum), Halves);
      std::memcpy(values + j, &whole, sizeof whole);
    }
  }

  const Matrix<W>& w_;
  const float* x_;
  const int64_t piece_, n_pieces_, size_, row_;  // row_ pieces are a row of x
  std::vector<int16_t> values_;
  std::vector<float> scales_;
};

template <typename W>
using Activations = std::conditional_t<W::integer, AsShorts<W>, AsFloats<W>>;
#else
template <typename W>
using Activations = AsFloats<W>;
#endif

// y[m, i] = Σ_d x[m, d] w[at[i], d] for n_m rows of x, and i from `first` on; without `at`, of row i.
template <typename W, typename A>
void Rows(const Matrix<W>& w, const A& x, int64_t m, int64_t n_m, const int32_t* at,
          float* y, int64_t n_y, int64_t first, int64_t n) {
  constexpr int R = kRows<W>;
  float nowhere;
  auto row = [&](int64_t i) { return at ? w.Clamped(at[i]) : i; };
  for (int64_t i = first; i < first + n; i += R) {
    auto multiply = [&](auto n_x, int64_t k) {
      constexpr int M = n_x.value;
      Block<W, M> block;
      LAYERCOMB_UNROLL
      for (int r = 0; r < R; ++r) {
        const int64_t its = row(std::min(i + r, first + n - 1));  // the last ones again
        block.rows[r] = w.Row(its);
        block.next[r] = w.Row(row(std::min(i + R + r, first + n - 1)));
        block.scales[r] = w.scales ? w.Scales(its) : nullptr;
        LAYERCOMB_UNROLL
        for (int l = 0; l < M; ++l) {
          block.out[l][r] = i + r < first + n ? y + (k + l) * n_y + i + r : &nowhere;
        }
      }
      x.template Multiply<M>(block, m + k);
    };
    int64_t k = 0;
    for (; k + 4 <= n_m; k += 4) multiply(std::integral_constant<int, 4>(), k);
    for (; k < n_m; ++k) multiply(std::integral_constant<int, 1>(), k);
  }
}

// y[d] = Σ_k h[k] w[at[k], d], for n words of each row from j on, whole groups.
template <typename W>
void SumOfRows(const Matrix<W>& w, const float* h, const int32_t* at, int64_t n_k, float* y,
               int64_t j, int64_t n) {
  constexpr int P = W::parts, R = 4;
  const int64_t g = w.scales ? w.g : n;
  LAYERCOMB_UNROLL
  for (int p = 0; p < P; ++p) std::fill_n(y + p * w.n + j, n, 0.0f);
  for (int64_t k = 0; k < n_k; k += R) {
    int64_t row[R], next_row[R];
    LAYERCOMB_UNROLL
    for (int r = 0; r < R; ++r) {
      row[r] = w.Clamped(at[std::min(k + r, n_k - 1)]);
      next_row[r] = w.Clamped(at[std::min(k + R + r, n_k - 1)]);
    }
    for (int64_t first = j; first < j + n; first += g) {
      const typename W::Word *rows[R], *next[R];
      float scaled[P][R];
      LAYERCOMB_UNROLL
      for (int r = 0; r < R; ++r) {
        rows[r] = w.Row(row[r]) + first;
        next[r] = w.Row(next_row[r]) + first;
        LAYERCOMB_UNROLL
        for (int p = 0; p < P; ++p) {
          const float scale = w.scales ? w.Scales(row[r])[(p * w.n + first) / g] : 1;
          scaled[p][r] = k + r < n_k ? h[k + r] * W::unit[p] * scale : 0;
        }
      }
      auto add = [&](const auto& row, const auto& sum) {
        Floats weights[R][P];
        LAYERCOMB_UNROLL
        for (int r = 0; r < R; ++r) W::Widen(row(r), weights[r]);
        LAYERCOMB_UNROLL
        for (int p = 0; p < P; ++p) {
          Floats totals[2] = {Load<Floats>(sum(p))};
          LAYERCOMB_UNROLL
          for (int r = 0; r < R; ++r) totals[r % 2] += scaled[p][r] * weights[r][p];
          totals[0] += totals[1];
          std::memcpy(sum(p), totals, sizeof *totals);
        }
      };
      int64_t i = 0;
      for (; i + kLanes <= g; i += kLanes) {
        Prefetch<R>(next, i);
        add([&](int r) { return rows[r] + i; }, [&](int p) { return y + p * w.n + first + i; });
      }
      if (const int64_t rest = g - i) {
        Padded<typename W::Word> ends[R];
        Padded<float> sums[P];
        LAYERCOMB_UNROLL
        for (int r = 0; r < R; ++r) ends[r] = {rows[r] + i, rest};
        LAYERCOMB_UNROLL
        for (int p = 0; p < P; ++p) sums[p] = {y + p * w.n + first + i, rest};
        add([&](int r) { return ends[r].values; }, [&](int p) { return sums[p].values; });
        LAYERCOMB_UNROLL
        for (int p = 0; p < P; ++p) std::memcpy(y + p * w.n + first + i, sums[p].values, 4 * rest);
      }
    }
  }
}

constexpr int64_t kFew = 16;  // rows of x, for which weights are read as quickly as memory gives them

template <typename W, typename A = Activations<W>>
class RowProduct final : public Product {
 public:
  RowProduct(const Matrix<W>& w, const float* x, int64_t n_x, float* y, int64_t bytes)
      : Product(n_x, w.n * W::parts, w.n_rows, w.n_rows, 16, bytes), w_(w), x_(w_, x, n_x), y_(y) {}

  void Prepare(int64_t m) override { x_.Prepare(m); }
  void Compute(int64_t first, int64_t n) override {
    Rows<W>(w_, x_, 0, n_x, nullptr, y_, w_.n_rows, first, n);
  }

 private:
  const Matrix<W> w_;
  A x_;
  float* const y_;
};

template <typename W>
class Chosen final : public ChosenRows {
 public:
  Chosen(const Matrix<W>& w, const Weights& weights, const float* x, int64_t n_x)
      : w_(w), weights_(weights), x_(w_, x, n_x) {}

  void Prepare(int64_t m) override { x_.Prepare(m); }
  void Fetch(int64_t row) const override { FetchRow(weights_, row); }
  void Multiply(int64_t m, const int32_t* at, int64_t n, float* y) const override {
    Rows<W>(w_, x_, m, 1, at, y, n, 0, n);
  }

 private:
  const Matrix<W> w_;
  const Weights weights_;
  Activations<W> x_;
};

}  // namespace

std::unique_ptr<Product> OfRows(const Weights& weights, const float* x, int64_t n_x, float* y) {
  std::unique_ptr<Product> made;
  WithMatrix(weights, [&](const auto& w) {
    using W = typename std::decay_t<decltype(w)>::Kind;
    const int64_t products = n_x * w.n_rows * w.n * W::parts;
    const int64_t bytes = std::max(weights.n_bytes, products / kProductsToAByte);
#if defined(LAYERCOMB_HALVES)
    // One row takes as long as its weights take to be read, whatever multiplies them.
    if constexpr (std::is_same_v<W, Bfloat16>) {
      if (n_x > 1) {
        made = std::make_unique<RowProduct<W, AsHalves>>(w, x, n_x, y, bytes);
        return;
      }
    }
#endif
    made = std::make_unique<RowProduct<W>>(w, x, n_x, y, bytes);
  });
  return made;
}

void RowProducts(const Pool& pool, const Weights& weights, const float* x, int64_t n_x,
                 [[maybe_unused]] int n_bytes, float* y) {
  const bool integers = weights.kind == Kind::kInt8 || weights.kind == Kind::kInt4;
  if (integers || n_x <= kFew) return ComputeAll(pool, *OfRows(weights, x, n_x, y));
  WithMatrix(weights, [&](const auto& w) {
    using W = typename std::decay_t<decltype(w)>::Kind;
#if defined(LAYERCOMB_HALVES)
    if constexpr (std::is_same_v<W, Bfloat16>) {
      return HalfProducts(pool, w, x, n_x, n_bytes, y);
    }
#endif
    if constexpr (!W::integer) ManyProducts(pool, w, x, n_x, y);
  });
}

std::unique_ptr<ChosenRows> OfChosenRows(const Weights& weights, const float* x, int64_t n_x) {
  std::unique_ptr<ChosenRows> made;
  WithMatrix(weights, [&](const auto& w) {
    made = std::make_unique<Chosen<typename std::decay_t<decltype(w)>::Kind>>(w, weights, x, n_x);
  });
  return made;
}

void SumOfChosenRows(const Weights& weights, const float* h, const int32_t* at, int64_t n_k,
                     int64_t j, int64_t n, float* y) {
  WithMatrix(weights, [&](const auto& w) { SumOfRows(w, h, at, n_k, y, j, n); });
}

void GatheredProducts(const Pool& pool, const Weights& weights, const float* x, const int32_t* at,
                      int64_t n_x, int64_t n_k, float* y) {
  const auto rows = OfChosenRows(weights, x, n_x);
  for (int64_t m = 0; m < n_x; ++m) {
    rows->Prepare(m);
    InPieces(pool, weights.n_bytes / weights.n_rows * n_k, n_k, 4, [&](int64_t i, int64_t n) {
      rows->Multiply(m, at + m * n_k + i, n, y + m * n_k + i);
    });
  }
}

void GatheredSums(const Pool& pool, const Weights& weights, const float* h, const int32_t* at,
                  int64_t n_x, int64_t n_k, float* y) {
  const int64_t d = weights.n * (weights.kind == Kind::kInt4 ? 2 : 1);
  for (int64_t m = 0; m < n_x; ++m) {
    InPieces(pool, weights.n_bytes / weights.n_rows * n_k, weights.n, WordsTogether(weights),
             [&](int64_t j, int64_t n) {
               SumOfChosenRows(weights, h + m * n_k, at + m * n_k, n_k, j, n, y + m * d);
             });
  }
}

}  // namespace layercomb
