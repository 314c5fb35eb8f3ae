// The kernels, and what they need of XLA: threads.
//
// Letters: M rows of activations, D their width, F outputs, K gathered rows, G groups of weights,
// S modules.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>

namespace layercomb {

// Threads that work can be given to.
struct Pool {
  std::function<void(std::function<void()>)> schedule;
  int64_t n_threads;
};

enum class Kind { kFloat32, kBfloat16, kInt8, kInt4 };

// A matrix of n_rows rows of n words. A word of int4 holds two weights: column j in its low half and
// column j + n in its high one.
struct Weights {
  Kind kind;
  const void* words;
  const float* scales;  // (n_rows, n_groups)
  int64_t n_rows, n, n_groups;  // of groups there may be none
  int64_t n_bytes;
};

// y[m, f] = Σ_d x[m, d] w[f, d]. Many rows of x may be rounded to n_bytes bytes, 2 or 1, to be
// multiplied by bfloat16; no others are rounded to 1.
void RowProducts(const Pool& pool, const Weights& w, const float* x, int64_t n_x, int n_bytes,
                 float* y);

// Integers in panels of 16 rows: n_words words of 32 bits a row, a word of each of the 16 rows after
// the other; the scales of a group of each likewise. Rows that make no panel stand behind them, one
// after the other. A word holds four columns of int8 or eight of int4, of which the first four are
// in the low halves of bytes; 128 or 8 is added to each. With minima the integers count from 0, so a
// weight is its scale times what is stored, plus its minimum; minima stand behind the scales.
struct PanelWeights {
  int bits;  // 8 or 4
  const void* words;
  const void* scales;  // (n_rows, n_groups), or twice as many; float32, or float16 if `half`
  int64_t n_rows, n_words, n_groups;
  bool minima, half;

  // Scales of a row, and minima if there are any.
  int64_t n_scales() const { return minima ? 2 * n_groups : n_groups; }
};

// y[m, f] = Σ_d x[m, d] w[f, d], with x rounded to n_bytes bytes, 2 or 1.
void PanelProducts(const Pool& pool, const PanelWeights& w, const float* x, int64_t n_x,
                   int n_bytes, float* y);

// y[m, k] = Σ_d x[m, d] w[at[m, k], d].
void GatheredProducts(const Pool& pool, const Weights& w, const float* x, const int32_t* at,
                      int64_t n_x, int64_t n_k, float* y);

// y[m, d] = Σ_k h[m, k] w[at[m, k], d].
void GatheredSums(const Pool& pool, const Weights& w, const float* h, const int32_t* at,
                  int64_t n_x, int64_t n_k, float* y);

// y[m, s, f] = Σ_d x[m, d] modules[s, d] w[f, d].
void FactoredProducts(const Pool& pool, const Weights& w, const float* x, const float* modules,
                      int64_t n_x, int64_t n_s, float* y);

// y[m, s, f] = Σ_p Σ_j x[m, p, step · s + j] kernel[p, j, f], for windows of n_j.
void ModuleConvolution(const Pool& pool, const float* x, const float* kernel, int64_t n_x,
                       int64_t n_p, int64_t width, int64_t n_s, int64_t step, int64_t n_j,
                       int64_t n_f, float* y);

// y[m, b] = the number of the largest of the n_block logits that begin at b · n_block, counted from
// 0 over all n; the logits are x[m] first second, with first (d, rank) and second (rank, n).
void ChosenUnits(const Pool& pool, const float* x, const float* first, const float* second,
                 int64_t n_x, int64_t d, int64_t rank, int64_t n, int64_t n_block, int32_t* y);

// y[m, d] = (x[m, d] − mean) / √(mean of the squares of that + epsilon) · scale[d] + bias[d], and
// without `bias` no mean is subtracted, nor anything added.
void Normalize(const float* x, const float* scale, const float* bias, float epsilon, int64_t n_x,
               int64_t d, float* y);

// Vectors of d words one after the other, as a cache keeps them: float32, bfloat16, or int8 with a
// scale for each vector.
struct Vectors {
  Kind kind;
  const void* words;
  const float* scales;  // null but for int8
  int64_t d;

