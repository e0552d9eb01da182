#include "kernels.h"
#include "linear.h"
#include "rows.h"

namespace glimt {
namespace {

constexpr Kernels kKernels = {
    "portable",
    linear_portable,  // linear
    mlp_portable,  // mlp
    nullptr,  // attention
    nullptr,  // decode
    norm_portable,  // norm
    rotate_portable,  // rotate
    write_kv_portable,  // write_kv
};

}  // namespace

const Kernels* portable_kernels() { return &kKernels; }

}  // namespace glimt
