#include "attention/plan.h"

#include <algorithm>
#include <numeric>

namespace tuna {
namespace {

// Overhead of a block besides its scores: as keys about 8 more keys, as queries 512 scores.
constexpr int64_t kKeyOverhead = 8, kQueryOverhead = 512;
// A task should be worth starting (a millisecond at head size 64 and three query heads a key head) ...
constexpr int64_t kChunkScores = 1 << 16;
// ... and a long group should be this many tasks over its key heads: enough for the threads, few enough that the
// buffers of gradients stay small (a chunk deep in a long sequence has one as long as the sequence).
constexpr int64_t kTasksOfGroup = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

// Extremes over the rows of a block: bounds on what sees it and on what it sees.
struct AttentionPlan::Bounds {
  int64_t first, last;  // rows, inclusive
  int64_t min_end, max_end, min_depth, max_depth;

  static Bounds of(const Tree& tree, int64_t row) {
    const int64_t depth = tree.depth ? tree.depth[row] : 0;
    return {row, row, tree.end[row], tree.end[row], depth, depth};
  }

  void merge(const Bounds& other) {
    first = std::min(first, other.first), last = std::max(last, other.last);
    min_end = std::min(min_end, other.min_end), max_end = std::max(max_end, other.max_end);
    min_depth = std::min(min_depth, other.min_depth), max_depth = std::max(max_depth, other.max_depth);
  }

  // Scores of its rows as keys, plus overheads: merging two blocks must not increase the total.
  int64_t cost() const { return (padded(last + 1 - first) + kKeyOverhead) * (max_end - first) + kQueryOverhead; }

  bool is_hidden_from(const Bounds& query, int64_t window) const {
    if (first > query.last || max_end <= query.first) return true;
    return window && (query.min_depth - max_depth >= window || query.max_depth < min_depth);
  }

