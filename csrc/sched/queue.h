/* Doubly linked queues of sequences, through the links in qf_seq. A sequence is in at most one. */
#ifndef QF_SCHED_QUEUE_H
#define QF_SCHED_QUEUE_H

#include <stdbool.h>
#include <stdint.h>

#include "sched/scheduler.h"

typedef struct qf_seq_queue {
    qf_seq *head, *tail;
    int32_t count;
} qf_seq_queue;

/* True if `a` ranks before `b`: lower priority value, then earlier arrival. */
bool qf_seq_before(const qf_seq *a, const qf_seq *b);

/* Inserts in order of rank, searching from the tail: O(1) for a new arrival of the lowest priority present. */
void qf_seq_queue_insert_from_tail(qf_seq_queue *self, qf_seq *seq);
/* The same, searching from the head: for preempted sequences, which arrived before most that wait. */
void qf_seq_queue_insert_from_head(qf_seq_queue *self, qf_seq *seq);
void qf_seq_queue_remove(qf_seq_queue *self, qf_seq *seq);

#endif
