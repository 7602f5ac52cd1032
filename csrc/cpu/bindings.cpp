// Python sees raw addresses, sizes and dtype codes: no link to torch, so one build serves every
// torch.
#include <pybind11/pybind11.h>

#include "../contract.h"
#include "epilogues.h"
#include "scans.h"
#include "selected.h"
#include "temporal.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Asks for huge pages behind a fresh allocation, where the system leaves that to the program: the
// first touch of 256 MiB then costs a third. Only advice: nothing depends on it.
void advise_huge_pages(uintptr_t address, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t first = (address + kPage - 1) & ~(kPage - 1);
  const uintptr_t last = (address + bytes) & ~(kPage - 1);
  if (last > first) (void)madvise(pointer<void>(first), last - first, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.attr("contract") = ift::kContract;
  using ift::Chunk;
  using Release = py::call_guard<py::gil_scoped_release>;
  m.doc() = "Epilogues over chunks of products; see csrc/cpu/epilogues.h. Addresses are integers.";
  m.def("isa", [] { return ift::isa_name(); });

  m.def("advise_huge_pages", advise_huge_pages, py::arg("address"), py::arg("bytes"));

  py::class_<Chunk>(m, "Chunk")
      .def(py::init([](uintptr_t x, int dtype, int64_t rows, int64_t cols, int64_t ld,
                       uintptr_t bias, float scale, float softcap, float temperature,
                       int64_t offset, int threads) {
        return Chunk{
            pointer<void>(x), dtype,       rows,   cols,   ld, pointer<const float>(bias), scale,
            softcap,          temperature, offset, threads};
      }));
  m.def(
      "stats",
      [](const Chunk& c, uintptr_t target, uintptr_t state, int64_t state_ld, uintptr_t argmax,
         int track) {
        ift::epilogues().stats(c, pointer<int64_t>(target), pointer<double>(state), state_ld,
                               pointer<int64_t>(argmax), track);
      },
      Release());
  m.def(
      "exponentials",
      [](const Chunk& c, uintptr_t target, uintptr_t state, int64_t state_ld, uintptr_t centre,
         uintptr_t total, int64_t width) {
        ift::epilogues().exponentials(c, pointer<int64_t>(target), pointer<double>(state), state_ld,
                                      pointer<float>(centre), pointer<float>(total), width);
      },
      Release());
  m.def(
      "dlogits",
      [](const Chunk& c, uintptr_t target, uintptr_t norm, int64_t norm_ld, uintptr_t coef,
         int64_t coef_ld, uintptr_t transposed, int64_t transposed_ld) {
        ift::epilogues().dlogits(
            c, {pointer<int64_t>(target), pointer<float>(norm), norm_ld, pointer<float>(coef),
                coef_ld, pointer<void>(transposed), transposed_ld});
      },
      Release());
  m.def(
      "probabilities",
      [](const Chunk& c, uintptr_t norm, int64_t norm_ld) {
        ift::epilogues().probabilities(c, pointer<float>(norm), norm_ld);
      },
      Release());
  m.def(
      "take_selected",
      [](const Chunk& c, uintptr_t ids, uintptr_t values, int64_t k, float lowest) {
        ift::take_selected(c, pointer<int64_t>(ids), pointer<float>(values), k, lowest);
      },
      Release());
  m.def(
      "put_selected",
      [](const Chunk& c, uintptr_t ids, uintptr_t values, int64_t k, uintptr_t transposed,
         int64_t transposed_ld) {
        ift::put_selected(c, pointer<int64_t>(ids), pointer<float>(values), k,
                          pointer<void>(transposed), transposed_ld);
      },
      Release());
  m.def(
      "top_k",
      [](const Chunk& c, uintptr_t values, uintptr_t ids, int64_t k) {
        ift::epilogues().top_k(c, pointer<float>(values), pointer<int64_t>(ids), k);
      },
      Release());
  m.def(
      "gumbel",
      [](const Chunk& c, uint64_t seed, uintptr_t rows, uintptr_t best, uintptr_t logit,
         uintptr_t ids) {
        ift::epilogues().gumbel(c, seed, pointer<int64_t>(rows), pointer<float>(best),
                                pointer<float>(logit), pointer<int64_t>(ids));
      },
      Release());

  m.def(
      "active_mask",
      [](const Chunk& c, uintptr_t target, uintptr_t level, int64_t block, uintptr_t mask) {
        ift::epilogues().active_mask(c, pointer<int64_t>(target), pointer<float>(level), block,
                                     pointer<uint8_t>(mask));
      },
      Release());
  m.def(
      "split_active",
      [](const Chunk& c, uintptr_t mask, int64_t block, int64_t bucket, uintptr_t tail_weights,
         uintptr_t tail_gradient, uintptr_t active, int64_t capacity) {
        if (!ift::epilogues().split_active(
                c, pointer<uint8_t>(mask), block, bucket, pointer<float>(tail_weights),
                pointer<float>(tail_gradient), pointer<void>(active), capacity))
          throw std::runtime_error("active: too few elements for the active columns, got " +
                                   std::to_string(capacity));
      },
      Release());
  m.def(
      "bucket_sums",
      [](int dtype, uintptr_t matrix, int64_t count, int64_t width, int64_t ld, int64_t bucket,
         uintptr_t tail_weights, uintptr_t sums, int threads) {
        ift::epilogues().bucket_sums(dtype, pointer<void>(matrix), count, width, ld, bucket,
                                     pointer<float>(tail_weights), pointer<float>(sums), threads);
      },
      Release());

  py::class_<ift::DivergenceRows>(m, "DivergenceRows")
      .def(py::init([](int kind, float beta, uintptr_t norm, int64_t norm_ld, uintptr_t value,
                       uintptr_t centre, uintptr_t upstream) {
        return ift::DivergenceRows{kind,
                                   beta,
                                   pointer<const float>(norm),
                                   norm_ld,
                                   pointer<double>(value),
                                   pointer<double>(centre),
                                   pointer<const float>(upstream)};
      }));
  m.def(
      "divergence_terms",
      [](const Chunk& student, const Chunk& teacher, const ift::DivergenceRows& rows) {
        ift::epilogues().divergence_terms(student, teacher, rows);
      },
      Release());
  m.def(
      "divergence_gradient",
      [](const Chunk& student, const Chunk& teacher, const ift::DivergenceRows& rows) {
        ift::epilogues().divergence_gradient(student, teacher, rows);
      },
      Release());
  m.def(
      "transpose",
      [](const Chunk& c, uintptr_t out, int64_t out_ld) {
        ift::epilogues().transpose(c, pointer<void>(out), out_ld);
      },
      Release());

  // Scans and the temporal residual: whole operations rather than epilogues.
  m.def(
      "scan",
      [](uintptr_t x, uintptr_t mask, uintptr_t offsets, uintptr_t out, int64_t rows,
         int64_t length, double gamma, bool left, int dtype, int threads) {
        ift::scan(pointer<void>(x), pointer<uint8_t>(mask), pointer<int64_t>(offsets),
                  pointer<void>(out), rows, length, gamma, left, dtype, threads);
      },
      Release());
  py::class_<ift::ResidualTokens>(m, "ResidualTokens")
      .def(
          py::init([](uintptr_t ids, uintptr_t predicted, uintptr_t labels, uintptr_t offsets,
                      int64_t documents, int64_t tokens, int64_t row_length, int64_t ignore_index) {
            return ift::ResidualTokens{pointer<int64_t>(ids),
                                       pointer<int64_t>(predicted),
                                       pointer<int64_t>(labels),
                                       pointer<int64_t>(offsets),
                                       documents,
                                       tokens,
                                       row_length,
                                       ignore_index};
          }));
  m.def(
      "residual",
      [](uintptr_t table, const ift::ResidualTokens& tokens, uintptr_t out, int64_t width,
         double lam, int dtype, int threads) {
        ift::residual(pointer<void>(table), tokens, pointer<void>(out), width, lam, dtype, threads);
      },
      Release());
  m.def(
      "residual_grad",
      [](uintptr_t grad, const ift::ResidualTokens& tokens, uintptr_t table_grad,
         int64_t vocabulary, int64_t width, double lam, int dtype, int threads) {
        ift::residual_grad(pointer<void>(grad), tokens, pointer<void>(table_grad), vocabulary,
                           width, lam, dtype, threads);
      },
      Release());
}
