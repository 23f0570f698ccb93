/* A disk that fails, for a process that is started with this library in LD_PRELOAD.

   DRILL_FOLDER   only files below this folder fail
   DRILL_PROGRAM  only in processes with this word in their command line
   DRILL_AT       the n-th call that writes fails, counted from 1
   DRILL_COUNT    and so many in all
   DRILL_ERRNO    with this error
*/
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long calls;
static int is_active = -1;
static long first, count;
static int code;
static const char *folder;

static int active(void) {
  if (is_active < 0) {
    char line[4096] = {0};
    const char *program = getenv("DRILL_PROGRAM");
    folder = getenv("DRILL_FOLDER");
    is_active = 0;
    if (!program || !folder) return 0;
    first = atol(getenv("DRILL_AT"));
    count = atol(getenv("DRILL_COUNT"));
    code = atoi(getenv("DRILL_ERRNO"));
    int (*real_open)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    int file = real_open("/proc/self/cmdline", O_RDONLY);
    ssize_t size = file < 0 ? 0 : read(file, line, sizeof line - 1);
    if (file >= 0) close(file);
    for (ssize_t i = 0; i < size; i++)
      if (!line[i]) line[i] = ' ';
    is_active = strstr(line, program) != NULL;
  }
  return is_active;
}

static int fails_now(void) {
  long call = atomic_fetch_add(&calls, 1) + 1;
  if (call < first || call >= first + count) return 0;
  errno = code;
  return 1;
}

static int path_fails(const char *path) {
  return active() && strncmp(path, folder, strlen(folder)) == 0 && fails_now();
}

static int file_fails(int file) {
  char link[64], path[4096];
  struct stat about;
  if (!active() || fstat(file, &about) || !(S_ISREG(about.st_mode) || S_ISDIR(about.st_mode))) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size <= 0) return 0;
  path[size] = 0;
  return path_fails(path);
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

ssize_t write(int file, const void *data, size_t size) {
  REAL(write);
  return file > 2 && file_fails(file) ? -1 : real(file, data, size);
}

ssize_t writev(int file, const struct iovec *parts, int n) {
  REAL(writev);
  return file > 2 && file_fails(file) ? -1 : real(file, parts, n);
}

int fsync(int file) {
  REAL(fsync);
  return file_fails(file) ? -1 : real(file);
}

int rename(const char *from, const char *to) {
  REAL(rename);
  return path_fails(to) ? -1 : real(from, to);
}

int mkdir(const char *path, mode_t mode) {
  REAL(mkdir);
  return path_fails(path) ? -1 : real(path, mode);
}

static int opened(const char *name, const char *path, int flags, va_list more) {
  int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, name);
  mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;
  if ((flags & O_CREAT) && path_fails(path)) return -1;
  return real(path, flags, mode);
}

int open(const char *path, int flags, ...) {
  va_list more;
  va_start(more, flags);
  int file = opened("open", path, flags, more);
  va_end(more);
  return file;
}

int open64(const char *path, int flags, ...) {
  va_list more;
  va_start(more, flags);
  int file = opened("open64", path, flags, more);
  va_end(more);
  return file;
}