  bool is_open_to(const Bounds& query, int64_t window) const {
    if (last > query.first || min_end <= query.last || (last + 1 - first) % kPadding) return false;
    return !window || (query.max_depth - min_depth < window && query.min_depth >= max_depth);
  }
};

AttentionPlan::AttentionPlan(const Tree& tree, const int64_t* query_rows, int64_t number, int64_t key_heads)
    : order_(number), rows_(number) {
  std::iota(order_.begin(), order_.end(), 0);
  if (query_rows) {
    std::stable_sort(order_.begin(), order_.end(),
                     [&](int64_t a, int64_t b) { return query_rows[a] < query_rows[b]; });
  }
  for (int64_t i = 0; i < number; ++i) rows_[i] = query_rows ? query_rows[order_[i]] : i;
  for (int64_t first = 0; first < tree.rows;) {
    int64_t last = first + 1, reach = tree.end[first];
    for (; last < reach; ++last) reach = std::max(reach, tree.end[last]);
    const auto first_key = static_cast<int64_t>(keys_.size());
    cut_group(tree, first, last);
    std::vector<Bounds> bounds;
    for (auto key = keys_.begin() + first_key; key != keys_.end(); ++key) {
      bounds.push_back(Bounds::of(tree, key->start));
      for (int64_t row = key->start + 1; row < key->stop; ++row) bounds.back().merge(Bounds::of(tree, row));
    }
    add_chunks(tree, first_key, bounds, key_heads);
    first = last;
  }
  find_shares();
  std::stable_sort(chunks_.begin(), chunks_.end(), [](const Chunk& a, const Chunk& b) { return a.cost > b.cost; });
}

// Blocks of the group of rows [first, last): branches in even parts, small neighbours merged where that is cheaper.
void AttentionPlan::cut_group(const Tree& tree, int64_t first, int64_t last) {
  std::vector<Bounds> blocks;
  for (int64_t start = first; start < last;) {
    int64_t stop = start + 1;
    while (stop < last && tree.end[stop - 1] > stop) ++stop;  // a leaf ends a branch
    const int64_t parts = ceil_div(stop - start, kKeyRows);
    const int64_t size = padded(ceil_div(stop - start, parts));
    for (; start < stop; start += size) {
      Bounds block = Bounds::of(tree, start);
      for (int64_t row = start + 1; row < std::min(start + size, stop); ++row) block.merge(Bounds::of(tree, row));
      if (!blocks.empty() && block.last + 1 - blocks.back().first <= kKeyRows) {
        Bounds both = blocks.back();
        both.merge(block);
        if (both.cost() <= blocks.back().cost() + block.cost()) {
          blocks.back() = both;
          continue;
        }
      }
      blocks.push_back(block);
    }
    start = stop;
  }
  for (const Bounds& block : blocks) keys_.push_back({block.first, block.last + 1});
}

// The query blocks of a group, in chunks of about equal cost.
void AttentionPlan::add_chunks(const Tree& tree, int64_t first_key, const std::vector<Bounds>& bounds,
                               int64_t key_heads) {
  const auto first_query = static_cast<int64_t>(queries_.size());
  const auto blocks = static_cast<int64_t>(bounds.size());
  std::vector<int64_t> costs;
  for (int64_t key = 0; key < blocks; ++key) {
    while (next_query_ < number() && rows_[next_query_] <= bounds[key].last) {
      costs.push_back(add_queries(tree, first_key, key, bounds));
    }
  }
  const int64_t total = std::accumulate(costs.begin(), costs.end(), int64_t{0});
  const int64_t parts = std::min(ceil_div(total, kChunkScores), ceil_div(kTasksOfGroup, key_heads));
  int64_t start = 0, done = 0, closed = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(costs.size()); ++i) {
    done += costs[i];
    if (done * parts < total * (closed * parts / total + 1)) continue;
    close_chunk(first_query + start, first_query + i + 1, done - closed);
    start = i + 1, closed = done;
  }
}

// One block of the queries whose rows are in key block `key` of the group; returns its cost.
int64_t AttentionPlan::add_queries(const Tree& tree, int64_t first_key, int64_t key,
                                   const std::vector<Bounds>& bounds) {
  const int64_t start = next_query_;
  int64_t left = 0;
  while (start + left < number() && rows_[start + left] <= bounds[key].last) ++left;
  Bounds query = Bounds::of(tree, rows_[start]);
  next_query_ = start + ceil_div(left, ceil_div(left, kQueryRows));  // evenly
  for (int64_t i = start + 1; i < next_query_; ++i) query.merge(Bounds::of(tree, rows_[i]));
  const auto first_seen = static_cast<int64_t>(seen_.size());
  int64_t width = 0;
  for (int64_t other = 0; other <= key; ++other) {
    if (bounds[other].is_hidden_from(query, tree.window)) continue;
    const int64_t keys = padded(std::min(bounds[other].last, query.last) + 1 - bounds[other].first);
    seen_.push_back({static_cast<int32_t>(first_key + other), static_cast<int16_t>(keys),
                     bounds[other].is_open_to(query, tree.window)});
    width += keys;
  }
  queries_.push_back({start, next_query_, first_seen, static_cast<int64_t>(seen_.size())});
  return width * (next_query_ - start);
}

// A chunk of the queries [first, last): assigns every key block they see a position in its buffers.
void AttentionPlan::close_chunk(int64_t first, int64_t last, int64_t cost) {
  std::vector<int32_t> blocks;
  const int64_t first_seen = queries_[first].first, last_seen = queries_[last - 1].last;
  for (int64_t i = first_seen; i < last_seen; ++i) blocks.push_back(seen_[i].key);
  std::sort(blocks.begin(), blocks.end());
  blocks.erase(std::unique(blocks.begin(), blocks.end()), blocks.end());
  for (int64_t i = first_seen; i < last_seen; ++i) {
    const auto place = std::lower_bound(blocks.begin(), blocks.end(), seen_[i].key) - blocks.begin();
    seen_[i].key = static_cast<int32_t>(place);
  }
  const auto first_key = static_cast<int64_t>(chunk_keys_.size());
  int64_t taken = 0;
  for (const int32_t block : blocks) {
    chunk_keys_.push_back({block, taken});
    taken += padded(keys_[block].stop - keys_[block].start);
  }
  chunks_.push_back({first, last, first_key, static_cast<int64_t>(chunk_keys_.size()), taken, total_rows_, cost});
  total_rows_ += taken;
  chunk_rows_ = std::max(chunk_rows_, taken);
}

PlanView AttentionPlan::view() const {
  return {keys_.data(),       queries_.data(), seen_.data(), chunks_.data(),       chunk_keys_.data(), order_.data(),
          rows_.data(),       share_bounds_.data(),         shares_.data(),       static_cast<int64_t>(keys_.size()),
          static_cast<int64_t>(chunks_.size()),            total_rows_,         chunk_rows_};
}

// Inverts "the keys of each chunk", with chunks in order of their rows_.
void AttentionPlan::find_shares() {
  share_bounds_.assign(keys_.size() + 1, 0);
  for (const ChunkKey& key : chunk_keys_) ++share_bounds_[key.block + 1];
  std::partial_sum(share_bounds_.begin(), share_bounds_.end(), share_bounds_.begin());
  std::vector<int64_t> next(share_bounds_.begin(), share_bounds_.end() - 1);
  shares_.resize(chunk_keys_.size());
  for (const Chunk& chunk : chunks_) {
    for (int64_t i = chunk.first_key; i < chunk.last_key; ++i) {
      shares_[next[chunk_keys_[i].block]++] = chunk.offset + chunk_keys_[i].offset;
    }
  }
}

}  // namespace tuna
