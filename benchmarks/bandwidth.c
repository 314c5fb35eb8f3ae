// How fast so many threads read memory: each sums up an array of its own, all past the caches.
//
//   cc -O3 -march=native -ffast-math -pthread bandwidth.c -o bandwidth && ./bandwidth THREADS
//
// Prints GB/s of each of several readings, a line each.

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { kBytes = 512 << 20, kReadings = 8, kMost = 64, kTogether = 128 };

static size_t n;  // floats of a thread
static float *arrays[kMost];
static double began[kMost], ended[kMost];
static pthread_barrier_t start;
static volatile float sink;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

static float sum(const float *x) {
  float sums[kTogether] = {0}, total = 0;
  for (size_t i = 0; i < n; i += kTogether) {
    for (int j = 0; j < kTogether; j += 16) __builtin_prefetch(x + i + j + 1024);
    for (int j = 0; j < kTogether; ++j) sums[j] += x[i + j];
  }
  for (int j = 0; j < kTogether; ++j) total += sums[j];
  return total;
}

static void *reader(void *its) {
  const long i = (long)its;
  pthread_barrier_wait(&start);
  began[i] = now();
  sink = sum(arrays[i]);
  ended[i] = now();
  return NULL;
}

int main(int argc, char **argv) {
  const int threads = argc > 1 ? atoi(argv[1]) : 0;
  if (threads < 1 || threads > kMost) return fputs("give a number of threads\n", stderr), 2;
  n = kBytes / sizeof(float) / threads / kTogether * kTogether;
  for (int i = 0; i < threads; ++i) {
    if (!(arrays[i] = aligned_alloc(64, n * sizeof(float)))) return perror("memory"), 1;
    for (size_t j = 0; j < n; ++j) arrays[i][j] = 1;
  }
  for (int r = 0; r < kReadings; ++r) {
    pthread_t running[kMost];
    pthread_barrier_init(&start, NULL, threads);
    for (long i = 0; i < threads; ++i) pthread_create(running + i, NULL, reader, (void *)i);
    for (int i = 0; i < threads; ++i) pthread_join(running[i], NULL);
    double first = began[0], last = ended[0];
    for (int i = 1; i < threads; ++i) {
      if (began[i] < first) first = began[i];
      if (ended[i] > last) last = ended[i];
    }
    printf("%.2f\n", 4e-9 * n * threads / (last - first));
  }
}
