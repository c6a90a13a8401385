"""What Triton needs to compile its launchers on a GPU: a C compiler and Python's header files."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path


def find_missing_compiler() -> str | None:
    """Return what Triton lacks, with the command that installs it; None if it can compile.

    Triton calls ``CC``, else gcc, else clang (triton/runtime/build.py).
    """
    names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(shutil.which(name) for name in names):
        return f"Triton finds no C compiler ({' or '.join(names)}); apt install gcc"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Triton finds no Python.h; apt install python3-dev"
    return None
