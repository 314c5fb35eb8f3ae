// The layers of a decoding step in one call: instructions in phases, which threads share.

#include "program.h"

#include <cmath>
#include <limits>

#include "phases.h"
#include "products.h"
#include "queries.h"
#include "sparse.h"
#include "vectors.h"

namespace layercomb {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// 1 / (1 + e^−x).
inline Floats Sigmoid(Floats x) {
  const Floats e = Exp(x < 0 ? x : -x), inverse = 1 / (1 + e);
  return x < 0 ? e * inverse : inverse;
}

inline Floats Activated(Activation kind, Floats x) {
  const Floats positive = x < 0 ? Floats{} : x;  // NaN stays
  switch (kind) {
    case Activation::kRelu: return positive;
    case Activation::kRelu2: return positive * positive;
    case Activation::kGelu: return x * Sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
    case Activation::kSilu: return x * Sigmoid(x);
    case Activation::kTanh: return Capped(x, 1);
    case Activation::kSigmoid: return Sigmoid(x);
  }
  return x;
}

// to[i] = f(from[i] …) of n floats.
template <typename F, typename... From>
void Map(int64_t n, const F& f, float* to, const From*... from) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Floats made = f(Load<Floats>(from + i)...);
    std::memcpy(to + i, &made, sizeof made);
  }
  if (i == n) return;
  const Floats made = f(Load<Floats>(Padded<float>(from + i, n - i).values)...);
  std::memcpy(to + i, &made, (n - i) * sizeof(float));
}

// Rotates pairs of features of heads by angles, whose sines and cosines alternate.
void Turn(const float* x, int64_t width, int64_t depth, bool in_pairs,
          const std::vector<float>& turns, float* y) {
  const int64_t half = turns.size() / 2, step = in_pairs ? 2 : 1, other = in_pairs ? 1 : half;
  for (const float* end = x + width; x < end; x += depth, y += depth) {
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[i * step], b = x[i * step + other];
      y[i * step] = a * turns[2 * i + 1] - b * turns[2 * i];
      y[i * step + other] = b * turns[2 * i + 1] + a * turns[2 * i];
    }
    std::copy(x + 2 * half, x + depth, y + 2 * half);
  }
}

// Reads a program, and makes its phases.
class Reader {
 public:
  Reader(const Program& program, int64_t n_threads)
      : program_(program), n_threads_(n_threads), code_(program.code) {
    const int64_t workspace = Next(), n_values = Next();
    workspace_.reset(new float[workspace * program.n_x]);
    for (int64_t i = 0; i < n_values; ++i) begins_.push_back(Next());
  }

  std::vector<Phase> Phases() {
    std::vector<Phase> phases;
    const int64_t n_phases = Next();
    for (int64_t p = 0; p < n_phases; ++p) {
      const bool by_row = Next() != 0;
      const int64_t n = Next();
      std::vector<Phase> parts;
      for (int64_t i = 0; i < n; ++i) parts.push_back(Instruction());
      if (by_row) {
        phases.push_back({program_.n_x, [parts](int64_t m) {
                            for (const Phase& part : parts) part.work(m);
                          }});
        continue;
      }
      int64_t total = 0;
      for (const Phase& part : parts) total += part.n;
      phases.push_back({total, [parts](int64_t i) {
                          size_t part = 0;
                          while (i >= parts[part].n) i -= parts[part++].n;
                          parts[part].work(i);
                        }});
    }
    return phases;
  }

  int64_t bytes() const { return bytes_; }

 private:
  // A value: its row m.
  struct Rows {
    float* data;
    int64_t width;
    float* operator()(int64_t m) const { return data + m * width; }
  };

  int64_t Next() { return *code_++; }
  float Factor() { return program_.factors[Next()]; }
  const Operand& Weight() { return program_.operands[Next()]; }
  const Operand& Cache() { return program_.results[Next()]; }
  Rows Value() {
    const int64_t begin = begins_[Next()], width = Next();
    const int64_t n_inputs = static_cast<int64_t>(program_.inputs.size());
    if (begin < -n_inputs) return {program_.outputs[-1 - begin - n_inputs], width};
    if (begin < 0) return {const_cast<float*>(program_.inputs[-1 - begin]), width};  // not written
    return {workspace_.get() + begin * program_.n_x, width};
  }
  int64_t At(const int32_t* taken, int64_t m) const { return program_.At(taken, m); }
  bool Fits(const int32_t* taken, int64_t m, int64_t room) const {
    return program_.Fits(taken, m, room);
  }

