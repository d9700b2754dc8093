// Python passes addresses as integers (tensor.data_ptr(); 0 for none), so the build does not need torch.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "head/products.h"
#include "head/tiles.h"

namespace py = pybind11;

namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

struct TileArguments {
  uintptr_t x;
  int64_t stride, rows, columns, first_column;
  float scale, cap;
  uintptr_t bias, slot_offsets, slot_targets;

  tuna::Tile tile() const { return {at<float>(x), stride, rows, columns, first_column}; }
  tuna::Transform transform() const { return {scale, cap, at<const float>(bias)}; }
  tuna::RowSlots slots() const { return {at<const int64_t>(slot_offsets), at<const int64_t>(slot_targets)}; }
};

}  // namespace

void bind_attention(py::module_& m);  // attention/bindings.cpp

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "What tuna_kernels' cpu backend computes: tiles of logits (csrc/cpu/head/tiles.h), matrix products (products.h), "
            "tree attention (attention.h)";

  py::class_<TileArguments>(m, "Tile")
      .def(py::init([](uintptr_t x, int64_t stride, int64_t rows, int64_t columns, int64_t first_column, float scale,
                       float cap, uintptr_t bias, uintptr_t slot_offsets, uintptr_t slot_targets) {
             return TileArguments{x, stride, rows, columns, first_column, scale, cap, bias, slot_offsets,
                                  slot_targets};
           }),
           py::kw_only(), py::arg("x"), py::arg("stride"), py::arg("rows"), py::arg("columns"),
           py::arg("first_column"), py::arg("scale"), py::arg("cap"), py::arg("bias"), py::arg("slot_offsets"),
           py::arg("slot_targets"));

  m.def(
      "softmax_tile",
      [](const TileArguments& a, uintptr_t maximum, uintptr_t sum, uintptr_t weighted, uintptr_t rescale,
         uintptr_t target_logit, int threads) {
        tuna::softmax_tile(a.tile(), a.transform(), a.slots(),
                           {at<float>(maximum), at<double>(sum), at<double>(weighted), at<float>(rescale),
                            at<float>(target_logit)},
                           threads);
      },
      py::arg("tile"), py::kw_only(), py::arg("maximum"), py::arg("sum"), py::arg("weighted"), py::arg("rescale"),
      py::arg("target_logit"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "gradient_tile",
      [](const TileArguments& a, uintptr_t maximum, uintptr_t log_sum, uintptr_t softmax_weight,
         uintptr_t entropy_weight, uintptr_t entropy, uintptr_t slot_gradient, bool is_capped, int threads) {
        tuna::gradient_tile(a.tile(), a.transform(), a.slots(),
                            {at<const float>(maximum), at<const float>(log_sum), at<const float>(softmax_weight),
                             at<const float>(entropy_weight), at<const float>(entropy), at<const float>(slot_gradient)},
                            is_capped, threads);
      },
      py::arg("tile"), py::kw_only(), py::arg("maximum"), py::arg("log_sum"), py::arg("softmax_weight"),
      py::arg("entropy_weight"), py::arg("entropy"), py::arg("slot_gradient"), py::arg("is_capped"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "load_rows",
      [](uintptr_t destination, int64_t destination_stride, uintptr_t source, int element, int64_t source_stride,
         uintptr_t index, int64_t rows, int64_t columns, int threads) {
        tuna::load_rows(at<float>(destination), destination_stride, at<const void>(source),
                        static_cast<tuna::Element>(element), source_stride, at<const int64_t>(index), rows, columns,
                        threads);
      },
      py::kw_only(), py::arg("destination"), py::arg("destination_stride"), py::arg("source"), py::arg("element"),
      py::arg("source_stride"), py::arg("index"), py::arg("rows"), py::arg("columns"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "scale_rows",
      [](uintptr_t x, int64_t stride, uintptr_t factor, int64_t rows, int64_t columns, int threads) {
        tuna::scale_rows(at<float>(x), stride, at<const float>(factor), rows, columns, threads);
      },
      py::kw_only(), py::arg("x"), py::arg("stride"), py::arg("factor"), py::arg("rows"), py::arg("columns"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  py::enum_<tuna::InstructionSet>(m, "InstructionSet")
      .value("generic", tuna::InstructionSet::kGeneric)
      .value("avx2", tuna::InstructionSet::kAvx2)
      .value("avx512", tuna::InstructionSet::kAvx512)
      .value("avx512_bf16", tuna::InstructionSet::kAvx512Bf16);
  m.def("best_instruction_set", &tuna::best_instruction_set);
  m.def("has_products", &tuna::has_products, py::arg("instruction_set"));
  m.def("product_scratch", &tuna::product_scratch, py::arg("rows"), py::arg("inner"));

  py::class_<tuna::Matrix>(m, "Matrix")
      .def(py::init([](uintptr_t data, int element, int64_t stride, bool transposed) {
             return tuna::Matrix{at<const void>(data), static_cast<tuna::Element>(element), stride, transposed};
           }),
           py::kw_only(), py::arg("data"), py::arg("element"), py::arg("stride"), py::arg("transposed"));

  m.def(
      "multiply_matrices",
      [](uintptr_t c, int64_t stride, int64_t rows, int64_t columns, int64_t inner, const tuna::Matrix& left,
         const tuna::Matrix& right, bool add, uintptr_t scratch, int threads, tuna::InstructionSet set) {
        tuna::multiply_matrices({at<float>(c), stride, rows, columns, inner, left, right, add}, at<float>(scratch),
                                threads, set);
      },
      py::kw_only(), py::arg("c"), py::arg("stride"), py::arg("rows"), py::arg("columns"), py::arg("inner"),
      py::arg("left"), py::arg("right"), py::arg("add"), py::arg("scratch"), py::arg("threads"),
      py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>());

  bind_attention(m);
}
