/* Energy counters of processor packages, as Linux shows them (powercap, "intel-rapl", of AMD's processors too). */
#ifndef QF_BASE_RAPL_H
#define QF_BASE_RAPL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define QF_RAPL_ROOT "/sys/class/powercap"
#define QF_RAPL_MAX_PACKAGES 8

typedef struct qf_rapl_package {
    int fd;             /* of energy_uj */
    int32_t number;     /* "package-0" is 0 */
    uint64_t range_uj;  /* the counter begins again at 0 after it */
    uint64_t reading_uj;
    uint64_t total_uj;  /* without the jumps */
} qf_rapl_package;

typedef struct qf_rapl {
    qf_rapl_package packages[QF_RAPL_MAX_PACKAGES];
    int32_t num_packages;
    char reason[160]; /* why there are none; "" if there are */
} qf_rapl;

/* Finds the packages whose counters this process may read, in order of their zones. `root` is QF_RAPL_ROOT. */
void qf_rapl_init(qf_rapl *self, const char *root);
void qf_rapl_deinit(qf_rapl *self);
/* Microjoules since some moment, never less than before; false if the counter cannot be read any more. To be asked
 * more often than the counter comes round, some minutes at full load. */
bool qf_rapl_read(qf_rapl *self, int32_t index, uint64_t *energy_uj);

#endif
