#include "kernels.h"
#include "linear.h"
#include "rows.h"

namespace glimt {
namespace {

#if defined(__x86_64__)
constexpr Kernels kKernels = {
    "avx512",
    linear_avx512,  // linear
    mlp_avx512,  // mlp
    nullptr,  // attention
    nullptr,  // decode
    norm_avx512,  // norm
    rotate_avx512,  // rotate
    write_kv_avx512,  // write_kv
};
#endif

}  // namespace

const Kernels* avx512_kernels() {
#if defined(__x86_64__)
    return &kKernels;
#else
    return nullptr;
#endif
}

}  // namespace glimt