  Phase Instruction() {
    switch (static_cast<Op>(Next())) {
      case Op::kNormalize: return Normalized();
      case Op::kActivate: return ActivatedRows();
      case Op::kAdd: return Combined([](Floats a, Floats b) { return a + b; });
      case Op::kMultiply: return Combined([](Floats a, Floats b) { return a * b; });
      case Op::kProduct: return Multiplied();
      case Op::kTurn: return Turned();
      case Op::kAppend: return Appended();
      case Op::kAttend: return Attended();
      case Op::kJoin: return Joined();
      case Op::kFactors: return Factored();
      case Op::kConvolve: return Convolved();
      case Op::kChoose: return Chosen();
      case Op::kRoute: return Routed();
    }
    return {0, {}};
  }

  Phase Normalized() {
    const Rows x = Value(), y = Value();
    const Operand &scale = Weight(), &bias = Weight();
    const bool centered = Next() != 0;
    const float epsilon = Factor();
    const int64_t depth = scale.columns;  // several heads may be normalized with the same scale
    return {0, [=](int64_t m) {
              Normalize(x(m), scale.floats(), centered ? bias.floats() : nullptr, epsilon,
                        x.width / depth, depth, y(m));
            }};
  }

  Phase ActivatedRows() {
    const Rows x = Value(), y = Value();
    const auto kind = static_cast<Activation>(Next());
    return {0, [=](int64_t m) {
              Map(x.width, [kind](Floats v) { return Activated(kind, v); }, y(m), x(m));
            }};
  }

  template <typename F>
  Phase Combined(const F& f) {
    const Rows a = Value(), b = Value(), y = Value();
    return {0, [=](int64_t m) { Map(a.width, f, y(m), a(m), b(m)); }};
  }

  // A product, in three instructions: its rows are prepared, its parts are computed, and its rows are
  // finished, with a bias.
  Phase Multiplied() {
    const int64_t step = Next();
    const size_t number = Next();
    if (step == 0) {
      const Rows x = Value(), y = Value(), parts = Value();
      const Operand &words = Weight(), &scales = Weight();
      const int64_t n_bytes = Next();
      const bool minima = Next() != 0;
      if (words.type != Type::kFloat32) {
        return Prepared(number, Multiplier(words, scales, x.width, n_bytes, minima)(
                                    x.data, program_.n_x, y.data));
      }
      return Prepared(number, OfColumns(words.floats(), words.rows, words.columns, x.data,
                                        program_.n_x, parts.data, y.data));
    }
    Product* product = products_[number].get();
    if (step == 1) {
      const int64_t share = CeilDiv(product->n_parts, 4 * n_threads_);
      const int64_t size = CeilDiv(share, product->unit) * product->unit;
      return {CeilDiv(product->n_parts, size), [=](int64_t i) {
                product->Compute(i * size, std::min(size, product->n_parts - i * size));
              }};
    }
    const Rows y = Value();
    const Operand& bias = Weight();
    const bool biased = Next() != 0;
    return {0, [=](int64_t m) {
              product->Finish(m);
              const auto add = [](Floats a, Floats b) { return a + b; };
              if (biased) Map(bias.columns * bias.rows, add, y(m), y(m), bias.floats());
            }};
  }

  // Keeps a product, whose rows a phase prepares.
  Phase Prepared(size_t number, std::unique_ptr<Product> made) {
    products_.resize(std::max(products_.size(), number + 1));
    Product* product = made.get();
    products_[number] = std::move(made);
    bytes_ += product->bytes;
    return {0, [product](int64_t m) { product->Prepare(m); }};
  }

  // Products with a matrix of rows of d weights.
  static ByMatrix Multiplier(const Operand& words, const Operand& scales, int64_t d,
                                      int64_t n_bytes, bool minima) {
    if (words.type != Type::kUint32) {
      const Weights w = RowsOf(words, scales);
      return [w](const float* x, int64_t n_x, float* y) { return OfRows(w, x, n_x, y); };
    }
    const PanelWeights w{static_cast<int>(32 * words.columns / d),
                         words.data,
                         scales.data,
                         words.rows,
                         words.columns,
                         minima ? scales.columns / 2 : scales.columns,
                         minima,
                         scales.type == Type::kFloat16};
    return [=](const float* x, int64_t n_x, float* y) {
      return OfPanels(w, x, n_x, static_cast<int>(n_bytes), y);
    };
  }

