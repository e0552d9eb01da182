#include "kernels.h"

namespace glimt {

void norm_portable(const NormCall&);
void rotate_portable(const RotateCall&);
void write_kv_portable(const WriteKvCall&);

namespace {

constexpr Kernels kKernels = {
    "portable",
    nullptr,  // linear
    nullptr,  // mlp
    nullptr,  // attention
    nullptr,  // decode
    norm_portable,
    rotate_portable,
    write_kv_portable,
};

}  // namespace

const Kernels* portable_kernels() { return &kKernels; }

}  // namespace glimt
