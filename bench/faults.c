/* Preloaded into a process, makes one of its file operations below a folder fail, or the process die at it.

   Sees what Python, Rust and C++ libraries do alike, since all of them call the C library; writes through the C
   library's own buffers (stdio) are not seen. bench/faults.py compiles and drives it. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, TORN, FULL, EIO_ONCE, SHORT };
enum { NONE, HALF };

static char root[PATH_MAX];
static int kind = COUNT, log_fd = -1, armed = 0;
static long at = 0, counts[6];

void fault_arm(const char *folder, int which, long nth, int log) {
    snprintf(root, sizeof root, "%s", folder);
    memset(counts, 0, sizeof counts);
    kind = which, at = nth, log_fd = log, armed = 1;
}

long fault_count(int which) { return counts[which]; }

static int locate(int dir, const char *path, char *out) {
    char link[64];
    ssize_t size;
    if (path && path[0] == '/') return snprintf(out, PATH_MAX, "%s", path), 1;
    snprintf(link, sizeof link, dir == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", dir);
    size = readlink(link, out, PATH_MAX - 1);
    if (size < 0) return 0;
    out[size] = 0;
    if (path) {
        strncat(out, "/", PATH_MAX - strlen(out) - 1);
        strncat(out, path, PATH_MAX - strlen(out) - 1);
    }
    return 1;
}

static void die(void) {
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;) pause();
}

/* 0 to go on, HALF for half of a write, else -1 with errno set. */
static int hit(const char *what, int dir, const char *path, int space, int writes) {
    char where[PATH_MAX];
    int saved = errno, length = strlen(root);
    if (!armed || !locate(dir, path, where) || strncmp(where, root, length) || (where[length] && where[length] != '/')) {
        errno = saved;
        return NONE;
    }
    errno = saved;
    counts[KILL]++, counts[EIO_ONCE]++;
    if (space) counts[FULL]++;
    if (writes) counts[TORN]++, counts[SHORT]++;
    if (log_fd >= 0) {
        char line[PATH_MAX + 64];
        int size = snprintf(line, sizeof line, "%c%s\t%s\n", writes ? 'w' : space ? 's' : '-', what, where);
        syscall(SYS_write, log_fd, line, size);
    }
    if (kind == FULL && space && counts[FULL] >= at) return errno = ENOSPC, -1;
    if (counts[kind] != at || kind == COUNT) return NONE;
    if (kind == KILL) die();
    if (kind == EIO_ONCE) return errno = EIO, -1;
    if (kind == SHORT && writes) return HALF;
    if (kind == TORN && writes) return HALF;
    return NONE;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

#define OPEN(name, signature, call, dir) \
    int name signature { \
        mode_t mode = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { \
            va_list rest; \
            va_start(rest, flags); \
            mode = va_arg(rest, mode_t); \
            va_end(rest); \
        } \
        if (((flags & O_ACCMODE) != O_RDONLY || flags & O_CREAT) && hit("open", dir, path, !!(flags & O_CREAT), 0) < 0) return -1; \
        return call; \
    }

static int real_openat(int dir, const char *path, int flags, mode_t mode) {
    return syscall(SYS_openat, dir, path, flags, mode);
}
OPEN(open, (const char *path, int flags, ...), real_openat(AT_FDCWD, path, flags, mode), AT_FDCWD)
OPEN(open64, (const char *path, int flags, ...), real_openat(AT_FDCWD, path, flags, mode), AT_FDCWD)
OPEN(openat, (int dir, const char *path, int flags, ...), real_openat(dir, path, flags, mode), dir)
OPEN(openat64, (int dir, const char *path, int flags, ...), real_openat(dir, path, flags, mode), dir)

#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(FILE *, name, const char *, const char *); \
        if (strpbrk(mode, "wa+") && hit("fopen", AT_FDCWD, path, 1, 0) < 0) return NULL; \
        return real(path, mode); \
    }
FOPEN(fopen)
FOPEN(fopen64)

static ssize_t half(int what, ssize_t size) {
    (void)what;
    if (kind == TORN) die();
    return size;
}

