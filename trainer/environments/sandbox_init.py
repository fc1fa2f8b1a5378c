"""A program of its own: build the walls of a sandbox, run one command inside, report. Started by `sandbox`.

    python -I -S sandbox_init.py FOLDER < spec.json > report.json

Standard library only. Where the kernel allows it, the command gets namespaces of its own (user_namespaces(7)): no
network, no sight of other processes, a file system that can be read but not written, and FOLDER as a small file system
in memory. Otherwise there remain the resource limits, and another user's id if this one is root's.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any

NOBODY = 65534
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
MS_REC, MS_PRIVATE, MS_NOSUID, MS_NODEV = 0x4000, 0x40000, 2, 4
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1  # the number is that of every CPU
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 24, 38

_libc = ctypes.CDLL(None, use_errno=True)


def main(folder: str) -> None:
    """Read what to run from stdin, run it in `folder`, write what became of it to stdout."""
    spec: dict[str, Any] = json.load(sys.stdin)
    walls = enter_namespaces(folder, spec["disk"]) if spec["namespaces"] else []
    walls = walls or drop_root(folder, spec["command"][0])
    write_files(folder, spec["files"])
    streams = [os.memfd_create(name, os.MFD_CLOEXEC) for name in ("stdin", "stdout", "stderr")]
    os.write(streams[0], spec["stdin"].encode())
    os.lseek(streams[0], 0, os.SEEK_SET)
    processes = spec["processes"] + (0 if "network" in walls else count_own_tasks())
    code = run(spec["command"], folder, streams, spec, processes)
    stdout, stderr = (os.pread(stream, spec["output"], 0).decode(errors="replace") for stream in streams[1:])
    full = any(os.fstat(stream).st_size >= spec["output"] for stream in streams[1:])
    json.dump({"code": code, "stdout": stdout, "stderr": stderr, "truncated": full, "walls": walls}, sys.stdout)


def enter_namespaces(folder: str, disk: int) -> list[str]:
    """Names of the walls that stand now; none if the kernel refuses namespaces."""
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        # Limits on processes do not hold for the real root; the effective id still reads what root's python is made of.
        os.setgroups([])
        os.setresuid(NOBODY, 0, 0)
    flags = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    if _libc.unshare(flags):
        if user == 0:
            os.setresuid(0, 0, 0)
        return []
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {user} 1"), ("gid_map", f"{NOBODY} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    walls = ["network", "processes"]
    read_only = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(read_only))
    _libc.mount(None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)
    if not _libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(read_only), size):
        options = f"size={disk},nr_inodes=1024,mode=700".encode()
        if not _libc.mount(b"tmpfs", folder.encode(), b"tmpfs", ctypes.c_ulong(MS_NOSUID | MS_NODEV), options):
            walls.append("files")
    return walls


def drop_root(folder: str, program: str) -> list[str]:
    """Become nobody if root, and if nobody may run `program`; names the wall. Else keep root's files only."""
    if os.geteuid() != 0:
        return []
    os.setgroups([])
    child = os.fork()
    if child == 0:
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        # A python that cannot read its library takes another's without a word.
        os._exit(not (os.access(program, os.X_OK) and os.access(os.__file__, os.R_OK)))
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        os.chown(folder, NOBODY, NOBODY)
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        return ["user"]
    for capability in range(64):
        _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    os.setresuid(NOBODY, 0, 0)  # as above: the real root's processes are not limited
    return []


def write_files(folder: str, files: dict[str, str]) -> None:
    """Put the texts where they belong, below `folder`."""
    for name, text in files.items():
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)


def count_own_tasks() -> int:
    """Threads whose real user is this process's: the kernel's limit counts them all."""
    total = 0
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/status") as file:
                lines = dict(line.split(":", 1) for line in file)
        except OSError:  # it has ended
            continue
        if int(lines["Uid"].split()[0]) == os.getuid():
            total += int(lines["Threads"])
    return total


def run(command: list[str], folder: str, streams: list[int], spec: dict[str, Any], processes: int) -> int:
    """Exit code of the command, minus the signal's number if one ended it. Children in the namespace end with it."""
    told, tell = os.pipe()
    init = os.fork()
    if init == 0:  # process 1 of the namespace: the kernel kills all others when it ends
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        child = os.fork()
        if child == 0:
            try:
                become(command, folder, streams, spec, processes)
            finally:
                os._exit(127)
        while True:
            pid, status = os.wait()
            if pid == child:
                os.write(tell, str(os.waitstatus_to_exitcode(status)).encode())
                os._exit(0)
    os.close(tell)
    os.waitpid(init, 0)
    return int(os.read(told, 64) or -signal.SIGKILL)


def become(command: list[str], folder: str, streams: list[int], spec: dict[str, Any], processes: int) -> None:
    """Replace this process by the command, within the limits; returns only by an error, which stderr gets."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    try:
        os.setsid()
        os.chdir(folder)
        _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        for limit, value in (
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_CPU, spec["cpu"]),
            (resource.RLIMIT_FSIZE, spec["output"]),
            (resource.RLIMIT_NOFILE, spec["open_files"]),
            (resource.RLIMIT_NPROC, processes),
            (resource.RLIMIT_AS, spec["memory"]),
        ):
            resource.setrlimit(limit, (value, value))
        os.execve(command[0], command, {})
    except OSError as error:
        os.write(2, f"cannot run {command[0]}: {error}\n".encode())


if __name__ == "__main__":
    main(sys.argv[1])
