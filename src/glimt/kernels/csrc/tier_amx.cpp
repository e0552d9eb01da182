#include "kernels.h"
#include "linear.h"

namespace glimt {
namespace {

#if defined(__x86_64__)
constexpr Kernels kKernels = {
    "amx",
    linear_amx,  // linear
    mlp_amx,  // mlp
    nullptr,  // attention
    nullptr,  // decode
    nullptr,  // norm
    nullptr,  // rotate
};
#endif

}  // namespace

const Kernels* amx_kernels() {
#if defined(__x86_64__)
    return &kKernels;
#else
    return nullptr;
#endif
}

}  // namespace glimt
