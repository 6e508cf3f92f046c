"""Confine a process that parses a model's text: it may compute, within bounds, and answer on its open pipes.

Resource limits are not enough: root, the only user of many containers, is exempt from those on processes and files.
So a seccomp filter, which no privilege lifts, refuses (EPERM) every system call that is not listed here. Without
support by processor and kernel only the resource limits apply, and `confine` reports that.
"""

import ctypes
import os
import platform
import resource
import struct

MEMORY_BYTES = 2**30

# Numbers of the system calls on (x86_64, aarch64); None where a processor has no such call.
ALLOWED = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "lseek": (8, 62),
    "pread64": (17, 67),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getdents64": (217, 61),
    "getcwd": (79, 17),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "fcntl": (72, 25),
    "poll": (7, None),
    "ppoll": (271, 73),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "brk": (12, 214),
    "futex": (202, 98),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "getrusage": (98, 165),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getrandom": (318, 278),
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "gettimeofday": (96, 169),
    "exit": (60, 93),
    "exit_group": (231, 94),
}
# Allowed only if arguments, by position, have none of the bits of a mask: files may be opened for reading ...
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
ALLOWED_WITHOUT_BITS = {
    "openat": ((257, 56), {2: WRITING}),
    "open": ((2, None), {1: WRITING}),
    # ... and only its own (process 0) limit on processor time (resource 0) may be set, which happens for each question.
    "prlimit64": ((302, 261), {0: 0xFFFFFFFF, 1: 0xFFFFFFFF}),
}

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data, in bytes
LOAD, JUMP_EQUAL, JUMP_BITS, RETURN = 0x20, 0x15, 0x45, 0x06
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050001  # the last: SECCOMP_RET_ERRNO with EPERM
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2


def confine(memory_bytes: int = MEMORY_BYTES) -> bool:
    """Confine this process for the rest of its life; False if the kernel supports no seccomp filter."""
    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(limit, (value, value))
    return _install_filter()


def limit_seconds(more: float) -> None:
    """Let the kernel end this process after ``more`` further seconds of processor time."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(usage.ru_utime + usage.ru_stime + more) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))


def _install_filter() -> bool:
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        return False
    program = _program(*ARCHITECTURES[machine])
    code = ctypes.create_string_buffer(program)

    class Program(ctypes.Structure):  # struct sock_fprog
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    libc = ctypes.CDLL(None)
    described = Program(len(program) // 8, ctypes.addressof(code))
    return (
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
        and libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(described), 0, 0) == 0
    )


def _program(column: int, architecture: int) -> bytes:
    """The filter as classic BPF: one comparison per system call, and for a few a check of an argument."""
    steps = [_step(LOAD, ARCHITECTURE), _step(JUMP_EQUAL, architecture, skip_if=1), _step(RETURN, KILL)]
    steps.append(_step(LOAD, NUMBER))
    for numbers in ALLOWED.values():
        if (number := numbers[column]) is not None:
            steps += [_step(JUMP_EQUAL, number, skip_else=1), _step(RETURN, ALLOW)]
    for numbers, masks in ALLOWED_WITHOUT_BITS.values():
        if (number := numbers[column]) is not None:
            looks = []
            for argument, mask in masks.items():
                looks += [
                    _step(LOAD, ARGUMENTS + 8 * argument),
                    _step(JUMP_BITS, mask, skip_else=1),
                    _step(RETURN, REFUSE),
                ]
            steps += [_step(JUMP_EQUAL, number, skip_else=len(looks) + 1), *looks, _step(RETURN, ALLOW)]
    return b"".join([*steps, _step(RETURN, REFUSE)])


def _step(code: int, value: int, skip_if: int = 0, skip_else: int = 0) -> bytes:
    return struct.pack("HBBI", code, skip_if, skip_else, value)
