// Products of rows of activations with integer weights in panels, from one row to a long prompt.
//
// A panel is 16 rows of weights, a word of 32 bits of each after the other: four columns of int8, or
// eight of int4. One load brings a word of each of 16 rows, and one word of activations meets it in
// every lane; so nothing is widened, no sum goes across lanes, and the same loop serves any number
// of rows. Weights are stored with a bias that makes them unsigned, which is what instructions for
// products of bytes take; the sum of the activations, times the bias, is subtracted again.
//
// Activations are rounded to 16 bits with a scale for each piece of a group. Where bytes are
// multiplied, they are two signed bytes, high and low, each with a sum of its own.

#include <memory>

#include "kernels.h"
#include "products.h"
#include "vectors.h"

namespace layercomb {
namespace {

constexpr int kRows = 16;          // of a panel
constexpr int64_t kLongest = 128;  // columns of a piece, for sums of int32
constexpr int64_t kAhead = 8192;   // bytes between what is read and what is fetched for later

// What one vector has: a lane for a row, four bytes of weights to a lane.
using Bytes = uint8_t __attribute__((vector_size(4 * kLanes)));
constexpr int kVectors = kRows / kLanes;  // of a line: a word of each row of a panel

// Adds to each lane the product of its four bytes and those of x, or of two columns of four and x.
#if defined(__AVX512VNNI__) && defined(LAYERCOMB_WIDE)
#define LAYERCOMB_BYTES 1
inline void AddDot(Ints& sums, const Bytes& w, int32_t x) {
  sums = reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums),
                                                    reinterpret_cast<__m512i>(w),
                                                    _mm512_set1_epi32(x)));
}
#elif defined(__AVXVNNI__)
#define LAYERCOMB_BYTES 1
inline void AddDot(Ints& sums, const Bytes& w, int32_t x) {
  sums = reinterpret_cast<Ints>(_mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(sums),
                                                        reinterpret_cast<__m256i>(w),
                                                        _mm256_set1_epi32(x)));
}
#else
// The even columns, or the odd ones, as int16.
template <int odd>
inline void AddPairs(Ints& sums, const Bytes& w, int32_t x) {
  using Pairs = uint16_t __attribute__((vector_size(4 * kLanes)));
  const auto words = reinterpret_cast<Pairs>(w);
  const Pairs half = odd ? words >> 8 : words & 255;
#if defined(LAYERCOMB_SHORTS)
  sums += SumOfPairs(reinterpret_cast<Shorts>(half), reinterpret_cast<Shorts>(Ints{} + x));
#elif defined(__SSE2__) && !defined(__AVX__)
  sums += reinterpret_cast<Ints>(
      _mm_madd_epi16(reinterpret_cast<__m128i>(half), _mm_set1_epi32(x)));
#else
  const auto both = reinterpret_cast<Ints>(half);
  sums += (both & 0xffff) * static_cast<int16_t>(x) + (both >> 16) * (x >> 16);
#endif
}
#endif

// Vectors and rows of activations that are multiplied at once: as many sums as registers hold.
constexpr int kAtOnce = kVectors > 1 ? kVectors : 2;
template <int N>
constexpr int kBlock = kLanes == 16 ? 4 : kLanes == 8 ? 2 : 1;

