// Calls every kernel on threads of its own, for sanitizers: arrays are as large as they must be and
// no larger, and what many threads have written is what one writes.
//
// Compiled by `test_sanitizers.py` with the kernels, but without the handlers of XLA.

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <random>
#include <vector>

#include "kernels.h"
#include "program.h"
#include "queries.h"

namespace {

using namespace layercomb;

// Threads that take tasks from a queue.
class Threads {
 public:
  explicit Threads(int n) {
    for (int i = 0; i < n; ++i) threads_.emplace_back([this] { Work(); });
  }
  ~Threads() {
    Give(nullptr);
    for (auto& thread : threads_) thread.join();
  }
  Pool pool() {
    return {[this](std::function<void()> task) { Give(std::move(task)); },
            static_cast<int64_t>(threads_.size())};
  }

 private:
  void Give(std::function<void()> task) {
    const std::lock_guard<std::mutex> lock(mutex_);
    tasks_.push_back(std::move(task));
    some_.notify_all();
  }
  void Work() {
    for (;;) {
      std::function<void()> task;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        some_.wait(lock, [this] { return !tasks_.empty(); });
        if (!tasks_.front()) return;  // the end, which stays for the others
        task = std::move(tasks_.front());
        tasks_.pop_front();
      }
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable some_;
  std::deque<std::function<void()>> tasks_;
  std::vector<std::thread> threads_;
};

std::minstd_rand drawn(1);

int Below(int64_t n) { return static_cast<int>(drawn() % n); }

std::vector<float> Floats(int64_t n) {
  std::vector<float> x(n);
  for (auto& value : x) value = std::normal_distribution<float>()(drawn);
  return x;
}

// Numbers from `low` to `high` − 1.
std::vector<int32_t> Numbers(int64_t n, int32_t low, int32_t high) {
  std::vector<int32_t> x(n);
  for (auto& value : x) value = low + Below(high - low);
  return x;
}

// n_rows times n bits, of which the first of a row is set.
std::unique_ptr<bool[]> Bits(int64_t n_rows, int64_t n) {
  std::unique_ptr<bool[]> x(new bool[n_rows * n]);
  for (int64_t i = 0; i < n_rows * n; ++i) x[i] = i % n == 0 || Below(3);
  return x;
}

// n_rows times n numbers of documents, not decreasing.
std::vector<int32_t> Documents(int64_t n_rows, int64_t n) {
  std::vector<int32_t> x(n_rows * n);
  for (int64_t i = 0; i < n_rows * n; ++i) x[i] = i % n == 0 ? 0 : x[i - 1] + !Below(n / 3 + 1);
  return x;
}

// Random vectors of a cache, and the arrays that they are in.
struct Cached {
  std::vector<char> words;
  std::vector<float> scales;
  Vectors vectors;

  Cached(Kind kind, int64_t n, int64_t d) {
    const int64_t size = kind == Kind::kFloat32 ? 4 : kind == Kind::kBfloat16 ? 2 : 1;
    words.resize(n * d * size);
    scales.resize(kind == Kind::kInt8 ? n : 0);
    for (int64_t i = 0; i < n; ++i) {
      Store(kind, Floats(d).data(), d, &words[i * d * size], scales.empty() ? nullptr : &scales[i]);
    }
    vectors = {kind, words.data(), scales.empty() ? nullptr : scales.data(), d};
  }
};

// What a kernel writes into arrays of these sizes: `call(pool, y)` on no other thread, and on some,
// which must be the same.
template <typename T = float, typename Call>
std::vector<std::vector<T>> Same(const char* name, Threads& threads,
                                 std::initializer_list<int64_t> sizes, const Call& call) {
  std::vector<std::vector<T>> alone, together;
  std::vector<T*> its, theirs;
  for (const int64_t n : sizes) alone.emplace_back(n), together.emplace_back(n);
  for (auto& y : alone) its.push_back(y.data());
  for (auto& y : together) theirs.push_back(y.data());
  call(Pool{[](std::function<void()> task) { task(); }, 1}, its.data());
  for (int i = 0; i < 3; ++i) call(threads.pool(), theirs.data());
  for (size_t i = 0; i < alone.size(); ++i) {
    if (std::memcmp(its[i], theirs[i], alone[i].size() * sizeof(T))) {
      std::printf("%s: several threads write something else\n", name);
      std::exit(1);
    }
  }
  return alone;
}

// A random matrix, and the arrays that it is in.
struct Matrix {
  std::vector<char> words;
  std::vector<float> scales;
  Weights weights;

