// What Python calls. One call at a time: the threads and the scratch memory are shared.
#include <cstring>
#include <mutex>

#include "kernels.h"
#include "layout.h"
#include "limits.h"
#include "processor.h"
#include "threads.h"

namespace glimt {
namespace {

struct Offered {
    const char* name;
    bool (*is_there)();
    const Kernels* (*kernels)();
    LimitLoops (*limits)();
};

bool always() { return true; }

constexpr Offered kOffered[] = {  // best first
    {"amx", has_amx, amx_kernels, amx_limits},
    {"avx512", has_avx512, avx512_kernels, avx512_limits},
    {"avx2", has_avx2, avx2_kernels, avx2_limits},
    {"portable", always, portable_kernels, portable_limits},
};

const Kernels* active = nullptr;
std::mutex one_call;

// The kernels of an instruction set that is compiled in and that this processor has; else null.
const Kernels* kernels_of(const char* name) {
    for (const Offered& one : kOffered)
        if (!std::strcmp(one.name, name)) return one.is_there() ? one.kernels() : nullptr;
    return nullptr;
}

// The loops of an instruction set that this processor has; of the best one where name is empty.
// Its kernels need not be there: the limit is the machine's.
LimitLoops limit_loops(const char* name) {
    for (const Offered& one : kOffered)
        if ((!*name || !std::strcmp(one.name, name)) && one.is_there() && one.limits().read)
            return one.limits();
    return {};
}

template <typename Call>
int run(void (*const Kernels::*kernel)(const Call&), const Call* call) {
    std::lock_guard<std::mutex> lock(one_call);
    if (!active || !(active->*kernel)) return 1;
    (active->*kernel)(*call);
    return 0;
}

}  // namespace
}  // namespace glimt

using namespace glimt;

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// Raised whenever a struct of kernels.h or the packed layout changes.
EXPORT int glimt_abi() { return 5; }

// Is this instruction set compiled in, and does this processor have it?
EXPORT int glimt_has(const char* name) { return kernels_of(name) != nullptr; }

// 0, or 1 where it is not there.
EXPORT int glimt_use(const char* name) {
    std::lock_guard<std::mutex> lock(one_call);
    const Kernels* kernels = kernels_of(name);
    if (kernels) active = kernels;
    return kernels ? 0 : 1;
}

// For tests: as if the processor had no dot products of bfloat16.
EXPORT void glimt_hide_avx512_bf16(int is_hidden) {
    std::lock_guard<std::mutex> lock(one_call);
    hide_avx512_bf16(is_hidden != 0);
}

EXPORT void glimt_set_threads(int count) {
    std::lock_guard<std::mutex> lock(one_call);
    set_num_workers(count);
}

// Worker i stays on processor places[i], but for worker 0, the caller's thread. Where the system
// refuses, it goes on as it was.
EXPORT void glimt_place_threads(const int* places, int count) {
    std::lock_guard<std::mutex> lock(one_call);
    place_workers(places, count);
}

// Bytes per second of one pass over data, 64-byte aligned; 0 where that instruction set is not
// there. name "": the best one.
EXPORT double glimt_read_limit(const char* name, const void* data, int64_t num_bytes) {
    std::lock_guard<std::mutex> lock(one_call);
    return read_limit(limit_loops(name), static_cast<const uint8_t*>(data), num_bytes);
}

// Operations per second; kind: LimitKind. 0 as above.
EXPORT double glimt_math_limit(const char* name, int kind) {
    std::lock_guard<std::mutex> lock(one_call);
    return math_limit(limit_loops(name), kind);
}

EXPORT int64_t glimt_packed_bytes(const PlainWeight* weight) { return packed_bytes(*weight); }

EXPORT void glimt_pack(const PlainWeight* weight, int is_paired, void* out) {
    std::lock_guard<std::mutex> lock(one_call);
    pack(*weight, is_paired != 0, out);
}

// Each: 0, or 1 where the instruction set in use has no such kernel.
EXPORT int glimt_linear(const LinearCall* call) { return run(&Kernels::linear, call); }
EXPORT int glimt_mlp(const MlpCall* call) { return run(&Kernels::mlp, call); }
EXPORT int glimt_attention(const AttentionCall* call) { return run(&Kernels::attention, call); }
EXPORT int glimt_decode(const DecodeCall* call) { return run(&Kernels::decode, call); }
EXPORT int glimt_norm(const NormCall* call) { return run(&Kernels::norm, call); }
EXPORT int glimt_rotate(const RotateCall* call) { return run(&Kernels::rotate, call); }
EXPORT int glimt_write_kv(const WriteKvCall* call) { return run(&Kernels::write_kv, call); }
EXPORT int glimt_fit(const FitCall* call) { return run(&Kernels::fit, call); }

}  // extern "C"
