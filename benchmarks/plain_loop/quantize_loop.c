/* The floor that `benchmarks/conversion.py` measures the converter against: read rows of BF16, widen, quantize, forget.
 *
 *     quantize_loop PLAN THREADS
 *
 * PLAN has a line for each tensor: path, offset in bytes, rows, elements of a row, ggml type. Threads take chunks of
 * rows in turn; nothing is checked, nothing is written, no memory is shared but the counters. Prints seconds and bytes
 * read.
 */
#define _FILE_OFFSET_BITS 64
#define _GNU_SOURCE
#include "ggml.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { MOST_TENSORS = 4096, CHUNK_ELEMENTS = 2 * 1024 * 1024 };

struct tensor {
    int fd;
    long long offset;
    long long rows;
    long long row;
    enum ggml_type type;
};

static struct tensor tensors[MOST_TENSORS];
static int n_tensors;
static int n_threads;

static void *work(void *argument) {
    const long thread = (long)(size_t)argument;
    ggml_bf16_t *raw = malloc(sizeof *raw * CHUNK_ELEMENTS * 2);
    float *wide = malloc(sizeof *wide * CHUNK_ELEMENTS * 2);
    char *out = malloc(sizeof *wide * CHUNK_ELEMENTS * 2);
    long chunk = 0;
    if (!raw || !wide || !out) {
        exit(1);
    }
    for (int i = 0; i < n_tensors; ++i) {
        const struct tensor *t = &tensors[i];
        const long long step = CHUNK_ELEMENTS / t->row > 0 ? CHUNK_ELEMENTS / t->row : 1;
        for (long long first = 0; first < t->rows; first += step) {
            if (chunk++ % n_threads != thread) {
                continue;
            }
            const long long rows = t->rows - first < step ? t->rows - first : step;
            const size_t size = (size_t)(rows * t->row) * sizeof *raw;
            if (pread(t->fd, raw, size, t->offset + first * t->row * (long long)sizeof *raw) != (ssize_t)size) {
                exit(1);
            }
            ggml_bf16_to_fp32_row(raw, wide, rows * t->row);
            ggml_quantize_chunk(t->type, wide, out, 0, rows, t->row, NULL);
        }
    }
    free(raw);
    free(wide);
    free(out);
    return NULL;
}

int main(int argc, char **argv) {
    FILE *plan = argc == 3 ? fopen(argv[1], "r") : NULL;
    char path[4096];
    int type = 0;
    long long bytes = 0;
    struct timespec began, ended;
    pthread_t threads[64];
    if (!plan || (n_threads = atoi(argv[2])) < 1 || n_threads > 64) {
        fputs("usage: quantize_loop PLAN THREADS\n", stderr);
        return 2;
    }
    while (n_tensors < MOST_TENSORS) {
        struct tensor *t = &tensors[n_tensors];
        if (fscanf(plan, "%4095s %lld %lld %lld %d", path, &t->offset, &t->rows, &t->row, &type) != 5) {
            break;
        }
        t->type = (enum ggml_type)type;
        t->fd = open(path, O_RDONLY);
        bytes += t->rows * t->row * 2;
        ggml_quantize_init(t->type);
        ++n_tensors;
    }
    fclose(plan);
    clock_gettime(CLOCK_MONOTONIC, &began);
    for (long i = 0; i < n_threads; ++i) {
        pthread_create(&threads[i], NULL, work, (void *)(size_t)i);
    }
    for (int i = 0; i < n_threads; ++i) {
        pthread_join(threads[i], NULL);
    }
    clock_gettime(CLOCK_MONOTONIC, &ended);
    printf("%.3f %lld\n", (double)(ended.tv_sec - began.tv_sec) + (double)(ended.tv_nsec - began.tv_nsec) / 1e9, bytes);
    return 0;
}
