// Sparse layers in steps that threads can share.

#include "sparse.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "vectors.h"

namespace layercomb {
namespace {

#if defined(LAYERCOMB_WIDE)
constexpr int kModules = 8, kWide = 3;  // modules, and vectors of each, whose sums stay in registers
#else
constexpr int kModules = 4, kWide = 2;
#endif
constexpr int64_t kAhead = 16;  // rows of a kernel between what is read and what is fetched

// to[r] += Σ_k x[r][k] w[k] for R rows of x, and n rows of V vectors of w, `row` apart.
template <int R, int V>
void AddTile(const float* const (&x)[R], const float* w, int64_t row, int64_t n,
             Floats (&to)[R][V]) {
  Floats sums[R][V];  // copies, which stay in registers
  const float* its_x[R];
  LAYERCOMB_UNROLL
  for (int r = 0; r < R; ++r) {
    its_x[r] = x[r];
    LAYERCOMB_UNROLL
    for (int v = 0; v < V; ++v) sums[r][v] = to[r][v];
  }
  for (int64_t k = 0; k < n; ++k, w += row) {
    Floats its[V];
    LAYERCOMB_UNROLL
    for (int v = 0; v < V; ++v) {
      its[v] = Load<Floats>(w + v * kLanes);
      __builtin_prefetch(w + kAhead * row + v * kLanes, 0, 2);
    }
    LAYERCOMB_UNROLL
    for (int r = 0; r < R; ++r) {
      const float factor = its_x[r][k];
      LAYERCOMB_UNROLL
      for (int v = 0; v < V; ++v) sums[r][v] += factor * its[v];
    }
  }
  LAYERCOMB_UNROLL
  for (int r = 0; r < R; ++r) {
    LAYERCOMB_UNROLL
    for (int v = 0; v < V; ++v) to[r][v] = sums[r][v];
  }
}

// to[i] = a[i] · b[i] of n numbers.
void Multiply(const float* a, const float* b, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Floats made = Load<Floats>(a + i) * Load<Floats>(b + i);
    std::memcpy(to + i, &made, sizeof made);
  }
  for (; i < n; ++i) to[i] = a[i] * b[i];
}

// Makes probabilities of logits.
void Softmax(std::vector<float>& s) {
  const int64_t n = static_cast<int64_t>(s.size());
  const float most = *std::max_element(s.begin(), s.end());
  float sum = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t n_here = std::min<int64_t>(kLanes, n - i);
    const Floats made = Exp(Load<Floats>(Padded<float>(&s[i], n_here).values) - most);
    std::memcpy(&s[i], &made, n_here * sizeof(float));
    for (int64_t j = i; j < i + n_here; ++j) sum += s[j];
  }
  for (float& each : s) each /= sum;
}

// The n largest, the largest first; of equal ones the first, and NaN before all.
std::vector<int32_t> Largest(const std::vector<float>& s, int64_t n) {
  const auto above = [](float a, float b) { return a > b || (a != a && b == b); };
  std::vector<int32_t> found;
  for (size_t i = 0; i < s.size(); ++i) {
    if (static_cast<int64_t>(found.size()) < n) {
      found.push_back(0);
    } else if (!above(s[i], s[found.back()])) {
      continue;
    }
    size_t j = found.size() - 1;
    for (; j > 0 && above(s[i], s[found[j - 1]]); --j) found[j] = found[j - 1];
    found[j] = static_cast<int32_t>(i);
  }
  return found;
}

class FactoredProduct final : public Product {
 public:
  FactoredProduct(const Factors& a, std::vector<std::unique_ptr<Product>> pieces, bool apart,
                  const float* x, int64_t n_x, float* scaled)
      : Product(n_x, a.d, a.n_s * a.n_f, apart ? pieces.size() : a.n_f,
                apart ? 1 : pieces[0]->unit, pieces.size() * pieces[0]->bytes),
        a_(a), pieces_(std::move(pieces)), apart_(apart), x_(x), scaled_(scaled) {}

  void Prepare(int64_t m) override {
    for (int64_t s = 0; s < a_.n_s && !apart_; ++s) Scale(*pieces_[0], m * a_.n_s + s, 0);
  }