  // Those from number n on.
  Vectors From(int64_t n) const {
    const int64_t size = kind == Kind::kFloat32 ? 4 : kind == Kind::kBfloat16 ? 2 : 1;
    return {kind, static_cast<const char*>(words) + n * d * size, scales ? scales + n : nullptr, d};
  }
};

// The sizes of attention of one query for each of n_x rows and n_heads heads, of which `group`
// neighbours share a head of keys and values.
struct Heads {
  int64_t n_x, n_heads, group, n_keys;
};

// y[m, h] = Σ_c p[c] values[m, g, c], with g = h / group and p the softmax of
// query[m, h] · keys[m, g, c] over the c with seen[m, c]; zeros if there are none. A softcap that is
// not 0 makes a score s softcap · tanh(s / softcap). Keys and values are of one kind.
void QueryAttention(const Pool& pool, const Heads& sizes, const float* query, const Vectors& keys,
                    const Vectors& values, const bool* seen, float softcap, float* y);

// The sizes of attention of one query for each of n_x rows to n_k of its d-vectors, of which there
// are n_keys, and which `group` neighbours share; what lies outside takes the nearest.
struct Some {
  int64_t n_x, group, n_k, n_keys, d;
};

// y[n, k] = x[n] · key / √(key · key + epsilon), with key = keys[n / group, at[n, k]].
void GatheredCosines(const Pool& pool, const Some& sizes, const float* x, const int32_t* at,
                     const float* keys, float epsilon, float* y);

// y[n] = Σ_k p[n, k] values[n / group, at[n, k]].
void GatheredMeans(const Pool& pool, const Some& sizes, const float* p, const int32_t* at,
                   const float* values, float* y);

// Rotations (n_heads, n_rounds, width, d), and the factors of the number of buckets: width is half of
// the sum of those that are not 1.
struct Rotations {
  int64_t n_heads, n_rounds, width, d, n_factors;
  const float* rotations;
  const int32_t* factors;
};

// y[m, h, r] = the bucket of x[m, h]: for each factor the rotation of the round with the largest
// product, or behind these its negative.
void NearestRotations(const Pool& pool, const Rotations& a, const float* x, int64_t n_x,
                      int32_t* y);

// Attention of n_queries queries, those of n_rows rows after each other, to the keys that each has
// found, and to the last and the first real ones of its row. Neighbours share one of n_keyed rooms of
// n_keys keys and values.
struct Placed {
  int64_t n_rows, n_queries, n_keyed, n_found, n_keys, d_key, d_value;
  const float *query, *keys, *values;
  const int32_t* found;        // (n_queries, n_found) positions; negative where there is none
  const int32_t *at, *n_real;  // (n_rows, n_keys), the position of each real key, and (n_rows)
  const bool* real;            // (n_rows): which rows have a query
  float scale, softcap;        // no cap if 0
  int64_t local_len, n_sinks;
  bool once;  // whether a key that is found several times counts once

  int64_t group() const { return n_keyed ? n_queries / n_keyed : 1; }
  // How many keys a query sees at most.
  int64_t most() const {
    return n_found + std::min(local_len, n_keys) + std::min(n_sinks, n_keys);
  }
};

// y[n] = Σ_c p[c] values[g, c], with p the softmax of scale · query[n] · keys[g, c] over what n sees;
// zeros where that is nothing.
void PlacedAttention(const Pool& pool, const Placed& a, float* y);

// Attention of n_queries queries for each of n_rows rows and n_heads heads, of which neighbours share
// one of n_keyed heads of keys and values. Depths are multiples of kLanes. Query t of a row is at
// position offset[row] + t, the keys are at 0, 1 …
struct Attention {
  int64_t n_rows, n_heads, n_keyed, n_queries, n_keys, d_key, d_value;
  const float *query, *keys, *values;
  const bool* mask;         // (n_rows, n_keys): which keys are real; or null
  const int32_t* offset;    // (n_rows); or null for zeros
  const int32_t* segments;  // (n_rows, n_keys), if n_queries = n_keys: only equal ones see each
                            // other; or null
  float scale, softcap;     // no cap if 0
  bool causal;              // no key behind the query is seen
  int64_t window;           // how many keys are seen, the query's own included; all if 0

