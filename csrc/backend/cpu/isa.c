/* Which instruction sets this processor and operating system support. */
#include "backend/cpu/cpu.h"

#include <string.h>

#include "backend/cpu/kernels.h"

#if QF_CPU_X86
#include <cpuid.h>
#endif

static const char *const isa_names[QF_ISA_COUNT] = {"scalar", "avx2", "avx512", "avx512_vnni"};

#if QF_CPU_X86
/* __builtin_cpu_supports knows the name from gcc 11 and clang 15 on only. */
static bool has_f16c(void)
{
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

/* __builtin_cpu_supports asks cpuid, and xgetbv for whether the system saves the wide registers. */
qf_isa qf_isa_detect(void)
{
#if QF_CPU_X86
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())) {
        return QF_ISA_SCALAR;
    }
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))) {
        return QF_ISA_AVX2;
    }
    return __builtin_cpu_supports("avx512vnni") ? QF_ISA_AVX512_VNNI : QF_ISA_AVX512;
#else
    return QF_ISA_SCALAR;
#endif
}

const char *qf_isa_name(qf_isa isa)
{
    return (int)isa >= 0 && isa < QF_ISA_COUNT ? isa_names[isa] : "?";
}

bool qf_isa_parse(const char *name, qf_isa *out)
{
    for (int i = 0; name != NULL && i < QF_ISA_COUNT; i++) {
        if (strcmp(name, isa_names[i]) == 0) {
            *out = (qf_isa)i;
            return true;
        }
    }
    return false;
}
