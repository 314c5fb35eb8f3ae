// Vectors of floats and integers, and how narrow weights become them.
//
// Vectors are those of GCC and Clang; only what GCC widens badly, and what it has no name for, is
// written by hand.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace layercomb {

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define LAYERCOMB_WIDE 1
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// Short loops over vectors must become straight code, for arrays to stay in registers.
#define LAYERCOMB_UNROLL _Pragma("GCC unroll 16")

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));

template <typename V>
inline V Load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// Keeps in a register what many products take: compilers would rather read it anew for each.
inline void Keep(Floats& v) {
#if defined(LAYERCOMB_WIDE)
  asm("" : "+v"(v));
#elif defined(__AVX__)
  asm("" : "+x"(v));
#endif
}

using Four = float __attribute__((vector_size(16)));

inline float Sum(Floats v) {
  Four parts[kLanes / 4], sum = {};
  std::memcpy(parts, &v, sizeof v);
  LAYERCOMB_UNROLL
  for (const Four& part : parts) sum += part;
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

// The sums of four vectors, for less than four times the work of one.
inline Four Sums(Floats a, Floats b, Floats c, Floats d) {
#if defined(__AVX__)
  // Four lanes at a time become parts of the four sums: a, b, c, d.
  const auto mixed = [](Floats x, Floats y, auto how) {
#if defined(LAYERCOMB_WIDE)
    const auto u = reinterpret_cast<__m512>(x), v = reinterpret_cast<__m512>(y);
    if constexpr (how == 0) return reinterpret_cast<Floats>(_mm512_unpacklo_ps(u, v));
    if constexpr (how == 1) return reinterpret_cast<Floats>(_mm512_unpackhi_ps(u, v));
    if constexpr (how == 2) return reinterpret_cast<Floats>(_mm512_shuffle_ps(u, v, 0x44));
    if constexpr (how == 3) return reinterpret_cast<Floats>(_mm512_shuffle_ps(u, v, 0xee));
#else
    const auto u = reinterpret_cast<__m256>(x), v = reinterpret_cast<__m256>(y);
    if constexpr (how == 0) return reinterpret_cast<Floats>(_mm256_unpacklo_ps(u, v));
    if constexpr (how == 1) return reinterpret_cast<Floats>(_mm256_unpackhi_ps(u, v));
    if constexpr (how == 2) return reinterpret_cast<Floats>(_mm256_shuffle_ps(u, v, 0x44));
    if constexpr (how == 3) return reinterpret_cast<Floats>(_mm256_shuffle_ps(u, v, 0xee));
#endif
  };
  const std::integral_constant<int, 0> low;
  const std::integral_constant<int, 1> high;
  const std::integral_constant<int, 2> first;
  const std::integral_constant<int, 3> last;
  const Floats ab = mixed(a, b, low) + mixed(a, b, high);
  const Floats cd = mixed(c, d, low) + mixed(c, d, high);
  const Floats all = mixed(ab, cd, first) + mixed(ab, cd, last);
  Four parts[kLanes / 4], sum = {};
  std::memcpy(parts, &all, sizeof all);
  LAYERCOMB_UNROLL
  for (const Four& part : parts) sum += part;
  return sum;
#else
  return Four{Sum(a), Sum(b), Sum(c), Sum(d)};
#endif
}

inline Floats Larger(Floats a, Floats b) { return a > b ? a : b; }

// Lanes 1, 0, 3, 2, and so on.
inline Floats NeighboursSwapped(Floats v) {
  using Pairs = uint64_t __attribute__((vector_size(4 * kLanes)));
  const Pairs pairs = reinterpret_cast<Pairs>(v);
  return reinterpret_cast<Floats>(pairs << 32 | pairs >> 32);
}

#if defined(LAYERCOMB_WIDE)
// Rows in the place of columns, of 16 vectors.
inline void Transpose(Floats (&v)[16]) {
  const auto interleaved = [](Floats a, Floats b, bool high) {
    const auto x = reinterpret_cast<__m512>(a), y = reinterpret_cast<__m512>(b);
    return reinterpret_cast<Floats>(high ? _mm512_unpackhi_ps(x, y) : _mm512_unpacklo_ps(x, y));
  };
  const auto pairs = [](Floats a, Floats b, bool high) {
    const auto x = reinterpret_cast<__m512d>(a), y = reinterpret_cast<__m512d>(b);
    return reinterpret_cast<Floats>(high ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
  };
  const auto quarters = [](Floats a, Floats b, bool odd) {
    const auto x = reinterpret_cast<__m512>(a), y = reinterpret_cast<__m512>(b);
    return reinterpret_cast<Floats>(odd ? _mm512_shuffle_f32x4(x, y, 0xdd)
                                        : _mm512_shuffle_f32x4(x, y, 0x88));
  };
  Floats u[16];
  LAYERCOMB_UNROLL
  for (int i = 0; i < 16; ++i) u[i] = interleaved(v[i & ~1], v[i | 1], i & 1);
  LAYERCOMB_UNROLL
  for (int i = 0; i < 16; ++i) {
    v[i] = pairs(u[(i & ~3) + i / 2 % 2], u[(i & ~3) + i / 2 % 2 + 2], i & 1);
  }
  LAYERCOMB_UNROLL
  for (int i = 0; i < 16; ++i) {
    u[i] = quarters(v[(i & 8) + i % 4], v[(i & 8) + i % 4 + 4], i & 4);
  }
  LAYERCOMB_UNROLL
  for (int i = 0; i < 16; ++i) v[i] = quarters(u[i % 8], u[i % 8 + 8], i & 8);
}
#endif

// a · b of n numbers.
inline float Dot(const float* a, const float* b, int64_t n) {
  Floats sums[2] = {};  // an addition waits for the last
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    sums[0] += Load<Floats>(a + i) * Load<Floats>(b + i);
    sums[1] += Load<Floats>(a + i + kLanes) * Load<Floats>(b + i + kLanes);
  }
  float total = Sum(sums[0] + sums[1]);
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

// out[r] = a[r] · b for R rows a of n; b is read once.
template <int R>
void Dots(const float* a, const float* b, int64_t n, float* out) {
  if constexpr (R == 1) {
    *out = Dot(a, b, n);
    return;
  }
  Floats sums[R] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Floats its = Load<Floats>(b + i);
    LAYERCOMB_UNROLL
    for (int r = 0; r < R; ++r) sums[r] += Load<Floats>(a + r * n + i) * its;
  }
  LAYERCOMB_UNROLL
  for (int r = 0; r < R; ++r) {
    out[r] = Sum(sums[r]);
    for (int64_t j = i; j < n; ++j) out[r] += a[r * n + j] * b[j];
  }
}

// A bit for each lane that is set, all of whose bits are.
inline uint32_t Bits(Ints lanes) {
#if defined(LAYERCOMB_WIDE)
  const __m512i its = reinterpret_cast<__m512i>(lanes);
  return _mm512_test_epi32_mask(its, its);
#elif defined(__AVX__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(lanes));
#else
  uint32_t bits = 0;
  LAYERCOMB_UNROLL
  for (int i = 0; i < kLanes; ++i) bits |= uint32_t(lanes[i] & 1) << i;
  return bits;
#endif
}

// Writes the lanes of v with a bit one after the other, and may write a whole vector.
inline void Compress(uint32_t bits, Ints v, int32_t* to) {
#if defined(LAYERCOMB_WIDE)
  const __m512i its = _mm512_maskz_compress_epi32(bits, reinterpret_cast<__m512i>(v));
  std::memcpy(to, &its, sizeof its);
#else
  int32_t values[kLanes];
  std::memcpy(values, &v, sizeof v);
  for (; bits; bits &= bits - 1) *to++ = values[__builtin_ctz(bits)];
#endif
}

// The bits of floats as integers in their order, where none is NaN; and back.
inline Ints Ordered(Ints bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

// e^x for x ≤ 0 to 3 units in the last place: 2^k times a polynomial in what is left of x, at most
// half a binary place; 0 where that is below the smallest normal number, NaN for NaN.
inline Floats Exp(Floats x) {
  constexpr float kNearest = 3 << 22;  // the sum's last bits are then the nearest integer
  constexpr float kTaylor[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
  const Floats low = Floats{} - 87;
  const Floats clamped = x < low ? low : x;
  const Floats shifted = clamped * 1.44269504f + kNearest;
  const Floats k = shifted - kNearest;
  const Floats rest = (clamped - k * 0.693359375f) + k * 2.12194440e-4f;  // log 2 in two parts
  Floats y = Floats{} + kTaylor[0];
  LAYERCOMB_UNROLL
  for (int i = 1; i < 7; ++i) y = y * rest + kTaylor[i];
  const Ints power = (reinterpret_cast<Ints>(shifted) << 23) + (127 << 23);
  return x < low ? Floats{} : y * reinterpret_cast<Floats>(power);
}

// cap · tanh(s / cap). Near 0 it is Taylor's series: 1 − e would have few digits left.
inline Floats Capped(Floats s, float cap) {
  const Floats r = s * (1 / cap), square = r * r;
  const Floats near = s * (1 - square * (1.0f / 3) + square * square * (2.0f / 15));
  const Floats e = Exp((s < 0 ? s : -s) * (2 / cap));
  const Floats y = cap * (1 - e) / (1 + e);
  return square < 0.0025f ? near : s < 0 ? -y : y;
}

// As many bytes, or pairs of bytes, as there are lanes.
#if defined(LAYERCOMB_WIDE)
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

// Where there is an instruction for Σ of pairs of int16, integers are multiplied by it.
#if defined(__AVX2__)
#define LAYERCOMB_SHORTS 1
using Shorts = int16_t __attribute__((vector_size(4 * kLanes)));  // two to a lane
#if defined(LAYERCOMB_WIDE)
inline Shorts Signed8To16(const void* from) {
  return reinterpret_cast<Shorts>(_mm512_cvtepi8_epi16(Load<__m256i>(from)));
}
inline Ints SumOfPairs(Shorts a, Shorts b) {
  return reinterpret_cast<Ints>(
      _mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
#else
inline Shorts Signed8To16(const void* from) {
  return reinterpret_cast<Shorts>(_mm256_cvtepi8_epi16(Load<__m128i>(from)));
}
inline Ints SumOfPairs(Shorts a, Shorts b) {
  return reinterpret_cast<Ints>(
      _mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
#endif
#endif

// How words become floats. Each makes `parts` of them, and what comes out is to be multiplied by
// `unit`, which is done for a group at once. Integers become int16, too, which need no unit.

struct Float32 {
  using Word = float;
  static constexpr int parts = 1;
  static constexpr bool integer = false;
  static constexpr float unit[] = {1};
  static void Widen(const Word* from, Floats* to) { to[0] = Load<Floats>(from); }
};

struct Bfloat16 {
  using Word = uint16_t;
  static constexpr int parts = 1;
  static constexpr bool integer = false;
  static constexpr float unit[] = {1};
  static void Widen(const Word* from, Floats* to) {
    to[0] = reinterpret_cast<Floats>(Unsigned16(from) << 16);
  }
};

struct Int8 {
  using Word = int8_t;
  static constexpr int parts = 1;
  static constexpr bool integer = true;
  static constexpr float unit[] = {1};
  static void Widen(const Word* from, Floats* to) {
    to[0] = __builtin_convertvector(Signed8(from), Floats);
  }
#if defined(LAYERCOMB_SHORTS)
  static void Widen(const Word* from, Shorts* to) { to[0] = Signed8To16(from); }
#endif
};

// One float of each word, of a kind with one in a word.
template <typename W>
inline Floats Widened(const typename W::Word* from) {
  Floats to;
  W::Widen(from, &to);
  return to;
}

struct Int4 {
  using Word = uint8_t;
  static constexpr int parts = 2;
  static constexpr bool integer = true;
  static constexpr float unit[] = {1.0f / (1 << 28), 1.0f / 16};  // the halves stay where they are
  static void Widen(const Word* from, Floats* to) {
    const Ints both = Signed8(from);
    to[0] = __builtin_convertvector(both << 28, Floats);
    to[1] = __builtin_convertvector(both & ~15, Floats);
  }
#if defined(LAYERCOMB_SHORTS)
  static void Widen(const Word* from, Shorts* to) {
    const Shorts both = Signed8To16(from);
    to[0] = (both << 12) >> 12;
    to[1] = both >> 4;
  }
#endif
};

// Some values that are no whole vector, with zeros behind them.
template <typename T, int n = kLanes>
struct Padded {
  T values[n] = {};
  Padded() = default;
  Padded(const T* from, int64_t count) { std::memcpy(values, from, count * sizeof(T)); }
};

// Asks for a line of the cache of each of the R rows that come next: hardware looks ahead within a
// row, and not far enough for weights that are this quick to use.
template <int R, typename Word>
inline void Prefetch(const Word* const* next, int64_t j) {
  for (int r = 0; r < R; ++r) __builtin_prefetch(next[r] + j, 0, 2);
}

}  // namespace layercomb