// How four columns of activations are kept as words of 32 bits, and multiplied. Where bytes are
// multiplied, one word has the high bytes, and another the low ones; if N is 1 there is one word of
// bytes. Elsewhere values are int16: one word has columns 0 and 2, the other 1 and 3. `Keep` makes the
// words of kLanes columns, and adds the values to the sums.
template <int N>
struct Dot {
#if defined(LAYERCOMB_BYTES)
  static constexpr int n_sums = N, n_words = N;
  static void Add(Ints (&sums)[n_sums], const Bytes& w, const int32_t (&x)[n_words]) {
    LAYERCOMB_UNROLL
    for (int i = 0; i < N; ++i) AddDot(sums[i], w, x[i]);
  }
  static void Keep(Ints x, int32_t* (&to)[n_words], Ints (&sums)[n_sums]) {
    using Narrow = int8_t __attribute__((vector_size(kLanes)));
    const Ints high = N == 1 ? x : (x + 128) >> 8, low = x - (high << 8);
    const Ints parts[] = {high, low};
    LAYERCOMB_UNROLL
    for (int i = 0; i < N; ++i) {
      const Narrow bytes = __builtin_convertvector(parts[i], Narrow);
      std::memcpy(to[i], &bytes, sizeof bytes);
      sums[i] += parts[i];
    }
  }
  static Ints Total(const Ints (&sums)[n_sums]) {
    return N == 1 ? sums[0] : (sums[0] << 8) + sums[N - 1];
  }
#else
  static constexpr int n_sums = 1, n_words = 2;
  static void Add(Ints (&sums)[n_sums], const Bytes& w, const int32_t (&x)[n_words]) {
    AddPairs<0>(sums[0], w, x[0]);
    AddPairs<1>(sums[0], w, x[1]);
  }
  static void Keep(Ints x, int32_t* (&to)[n_words], Ints (&sums)[n_sums]) {
    sums[0] += x;
    LAYERCOMB_UNROLL
    for (int i = 0; i < kLanes / 4; ++i) {
      LAYERCOMB_UNROLL
      for (int odd = 0; odd < 2; ++odd) {
        const uint32_t second = x[4 * i + odd + 2];
        to[odd][i] = static_cast<int32_t>((x[4 * i + odd] & 0xffff) | second << 16);
      }
    }
  }
  static Ints Total(const Ints (&sums)[n_sums]) { return sums[0]; }
#endif
};

// All lanes as one, by a function of two.
template <typename Four, typename V, typename F>
inline auto Reduced(V v, const F& f) {
  Four parts[kLanes / 4];
  std::memcpy(parts, &v, sizeof v);
  LAYERCOMB_UNROLL
  for (int i = 1; i < kLanes / 4; ++i) parts[0] = f(parts[0], parts[i]);
  const Four halves = f(parts[0], Four{parts[0][2], parts[0][3], parts[0][2], parts[0][3]});
  return f(halves, Four{halves[1], halves[1], halves[1], halves[1]})[0];
}

using FourInts = int32_t __attribute__((vector_size(16)));
using FourFloats = float __attribute__((vector_size(16)));

inline int32_t Sum(Ints v) {
  return Reduced<FourInts>(v, [](auto a, auto b) { return a + b; });
}

// How a vector of words is taken apart: one vector for every four columns.
struct Panels8 {
  static constexpr int bits = 8, bias = 128;
  static void Split(const Bytes& line, Bytes (&to)[1]) { to[0] = line; }
};

struct Panels4 {
  static constexpr int bits = 4, bias = 8;
  static void Split(const Bytes& line, Bytes (&to)[2]) {
    to[0] = line & 15;
    to[1] = line >> 4;
  }
};

// Columns of a word.
template <typename W>
constexpr int kColumns = 32 / W::bits;

// Rows of activations, rounded to N bytes a value, in pieces that share a scale.
template <typename W, int N>
class Rounded {
 public:
  static constexpr int kSums = Dot<N>::n_sums, kWords = Dot<N>::n_words;

  // Without a bias, weights are what is stored, and the sums of pieces are kept instead.
  Rounded(int64_t n_x, int64_t d, int64_t group, bool biased)
      : piece_(PieceOf(group)), n_pieces_(d / piece_), words_(new int32_t[n_x * kWords * (d / 4)]),
        scales_(new float[n_x * n_pieces_]), biases_(new int32_t[n_x * n_pieces_ * kSums]),
        sums_(biased ? nullptr : new float[n_x * n_pieces_]) {}

