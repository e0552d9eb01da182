// The tables of what each instruction set offers. A better set takes over the kernels of the one
// before where it brings nothing of its own.
#include "attention.h"
#include "fit.h"
#include "kernels.h"
#include "linear.h"
#include "rows.h"

namespace glimt {

const Kernels* portable_kernels() {
    static constexpr Kernels kernels = {
        "portable",
        linear_portable,
        mlp_portable,
        attention_portable,
        decode_portable,
        norm_portable,
        rotate_portable,
        write_kv_portable,
        fit_portable,
    };
    return &kernels;
}

#if defined(__x86_64__)

const Kernels* avx2_kernels() {
    static constexpr Kernels kernels = {
        "avx2",
        linear_avx2,
        mlp_avx2,
        attention_avx2,
        decode_avx2,
        norm_avx2,
        rotate_avx2,
        write_kv_avx2,
        fit_avx2,
    };
    return &kernels;
}

const Kernels* avx512_kernels() {
    static constexpr Kernels kernels = {
        "avx512",
        linear_avx512,
        mlp_avx512,
        attention_avx512,
        decode_avx512,
        norm_avx512,
        rotate_avx512,
        write_kv_avx512,
        fit_avx512,
    };
    return &kernels;
}

const Kernels* amx_kernels() {
    static constexpr Kernels kernels = {
        "amx",
        linear_amx,
        mlp_amx,
        attention_amx,
        decode_amx,
        norm_avx512,
        rotate_avx512,
        write_kv_avx512,
        fit_avx512,
    };
    return &kernels;
}

#else

const Kernels* avx2_kernels() { return nullptr; }
const Kernels* avx512_kernels() { return nullptr; }
const Kernels* amx_kernels() { return nullptr; }

#endif

}  // namespace glimt
