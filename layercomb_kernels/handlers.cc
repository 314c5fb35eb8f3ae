// The kernels as handlers of XLA's FFI. Shapes have been checked where they are called from.

#include <cstdlib>
#include <cstring>

#include "kernels.h"
#include "program.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// How many threads a kernel may use, by the environment; what cannot be read is no limit.
int64_t MostThreads() {
  static const int64_t most = [] {
    const char* given = std::getenv("LAYERCOMB_THREADS");
    const int64_t n = given ? std::atoll(given) : 0;
    return n > 0 ? n : INT64_MAX;
  }();
  return most;
}

// What a handler is given: float32 arrays, but for indices and words.
class Call {
 public:
  Call(ffi::ThreadPool threads, ffi::RemainingArgs args, ffi::RemainingRets results)
      : threads_(threads), args_(args), results_(results) {}

  layercomb::Pool pool() {
    return {[this](std::function<void()> task) { threads_.Schedule(std::move(task)); },
            std::min(threads_.num_threads(), MostThreads())};
  }
  ffi::AnyBuffer array(int i) const { return *args_.get<ffi::AnyBuffer>(i); }
  int64_t size(int i, int axis) const { return array(i).dimensions()[axis]; }
  const float* floats(int i) const { return static_cast<const float*>(array(i).untyped_data()); }
  const int32_t* indices(int i) const {
    return static_cast<const int32_t*>(array(i).untyped_data());
  }
  // Words and, behind them, their scales.
  layercomb::Weights weights(int i) const {
    using layercomb::Kind;
    const auto type = array(i).element_type();
    const Kind kind = type == ffi::F32    ? Kind::kFloat32
                      : type == ffi::BF16 ? Kind::kBfloat16
                      : type == ffi::S8   ? Kind::kInt8
                                          : Kind::kInt4;
    return {kind,
            array(i).untyped_data(),
            floats(i + 1),
            size(i, 0),
            size(i, 1),
            size(i + 1, 1),
            static_cast<int64_t>(array(i).size_bytes())};
  }
  // An argument that may be empty, which stands for none.
  template <typename T>
  const T* maybe(int i) const {
    return array(i).element_count() ? static_cast<const T*>(array(i).untyped_data()) : nullptr;
  }
  int64_t result_size(int axis) const { return result(0).dimensions()[axis]; }
  template <typename T = float>
  T* y(int i = 0) const { return static_cast<T*>(result(i).untyped_data()); }
  ffi::AnyBuffer result(int i) const { return **results_.get<ffi::AnyBuffer>(i); }

 private:
  ffi::ThreadPool threads_;
  ffi::RemainingArgs args_;
  ffi::RemainingRets results_;
};

// x (M, D), words (F, C), scales (F, G), and how many bytes of x count.
ffi::Error RowProducts(ffi::ThreadPool threads, ffi::RemainingArgs args,
                       ffi::RemainingRets results) {
  Call call(threads, args, results);
  layercomb::RowProducts(call.pool(), call.weights(1), call.floats(0), call.size(0, 0),
                         call.indices(3)[0], call.y());
  return ffi::Error::Success();
}

// x (M, D), words (F, C), scales (F, G), how many bytes of x count, and whether half of the scales
// are minima.
ffi::Error PanelProducts(ffi::ThreadPool threads, ffi::RemainingArgs args,
                         ffi::RemainingRets results) {
  Call call(threads, args, results);
  const bool minima = call.indices(3)[1] != 0;
  const layercomb::PanelWeights w{static_cast<int>(32 * call.size(1, 1) / call.size(0, 1)),
                                  call.array(1).untyped_data(),
                                  call.array(2).untyped_data(),
                                  call.size(1, 0),
                                  call.size(1, 1),
                                  minima ? call.size(2, 1) / 2 : call.size(2, 1),
                                  minima,
                                  call.array(2).element_type() == ffi::F16};
  layercomb::PanelProducts(call.pool(), w, call.floats(0), call.size(0, 0), call.indices(3)[0],
                           call.y());
  return ffi::Error::Success();
}

