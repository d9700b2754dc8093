// The arithmetic of tree attention, compiled once per instruction set (see matmul.h).
//
//     z = softcap(scale q k^T)    p = e^(z - lse)    out = p v
//     dv = p^T do    dz = p (do v^T - delta)    delta = rowsum(do out) - dlse    dq = scale dz k    dk = dz^T (scale q)
//
// A task is a chunk and a key head. It converts and transposes its keys and values once; then for each query block,
// with its heads folded into rows, it iterates over the key blocks seen. Scores exist for one pair of blocks at a time.
// Hidden keys get the score -infinity.
#pragma once

#include <cmath>
#include <limits>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "attention/buffers.h"
#include "common/matmul.h"

namespace tuna::TUNA_ISA {

constexpr float kHidden = -std::numeric_limits<float>::infinity();

TUNA_INLINE int64_t row_offset(const Strided& x, int64_t batch, int64_t head, int64_t row) {
  return batch * x.batch + head * x.head + row * x.row;
}

// out = factor * row of x in float32, padded with zeros to `width`.
static void load_row(float* out, const Strided& x, Element element, int64_t offset, int64_t n, int64_t width,
                     float factor) {
  if (element == Element::kFloat32) {
    const float* in = static_cast<const float*>(x.data) + offset;
    for (int64_t j = 0; j < n; ++j) out[j] = factor * in[j];
  } else {
    const uint16_t* in = static_cast<const uint16_t*>(x.data) + offset;
    if (element == Element::kBFloat16) {
      for (int64_t j = 0; j < n; ++j) out[j] = factor * from_bfloat16(in[j]);
    } else {
      for (int64_t j = 0; j < n; ++j) out[j] = factor * from_float16(in[j]);
    }
  }
  for (int64_t j = n; j < width; ++j) out[j] = 0.f;
}

// Row of x = factor * in, rounded.
static void store_row(const Strided& x, Element element, int64_t offset, const float* in, int64_t n, float factor) {
  if (element == Element::kFloat32) {
    float* out = static_cast<float*>(x.data) + offset;
    for (int64_t j = 0; j < n; ++j) out[j] = factor * in[j];
  } else {
    uint16_t* out = static_cast<uint16_t*>(x.data) + offset;
    if (element == Element::kBFloat16) {
      for (int64_t j = 0; j < n; ++j) out[j] = to_bfloat16(factor * in[j]);
    } else {
      for (int64_t j = 0; j < n; ++j) out[j] = to_float16(factor * in[j]);
    }
  }
}

// One task: its inputs and buffers.
struct Task {
  const PlanView& plan;
  const Attention& call;
  const Buffers& buffers;
  const Chunk& chunk;
  int64_t batch, key_head;
  int64_t size, value_size;  // padded

  Task(const PlanView& plan_, const Attention& call_, const Buffers& buffers_, int64_t number)
      : plan(plan_), call(call_), buffers(buffers_),
        chunk(plan_.chunks[number / (call_.batch * call_.key_heads)]),
        batch(number / call_.key_heads % call_.batch), key_head(number % call_.key_heads),
        size(padded(call_.size)), value_size(padded(call_.value_size)) {}
};

// Some query heads of one query block: row m of a buffer is query m % queries of head first_head + m / queries.
struct Queries {
  const QueryBlock& block;
  int64_t first_head, heads;

  TUNA_INLINE_MEMBER int64_t count() const { return block.stop - block.start; }
  TUNA_INLINE_MEMBER int64_t rows() const { return heads * (block.stop - block.start); }
};

// A key block of the chunk and its position in the buffers.
struct Keys {
  int64_t start, count;  // first row of the tree, keys
  int64_t offset;        // in the chunk's buffers
  int64_t stride;        // padded keys, the row of a transposed block