  static Weights RowsOf(const Operand& words, const Operand& scales) {
    const Kind kind = words.type == Type::kFloat32    ? Kind::kFloat32
                      : words.type == Type::kBfloat16 ? Kind::kBfloat16
                      : words.type == Type::kInt8     ? Kind::kInt8
                                                      : Kind::kInt4;
    const int64_t size = kind == Kind::kFloat32 ? 4 : kind == Kind::kBfloat16 ? 2 : 1;
    return {kind, words.data, scales.floats(), words.rows, words.columns,
            size > 1 ? 0 : scales.columns, words.rows * words.columns * size};
  }

  // Values side by side, as many features of them as there is room for.
  Phase Joined() {
    const Rows y = Value();
    std::vector<Rows> parts;
    for (int64_t n = Next(); n > 0; --n) parts.push_back(Value());
    return {0, [=](int64_t m) {
              int64_t begin = 0;
              for (const Rows& part : parts) {
                const int64_t n = std::min(part.width, y.width - begin);
                std::copy_n(part(m), n, y(m) + begin);
                begin += n;
              }
            }};
  }

  // A product with factors is prepared; then it is a product as any other.
  Phase Factored() {
    const size_t number = Next();
    const Rows x = Value(), y = Value(), scaled = Value();
    const Operand &modules = Weight(), &words = Weight(), &scales = Weight();
    const int64_t n_bytes = Next();
    const bool minima = Next() != 0;
    const Factors factors{modules.floats(), modules.rows, words.rows, x.width};
    return Prepared(number, OfFactors(factors, Multiplier(words, scales, x.width, n_bytes, minima),
                                      x.data, program_.n_x, scaled.data, y.data));
  }

  // A convolution over modules, in two instructions: its inputs are kept, and it is computed.
  Phase Convolved() {
    const int64_t step = Next();
    const size_t number = Next();
    if (step == 0) {
      const Rows x = Value();
      const Operand &past = Cache(), &taken = Weight(), &kernel = Weight(), &bias = Weight();
      const int64_t n_p = Next(), n_j = Next(), n_s = Next(), room = Next();
      auto made = std::make_unique<Convolution>(Convolution{
          program_, x.data, static_cast<float*>(past.data), taken.indices(), kernel.floats(),
          bias.floats(), n_p, n_j, n_s, x.width / n_s, room, {}});
      for (int64_t n = Next(); n > 0; --n) made->y.push_back(Value().data);
      bytes_ += made->bytes();
      const Convolution* its = made.get();
      convolutions_.resize(std::max(convolutions_.size(), number + 1));
      convolutions_[number] = std::move(made);
      return {0, [its](int64_t m) { its->Keep(m); }};
    }
    const Convolution* its = convolutions_[number].get();
    return {program_.n_x * its->n_parts(), [its](int64_t i) { its->Compute(i); }};
  }

  // A feed-forward of units that are chosen, in three instructions: its rows are prepared, units are
  // chosen and computed, and what they make is added up.
  Phase Chosen() {
    const int64_t step = Next();
    const size_t number = Next();
    if (step == 0) {
      const Rows x = Value();
      const Operand &words = Weight(), &scales = Weight();
      const int64_t n_blocks = Next();
      const Weights in = RowsOf(words, scales);
      units_.resize(std::max(units_.size(), number + 1));
      units_[number] = std::make_unique<Units>(in, x.data, program_.n_x, n_blocks);
      Units* its = units_[number].get();
      bytes_ += in.n_bytes / in.n_rows * n_blocks;
      return {0, [its](int64_t m) { its->Prepare(m); }};
    }
    return step == 1 ? Computed(units_[number].get()) : Summed(units_[number].get());
  }

  Phase Computed(Units* units) {
    const Rows inner = Value(), h = Value();
    const Operand &second = Weight(), &bias = Weight();
    const bool biased = Next() != 0;
    const Operand &words = Weight(), &scales = Weight();
    const Units::Choice choice{inner.data, second.floats(), biased ? bias.floats() : nullptr,
                               inner.width, second.columns, second.columns / h.width,
                               RowsOf(words, scales)};
    bytes_ += 4 * second.rows * second.columns;
    const int64_t size = CeilDiv(h.width, 4 * n_threads_), n = CeilDiv(h.width, size);
    return {program_.n_x * n, [=](int64_t i) {
              const int64_t first = i % n * size;
              units->Choose(choice, i / n, first, std::min(size, h.width - first), h.data);
            }};
  }

