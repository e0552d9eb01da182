#include "kernels.h"

namespace glimt {

void linear_portable(const LinearCall&);
void mlp_portable(const MlpCall&);
void norm_portable(const NormCall&);
void rotate_portable(const RotateCall&);
void write_kv_portable(const WriteKvCall&);

namespace {

constexpr Kernels kKernels = {
    "portable",
    linear_portable,
    mlp_portable,
    nullptr,  // attention
    nullptr,  // decode
    norm_portable,
    rotate_portable,
    write_kv_portable,
};

}  // namespace

const Kernels* portable_kernels() { return &kKernels; }

}  // namespace glimt