  TUNA_INLINE_MEMBER Keys(const Task& task, int64_t number) {
    const ChunkKey& key = task.plan.chunk_keys[task.chunk.first_key + number];
    const KeyBlock& block = task.plan.keys[key.block];
    start = block.start, count = block.stop - block.start, offset = key.offset, stride = padded(count);
  }
};

// [count, n] rows of x into to[n, stride], padded with zeros.
static void load_transposed(const Task& task, const Strided& x, const Keys& keys, int64_t n, float* to) {
  float* row = task.buffers.row;
  for (int64_t j = 0; j < keys.stride; ++j) {
    if (j < keys.count) {
      const int64_t offset = row_offset(x, task.batch, task.key_head, keys.start + j);
      load_row(row, x, task.call.element, offset, n, n, 1.f);
    }
    for (int64_t i = 0; i < n; ++i) to[i * keys.stride + j] = j < keys.count ? row[i] : 0.f;
  }
}

static void load_rows(const Task& task, const Strided& x, const Keys& keys, int64_t n, float* to) {
  const int64_t width = padded(n);
  for (int64_t j = 0; j < keys.stride; ++j) {
    const int64_t row = j < keys.count ? j : 0, known = j < keys.count ? n : 0;
    const int64_t offset = row_offset(x, task.batch, task.key_head, keys.start + row);
    load_row(to + j * width, x, task.call.element, offset, known, width, 1.f);
  }
}

static void load_chunk(const Task& task, bool backward) {
  const Attention& call = task.call;
  const Buffers& b = task.buffers;
  for (int64_t number = 0; number < task.chunk.last_key - task.chunk.first_key; ++number) {
    const Keys keys(task, number);
    load_transposed(task, call.k, keys, call.size, b.keys_t + keys.offset * call.size);
    if (backward) {
      load_rows(task, call.k, keys, call.size, b.keys + keys.offset * task.size);
      load_transposed(task, call.v, keys, call.value_size, b.values_t + keys.offset * call.value_size);
    } else {
      load_rows(task, call.v, keys, call.value_size, b.values + keys.offset * task.value_size);
    }
    for (int64_t j = 0; j < keys.stride; ++j) {
      const bool is_key = j < keys.count;
      b.ends[keys.offset + j] = is_key ? static_cast<int32_t>(call.tree.end[keys.start + j]) : 0;
      if (call.tree.window) b.depths[keys.offset + j] = is_key ? call.tree.depth[keys.start + j] : 0;
    }
  }
}

// Rows of a [batch, heads, rows, n] tensor of queries into to[m, padded n].
static void load_queries(const Task& task, const Queries& queries, const Strided& x, int64_t n, float factor,
                         float* to) {
  const int64_t width = padded(n), count = queries.count();
  for (int64_t m = 0; m < queries.rows(); ++m) {
    const int64_t row = task.plan.order[queries.block.start + m % count];
    const int64_t offset = row_offset(x, task.batch, queries.first_head + m / count, row);
    load_row(to + m * width, x, task.call.element, offset, n, width, factor);
  }
}

// Index of row m in a [batch, heads, queries] array.
TUNA_INLINE int64_t statistic(const Task& task, const Queries& queries, int64_t m) {
  const int64_t count = queries.count(), row = task.plan.order[queries.block.start + m % count];
  return (task.batch * task.call.heads + queries.first_head + m / count) * task.call.queries + row;
}

static void cap_row(float* z, int64_t n, float cap) {
  const float inverse = 1.f / cap;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) z[j] = cap * tanh_of(z[j] * inverse);
}

static void hide_row(const Task& task, const Keys& keys, float* z, int64_t width, int64_t query) {
  const int32_t* ends = task.buffers.ends + keys.offset;
  const int32_t row = static_cast<int32_t>(query), ahead = static_cast<int32_t>(query - keys.start);
  const int32_t n = static_cast<int32_t>(width);
#pragma omp simd
  for (int32_t j = 0; j < n; ++j) z[j] = j <= ahead && ends[j] > row ? z[j] : kHidden;
  if (const int64_t window = task.call.tree.window) {
    const int64_t* depths = task.buffers.depths + keys.offset;
    const int64_t depth = task.call.tree.depth[query];
#pragma omp simd
    for (int32_t j = 0; j < n; ++j) z[j] = depths[j] <= depth && depth - depths[j] < window ? z[j] : kHidden;
  }
}