// A table (F, D) of any type, and which rows to copy (M,).
ffi::Error TableRows(ffi::ThreadPool threads, ffi::RemainingArgs args,
                     ffi::RemainingRets results) {
  Call call(threads, args, results);
  const int64_t n_rows = call.size(0, 0);
  const int64_t bytes = static_cast<int64_t>(call.array(0).size_bytes()) / n_rows;
  const auto* table = static_cast<const char*>(call.array(0).untyped_data());
  for (int64_t m = 0; m < call.size(1, 0); ++m) {
    const int64_t row = std::clamp<int64_t>(call.indices(1)[m], 0, n_rows - 1);
    std::memcpy(call.y<char>() + m * bytes, table + row * bytes, bytes);
  }
  return ffi::Error::Success();
}

ffi::Error GatheredProducts(ffi::ThreadPool threads, ffi::RemainingArgs args,
                            ffi::RemainingRets results) {
  Call call(threads, args, results);
  layercomb::GatheredProducts(call.pool(), call.weights(2), call.floats(0), call.indices(1),
                              call.size(1, 0), call.size(1, 1), call.y());
  return ffi::Error::Success();
}

ffi::Error GatheredSums(ffi::ThreadPool threads, ffi::RemainingArgs args,
                        ffi::RemainingRets results) {
  Call call(threads, args, results);
  layercomb::GatheredSums(call.pool(), call.weights(2), call.floats(0), call.indices(1),
                          call.size(1, 0), call.size(1, 1), call.y());
  return ffi::Error::Success();
}

ffi::Error FactoredProducts(ffi::ThreadPool threads, ffi::RemainingArgs args,
                            ffi::RemainingRets results) {
  Call call(threads, args, results);
  layercomb::FactoredProducts(call.pool(), call.weights(2), call.floats(0), call.floats(1),
                              call.size(0, 0), call.size(1, 0), call.y());
  return ffi::Error::Success();
}

// x (M, P, S + J − 1, N) and a kernel (P, J, N, F) make (M, S, F).
ffi::Error ModuleConvolution(ffi::ThreadPool threads, ffi::RemainingArgs args,
                             ffi::RemainingRets results) {
  Call call(threads, args, results);
  const int64_t step = call.size(0, 3);
  layercomb::ModuleConvolution(call.pool(), call.floats(0), call.floats(1), call.size(0, 0),
                               call.size(0, 1), call.size(0, 2) * step, call.result_size(1), step,
                               call.size(1, 1) * step, call.size(1, 3), call.y());
  return ffi::Error::Success();
}

ffi::Error ChosenUnits(ffi::ThreadPool threads, ffi::RemainingArgs args,
                       ffi::RemainingRets results) {
  Call call(threads, args, results);
  layercomb::ChosenUnits(call.pool(), call.floats(0), call.floats(1), call.floats(2),
                         call.size(0, 0), call.size(0, 1), call.size(2, 0), call.size(2, 1),
                         call.size(2, 1) / call.result_size(1), call.y<int32_t>());
  return ffi::Error::Success();
}

// x, scale, epsilon and, for a layer norm, bias.
ffi::Error Normalize(ffi::ThreadPool threads, ffi::RemainingArgs args,
                     ffi::RemainingRets results) {
  Call call(threads, args, results);
  layercomb::Normalize(call.floats(0), call.floats(1),
                       args.size() > 3 ? call.floats(3) : nullptr, *call.floats(2),
                       call.size(0, 0), call.size(0, 1), call.y());
  return ffi::Error::Success();
}