  // Rounds x, row m.
  void Prepare(const float* x, int64_t m) {
    // In two passes, in which no piece waits for another.
    for (int64_t i = 0; i < n_pieces_; ++i) FindScale(x + i * piece_, m * n_pieces_ + i);
    for (int64_t i = 0; i < n_pieces_; ++i) Round(x + i * piece_, m, i);
  }

  int64_t piece() const { return piece_; }
  int64_t n_pieces() const { return n_pieces_; }
  // How many words of four columns a row has, of each kind.
  int64_t n_words() const { return n_pieces_ * piece_ / 4; }
  const int32_t* words(int64_t m) const { return &words_[m * kWords * n_words()]; }
  const float* scales(int64_t m) const { return &scales_[m * n_pieces_]; }
  const int32_t* biases(int64_t m) const { return &biases_[m * n_pieces_ * kSums]; }
  // What each minimum is multiplied by, if there is no bias.
  const float* sums(int64_t m) const { return &sums_[m * n_pieces_]; }

 private:
  // The longest piece of a group that is a whole number of words, and not too long for sums.
  static int64_t PieceOf(int64_t group) {
    for (int64_t n = CeilDiv(group, kLongest);; ++n) {
      if (group % n == 0 && group / n % kColumns<W> == 0) return group / n;
    }
  }

  static constexpr float kMost = N == 1 ? 127 : 32512;  // 127 · 256: a high byte is 127 at most

  Floats At(const float* x, int64_t j) const {
    return j + kLanes <= piece_ ? Load<Floats>(x + j)
                                : Load<Floats>(Padded<float>(x + j, piece_ - j).values);
  }

  // The scale of piece `at`, NaN where there is NaN, or infinity.
  void FindScale(const float* x, int64_t at) {
    Floats most = {}, unknown = {};
    for (int64_t j = 0; j < piece_; j += kLanes) {
      const Floats its = At(x, j);
      most = Larger(its < 0 ? -its : its, most);
      unknown += 0 * its;
    }
    const float largest = Reduced<FourFloats>(most, [](auto a, auto b) { return a > b ? a : b; });
    scales_[at] = largest * (1 / kMost) + layercomb::Sum(unknown);
  }

  void Round(const float* x, int64_t m, int64_t i) {
    constexpr float kNearest = 3 << 22;  // the sum's last bits are then the nearest integer
    const int64_t at = m * n_pieces_ + i;
    const float inverse = scales_[at] > 0 ? 1 / scales_[at] : 0;
    const auto rounded = [&](Floats its) {
      its *= inverse;
      const Ints bits = reinterpret_cast<Ints>((its == its ? its : Floats{}) + kNearest);
      return (bits << 10) >> 10;  // the 22 bits behind the point
    };
    Ints sums[kSums] = {};
    int32_t* to[kWords];
    for (int k = 0; k < kWords; ++k) to[k] = At(m, k, i);
    int64_t j = 0;
    for (; j + kLanes <= piece_; j += kLanes) {
      Dot<N>::Keep(rounded(Load<Floats>(x + j)), to, sums);
      for (int k = 0; k < kWords; ++k) to[k] += kLanes / 4;
    }
    if (j < piece_) {
      int32_t ends[kWords][kLanes / 4], *its[kWords];
      for (int k = 0; k < kWords; ++k) its[k] = ends[k];
      Dot<N>::Keep(rounded(At(x, j)), its, sums);
      for (int k = 0; k < kWords; ++k) std::copy_n(ends[k], (piece_ - j) / 4, to[k]);
    }
    for (int s = 0; s < kSums; ++s) biases_[at * kSums + s] = sums_ ? 0 : -W::bias * Sum(sums[s]);
    if (sums_) sums_[at] = scales_[at] * Sum(Dot<N>::Total(sums));
  }

  int32_t* At(int64_t m, int k, int64_t i) {
    return &words_[(m * kWords + k) * n_words() + i * piece_ / 4];
  }

  const int64_t piece_, n_pieces_;
  const std::unique_ptr<int32_t[]> words_;
  const std::unique_ptr<float[]> scales_;
  const std::unique_ptr<int32_t[]> biases_;
  const std::unique_ptr<float[]> sums_;
};

