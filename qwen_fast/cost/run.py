"""Runs what a report needs, stage by stage, into one JSON object that survives being cut off.

Every stage has a key. What a stage gave is kept in the file at once, and a run that begins with the same identity (see
identity.py) takes up what is there. A stage that fails, or that the budget no longer allows, leaves the reason in its
place.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from . import levers, parallel
from .identity import earlier_run, identity
from .machine import machine, usable_gpus
from .measure import Effort, measure_idle, meter_of, run_load, why_no_meter
from .probe import Peaks, cpu_peaks, gpu_peaks
from .settings import Settings, plain
from .workloads import QUICK_TOKENS, STUDY_A, STUDY_A_USERS, STUDY_B, STUDY_B_USERS, Workload, fixed, scaled, tokenised

PARTS = ("embedding", "layers", "head", "workspace", "kv_cache")
QUICK_USERS = (1, 4, 16)
# An engine's and a checkpoint's errors are of these.
_FAILURES = (NotImplementedError, ValueError, MemoryError, RuntimeError)
_SIZES = ("kv_cache_tokens", "kv_cache_memory", "memory", "memory_utilization", "gpu_memory_utilization")


class Runner:
    """run() measures; `data` is the JSON object. options: the engine's; where they give no size of the KV cache, it
    follows from the workloads. load: makes an LLM with engine options. path: where data is kept, None:
    nowhere. say: told what is done, for a display. name: what the report calls the model, None: as the LLM does."""

    def __init__(
        self,
        options: Mapping[str, Any],
        settings: Settings,
        load: Callable[[Mapping[str, Any]], Any],
        path: Path | None = None,
        say: Callable[[str], None] = lambda text: None,
        llm: Any = None,
        name: str | None = None,
    ) -> None:
        self._options, self._settings, self._load, self._path, self._say = dict(options), settings, load, path, say
        self._given, self._name = llm, name
        self._began = time.monotonic()
        self._asked: tuple[Workload, ...] = settings.workloads or (*STUDY_A, STUDY_B)
        self._longest: int | None = None
        self._cases: list[levers.Case] = []
        self.data: dict[str, Any] = {
            "began": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "stages": {},
            "skipped": {},
        }
        self.data["settings"], self.data["prices"] = plain(settings), asdict(settings.prices)

    def run(self) -> dict[str, Any]:
        if self._given is not None:
            self._measure(self._given)
        else:
            room = self._cache_tokens()
            with self._engine({}) as llm:
                self._tokenise(llm)
                enough = self._sized(self._options) or self._cache_tokens() <= room
                if enough:
                    self._measure(llm)
            if not enough:
                self._say("a larger KV cache: the prompts are tokenised now")
                with self._engine({}) as llm:
                    self._measure(llm)
        self._other_counts()
        if self._settings.with_levers:
            self._other_engines()
        self.data["seconds"] = self.data.get("seconds", 0.0) + time.monotonic() - self._began
        self._keep()
        return self.data

    # -- stages

    def _tokenise(self, llm: Any) -> None:
        # Prompts given as text have a length only now.
        self._asked = tuple(tokenised(workload, llm) for workload in self._asked)
        own = self._options.get("max_model_len")
        self._longest = own or max(llm.max_model_len, llm.info()["max_position_embeddings"])

    def _measure(self, llm: Any) -> None:
        data, settings = self.data, self._settings
        self._tokenise(llm)
        self._workloads = workloads = [self._fitted(workload, llm) for workload in self._asked]
        self._take_up(llm)
        stats = llm.stats()
        data["model"] = {"name": self._name or llm.model, "parameters": _parameters(llm)}
        data["info"], data["plan"], data["machine"] = llm.info(), stats["memory"], machine(llm)
        meter = meter_of(stats)
        data["meter"] = {"why": why_no_meter(stats)} if meter is None else {"sources": list(meter["sources"])}
        data["workloads"] = [
            {"name": one.name, "label": one.label, "notes": list(one.notes), "users": list(self._users(one))}
            for one in workloads
        ]
        self._stage("peaks", lambda: self._peaks(llm))
        self._stage("idle", lambda: {"watts": measure_idle(llm, 1.0 if settings.quick else 5.0)})
        self._stage("estimates", lambda: _estimates(llm, self._options))
        for workload in workloads:
            for users in self._users(workload):
                key = f"load:{workload.name}:{users}"
                self._stage(key, partial(run_load, llm, workload, users, settings.effort))
        self._sweep(llm, workloads[0])
        self._plan_comparison(llm)
        self._compare(llm, int(data["info"]["tensor_parallel_size"]))
        if data["info"]["backend"] == "cpu":
            self._stage("peaks-after", lambda: self._peaks(llm))
        with contextlib.suppress(RuntimeError):  # an engine that has failed: the sources stay as they were at the start
            if meter is not None:
                data["meter"]["sources"] = list((meter_of(llm.stats()) or meter)["sources"])
        if settings.with_levers:
            self._levers()
            for one in self._cases:
                if not one.options and one.why is None:
                    self._stage(one.key, partial(_lever_run, llm, one, settings.lever_effort))

    def _sweep(self, llm: Any, first: Workload) -> None:
        settings = self._settings
        quick = settings.quick
        lengths = (32, 64, 128, 256, 512, 1024) if quick else (64, 128, 256, 512, 1024, 2048, 4096, 8192)
        output = 4 if quick else 8
        effort = replace(settings.effort, window_s=0.4 * settings.effort.window_s)
        if not settings.with_sweep:
            for key in (*(f"sweep:{length}" for length in lengths), "plus:in", "plus:out"):
                self.data["skipped"][key] = "not measured: left out (--no-sweep)"
            return
        for length in lengths:
            if length + output <= llm.max_model_len:
                workload = fixed("sweep", "input sweep", length, output)
                self._stage(f"sweep:{length}", partial(run_load, llm, workload, 1, effort))
        inputs, outputs = round(first.mean_prompt), round(first.mean_output)
        for name, more in (("base", (0, 0)), ("in", (100, 0)), ("out", (0, 100))):
            lengths_now = inputs + more[0], outputs + more[1]
            if sum(lengths_now) <= llm.max_model_len:
                workload = fixed(name, "plus 100", *lengths_now)
                self._stage(f"plus:{name}", partial(run_load, llm, workload, 1, settings.effort))

    def _levers(self) -> None:
        workloads = self._workloads
        long_output = max(workloads, key=lambda one: one.mean_output)
        facts = {
            "info": self.data["info"],
            "options": self._options,
            "gpus": len(self.data["machine"]["gpus"]),
            "same_engine": self._given is not None,
        }
        users = min(8 if self._settings.quick else 16, self.data["info"]["max_num_seqs"])
        found = levers.cases(workloads[0], long_output, users, facts, self._settings.quick)
        self.data["levers"] = [
            {"key": one.key, "lever": one.lever, "setting": one.setting, "base": one.base, "plain": not one.options, "label": one.workload.label,
             "users": one.users} for one in found
        ]  # fmt: skip
        for one in found:
            if one.why is not None:
                self.data["skipped"][one.key] = f"not measured: {one.why}"
        self._cases = found

    def _plan_comparison(self, llm: Any) -> None:
        """Which numbers of devices the last workload is run on, and with how many users."""
        info, settings, last = self.data["info"], self._settings, self._workloads[-1]
        on_gpu, own = info["backend"] != "cpu", int(info["tensor_parallel_size"])
        devices = len(self.data["machine"]["gpus"])
        counts = parallel.compared(settings.gpus, own, devices, on_gpu, self._given is not None)
        users = parallel.users_of(settings.gpus_users or settings.users, info["max_num_seqs"])
        if not counts or not users:
            return
        self.data["gpus"] = {
            "workload": last.name, "label": last.label, "own": own, "users": list(users), "unit": "GPU" if on_gpu else "rank",
            "counts": [asdict(one) for one in counts],
        }  # fmt: skip
        for one in counts:
            if one.why is not None:
                for key in (parallel.key(one.count, "engine"), *(parallel.key(one.count, n) for n in users)):
                    self.data["skipped"][key] = f"not measured: {one.why}"

    def _compare(self, llm: Any, count: int) -> None:
        """One number of devices of the comparison, on an engine over them."""
        said = self.data.get("gpus")
        if said is None or {"count": count, "why": None} not in said["counts"]:
            return
        effort, workload = parallel.effort_of(self._settings.effort), self._workloads[-1]
        self._stage(parallel.key(count, "engine"), lambda: parallel.engine_stage(llm))
        if count != said["own"]:
            idle_s = 1.0 if self._settings.quick else 2.0
            self._stage(parallel.key(count, "idle"), lambda: {"watts": measure_idle(llm, idle_s)})
        for users in said["users"]:
            tried = count == said["own"] and f"load:{workload.name}:{users}" in self.data["skipped"]
            if not tried and parallel.load_of(self.data, count, users) is None:
                run = partial(parallel.load_stage, llm, workload, users, effort)
                self._stage(parallel.key(count, users), run)

    def _other_counts(self) -> None:
        for one in self.data.get("gpus", {}).get("counts", ()):
            keys = [parallel.key(one["count"], what) for what in ("engine", "idle", *self.data["gpus"]["users"])]
            missing = [key for key in keys if key not in self.data["stages"]]
            if one["count"] == self.data["gpus"]["own"] or one["why"] is not None or not missing:
                continue
            if self._out_of_time():
                for key in missing:
                    self._skip(key)
                continue
            try:
                with self._engine({"tensor_parallel_size": one["count"]}) as llm:
                    self._compare(llm, one["count"])
            except _FAILURES as error:
                for key in missing:
                    if key not in self.data["stages"]:
                        self.data["skipped"].setdefault(key, _why(error))
                self._keep()

    def _other_engines(self) -> None:
        """The levers that need other options than the report's: one engine for each set of options."""
        groups: dict[str, list[levers.Case]] = {}
        for one in self._cases:
            if one.options and one.why is None and one.key not in self.data["stages"]:
                groups.setdefault(json.dumps(dict(one.options), sort_keys=True), []).append(one)
        for group in groups.values():
            self._lever_group(group)

    def _lever_group(self, group: list[levers.Case]) -> None:
        if self._out_of_time():
            for one in group:
                self._skip(one.key)
            return
        try:
            with self._engine(group[0].options) as llm:
                for one in group:
                    self._stage(one.key, partial(_lever_run, llm, one, self._settings.lever_effort))
        except _FAILURES as error:
            for one in group:
                if one.key not in self.data["stages"]:
                    self.data["skipped"].setdefault(one.key, _why(error))
            self._keep()

    @contextlib.contextmanager
    def _engine(self, changes: Mapping[str, Any]) -> Iterator[Any]:
        if self._given is not None:
            yield self._given
            return
        options = {**self._options, **changes}
        if not self._sized(options):
            options["kv_cache_tokens"] = self._cache_tokens()
        llm = self._load({name: value for name, value in options.items() if value is not None})
        try:
            yield llm
        finally:
            llm.close()

    def _cache_tokens(self) -> int:
        """Room for all users of the heaviest load, so that no figure is one of preemption."""
        most = 65536
        for workload in self._asked:
            length = max(item.prompt_tokens + item.output_tokens for item in workload.items)
            if self._longest is not None:
                length = min(length, self._longest)
            if self._settings.quick:
                length = min(length, QUICK_TOKENS)
            most = max(most, (max(self._users(workload)) + 1) * (length + 128))
            if workload is self._asked[-1] and self._may_compare():
                wanted = self._settings.gpus_users or self._settings.users or parallel.USERS
                most = max(most, (max(wanted) + 1) * (length + 128))
        return most

    def _may_compare(self) -> bool:
        """Whether several numbers of devices may be compared; asked before there is an engine."""
        if self._settings.gpus is not None or self._options.get("device") == "cpu":
            return bool(self._settings.gpus)
        return usable_gpus() > 1

    @staticmethod
    def _sized(options: Mapping[str, Any]) -> bool:
        return any(options.get(name) is not None for name in _SIZES)

    # -- one stage

    def _stage(self, key: str, run: Callable[[], Any]) -> None:
        data = self.data
        if key in data["stages"]:
            return
        if self._out_of_time():
            self._skip(key)
            return
        self._say(key)
        try:
            data["stages"][key] = run()
            data["skipped"].pop(key, None)
        except _FAILURES as error:
            data["skipped"][key] = _why(error)
        self._keep()

    def _out_of_time(self) -> bool:
        budget = self._settings.budget_s
        return budget is not None and time.monotonic() - self._began > budget

    def _skip(self, key: str) -> None:
        self.data["skipped"][key] = (
            f"not measured: the time budget of {self._settings.budget_s:g} s was used up before it"
        )

    def _users(self, workload: Workload) -> tuple[int, ...]:
        if self._settings.users is not None:
            return self._settings.users
        if workload.name == STUDY_B.name:
            return STUDY_B_USERS
        if workload.users is not None:
            return tuple(sorted({1, workload.users}))
        if self._settings.quick:
            return QUICK_USERS
        return STUDY_A_USERS

    def _fitted(self, workload: Workload, llm: Any) -> Workload:
        most, why = llm.max_model_len, f"the engine's max_model_len is {llm.max_model_len}"
        if self._settings.quick and QUICK_TOKENS < most:
            most, why = QUICK_TOKENS, f"--quick takes at most {QUICK_TOKENS} tokens a request"
        return scaled(workload, most, why)

    def _peaks(self, llm: Any) -> dict[str, Any]:
        settings = self._settings
        if llm.info()["backend"] != "cpu" or settings.peak_gbs is not None or settings.peak_tflops is not None:
            count = int(llm.info()["tensor_parallel_size"]) if llm.info()["backend"] != "cpu" else 1
            return gpu_peaks(settings.peak_gbs, settings.peak_tflops, settings.peak_source, count).as_dict()
        found: Peaks = cpu_peaks(llm.info()["num_threads"], min(1.5, settings.effort.window_s))
        return found.as_dict()

    # -- the file

    def _take_up(self, llm: Any) -> None:
        settings = self._settings
        asked = [(one, self._users(one)) for one in self._workloads]
        now = self.data["identity"] = identity(
            llm, self._options, settings.quick, settings.window_s, asked, settings.windows
        )
        if self._path is not None:
            given = settings.peak_gbs is not None or settings.peak_tflops is not None
            self.data |= earlier_run(self._path, now, given, self._say) or {}

    def _keep(self) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_suffix(".new")
        beside.write_text(json.dumps(self.data, default=str, separators=(",", ":")), encoding="utf-8")
        beside.replace(self._path)


