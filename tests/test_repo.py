"""The repository's own rules: directions of dependency, no hidden state, no surprises at run time, small files.

These read the sources, or compile them and look at the objects; they need a C compiler but no built package.
"""

from __future__ import annotations

import ast
import functools
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sysconfig

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "qwen_fast"
C_FILES = sorted(CSRC.rglob("*.c"))
C_SOURCES = sorted([*C_FILES, *CSRC.rglob("*.h")])
NVCC = shutil.which("nvcc")
CUDA_C = [path for path in C_FILES if path.is_relative_to(CSRC / "backend" / "cuda")]
NO_CUDA = [path for path in C_FILES if path not in CUDA_C]
PURE_C = [path for path in NO_CUDA if not path.is_relative_to(CSRC / "python")]
COMPILED = NO_CUDA + (CUDA_C if NVCC else [])  # the CUDA backend's files need CUDA's headers
KERNELS = ROOT / "kernels"
KERNEL_SOURCES = sorted(path for path in KERNELS.rglob("*.*") if path.suffix in (".cu", ".cuh", ".h"))

# What each folder of csrc may include besides itself. "include" is csrc/include: the public qf.h.
MAY_INCLUDE = {
    "base": set(),
    "include": {"sample", "base"},  # a request carries its sampling parameters
    "model": {"base"},
    "kv": {"base"},
    "sched": {"kv", "base"},
    "sample": {"base"},
    "comm": {"base", "kernels"},
    "backend": {"comm", "kv", "model", "sample", "base"},
    "backend/cpu": {"backend", "comm", "kv", "model", "sample", "base"},
    "backend/cuda": {"backend", "comm", "kv", "model", "sample", "base", "kernels"},
    "engine": {"include", "backend", "backend/cpu", "backend/cuda", "comm", "sched", "kv", "sample", "model", "base"},
    "python": {"include"},
}
# Of the kernels only these are for others to include.
KERNEL_INTERFACES = {
    "qf_kernels.h",
    "qf_attention.h",
    "qf_kv_cache.h",
    "qf_all_reduce.h",
    "qf_decode.h",
    "qf_repack.h",
    "attention_limits.h",
}
# Headers of a folder that only one file may include: the engine's device choice alone knows a backend by name.
ONLY_FROM = {"backend/cpu/cpu.h": "csrc/engine/devices.c", "backend/cuda/cuda.h": "csrc/engine/devices.c"}
CUDA_HEADERS = re.compile(
    r"^(cuda\w*|cublas\w*|nccl\w*|nvml|nvToolsExt|nvrtc|cooperative_groups\S*|mma)\.h$|^(cuda|cub)/"
)

WARNINGS = "-Wall -Wextra -Wconversion -Wshadow -Wvla".split()
DIALECT = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-ffp-contract=off", f"-I{CSRC}", f"-I{CSRC / 'include'}"]

# fprintf and the like, but not snprintf: that prints into memory. A member called abort is not the function.
SIDE_EFFECTS = (
    r"\b(secure_)?getenv\s*\(|(?<!->)\b(abort|_?exit|_Exit|quick_exit|assert)\s*\(|\b(stdout|stderr)\b"
    r"|\b(puts|putchar|perror|fputs|fputc|putc|v?printf|v?fprintf|v?dprintf)\s*\("
)
ALLOCATIONS = r"\b(malloc|calloc|realloc|reallocarray|free|strdup|strndup|aligned_alloc|posix_memalign|alloca)\s*\("
# What a kernel's file may not have besides: state on the device or the host, and memory of its own.
KERNEL_STATE = r"\b(?:static|__device__|__constant__|__managed__)\b(?:(?!\bconst\b|\bconstexpr\b|\b__shared__\b)[^;{}()=])*[;=\[]"
KERNEL_ALLOCATIONS = (
    r"\bcuda(Malloc|Free|HostAlloc|HostRegister|MemPool)\w*\s*\(|\bnew\s+\w|\bstd::|\bthrow\b|\btry\s*\{"
)

MAX_LINES = {"csrc": 450, "forward.c": 600, "kernels": 450, "qwen_fast": 600}


