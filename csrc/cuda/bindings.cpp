// Python sees raw addresses, sizes, dtype codes, a device index and a stream handle: no link to
// torch, so one build serves every torch. Compiled by the C++ compiler alone.
#include <pybind11/pybind11.h>

#include "../contract.h"
#include "kernels.h"
#include "records.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.attr("contract") = ift::kContract;
  namespace gpu = ift::gpu;
  using gpu::Products;
  using gpu::Queue;
  using Release = py::call_guard<py::gil_scoped_release>;
  m.doc() = "Epilogues on NVIDIA GPUs; see csrc/cuda/kernels.h. Addresses are integers.";
  // Types are local: tests load these sources a second time, compiled for the CPU.
  py::register_local_exception<gpu::CudaError>(m, "CudaError", PyExc_RuntimeError);
  m.def("built_with", gpu::built_with);
  m.def("driver_version", gpu::driver_version);
  m.def("row_parts", gpu::row_parts);
  m.attr("STATS_BYTES") = gpu::stats_bytes();
  m.attr("MAX_TOP_K") = gpu::max_top_k();

  py::class_<Queue>(m, "Queue", py::module_local()).def(py::init([](int device, uintptr_t stream) {
    return Queue{device, stream};
  }));
  py::class_<Products>(m, "Products", py::module_local())
      .def(py::init([](uintptr_t x, int dtype, int64_t rows, int64_t cols, int64_t ld,
                       uintptr_t bias, float scale, float softcap, float temperature,
                       int64_t offset) {
        return Products{pointer<void>(x),           dtype, rows,    cols,        ld,
                        pointer<const float>(bias), scale, softcap, temperature, offset};
      }));

  m.def(
      "stats",
      [](const Queue& q, const Products& p, uintptr_t target, uintptr_t state, int64_t state_ld,
         uintptr_t argmax, bool more, uintptr_t partials) {
        gpu::stats(q, p, pointer<int64_t>(target), pointer<double>(state), state_ld,
                   pointer<int64_t>(argmax), more, pointer<void>(partials));
      },
      Release());
  m.def(
      "dlogits",
      [](const Queue& q, const Products& p, uintptr_t target, uintptr_t norm, int64_t norm_ld,
         uintptr_t coef, int64_t coef_ld) {
        gpu::dlogits(q, p, pointer<int64_t>(target), pointer<float>(norm), norm_ld,
                     pointer<float>(coef), coef_ld);
      },
      Release());
  m.def(
      "probabilities",
      [](const Queue& q, const Products& p, uintptr_t norm, int64_t norm_ld) {
        gpu::probabilities(q, p, pointer<float>(norm), norm_ld);
      },
      Release());
  m.def(
      "take_selected",
      [](const Queue& q, const Products& p, uintptr_t ids, uintptr_t values, int64_t k,
         float lowest) {
        gpu::take_selected(q, p, pointer<int64_t>(ids), pointer<float>(values), k, lowest);
      },
      Release());
  m.def(
      "put_selected",
      [](const Queue& q, const Products& p, uintptr_t ids, uintptr_t values, int64_t k) {
        gpu::put_selected(q, p, pointer<int64_t>(ids), pointer<float>(values), k);
      },
      Release());
  m.def(
      "gumbel",
      [](const Queue& q, const Products& p, uint64_t seed, uintptr_t rows, uintptr_t best,
         uintptr_t logit, uintptr_t ids, uintptr_t keys) {
        gpu::gumbel(q, p, seed, pointer<int64_t>(rows), pointer<float>(best), pointer<float>(logit),
                    pointer<int64_t>(ids), pointer<void>(keys));
      },
      Release());
  m.def(
      "top_k",
      [](const Queue& q, const Products& p, uintptr_t values, uintptr_t ids, int64_t k) {
        gpu::top_k(q, p, pointer<float>(values), pointer<int64_t>(ids), k);
      },
      Release());

  m.def(
      "active_mask",
      [](const Queue& q, const Products& p, uintptr_t target, uintptr_t level, int64_t block,
         uintptr_t mask) {
        gpu::active_mask(q, p, pointer<int64_t>(target), pointer<float>(level), block,
                         pointer<uint8_t>(mask));
      },
      Release());
  m.def(
      "mask_counts",
      [](const Queue& q, uintptr_t mask, int64_t blocks, int64_t cols, int64_t bucket,
         uintptr_t counts) {
        gpu::mask_counts(q, pointer<uint8_t>(mask), blocks, cols, bucket, pointer<int64_t>(counts));
      },
      Release());
  m.def(
      "split_active",
      [](const Queue& q, const Products& p, uintptr_t mask, uintptr_t ends, uintptr_t starts,
         int64_t block, int64_t bucket, uintptr_t tail_weights, uintptr_t tail_gradient,
         uintptr_t active) {
        gpu::split_active(q, p, pointer<uint8_t>(mask), pointer<int64_t>(ends),
                          pointer<int64_t>(starts), block, bucket, pointer<float>(tail_weights),
                          pointer<float>(tail_gradient), pointer<void>(active));
      },
      Release());

  py::class_<gpu::ResidualTokens>(m, "ResidualTokens", py::module_local())
      .def(py::init([](uintptr_t ids, uintptr_t predicted, uintptr_t labels, uintptr_t offsets,
                       int64_t documents, int64_t tokens, int64_t row_length, int64_t ignore_index,
                       int64_t vocabulary) {
        return gpu::ResidualTokens{pointer<int64_t>(ids),
                                   pointer<int64_t>(predicted),
                                   pointer<int64_t>(labels),
                                   pointer<int64_t>(offsets),
                                   documents,
                                   tokens,
                                   row_length,
                                   ignore_index,
                                   vocabulary};
      }));
  m.def(
      "residual",
      [](const Queue& q, int dtype, uintptr_t table, const gpu::ResidualTokens& tokens,
         uintptr_t out, int64_t width, double lam) {
        gpu::residual(q, dtype, pointer<void>(table), tokens, pointer<void>(out), width, lam);
      },
      Release());
  m.def(
      "residual_keys",
      [](const Queue& q, const gpu::ResidualTokens& tokens, uintptr_t keys) {
        gpu::residual_keys(q, tokens, pointer<int64_t>(keys));
      },
      Release());
  py::class_<gpu::Parts>(m, "Parts", py::module_local())
      .def(py::init([](uintptr_t order, uintptr_t first, uintptr_t keys, int64_t tokens,
                       int64_t vocabulary, double lam) {
        return gpu::Parts{pointer<int64_t>(order),
                          pointer<int64_t>(first),
                          pointer<int64_t>(keys),
                          tokens,
                          vocabulary,
                          static_cast<float>(1.0 - lam),
                          static_cast<float>(lam)};
      }));
  m.def(
      "sum_rows",
      [](const Queue& q, int dtype, uintptr_t parts, const gpu::Parts& in, uintptr_t out,
         int64_t rows, int64_t width) {
        gpu::sum_rows(q, dtype, pointer<void>(parts), in, pointer<void>(out), rows, width);
      },
      Release());
  m.def(
      "bucket_sums",
      [](const Queue& q, int dtype, uintptr_t matrix, int64_t rows, int64_t width, int64_t ld,
         int64_t bucket, uintptr_t tail_weights, uintptr_t sums) {
        gpu::bucket_sums(q, dtype, pointer<void>(matrix), rows, width, ld, bucket,
                         pointer<float>(tail_weights), pointer<float>(sums));
      },
      Release());
  m.def(
      "scan",
      [](const Queue& q, int dtype, uintptr_t x, uintptr_t mask, uintptr_t offsets, uintptr_t out,
         int64_t rows, int64_t length, double gamma, bool left) {
        gpu::scan(q, dtype, pointer<void>(x), pointer<uint8_t>(mask), pointer<int64_t>(offsets),
                  pointer<void>(out), rows, length, gamma, left);
      },
      Release());
}
