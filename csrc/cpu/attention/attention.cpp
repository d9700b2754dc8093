#include "attention/attention.h"

#include "attention/buffers.h"
#include "attention/sets.h"

namespace tuna {

int64_t Workspace::forward(const PlanView& plan, const Attention& call, int threads) {
  Buffers buffers;
  return threads * carve(buffers, nullptr, plan, call, false);
}

int64_t Workspace::backward(const PlanView& plan, const Attention& call, int threads) {
  Buffers buffers;
  const int64_t shares = call.batch * call.key_heads * plan.total_rows * (padded(call.size) + padded(call.value_size));
  return shares + threads * carve(buffers, nullptr, plan, call, true);
}

void attention_forward(const PlanView& plan, const Attention& call, float* workspace, int threads,
                       InstructionSet set) {
#if TUNA_HAS_X86_SETS
  if (set >= InstructionSet::kAvx512) return avx512::forward(plan, call, workspace, threads);
  if (set == InstructionSet::kAvx2) return avx2::forward(plan, call, workspace, threads);
#endif
  (void)set;
  generic::forward(plan, call, workspace, threads);
}

void attention_backward(const PlanView& plan, const Attention& call, const AttentionGradients& gradients,
                        float* workspace, int threads, InstructionSet set) {
#if TUNA_HAS_X86_SETS
  if (set >= InstructionSet::kAvx512) return avx512::backward(plan, call, gradients, workspace, threads);
  if (set == InstructionSet::kAvx2) return avx2::backward(plan, call, gradients, workspace, threads);
#endif
  (void)set;
  generic::backward(plan, call, gradients, workspace, threads);
}

}  // namespace tuna
