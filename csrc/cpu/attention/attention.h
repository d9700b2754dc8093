// Tree attention forward and backward on plain pointers: the arguments of a call, and the plan of its tasks.
#pragma once

#include <cstdint>

#include "common/element.h"
#include "common/instruction_sets.h"

namespace tuna {

constexpr int64_t kKeyRows = 64;    // maximum of a key block: a tile of keys stays in the L1 cache
constexpr int64_t kQueryRows = 32;  // of a query block; small, since on the diagonal half of the scores are hidden
constexpr int64_t kPadding = 16;  // rows of a key block in buffers are a multiple of this: whole vectors

TUNA_INLINE int64_t padded(int64_t n) { return (n + kPadding - 1) / kPadding * kPadding; }

// Rows [start, stop) of the tree.
struct KeyBlock {
  int64_t start, stop;
};

// The first `width` (padded) keys of the chunk's key block number `key`; later keys come after all the queries.
// `open`: every query sees all of them, and they include no padding.
struct Seen {
  int32_t key;
  int16_t width;
  bool open;
};

// Queries [start, stop) in row order; they see seen[first:last], in ascending order of rows.
struct QueryBlock {
  int64_t start, stop;
  int64_t first, last;
};

// A key block of a chunk, starting at row `offset` of the chunk's buffers.
struct ChunkKey {
  int64_t block, offset;
};

// Query blocks [first_query, last_query) and chunk_keys[first_key:last_key], which have `rows` rows.
struct Chunk {
  int64_t first_query, last_query;
  int64_t first_key, last_key;
  int64_t rows;
  int64_t offset;  // rows of all previous chunks
  int64_t cost;    // scores computed
};

// An AttentionPlan as plain pointers: code for one instruction set must not instantiate std::vector (attention_*.cpp).
struct PlanView {
  const KeyBlock* keys;
  const QueryBlock* queries;
  const Seen* seen;
  const Chunk* chunks;  // in descending order of cost
  const ChunkKey* chunk_keys;
  const int64_t* order;         // [queries] the caller's index of the queries in row order
  const int64_t* rows;          // [queries] their rows, ascending
  const int64_t* share_bounds;  // [key_blocks + 1] shares of a key block: shares[share_bounds[b]:share_bounds[b + 1]]
  const int64_t* shares;        // their first rows in the buffer of all chunks
  int64_t key_blocks, chunk_count;
  int64_t total_rows;  // of all chunks' buffers
  int64_t chunk_rows;  // of the largest
};

struct Tree {
  const int64_t* end;    // [rows]
  const int64_t* depth;  // [rows], null without a window
  int64_t rows;
  int64_t window;  // 0: none
};

// A tensor [batch, heads, rows, size]: strides in elements, rows contiguous.
struct Strided {
  void* data;
  int64_t batch, head, row;
};

struct Attention {
  Tree tree;
  int64_t batch, heads, key_heads, queries;
  int64_t size, value_size;  // of a query and key, of a value
  float scale, cap;          // z = cap * tanh(scale * q.k / cap); cap 0: none
  Element element;           // of all tensors but lse
  Strided q, k, v, out;
  float* lse;  // [batch, heads, queries]
};

struct AttentionGradients {
  Strided grad_out, dq, dk, dv;
  const float* grad_lse;  // [batch, heads, queries], null: none
};

// Floats of working memory that the functions below need.
struct Workspace {
  static int64_t forward(const PlanView& plan, const Attention& call, int threads);
  static int64_t backward(const PlanView& plan, const Attention& call, int threads);
};

void attention_forward(const PlanView& plan, const Attention& call, float* workspace, int threads, InstructionSet set);
void attention_backward(const PlanView& plan, const Attention& call, const AttentionGradients& gradients,
                        float* workspace, int threads, InstructionSet set);

}  // namespace tuna
