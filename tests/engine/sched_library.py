"""The block pool and the scheduler as a shared library for ctypes: compiled on first use, without Python or a device."""

from __future__ import annotations

import ctypes
import functools
import os
import pathlib
import shlex
import shutil
import subprocess
import tempfile
from ctypes import POINTER, c_bool, c_int, c_int32, c_uint64, c_void_p

CSRC = pathlib.Path(__file__).resolve().parents[2] / "csrc"
NO_BLOCK = -1
INT32_MAX = 2**31 - 1
NEW, WAITING, RUNNING, FINISHED = range(4)


class Error(ctypes.Structure):
    _fields_ = [("status", c_int), ("line", c_int), ("file", ctypes.c_char_p), ("message", ctypes.c_char * 512)]


class Seq(ctypes.Structure):
    """qf_seq."""

    _fields_ = [
        ("id", c_uint64),
        ("priority", c_int32),
        ("token_ids", POINTER(c_int32)),
        ("num_prompt_tokens", c_int32),
        ("max_total_tokens", c_int32),
        ("block_table", POINTER(c_int32)),
        ("window_table", POINTER(c_int32)),
        ("max_prefix_hit", c_int32),
        ("cache_salt", c_uint64),
        ("leader", c_void_p),
        ("guided", c_bool),
        ("owner", c_void_p),
        ("state", c_int),
        ("released", c_bool),
        ("paused", c_bool),
        ("mask_ready", c_bool),
        ("num_followers", c_int32),
        ("slot", c_int32),
        ("num_tokens", c_int32),
        ("num_pending_tokens", c_int32),
        ("num_computed_tokens", c_int32),
        ("num_completed_tokens", c_int32),
        ("num_cached_tokens", c_int32),
        ("num_published_blocks", c_int32),
        ("num_blocks", c_int32),
        ("num_shared_tokens", c_int32),
        ("window_first", c_int32),
        ("window_end", c_int32),
        ("num_steps_in_flight", c_int32),
        ("num_preemptions", c_int32),
        ("release_when_idle", c_bool),
        ("arrival", c_uint64),
        ("prev", c_void_p),
        ("next", c_void_p),
    ]


class StepEntry(ctypes.Structure):
    """qf_step_entry; `seq` as an address."""

    _fields_ = [
        ("seq", c_void_p),
        ("slot", c_int32),
        ("start", c_int32),
        ("num_tokens", c_int32),
        ("samples", c_bool),
        ("preemptions", c_int32),
    ]


class StepPlan(ctypes.Structure):
    """qf_step_plan."""

    _fields_ = [
        ("step", c_uint64),
        ("num_entries", c_int32),
        ("num_tokens", c_int32),
        ("entries", POINTER(StepEntry)),
    ]


class SchedulerConfig(ctypes.Structure):
    """qf_scheduler_config."""

    _fields_ = [
        ("max_num_seqs", c_int32),
        ("max_num_batched_tokens", c_int32),
        ("max_model_len", c_int32),
        ("max_steps_in_flight", c_int32),
        ("window_tokens", c_int32),
        ("num_window_blocks", c_int32),
        ("prefix_margin_tokens", c_int32),
    ]


SIGNATURES = {
    "qf_block_pool_create": (c_int, c_int32, c_int32, c_bool, c_uint64, POINTER(c_void_p), POINTER(Error)),
    "qf_block_pool_destroy": (None, c_void_p),
    "qf_block_pool_num_available": (c_int32, c_void_p),
    "qf_block_pool_num_cached": (c_int32, c_void_p),
    "qf_block_pool_ref_count": (c_int32, c_void_p, c_int32),
    "qf_block_pool_is_published": (c_bool, c_void_p, c_int32),
    "qf_block_pool_take": (c_int32, c_void_p),
    "qf_block_pool_ref": (None, c_void_p, c_int32),
    "qf_block_pool_release": (None, c_void_p, c_int32),
    "qf_block_pool_publish": (c_bool, c_void_p, c_int32, c_int32, POINTER(c_int32), c_uint64),
    "qf_block_pool_find": (c_int32, c_void_p, c_int32, POINTER(c_int32), c_uint64),
    "qf_block_pool_reset_prefix_cache": (None, c_void_p),
    "qf_block_pool_check": (c_int, c_void_p, POINTER(Error)),
    "qf_scheduler_create": (c_int, POINTER(SchedulerConfig), c_void_p, POINTER(c_void_p), POINTER(Error)),
    "qf_scheduler_destroy": (None, c_void_p),
    "qf_step_plan_init": (c_int, POINTER(StepPlan), c_int32, POINTER(Error)),
    "qf_step_plan_deinit": (None, POINTER(StepPlan)),
    "qf_scheduler_add": (c_int, c_void_p, POINTER(Seq), POINTER(Error)),
    "qf_scheduler_schedule": (None, c_void_p, POINTER(StepPlan)),
    "qf_scheduler_accept": (c_bool, c_void_p, POINTER(StepEntry), c_int32),
    "qf_scheduler_complete": (None, c_void_p, POINTER(StepPlan)),
    "qf_scheduler_finish": (None, c_void_p, POINTER(Seq)),
    "qf_scheduler_set_paused": (None, c_void_p, POINTER(Seq), c_bool),
    "qf_scheduler_set_mask_ready": (None, c_void_p, POINTER(Seq)),
    "qf_scheduler_has_work": (c_bool, c_void_p),
    "qf_scheduler_check": (c_int, c_void_p, POINTER(Error)),
}


def compiler() -> list[str] | None:
    """The command of the C compiler (CC from the environment, else cc), or None if there is none."""
    command = shlex.split(os.environ.get("CC", "cc"))
    return command if command and shutil.which(command[0]) else None


@functools.cache
def load() -> ctypes.CDLL:
    """Compiles and loads the library. The file is gone at once; the process keeps it mapped."""
    command = compiler()
    assert command is not None
    sources = [CSRC / "base" / name for name in ("status.c", "alloc.c", "hash.c")]
    sources += sorted((CSRC / "kv").glob("*.c")) + sorted((CSRC / "sched").glob("*.c"))
    with tempfile.TemporaryDirectory() as folder:
        library = pathlib.Path(folder, "libsched.so")
        flags = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-fPIC", "-shared", f"-I{CSRC}"]
        subprocess.run([*command, *flags, *map(str, sources), "-o", str(library)], check=True, timeout=120)
        loaded = ctypes.CDLL(str(library))
    for name, (result, *arguments) in SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def checked(function, *arguments) -> None:
    """Calls a function that returns a status and takes an error last; raises AssertionError with its message."""
    error = Error()
    status = function(*arguments, ctypes.byref(error))
    assert status == 0, error.message.decode()


def int32_array(values) -> ctypes.Array:
    values = list(values)
    return (c_int32 * len(values))(*values)