// z [rows, width] of the queries and keys.
static void score(const Task& task, const Queries& queries, const Keys& keys, const Seen& seen) {
  const Attention& call = task.call;
  const Buffers& b = task.buffers;
  const int64_t n = seen.width, rows = queries.rows(), count = queries.count();
  multiply<false>({b.scores, n, b.queries, task.size, 1, b.keys_t + keys.offset * call.size, keys.stride, rows, n,
                   call.size});
  if (call.cap > 0.f) cap_row(b.scores, rows * n, call.cap);
  if (seen.open) return;
  for (int64_t m = 0; m < rows; ++m) {
    hide_row(task, keys, b.scores + m * n, n, task.plan.rows[queries.block.start + m % count]);
  }
}

// Replaces z by e^(z - top) with the updated running maximum; returns the factor that rescales earlier sums.
static float exponential_row(float* z, int64_t n, float& top, float& sum) {
  const float before = top;
  float maximum = before;
#pragma omp simd reduction(max : maximum)
  for (int64_t j = 0; j < n; ++j) maximum = z[j] > maximum ? z[j] : maximum;
  // Nothing seen so far: leave the sums at 0 instead of computing -inf - -inf.
  const float reference = maximum == kHidden ? 0.f : maximum;
  float total = 0.f;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < n; ++j) {
    z[j] = exp_of(z[j] - reference);
    total += z[j];
  }
  const float rescale = before == kHidden ? 0.f : exp_of(before - reference);
  top = maximum;
  sum = sum * rescale + total;
  return rescale;
}

static void forward_queries(const Task& task, const Queries& queries) {
  const Attention& call = task.call;
  const Buffers& b = task.buffers;
  const int64_t rows = queries.rows(), e = task.value_size;
  load_queries(task, queries, call.q, call.size, call.scale, b.queries);
  for (int64_t i = 0; i < rows * e; ++i) b.out[i] = 0.f;
  for (int64_t m = 0; m < rows; ++m) b.top[m] = kHidden, b.sum[m] = 0.f;
  for (int64_t i = queries.block.first; i < queries.block.last; ++i) {
    const Seen& seen = task.plan.seen[i];
    const Keys keys(task, seen.key);
    const int64_t n = seen.width;
    score(task, queries, keys, seen);
    for (int64_t m = 0; m < rows; ++m) {
      const float rescale = exponential_row(b.scores + m * n, n, b.top[m], b.sum[m]);
      if (rescale == 1.f) continue;
      for (int64_t j = 0; j < e; ++j) b.out[m * e + j] *= rescale;
    }
    multiply<true>({b.out, e, b.scores, n, 1, b.values + keys.offset * e, e, rows, e, n});
  }
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t row = task.plan.order[queries.block.start + m % queries.count()];
    const int64_t offset = row_offset(call.out, task.batch, queries.first_head + m / queries.count(), row);
    store_row(call.out, call.element, offset, b.out + m * e, call.value_size, 1.f / b.sum[m]);
    call.lse[statistic(task, queries, m)] = b.top[m] + logf(b.sum[m]);
  }
}

// Replaces z by p in scores, dp by dz in d_scores. Hidden entries are 0 whatever dp is, so that a NaN stays in its row.
static void gradient_row(float* z, float* d, int64_t n, float lse, float delta, float cap) {
  if (cap > 0.f) {
    const float inverse = 1.f / cap;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const float p = exp_of(z[j] - lse), t = z[j] * inverse;
      d[j] = p > 0.f || p != p ? p * (d[j] - delta) * (1.f - t * t) : 0.f;
      z[j] = p;
    }
    return;
  }
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const float p = exp_of(z[j] - lse);
    d[j] = p > 0.f || p != p ? p * (d[j] - delta) : 0.f;
    z[j] = p;
  }
}

// lse and delta of each row; dO is already in the buffer `out`.
static void load_statistics(const Task& task, const Queries& queries, const AttentionGradients& gradients) {
  const Attention& call = task.call;
  const Buffers& b = task.buffers;
  for (int64_t m = 0; m < queries.rows(); ++m) {
    const int64_t row = task.plan.order[queries.block.start + m % queries.count()];
    const int64_t offset = row_offset(call.out, task.batch, queries.first_head + m / queries.count(), row);
    load_row(b.row, call.out, call.element, offset, call.value_size, call.value_size, 1.f);
    const float* d_out = b.out + m * task.value_size;
    float delta = 0.f;
#pragma omp simd reduction(+ : delta)
    for (int64_t j = 0; j < call.value_size; ++j) delta += b.row[j] * d_out[j];
    const int64_t place = statistic(task, queries, m);
    b.top[m] = call.lse[place];
    b.sum[m] = gradients.grad_lse ? delta - gradients.grad_lse[place] : delta;
  }
}

