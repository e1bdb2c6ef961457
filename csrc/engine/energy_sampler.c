/* Reading the energy counters: a thread of its own looks at them 20 times a second while the engine works, and twice a
 * second while it does not. It holds the engine's lock only to hand the readings over. */
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "engine/engine.h"

#define BUSY_PERIOD_NS 50000000u
#define IDLE_PERIOD_NS 500000000u
#define LINGER_NS 1000000000u /* after the last step */

uint64_t qf_now_ns(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* --- sources --------------------------------------------------------------------------------------------- */

/* Reads source `index`; sources are the device, if it has a counter, then packages. */
static bool read_source(qf_engine *e, int32_t index, uint64_t *energy_uj, char *note, size_t note_bytes)
{
    if (e->sampler.has_device && index == 0) {
        return e->backend->vtable->energy(e->backend, energy_uj, note, note_bytes);
    }
    (void)snprintf(note, note_bytes, "the whole processor package: other processes too, not the memory modules");
    return qf_rapl_read(&e->sampler.rapl, index - e->sampler.has_device, energy_uj);
}

static void add_source(qf_engine *e, const char *name, const char *kind)
{
    uint64_t reading = 0;
    int32_t index = e->meter.num_sources;
    qf_energy_meter *added = qf_meter_add_source(&e->meter, name, kind);
    if (added == NULL) {
        return;
    }
    qf_energy_source *source = &added->source;
    source->measured = read_source(e, index, &reading, source->note, sizeof source->note);
    if (source->measured) {
        qf_meter_reading(&e->meter, index, qf_now_ns(), reading);
        e->sampler.num_measured++;
    } else {
        (void)snprintf(source->kind, sizeof source->kind, "none");
    }
}

void qf_energy_open(qf_engine *e)
{
    char name[24];
    qf_energy_sampler *sampler = &e->sampler;
    qf_rapl_init(&sampler->rapl, QF_RAPL_ROOT);
    sampler->has_device = e->backend->vtable->energy != NULL;
    if (sampler->has_device) {
        (void)snprintf(name, sizeof name, "gpu%d", e->resolved.backend.device_ordinal);
        add_source(e, name, "nvml");
    }
    for (int32_t i = 0; i < sampler->rapl.num_packages; i++) {
        (void)snprintf(name, sizeof name, "cpu%d", sampler->rapl.packages[i].number);
        add_source(e, name, "rapl");
    }
    if (sampler->rapl.num_packages == 0) {
        qf_energy_meter *none = qf_meter_add_source(&e->meter, "cpu", "none");
        if (none != NULL) {
            (void)snprintf(none->source.note, sizeof none->source.note, "%s", sampler->rapl.reason);
        }
    }
}

/* --- the thread ------------------------------------------------------------------------------------------ */

/* Called with the lock held; until the period is over, or work comes after a time without any. */
static void sleep_locked(qf_engine *e, uint64_t period_ns)
{
    qf_energy_sampler *sampler = &e->sampler;
    uint64_t until_ns = qf_now_ns() + period_ns;
    struct timespec until = {.tv_sec = (time_t)(until_ns / 1000000000u), .tv_nsec = (long)(until_ns % 1000000000u)};
    int code = 0;
    sampler->sleeps_long = period_ns > BUSY_PERIOD_NS;
    bool was_long = sampler->sleeps_long;
    while (code == 0 && !sampler->stopping && sampler->sleeps_long == was_long) {
        code = pthread_cond_timedwait(&sampler->wake, &e->lock, &until);
    }
    sampler->sleeps_long = false;
}

/* Called with the lock held, which it gives up while it reads. */
static void sample_locked(qf_engine *e)
{
    struct {
        bool ok;
        uint64_t time_ns, energy_uj;
        char note[sizeof e->meter.sources[0].source.note];
    } readings[QF_MAX_ENERGY_SOURCES];
    int32_t count = e->meter.num_sources; /* does not change any more, nor is `measured` written elsewhere */
    (void)pthread_mutex_unlock(&e->lock);
    for (int32_t i = 0; i < count; i++) {
        readings[i].ok = false;
        if (e->meter.sources[i].source.measured) {
            readings[i].ok = read_source(e, i, &readings[i].energy_uj, readings[i].note, sizeof readings[i].note);
            readings[i].time_ns = qf_now_ns();
        }
    }
    (void)pthread_mutex_lock(&e->lock);
    for (int32_t i = 0; i < count; i++) {
        qf_energy_source *source = &e->meter.sources[i].source;
        if (readings[i].ok) {
            qf_meter_reading(&e->meter, i, readings[i].time_ns, readings[i].energy_uj);
        } else if (source->measured) { /* the sums stay as they were then */
            source->measured = false;
            (void)snprintf(source->note, sizeof source->note, "the counter can no longer be read");
        }
    }
}

static void *sampler_main(void *engine)
{
    qf_engine *e = engine;
    qf_energy_sampler *sampler = &e->sampler;
    uint64_t busy_until_ns = 0, seen_ns = 0;
    (void)pthread_mutex_lock(&e->lock);
    while (!sampler->stopping) {
        uint64_t now = qf_now_ns();
        if (e->meter.steps_in_flight > 0 || e->meter.total.device_ns != seen_ns) {
            seen_ns = e->meter.total.device_ns;
            busy_until_ns = now + LINGER_NS;
        }
        sleep_locked(e, now < busy_until_ns ? BUSY_PERIOD_NS : IDLE_PERIOD_NS);
        if (!sampler->stopping) {
            sample_locked(e);
        }
    }
    (void)pthread_mutex_unlock(&e->lock);
    return NULL;
}

qf_status qf_energy_start(qf_engine *e, qf_error *err)
{
    qf_energy_sampler *sampler = &e->sampler;
    if (sampler->num_measured == 0) {
        return QF_OK; /* nothing to look at */
    }
    sigset_t all, before;
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    int code = pthread_create(&sampler->thread, NULL, sampler_main, e);
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (code != 0) {
        return QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY, "cannot start the thread that reads energy counters: %s",
                       strerror(code));
    }
    sampler->started = true;
    return QF_OK;
}

void qf_energy_wake_locked(qf_engine *e)
{
    if (e->sampler.sleeps_long) {
        e->sampler.sleeps_long = false;
        (void)pthread_cond_signal(&e->sampler.wake);
    }
}

void qf_energy_stop(qf_engine *e)
{
    qf_energy_sampler *sampler = &e->sampler;
    (void)pthread_mutex_lock(&e->lock);
    bool join = sampler->started;
    sampler->started = false;
    sampler->stopping = true;
    (void)pthread_cond_signal(&sampler->wake);
    (void)pthread_mutex_unlock(&e->lock);
    if (join) {
        (void)pthread_join(sampler->thread, NULL);
    }
}