  void Compute(int64_t first, int64_t n) override {
    if (!apart_) return pieces_[0]->Compute(first, n);
    for (int64_t i = first; i < first + n; ++i) {
      Product& piece = *pieces_[i];
      const int64_t begin = i * pieces_[0]->n_x;
      for (int64_t k = 0; k < piece.n_x; ++k) Scale(piece, begin + k, begin);
      piece.Compute(0, piece.n_parts);
      for (int64_t k = 0; k < piece.n_x; ++k) piece.Finish(k);
    }
  }

  void Finish(int64_t m) override {
    for (int64_t s = 0; s < a_.n_s && !apart_; ++s) pieces_[0]->Finish(m * a_.n_s + s);
  }

 private:
  // Multiplies a row of x by a module, and prepares it in the piece that begins with row `begin`.
  void Scale(Product& piece, int64_t row, int64_t begin) {
    Multiply(x_ + row / a_.n_s * d, a_.modules + row % a_.n_s * d, d, scaled_ + row * d);
    piece.Prepare(row - begin);
  }

  const Factors a_;
  const std::vector<std::unique_ptr<Product>> pieces_;
  const bool apart_;  // whether each piece has some of the rows, and all of w; else there is one
  const float* const x_;
  float* const scaled_;
};

}  // namespace

std::unique_ptr<Product> OfFactors(const Factors& a, const ByMatrix& by_w, const float* x,
                                   int64_t n_x, float* scaled, float* y) {
  constexpr int64_t kFew = 256;  // features, which are too few for threads to share them
  const int64_t n = n_x * a.n_s;
  const bool apart = a.n_f <= kFew;
  const int64_t size = apart ? std::clamp<int64_t>(n / 4, 1, 4) : n;
  std::vector<std::unique_ptr<Product>> pieces;
  for (int64_t i = 0; i < n; i += size) {
    pieces.push_back(by_w(scaled + i * a.d, std::min(size, n - i), y + i * a.n_f));
  }
  return std::make_unique<FactoredProduct>(a, std::move(pieces), apart, x, n_x, scaled);
}

void Convolution::Keep(int64_t m) const {
  if (!program.Fits(taken, m, room)) return;
  const int64_t row = m / program.length * (n_p - 1 + room) + program.At(taken, m) + n_p - 1;
  std::copy_n(x + m * width(), width(), past + row * width());
}

void Convolution::Compute(int64_t i) const {
  const int64_t m = i / n_parts(), first = i % n_parts() * kPart;
  const int64_t n = std::min(kPart, n_f() - first);
  std::vector<float> made(n_s * n, std::numeric_limits<float>::quiet_NaN());
  if (program.Fits(taken, m, room)) {
    const int64_t at = m / program.length * (n_p - 1 + room) + program.At(taken, m);
    Columns(past + at * width(), first, n, made.data());
  }
  for (int64_t f = first, end; f < first + n; f = end) {
    end = std::min(first + n, (f / step + 1) * step);
    for (int64_t s = 0; s < n_s; ++s) {
      const float* from = &made[s * n + f - first];
      float* to = y[f / step] + m * width() + s * step + f % step;
      for (int64_t k = 0; k < end - f; ++k) to[k] = from[k] + bias[f + k];
    }
  }
}

// made[s] = the sums of n columns of the kernel from f on, for all modules.
void Convolution::Columns(const float* x, int64_t f, int64_t n, float* made) const {
  const std::vector<float> zeros(step);
  int64_t s = 0;
  for (; s + kModules <= n_s; s += kModules) Modules<kModules>(x, zeros.data(), s, f, n, made);
  for (; s < n_s; ++s) Modules<1>(x, zeros.data(), s, f, n, made);
}

template <int R>
void Convolution::Modules(const float* x, const float* zeros, int64_t s, int64_t f, int64_t n,
                          float* made) const {
  const auto add = [&](auto& sums, const auto& add_to) {
    for (int64_t i = 0; i < n_p * n_j; ++i) {
      const float* its[R];
      for (int r = 0; r < R; ++r) {
        const int64_t seen = s + r + i % n_j - (n_j - 1) / 2;
        its[r] = seen < 0 || seen >= n_s ? zeros : x + i / n_j * width() + seen * step;
      }
      add_to(its, kernel + i * step * n_f() + f, sums);
    }
  };
  const auto vectors = [&](auto n_vectors, int64_t at) {
    constexpr int V = n_vectors.value;
    Floats sums[R][V] = {};
    add(sums, [&](const auto& its, const float* w, auto& sums) {
      AddTile<R, V>(its, w + at, n_f(), step, sums);
    });
    for (int r = 0; r < R; ++r) std::memcpy(&made[(s + r) * n + at], sums[r], sizeof sums[r]);
  };
  int64_t j = 0;
  for (; j + kWide * kLanes <= n; j += kWide * kLanes) {
    vectors(std::integral_constant<int, kWide>(), j);
  }
  for (; j + kLanes <= n; j += kLanes) vectors(std::integral_constant<int, 1>(), j);
  for (; j < n; ++j) {
    float sums[R] = {};
    add(sums, [&](const auto& its, const float* w, auto& sums) {
      for (int64_t k = 0; k < step; ++k) {
        for (int r = 0; r < R; ++r) sums[r] += its[r][k] * w[k * n_f() + j];
      }
    });
    for (int r = 0; r < R; ++r) made[(s + r) * n + j] = sums[r];
  }
}