// lse is in float32: if it is large its rounding would be an error of every e^(z - lse). The row's sum of them shows
// it: it is 1 except for that rounding (less if a sink is part of the denominator). Dividing dO and delta by it divides
// the row's probabilities.
constexpr float kLargeLse = 32.f, kRoundings = 2.f * 0x1p-24f;

static void correct_large_rows(const Task& task, const Queries& queries) {
  const Buffers& b = task.buffers;
  const int64_t rows = queries.rows(), e = task.value_size;
  bool large = false;
  for (int64_t m = 0; m < rows; ++m) large |= fabsf(b.top[m]) > kLargeLse;
  if (!large) return;
  float* const sums = b.row_sums;
  for (int64_t m = 0; m < rows; ++m) sums[m] = 0.f;
  for (int64_t i = queries.block.first; i < queries.block.last; ++i) {
    const Seen& seen = task.plan.seen[i];
    const int64_t n = seen.width;
    score(task, queries, Keys(task, seen.key), seen);
    for (int64_t m = 0; m < rows; ++m) {
      const float* z = b.scores + m * n;
      const float lse = b.top[m];
      float total = 0.f;
#pragma omp simd reduction(+ : total)
      for (int64_t j = 0; j < n; ++j) total += exp_of(z[j] - lse);
      sums[m] += total;
    }
  }
  for (int64_t m = 0; m < rows; ++m) {
    if (!(fabsf(b.top[m]) > kLargeLse) || !(fabsf(logf(sums[m])) <= kRoundings * fabsf(b.top[m]))) continue;
    const float factor = 1.f / sums[m];
    for (int64_t j = 0; j < e; ++j) b.out[m * e + j] *= factor;
    b.sum[m] *= factor;
  }
}

// dK and dV of all tasks: [batch, key_heads, rows of all chunks, padded size].
struct Shares {
  float *dk, *dv;

  TUNA_INLINE_MEMBER static int64_t place(const PlanView& plan, const Attention& call, int64_t batch, int64_t head) {
    return (batch * call.key_heads + head) * plan.total_rows;
  }
};

static void backward_queries(const Task& task, const Queries& queries, const AttentionGradients& gradients,
                             const Shares& shares) {
  const Attention& call = task.call;
  const Buffers& b = task.buffers;
  const int64_t rows = queries.rows(), d = task.size, e = task.value_size;
  load_queries(task, queries, call.q, call.size, call.scale, b.queries);
  load_queries(task, queries, gradients.grad_out, call.value_size, 1.f, b.out);
  load_statistics(task, queries, gradients);
  correct_large_rows(task, queries);
  for (int64_t i = 0; i < rows * d; ++i) b.d_queries[i] = 0.f;
  for (int64_t i = queries.block.first; i < queries.block.last; ++i) {
    const Seen& seen = task.plan.seen[i];
    const Keys keys(task, seen.key);
    const int64_t n = seen.width, known = keys.count < n ? keys.count : n;
    score(task, queries, keys, seen);
    multiply<false>({b.d_scores, n, b.out, e, 1, b.values_t + keys.offset * call.value_size, keys.stride, rows, n,
                     call.value_size});
    for (int64_t m = 0; m < rows; ++m) {
      gradient_row(b.scores + m * n, b.d_scores + m * n, n, b.top[m], b.sum[m], call.cap);
    }
    multiply<true>({shares.dv + keys.offset * e, e, b.scores, 1, n, b.out, e, known, e, rows});
    multiply<true>({shares.dk + keys.offset * d, d, b.d_scores, 1, n, b.queries, d, known, d, rows});
    multiply<true>({b.d_queries, d, b.d_scores, n, 1, b.keys + keys.offset * d, d, rows, d, n});
  }
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t row = task.plan.order[queries.block.start + m % queries.count()];
    const int64_t offset = row_offset(gradients.dq, task.batch, queries.first_head + m / queries.count(), row);
    store_row(gradients.dq, call.element, offset, b.d_queries + m * d, call.size, call.scale);
  }
}

