// Attention of some queries to the keys of a cache, which they share.

#pragma once

#include "kernels.h"
#include "vectors.h"

namespace layercomb {

// Keys and values of one kind, and which are seen; all if null.
struct Keys {
  Vectors keys, values;
  const bool* seen;
};

constexpr int64_t kTogether = 4;  // the most queries at once

// How many values one query needs for n scores: whole vectors.
inline int64_t RoomFor(int64_t n) { return n + kLanes; }

// How many of n queries one task takes at least, where `group` neighbours share keys. A group is cut
// only if there are fewer groups than threads, since each part reads all keys.
inline int64_t Together(int64_t n_threads, int64_t n, int64_t group) {
  const int64_t wanted = std::max<int64_t>(1, n_threads) * group;
  return CeilDiv(group, CeilDiv(wanted, std::max<int64_t>(n, 1)));
}

// y[r] = Σ_c p[c] values[c], with p the softmax of query[r] · keys[c] over the n keys, for r of
// kTogether queries at most; zeros where none is seen. `p` has room for the scores of all.
//
// Narrow keys and values are widened as they are read. A scale of int8 is the same for all words of
// a vector: scores are multiplied by those of keys, and p by those of values.
void AttendTogether(const Keys& its, const float* query, int64_t r, int64_t n, float softcap,
                    float* p, float* y);

// Writes d floats as the words of a cache: bfloat16 to the nearest, of two the even one; or int8,
// where the largest is ±127 times the scale. What is not finite makes all of these NaN.
void Store(Kind kind, const float* x, int64_t d, void* words, float* scale);

}  // namespace layercomb
