// The arithmetic of products.h, compiled once per instruction set (see matmul.h).
//
// The sum is split into parts of kInner elements. For each part a thread packs a panel of the right operand once, in
// the order in which register blocks read it, and multiplies it with one chunk of the left operand after the other.
#pragma once

#include <algorithm>

#include "head/products_pack.h"

namespace tuna::TUNA_ISA {

constexpr int64_t kBlock = kBlockVectors * kLanes;  // columns of a register block
constexpr int64_t kPanel = 64;                      // columns for which a chunk of the left operand is read once
static_assert(kPanel % kBlock == 0);
constexpr int64_t kRun = 128;  // terms summed in a register: a long sum of short ones has smaller rounding errors

// To [block][k][kBlock].
template <typename T>
static void pack_panel(float* out, const Matrix& m, const Part& part, int64_t column, int64_t columns) {
  for (int64_t j = 0; j < columns; j += kBlock, out += part.count * kBlock) {
    if (m.transposed) {
      pack_along<T>(out, kBlock, m, part, column + j, std::min(kBlock, columns - j));
    } else {
      pack_across<T>(out, kBlock, m, part, column + j, std::min(kBlock, columns - j));
    }
  }
}

static void pack_right(float* out, const Matrix& m, const Part& part, int64_t column, int64_t columns) {
  if (m.element == Element::kBFloat16) return pack_panel<BFloat16>(out, m, part, column, columns);
#if !defined(TUNA_PAIRS)
  if (m.element == Element::kFloat16) return pack_panel<Float16>(out, m, part, column, columns);
  pack_panel<float>(out, m, part, column, columns);
#endif
}

// A left operand as read by the register block: entry (row, k) of a part is at data + row * `row` + k * `k`.
struct Left {
  const float* data;
  int64_t row, k;
};

// Whether the left operand can be read in place.
static bool is_direct(const MatrixProduct& p) {
  if (p.left.transposed) return false;
  return kUnit == 1 || (p.left.element == Element::kBFloat16 && p.left.stride % 2 == 0 && p.inner % 2 == 0);
}

// Divided among the threads that call it. Packed to [chunk][k][kChunk], or, if not transposed, [row][k].
template <typename T>
static void pack_left(float* scratch, const MatrixProduct& p, const Part& part) {
  if (p.left.transposed) {
    constexpr int64_t kLines = 16;  // of a task
    const int64_t chunks = (p.rows + kChunk - 1) / kChunk, tasks = (part.count + kLines - 1) / kLines;
#pragma omp for schedule(static) collapse(2)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (int64_t task = 0; task < tasks; ++task) {
        const Part some{part.start + task * kLines, std::min(kLines, part.count - task * kLines), part.numbers};
        float* out = scratch + (chunk * part.count + task * kLines) * kChunk;
        pack_across<T>(out, kChunk, p.left, some, chunk * kChunk, std::min(kChunk, p.rows - chunk * kChunk));
      }
    }
  } else {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.rows; ++row) {
      for (int64_t k = 0; k < part.count; k += kLanes) {
        const int64_t place = (part.start + k) * kUnit, count = std::min<int64_t>(kLanes, part.count - k);
        const Vector x = load_elements(at<T>(p.left, row, place), std::min(part.numbers - place, count * kUnit));
        std::memcpy(scratch + row * part.count + k, &x, static_cast<size_t>(count) * sizeof(float));
      }
    }
  }
}

static Left left_of(const MatrixProduct& p, const float* scratch, const Part& part, int64_t row) {
  if (is_direct(p)) {
    const int64_t stride = p.left.stride / kUnit;
    return {static_cast<const float*>(p.left.data) + row * stride + part.start, stride, 1};
  }
  if (p.left.transposed) return {scratch + row * part.count, 1, kChunk};  // row is the first of a chunk
  return {scratch + row * part.count, part.count, 1};
}

// One chunk of rows times one block of a panel.
static void multiply_block(const MatrixProduct& p, const Left& left, const float* right, int64_t row, int64_t column,
                           int64_t inner, bool add) {
  alignas(64) float edge[kChunk * kBlock];
  const int64_t columns = std::min(kBlock, p.columns - column);
  const bool is_edge = columns % kLanes != 0;  // whole vectors would write beyond C
  float* c = p.c + row * p.stride + column;
  Product block{};
  block.c = is_edge ? edge : c;
  block.c_row = is_edge ? kBlock : p.stride;
  block.a = left.data;
  block.a_row = left.row;
  block.a_column = left.k;
  block.b = right;
  block.b_row = kBlock;
  block.rows = std::min(kChunk, p.rows - row);
  block.columns = (columns + kLanes - 1) / kLanes * kLanes;
  for (int64_t k = 0; k < inner || k == 0; k += kRun) {
    block.inner = std::min(kRun, inner - k);
    if (k > 0 || (add && !is_edge)) {
      multiply<true>(block);
    } else {
      multiply<false>(block);
    }
    block.a += kRun * left.k;
    block.b += kRun * kBlock;
  }
  for (int64_t i = 0; is_edge && i < block.rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      float& to = c[i * p.stride + j];
      to = (add ? to : 0.f) + edge[i * kBlock + j];
    }
  }
}

void multiply_matrices(const MatrixProduct& p, float* scratch, int threads) {
  const int64_t units = (p.inner + kUnit - 1) / kUnit;
  const int64_t panels = (p.columns + kPanel - 1) / kPanel, chunks = (p.rows + kChunk - 1) / kChunk;
  // Parts of equal size, so that none is short.
  const int64_t parts = std::max<int64_t>(1, (units + kInner - 1) / kInner);
  const int64_t step = ((units + parts - 1) / parts + 15) / 16 * 16;
#pragma omp parallel num_threads(threads)
  {
    alignas(64) float panel[kInner * kPanel];
    for (int64_t index = 0; index < parts; ++index) {
      const Part part{index * step, std::min(step, units - index * step), p.inner};
      if (!is_direct(p)) {
        if (p.left.element == Element::kFloat32) pack_left<float>(scratch, p, part);
#if defined(TUNA_PAIRS)
        if (p.left.element == Element::kBFloat16) pack_left<BFloat16>(scratch, p, part);
#endif
      }
      int64_t packed = -1;
#pragma omp for schedule(static) collapse(2)
      for (int64_t column = 0; column < panels; ++column) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          if (packed != column) pack_right(panel, p.right, part, column * kPanel, std::min(kPanel, p.columns - column * kPanel));
          packed = column;
          const Left left = left_of(p, scratch, part, chunk * kChunk);
          const int64_t first = column * kPanel, last = std::min(first + kPanel, p.columns);
          for (int64_t j = first; j < last; j += kBlock) {
            const float* right = panel + (j - first) * part.count;
            multiply_block(p, left, right, chunk * kChunk, j, part.count, p.add || index > 0);
          }
        }
      }
    }
  }
}

}  // namespace tuna::TUNA_ISA
