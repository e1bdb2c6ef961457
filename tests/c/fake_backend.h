/* A backend without a model, for tests of the engine: asynchronous (a device thread runs the steps behind the
 * caller, with delays), and exact about memory. Its KV cache stores the token of each position; a sampled token is
 * a hash of the whole context as read back through the block tables, so a wrong slot, a stale or recycled block, or a
 * placeholder fed wrongly changes the output. */
#ifndef QF_TESTS_FAKE_BACKEND_H
#define QF_TESTS_FAKE_BACKEND_H

#include "backend/backend.h"

/* The token after `context` (num_tokens ids), in [0, vocab_size). */
int32_t fake_next_token(const int32_t *context, int32_t num_tokens, int32_t vocab_size);

const qf_backend_vtable *fake_backend_vtable(void);
const qf_backend_vtable *failing_backend_vtable(void); /* the 5th step reports a failure when collected */

#endif
