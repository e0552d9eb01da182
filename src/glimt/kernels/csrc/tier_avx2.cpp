#include "kernels.h"

namespace glimt {

#if defined(__AVX2__)

void linear_avx2(const LinearCall&);
void mlp_avx2(const MlpCall&);
void norm_avx2(const NormCall&);
void rotate_avx2(const RotateCall&);
void write_kv_avx2(const WriteKvCall&);

namespace {

constexpr Kernels kKernels = {
    "avx2",
    linear_avx2,
    mlp_avx2,
    nullptr,  // attention
    nullptr,  // decode
    norm_avx2,
    rotate_avx2,
    write_kv_avx2,
};

}  // namespace

const Kernels* avx2_kernels() { return &kKernels; }

#else

const Kernels* avx2_kernels() { return nullptr; }

#endif

}  // namespace glimt
