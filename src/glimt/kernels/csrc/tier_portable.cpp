#include "attention.h"
#include "kernels.h"

namespace glimt {

const Kernels* portable_kernels() {
    static const Kernels kernels = {
        "portable",
        nullptr,
        nullptr,
        attention_portable,
        decode_portable,
        nullptr,
        nullptr,
    };
    return &kernels;
}

}  // namespace glimt
