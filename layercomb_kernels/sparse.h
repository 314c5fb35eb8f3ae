// Sparse layers in steps that threads can share, as phases of a program.

#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "products.h"
#include "program.h"

namespace layercomb {

// Makes a product of n_x rows of x with a matrix.
using ByMatrix = std::function<std::unique_ptr<Product>(const float* x, int64_t n_x, float* y)>;

// y[m, s, f] = Σ_d x[m, d] modules[s, d] w[f, d], with modules (n_s, d) and w (n_f, d).
struct Factors {
  const float* modules;
  int64_t n_s, n_f, d;
};

// `scaled` has room for n_s times as many rows as x.
std::unique_ptr<Product> OfFactors(const Factors& a, const ByMatrix& by_w, const float* x,
                                   int64_t n_x, float* scaled, float* y);

// A causal convolution over n_p positions and n_j modules of n_s, each `step` wide, whose last inputs
// are kept: y_i[m, s, k] = bias[i, k] + Σ_p Σ_j Σ_l x[m − (n_p − 1) + p, s + j − (n_j − 1) / 2, l]
// kernel[p, j, l, i, k]. Modules beyond the first and the last are zeros.
struct Convolution {
  const Program& program;
  const float* x;         // (n_x, n_s · step)
  float* past;            // (batch, n_p − 1 + room, n_s · step)
  const int32_t* taken;   // (batch)
  const float *kernel, *bias;
  int64_t n_p, n_j, n_s, step, room;
  std::vector<float*> y;  // each (n_x, n_s · step)

  int64_t n_f() const { return static_cast<int64_t>(y.size()) * step; }
  int64_t width() const { return n_s * step; }
  int64_t n_parts() const { return CeilDiv(n_f(), kPart); }
  int64_t bytes() const { return 4 * n_p * n_j * step * n_f(); }

  // Keeps row m of x, if all of its batch fit.
  void Keep(int64_t m) const;
  // Computes part i % n_parts() of row i / n_parts(), NaN where that does not fit.
  void Compute(int64_t i) const;

 private:
  static constexpr int64_t kPart = 48;  // columns of the kernel

  void Columns(const float* x, int64_t f, int64_t n, float* made) const;
  template <int R>
  void Modules(const float* x, const float* zeros, int64_t s, int64_t f, int64_t n,
               float* made) const;
};

// Units of a feed-forward, of which each of n_x rows has `width`: at(m)[b] is the number of one.
class ChosenOnes {
 public:
  // y[m, d] = bias[d] + Σ_b h[m, b] out[at(m)[b], d] for n words of each row of `out` from j on.
  void Sum(const Weights& out, const float* bias, const float* h, int64_t m, int64_t j, int64_t n,
           float* y) const;

  int64_t width() const { return width_; }

 protected:
  ChosenOnes(int64_t n_x, int64_t width) : width_(width), at_(n_x * width) {}
  int32_t* at(int64_t m) { return &at_[m * width_]; }

 private:
  const int64_t width_;
  std::vector<int32_t> at_;
};

// One of each n_block units is chosen: that of the largest logits inner[m] second, with second
// (rank, n_units).
class Units : public ChosenOnes {
 public:
  // `in` has a row for each unit, of which n_blocks are chosen.
  Units(const Weights& in, const float* x, int64_t n_x, int64_t n_blocks);
  // Prepares row m of x.
  void Prepare(int64_t m) { in_->Prepare(m); }

  // What the n_units are chosen by, biases or null, and what is summed up later.
  struct Choice {
    const float *inner, *second, *bias;
    int64_t rank, n_units, n_block;
    Weights out;
  };
  // Chooses a unit in each of n blocks for row m, and computes it: h[m, b].
  void Choose(const Choice& choice, int64_t m, int64_t first, int64_t n, float* h);

 private:
  const std::unique_ptr<ChosenRows> in_;
};

// The units of some experts: of the first n_shared, and of the n_chosen of n_routed others that have
// the largest score and bias, the first of equal ones and NaN before all.
class Experts : public ChosenOnes {
 public:
  struct Choice {
    const float* bias;  // (n_routed), or null
    int64_t n_routed, n_chosen, n_shared, n_units;  // units of one expert
    bool softmax;     // whether scores are made of logits by it
    bool normalized;  // whether the scores of chosen ones are divided by their sum
    float scale;      // of the chosen ones
  };
  // `up` is null if there are no gates of units.
  Experts(const Choice& choice, const Weights& in, const Weights* up, const float* x, int64_t n_x);

  // Prepares row m of x, and chooses by its scores; gates[b] is what a unit is multiplied by.
  void Choose(int64_t m, const float* scores, float* gates);

  // What is computed of units, bias and up or null, and what is summed up later.
  struct Made {
    const float* bias;
    float *h, *up;
    Weights out;
  };
  // Computes n units of row m from `first` on.
  void Compute(const Made& made, int64_t m, int64_t first, int64_t n);

 private:
  const Choice choice_;
  const std::unique_ptr<ChosenRows> in_, up_;
};

}  // namespace layercomb
