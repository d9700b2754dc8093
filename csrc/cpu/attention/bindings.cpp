#include <pybind11/pybind11.h>

#include <cstdint>

#include "attention/attention.h"
#include "attention/plan.h"

namespace py = pybind11;

namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A [batch, heads, rows, size] tensor whose rows are dense: address and strides.
tuna::Strided strided(const py::tuple& x) {
  return {at<void>(x[0].cast<uintptr_t>()), x[1].cast<int64_t>(), x[2].cast<int64_t>(), x[3].cast<int64_t>()};
}

// A call and its plan.
struct Call {
  tuna::Attention arguments;
  tuna::AttentionPlan plan;

  explicit Call(const tuna::Attention& a, const int64_t* query_rows)
      : arguments(a), plan(a.tree, query_rows, a.queries, a.key_heads) {}
};

}  // namespace

void bind_attention(py::module_& m) {
  py::class_<Call>(m, "Attention")
      .def(py::init([](uintptr_t subtree_end, uintptr_t depth, int64_t rows, int64_t window, uintptr_t query_rows,
                       int64_t batch, int64_t heads, int64_t key_heads, int64_t queries, int64_t size,
                       int64_t value_size, float scale, float cap, int element, const py::tuple& q,
                       const py::tuple& k, const py::tuple& v, const py::tuple& out, uintptr_t lse) {
             const tuna::Tree tree{at<const int64_t>(subtree_end), at<const int64_t>(depth), rows, window};
             return Call({tree, batch, heads, key_heads, queries, size, value_size, scale, cap,
                          static_cast<tuna::Element>(element), strided(q), strided(k), strided(v), strided(out),
                          at<float>(lse)},
                         at<const int64_t>(query_rows));
           }),
           py::kw_only(), py::arg("subtree_end"), py::arg("depth"), py::arg("rows"), py::arg("window"),
           py::arg("query_rows"), py::arg("batch"), py::arg("heads"), py::arg("key_heads"), py::arg("queries"),
           py::arg("size"), py::arg("value_size"), py::arg("scale"), py::arg("cap"), py::arg("element"), py::arg("q"),
           py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"))
      .def(
          "forward_workspace",
          [](const Call& call, int threads) {
            return tuna::Workspace::forward(call.plan.view(), call.arguments, threads);
          },
          py::arg("threads"))
      .def(
          "backward_workspace",
          [](const Call& call, int threads) {
            return tuna::Workspace::backward(call.plan.view(), call.arguments, threads);
          },
          py::arg("threads"))
      .def(
          "forward",
          [](const Call& call, uintptr_t workspace, int threads, tuna::InstructionSet set) {
            const py::gil_scoped_release release;
            tuna::attention_forward(call.plan.view(), call.arguments, at<float>(workspace), threads, set);
          },
          py::kw_only(), py::arg("workspace"), py::arg("threads"), py::arg("instruction_set"))
      .def(
          "backward",
          [](const Call& call, const py::tuple& grad_out, uintptr_t grad_lse, const py::tuple& dq, const py::tuple& dk,
             const py::tuple& dv, uintptr_t workspace, int threads, tuna::InstructionSet set) {
            const tuna::AttentionGradients gradients{strided(grad_out), strided(dq), strided(dk), strided(dv),
                                                     at<const float>(grad_lse)};
            const py::gil_scoped_release release;
            tuna::attention_backward(call.plan.view(), call.arguments, gradients, at<float>(workspace), threads, set);
          },
          py::kw_only(), py::arg("grad_out"), py::arg("grad_lse"), py::arg("dq"), py::arg("dk"), py::arg("dv"),
          py::arg("workspace"), py::arg("threads"), py::arg("instruction_set"));
}
