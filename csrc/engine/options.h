/* What the files about engine options share. */
#ifndef QF_ENGINE_OPTIONS_H
#define QF_ENGINE_OPTIONS_H

#include "engine/engine.h"

typedef struct qf_choice {
    const char *name;
    int value; /* QF_NOT_BUILT: known, not implemented */
} qf_choice;

enum { QF_NOT_BUILT = -1 };

/* Finds `text` in the NULL-terminated list; an unknown value's message lists the known ones. */
qf_status qf_choose(const char *option, const char *text, const qf_choice *choices, int *out, qf_error *err);

/* dtype, activations, quantization, head and KV cache. */
qf_status qf_options_resolve_formats(const qf_engine_options *o, const qf_model_config *config, bool on_device,
                                     qf_resolved_options *out, qf_error *err);

#endif
