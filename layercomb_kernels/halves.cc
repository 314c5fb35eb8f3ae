#include "halves.h"

#if defined(LAYERCOMB_HALVES)

#include <memory>

namespace layercomb {
namespace {

constexpr int kRows = 8, kVectors = 3;          // of sums that stay in registers
constexpr int kOutputs = kVectors * kLanes;     // of a panel
constexpr int kGroup = 128;                     // columns that share scales of bytes
constexpr int kDeep = 1024;                     // columns that are multiplied before the next ones
constexpr int kGroups = kDeep / kGroup;
constexpr float kSmallest = 1e-36f;             // of what a scale may stand for
constexpr float kMiddle = (3 << 22) + 128;      // a sum's lowest byte is then the nearest integer + 128

// Rows of x, kDeep columns of each at most. The room behind a row lets rows begin in other sets of
// the cache.
struct alignas(64) Tile {
  uint16_t high[kRows][kDeep + 32];
  int8_t low[kRows][kDeep + 64];
  float scales[kRows][kGroups];
  int32_t starts[kRows][kGroups];  // −128 times the sum of the bytes, since weights have 128 added
};

// Rows of w in the lanes, kDeep columns at most: two columns in a word, or four bytes.
struct alignas(64) Panel {
  int32_t high[kDeep / 2][kOutputs], low[kDeep / 4][kOutputs];
  float scales[kGroups][kOutputs];
};

inline Floats Widened(Ints words) { return reinterpret_cast<Floats>(words); }

inline Floats Finite(Floats most) {
  return most > kSmallest ? most < 1e38f ? most : Floats{} : Floats{};
}

// What is to be multiplied by, to get bytes; 0 if there is no scale.
inline Floats Inverse(Floats most) { return most > 0 ? 127 / most : Floats{}; }

float Largest(Floats v) { return _mm512_reduce_max_ps(reinterpret_cast<__m512>(v)); }

// Rounds n columns of a row, at most a group. What lacks of a whole vector is zeros.
void RoundGroup(const float* x, int64_t n, uint16_t* high, int8_t* low, float& scale,
                int32_t& start) {
  constexpr int kParts = kGroup / kLanes;
  const int n_parts = static_cast<int>(CeilDiv(n, kLanes));
  Floats rest[kParts], most = {};
  for (int i = 0; i < n_parts; ++i) {
    const int64_t count = std::min<int64_t>(kLanes, n - i * kLanes);
    const Floats its = count == kLanes ? Load<Floats>(x + i * kLanes)
                                       : Load<Floats>(Padded<float>(x + i * kLanes, count).values);
    const __m256bh rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(its));
    std::memcpy(high + i * kLanes, &rounded, sizeof rounded);
    const Floats left = its - reinterpret_cast<Floats>(Unsigned16(&rounded) << 16);
    rest[i] = left == left ? left : Floats{};
    most = Larger(rest[i] < 0 ? -rest[i] : rest[i], most);
  }
  most = Finite(Floats{} + Largest(most));
  const Floats inverse = Inverse(most);
  Ints sum = {};
  for (int i = 0; i < n_parts; ++i) {
    const Ints bytes = reinterpret_cast<Ints>(
        _mm512_cvtps_epi32(reinterpret_cast<__m512>(rest[i] * inverse)));
    const __m128i narrow = _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(bytes));
    std::memcpy(low + i * kLanes, &narrow, sizeof narrow);
    sum += bytes;
  }
  scale = most[0] / 127;
  start = -128 * _mm512_reduce_add_epi32(reinterpret_cast<__m512i>(sum));
}

// Brings n columns from j on of rows from `first` on into lanes; behind the last row is the last.
void Interleave(const Matrix<Bfloat16>& w, int64_t first, int64_t j, int64_t n, Panel& to) {
  for (int v = 0; v < kVectors; ++v) {
    const uint16_t* rows[16];
    for (int r = 0; r < 16; ++r) {
      rows[r] = w.Row(std::min(first + v * 16 + r, w.n_rows - 1)) + j;
    }
    for (int64_t i = 0; i < n; i += 32) {
      Floats words[16];
      const auto mask = n - i < 32 ? (uint32_t{1} << (n - i)) - 1 : ~uint32_t{0};
      LAYERCOMB_UNROLL
      for (int r = 0; r < 16; ++r) {
        words[r] = reinterpret_cast<Floats>(_mm512_maskz_loadu_epi16(mask, rows[r] + i));
      }
      Transpose(words);
      LAYERCOMB_UNROLL
      for (int p = 0; p < 16; ++p) {
        std::memcpy(&to.high[i / 2 + p][v * 16], &words[p], sizeof words[p]);
      }
    }
  }
}

