// Matrices of weights whose kind is known when this is compiled.

#pragma once

#include "kernels.h"
#include "vectors.h"

namespace layercomb {

// A matrix: n_rows rows of n words, and a float for every g weights along a row.
template <typename W>
struct Matrix {
  using Kind = W;
  static constexpr int parts = W::parts;
  const typename W::Word* words;
  const float* scales;  // null if there are none
  int64_t n_rows, n, g;

  const typename W::Word* Row(int64_t i) const { return words + i * n; }
  const float* Scales(int64_t i) const { return scales + i * (n * W::parts / g); }
  int64_t Clamped(int64_t i) const { return std::clamp<int64_t>(i, 0, n_rows - 1); }
};

// Calls `work` with the weights as what they are.
template <typename Work>
void WithMatrix(const Weights& w, const Work& work) {
  auto call = [&](auto kind) {
    using W = decltype(kind);
    const int64_t g = w.n_groups ? w.n * W::parts / w.n_groups : w.n;
    work(Matrix<W>{static_cast<const typename W::Word*>(w.words), w.n_groups ? w.scales : nullptr,
                   w.n_rows, w.n, g});
  };
  switch (w.kind) {
    case Kind::kFloat32: return call(Float32());
    case Kind::kBfloat16: return call(Bfloat16());
    case Kind::kInt8: return call(Int8());
    case Kind::kInt4: return call(Int4());
  }
}

}  // namespace layercomb
