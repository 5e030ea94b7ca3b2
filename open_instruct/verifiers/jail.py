"""Started by sandbox.py as a program of its own: locks itself in, then becomes the test runner.

new namespaces -> a root of read-only Python files and one small empty folder -> limits -> system
calls refused -> exec. It reads nothing but its arguments and imports nothing of ours. It first says
that it is there; exit code 125 means that it could not lock itself in, so nothing was run.
"""

import ctypes
import json
import os
import platform
import resource
import select
import signal
import struct
import sys

NOT_CONFINED = 125
NEW_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000  # mounts, cgroup, uts, ipc
NEW_NAMESPACES |= 0x10000000 | 0x20000000 | 0x40000000  # user, process ids, network
MS_BIND, MS_REC, MS_PRIVATE, MS_NOSUID, MS_NODEV = 0x1000, 0x4000, 0x40000, 0x2, 0x4
MNT_DETACH = 2
READ_ONLY = 0x1 | 0x2 | 0x4  # and no set-user-id programs, and no devices: mount_setattr's names
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2
ALLOW, REFUSE_WITH_EPERM, REFUSE_WITH_ENOSYS, KILL = 0x7FFF0000, 0x50001, 0x50026, 0x80000000
MOUNT_SETATTR = 442  # like every system call after 424, the same number on every machine
# New processes and threads, sockets, other processes' memory, memory that no limit counts, mounts
# and namespaces, and the parts of the kernel that most often had holes. In the order: clone fork
# vfork socket ptrace process_vm_readv process_vm_writev mount umount2 pivot_root chroot unshare
# setns bpf perf_event_open userfaultfd memfd_create shmget msgget semget mq_open add_key
# request_key keyctl kexec_load init_module finit_module delete_module reboot swapon quotactl
# personality name_to_handle_at open_by_handle_at
REFUSED = {
    "x86_64": (
        0xC000003E,
        "56 57 58 41 101 310 311 165 166 155 161 272 308 321 298 323 319 29 68 64 240 248 249 250 "
        "246 175 313 176 169 167 179 135 303 304",
    ),
    "aarch64": (
        0xC00000B7,
        "220 198 117 270 271 40 39 41 51 97 268 280 241 282 279 194 186 190 180 217 218 219 104 "
        "105 273 106 142 224 60 92 264 265",
    ),
}
# io_uring, open_tree and the other mount calls, pidfd_open, pidfd_getfd, memfd_secret
REFUSED_EVERYWHERE = (425, 426, 427, 428, 429, 430, 431, 432, 434, 438, 442, 447)
CLONE3 = 435  # its flags cannot be looked at; ENOSYS makes libc fall back on clone

libc = ctypes.CDLL(None, use_errno=True)


class CannotConfine(Exception):
    """A step of the lock-in was refused by the system."""


def call(name, *arguments):
    """A libc function; a failure is CannotConfine with its name."""
    if getattr(libc, name)(*arguments) != 0:
        raise CannotConfine(f"{name}: {os.strerror(ctypes.get_errno())}")


def mount(source, target, kind, flags, data=None):
    """mount(2)."""
    encoded = [None if text is None else text.encode() for text in (source, target, kind, data)]
    call("mount", *encoded[:3], ctypes.c_ulong(flags), encoded[3])


def enter_namespaces():
    """Become nobody, in a system of one's own without network and other processes."""
    uid, gid = os.getuid(), os.getgid()
    call("unshare", NEW_NAMESPACES)
    for file, content in (
        ("setgroups", "deny"),
        ("uid_map", f"65534 {uid} 1"),
        ("gid_map", f"65534 {gid} 1"),
    ):
        with open(f"/proc/self/{file}", "w") as target:
            target.write(content)


