"""GPUs that hang or fail while an engine uses them, through CUDA's driver: nothing of the engine knows of it.

Run as a program it fails one: `python gpu_faults.py MODEL [COMM]` opens an engine over two GPUs, breaks the second one's
context in the middle of an answer, and prints what became of it as JSON. By CUDA's rules nothing can be done on a GPU in that
process any more.
"""

import ctypes
import faulthandler
import json
import sys
import time

PTX = b"""
.version 7.0
.target sm_70
.address_size 64
.visible .entry stall(.param .u64 ns)
{
    .reg .u64 %rd<3>;
    .reg .pred %p;
    mov.u64 %rd0, %globaltimer;
    ld.param.u64 %rd1, [ns];
    add.u64 %rd1, %rd0, %rd1;
again:
    mov.u64 %rd0, %globaltimer;
    setp.lt.u64 %p, %rd0, %rd1;
    @%p bra again;
    ret;
}
.visible .entry fail()
{
    trap;
}
"""
SM_COUNT, THREADS_OF_SM = 16, 39  # numbers of CUdevice_attribute
BLOCK = 1024


class Gpu:
    """The context that the CUDA runtime of this process has on a GPU, with two kernels of our own."""

    def __init__(self, ordinal):
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._call("cuInit", 0)
        device, context, module = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._stream = ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._context = context
        self._call("cuCtxPushCurrent_v2", context)
        try:
            self._call("cuModuleLoadData", ctypes.byref(module), PTX)
            self._stall, self._fail = self._function(module, b"stall"), self._function(module, b"fail")
            self._call("cuStreamCreate", ctypes.byref(self._stream), 1)  # CU_STREAM_NON_BLOCKING
            sms, threads = self._attribute(device, SM_COUNT), self._attribute(device, THREADS_OF_SM)
            self._blocks = sms * (threads // BLOCK)
        finally:
            self._pop()

    def _call(self, name, *arguments):
        code = getattr(self._cuda, name)(*arguments)
        if code != 0:
            raise OSError(f"{name} returned {code}")

    def _pop(self):
        self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _function(self, module, name):
        function = ctypes.c_void_p()
        self._call("cuModuleGetFunction", ctypes.byref(function), module, name)
        return function

    def _attribute(self, device, number):
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), number, device)
        return value.value

    def _launch(self, function, blocks, threads, arguments):
        pointers = (ctypes.c_void_p * max(len(arguments), 1))(*(ctypes.addressof(one) for one in arguments))
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            self._call("cuLaunchKernel", function, blocks, 1, 1, threads, 1, 1, 0, self._stream, pointers, None)
        finally:
            self._pop()

    def stall(self, seconds):
        """Takes all of the GPU's room for so long: kernels of others start afterwards. Returns at once."""
        self._launch(self._stall, self._blocks, BLOCK, [ctypes.c_uint64(int(seconds * 1e9))])

    def fail(self):
        """From now on every call of CUDA with this GPU returns an error."""
        self._launch(self._fail, 1, 1, [])


def outcome(engine, requests, begin):
    """Reads the requests to their ends: what they said, when, and whether the engine knows."""
    errors, seconds = [], []
    for request in requests:
        output = None
        while output is None or not output["finished"]:
            output = request.read(timeout=60.0)
            assert output is not None, "no end after 60 s"
        errors.append(str(output["error"]) if output["error"] is not None else None)
        seconds.append(time.monotonic() - begin)
    failed = engine.stats()["failed"]
    begin = time.monotonic()
    engine.close()
    return {"errors": errors, "seconds": seconds, "failed": failed, "close_seconds": time.monotonic() - begin}


def start(engine, count=4, max_tokens=2000):
    """Requests that have all begun to answer."""
    prompts = [list(range(1 + i, 40 + 3 * i)) for i in range(count)]
    requests = [engine.submit(one, max_tokens=max_tokens, temperature=0.0, ignore_eos=True) for one in prompts]
    for request in requests:
        output = request.read(timeout=60.0)
        assert output is not None and not output["finished"], output
    return requests


def main(model, comm="auto"):
    from qwen_fast import _engine
    from qwen_fast.loading import find_nccl

    faulthandler.dump_traceback_later(40, exit=True)
    options = {"tensor_parallel_size": 2, "tensor_parallel_comm": comm, "nccl_library": find_nccl()}
    gpu = Gpu(1)
    engine = _engine.Engine(model, device="cuda", kv_cache_tokens=16384, max_model_len=2048, **options)
    requests = start(engine)
    begin = time.monotonic()
    gpu.fail()
    found = outcome(engine, requests, begin)
    try:
        _engine.Engine(model, device="cuda:0")
        found["next"] = ""
    except _engine.EngineError as error:
        found["next"] = str(error)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
