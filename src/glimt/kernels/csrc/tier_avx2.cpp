#include "kernels.h"
#include "linear.h"
#include "rows.h"

namespace glimt {
namespace {

#if defined(__x86_64__)
constexpr Kernels kKernels = {
    "avx2",
    linear_avx2,  // linear
    mlp_avx2,  // mlp
    nullptr,  // attention
    nullptr,  // decode
    norm_avx2,  // norm
    rotate_avx2,  // rotate
    write_kv_avx2,  // write_kv
};
#endif

}  // namespace

const Kernels* avx2_kernels() {
#if defined(__x86_64__)
    return &kKernels;
#else
    return nullptr;
#endif
}

}  // namespace glimt
