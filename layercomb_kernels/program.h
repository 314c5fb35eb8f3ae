// A sequence of layers as one call: what `transforms.fusing` writes, and `RunProgram` runs.

#pragma once

#include <vector>

#include "kernels.h"

namespace layercomb {

enum class Type { kFloat32, kFloat16, kBfloat16, kInt32, kUint32, kInt8, kUint8 };

struct Operand {
  void* data;
  Type type;
  int64_t rows, columns;  // of a matrix; a vector is a row

  const float* floats() const { return static_cast<const float*>(data); }
  int32_t* indices() const { return static_cast<int32_t*>(data); }
};

// What an instruction does; numbers are those that `program.py` writes.
enum class Op { kNormalize, kActivate, kAdd, kMultiply, kProduct, kTurn, kAppend, kAttend, kJoin, kFactors,
                kConvolve, kChoose, kRoute };

enum class Activation { kRelu, kRelu2, kGelu, kSilu, kTanh, kSigmoid };

// Values are rows of floats in a workspace, n_x of each. Row m is position m % length, after those
// that have been taken, of row m / length of the batch.
//
// The code is: how many floats of workspace a row needs; how many values there are, and where each
// begins, −1, −2 … for the inputs and, counting on, for the outputs; how many phases there are; and for each phase whether it goes row by
// row, how many instructions it has, and these. In a phase that goes row by row, an instruction may
// read what those before made of the row.
struct Program {
  int64_t n_x, length;
  const int32_t* code;
  const float* factors;            // numbers that instructions ask for by their index
  std::vector<Operand> operands;   // weights and positions
  std::vector<Operand> results;    // caches and positions, which are written in place
  std::vector<const float*> inputs;
  std::vector<float*> outputs;

  // The position of row m.
  int64_t At(const int32_t* taken, int64_t m) const {
    return int64_t{taken[m / length]} + m % length;
  }
  // Whether a cache has room for all new positions of the row of the batch that row m is of.
  bool Fits(const int32_t* taken, int64_t m, int64_t room) const {
    const int64_t first = taken[m / length];
    return first >= 0 && first + length <= room;
  }
};

void RunProgram(const Pool& pool, const Program& program);

}  // namespace layercomb
