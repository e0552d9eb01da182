#include "kernels.h"

namespace glimt {

#if defined(__AVX512F__)

void norm_avx512(const NormCall&);
void rotate_avx512(const RotateCall&);
void write_kv_avx512(const WriteKvCall&);

namespace {

constexpr Kernels kKernels = {
    "avx512",
    nullptr,  // linear
    nullptr,  // mlp
    nullptr,  // attention
    nullptr,  // decode
    norm_avx512,
    rotate_avx512,
    write_kv_avx512,
};

}  // namespace

const Kernels* avx512_kernels() { return &kKernels; }

#else

const Kernels* avx512_kernels() { return nullptr; }

#endif

}  // namespace glimt