void ChosenOnes::Sum(const Weights& out, const float* bias, const float* h, int64_t m, int64_t j,
                     int64_t n, float* y) const {
  const int64_t parts = out.kind == Kind::kInt4 ? 2 : 1;
  y += m * out.n * parts;
  SumOfChosenRows(out, h + m * width_, &at_[m * width_], width_, j, n, y);
  for (int64_t p = 0; bias && p < parts; ++p) {
    for (int64_t i = p * out.n + j; i < p * out.n + j + n; ++i) y[i] += bias[i];
  }
}

Units::Units(const Weights& in, const float* x, int64_t n_x, int64_t n_blocks)
    : ChosenOnes(n_x, n_blocks), in_(OfChosenRows(in, x, n_x)) {}

void Units::Choose(const Choice& choice, int64_t m, int64_t first, int64_t n, float* h) {
  int32_t* its = at(m);
  LargestUnits(choice.inner + m * choice.rank, choice.second, choice.rank, choice.n_units,
               choice.n_block, first, n, its);
  for (int64_t b = first; b < first + n; ++b) {  // no other reads of memory tell it what comes
    in_->Fetch(its[b]);
    FetchRow(choice.out, its[b]);
  }
  h += m * width();
  in_->Multiply(m, its + first, n, h + first);
  for (int64_t b = first; choice.bias && b < first + n; ++b) h[b] += choice.bias[its[b]];
}

Experts::Experts(const Choice& choice, const Weights& in, const Weights* up, const float* x,
                 int64_t n_x)
    : ChosenOnes(n_x, (choice.n_shared + choice.n_chosen) * choice.n_units), choice_(choice),
      in_(OfChosenRows(in, x, n_x)), up_(up ? OfChosenRows(*up, x, n_x) : nullptr) {}

void Experts::Choose(int64_t m, const float* scores, float* gates) {
  in_->Prepare(m);
  if (up_) up_->Prepare(m);
  const Choice& c = choice_;
  std::vector<float> s(scores, scores + c.n_routed);
  if (c.softmax) Softmax(s);
  std::vector<float> with_bias = s;
  for (int64_t e = 0; c.bias && e < c.n_routed; ++e) with_bias[e] += c.bias[e];
  const std::vector<int32_t> chosen = Largest(with_bias, c.n_chosen);
  float sum = 0;
  for (const int32_t e : chosen) sum += s[e];
  const float factor = c.normalized ? c.scale / std::max(sum, 1e-18f) : c.scale;  // NaN stays
  int32_t* its = at(m);
  for (int64_t i = 0; i < c.n_shared + c.n_chosen; ++i) {
    const bool is_shared = i < c.n_shared;
    const int64_t e = is_shared ? i : c.n_shared + chosen[i - c.n_shared];
    const float gate = is_shared ? 1 : s[e - c.n_shared] * factor;
    std::iota(its + i * c.n_units, its + (i + 1) * c.n_units, int32_t(e * c.n_units));
    std::fill_n(gates + i * c.n_units, c.n_units, gate);
  }
}

void Experts::Compute(const Made& made, int64_t m, int64_t first, int64_t n) {
  const int32_t* its = at(m) + first;
  for (int64_t b = 0; b < n; ++b) {
    in_->Fetch(its[b]);
    if (up_) up_->Fetch(its[b]);
    FetchRow(made.out, its[b]);
  }
  float* h = made.h + m * width() + first;
  in_->Multiply(m, its, n, h);
  for (int64_t b = 0; made.bias && b < n; ++b) h[b] += made.bias[its[b]];
  if (up_) up_->Multiply(m, its, n, made.up + m * width() + first);
}

}  // namespace layercomb
