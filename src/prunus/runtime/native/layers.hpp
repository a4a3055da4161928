// What the engine's operators are told. Python fills these structures (runtime/records.py mirrors them field by field).
// All offsets are in bytes, all data are float32 unless said, and tables count in vectors of 16 floats.
#pragma once
#include <cstdint>

namespace prunus {

// A row group of a weight stream: output group `group`, its entries [begin, end).
struct Row {
  int32_t group, begin, end;
};

// Sparse matrix times lane-blocked activations: y[m] = act(bias[m] + residual[m] + sum_k w[m, k] x[k]).
// The lanes run over positions (or images); a weight entry names an input by the byte offset of its plane or tap.
struct StreamLayer {
  int32_t block;            // rows per group: 1, 2, 4, 8 or 16
  int32_t groups;           // row groups
  int32_t k_blocks;         // parts of the sum that fit the first-level cache with their inputs
  int32_t activation;       // see simd.hpp
  float slope;              // of a leaky ReLU
  int32_t tiles, chunks;    // tiles of positions, chunks of row groups: together the tasks
  int32_t padding_;
  const Row* rows;          // [k_blocks * groups]
  const char* entries;      // block 1: {int32 o0, o1; float w0, w1}; otherwise {int32 offset; float w[block]}
  const float* bias;        // [groups * block]
  int64_t y_channel;        // between output channels
  const int32_t* widths;    // [tiles] vectors in a tile
  const int64_t* x_offsets; // [tiles]
  const int64_t* y_offsets; // [tiles]
  const uint16_t* masks;    // [tiles * 16] which lanes may be written, or null for all
  const int32_t* chunk;     // [chunks + 1] bounds in row groups
  const char* x;
  char* y;
  const char* residual;     // same offsets as y, or null
};

// Copies between NCHW and padded planes, and from planes to their phases, with one plane as a task:
// y[p][r * y_row + c * y_step] = x[p][r * x_row + c * x_step] for rows x columns positions of `lanes` floats each.
struct CopyLayer {
  int64_t planes;           // tasks
  int32_t rows, columns;
  int32_t lanes, padding_;  // 1, or 16 where images lie in the lanes
  int64_t x_plane, y_plane; // between planes
  int64_t x_row, y_row;     // between rows
  int64_t x_step, y_step;   // between columns
  const char* x;
  char* y;
};

// Window reductions over planes: y[p] = scale * sum or max over taps of x[p + tap].
struct WindowLayer {
  int64_t planes;
  int32_t taps, largest;    // largest: 1 max, 0 sum
  float scale;
  int32_t tiles;
  const int64_t* offsets;   // [taps]
  int64_t x_plane, y_plane;
  const int32_t* widths;    // [tiles]
  const int64_t* x_offsets; // [tiles]
  const int64_t* y_offsets; // [tiles]
  const uint16_t* masks;
  const char* x;
  char* y;
};

// Mean of every plane: y[p] = sum over rows and columns / count.
struct MeanLayer {
  int64_t planes;
  int32_t rows, columns;
  int64_t x_plane, x_row, y_plane;
  int32_t lanes;            // 1, or 16 where images lie in the lanes
  int32_t padding_;
  const char* x;
  char* y;
};

// Elementwise arithmetic on planes: y = act(a op b), where b is of the same form, one number per plane, or absent.
struct PointwiseLayer {
  int64_t planes;
  int32_t op;               // 0: a, 1: a + b, 2: a * b, 3: a - b
  int32_t activation;
  float slope;
  int32_t tiles;
  int32_t per_plane;        // b holds one number (or 16 lanes) per plane
  int32_t lanes;            // 1 or 16, of such a b
  int64_t a_plane, b_plane, y_plane;
  const int32_t* widths;
  const int64_t* offsets;   // [tiles] the same for a, b and y
  const uint16_t* masks;
  const char* a;
  const char* b;
  char* y;
};

// y[b][j][i] = x[b][i][j] for batches of rows x columns, done in blocks of 16 x 16. Batches are counted twice
// (outer, inner), so that they can be, say, the rows of planes. Both sides may be cut into tiles of `tile` columns.
struct TransposeLayer {
  int64_t outer, inner, rows, columns;  // rows and columns of x
  int64_t x_outer, x_inner, x_row;
  int64_t y_outer, y_inner, y_row;
  int64_t x_tile, y_tile;   // between tiles, or 0 for none
  int32_t tile, padding_;
  const char* x;
  char* y;
};

// How the weights of a linear layer with few rows of x lie in memory. Rows of the weight come in groups of 16. A value
// whose bits are all zero is a removed weight, kept zeros are stored as -0.
enum GemvKernel { GEMV_CSR, GEMV_SELECT, GEMV_COLUMNS16, GEMV_ROW16, GEMV_NM, GEMV_BITMASK, GEMV_DENSE };

// Sparse matrix times few vectors: y[b] = act(bias + residual[b] + W x[b]).
struct GemvLayer {
  int32_t kernel;           // GemvKernel
  int32_t half;             // values are bfloat16
  int32_t wide;             // column numbers are int32, not uint16
  int32_t block;            // select: columns looked up together, 32 or 64; nm: weights kept of every 4 columns
  int32_t rows, columns;    // of the weight
  int32_t batch;            // rows of x
  int32_t chunks;           // tasks
  int32_t activation;
  float slope;
  int64_t x_row, y_row;     // between rows of x and of y
  const int32_t* chunk;     // [chunks + 1] bounds in groups
  // Where what belongs to a row starts, or for select and columns16 to a group, with one more at the end: csr values,
  // select slots of 16 values, columns16 and row16 blocks of 16 values, bitmask values.
  const int64_t* starts;
  const int64_t* words;     // select: [groups] where the index words start, counted in 16 words
  const int32_t* slots;     // select: [groups] slots of a block
  const void* values;
  const void* indices;      // csr, columns16: columns; row16: column / 16; select, nm: packed words; bitmask: bits
  const int64_t* rest_starts;  // select: [groups * 16 + 1] what found no slot, as csr
  const void* rest_values;
  const void* rest_columns;
  const int32_t* order;     // [groups * 16] the row that a lane computes, -1 for none; null: in order
  const float* bias;        // [groups * 16] in the order of the lanes
  const char* x;
  char* y;
  const char* residual;     // same offsets as y, or null
};

enum Kind { STREAM, COPY, WINDOW, MEAN, POINTWISE, TRANSPOSE, GEMV, KINDS };

// How an instruction set carries one task of each kind out.
struct Kernels {
  const char* name;
  int32_t lanes;
  void (*stream)(const StreamLayer&, int64_t task);
  void (*copy)(const CopyLayer&, int64_t task);
  void (*window)(const WindowLayer&, int64_t task);
  void (*mean)(const MeanLayer&, int64_t task);
  void (*pointwise)(const PointwiseLayer&, int64_t task);
  void (*transpose)(const TransposeLayer&, int64_t task);
  void (*gemv)(const GemvLayer&, int64_t task);
};

}  // namespace prunus