inline Floats LoadScales(const float* from) { return Load<Floats>(from); }

// float16: the bits of a float32 that is 2^112 times too small, but where all of the exponent is set.
inline Floats LoadScales(const uint16_t* from) {
  const Ints bits = Unsigned16(from), size = (bits & 0x7fff) << 13;
  const Ints scaled = reinterpret_cast<Ints>(reinterpret_cast<Floats>(size) * 0x1p112f);
  const Ints right = (bits & 0x7c00) == 0x7c00 ? size | 0x7f800000 : scaled;
  return reinterpret_cast<Floats>(right | (bits & 0x8000) << 16);
}

// y[m][r] of M rows of x, from m on, and the rows of V vectors of panels.
template <typename W, typename S, int N, int V, int M>
void Multiply(const Rounded<W, N>& x, int64_t m, const uint8_t* words, const S* scales,
              const PanelWeights& of, float* y, int64_t n_y) {
  const int64_t n_lines = of.n_words, n_groups = of.n_groups;
  constexpr int kSums = Dot<N>::n_sums, kWords = Dot<N>::n_words, kFours = kColumns<W> / 4;
  const int64_t lines = x.piece() / kColumns<W>, n_pieces = x.n_pieces();
  const int64_t pieces_a_group = n_pieces / n_groups;
  const int32_t* x_words = x.words(m);
  const int64_t n = x.n_words();
  const uint8_t* at[V];
  LAYERCOMB_UNROLL
  for (int v = 0; v < V; ++v) at[v] = words + (v / kVectors * n_lines * kRows + v % kVectors * kLanes) * 4;
  Floats totals[M][V] = {};
  for (int64_t piece = 0; piece < n_pieces; ++piece) {
    Ints sums[M][V][kSums];
    LAYERCOMB_UNROLL
    for (int k = 0; k < M; ++k) {
      LAYERCOMB_UNROLL
      for (int s = 0; s < kSums; ++s) {
        const int32_t bias = x.biases(m + k)[piece * kSums + s];
        LAYERCOMB_UNROLL
        for (int v = 0; v < V; ++v) sums[k][v][s] = Ints{} + bias;
      }
    }
    for (int64_t line = piece * lines; line < (piece + 1) * lines; ++line) {
      Bytes w[V][kFours];
      LAYERCOMB_UNROLL
      for (int v = 0; v < V; ++v) {
        const uint8_t* from = at[v] + line * kRows * 4;
        W::Split(Load<Bytes>(from), w[v]);
      }
      LAYERCOMB_UNROLL
      for (int i = 0; i < kFours; ++i) {
        LAYERCOMB_UNROLL
        for (int k = 0; k < M; ++k) {
          int32_t its[kWords];
          LAYERCOMB_UNROLL
          for (int j = 0; j < kWords; ++j) its[j] = x_words[(k * kWords + j) * n + line * kFours + i];
          LAYERCOMB_UNROLL
          for (int v = 0; v < V; ++v) Dot<N>::Add(sums[k][v], w[v][i], its);
        }
      }
    }
    LAYERCOMB_UNROLL
    for (int v = 0; v < V; ++v) {
      const int64_t panel = v / kVectors, within = v % kVectors;
      const S* its = scales + panel * kRows * of.n_scales() +
                         piece / pieces_a_group * kRows + within * kLanes;
      const Floats scale = LoadScales(its);
      LAYERCOMB_UNROLL
      for (int k = 0; k < M; ++k) {
        totals[k][v] += scale * x.scales(m + k)[piece] *
                        __builtin_convertvector(Dot<N>::Total(sums[k][v]), Floats);
      }
      if (of.minima) {
        const Floats minimum = LoadScales(its + kRows * n_groups);
        LAYERCOMB_UNROLL
        for (int k = 0; k < M; ++k) totals[k][v] += minimum * x.sums(m + k)[piece];
      }
    }
  }
  LAYERCOMB_UNROLL
  for (int k = 0; k < M; ++k) std::memcpy(y + k * n_y, totals[k], sizeof totals[k]);
}