def _why(error: BaseException) -> str:
    return f"not measured: {' '.join(str(error).split()) or type(error).__name__}"


def _lever_run(llm: Any, case: levers.Case, effort: Effort) -> dict[str, Any]:
    found = run_load(llm, case.workload, case.users, effort)
    del found["memory"]["curve"]
    memory = llm.stats()["memory"]
    return {
        **found,
        "plan_bytes": {part: memory[f"{part}_bytes"] for part in PARTS},
        "kv_block_bytes": memory["kv_block_bytes"],
    }


def _estimates(llm: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Plans of the engine for contexts and batches: bytes of each part, nothing allocated."""
    from ..native import _engine
    from ..options import engine_options

    kept = {
        name: value
        for name, value in options.items()
        if name not in (*_SIZES, "max_model_len", "max_num_seqs", *_PYTHON)
    }
    most = llm.info()["max_position_embeddings"]
    contexts = [length for length in (512, 2048, 4096, 8192, 32768, 131072) if length <= most]
    rows = []
    for batch in (1, 8, 16, 32):
        for context in contexts:
            plan = engine_options(**kept, max_model_len=context, max_num_seqs=batch, kv_cache_tokens=batch * context)
            found: dict[str, Any] = {"batch": batch, "context": context}
            try:
                memory: Mapping[str, Any] = _engine.estimate(llm.model_dir, **plan)
                found |= {f"{part}_bytes": memory[f"{part}_bytes"] for part in PARTS}
            except (ValueError, RuntimeError, MemoryError) as error:
                found["why"] = f"not possible: {' '.join(str(error).split())}"
            rows.append(found)
    return {"rows": rows, "contexts": contexts}


_PYTHON = ("tokenizer", "chat_template", "revision", "download_dir", "progress", "seed", "generation_config")


def _parameters(llm: Any) -> int:
    from ..cli_tools import count_parameters

    return count_parameters(llm.config)


def repriced(data: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Measurements with other prices, volume, bound and readings at the wall: what needs no measuring."""
    changed = plain(settings)
    kept = {name: changed[name] for name in ("tokens_per_day", "p99_s", "wall_watts")}
    return {**data, "prices": asdict(settings.prices), "settings": {**data["settings"], **kept}}