  Matrix(Kind kind, int64_t n_rows, int64_t n_columns, int64_t n_groups) {
    const bool integer = kind == Kind::kInt8 || kind == Kind::kInt4;
    const int64_t n = kind == Kind::kInt4 ? n_columns / 2 : n_columns;
    const int64_t size = kind == Kind::kFloat32 ? 4 : kind == Kind::kBfloat16 ? 2 : 1;
    words.resize(n_rows * n * size);
    const std::vector<float> values = Floats(n_rows * n);
    for (int64_t i = 0; i < n_rows * n; ++i) {  // bfloat16 is the upper half of a float
      const char* value = reinterpret_cast<const char*>(&values[i]) + (size == 2 ? 2 : 0);
      std::memcpy(&words[i * size], value, size);
    }
    scales = Floats(integer ? n_rows * n_groups : 0);
    weights = {kind, words.data(), scales.data(), n_rows, n, integer ? n_groups : 0,
               static_cast<int64_t>(words.size())};
  }
};

void Products(Threads& threads) {
  constexpr int64_t kSizes[][4] = {  // rows of x, columns, rows of the matrix, groups
      {1, 128, 640, 2}, {3, 280, 51, 4}, {16, 96, 203, 2}, {5, 44, 3, 2},    {2, 40, 2000, 2},
      {1, 5000, 40, 2}, {70, 256, 5, 4}, {33, 768, 99, 24}, {8, 520, 777, 2}, {1, 2, 1, 2},
      {23, 1150, 150, 2}};
  for (const auto [n_x, d, n_rows, n_groups] : kSizes) {
    for (const Kind kind : {Kind::kFloat32, Kind::kBfloat16, Kind::kInt8, Kind::kInt4}) {
      const Matrix m(kind, n_rows, d, n_groups);
      const auto x = Floats(n_x * d), modules = Floats(3 * d);
      const int64_t n_k = n_rows + 2;
      const auto h = Floats(n_x * n_k);
      const auto at = Numbers(n_x * n_k, -3, n_rows + 3);  // what lies outside takes the nearest
      Same("RowProducts", threads, {n_x * n_rows}, [&, n_x = n_x](const Pool& pool, float** y) {
        RowProducts(pool, m.weights, x.data(), n_x, 2, *y);
      });
      Same("RowProducts", threads, {n_x * n_rows}, [&, n_x = n_x](const Pool& pool, float** y) {
        RowProducts(pool, m.weights, x.data(), n_x, 1, *y);
      });
      Same("GatheredProducts", threads, {n_x * n_k}, [&, n_x = n_x](const Pool& pool, float** y) {
        GatheredProducts(pool, m.weights, x.data(), at.data(), n_x, n_k, *y);
      });
      Same("GatheredSums", threads, {n_x * d}, [&, n_x = n_x](const Pool& pool, float** y) {
        GatheredSums(pool, m.weights, h.data(), at.data(), n_x, n_k, *y);
      });
      Same("FactoredProducts", threads, {3 * n_x * n_rows},
           [&, n_x = n_x](const Pool& pool, float** y) {
             FactoredProducts(pool, m.weights, x.data(), modules.data(), n_x, 3, *y);
           });
    }
  }
}

void Panels(Threads& threads) {
  constexpr int64_t kSizes[][4] = {  // rows of x, words of a row, rows of the matrix, groups
      {1, 32, 640, 2}, {3, 70, 51, 5}, {9, 24, 203, 3}, {5, 11, 3, 1},
      {2, 10, 2000, 2}, {1, 340, 40, 2}, {70, 64, 37, 4}, {33, 192, 99, 24}};
  for (const auto [n_x, n_words, n_rows, n_groups] : kSizes) {
    for (const int bits : {8, 4}) {
      const int64_t d = n_words * 32 / bits;
      const auto words = Numbers(n_rows * n_words, -1000000000, 1000000000);
      const auto x = Floats(n_x * d), scales = Floats(2 * n_rows * n_groups);
      const std::vector<uint16_t> halves(2 * n_rows * n_groups, 0x2c00);
      for (const bool half : {false, true}) {
        for (const bool minima : {false, true}) {
          const void* its = half ? static_cast<const void*>(halves.data()) : scales.data();
          const PanelWeights w{bits, words.data(), its, n_rows, n_words, n_groups, minima, half};
          for (const int n_bytes : {1, 2}) {
            Same("PanelProducts", threads, {n_x * n_rows},
                 [&, n_x = n_x](const Pool& pool, float** y) {
                   PanelProducts(pool, w, x.data(), n_x, n_bytes, *y);
                 });
          }
        }
      }
    }
  }
}

void Modules(Threads& threads) {
  for (const int64_t n_f : {1, 35, 192, 1000}) {
    const int64_t n_x = 2, n_p = 3, n_s = 16, n_j = 3, step = 5;
    const auto x = Floats(n_x * n_p * (n_s + n_j - 1) * step);
    const auto kernel = Floats(n_p * n_j * step * n_f);
    Same("ModuleConvolution", threads, {n_x * n_s * n_f}, [&](const Pool& pool, float** y) {
      ModuleConvolution(pool, x.data(), kernel.data(), n_x, n_p, (n_s + n_j - 1) * step, n_s, step,
                        n_j * step, n_f, *y);
    });
    const int64_t d = 21, rank = 5, n_block = 7;
    const auto first = Floats(d * rank), second = Floats(rank * n_f * n_block), its = Floats(2 * d);
    Same<int32_t>("ChosenUnits", threads, {2 * n_f}, [&](const Pool& pool, int32_t** y) {
      ChosenUnits(pool, its.data(), first.data(), second.data(), 2, d, rank, n_f * n_block, n_block,
                  *y);
    });
    const auto scale = Floats(n_f), bias = Floats(n_f), rows = Floats(3 * n_f);
    for (const float* b : {bias.data(), static_cast<const float*>(nullptr)}) {
      Same("Normalize", threads, {3 * n_f}, [&](const Pool&, float** y) {
        Normalize(rows.data(), scale.data(), b, 0.1f, 3, n_f, *y);
      });
    }
  }
}

void Decoding(Threads& threads) {
  constexpr int64_t kSizes[][4] = {  // heads of keys, how many share one, keys, depth
      {12, 1, 900, 64}, {2, 3, 17, 5}, {1, 4, 1, 1}, {3, 7, 400, 24}};
  for (const auto [n_keyed, group, n_keys, d] : kSizes) {
    const int64_t n_rows = 3, n = n_rows * n_keyed * group, d_value = d + 3;
    const auto query = Floats(n * d), keys = Floats(n_rows * n_keyed * n_keys * d);
    const auto values = Floats(n_rows * n_keyed * n_keys * d_value), p = Floats(n * 9);
    const auto seen = Bits(n_rows, n_keys), real = Bits(n_rows, 2);
    const auto at = Numbers(n * 9, -1, n_keys + 1);
    const Heads heads{n_rows, n_keyed * group, group, n_keys};
    for (const Kind kind : {Kind::kFloat32, Kind::kBfloat16, Kind::kInt8}) {
      const Cached k(kind, n_rows * n_keyed * n_keys, d), v(kind, n_rows * n_keyed * n_keys, d_value);
      for (const float softcap : {0.0f, 2.5f}) {
        Same("QueryAttention", threads, {n * d_value}, [&](const Pool& pool, float** y) {
          QueryAttention(pool, heads, query.data(), k.vectors, v.vectors, seen.get(), softcap, *y);
        });
      }
    }
    const Some some{n, group, 9, n_keys, d};
    Same("GatheredCosines", threads, {n * 9}, [&](const Pool& pool, float** y) {
      GatheredCosines(pool, some, query.data(), at.data(), keys.data(), 0.1f, *y);
    });
    Same("GatheredMeans", threads, {n * d}, [&](const Pool& pool, float** y) {
      GatheredMeans(pool, some, p.data(), at.data(), keys.data(), *y);
    });
    std::vector<int32_t> positions(n_rows * n_keys);
    for (size_t i = 0; i < positions.size(); ++i) positions[i] = i % n_keys;
    const auto n_real = Numbers(n_rows, 0, n_keys + 1), found = Numbers(n * 9, -1, n_keys);
    for (const bool once : {false, true}) {
      const Placed placed{n_rows,        n,          n_rows * n_keyed, 9,            n_keys,
                          d,             d_value,    query.data(),     keys.data(),  values.data(),
                          found.data(),  positions.data(), n_real.data(), real.get(), 0.3f,
                          once ? 2.5f : 0, 6,        2,                once};
      Same("PlacedAttention", threads, {n * d_value},
           [&](const Pool& pool, float** y) { PlacedAttention(pool, placed, *y); });
    }
    const std::vector<int32_t> factors{4, 1, 6};
    const auto rotations = Floats(n_keyed * 3 * 5 * d);
    const Rotations a{n_keyed, 3, 5, d, 3, rotations.data(), factors.data()};
    Same<int32_t>("NearestRotations", threads, {n_rows * n_keyed * 3},
                  [&](const Pool& pool, int32_t** y) {
                    NearestRotations(pool, a, query.data(), n_rows, *y);
                  });
  }
}

void Flash(Threads& threads) {
  constexpr int64_t kSizes[][4] = {  // how many heads share keys, queries, keys, depth
      {2, 70, 70, 16}, {1, 200, 333, 32}, {3, 1, 9, 64}, {2, 5, 1, 16}};
  for (const auto [group, n_queries, n_keys, d] : kSizes) {
    const int64_t n_keyed = 2, n = 2 * n_keyed * group * n_queries, n_k = 2 * n_keyed * n_keys;
    const int64_t d_value = d + 16;
    const auto query = Floats(n * d), keys = Floats(n_k * d), values = Floats(n_k * d_value);
    const auto d_y = Floats(n * d_value);
    const auto mask = Bits(2, n_keys);
    const auto offset = Numbers(2, 0, 40), segments = Documents(2, n_keys);
    const bool same = n_queries == n_keys;
    for (int i = 0; i < 8; ++i) {
      const Attention a{2, n_keyed * group, n_keyed, n_queries, n_keys, d, d_value, query.data(),
                        keys.data(), values.data(), i & 1 ? mask.get() : nullptr,
                        same ? nullptr : offset.data(), same && i & 2 ? segments.data() : nullptr,
                        0.2f, i & 4 ? 3.0f : 0, i != 0, i & 2 ? 7 : 0};
      const auto y = Same("FlashForward", threads, {n * d_value, n},
                          [&](const Pool& pool, float** y) { FlashForward(pool, a, y[0], y[1]); });
      Same("FlashBackward", threads, {n * d, n_k * d, n_k * d_value},
           [&](const Pool& pool, float** g) {
             FlashBackward(pool, a, y[0].data(), y[1].data(), d_y.data(), g[0], g[1], g[2]);
           });
    }
  }
}

void Selected(Threads& threads) {
  constexpr int64_t kSizes[][3] = {  // depth, length, how many heads share keys
      {16, 70, 1}, {64, 150, 3}, {32, 1, 2}, {128, 40, 1}};
  for (const auto [d, length, group] : kSizes) {
    const int64_t n_keyed = 2, n = 2 * n_keyed * group * length, n_k = 2 * n_keyed * length;
    const int32_t n_buckets = 5;
    const auto query = Floats(n * d), keys = Floats(n_k * d), values = Floats(n_k * d);
    const auto d_y = Floats(n * d);
    const auto of_queries = Numbers(2 * n, 0, n_buckets), of_keys = Numbers(2 * n_k, 0, n_buckets);
    const auto mask = Bits(2, length);
    const auto segments = Documents(2, length);
    for (int i = 0; i < 8; ++i) {
      const Selection a{2, n_keyed * group, n_keyed, length, 2, d, query.data(), keys.data(),
                        values.data(), of_queries.data(), of_keys.data(),
                        i & 1 ? mask.get() : nullptr, i & 2 ? segments.data() : nullptr, 0.2f,
                        i & 4 ? 3.0f : 0, n_buckets, i == 5 ? 2 * length : 8, i & 4 ? 0 : 5, i & 2,
                        !(i & 1), !(i & 2)};
      const auto y = Same("SelectedForward", threads, {n * d, n}, [&](const Pool& pool, float** y) {
        SelectedForward(pool, a, y[0], y[1]);
      });
      Same("SelectedBackward", threads, {n * d, n_k * d, n_k * d},
           [&](const Pool& pool, float** g) {
             const Cotangents ct{d_y.data(), y[1].data(), nullptr, g[0], g[1], g[2]};
             SelectedBackward(pool, a, y[0].data(), ct);
           });
    }
  }
}

void Blocks(Threads& threads) {
  constexpr int64_t kSizes[][4] = {  // queries, blocks, depth, how many to choose
      {300, 90, 64, 5}, {40, 7, 21, 9}, {1, 1, 1, 1}, {500, 300, 16, 3}};
  for (const auto [n_queries, n_blocks, d, n_chosen] : kSizes) {
    const int64_t n_keyed = 2, group = 3, n = 2 * n_keyed * group * n_queries;
    const auto query = Floats(n * d), means = Floats(2 * n_keyed * n_blocks * d);
    auto document = Documents(2, n_blocks);
    document.back() = n_blocks > 1 ? -1 : 0;  // no block
    const auto ids = Documents(2, n_queries), own = Numbers(2 * n_queries, 0, n_blocks + 1);
    for (const bool causal : {false, true}) {
      const Choice a{2, n_keyed * group, n_keyed, n_queries, n_blocks, d, n_chosen, query.data(),
                     means.data(), document.data(), ids.data(), own.data(), causal, -7};
      Same<int32_t>("BestBlocks", threads, {n * n_chosen},
                    [&](const Pool& pool, int32_t** y) { BestBlocks(pool, a, *y); });
    }
  }
}

// Norm, product, bias and sum; and keys and values written to a cache, to which queries attend.
void Programs(Threads& threads) {
  constexpr int64_t d = 48, room = 9, batch = 2, length = 3, n_x = batch * length;
  constexpr int32_t kValue = static_cast<int32_t>(d);
  std::vector<float> scale = Floats(d), bias = Floats(d), kernel = Floats(d * d);
  const auto x = Floats(n_x * d), factors = std::vector<float>{1e-6f, 0.25f, 0};
  for (const Type type : {Type::kFloat32, Type::kBfloat16, Type::kInt8}) {
    const int32_t scales = type == Type::kInt8 ? 1 : 0;  // behind keys and behind values
    const int32_t k = 0, v = 1 + scales, p = 2 + 2 * scales;
    const int32_t code[] = {
        19 * kValue, 5, -1, 0, kValue, 2 * kValue, -2, 4,
        1, 2, 0, 0, kValue, 1, kValue, 0, 1, 1, 0,                  // x → 1, normalized
        4, 0, 0, 1, kValue, 2, kValue, 3, 16 * kValue, 2, 2, 2, 0,  // 1 is prepared
        0, 1, 4, 1, 0,                                              // 1 → 3, parts
        1, 3, 4, 2, 0, 2, kValue, 1, 1,                             // 3 → 2
        6, 2, kValue, k, k + scales, 3, room,                       // 2 → keys
        6, 2, kValue, v, v + scales, 3, room,                       // 2 → values
        0, 1, 7, 2, kValue, 4, kValue, k, k + scales, v, v + scales, 3, 6, 1, room, 4, 1, 2,  // 2 → y
    };
    const int64_t n = batch * 6 * room, size = type == Type::kFloat32 ? 4 : scales ? 1 : 2;
    Same("RunProgram", threads, {n_x * d, n * 2 * size, n * 2 * size, n, n},
         [&](const Pool& pool, float** y) {
           std::vector<int32_t> taken{2, 5};
           const Operand positions{taken.data(), Type::kInt32, 1, batch};
           std::vector<Operand> results;
           for (const int i : {1, 2}) {
             results.push_back({y[i], type, n, 8});
             if (scales) results.push_back({y[i + 2], Type::kFloat32, n, 1});
           }
           results.push_back(positions);
           RunProgram(pool, {n_x,
                             length,
                             code,
                             factors.data(),
                             {{scale.data(), Type::kFloat32, 1, d},
                              {bias.data(), Type::kFloat32, 1, d},
                              {kernel.data(), Type::kFloat32, d, d},
                              positions},
                             results,
                             {x.data()},
                             {y[0]}});
           if (taken[0] != 2 + length || results[p].data != taken.data()) std::exit(1);
         });
  }
}

// Factors, a convolution over modules, its outputs joined as a second output, and chosen units.
void SparsePrograms(Threads& threads) {
  constexpr int64_t n_s = 4, step = 5, d = n_s * step, room = 9, batch = 2, length = 3;
  constexpr int64_t n_x = batch * length, n_units = 24, n_past = batch * (room + 2) * d;
  constexpr int32_t kValue = static_cast<int32_t>(d);
  std::vector<float> modules = Floats(n_s * d), features = Floats(step * d), bias = Floats(d),
                     kernel = Floats(9 * step * 2 * step), two = Floats(2 * step),
                     down = Floats(d * 3), up = Floats(3 * n_units), units = Floats(n_units);
  std::vector<int8_t> rows;
  for (const int32_t i : Numbers(n_units * d, -127, 128)) rows.push_back(static_cast<int8_t>(i));
  const auto x = Floats(n_x * d), past = Floats(n_past);
  const int32_t code[] = {
      256, 10, -1, 0, 80, 112, 144, -3, 176, 192, 240, -2, 9,
      1, 1, 9, 0, 0, kValue, 2, kValue, 1, 4 * kValue, 0, 1, 1, 2, 0,  // x → 1, scaled
      0, 1, 4, 1, 0,                                                   // 1 → 2
      1, 2, 4, 2, 0, 2, kValue, 2, 1,                                  // 2 with its bias,
      10, 0, 0, 2, kValue, 0, 3, 4, 5, 3, 3, n_s, room, 2, 3, kValue, 4, kValue,  // kept
      0, 1, 10, 1, 0,                                                  // → 3, 4
      1, 3, 8, 5, 30, 2, 3, kValue, 4, kValue,                         // 3, 4 → 5, cut
      4, 0, 1, 3, kValue, 6, 3, 7, 48, 6, 6, 2, 0, 11, 0, 0, 3, kValue, 7, 8, 3,
      0, 1, 4, 1, 1, 1, 1, 4, 2, 1, 6, 3, 6, 0,                        // 3 → 6, parts 7
      0, 1, 11, 1, 0, 6, 3, 8, 3, 9, 8, 1, 7, 8,                       // → 8
      0, 1, 11, 2, 0, 8, 3, 9, kValue, 7, 8, 2, 1,                     // → y
  };
  Same("RunProgram of sparse layers", threads, {n_x * d, n_x * 30, n_past},
       [&](const Pool& pool, float** y) {
         std::vector<int32_t> taken{2, 7};  // the second row does not fit
         const Operand positions{taken.data(), Type::kInt32, 1, batch};
         const auto of = [](std::vector<float>& w, int64_t n) {
           return Operand{w.data(), Type::kFloat32, static_cast<int64_t>(w.size()) / n, n};
         };
         std::copy(past.begin(), past.end(), y[2]);
         RunProgram(pool, {n_x,
                           length,
                           code,
                           nullptr,
                           {of(modules, d), of(features, d), of(bias, d), positions,
                            of(kernel, 2 * step), of(two, step), of(down, 3),
                            Operand{rows.data(), Type::kInt8, n_units, d}, of(units, 1),
                            of(up, n_units)},
                           {{y[2], Type::kFloat32, batch * (room + 2), d}, positions},
                           {x.data()},
                           {y[0], y[1]}});
         for (int64_t i = 0; i < n_x; ++i) {  // NaN equals nothing
           if ((y[0][i * d] != y[0][i * d]) != (i >= length)) std::exit(1);
         }
         std::fill_n(y[0] + length * d, length * d, 0.0f);
         std::fill_n(y[1] + length * 30, length * 30, 0.0f);
       });
}

// A mixture of ten experts of four units: one is shared, and three of nine are chosen.
void Mixtures(Threads& threads) {
  constexpr int64_t d = 20, n_routed = 9, n_units = 40, length = 3, n_x = 2 * length;
  constexpr int32_t kValue = static_cast<int32_t>(d), kOn = 16;
  std::vector<float> router = Floats(d * n_routed), bias = Floats(n_routed),
                     in = Floats(n_units * d), out = Floats(n_units * d), added = Floats(n_units),
                     last = Floats(d);
  std::vector<int8_t> up;
  for (const int32_t i : Numbers(n_units * d, -127, 128)) up.push_back(static_cast<int8_t>(i));
  const auto x = Floats(n_x * d);
  const float factors[] = {1.5f};
  const int32_t code[] = {
      224, 8, -1, 0, 16, 160, 176, 192, 208, -2, 6,
      1, 1, 4, 0, 0, 0, kValue, 1, 9, 2, 144, 0, 0, 2, 0,  // x is prepared
      0, 1, 4, 1, 0,                                       // x → 1, parts 2
      1, 2, 4, 2, 0, 1, 9, 0, 0,                           // logits
      12, 0, 0, 0, kValue, 1, 9, 3, kOn, 1, 1, 3, 1, 1, 1, 0, 2, 2, 3, 5, 1,  // 1 → 3, the gates
      0, 1, 12, 1, 0, 4, kOn, 5, kOn, 5, 1, 4, 4,                          // → 4, 5
      1, 3, 1, 4, kOn, 6, kOn, 3, 3, 6, kOn, 5, kOn, 4, kOn, 3, 4, kOn, 3, kOn, 6, kOn,  // → 6
      0, 1, 12, 2, 0, 6, kOn, 7, kValue, 4, 4, 6, 1,                       // → y
  };
  Same("RunProgram of mixtures", threads, {n_x * d}, [&](const Pool& pool, float** y) {
    const auto of = [](std::vector<float>& w, int64_t n) {
      return Operand{w.data(), Type::kFloat32, static_cast<int64_t>(w.size()) / n, n};
    };
    RunProgram(pool, {n_x,
                      length,
                      code,
                      factors,
                      {of(router, n_routed), of(bias, n_routed), of(in, d),
                       Operand{up.data(), Type::kInt8, n_units, d}, of(out, d), of(added, 1),
                       of(last, d)},
                      {},
                      {x.data()},
                      {y[0]}});
    for (int64_t i = 0; i < n_x * d; ++i) {
      if (y[0][i] != y[0][i] || y[0][i] == 0) std::exit(1);
    }
  });
}

}  // namespace

int main() {
  Threads threads(4);
  Products(threads);
  Panels(threads);
  Modules(threads);
  Decoding(threads);
  Flash(threads);
  Selected(threads);
  Blocks(threads);
  Programs(threads);
  SparsePrograms(threads);
  Mixtures(threads);
  std::puts("all kernels ran");
}
