"""Imports Megatron once, then runs one function after another, each in a fork of its own: a tenth of the time of fresh
processes, which would import it again.

A job is a line of JSON on stdin: {"target": "module:function", "argument": ..., "log": file, "result": file}. The
answer is the child's process id on a line, and when it has ended, which may be by a signal, its exit code on another.
"""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path


def child(job: dict) -> int:
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    module, _, function = job["target"].partition(":")
    try:
        result = getattr(importlib.import_module(module), function)(job["argument"])
    except BaseException:
        traceback.print_exc()
        return 70
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")
    return result if isinstance(result, int) else 0


def main() -> None:
    from nemoflow import cpu

    cpu.enable()
    for module in ("pretrain", "gpt_step", "model_load_save"):
        importlib.import_module(f"megatron.bridge.training.{module}")
    cpu.patch()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.setpgrp()
            code = child(json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        answers.write(f"{pid}\n")
        _, status = os.waitpid(pid, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the libraries print is no answer
    main()