#define WRITE(name, signature, whole, partly) \
    ssize_t name signature { \
        int found = hit("write", fd, NULL, 1, size > 1); \
        if (found < 0) return -1; \
        return found == HALF ? half(found, partly) : (whole); \
    }
WRITE(write, (int fd, const void *data, size_t size), syscall(SYS_write, fd, data, size), syscall(SYS_write, fd, data, size / 2))
WRITE(pwrite, (int fd, const void *data, size_t size, off_t from), syscall(SYS_pwrite64, fd, data, size, from),
      syscall(SYS_pwrite64, fd, data, size / 2, from))
WRITE(pwrite64, (int fd, const void *data, size_t size, off64_t from), syscall(SYS_pwrite64, fd, data, size, from),
      syscall(SYS_pwrite64, fd, data, size / 2, from))

ssize_t writev(int fd, const struct iovec *parts, int count) {
    if (hit("write", fd, NULL, 1, 0) < 0) return -1;
    return syscall(SYS_writev, fd, parts, count);
}

#define CALL(name, signature, what, dir, path, space, call) \
    int name signature { return hit(what, dir, path, space, 0) < 0 ? -1 : (int)(call); }

CALL(fsync, (int fd), "fsync", fd, NULL, 0, syscall(SYS_fsync, fd))
CALL(fdatasync, (int fd), "fsync", fd, NULL, 0, syscall(SYS_fdatasync, fd))
CALL(ftruncate, (int fd, off_t size), "truncate", fd, NULL, 0, syscall(SYS_ftruncate, fd, size))
CALL(ftruncate64, (int fd, off64_t size), "truncate", fd, NULL, 0, syscall(SYS_ftruncate, fd, size))
CALL(rename, (const char *from, const char *to), "rename", AT_FDCWD, to, 0, syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0))
CALL(renameat, (int a, const char *from, int b, const char *to), "rename", b, to, 0, syscall(SYS_renameat2, a, from, b, to, 0))
CALL(renameat2, (int a, const char *from, int b, const char *to, unsigned flags), "rename", b, to, 0,
     syscall(SYS_renameat2, a, from, b, to, flags))
CALL(link, (const char *from, const char *to), "link", AT_FDCWD, to, 1, syscall(SYS_linkat, AT_FDCWD, from, AT_FDCWD, to, 0))
CALL(linkat, (int a, const char *from, int b, const char *to, int flags), "link", b, to, 1, syscall(SYS_linkat, a, from, b, to, flags))
CALL(symlink, (const char *from, const char *to), "link", AT_FDCWD, to, 1, syscall(SYS_symlinkat, from, AT_FDCWD, to))
CALL(unlink, (const char *path), "unlink", AT_FDCWD, path, 0, syscall(SYS_unlinkat, AT_FDCWD, path, 0))
CALL(unlinkat, (int dir, const char *path, int flags), flags & AT_REMOVEDIR ? "rmdir" : "unlink", dir, path, 0,
     syscall(SYS_unlinkat, dir, path, flags))
CALL(rmdir, (const char *path), "rmdir", AT_FDCWD, path, 0, syscall(SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR))
CALL(mkdir, (const char *path, mode_t mode), "mkdir", AT_FDCWD, path, 1, syscall(SYS_mkdirat, AT_FDCWD, path, mode))
CALL(mkdirat, (int dir, const char *path, mode_t mode), "mkdir", dir, path, 1, syscall(SYS_mkdirat, dir, path, mode))

ssize_t copy_file_range(int in, off64_t *from, int fd, off64_t *to, size_t size, unsigned flags) {
    if (hit("write", fd, NULL, 1, 0) < 0) return -1;
    return syscall(SYS_copy_file_range, in, from, fd, to, size, flags);
}

ssize_t sendfile(int fd, int in, off_t *from, size_t size) {
    if (hit("write", fd, NULL, 1, 0) < 0) return -1;
    return syscall(SYS_sendfile, fd, in, from, size);
}

ssize_t sendfile64(int fd, int in, off64_t *from, size_t size) {
    if (hit("write", fd, NULL, 1, 0) < 0) return -1;
    return syscall(SYS_sendfile, fd, in, from, size);
}