// A query (N, K), keys (N, C, K), values (N, C, V), N being M · H, what is seen (M, C), and a cap; and
// scales of keys and of values (N, C), if they are int8.
ffi::Error QueryAttention(ffi::ThreadPool threads, ffi::RemainingArgs args,
                          ffi::RemainingRets results) {
  using layercomb::Kind;
  Call call(threads, args, results);
  const int64_t n_x = call.size(3, 0), n_keyed = call.size(1, 0);
  const layercomb::Heads sizes{n_x,
                               n_x ? call.size(0, 0) / n_x : 0,
                               n_keyed ? call.size(0, 0) / n_keyed : 1,
                               call.size(1, 1)};
  const bool scaled = args.size() > 5;
  const auto vectors = [&](int i) {
    const auto of = call.array(i);
    const Kind kind = scaled ? Kind::kInt8 : of.element_type() == ffi::BF16 ? Kind::kBfloat16
                                                                            : Kind::kFloat32;
    return layercomb::Vectors{kind, of.untyped_data(), scaled ? call.floats(4 + i) : nullptr,
                              call.size(i, 2)};
  };
  layercomb::QueryAttention(call.pool(), sizes, call.floats(0), vectors(1), vectors(2),
                            static_cast<const bool*>(call.array(3).untyped_data()),
                            *call.floats(4), call.y());
  return ffi::Error::Success();
}

// At (N, K) and keys or values (M, L, D).
layercomb::Some SomeOf(const Call& call) {
  const int64_t n_x = call.size(1, 0), n_keyed = call.size(2, 0);
  return {n_x, n_keyed ? n_x / n_keyed : 1, call.size(1, 1), call.size(2, 1), call.size(2, 2)};
}

// x (N, D), at, keys and epsilon.
ffi::Error GatheredCosines(ffi::ThreadPool threads, ffi::RemainingArgs args,
                           ffi::RemainingRets results) {
  Call call(threads, args, results);
  layercomb::GatheredCosines(call.pool(), SomeOf(call), call.floats(0), call.indices(1),
                             call.floats(2), *call.floats(3), call.y());
  return ffi::Error::Success();
}

// p (N, K), at and values.
ffi::Error GatheredMeans(ffi::ThreadPool threads, ffi::RemainingArgs args,
                         ffi::RemainingRets results) {
  Call call(threads, args, results);
  layercomb::GatheredMeans(call.pool(), SomeOf(call), call.floats(0), call.indices(1),
                           call.floats(2), call.y());
  return ffi::Error::Success();
}

// x (M, H, K), rotations (H, R, F, K) and factors.
ffi::Error NearestRotations(ffi::ThreadPool threads, ffi::RemainingArgs args,
                            ffi::RemainingRets results) {
  Call call(threads, args, results);
  const layercomb::Rotations a{call.size(1, 0), call.size(1, 1), call.size(1, 2), call.size(1, 3),
                               call.size(2, 0), call.floats(1),  call.indices(2)};
  layercomb::NearestRotations(call.pool(), a, call.floats(0), call.size(0, 0), call.y<int32_t>());
  return ffi::Error::Success();
}

// A query (N, K), what it has found (N, J), keys (M, L, K), values (M, L, D), the positions of real
// keys (B, L), how many there are (B), and which rows are real (B); scale and softcap; and how many
// near keys are seen, and first ones, and whether keys count once.
ffi::Error PlacedAttention(ffi::ThreadPool threads, ffi::RemainingArgs args,
                           ffi::RemainingRets results) {
  Call call(threads, args, results);
  const float* factors = call.floats(7);
  const int32_t* limits = call.indices(8);
  const layercomb::Placed a{call.size(4, 0),
                            call.size(0, 0),
                            call.size(2, 0),
                            call.size(1, 1),
                            call.size(2, 1),
                            call.size(2, 2),
                            call.size(3, 2),
                            call.floats(0),
                            call.floats(2),
                            call.floats(3),
                            call.indices(1),
                            call.indices(4),
                            call.indices(5),
                            static_cast<const bool*>(call.array(6).untyped_data()),
                            factors[0],
                            factors[1],
                            limits[0],
                            limits[1],
                            limits[2] != 0};
  layercomb::PlacedAttention(call.pool(), a, call.y());
  return ffi::Error::Success();
}

