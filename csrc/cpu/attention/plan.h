// Which blocks of queries see which blocks of keys in a packed tree, and how the work is divided into tasks.
//
// Row i sees row j exactly when j <= i < end[j] (and 0 <= depth[i] - depth[j] < window). Rows are split where a branch
// starts and into blocks of at most kKeyRows, these into blocks of queries; a block of queries skips a block of keys by
// two bounds on its ends.
//
// A *chunk* is a run of query blocks of one group with the key blocks they see. A task is one chunk and one key head:
// it alone computes its queries' results, and its share of dK and dV in a separate buffer. Chunks depend only on the
// group and on the number of key heads, and shares are added in a fixed order: the bits depend neither on the number of
// threads nor on what else is packed.
#pragma once

#include <cstdint>
#include <vector>

#include "attention/attention.h"

namespace tuna {

class AttentionPlan {
 public:
  // `query_rows` [queries], null: all rows in order. Values must be rows of the tree.
  AttentionPlan(const Tree& tree, const int64_t* query_rows, int64_t queries, int64_t key_heads);

  PlanView view() const;

 private:
  struct Bounds;
  int64_t number() const { return static_cast<int64_t>(rows_.size()); }
  void cut_group(const Tree& tree, int64_t first, int64_t last);
  void add_chunks(const Tree& tree, int64_t first_key, const std::vector<Bounds>& bounds, int64_t key_heads);
  int64_t add_queries(const Tree& tree, int64_t first_key, int64_t key, const std::vector<Bounds>& bounds);
  void close_chunk(int64_t first, int64_t last, int64_t cost);
  void find_shares();

  // See PlanView.
  std::vector<KeyBlock> keys_;
  std::vector<QueryBlock> queries_;
  std::vector<Seen> seen_;
  std::vector<Chunk> chunks_;
  std::vector<ChunkKey> chunk_keys_;
  std::vector<int64_t> order_, rows_, share_bounds_, shares_;
  int64_t total_rows_ = 0, chunk_rows_ = 0, next_query_ = 0;
};

}  // namespace tuna
