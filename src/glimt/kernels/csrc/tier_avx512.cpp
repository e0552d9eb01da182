#include "attention.h"
#include "kernels.h"

namespace glimt {

#if defined(__AVX512F__)

const Kernels* avx512_kernels() {
    static const Kernels kernels = {
        "avx512",
        nullptr,
        nullptr,
        attention_avx512,
        decode_avx512,
        nullptr,
        nullptr,
    };
    return &kernels;
}

#else

const Kernels* avx512_kernels() { return nullptr; }

#endif

}  // namespace glimt
