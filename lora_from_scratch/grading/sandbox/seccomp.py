"""The system call filter: no new processes, no access to other processes' memory, no mounts, namespaces or odd sockets.

Limits on the number of processes do not apply to root, and a grader in a container often runs as root. Forking is
therefore forbidden altogether once the runner has started. Threads are still allowed (`clone` with CLONE_THREAD).

The filter is a classic BPF program (Linux, `Documentation/userspace-api/seccomp_filter.rst`). System call numbers:
`arch/x86/entry/syscalls/syscall_64.tbl` and `include/uapi/asm-generic/unistd.h`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

# The forbidden system calls, with their numbers on x86_64 and aarch64; -1: the architecture has no such call.
FORBIDDEN = {
    "fork": (57, -1),
    "vfork": (58, -1),
    # Tracing, and the memory and files of other processes.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "process_madvise": (440, 440),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    # Mounts, namespaces, opening files by handle.
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "quotactl": (179, 60),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    # Memory that is not counted by any per-process limit.
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_setup": (206, 0),
    # Keys, the kernel itself, the clock, the machine.
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "syslog": (103, 116),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "personality": (135, 92),
    "iopl": (172, -1),
    "ioperm": (173, -1),
    "modify_ldt": (154, -1),
    "vhangup": (153, 58),
    "sched_setaffinity": (203, 122),  # the grader assigns the processors
    # File attributes: a sandbox that runs as root owns the devices that it sees.
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "setxattrat": (463, 463),
    "removexattrat": (466, 466),
    "file_setattr": (469, 469),
}
# Owners and modes must not change for the same reason. Copying a file sets its mode, so these calls do nothing
# instead of failing.
IGNORED = {
    "chmod": (90, -1),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, -1),
    "lchown": (94, -1),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "utime": (132, -1),
    "utimes": (235, -1),
    "futimesat": (261, -1),
    "utimensat": (280, 88),
}
# Calls that are forbidden only with these arguments: numbers, position of the argument (from 0), values.
WITH_ARGUMENTS = {
    "prctl": ((157, 167), 0, (1,)),  # PR_SET_PDEATHSIG: everything inside must end with the grader
    # FS_IOC_SETFLAGS, its 32-bit form, FS_IOC_FSSETXATTR, FS_IOC_SETVERSION: attributes of the devices.
    "ioctl": ((16, 29), 1, (0x40086602, 0x40046602, 0x401C5820, 0x40087602)),
}
STARTING = {"execve": (59, 221), "execveat": (322, 281)}
CLONE, CLONE3, SOCKET = (56, 220), (435, 435), (41, 198)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
X32 = 0x40000000  # call numbers from here on belong to the x32 ABI
CLONE_THREAD = 0x00010000
FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6; not AF_VSOCK, which can leave a network namespace

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data (both are little-endian)
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000

PR_SET_NO_NEW_PRIVS, SET_MODE_FILTER, TSYNC = 38, 1, 1
SECCOMP = (317, 277)


def program(machine: str | None = None, starting: bool = False) -> bytes:
    """The filter, as an array of `struct sock_filter`.

    Args:
        machine: "x86_64" or "aarch64"; None means this machine.
        starting: whether a program has yet to be started, so that `execve` is allowed.

    Raises:
        ValueError: there is no filter for this architecture.
    """
    column, architecture = _architecture(machine)
    refused = [numbers[column] for numbers in FORBIDDEN.values()]
    if not starting:
        refused += [numbers[column] for numbers in STARTING.values()]
    lines = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (AT_LEAST, 0, 1, X32),
        (RETURN, 0, 0, KILL),
    ]
    for number in refused:
        if number >= 0:
            lines += [(EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE | errno.EPERM)]
    for numbers in IGNORED.values():
        if numbers[column] >= 0:
            lines += [(EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, REFUSE)]
    for numbers, place, values in WITH_ARGUMENTS.values():
        length = 2 * len(values) + 1
        lines += [(EQUAL, 0, length + 1, numbers[column]), (LOAD, 0, 0, FIRST_ARGUMENT + 8 * place)]
        for value in values:
            lines += [(EQUAL, 0, 1, value), (RETURN, 0, 0, REFUSE | errno.EPERM)]
        lines += [(LOAD, 0, 0, NUMBER)]
    # The flags of clone3 are behind a pointer, so they cannot be filtered; without clone3 the C library uses clone.
    lines += [(EQUAL, 0, 1, CLONE3[column]), (RETURN, 0, 0, REFUSE | errno.ENOSYS)]
    lines += [(EQUAL, 0, 4, CLONE[column]), (LOAD, 0, 0, FIRST_ARGUMENT), (ANY_BIT, 1, 0, CLONE_THREAD)]
    lines += [(RETURN, 0, 0, REFUSE | errno.EPERM), (RETURN, 0, 0, ALLOW)]
    lines += [(EQUAL, 0, len(FAMILIES) + 2, SOCKET[column]), (LOAD, 0, 0, FIRST_ARGUMENT)]
    lines += [(EQUAL, len(FAMILIES) - place, 0, family) for place, family in enumerate(FAMILIES)]
    lines += [(RETURN, 0, 0, REFUSE | errno.EAFNOSUPPORT), (RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def install(starting: bool = False) -> None:
    """Apply the filter to this process and all its threads, irrevocably.

    Raises:
        OSError: the kernel rejects it.
        ValueError: there is no filter for this architecture.
    """
    column, _ = _architecture(None)
    code = program(starting=starting)
    libc = ctypes.CDLL(None, use_errno=True)
    array = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HxxxxxxP", len(code) // 8, ctypes.addressof(array))
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "the kernel rejects PR_SET_NO_NEW_PRIVS")
    if libc.syscall(ctypes.c_long(SECCOMP[column]), SET_MODE_FILTER, TSYNC, header) != 0:
        raise OSError(
            ctypes.get_errno(), f"the kernel rejects the system call filter: {os.strerror(ctypes.get_errno())}"
        )


def _architecture(machine: str | None) -> tuple[int, int]:
    machine = machine or platform.machine()
    if machine not in ARCHITECTURES:
        raise ValueError(f"there is no system call filter for {machine}, only for x86_64 and aarch64")
    return ARCHITECTURES[machine]
