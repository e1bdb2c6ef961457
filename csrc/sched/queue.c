#include "sched/queue.h"

#include <stddef.h>

bool qf_seq_before(const qf_seq *a, const qf_seq *b)
{
    return a->priority != b->priority ? a->priority < b->priority : a->arrival < b->arrival;
}

/* `prev` NULL: at the head. */
static void insert_after(qf_seq_queue *self, qf_seq *prev, qf_seq *seq)
{
    seq->prev = prev;
    seq->next = prev != NULL ? prev->next : self->head;
    if (seq->prev != NULL) {
        seq->prev->next = seq;
    } else {
        self->head = seq;
    }
    if (seq->next != NULL) {
        seq->next->prev = seq;
    } else {
        self->tail = seq;
    }
    self->count++;
}

void qf_seq_queue_insert_from_tail(qf_seq_queue *self, qf_seq *seq)
{
    qf_seq *prev = self->tail;
    while (prev != NULL && qf_seq_before(seq, prev)) {
        prev = prev->prev;
    }
    insert_after(self, prev, seq);
}

void qf_seq_queue_insert_from_head(qf_seq_queue *self, qf_seq *seq)
{
    qf_seq *next = self->head;
    while (next != NULL && qf_seq_before(next, seq)) {
        next = next->next;
    }
    insert_after(self, next != NULL ? next->prev : self->tail, seq);
}

void qf_seq_queue_remove(qf_seq_queue *self, qf_seq *seq)
{
    if (seq->prev != NULL) {
        seq->prev->next = seq->next;
    } else {
        self->head = seq->next;
    }
    if (seq->next != NULL) {
        seq->next->prev = seq->prev;
    } else {
        self->tail = seq->prev;
    }
    seq->prev = seq->next = NULL;
    self->count--;
}
