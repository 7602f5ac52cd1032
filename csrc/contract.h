// The version of ift_kernels/backends/contract.py that these sources implement: an extension that
// was built from others would compute something else without a word, so it is refused.
#pragma once

namespace ift {
constexpr int kContract = 4;
}  // namespace ift
