/* Makes one system call on files below a folder fail. Loaded before libc (LD_PRELOAD); armed through ctypes.
 *
 * Calls are counted by class. fault_arm(prefix, class, number, error, mode): call `number` (from 0) of `class` returns
 * -1 with errno `error`; mode 1: it does half of its bytes instead; mode 2: all later ones fail too (a disk that is full).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE, RENAME, FSYNC, READ, OPEN, CLASSES };
static char prefix[4096];
static atomic_long counts[CLASSES];
static int armed_class = -1, armed_error, armed_mode;
static long armed_number;

void fault_arm(const char *folder, int class, long number, int error, int mode) {
    for (int i = 0; i < CLASSES; i++) counts[i] = 0;
    armed_class = class, armed_number = number, armed_error = error, armed_mode = mode;
    snprintf(prefix, sizeof prefix, "%s", folder);
}
long fault_count(int class) { return counts[class]; }

static int below(const char *path) { return prefix[0] && path && !strncmp(path, prefix, strlen(prefix)); }
static int watched(int fd) {
    char link[64], path[4096];
    if (!prefix[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return below(path);
}
/* 0: go on; 1: fail, errno is set; 2: do half */
static int fault(int class) {
    long number = counts[class]++;
    if (class != armed_class || (armed_mode == 2 ? number < armed_number : number != armed_number)) return 0;
    if (armed_mode == 1) return 2;
    errno = armed_error;
    return 1;
}
static int half(int outcome, size_t *size) {
    if (outcome == 2 && *size > 1) *size /= 2;
    return outcome == 1;
}
#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, #name)
#define IO(name, class, buffer) \
    ssize_t name(int fd, buffer data, size_t size) { \
        REAL(ssize_t, name, int, buffer, size_t); \
        if (watched(fd) && half(fault(class), &size)) return -1; \
        return real(fd, data, size); }
#define PIO(name, class, buffer) \
    ssize_t name(int fd, buffer data, size_t size, off_t at) { \
        REAL(ssize_t, name, int, buffer, size_t, off_t); \
        if (watched(fd) && half(fault(class), &size)) return -1; \
        return real(fd, data, size, at); }
IO(write, WRITE, const void *)
IO(read, READ, void *)
PIO(pwrite, WRITE, const void *)
PIO(pwrite64, WRITE, const void *)
PIO(pread, READ, void *)
PIO(pread64, READ, void *)
#define VIO(name, class) \
    ssize_t name(int fd, const struct iovec *parts, int number) { \
        REAL(ssize_t, name, int, const struct iovec *, int); \
        if (watched(fd)) { \
            int outcome = fault(class); \
            if (outcome == 1) return -1; \
            if (outcome == 2 && number > 1) number /= 2; \
        } \
        return real(fd, parts, number); }
VIO(writev, WRITE)
VIO(readv, READ)
ssize_t sendfile(int to, int from, off_t *at, size_t size) {
    REAL(ssize_t, sendfile, int, int, off_t *, size_t);
    if (watched(to) && half(fault(WRITE), &size)) return -1;
    return real(to, from, at, size);
}
#define SYNC(name) \
    int name(int fd) { \
        REAL(int, name, int); \
        if (watched(fd) && fault(FSYNC) == 1) return -1; \
        return real(fd); }
SYNC(fsync)
SYNC(fdatasync)
int rename(const char *from, const char *to) {
    REAL(int, rename, const char *, const char *);
    if (below(to) && fault(RENAME) == 1) return -1;
    return real(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
    REAL(int, renameat, int, const char *, int, const char *);
    if (below(to) && fault(RENAME) == 1) return -1;
    return real(a, from, b, to);
}
#define OPENING(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, name, const char *, int, ...); \
        va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest); \
        if (below(path) && fault(OPEN) == 1) return -1; \
        return real(path, flags, mode); }
OPENING(open)
OPENING(open64)
#define OPENING_AT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(int, name, int, const char *, int, ...); \
        va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest); \
        if (below(path) && fault(OPEN) == 1) return -1; \
        return real(folder, path, flags, mode); }
OPENING_AT(openat)
OPENING_AT(openat64)