def name(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def code_of(path: pathlib.Path) -> str:
    """A C file without comments and string literals, lines kept."""
    pattern = r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\''

    def blank(match: re.Match) -> str:
        return '""' if match[0][0] in "\"'" else " " + "\n" * match[0].count("\n")

    return re.sub(pattern, blank, path.read_text(), flags=re.DOTALL)


def find_in_code(paths: list[pathlib.Path], pattern: str) -> list[str]:
    """file:line: text, for each match outside comments and strings."""
    found = []
    for path in paths:
        lines = path.read_text().splitlines()
        found += [f"{name(path)}:{line}: {lines[line - 1].strip()}" for line in lines_of(path, pattern)]
    return found


def lines_of(path: pathlib.Path, pattern: str) -> list[int]:
    code = code_of(path)
    return [code.count("\n", 0, match.start()) + 1 for match in re.finditer(pattern, code)]


def compiler() -> list[str]:
    command = shlex.split(os.environ.get("CC", "cc"))
    if not command or not shutil.which(command[0]):
        if os.environ.get("CI") == "true":
            pytest.fail("no C compiler")
        pytest.skip("no C compiler")
    return command


@pytest.fixture(scope="session")
def compiled(tmp_path_factory, ahead):
    """Compiles a C file once and gives its object and the warnings."""
    folder = tmp_path_factory.mktemp("objects")

    def compile_file(source: pathlib.Path) -> tuple[pathlib.Path, str]:
        target = folder / (str(source.absolute()).replace("/", "-") + ".o")
        flags = [*DIALECT, *WARNINGS, "-fPIC"]
        if source in CUDA_C:
            flags += [f"-I{KERNELS}", "-isystem", str(cuda_include())]
        if source.is_relative_to(CSRC / "python"):
            flags += python_flags()
        command = [*compiler(), *flags, "-c", str(source), "-o", str(target)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        return target, run.stderr

    futures = ahead("compiled", "path", compile_file)
    return lambda source: futures[source].result() if source in futures else compile_file(source)


def python_flags() -> list[str]:
    headers = sysconfig.get_path("include")
    if not pathlib.Path(headers, "Python.h").exists():
        pytest.skip("no Python.h")
    return ["-isystem", headers, '-DQF_VERSION="0"']


@functools.cache
def cuda_include() -> pathlib.Path:
    """The folder of cuda_runtime_api.h, as nvcc says: the nvcc on PATH may be a link or a script."""
    source = str(next(KERNELS.glob("*.cu")))
    dry_run = subprocess.run([str(NVCC), "--dryrun", "-c", source], capture_output=True, text=True, timeout=60)
    (top,) = [line.partition("=")[2] for line in dry_run.stderr.splitlines() if line.startswith("#$ TOP=")]
    return pathlib.Path(top, "include")


def symbols(path: pathlib.Path) -> list[tuple[str, str]]:
    """(type, name) of every symbol in an object, as nm gives them."""
    if not shutil.which("nm"):
        pytest.skip("no nm")
    listing = subprocess.run(["nm", "-P", str(path)], capture_output=True, text=True, check=True, timeout=60).stdout
    return [(fields[1], fields[0]) for fields in map(str.split, listing.splitlines())]


# -- directions of dependency ------------------------------------------------------------------------------------


def module_of(path: str) -> str:
    """The folder that a path relative to csrc belongs to: the deepest that MAY_INCLUDE knows."""
    folder = str(pathlib.PurePath(path).parent)
    return folder if folder in MAY_INCLUDE else folder.split("/")[0]


def resolve(including: pathlib.Path, included: str) -> str | None:
    """The module that an #include "..." leads to, or None if there is no such file."""
    if included in KERNEL_INTERFACES or (KERNELS / included).exists():
        return "kernels"
    if (CSRC / "include" / included).exists():
        return "include"
    return module_of(included) if (CSRC / included).exists() else None


def test_includes_point_one_way():
    wrong = []
    for path in C_SOURCES:
        module = module_of(str(path.relative_to(CSRC)))
        assert module in MAY_INCLUDE, f"csrc/{module} is not known to this test"
        for included in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
            target = resolve(path, included)
            if target is None:
                wrong.append(f"{name(path)} includes {included}, which is not a file of csrc")
            elif target != module and target not in MAY_INCLUDE[module]:
                wrong.append(f"{name(path)} ({module}) includes {included} ({target})")
            elif target == "kernels" and included not in KERNEL_INTERFACES:
                wrong.append(f"{name(path)} includes {included}, which is the kernels' own")
            elif target != module and ONLY_FROM.get(included, name(path)) != name(path):
                wrong.append(f"{name(path)} includes {included}, which is for {ONLY_FROM[included]} alone")
            elif module == "engine" and target.startswith("backend/") and included not in ONLY_FROM:
                wrong.append(f"{name(path)} includes {included}, which is that backend's own")
    assert not wrong, "\n".join(wrong)


def test_kernels_know_nothing_above_them():
    """csrc/base/status.h and themselves, with "x" meaning kernels/x or a file beside the one that includes it."""
    wrong = []
    for path in KERNEL_SOURCES:
        for included in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
            own = (KERNELS / included).exists() or (path.parent / included).exists()
            if not own and included != "base/status.h":
                wrong.append(f"{name(path)} includes {included}")
    assert not wrong, "\n".join(wrong)


def test_python_and_cuda_headers_stay_where_they_belong():
    wrong = []
    for path in [*C_SOURCES, *KERNEL_SOURCES]:
        for included in re.findall(r'^\s*#\s*include\s+[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE):
            if included in ("Python.h", "structmember.h") and not name(path).startswith("csrc/python/"):
                wrong.append(f"{name(path)} includes {included}")
            device = name(path).startswith(("kernels/", "csrc/backend/cuda/", "csrc/comm/"))
            if CUDA_HEADERS.search(included) and not device:
                wrong.append(f"{name(path)} includes {included}")
            if CUDA_HEADERS.search(included) and path.is_relative_to(CSRC) and included != "cuda_runtime_api.h":
                wrong.append(f"{name(path)} includes {included}; cuda_runtime_api.h is C")
    assert not wrong, "\n".join(wrong)


# -- what the C code may do --------------------------------------------------------------------------------------


# The tables of csrc/python that CPython's interface takes as pointers to non-const: by file, symbol and type.
CPYTHON_TABLES = {
    "engine.c": {
        "engine_methods": "PyMethodDef",
        "engine_getset": "PyGetSetDef",
        "engine_slots": "PyType_Slot",
        "qf_py_engine_spec": "PyType_Spec",
    },
    "functions.c": {"qf_py_functions": "PyMethodDef"},
    "layers.c": {
        "layers_methods": "PyMethodDef",
        "layers_slots": "PyType_Slot",
        "qf_py_layers_spec": "PyType_Spec",
    },
    "module.c": {"module_def": "PyModuleDef", "module_slots": "PyModuleDef_Slot"},
    "request.c": {
        "request_methods": "PyMethodDef",
        "request_getset": "PyGetSetDef",
        "request_slots": "PyType_Slot",
        "qf_py_request_spec": "PyType_Spec",
    },
}
CPYTHON_TYPES = {
    "PyModuleDef", "PyModuleDef_Slot", "PyMethodDef", "PyMemberDef", "PyGetSetDef", "PyType_Slot", "PyType_Spec",
}  # fmt: skip


@pytest.mark.parametrize("path", COMPILED, ids=name)
def test_no_mutable_state(path, compiled):
    allowed = CPYTHON_TABLES.get(path.name, {}) if path.parent == CSRC / "python" else {}
    state = [symbol for symbol in mutable_state(compiled(path)[0]) if symbol not in allowed]
    assert not state, f"{name(path)} has file-scope mutable state: {', '.join(state)}"
    missing = set(allowed) - {symbol for _, symbol in symbols(compiled(path)[0])}
    assert not missing, f"CPYTHON_TABLES lists what {name(path)} does not have: {', '.join(sorted(missing))}"


def test_the_tables_of_cpython_are_what_the_list_says():
    """Each entry is a table of that type, at file scope, and no code reaches into it."""
    for file, tables in CPYTHON_TABLES.items():
        code = code_of(CSRC / "python" / file)
        for symbol, kind in tables.items():
            assert kind in CPYTHON_TYPES
            definition = rf"^(static )?{kind} {symbol}(\[\])? = \{{"
            assert re.search(definition, code, re.MULTILINE), f"{file}: {kind} {symbol}"
    names = "|".join(symbol for tables in CPYTHON_TABLES.values() for symbol in tables)
    touched = rf"\b({names})\s*(\[[^\]]|\.|->)"  # `name[]` is its definition or declaration
    found = find_in_code([path for path in C_SOURCES if path.is_relative_to(CSRC / "python")], touched)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", [path for path in COMPILED if not path.is_relative_to(CSRC / "python")], ids=name)
def test_no_python_in_objects(path, compiled):
    target, _ = compiled(path)
    python = [symbol for kind, symbol in symbols(target) if kind == "U" and re.match(r"_?Py", symbol)]
    assert not python, f"{name(path)} calls Python: {', '.join(python)}"


def mutable_state(path: pathlib.Path) -> list[str]:
    """Symbols in .data, .bss and their thread-local kin. Constant tables of pointers are .data.rel.ro, which nm also
    calls "d": read-only once loaded."""
    state = [symbol for kind, symbol in symbols(path) if kind in "dDbBCsSgG"]
    return [symbol for symbol in state if not is_constant(path, symbol)]


def is_constant(path: pathlib.Path, symbol: str) -> bool:
    listing = subprocess.run(["objdump", "-t", str(path)], capture_output=True, text=True, check=True, timeout=60)
    sections = [line.split("\t")[0].split()[-1] for line in listing.stdout.splitlines() if line.endswith(f" {symbol}")]
    return bool(sections) and all(section.startswith((".data.rel.ro", ".rodata")) for section in sections)


def test_nothing_prints_exits_or_reads_the_environment():
    engine = [path for path in C_SOURCES if not path.is_relative_to(CSRC / "python")]
    found = find_in_code([*engine, *KERNEL_SOURCES], SIDE_EFFECTS)
    assert not found, "\n".join(found)


def test_kernels_have_no_state_and_no_memory():
    """The objects of nvcc hold state of its own, so the text is read: no variables at file scope or static ones that
    are not constant, no allocation, nothing of C++ beyond templates."""
    found = find_in_code(KERNEL_SOURCES, KERNEL_STATE) + find_in_code(KERNEL_SOURCES, KERNEL_ALLOCATIONS)
    assert not found, "\n".join(found)


def test_memory_comes_from_base_alloc():
    others = [path for path in C_SOURCES if path != CSRC / "base" / "alloc.c"]
    found = find_in_code([*others, *KERNEL_SOURCES], ALLOCATIONS)
    assert not found, "\n".join(found)


def test_these_checks_see_what_they_look_for(tmp_path, compiled):
    planted = tmp_path / "planted.c"
    planted.write_text(
        "#include <stdlib.h>\n"
        "/* malloc(1) in a comment */\n"
        'const char *text(void) { return "getenv(x)"; }\n'
        'static const char *const names[] = {"a", "b"};\n'
        "const char *pick(int i) { return names[i]; }\n"
        "static _Thread_local int per_thread;\n"
        "int count(void) { static int counter; return ++counter + ++per_thread; }\n"
        "void *bad(void) { if (getenv(text())) { abort(); } return malloc(1); }\n"
    )
    state = {symbol.split(".")[0] for symbol in mutable_state(compiled(planted)[0])}
    assert state == {"counter", "per_thread"}
    assert lines_of(planted, SIDE_EFFECTS) == [8, 8]
    assert lines_of(planted, ALLOCATIONS) == [8]


def test_the_checks_of_kernels_see_what_they_look_for(tmp_path):
    planted = tmp_path / "planted.cu"
    planted.write_text(
        "static int counter;\n"
        "__device__ float table[4] = {1.0f};\n"
        "static __device__ float scale = 1.0f;\n"
        "__constant__ int limits[2];\n"
        "static const int sizes[] = {1, 2};\n"
        "static constexpr int Stages = 4;\n"
        "__device__ const float half = 0.5f;\n"
        "static __device__ int add(int a, int b) { return a + b; }\n"
        "static __shared__ float staged[128];\n"
        "template <int N> __device__ __forceinline__ void run(float (&x)[N]) { x[0] = 0.0f; }\n"
        "static qf_status launch(void) { static int calls = 0; cudaMalloc(0, calls); return QF_OK; }\n"
    )
    assert lines_of(planted, KERNEL_STATE) == [1, 2, 3, 4, 11]
    assert lines_of(planted, KERNEL_ALLOCATIONS) == [11]


def test_no_fast_math():
    forbidden = r"#\s*pragma\s+(GCC\s+optimize|STDC\s+FP_CONTRACT\s+ON|clang\s+fp)|\boptimize\s*\(|fast[-_]math"
    found = find_in_code([*C_SOURCES, *KERNEL_SOURCES], forbidden)
    assert not found, "\n".join(found)


# -- compilers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", COMPILED, ids=name)
def test_no_warnings(path, compiled):
    _, warnings = compiled(path)
    assert not warnings, warnings


@pytest.fixture(scope="session")
def checked_for_aarch64(ahead):
    """{C file: the future of the cross compiler's run}."""
    command = ["aarch64-linux-gnu-gcc", *DIALECT, *WARNINGS, "-Werror", "-fsyntax-only"]
    return ahead(
        "checked_for_aarch64",
        "path",
        lambda path: subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=300),
    )


@pytest.mark.parametrize("path", PURE_C, ids=name)
def test_compiles_for_aarch64(path, checked_for_aarch64):
    """Nothing needs x86: its instructions are paths beside the portable one."""
    if not shutil.which("aarch64-linux-gnu-gcc"):
        pytest.skip("no aarch64-linux-gnu-gcc")
    run = checked_for_aarch64[path].result()
    assert run.returncode == 0, run.stderr


# -- sizes -------------------------------------------------------------------------------------------------------


def test_files_stay_small():
    too_long = []
    for path in [*C_SOURCES, *KERNEL_SOURCES, *sorted(PACKAGE.rglob("*.py"))]:
        lines = path.read_text().count("\n")
        limit = MAX_LINES.get(path.name) or MAX_LINES[path.relative_to(ROOT).parts[0]]
        if lines > limit:
            too_long.append(f"{name(path)} has {lines} lines; the limit is {limit}")
    assert not too_long, "\n".join(too_long)


# -- the Python package ------------------------------------------------------------------------------------------


def imported_modules(path: pathlib.Path) -> set[str]:
    """Full names of all that a Python file imports, anywhere in it; relative imports are made absolute."""
    package = list(path.relative_to(ROOT).with_suffix("").parts)[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def uses(modules: set[str], package: str) -> bool:
    return any(module == package or module.startswith(package + ".") for module in modules)


def test_no_torch_outside_quantize():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.is_relative_to(PACKAGE / "quantize"):
            continue
        modules = imported_modules(path)
        wrong += [f"{name(path)} imports {heavy}" for heavy in ("torch", "transformers") if uses(modules, heavy)]
    assert not wrong, "\n".join(wrong)


def test_python_imports_point_one_way():
    """ui -> server -> LLM, AsyncLLM -> _engine. The command line starts all of these, so it may import them."""
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        above = {"ui": set(), "server": {"ui"}}.get(relative.parts[0], {"ui", "server"})
        if relative.parts[0] in ("cli", "cli.py", "__main__.py"):
            continue
        modules = imported_modules(path)
        wrong += [f"{name(path)} imports qwen_fast.{layer}" for layer in above if uses(modules, f"qwen_fast.{layer}")]
        if relative.parts[0] in ("ui", "server") and uses(modules, "qwen_fast._engine"):
            wrong.append(f"{name(path)} imports qwen_fast._engine, which is for the API modules")
    assert not wrong, "\n".join(wrong)
