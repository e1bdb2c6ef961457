/* Settling energy: whose it was that a counter moved. */
#include <stdio.h>

#include "engine/meter.h"

#define IDLE_MEMORY_NS 10e9 /* of the mean power without a step: in this time what was before fades to about 1 / e */
#define IDLE_LEAST_NS 0.4e9 /* less says nothing: a counter moves some 10 to 50 times a second, in jumps */

qf_energy_meter *qf_meter_add_source(qf_meter *self, const char *name, const char *kind)
{
    if (self->num_sources == QF_MAX_ENERGY_SOURCES) {
        return NULL;
    }
    qf_energy_meter *added = &self->sources[self->num_sources++];
    *added = (qf_energy_meter){0};
    (void)snprintf(added->source.name, sizeof added->source.name, "%s", name);
    (void)snprintf(added->source.kind, sizeof added->source.kind, "%s", kind);
    return added;
}

uint64_t qf_meter_next_window(const qf_meter *self)
{
    uint64_t first = UINT64_MAX;
    for (int32_t k = 0; k < self->num_sources; k++) {
        const qf_energy_meter *meter = &self->sources[k];
        if (meter->num_pending > 0 && meter->pending[0].end_ns < first) {
            first = meter->pending[0].end_ns;
        }
    }
    return first;
}

static void note_idle_power(qf_energy_meter *meter, uint64_t energy_uj, uint64_t window_ns)
{
    double fading = 1.0 - (double)window_ns / IDLE_MEMORY_NS;
    fading = fading > 0.0 ? fading : 0.0;
    meter->idle_memory_uj = meter->idle_memory_uj * fading + (double)energy_uj;
    meter->idle_memory_ns = meter->idle_memory_ns * fading + (double)window_ns;
    if (meter->idle_memory_ns >= IDLE_LEAST_NS) {
        meter->source.idle_watts = meter->idle_memory_uj * 1e3 / meter->idle_memory_ns;
        meter->source.has_idle_watts = true;
    }
}

/* What of a window's energy would have been taken anyway. */
static uint64_t idle_part(const qf_energy_source *source, uint64_t energy_uj, uint64_t window_ns, uint64_t busy_ns)
{
    uint64_t idle_ns = window_ns > busy_ns ? window_ns - busy_ns : 0;
    if (busy_ns == 0) {
        return energy_uj;
    }
    if (!source->has_idle_watts) {
        return (uint64_t)((unsigned __int128)energy_uj * idle_ns / window_ns);
    }
    double idle_uj = source->idle_watts * (double)idle_ns * 1e-3;
    return idle_uj < (double)energy_uj ? (uint64_t)idle_uj : energy_uj;
}

/* Shares energy out by the device time that source k has not settled yet, and settles it. What is due to requests that
 * are no more goes to the account of all. */
static void settle_requests(qf_meter *self, int32_t k, uint64_t energy_uj)
{
    qf_energy_meter *meter = &self->sources[k];
    int32_t count = 0;
    for (const qf_account *account = self->listed_head; account != NULL; account = account->next) {
        self->scratch.weights[count++] = account->usage.device_ns - account->settled_ns[k];
    }
    self->scratch.weights[count++] = meter->gone_ns;
    qf_share(&self->scratch, count, energy_uj);
    count = 0;
    for (qf_account *account = self->listed_head; account != NULL; account = account->next) {
        account->usage.energy_uj[k] += self->scratch.shares[count++];
        account->settled_ns[k] = account->usage.device_ns;
    }
    meter->gone_ns = 0;
    meter->settled_ns = self->requests.device_ns;
    meter->source.requests_uj += energy_uj;
}

/* Leaves the accounts that are settled for every source, and have no step to come soon, off the list. */
static void trim_list(qf_meter *self)
{
    qf_account *next;
    for (qf_account *account = self->listed_head; account != NULL; account = next) {
        next = account->next;
        if (account->steps_in_flight == 0 && qf_meter_is_final(self, account)) {
            account->listed = false;
            *(account->previous != NULL ? &account->previous->next : &self->listed_head) = next;
            if (next != NULL) {
                next->previous = account->previous;
            }
        }
    }
}

static void settle_window(qf_meter *self, int32_t k, qf_energy_window window)
{
    qf_energy_meter *meter = &self->sources[k];
    qf_energy_source *source = &meter->source;
    uint64_t window_ns = window.end_ns - meter->window_start_ns; /* not 0: readings of one moment are one */
    uint64_t busy_ns = self->requests.device_ns - meter->settled_ns;
    uint64_t idle_uj = idle_part(source, window.energy_uj, window_ns, busy_ns);
    if (busy_ns == 0) {
        note_idle_power(meter, window.energy_uj, window_ns);
    } else {
        settle_requests(self, k, window.energy_uj - idle_uj);
    }
    source->idle_uj += idle_uj;
    source->unsettled_uj -= window.energy_uj;
    meter->window_start_ns = window.end_ns;
}

void qf_meter_settle(qf_meter *self, uint64_t time_ns)
{
    bool settled = false;
    for (int32_t k = 0; k < self->num_sources; k++) {
        qf_energy_meter *meter = &self->sources[k];
        int32_t done = 0;
        while (done < meter->num_pending && meter->pending[done].end_ns <= time_ns) {
            settle_window(self, k, meter->pending[done++]);
            settled = true;
        }
        meter->num_pending -= done;
        for (int32_t i = 0; done > 0 && i < meter->num_pending; i++) {
            meter->pending[i] = meter->pending[done + i];
        }
    }
    if (settled) {
        trim_list(self);
    }
}

void qf_meter_reading(qf_meter *self, int32_t index, uint64_t time_ns, uint64_t reading_uj)
{
    qf_energy_meter *meter = &self->sources[index];
    if (!meter->started) {
        meter->started = true;
        meter->reading_uj = reading_uj;
        meter->window_start_ns = time_ns;
        meter->settled_ns = self->requests.device_ns;
        return;
    }
    const qf_energy_window *last = meter->num_pending > 0 ? &meter->pending[meter->num_pending - 1] : NULL;
    uint64_t since_ns = last != NULL ? last->end_ns : meter->window_start_ns;
    if (reading_uj <= meter->reading_uj || time_ns <= since_ns) {
        return; /* it has not moved */
    }
    qf_energy_window window = {.end_ns = time_ns, .energy_uj = reading_uj - meter->reading_uj};
    meter->reading_uj = reading_uj;
    meter->source.total_uj += window.energy_uj;
    meter->source.unsettled_uj += window.energy_uj;
    if (meter->num_pending == QF_MAX_PENDING_WINDOWS) { /* a very long step: the last two become one */
        window.energy_uj += meter->pending[--meter->num_pending].energy_uj;
    }
    meter->pending[meter->num_pending++] = window;
    if (self->steps_in_flight == 0) {
        qf_meter_settle(self, time_ns);
    }
}