  Phase Summed(const ChosenOnes* units) {
    const Rows h = Value(), y = Value();
    const Operand &words = Weight(), &scales = Weight(), &bias = Weight();
    const float* added = Next() != 0 ? bias.floats() : nullptr;
    const Weights out = RowsOf(words, scales);
    const int64_t unit = WordsTogether(out), share = CeilDiv(out.n, 4 * n_threads_);
    const int64_t size = CeilDiv(share, unit) * unit, n = CeilDiv(out.n, size);
    return {program_.n_x * n, [=](int64_t i) {
              const int64_t j = i % n * size;
              units->Sum(out, added, h.data, i / n, j, std::min(size, out.n - j), y.data);
            }};
  }

  // A mixture of experts, in three instructions: its rows are prepared and experts chosen, their units
  // are computed, and what they make is added up.
  Phase Routed() {
    const int64_t step = Next();
    const size_t number = Next();
    if (step == 1) return Mixed(experts_[number].get());
    if (step == 2) return Summed(experts_[number].get());
    const Rows x = Value(), scores = Value(), gates = Value();
    const Operand& bias = Weight();
    const bool biased = Next() != 0;
    const int64_t n_chosen = Next(), n_shared = Next();
    const bool softmax = Next() != 0, normalized = Next() != 0;
    const float scale = Factor();
    const Operand &words = Weight(), &scales = Weight();
    const Operand &up_words = Weight(), &up_scales = Weight();
    const bool gated = Next() != 0;
    const Experts::Choice choice{biased ? bias.floats() : nullptr, scores.width, n_chosen, n_shared,
                                 gates.width / (n_chosen + n_shared), softmax, normalized,
                                 scale};
    const Weights in = RowsOf(words, scales), up = RowsOf(up_words, up_scales);
    experts_.resize(std::max(experts_.size(), number + 1));
    experts_[number] = std::make_unique<Experts>(choice, in, gated ? &up : nullptr, x.data,
                                                 program_.n_x);
    Experts* its = experts_[number].get();
    bytes_ += in.n_bytes / in.n_rows * gates.width * (gated ? 2 : 1);
    return {0, [=](int64_t m) { its->Choose(m, scores(m), gates(m)); }};
  }

  Phase Mixed(Experts* experts) {
    const Rows h = Value(), up = Value();
    const Operand& bias = Weight();
    const bool biased = Next() != 0;
    const Operand &words = Weight(), &scales = Weight();
    const Experts::Made made{biased ? bias.floats() : nullptr, h.data, up.data,
                             RowsOf(words, scales)};
    const int64_t size = CeilDiv(h.width, 4 * n_threads_), n = CeilDiv(h.width, size);
    return {program_.n_x * n, [=](int64_t i) {
              const int64_t first = i % n * size;
              experts->Compute(made, i / n, first, std::min(size, h.width - first));
            }};
  }

  // Rotary positions: pairs of the first features of each head, of queries and of keys, are rotated.
  Phase Turned() {
    const Rows q = Value(), to_q = Value(), k = Value(), to_k = Value();
    const Operand &taken = Weight(), &speeds = Weight();
    const int64_t depth = Next(), max_len = Next();
    const bool in_pairs = Next() != 0;
    const float magnitude = Factor();
    const int64_t half = speeds.columns;
    return {0, [=](int64_t m) {
              const int64_t t = At(taken.indices(), m);
              std::vector<float> turns(2 * half);
              for (int64_t i = 0; i < half; ++i) {
                const float angle =
                    max_len && t >= max_len ? kNaN : static_cast<float>(t) * speeds.floats()[i];
                turns[2 * i] = std::sin(angle) * magnitude;
                turns[2 * i + 1] = std::cos(angle) * magnitude;
              }
              Turn(q(m), q.width, depth, in_pairs, turns, to_q(m));
              Turn(k(m), k.width, depth, in_pairs, turns, to_k(m));
            }};
  }

