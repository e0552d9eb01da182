#include "processor.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace glimt {

namespace {

bool is_bf16_hidden = false;

}  // namespace

void hide_avx512_bf16(bool is_hidden) { is_bf16_hidden = is_hidden; }

#if defined(__x86_64__)
namespace {

struct Registers {
    unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
    Registers r;
    if (!__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d)) return {};
    return r;
}

bool bit(unsigned value, int number) { return value >> number & 1; }

// State components that the system saves: bits of XCR0.
unsigned saved_state() {
    if (!bit(cpuid(1, 0).c, 27)) return 0;  // OSXSAVE
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

constexpr unsigned kAvxState = 0x6, kAvx512State = 0xe6, kTileState = 0x60000;

bool saves(unsigned state) { return (saved_state() & state) == state; }

// Linux gives tile memory to processes that ask, before their threads start.
// Source: the kernel's Documentation/arch/x86/xstate.rst.
[[maybe_unused]] bool ask_for_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr int kRequest = 0x1023, kGet = 0x1022, kTileData = 18;
    if (syscall(SYS_arch_prctl, kRequest, kTileData) != 0) return false;
    unsigned long allowed = 0;
    return syscall(SYS_arch_prctl, kGet, &allowed) == 0 && (allowed >> kTileData & 1);
#else
    return false;
#endif
}

bool has_bf16() { return has_avx512() && bit(cpuid(7, 1).a, 5); }

}  // namespace

bool has_avx2() {
    const Registers basic = cpuid(1, 0);
    return saves(kAvxState) && bit(basic.c, 12) && bit(basic.c, 29) && bit(cpuid(7, 0).b, 5);
}

bool has_avx512() {
    const Registers r = cpuid(7, 0);
    const bool f_dq_bw_vl = bit(r.b, 16) && bit(r.b, 17) && bit(r.b, 30) && bit(r.b, 31);
    return has_avx2() && saves(kAvx512State) && f_dq_bw_vl && bit(r.c, 11);
}

bool has_avx512_bf16() {
    static const bool is_there = has_bf16();  // asking takes long in a virtual machine
    return is_there && !is_bf16_hidden;
}

bool has_amx() {
    const Registers r = cpuid(7, 0);
    const bool vectors = has_bf16() && bit(r.c, 1);  // AVX512_VBMI
#if defined(GLIMT_EMULATE_AMX)
    return vectors;
#else
    const bool tiles = bit(r.d, 22) && bit(r.d, 24) && bit(r.d, 25);
    return vectors && tiles && saves(kTileState) && ask_for_tiles();
#endif
}

#else

bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512_bf16() { return false; }
bool has_amx() { return false; }

#endif

}  // namespace glimt