// A query (B, H, Lq, K), keys (B, G, Lk, K), values (B, G, Lk, D), mask (B, Lk), offset (B,),
// segments (B, L), each of these three perhaps empty; scale and softcap; and whether it is causal,
// and its window.
layercomb::Attention AttentionOf(const Call& call) {
  const float* factors = call.floats(6);
  const int32_t* limits = call.indices(7);
  return {call.size(0, 0), call.size(0, 1), call.size(1, 1), call.size(0, 2), call.size(1, 2),
          call.size(1, 3), call.size(2, 3), call.floats(0), call.floats(1), call.floats(2),
          call.maybe<bool>(3), call.maybe<int32_t>(4), call.maybe<int32_t>(5), factors[0],
          factors[1], limits[0] != 0, limits[1]};
}

ffi::Error FlashForward(ffi::ThreadPool threads, ffi::RemainingArgs args,
                        ffi::RemainingRets results) {
  Call call(threads, args, results);
  layercomb::FlashForward(call.pool(), AttentionOf(call), call.y(), call.y(1));
  return ffi::Error::Success();
}

// The same, and output, logsumexp and the output's cotangent.
ffi::Error FlashBackward(ffi::ThreadPool threads, ffi::RemainingArgs args,
                         ffi::RemainingRets results) {
  Call call(threads, args, results);
  layercomb::FlashBackward(call.pool(), AttentionOf(call), call.floats(8), call.floats(9),
                           call.floats(10), call.y(), call.y(1), call.y(2));
  return ffi::Error::Success();
}

// A query (B, H, L, K), keys and values (B, G, L, K), buckets (B, H, R, L) and (B, G, R, L), mask
// (B, L) and segments (B, L), each of these two perhaps empty; scale and softcap; and the number of
// buckets, of keys, of near ones and of first ones, whether it is causal, and counts keys once.
layercomb::Selection SelectionOf(const Call& call) {
  const float* factors = call.floats(7);
  const int32_t* limits = call.indices(8);
  return {call.size(0, 0),           call.size(0, 1), call.size(1, 1), call.size(0, 2),
          call.size(3, 2),           call.size(0, 3), call.floats(0),  call.floats(1),
          call.floats(2),            call.indices(3), call.indices(4), call.maybe<bool>(5),
          call.maybe<int32_t>(6),    factors[0],      factors[1],      limits[0],
          limits[1],                 limits[2],       limits[3],       limits[4] != 0,
          limits[5] != 0};
}

ffi::Error SelectedForward(ffi::ThreadPool threads, ffi::RemainingArgs args,
                           ffi::RemainingRets results) {
  Call call(threads, args, results);
  layercomb::SelectedForward(call.pool(), SelectionOf(call), call.y(), call.y(1));
  return ffi::Error::Success();
}

// The same, and output, logsumexp and the output's cotangent.
ffi::Error SelectedBackward(ffi::ThreadPool threads, ffi::RemainingArgs args,
                            ffi::RemainingRets results) {
  Call call(threads, args, results);
  const layercomb::Cotangents ct{call.floats(11), call.floats(10), nullptr,
                                 call.y(),        call.y(1),       call.y(2)};
  layercomb::SelectedBackward(call.pool(), SelectionOf(call), call.floats(9), ct);
  return ffi::Error::Success();
}

// A query (B, H, P, K), means (B, G, N, K) and their document (B, N), the document and the block of
// each query (B, P); and whether it is causal, and the number of what is missing.
ffi::Error BestBlocks(ffi::ThreadPool threads, ffi::RemainingArgs args,
                      ffi::RemainingRets results) {
  Call call(threads, args, results);
  const int32_t* limits = call.indices(5);
  const layercomb::Choice choice{
      call.size(0, 0), call.size(0, 1),     call.size(1, 1), call.size(0, 2), call.size(1, 2),
      call.size(0, 3), call.result_size(2), call.floats(0),  call.floats(1),  call.indices(2),
      call.indices(3), call.indices(4),     limits[0] != 0,  limits[1]};
  layercomb::BestBlocks(call.pool(), choice, call.y<int32_t>());
  return ffi::Error::Success();
}