def build_root(root, readable, room_bytes):
    """A root folder that shows the ``readable`` paths, read-only, and an empty /tmp."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("root", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in readable:
        inside = root + path
        if os.path.islink(path):
            os.makedirs(os.path.dirname(inside), exist_ok=True)
            os.symlink(os.readlink(path), inside)
            continue
        if os.path.isdir(path):
            os.makedirs(inside, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(inside), exist_ok=True)
            with open(inside, "w"):
                pass
        mount(path, inside, None, MS_BIND | MS_REC)
        if path != "/dev/null":
            make_read_only(inside)
    os.makedirs(root + "/tmp", exist_ok=True)
    mount("tmp", root + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={room_bytes},mode=700")
    make_read_only(root, recursive=False)
    os.chdir(root)
    call("syscall", ctypes.c_long({"x86_64": 155, "aarch64": 41}[platform.machine()]), b".", b".")
    call("umount2", b".", MNT_DETACH)  # the old root, which pivot_root left on top of the new one
    os.chdir("/tmp")


def make_read_only(path, recursive=True):
    """Nobody can write there any more, through this mount."""
    attributes = struct.pack("QQQQ", READ_ONLY, 0, 0, 0)
    call(
        "syscall",
        ctypes.c_long(MOUNT_SETATTR),
        AT_FDCWD,
        path.encode(),
        AT_RECURSIVE if recursive else 0,
        attributes,
        ctypes.c_size_t(len(attributes)),
    )


def limit_resources(limits):
    """Memory, processor time, file size, open files; no further processes, no core files."""
    for name, value in (
        ("RLIMIT_AS", limits["memory_bytes"]),
        ("RLIMIT_CPU", limits["cpu_s"]),
        ("RLIMIT_FSIZE", limits["file_bytes"]),
        ("RLIMIT_NOFILE", 64),
        ("RLIMIT_NPROC", 0),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_MEMLOCK", 0),
    ):
        resource.setrlimit(getattr(resource, name), (value, value))


def refuse_system_calls():
    """A seccomp filter: the named system calls fail, all others work."""
    if platform.machine() not in REFUSED:
        raise CannotConfine(f"system calls of {platform.machine()} are not known here")
    architecture, numbers = REFUSED[platform.machine()]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, KILL), (load, 0, 0, 0)]
    code += [(at_least, 0, 1, 0x40000000), (give, 0, 0, KILL)]  # x86's second set of numbers
    code += [(equal, 0, 1, CLONE3), (give, 0, 0, REFUSE_WITH_ENOSYS)]
    for number in (*map(int, numbers.split()), *REFUSED_EVERYWHERE):
        code += [(equal, 0, 1, number), (give, 0, 0, REFUSE_WITH_EPERM)]
    code += [(give, 0, 0, ALLOW)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    header = struct.pack("HxxxxxxP", len(code), ctypes.addressof(program))
    none = ctypes.c_ulong(0)
    call("prctl", PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), none, none, none)
    call("prctl", PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), header, none, none)


def start_runner(settings):
    """Run the runner to its end; returns an exit code as a shell would, 128 + signal.

    The pipe closes by itself when the runner has been started; words in it are why it was not.
    """
    problem, tell = os.pipe()
    runner = os.fork()
    if runner == 0:
        try:
            limit_resources(settings["limits"])
            os.closerange(3, tell)
            os.closerange(tell + 1, 4096)
            refuse_system_calls()
            python = settings["python"]
            os.execve(python, [python, "-I", "-S", "-c", settings["runner"]], {})
        except BaseException as error:
            os.write(tell, f"{error}".encode() or b"unknown")
            os._exit(NOT_CONFINED)
    os.close(tell)
    if words := os.read(problem, 1000):
        raise CannotConfine(words.decode(errors="replace"))
    ended, status = os.wait()
    while ended != runner:
        ended, status = os.wait()
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return 128 - code
    return 1 if code == NOT_CONFINED else code  # 125 is for this file to say


def end_with_parent(has_ended):
    """Be killed when the parent ends, however it does; ``has_ended()`` tells whether it has."""
    call("prctl", PR_SET_PDEATHSIG, *map(ctypes.c_ulong, (signal.SIGKILL, 0, 0, 0)))
    if has_ended():  # before the kernel knew that it matters: no signal will come
        os._exit(NOT_CONFINED)


def guard(settings, parent_lives):
    """Process 1 of the new system: starts the runner and ends with it.

    ``parent_lives`` is the end of a pipe that closes with the parent: to this process, its parent
    outside has no number.
    """
    end_with_parent(lambda: bool(select.select([parent_lives], [], [], 0)[0]))
    os.close(parent_lives)
    build_root(settings["root"], settings["readable"], settings["limits"]["file_bytes"])
    return start_runner(settings)


def main():
    """Arguments: the settings as JSON. ``root`` is null where bubblewrap has built one already."""
    settings = json.loads(sys.argv[1])
    say("here")
    try:
        if settings["root"] is None:
            return start_runner(settings)
        enter_namespaces()
        # Only now: the kernel forgets it when the user namespace changes.
        end_with_parent(lambda: os.getppid() != settings["parent"])
        parent_lives, this_lives = os.pipe()
        first = os.fork()
        if first == 0:
            code = NOT_CONFINED
            try:
                os.close(this_lives)
                code = guard(settings, parent_lives)
            except (CannotConfine, OSError) as error:
                say(error)
            finally:
                os._exit(code)
        return abs(os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]))
    except (CannotConfine, OSError) as error:
        say(error)
        return NOT_CONFINED


def say(words):
    """One line for sandbox.py."""
    os.write(1, f"jail: {words}\n".encode())


if __name__ == "__main__":
    sys.exit(main())
