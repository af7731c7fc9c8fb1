/* Adds an offset to what a process reads of the wall clock: LD_PRELOAD, with the offset in nanoseconds, a native int64,
   in the file that LIKENESS_CHAOS_CLOCK names. The file is mapped: a step reaches running processes at once.
   Monotonic clocks, and the kernel's file times, stay as they are. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000LL
static const volatile int64_t *offset;
static int (*read_clock)(clockid_t, struct timespec *);

__attribute__((constructor)) static void open_offset(void) {
  const char *path = getenv("LIKENESS_CHAOS_CLOCK");
  read_clock = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
  int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  if (file < 0) return;
  void *mapped = mmap(NULL, sizeof *offset, PROT_READ, MAP_SHARED, file, 0);
  close(file);
  if (mapped != MAP_FAILED) offset = mapped;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  if (!read_clock) open_offset();
  int failed = read_clock(clock, now);
  if (!failed && offset && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
    int64_t total = now->tv_sec * SECOND + now->tv_nsec + *offset;
    now->tv_sec = total / SECOND;
    now->tv_nsec = total % SECOND;
  }
  return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
  struct timespec found;
  int failed = clock_gettime(CLOCK_REALTIME, &found);
  now->tv_sec = found.tv_sec;
  now->tv_usec = found.tv_nsec / 1000;
  return failed;
}

time_t time(time_t *now) {
  struct timespec found;
  clock_gettime(CLOCK_REALTIME, &found);
  if (now) *now = found.tv_sec;
  return found.tv_sec;
}