// Rounds n columns to bytes. The words behind them are zeros.
void RoundWeights(int64_t n, Panel& panel) {
  for (int64_t first = 0; first < n; first += kGroup) {
    const int64_t end = std::min(CeilDiv(n, 4) * 4, first + kGroup);
    for (int v = 0; v < kOutputs; v += 16) {
      __m512i largest = _mm512_setzero_si512();
      for (int64_t p = first / 2; p < end / 2; ++p) {
        const __m512i words = _mm512_load_si512(&panel.high[p][v]);
        largest = _mm512_max_epu16(largest, _mm512_and_si512(words, _mm512_set1_epi32(0x7fff7fff)));
      }
      const Ints both = reinterpret_cast<Ints>(largest);
      const Floats most = Finite(Larger(Widened(both << 16), Widened(both & ~0xffff)));
      const Floats inverse = Inverse(most), scales = most / 127;
      std::memcpy(&panel.scales[first / kGroup][v], &scales, sizeof scales);
      for (int64_t q = first / 4; q < end / 4; ++q) {
        const Ints a = Load<Ints>(&panel.high[2 * q][v]), b = Load<Ints>(&panel.high[2 * q + 1][v]);
        const Ints words[] = {a << 16, a & ~0xffff, b << 16, b & ~0xffff};
        __m512i bytes[4];
        LAYERCOMB_UNROLL
        for (int i = 0; i < 4; ++i) {
          bytes[i] = reinterpret_cast<__m512i>(Widened(words[i]) * inverse + kMiddle);
        }
        __m512i line = bytes[0];
        line = _mm512_mask_mov_epi8(line, 0x2222222222222222, _mm512_slli_epi32(bytes[1], 8));
        line = _mm512_mask_mov_epi8(line, 0x4444444444444444, _mm512_slli_epi32(bytes[2], 16));
        line = _mm512_mask_mov_epi8(line, 0x8888888888888888, _mm512_slli_epi32(bytes[3], 24));
        _mm512_store_si512(&panel.low[q][v], line);
      }
    }
  }
}

// Adds to the totals the products of bytes with n columns of M rows.
template <int M>
void AddBytes(const Tile& x, const Panel& w, int64_t n, Floats (&totals)[kRows][kVectors]) {
  for (int64_t first = 0; first < n; first += kGroup) {
    const int64_t group = first / kGroup, end = std::min(n, first + kGroup);
    Ints sums[M][kVectors];
    LAYERCOMB_UNROLL
    for (int m = 0; m < M; ++m) {
      LAYERCOMB_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[m][v] = Ints{} + x.starts[m][group];
    }
    for (int64_t j = first; j < end; j += 4) {
      __m512i weights[kVectors];
      LAYERCOMB_UNROLL
      for (int v = 0; v < kVectors; ++v) weights[v] = _mm512_load_si512(&w.low[j / 4][v * 16]);
      LAYERCOMB_UNROLL
      for (int m = 0; m < M; ++m) {
        const __m512i its = _mm512_set1_epi32(Load<int32_t>(&x.low[m][j]));
        LAYERCOMB_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          sums[m][v] = reinterpret_cast<Ints>(
              _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums[m][v]), weights[v], its));
        }
      }
    }
    LAYERCOMB_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const Floats scales = Load<Floats>(&w.scales[group][v * 16]);
      LAYERCOMB_UNROLL
      for (int m = 0; m < M; ++m) {
        totals[m][v] += x.scales[m][group] * scales * __builtin_convertvector(sums[m][v], Floats);
      }
    }
  }
}