// y[r] of one row of x and a panel, which is read once, in order. Each sum is kept in two parts, since
// an addition waits for the one before.
template <typename W, typename S, int N>
void MultiplyOne(const Rounded<W, N>& x, const uint8_t* words, const S* scales,
                 const PanelWeights& of, float* y) {
  constexpr int kSums = Dot<N>::n_sums, kWords = Dot<N>::n_words;
  constexpr int kFours = kColumns<W> / 4, kLines = 2 / kFours;
  const int64_t lines = x.piece() / kColumns<W>, n_pieces = x.n_pieces();
  const int64_t pieces_a_group = n_pieces / of.n_groups;
  const int32_t* x_words = x.words(0);
  const int64_t n = x.n_words();
  Floats totals[kVectors] = {};
  for (int64_t piece = 0; piece < n_pieces; ++piece) {
    Ints sums[2][kVectors][kSums] = {};
    LAYERCOMB_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      LAYERCOMB_UNROLL
      for (int s = 0; s < kSums; ++s) sums[0][v][s] += x.biases(0)[piece * kSums + s];
    }
    const auto add = [&](int64_t line, int first) {
      const uint8_t* from = words + line * kRows * 4;
      if (W::bits == 4) __builtin_prefetch(from + kAhead, 0, 2);  // int8 is slower with it
      LAYERCOMB_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        Bytes w[kFours];
        W::Split(Load<Bytes>(from + v * sizeof(Bytes)), w);
        LAYERCOMB_UNROLL
        for (int i = 0; i < kFours; ++i) {
          int32_t its[kWords];
          LAYERCOMB_UNROLL
          for (int j = 0; j < kWords; ++j) its[j] = x_words[j * n + line * kFours + i];
          Dot<N>::Add(sums[first + i][v], w[i], its);
        }
      }
    };
    int64_t line = piece * lines;
    const int64_t end = line + lines;
    for (; line + kLines <= end; line += kLines) {
      LAYERCOMB_UNROLL
      for (int i = 0; i < kLines; ++i) add(line + i, i);
    }
    if (line < end) add(line, 0);
    LAYERCOMB_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const S* its = scales + piece / pieces_a_group * kRows + v * kLanes;
      const Floats scale = LoadScales(its);
      LAYERCOMB_UNROLL
      for (int s = 0; s < kSums; ++s) sums[0][v][s] += sums[1][v][s];
      totals[v] += scale * x.scales(0)[piece] *
                   __builtin_convertvector(Dot<N>::Total(sums[0][v]), Floats);
      if (of.minima) totals[v] += LoadScales(its + kRows * of.n_groups) * x.sums(0)[piece];
    }
  }
  std::memcpy(y, totals, sizeof totals);
}

template <typename W, typename S, int N>
class PanelProduct final : public Product {
 public:
  PanelProduct(const PanelWeights& w, const float* x, int64_t n_x, float* y)
      : Product(n_x, w.n_words * kColumns<W>, w.n_rows, w.n_rows, 2 * kPanels * kRows,
                std::max(w.n_rows * w.n_words * 4,
                         n_x * w.n_rows * w.n_words * kColumns<W> / (4 * kProductsToAByte))),
        w_(w), x_(x), y_(y), words_(static_cast<const uint8_t*>(w.words)),
        scales_(static_cast<const S*>(w.scales)), rounded_(n_x, d, d / w.n_groups, !w.minima) {}

  void Prepare(int64_t m) override { rounded_.Prepare(x_ + m * d, m); }

