"""What every figure of a report is, in one sentence or two; reports link here."""

from __future__ import annotations

DEFINITIONS: dict[str, tuple[str, str]] = {
    "ttft": (
        "TTFT, time to first token",
        (
            "From the moment a request is given to the engine to its first output token, on the engine's clock. Waiting for room in a "
            "step counts; the network and tokenisation do not."
        ),
    ),
    "tpot": (
        "TPOT, time per output token",
        (
            "Of one request: the time from its first to its last token over the tokens after the first. What a reader sees "
            "as the speed of the text."
        ),
    ),
    "ms_token": (
        "ms per token",
        (
            "Wall time of the window over all output tokens made in it, of all users together: 1,000 over tokens/s. Per 1,000 "
            "tokens it is a thousand times as much: a figure of ms per token is never one of ms per 1,000 tokens."
        ),
    ),
    "e2e": ("end to end", "From the moment a request is given to the engine to its end."),
    "p99": (
        "P50, P99",
        (
            "By nearest rank over all requests that ended in the windows: the smallest value that 50 % (99 %) of them do not "
            "exceed. With fewer than 100 requests P99 is the largest."
        ),
    ),
    "tokens_s": (
        "tokens/s",
        "Output tokens (or prompt tokens, where it says so) made in the window by all users together, over its wall time.",
    ),
    "users": (
        "users",
        "Closed loops: each user has one request running at any time and asks the next as soon as it ends.",
    ),
    "interval": (
        "± and windows",
        (
            "Half of the 95 % confidence interval of the mean, by Student's t over the windows of a load (batch means). Every window "
            "ends with the end of a request. Warm-up, the first request of every user, is in no figure."
        ),
    ),
    "share": ("share", "Part of the total of the same column, in percent."),
    "plan": (
        "planned memory",
        (
            "Bytes that the engine allocates, by its own plan: embedding, layers' weights, output head, workspace (all intermediate "
            "state, allocated once) and KV cache. Counted from shapes and formats; the engine allocates exactly these."
        ),
    ),
    "in_use": (
        "memory in use",
        (
            "On the CPU the resident set of the process, in which pages count once they are touched; on a GPU what NVML "
            "says is in use, by all processes; of several GPUs the sum, where a figure is not said to be of each."
        ),
    ),
    "jitter": (
        "memory jitter",
        "Half of the distance between the highest and the lowest reading of the steady windows.",
    ),
    "kv_held": (
        "KV cache held",
        "Blocks of the KV cache that running requests hold, times the bytes of a block. Blocks kept for the prefix cache alone do not count: they are given up on demand.",
    ),
    "kv_per_token": (
        "KV bytes per token",
        "Bytes of keys and values of one token over all layers; a context of so many tokens holds so much, rounded up to whole blocks.",
    ),
    "device_time": (
        "device time",
        "Time in which a step ran on the device: device events on a GPU, the step's own time on the CPU. Overlapping steps count once.",
    ),
    "split": (
        "prefill and decode",
        "Prefill: computing tokens of prompts. Decode: making output tokens. A step that does both is split in proportion to the bytes that each part moves.",
    ),
    "busy": (
        "device busy",
        "Time with a step in flight over the wall time of the window. 100 % says that the device never waited for the host or for users; it does not say that it was used well.",
    ),
    "bandwidth": (
        "memory bandwidth used",
        (
            "Bytes moved, over wall time, over the measured peak read bandwidth of this machine. The bytes are counted by the meter from the layout of "
            "weights, KV cache and activations; caches can make the true traffic smaller."
        ),
    ),
    "compute": (
        "arithmetic used",
        "Floating-point operations (linear layers, head, attention; two for each multiply-add), over wall time, over the measured peak of a matrix product on this machine.",
    ),
    "bytes_1k": (
        "GB moved per 1,000 tokens",
        "Bytes counted by the meter in the windows, over the output tokens made in them, times 1,000. Decimal gigabytes. With one user every token reads all weights once.",
    ),
    "watts": (
        "W",
        "Energy counter at the end of the windows less at their start, over the wall time. GPU board (NVML) or CPU package (RAPL); not the host's other parts, fans, power supply or cooling.",
    ),
    "joules": (
        "J per 1,000 tokens",
        (
            "Joules of the windows over the output tokens made in them, times 1,000. Gross: all that the counter moved. Net: less the idle "
            "power for the same time. Watts over tokens/s, times 1,000, gives the gross figure again."
        ),
    ),
    "joules_in": (
        "J per 1,000 prompt tokens",
        "Gross joules times the prefill's share of device time, over the prompt tokens computed: an estimate, since counters do not know phases.",
    ),
    "joules_out": (
        "J per 1,000 output tokens, decode only",
        "Gross joules times the decode's share of device time, over the output tokens: an estimate, since counters do not know phases.",
    ),
    "money": (
        "money",
        (
            "Electricity: gross joules times PUE times tariff. Owned: price over the hours of its life in which it computes, times the wall time. Rent: rate times wall "
            "time. Per output token: the whole cost, prompts included, laid on the output tokens."
        ),
    ),
    "break_even": (
        "break-even",
        "Output tokens a day from which the own machine, paid for whether it works or not, costs less than the API for the same tokens.",
    ),
    "lever": (
        "lever",
        "One option changed, everything else as in the base case of the same table, on the same machine in the same run.",
    ),
    "concurrency": (
        "concurrency supported",
        "The most users of those tried with P99 below the bound, where every smaller number tried keeps it too.",
    ),
    "tokens_watt": ("tokens/s per W", "Output tokens/s over mean watts, both over the same windows: tokens per joule."),
    "knee": (
        "knee",
        "Where two straight lines fit the time to first token over the prompt's length with at most half the squared residuals of one line, and the second is at least 1.5 times as steep: where they meet.",
    ),
    "tensor_parallel": (
        "one model over several devices",
        "tensor_parallel_size: each device holds a part of every layer, and all of them work on every token. Against the same load on the fewest devices that were measured.",
    ),
    "load_time": (
        "loading",
        "From opening the files (or making random weights up) to an engine that takes requests, once.",
    ),
    "plus100": (
        "+100 tokens",
        "End-to-end time of a request with 100 tokens more, less that of one without, at one user; Welch's 95 % interval over requests.",
    ),
}
