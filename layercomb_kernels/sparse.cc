// Sparse layers in steps that threads can share.

#include "sparse.h"

#include <limits>

#include "tiles.h"

namespace layercomb {
namespace {

#if defined(LAYERCOMB_WIDE) || defined(__aarch64__)
constexpr int kTall = 8;  // modules whose sums stay in registers, for two vectors of each
#else
constexpr int kTall = 4;
#endif
constexpr int64_t kSteps = 32;  // rows of a kernel that stay in the nearest cache

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
    const float* x = x_ + row / a_.n_s * d;
    const float* module = a_.modules + row % a_.n_s * d;
    float* to = scaled_ + row * d;
    for (int64_t i = 0; i < d; ++i) to[i] = x[i] * module[i];
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
  const int64_t m = i / n_parts(), cuts = n_parts() / n_p, n = n_f();
  if (!program.Fits(taken, m, room)) return;
  const int64_t p = i % n_parts() / cuts, begin = i % cuts * kPart;
  const int64_t end = std::min(begin + kPart, n_j * step);
  const int64_t at = m / program.length * (n_p - 1 + room) + program.At(taken, m) + p;
  float* to = sums + i * n_s * n;
  std::fill_n(to, n_s * n, 0.0f);
  for (int64_t r = begin, next; r < end; r = next) {
    next = std::min({end, r + kSteps, (r / step + 1) * step});
    const int64_t shift = r / step - (n_j - 1) / 2;  // from a module to the one that it sees
    const int64_t low = std::max<int64_t>(0, -shift), high = std::min(n_s, n_s - shift);
    if (low >= high) continue;
    const Left left{past + at * width() + (low + shift) * step + r % step, step, 1};
    const float* rows = kernel + (p * n_j * step + r) * n;
    int64_t f = 0;
    for (; f + 2 * kLanes <= n; f += 2 * kLanes) {
      for (int64_t k = 0; k < next - r; ++k) {  // what comes next
        const float* ahead = rows + (next - r + k) * n + f;
        __builtin_prefetch(ahead, 0, 2);
        __builtin_prefetch(ahead + kLanes, 0, 2);
      }
      Rows<kTall, 2>(left, {rows + f, n}, high - low, next - r, true, to + low * n + f, n);
    }
    for (; f + kLanes <= n; f += kLanes) {
      Rows<kTall, 1>(left, {rows + f, n}, high - low, next - r, true, to + low * n + f, n);
    }
    for (; f < n; ++f) {
      for (int64_t s = low; s < high; ++s) {
        const float* its = left.at + (s - low) * step;
        for (int64_t k = 0; k < next - r; ++k) to[s * n + f] += its[k] * rows[k * n + f];
      }
    }
  }
}

void Convolution::Finish(int64_t m) const {
  const int64_t n = n_f();
  const bool fits = program.Fits(taken, m, room);
  for (size_t i = 0; i < y.size(); ++i) {
    float* to = y[i] + m * width();
    if (!fits) {
      std::fill_n(to, width(), std::numeric_limits<float>::quiet_NaN());
      continue;
    }
    for (int64_t s = 0; s < n_s; ++s, to += step) {
      const float* its = sums + (m * n_parts() * n_s + s) * n + i * step;
      for (int64_t k = 0; k < step; ++k) to[k] = bias[i * step + k] + its[k];
      for (int64_t part = 1; part < n_parts(); ++part) {
        its += n_s * n;
        for (int64_t k = 0; k < step; ++k) to[k] += its[k];
      }
    }
  }
}

Units::Units(const Weights& in, const float* x, int64_t n_x, int64_t n_blocks)
    : n_blocks_(n_blocks), in_(OfChosenRows(in, x, n_x)), at_(n_x * n_blocks) {}

void Units::Choose(const Choice& choice, int64_t m, int64_t first, int64_t n, float* h) {
  int32_t* at = &at_[m * n_blocks_];
  LargestUnits(choice.inner + m * choice.rank, choice.second, choice.rank, choice.n_units,
               choice.n_block, first, n, at);
  h += m * n_blocks_;
  in_->Multiply(m, at + first, n, h + first);
  for (int64_t b = first; choice.bias && b < first + n; ++b) h[b] += choice.bias[at[b]];
}

void Units::Sum(const Weights& out, const float* bias, const float* h, int64_t m, int64_t j,
                int64_t n, float* y) const {
  const int64_t parts = out.kind == Kind::kInt4 ? 2 : 1;
  y += m * out.n * parts;
  SumOfChosenRows(out, h + m * n_blocks_, &at_[m * n_blocks_], n_blocks_, j, n, y);
  for (int64_t p = 0; bias && p < parts; ++p) {
    for (int64_t i = p * out.n + j; i < p * out.n + j + n; ++i) y[i] += bias[i];
  }
}

}  // namespace layercomb