  void Compute(int64_t first, int64_t n) override {
    const int64_t last = first + n, n_panels = last / kRows;
    if (n_x == 1) {
      for (int64_t p = first / kRows; p < n_panels; ++p) {
        MultiplyOne<W, S, N>(rounded_, Words(p), Scales(p), w_, y_ + p * kRows);
      }
    } else {
      // The panels that stay in the cache while the activations pass.
      const int64_t stay = n_x < kBlock<N> ? n_panels : 8;
      for (int64_t begin = first / kRows; begin < n_panels; begin += stay) {
        const int64_t end = std::min(begin + stay, n_panels);
        for (int64_t m = 0; m < n_x; m += kBlock<N>) {
          int64_t p = begin;
          for (; p + kPanels <= end; p += kPanels) Some<kAtOnce>(p, m);
          for (; p < end; ++p) Some<kVectors>(p, m);
        }
      }
    }
    if (last % kRows) Rest(n_panels * kRows, last);
  }

 private:
  static constexpr int kPanels = kAtOnce / kVectors;

  const uint8_t* Words(int64_t panel) const { return words_ + panel * kRows * w_.n_words * 4; }
  const S* Scales(int64_t panel) const { return scales_ + panel * kRows * w_.n_scales(); }

  // A block of rows of x from m on, by V vectors of panels.
  template <int V>
  void Some(int64_t panel, int64_t m) {
    const int64_t last = std::min<int64_t>(m + kBlock<N>, n_x), n_y = w_.n_rows;
    float* to = y_ + m * n_y + panel * kRows;
    if (last - m == kBlock<N>) {
      Multiply<W, S, N, V, kBlock<N>>(rounded_, m, Words(panel), Scales(panel), w_, to, n_y);
      return;
    }
    for (; m < last; ++m, to += n_y) {
      Multiply<W, S, N, V, 1>(rounded_, m, Words(panel), Scales(panel), w_, to, n_y);
    }
  }

  // The last rows of w are no panel: they make one with rows of zeros.
  void Rest(int64_t first, int64_t last) {
    const int64_t n_lines = w_.n_words, n_scales = w_.n_scales();
    const std::unique_ptr<uint32_t[]> panel(new uint32_t[kRows * n_lines]());
    const std::unique_ptr<S[]> scales(new S[kRows * n_scales]());
    const auto* from = static_cast<const uint32_t*>(w_.words);
    for (int64_t i = first; i < last; ++i) {
      const int64_t r = i - first;
      for (int64_t c = 0; c < n_lines; ++c) panel[c * kRows + r] = from[i * n_lines + c];
      for (int64_t g = 0; g < n_scales; ++g) scales[g * kRows + r] = scales_[i * n_scales + g];
    }
    const auto* its = reinterpret_cast<const uint8_t*>(panel.get());
    for (int64_t m = 0; m < n_x; ++m) {
      float made[kRows];
      Multiply<W, S, N, kVectors, 1>(rounded_, m, its, scales.get(), w_, made, kRows);
      std::copy_n(made, last - first, y_ + m * w_.n_rows + first);
    }
  }

  const PanelWeights w_;
  const float* const x_;
  float* const y_;
  const uint8_t* const words_;
  const S* const scales_;
  Rounded<W, N> rounded_;
};

}  // namespace

std::unique_ptr<Product> OfPanels(const PanelWeights& w, const float* x, int64_t n_x, int n_bytes,
                                  float* y) {
  const auto made = [&](auto kind, auto scale) -> std::unique_ptr<Product> {
    using W = decltype(kind);
    using S = decltype(scale);
    if (n_bytes == 1) return std::make_unique<PanelProduct<W, S, 1>>(w, x, n_x, y);
    return std::make_unique<PanelProduct<W, S, 2>>(w, x, n_x, y);
  };
  const auto with = [&](auto scale) {
    return w.bits == 8 ? made(Panels8(), scale) : made(Panels4(), scale);
  };
  return w.half ? with(uint16_t()) : with(float());
}

void PanelProducts(const Pool& pool, const PanelWeights& w, const float* x, int64_t n_x,
                   int n_bytes, float* y) {
  ComputeAll(pool, *OfPanels(w, x, n_x, n_bytes, y));
}

}  // namespace layercomb
