"""A directory as a machine sees it that learns late of what others do there: a file system for tests.

    python3 late_files.py DIRECTORY MOUNTPOINT SECONDS

What is made through this mount is there at once. A file that is made in DIRECTORY by others, or through another mount,
is shown SECONDS later, as by a shared file system whose clients keep in mind that a name was not there. Directories are
shown at once: Slurm could not open the log of a job in one that its node does not see yet.
"""

import errno
import os
import stat
import sys
import time
from pathlib import Path

import mfusepy


class Late(mfusepy.Operations):
    use_ns = True

    def __init__(self, root: str, seconds: float):
        self.root, self.seconds = root, seconds
        self.known = {self._relative(str(p)) for p in Path(root).rglob("*")} | {"/"}

    def _relative(self, path: str) -> str:
        return path.removeprefix(self.root)

    def _at(self, path: str) -> str:
        """The file behind a path. Raises FileNotFoundError while it is not shown."""
        if path not in self.known:
            found = os.lstat(self.root + path)
            if stat.S_ISREG(found.st_mode) and time.time() - found.st_ctime < self.seconds:
                raise FileNotFoundError(errno.ENOENT, "not shown yet", path)
            self.known.add(path)
        return self.root + path

    def _new(self, path: str) -> str:
        """The file behind a path that is made through this mount."""
        self.known.add(path)
        return self.root + path

    # -- names -------------------------------------------------------------------------------------------------------

    def getattr(self, path, fh=None):
        found = os.lstat(self._at(path)) if fh is None else os.fstat(fh)
        names = ("mode", "nlink", "size", "uid", "gid", "blocks")
        times = {f"st_{t}time": getattr(found, f"st_{t}time_ns") for t in "acm"}
        return {f"st_{name}": getattr(found, f"st_{name}") for name in names} | times

    def readdir(self, path, fh):
        found = [".", ".."]
        for name in os.listdir(self._at(path)):
            try:
                self._at(os.path.join(path, name))
            except FileNotFoundError:
                continue
            found.append(name)
        return found

    def readlink(self, path):
        return os.readlink(self._at(path))

    def mkdir(self, path, mode):
        os.mkdir(self._new(path), mode)

    def rmdir(self, path):
        os.rmdir(self._at(path))

    def unlink(self, path):
        os.unlink(self._at(path))

    def symlink(self, target, source):
        os.symlink(source, self._new(target))

    def rename(self, old, new):
        inside = [p for p in self.known if p.startswith(old + "/")]
        os.rename(self._at(old), self.root + new)
        self.known |= {new, *(new + p.removeprefix(old) for p in inside)}

    def link(self, target, source):
        os.link(self._at(source), self._new(target))

    def chmod(self, path, mode):
        os.chmod(self._at(path), mode)

    def chown(self, path, uid, gid):
        os.chown(self._at(path), uid, gid, follow_symlinks=False)

    def utimens(self, path, times=None):
        os.utime(self._at(path), ns=times, follow_symlinks=False)

    def statfs(self, path):
        found = os.statvfs(self._at(path))
        return {name: getattr(found, name) for name in dir(found) if name.startswith("f_") and name != "f_fsid"}

    # -- contents ----------------------------------------------------------------------------------------------------

    def open(self, path, flags):
        return os.open(self._at(path), flags & ~os.O_APPEND)  # the kernel says where

    def create(self, path, mode, fi=None):
        return os.open(self._new(path), os.O_RDWR | os.O_CREAT, mode)

    def read(self, path, size, offset, fh):
        return os.pread(fh, size, offset)

    def write(self, path, data, offset, fh):
        return os.pwrite(fh, data, offset)

    def truncate(self, path, length, fh=None):
        os.truncate(self._at(path) if fh is None else fh, length)

    def fsync(self, path, datasync, fh):
        os.fsync(fh)

    def release(self, path, fh):
        os.close(fh)


if __name__ == "__main__":
    directory, mountpoint, late = sys.argv[1:]
    options = {"attr_timeout": 0, "entry_timeout": 0, "negative_timeout": 0}
    mfusepy.FUSE(Late(directory, float(late)), mountpoint, foreground=True, nonempty=True, **options)
