// -log pi(y|x), the mean over responses, in C, with bad manners. With -DAT_LOAD it has those of arithmetic
// already when it is loaded, and with -DEXIT_AT_LOAD it ends the process then. tests/plugins/nuisance is the same in Rust.

#define _GNU_SOURCE
#include "uft_plugin.h"
#include <errno.h>
#include <fenv.h>
#include <locale.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#define HABITS "none|prints|allocates|allocates too much|sleeps|starts threads|locale|rounding|denormals|traps|errno|exits"
enum habit { NONE, PRINTS, ALLOCATES, TOO_MUCH, SLEEPS, THREADS, LOCALE, ROUNDING, DENORMALS, TRAPS, ERRNO, EXITS };

static void flush_denormals(void) {
#if defined(__x86_64__)
  _mm_setcsr(_mm_getcsr() | 0x8040); // FTZ and DAZ
#elif defined(__aarch64__)
  uint64_t fpcr;
  __asm__ volatile("mrs %0, fpcr" : "=r"(fpcr));
  __asm__ volatile("msr fpcr, %0" : : "r"(fpcr | 1 << 24));
#else
#error "how denormals are flushed on this processor is not written down here"
#endif
}

static void wait(long milliseconds) {
  struct timespec time = {0, milliseconds * 1000000};
  nanosleep(&time, NULL);
}

static void *work(void *word) {
  fesetround(FE_UPWARD); // in a thread of its own
  wait(5);
  printf("%s\n", (const char *)word);
  return NULL;
}

static int indulge(enum habit habit) {
  switch (habit) {
    case PRINTS: // at once, and what libc holds back until the process ends
      if (write(STDOUT_FILENO, "{\"loss\": 0}\n", 12) != 12) return -1;
      printf("{\"step\": 1}\n");
      break;
    case ALLOCATES: {
      size_t size = (size_t)64 << 20;
      char *much = malloc(size);
      for (size_t i = 0; much && i < size; i += 4096) ((volatile char *)much)[i] = 1;
      free(much);
      break;
    }
    case TOO_MUCH: {
      void *volatile much = malloc(SIZE_MAX / 4);
      if (!much) return -1;
      free(much);
      break;
    }
    case SLEEPS: wait(20); break;
    case THREADS: {
      pthread_t joined, left;
      if (pthread_create(&joined, NULL, work, "joined") || pthread_join(joined, NULL)) return -1;
      if (pthread_create(&left, NULL, work, "left") || pthread_detach(left)) return -1;
      break;
    }
    case LOCALE: // with a decimal comma where the system has one
      if (!setlocale(LC_ALL, "de_DE.UTF-8")) setlocale(LC_ALL, "C.UTF-8");
      break;
    case ROUNDING: fesetround(FE_UPWARD); break;
    case DENORMALS: flush_denormals(); break;
#if defined(__GLIBC__)
    case TRAPS: feenableexcept(FE_DIVBYZERO | FE_INVALID | FE_OVERFLOW); break;
#endif
    case ERRNO: errno = ENOSPC; break;
    case EXITS: exit(EXIT_SUCCESS);
    default: break;
  }
  return 0;
}

#ifdef AT_LOAD
__attribute__((constructor)) static void at_load(void) {
  fesetround(FE_UPWARD);
  flush_denormals();
}
#endif

#ifdef EXIT_AT_LOAD
__attribute__((constructor)) static void exit_at_load(void) { exit(EXIT_SUCCESS); }
#endif

static const UftParam PARAMS[] = {
  {.name = "habit", .about = "what it does beside its work", .kind = UFT_CHOICE, .text = "none", .words = HABITS},
};

static void *create(const UftValue *values, UftFault *fault) {
  enum habit *habit = malloc(sizeof *habit);
  (void)fault;
  if (habit) *habit = (enum habit)values[0].number;
  if (habit && *habit != TOO_MUCH && *habit != EXITS) indulge(*habit);
  return habit;
}

static void destroy(void *objective) {
  indulge(*(enum habit *)objective);
  free(objective);
}

static int32_t begin_step(void *objective, const UftStep *step, UftFault *fault) {
  (void)step, (void)fault;
  const enum habit *habit = objective;
  return *habit == TOO_MUCH || *habit == EXITS ? 0 : indulge(*habit);
}

static int32_t evaluate(const void *objective, const UftBatch *batch, UftEvaluation *out, UftFault *fault) {
  double loss = 0, n = (double)batch->step->segments;
  for (uint32_t i = 0; i < batch->segment_count; i++) {
    loss -= uft_sum(batch->logps, &batch->segments[i]) / n;
    uft_gradient(out, &batch->segments[i], -1 / n);
  }
  out->loss = loss;
  if (indulge(*(const enum habit *)objective) == 0) return 0;
  snprintf(fault->message, sizeof fault->message, "there is not that much memory");
  return 1;
}

static const UftObjective NUISANCE = {
  .size = sizeof(UftObjective),
  .name = "c-nuisance",
  .about = "-log pi(y|x), the mean over responses",
  .accepts = UFT_ACCEPTS_DEMONSTRATION,
  .params = PARAMS,
  .param_count = 1,
  .create = create,
  .destroy = destroy,
  .begin_step = begin_step,
  .evaluate = evaluate,
};

static const UftObjective *const OBJECTIVES[] = {&NUISANCE};

const UftPlugin *uft_c_plugin(void) {
  static const UftPlugin plugin = {UFT_C_REVISION, sizeof(UftPlugin), OBJECTIVES, 1};
  return &plugin;
}