  int64_t group() const { return n_keyed ? n_heads / n_keyed : 1; }
};

// What the backward pass reads beside the arguments: the cotangent of the output, the logsumexp, and
// the products of output and cotangent; and the gradients that it writes.
struct Cotangents {
  const float *out, *z, *dots;
  float *query, *keys, *values;
};

// y[h, t] = Σ_c p[h, t, c] values[g, c], with p the softmax of scale · query[h, t] · keys[g, c] over
// the seen c, and its logsumexp z; zeros, and 1e30, where none is seen.
void FlashForward(const Pool& pool, const Attention& a, float* y, float* z);

// The gradients of query, keys and values, from y, z and the cotangent of y.
void FlashBackward(const Pool& pool, const Attention& a, const float* y, const float* z,
                   const float* d_y, float* d_query, float* d_keys, float* d_values);

// Attention of the queries of n_rows rows and n_heads heads, of which neighbours share one of n_keyed
// heads of keys and values, to the keys that they find: in each round to n_keys of the query's
// bucket, and to those near by and the first ones. Padding and other documents do not count.
struct Selection {
  int64_t n_rows, n_heads, n_keyed, length, n_rounds, depth;  // 16, 32, 64 or 128
  const float *query, *keys, *values;
  const int32_t *of_queries, *of_keys;  // (n_rows, heads, n_rounds, length) buckets
  const bool* mask;                     // (n_rows, length): which positions are real; or null
  const int32_t* segments;  // (n_rows, length), not decreasing: the document of each; or null
  float scale, softcap;     // no cap if 0
  int64_t n_buckets, n_keys, local_len, n_sinks;
  bool causal;  // else half of the keys are before the query, and half behind it
  bool once;    // whether a key that is found several times counts once

  int64_t group() const { return n_keyed ? n_heads / n_keyed : 1; }
  // How many keys a query sees at most.
  int64_t most() const { return n_rounds * n_keys + local_len + n_sinks; }
};

// y[h, t] = Σ_c p[c] values[g, c], with p the softmax of scale · query[h, t] · keys[g, c] over what t
// finds, and its logsumexp z; zeros, and 1e30, where it finds nothing.
void SelectedForward(const Pool& pool, const Selection& a, float* y, float* z);

// The gradients of query, keys and values, from y, z and the cotangent of y; `dots` are not read.
void SelectedBackward(const Pool& pool, const Selection& a, const float* y, const Cotangents& ct);

// Queries of n_rows rows and n_heads heads, of which neighbours share one of n_keyed heads of means,
// and the blocks that have these means. Blocks of a document stand together, numbered 0, 1 …;
// documents, from 0, do not decrease, and −1 for what is no block stands behind them.
struct Choice {
  int64_t n_rows, n_heads, n_keyed, n_queries, n_blocks, depth, n_chosen;
  const float *query, *means;
  const int32_t* document;     // (n_rows, n_blocks)
  const int32_t *ids, *own;    // (n_rows, n_queries): the document of a query, and its block there
  bool causal;                 // only blocks before its own; else all others of the document
  int32_t nothing;             // the number of what is missing

  int64_t group() const { return n_keyed ? n_heads / n_keyed : 1; }
};

// y[h, j, t] = the number, in its document, of the block whose mean has the j-th greatest product with
// query[h, t]; of equal ones the first comes first. A product that is NaN or −∞ is not chosen.
void BestBlocks(const Pool& pool, const Choice& a, int32_t* y);

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls `work(i)` for each i below n, on threads of XLA's pool and on this one. Whoever is free
// takes the next, so this thread waits for nothing but work that has begun.
template <typename Work>
void InParallel(const Pool& pool, int64_t n_threads, int64_t n, const Work& work) {
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
  for (int64_t i = 1; i < std::min(n_threads, n); ++i) pool.schedule([run] { run(); });
  run();
  while (counters->done.load() < n) std::this_thread::yield();
}

// On how many threads work is done that takes as long as reading so many bytes.
inline int64_t WorthWaking(const Pool& pool, int64_t bytes) {
  constexpr int64_t kWorthwhile = 1 << 16;
  return std::clamp<int64_t>(bytes / kWorthwhile, 1, std::max<int64_t>(1, pool.n_threads));
}

// Cuts n rows or columns, whose work takes as long as reading so many bytes, into tasks of a whole
// number of units, some for each thread that is worth waking.
template <typename Work>
void InPieces(const Pool& pool, int64_t bytes, int64_t n, int64_t unit, const Work& work) {
  const int64_t n_threads = WorthWaking(pool, bytes);
  const int64_t share = n_threads == 1 ? n : CeilDiv(n, 4 * n_threads);
  const int64_t size = std::max<int64_t>(1, CeilDiv(share, unit)) * unit;
  InParallel(pool, n_threads, CeilDiv(n, size), [&](int64_t i) {
    work(i * size, std::min(size, n - i * size));
  });
}

// A product and a sum cost a core as much as reading this part of a byte.
constexpr int64_t kProductsToAByte = 4;

}  // namespace layercomb