layercomb::Operand OperandOf(const ffi::AnyBuffer& buffer) {
  using layercomb::Type;
  const auto type = buffer.element_type();
  const Type kind = type == ffi::F32    ? Type::kFloat32
                    : type == ffi::F16  ? Type::kFloat16
                    : type == ffi::BF16 ? Type::kBfloat16
                    : type == ffi::S32  ? Type::kInt32
                    : type == ffi::U32  ? Type::kUint32
                    : type == ffi::S8   ? Type::kInt8
                                        : Type::kUint8;  // Python lets no other pass
  const auto dims = buffer.dimensions();
  const int64_t columns = dims.size() ? dims.back() : 1;
  const int64_t n = static_cast<int64_t>(buffer.element_count());
  return {buffer.untyped_data(), kind, columns ? n / columns : 0, columns};
}

// Code, factors, inputs (M, D), and operands; results are outputs, and caches and positions, which
// are operands that are written in place. The code begins with the number of new positions of a row, of
// inputs and of outputs.
ffi::Error RunProgram(ffi::ThreadPool threads, ffi::RemainingArgs args,
                      ffi::RemainingRets results) {
  Call call(threads, args, results);
  const int32_t* code = call.indices(0);
  layercomb::Program program{call.size(2, 0), code[0], code + 3, call.floats(1), {}, {}, {}, {}};
  const int n_args = static_cast<int>(args.size()), n_results = static_cast<int>(results.size());
  for (int i = 2; i < n_args; ++i) {
    if (i < 2 + code[1]) {
      program.inputs.push_back(call.floats(i));
    } else {
      program.operands.push_back(OperandOf(call.array(i)));
    }
  }
  for (int i = 0; i < n_results; ++i) {
    if (i < code[2]) {
      program.outputs.push_back(call.y(i));
    } else {
      program.results.push_back(OperandOf(call.result(i)));
    }
  }
  layercomb::RunProgram(call.pool(), program);
  return ffi::Error::Success();
}

}  // namespace

// One signature for all of them: what decodes it takes a second to compile.
#define LAYERCOMB_HANDLER(name, function)                                                 \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                          \
      name, function, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets())

LAYERCOMB_HANDLER(layercomb_row_products, RowProducts);
LAYERCOMB_HANDLER(layercomb_panel_products, PanelProducts);
LAYERCOMB_HANDLER(layercomb_run_program, RunProgram);
LAYERCOMB_HANDLER(layercomb_table_rows, TableRows);
LAYERCOMB_HANDLER(layercomb_gathered_products, GatheredProducts);
LAYERCOMB_HANDLER(layercomb_gathered_sums, GatheredSums);
LAYERCOMB_HANDLER(layercomb_factored_products, FactoredProducts);
LAYERCOMB_HANDLER(layercomb_module_convolution, ModuleConvolution);
LAYERCOMB_HANDLER(layercomb_chosen_units, ChosenUnits);
LAYERCOMB_HANDLER(layercomb_normalize, Normalize);
LAYERCOMB_HANDLER(layercomb_query_attention, QueryAttention);
LAYERCOMB_HANDLER(layercomb_gathered_cosines, GatheredCosines);
LAYERCOMB_HANDLER(layercomb_gathered_means, GatheredMeans);
LAYERCOMB_HANDLER(layercomb_nearest_rotations, NearestRotations);
LAYERCOMB_HANDLER(layercomb_placed_attention, PlacedAttention);
LAYERCOMB_HANDLER(layercomb_best_blocks, BestBlocks);
LAYERCOMB_HANDLER(layercomb_selected_forward, SelectedForward);
LAYERCOMB_HANDLER(layercomb_selected_backward, SelectedBackward);
LAYERCOMB_HANDLER(layercomb_flash_forward, FlashForward);
LAYERCOMB_HANDLER(layercomb_flash_backward, FlashBackward);
