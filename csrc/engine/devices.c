/* Which backend an engine gets, and what this build offers. The only engine file that knows a backend by name. */
#include <stdio.h>
#include <string.h>

#include "backend/cpu/cpu.h"
#include "base/threads.h"
#include "engine/engine.h"

#ifndef QF_VERSION
#define QF_VERSION "0"
#endif

#if defined(__clang__)
#define COMPILER __VERSION__ /* names clang itself */
#else
#define COMPILER "gcc " __VERSION__
#endif

qf_status qf_engine_create(const qf_engine_options *options, qf_engine **out, qf_error *err)
{
    return qf_engine_create_with(options, qf_cpu_backend_vtable(), out, err);
}

qf_status qf_engine_estimate(const qf_engine_options *options, qf_memory_report *out, qf_error *err)
{
    qf_checkpoint *checkpoint;
    qf_resolved_options resolved;
    QF_TRY(qf_options_resolve(options, qf_cpu_backend_vtable(), &checkpoint, &resolved, err));
    qf_checkpoint_close(checkpoint);
    qf_memory_report_fill(&resolved, out);
    return QF_OK;
}

void qf_build_info(char *buffer, size_t size_bytes)
{
    char isas[128] = "";
    qf_isa best = qf_isa_detect();
    for (int isa = 0; isa <= (int)best; isa++) {
        size_t used = strlen(isas);
        (void)snprintf(isas + used, sizeof isas - used, "%s\"%s\"", isa > 0 ? ", " : "", qf_isa_name((qf_isa)isa));
    }
    (void)snprintf(buffer, size_bytes,
                   "{\"version\": \"%s\", \"compiler\": \"%s\", \"cuda\": false, \"isa\": \"%s\", \"isas\": [%s], "
                   "\"cpu_count\": %d}",
                   QF_VERSION, COMPILER, qf_isa_name(best), isas, qf_cpu_count());
}
