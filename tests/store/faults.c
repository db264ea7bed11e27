// Loaded before the C library: the n-th call that changes a file kills the process, fails, or takes long.
// A write that kills leaves half of its bytes.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum { NOTHING, KILL, FAIL, SLOW };
static int mode, countdown, error_number, calls;

void fault_arm(int new_mode, int call, int number) {
  mode = new_mode, countdown = call, error_number = number, calls = 0;
}

int fault_calls(void) { return calls; }

// Whether the call is to fail.
static int fault(void) {
  if (mode == NOTHING) return 0;
  calls++;
  if (--countdown > 0) return 0;
  if (mode == KILL) kill(getpid(), SIGKILL);
  if (mode == SLOW) usleep(error_number);
  if (mode == FAIL) errno = error_number;
  return mode == FAIL;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRAP(type, name, parameters, arguments) \
  type name parameters {                        \
    if (fault()) return -1;                     \
    return REAL(name) arguments;                \
  }

WRAP(int, fsync, (int fd), (fd))
WRAP(int, fdatasync, (int fd), (fd))
WRAP(int, rename, (const char *from, const char *to), (from, to))
WRAP(int, renameat, (int a, const char *from, int b, const char *to), (a, from, b, to))
// A full disk lets go of files.
#define WRAP_REMOVE(name, parameters, arguments)                       \
  int name parameters {                                                \
    if ((mode != FAIL || error_number != ENOSPC) && fault()) return -1; \
    return REAL(name) arguments;                                       \
  }

WRAP_REMOVE(unlink, (const char *path), (path))
WRAP_REMOVE(unlinkat, (int fd, const char *path, int flags), (fd, path, flags))
WRAP(int, mkdir, (const char *path, mode_t mode), (path, mode))
WRAP(int, ftruncate, (int fd, off_t size), (fd, size))
WRAP(int, ftruncate64, (int fd, off64_t size), (fd, size))

#define WRAP_WRITE(name, parameters, half, arguments)            \
  ssize_t name parameters {                                      \
    if (mode == KILL && countdown == 1) REAL(name) half;         \
    if (fault()) return -1;                                      \
    return REAL(name) arguments;                                 \
  }

WRAP_WRITE(write, (int fd, const void *data, size_t n), (fd, data, n / 2), (fd, data, n))
WRAP_WRITE(pwrite, (int fd, const void *data, size_t n, off_t at), (fd, data, n / 2, at), (fd, data, n, at))
WRAP_WRITE(pwrite64, (int fd, const void *data, size_t n, off64_t at), (fd, data, n / 2, at), (fd, data, n, at))

#define WRAP_OPEN(name)                                          \
  int name(const char *path, int flags, ...) {                   \
    va_list rest;                                                \
    va_start(rest, flags);                                       \
    mode_t permissions = va_arg(rest, mode_t);                   \
    va_end(rest);                                                \
    if ((flags & (O_CREAT | O_WRONLY | O_RDWR)) && fault()) return -1; \
    return REAL(name)(path, flags, permissions);                 \
  }

WRAP_OPEN(open)
WRAP_OPEN(open64)
