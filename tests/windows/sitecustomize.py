"""A Python on Linux → one that lacks what Windows or macOS lack, as far as code in Python can notice.

Python imports this module at its start where this folder is on PYTHONPATH, so also in kernels, workers and other
children. Every restriction has a test in tests/test_portability.py that it raises. Not restricted: what C++ and Rust
code does (torch, safetensors, faiss, pyarrow), which has code of its own for Windows; and, in Python, the packages in
EXEMPT.
"""

import builtins
import errno
import multiprocessing
import os
import sys
import types
import warnings

MODULES = ("fcntl", "resource", "pwd", "grp", "termios")
FUNCTIONS = ("O_NOFOLLOW", "pwrite", "fork", "getloadavg", "sched_getaffinity", "geteuid", "getuid", "killpg", "mkfifo")
# Importers of these modules that take another way on Windows, which they choose by the name of the system.
EXEMPT = {
    "filelock": "locks by msvcrt",
    "psutil": "asks the Windows API",
    "tempfile": "opens files that the system deletes when they are closed",
    "IPython": "has another terminal",
    "prompt_toolkit": "has another terminal",
    "pexpect": "is not used",
    "ptyprocess": "is not used",
    "zmq": "polls by select",
    "asyncio": "has another event loop",
    "tornado": "has another event loop",
    "platformdirs": "has a module for each system",
    "getpass": "reads the console",
    "tty": "is absent too",
    "pty": "is absent too",
}
THROUGH = ("pathlib", "shutil", "os", "contextlib", __name__)  # callers that only pass a call on

_import = builtins.__import__
ABSENT = {name: getattr(os, name) for name in FUNCTIONS}
_replace, _rename, _unlink, _fsync = os.replace, os.rename, os.unlink, os.fsync


def restricted_import(name, globals=None, locals=None, fromlist=(), level=0):
    """`__import__` without MODULES; irra_core takes the ways that it has for Windows."""
    importer = (globals or {}).get("__name__", "").partition(".")[0]
    if name in MODULES and importer not in EXEMPT:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    if name == "os" and importer in EXEMPT and not ABSENT.keys().isdisjoint(fromlist or ()):
        return types.SimpleNamespace(**vars(os), **ABSENT)
    found = _import(name, globals, locals, fromlist, level)
    if name.partition(".")[0] == "irra_core" and "irra_core.settings" in sys.modules:
        sys.modules["irra_core.settings"].WINDOWS = True
    return found


def exempt() -> bool:
    """True where a package in EXEMPT calls."""
    frame = sys._getframe(1)
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] in THROUGH:
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in EXEMPT


def opened() -> set[str]:
    """The files that this process has open."""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:
            continue
    return found


def mapped() -> set[str]:
    """The files that this process has memory-mapped."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        return {line.split(maxsplit=5)[5].strip() for line in maps if len(line.split(maxsplit=5)) == 6}


def refuse(path, held: set[str]) -> None:
    """Raise PermissionError for a file that is held, and for a folder with one."""
    real = os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(path))), os.path.basename(path))
    if any(each == real or each.startswith(f"{real}{os.sep}") for each in held) and not exempt():
        raise PermissionError(errno.EACCES, "The process cannot access the file: it is being used", os.fspath(path))


def replace(source, target, **given) -> None:
    """os.replace, which on Windows replaces neither a file in use nor a folder."""
    refuse(source, opened())
    refuse(target, opened() | mapped())
    if os.path.isdir(target):
        raise PermissionError(errno.EACCES, "Access is denied", os.fspath(target))
    _replace(source, target, **given)


def rename(source, target, **given) -> None:
    """os.rename, which on Windows replaces nothing."""
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists", os.fspath(target))
    replace(source, target, **given)


def unlink(path, **given) -> None:
    """os.unlink, which on Windows deletes no file in use."""
    refuse(path, opened() | mapped())
    _unlink(path, **given)


def fsync(descriptor) -> None:
    """os.fsync, which on Windows flushes only what is open for writing."""
    number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
    with open(f"/proc/self/fdinfo/{number}", encoding="ascii") as about:
        flags = next(int(line.split()[1], 8) for line in about if line.startswith("flags"))
    if flags & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    _fsync(descriptor)


def no_link(source, target, *_, **__) -> None:
    """os.symlink and os.link for a user without the privilege."""
    raise OSError(errno.EINVAL, "A required privilege is not held by the client", os.fspath(target))


for name in FUNCTIONS:
    delattr(os, name)
os.replace, os.rename, os.unlink, os.remove, os.fsync = replace, rename, unlink, unlink, fsync
os.symlink = os.link = no_link
os.linesep = "\r\n"
os.environ.setdefault("USERNAME", "user")  # which Windows sets
builtins.__import__ = restricted_import
multiprocessing.set_start_method("spawn")
# PYTHONWARNDEFAULTENCODING=1 says where a text file is opened in the system's encoding, which on Windows is not UTF-8.
warnings.filterwarnings("ignore", category=EncodingWarning)
warnings.filterwarnings("error", category=EncodingWarning, module=r"irra_core|__main__")