// Adds to the totals the products of halves.
template <int M>
void AddHalves(const Tile& x, const Panel& w, int64_t n, Floats (&totals)[kRows][kVectors]) {
  __m512 sums[M][kVectors];
  LAYERCOMB_UNROLL
  for (int m = 0; m < M; ++m) {
    LAYERCOMB_UNROLL
    for (int v = 0; v < kVectors; ++v) sums[m][v] = reinterpret_cast<__m512>(totals[m][v]);
  }
  for (int64_t j = 0; j < n; j += 2) {
    __m512bh weights[kVectors];
    LAYERCOMB_UNROLL
    for (int v = 0; v < kVectors; ++v) weights[v] = Load<__m512bh>(&w.high[j / 2][v * 16]);
    LAYERCOMB_UNROLL
    for (int m = 0; m < M; ++m) {
      const auto its = (__m512bh)_mm512_set1_epi32(Load<int32_t>(&x.high[m][j]));
      LAYERCOMB_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        sums[m][v] = _mm512_dpbf16_ps(sums[m][v], weights[v], its);
      }
    }
  }
  LAYERCOMB_UNROLL
  for (int m = 0; m < M; ++m) {
    LAYERCOMB_UNROLL
    for (int v = 0; v < kVectors; ++v) totals[m][v] = reinterpret_cast<Floats>(sums[m][v]);
  }
}

// y[m] = (y[m] if add) + the products of M rows, of n_y outputs.
template <int M>
void MultiplyTile(const Tile& x, const Panel& w, int64_t n, bool bytes, bool add, float* y,
                  int64_t row, int64_t n_y) {
  for (int m = 0; m < M; ++m) {  // the results are written when they have arrived
    for (int v = 0; v <= kVectors; ++v) __builtin_prefetch(y + m * row + v * kLanes, 1);
  }
  Floats totals[kRows][kVectors] = {};
  if (add) {
    for (int m = 0; m < M; ++m) std::memcpy(totals[m], y + m * row, n_y * sizeof(float));
  }
  if (bytes) AddBytes<M>(x, w, n, totals);
  AddHalves<M>(x, w, n, totals);
  for (int m = 0; m < M; ++m) std::memcpy(y + m * row, totals[m], n_y * sizeof(float));
}

template <int M = kRows, typename... Args>
void MultiplyRows(int64_t n_rows, const Args&... args) {
  if (n_rows == M) return MultiplyTile<M>(args...);
  if constexpr (M > 1) MultiplyRows<M - 1>(n_rows, args...);
}

}  // namespace

void HalfProducts(const Pool& pool, const Matrix<Bfloat16>& w, const float* x, int64_t n_x,
                      int n_bytes, float* y) {
  const int64_t n_tiles = CeilDiv(n_x, kRows), n_deep = CeilDiv(w.n, kDeep);
  const std::unique_ptr<Tile[]> tiles(new Tile[n_tiles * n_deep]);
  InPieces(pool, n_x * w.n * 2, n_tiles, 1, [&](int64_t first, int64_t n) {
    for (int64_t m = first * kRows; m < std::min((first + n) * kRows, n_x); ++m) {
      for (int64_t j = 0; j < w.n; j += kGroup) {
        Tile& tile = tiles[j / kDeep * n_tiles + m / kRows];
        const int64_t r = m % kRows, i = j % kDeep, group = i / kGroup;
        RoundGroup(x + m * w.n + j, std::min<int64_t>(kGroup, w.n - j), &tile.high[r][i],
                   &tile.low[r][i], tile.scales[r][group], tile.starts[r][group]);
      }
    }
  });
  const int64_t bytes = n_x * w.n_rows * w.n / (2 * kProductsToAByte);
  InParallel(pool, WorthWaking(pool, bytes), CeilDiv(w.n_rows, kOutputs), [&](int64_t task) {
    const std::unique_ptr<Panel> panel(new Panel);
    const int64_t i = task * kOutputs, n_y = std::min<int64_t>(kOutputs, w.n_rows - i);
    for (int64_t j = 0; j < w.n; j += kDeep) {
      const int64_t depth = std::min<int64_t>(kDeep, w.n - j);
      Interleave(w, i, j, depth, *panel);
      if (n_bytes > 1) RoundWeights(depth, *panel);
      for (int64_t t = 0; t < n_tiles; ++t) {
        MultiplyRows(std::min<int64_t>(kRows, n_x - t * kRows), tiles[j / kDeep * n_tiles + t],
                     *panel, depth, n_bytes > 1, j > 0, y + t * kRows * w.n_rows + i, w.n_rows,
                     n_y);
      }
    }
  });
}

}  // namespace layercomb

#endif
