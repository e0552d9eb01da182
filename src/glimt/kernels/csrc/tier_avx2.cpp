#include "attention.h"
#include "kernels.h"

namespace glimt {

#if defined(__AVX2__)

const Kernels* avx2_kernels() {
    static const Kernels kernels = {
        "avx2",
        nullptr,
        nullptr,
        attention_avx2,
        decode_avx2,
        nullptr,
        nullptr,
    };
    return &kernels;
}

#else

const Kernels* avx2_kernels() { return nullptr; }

#endif

}  // namespace glimt