  // Vectors of a cache, with the scales that int8 has.
  Vectors CachedVectors() {
    const Operand &words = Cache(), &scales = Cache();
    const Kind kind = words.type == Type::kBfloat16 ? Kind::kBfloat16
                      : words.type == Type::kInt8   ? Kind::kInt8
                                                    : Kind::kFloat32;
    return {kind, words.data, kind == Kind::kInt8 ? scales.floats() : nullptr, words.columns};
  }

  // Writes the heads of a row into a cache (batch · heads · room, depth).
  Phase Appended() {
    const Rows x = Value();
    const Vectors cache = CachedVectors();
    const Operand& taken = Weight();
    const int64_t room = Next(), depth = cache.d, n_heads = x.width / depth;
    return {0, [=, length = program_.length](int64_t m) {
              if (!Fits(taken.indices(), m, room)) return;
              const int64_t t = At(taken.indices(), m);
              for (int64_t h = 0; h < n_heads; ++h) {
                const Vectors to = cache.From((m / length * n_heads + h) * room + t);
                Store(to.kind, x(m) + h * depth, depth, const_cast<void*>(to.words),
                      const_cast<float*>(to.scales));  // results, which are written in place
              }
            }};
  }

  Phase Attended() {
    const Rows q = Value(), y = Value();
    const Vectors keys = CachedVectors(), values = CachedVectors();
    const Operand& taken = Weight();
    const int64_t n_heads = Next(), group = Next(), room = Next(), window = Next();
    const float scale = Factor(), softcap = Factor();
    const int64_t d_key = keys.d, d_value = values.d;
    const int64_t unit = Together(n_threads_, program_.n_x * n_heads, group);
    const int64_t parts = CeilDiv(group, unit);  // of a group of heads
    const int64_t n_keyed = n_heads / group;
    const auto attend = [=, length = program_.length](int64_t i) {
      const int64_t m = i / (n_keyed * parts), g = i / parts % n_keyed;
      const int64_t h = g * group + i % parts * unit, n = std::min(unit, (g + 1) * group - h);
      const int64_t t = At(taken.indices(), m);
      float* to = y(m) + h * d_value;
      if (!Fits(taken.indices(), m, room)) {
        std::fill_n(to, n * d_value, kNaN);
        return;
      }
      const int64_t first = window ? std::max<int64_t>(0, t + 1 - window) : 0;
      const int64_t at = (m / length * n_keyed + g) * room + first, n_keys = t + 1 - first;
      const Keys its{keys.From(at), values.From(at), nullptr};
      std::vector<float> scaled(kTogether * d_key), p(kTogether * RoomFor(n_keys));
      for (int64_t j = 0; j < n; j += kTogether) {
        const int64_t r = std::min(kTogether, n - j);
        const float* query = q(m) + (h + j) * d_key;
        for (int64_t k = 0; k < r * d_key; ++k) scaled[k] = query[k] * scale;
        AttendTogether(its, scaled.data(), r, n_keys, softcap, p.data(), to + j * d_value);
      }
    };
    return {program_.n_x * n_keyed * parts, attend};
  }

  const Program& program_;
  const int64_t n_threads_;
  const int32_t* code_;
  std::unique_ptr<float[]> workspace_;
  std::vector<int64_t> begins_;
  std::vector<std::unique_ptr<Product>> products_;
  std::vector<std::unique_ptr<Convolution>> convolutions_;
  std::vector<std::unique_ptr<Units>> units_;
  std::vector<std::unique_ptr<Experts>> experts_;
  int64_t bytes_ = 0;
};

}  // namespace

void RunProgram(const Pool& pool, const Program& program) {
  constexpr int64_t kWorthwhile = 1 << 16;  // bytes for which a thread is worth waking
  Reader reader(program, std::max<int64_t>(1, pool.n_threads));
  const std::vector<Phase> phases = reader.Phases();
  const int64_t n_threads = std::clamp<int64_t>(reader.bytes() / kWorthwhile, 1,
                                                std::max<int64_t>(1, pool.n_threads));
  InPhases(pool, n_threads, phases);
  for (const Operand& result : program.results) {
    if (result.type != Type::kInt32) continue;  // positions move on
    for (int64_t i = 0; i < result.rows * result.columns; ++i) {
      result.indices()[i] += static_cast<int32_t>(program.length);
    }
  }
}

}  // namespace layercomb