// Calls `function` for all query blocks of the chunk, with the query heads of the key head in even parts.
template <typename Function>
TUNA_INLINE void for_each_queries(const Task& task, const Function& function) {
  const int64_t heads = task.call.heads / task.call.key_heads;
  const int64_t parts = (heads + kHeadsAtOnce - 1) / kHeadsAtOnce;
  for (int64_t i = task.chunk.first_query; i < task.chunk.last_query; ++i) {
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = heads * part / parts, last = heads * (part + 1) / parts;
      function(Queries{task.plan.queries[i], task.key_head * heads + first, last - first});
    }
  }
}

// Sums the tasks' shares of a key block, in the order of the chunks.
static void add_shares(const PlanView& plan, const Attention& call, const Strided& to, const float* shares, int64_t n,
                       int64_t task, float* row) {
  const int64_t head = task % call.key_heads, batch = task / call.key_heads % call.batch;
  const int64_t block = task / (call.key_heads * call.batch), width = padded(n);
  shares += Shares::place(plan, call, batch, head) * width;
  for (int64_t key = plan.keys[block].start; key < plan.keys[block].stop; ++key) {
    for (int64_t j = 0; j < n; ++j) row[j] = 0.f;
    for (int64_t i = plan.share_bounds[block]; i < plan.share_bounds[block + 1]; ++i) {
      const float* share = shares + (plan.shares[i] + key - plan.keys[block].start) * width;
      for (int64_t j = 0; j < n; ++j) row[j] += share[j];
    }
    store_row(to, call.element, row_offset(to, batch, head, key), row, n, 1.f);
  }
}

TUNA_INLINE Buffers buffers_of_thread(float* workspace, const PlanView& plan, const Attention& call, bool backward) {
  int thread = 0;
#ifdef _OPENMP
  thread = omp_get_thread_num();
#endif
  Buffers buffers;
  const int64_t floats = carve(buffers, nullptr, plan, call, backward);
  carve(buffers, workspace + thread * floats, plan, call, backward);
  return buffers;
}

void forward(const PlanView& plan, const Attention& call, float* workspace, [[maybe_unused]] int threads) {
  const int64_t tasks = plan.chunk_count * call.batch * call.key_heads;
#pragma omp parallel num_threads(threads)
  {
    const Buffers buffers = buffers_of_thread(workspace, plan, call, false);
#pragma omp for schedule(dynamic, 1)
    for (int64_t number = 0; number < tasks; ++number) {
      const Task task(plan, call, buffers, number);
      load_chunk(task, false);
      for_each_queries(task, [&](const Queries& queries) { forward_queries(task, queries); });
    }
  }
}

void backward(const PlanView& plan, const Attention& call, const AttentionGradients& gradients, float* workspace,
              [[maybe_unused]] int threads) {
  const int64_t d = padded(call.size), e = padded(call.value_size), copies = call.batch * call.key_heads;
  const Shares all{workspace, workspace + copies * plan.total_rows * d};
  workspace += copies * plan.total_rows * (d + e);
#pragma omp parallel num_threads(threads)
  {
    const Buffers buffers = buffers_of_thread(workspace, plan, call, true);
#pragma omp for schedule(dynamic, 1)
    for (int64_t number = 0; number < plan.chunk_count * copies; ++number) {
      const Task task(plan, call, buffers, number);
      const int64_t place = Shares::place(plan, call, task.batch, task.key_head) + task.chunk.offset;
      const Shares own{all.dk + place * d, all.dv + place * e};
      for (int64_t i = 0; i < task.chunk.rows * d; ++i) own.dk[i] = 0.f;
      for (int64_t i = 0; i < task.chunk.rows * e; ++i) own.dv[i] = 0.f;
      load_chunk(task, true);
      for_each_queries(task, [&](const Queries& queries) { backward_queries(task, queries, gradients, own); });
    }
#pragma omp for schedule(static)
    for (int64_t number = 0; number < plan.key_blocks * copies; ++number) {
      add_shares(plan, call, gradients.dk, all.dk, call.size, number, buffers.row);
      add_shares(plan, call, gradients.dv, all.dv, call.value_size, number, buffers.row);
    }
  }
}

}  // namespace tuna::TUNA_ISA
