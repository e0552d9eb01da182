#include "attention.h"
#include "kernels.h"

namespace glimt {

#if defined(__AMX_TILE__)

const Kernels* amx_kernels() {
    static const Kernels kernels = {
        "amx",
        nullptr,
        nullptr,
        attention_amx,
        decode_amx,
        nullptr,
        nullptr,
    };
    return &kernels;
}

#else

const Kernels* amx_kernels() { return nullptr; }

#endif

}  // namespace glimt
