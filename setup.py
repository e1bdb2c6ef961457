"""Builds qwen_fast._engine: the C engine and its binding, in one extension module.

Everything else about the package is in pyproject.toml. The CUDA backend is added where its sources and nvcc are
there; these variables steer the build (none of them is read at run time):

    QF_WITHOUT_CUDA=1       leave the CUDA backend out
    QF_CUDA_ARCHS=80,90     GPU generations to compile for, as compute capabilities without the point; left out, those of
                            the GPUs that nvidia-smi shows here, or, where it shows none, 80,90
                            (code for 8.0 runs on 8.6 and 8.9 too)
    CUDA_HOME=/usr/local/cuda
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import pathlib
import re
import shutil
import subprocess

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

ROOT = pathlib.Path(__file__).resolve().parent
C_FOLDERS = ["base", "model", "kv", "sched", "sample", "backend", "backend/cpu", "comm", "engine", "python"]
C_FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O3", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"]
C_FLAGS += ["-ffp-contract=off", "-fno-math-errno"]  # the same sums on every compiler
C_FLAGS += ["-g0"]  # Python's own flags ask for debugging symbols, which would be most of the wheel
LINK_FLAGS = ["-pthread", "-Wl,--exclude-libs,ALL", "-Wl,-z,relro,-z,now"]
CUDA_ARCHS = ["80", "90"]
# Statics without guards: those of nvcc's launch stubs hold one address each, and the guards would need libstdc++.
HOST_FLAGS = "-fPIC,-fvisibility=hidden,-fno-exceptions,-fno-threadsafe-statics,-Wall"
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", HOST_FLAGS]


def sources(*patterns: str) -> list[str]:
    """Files by pattern, relative to the repository as setuptools wants them, in a fixed order."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)


def cuda_home(nvcc: str, source: str) -> pathlib.Path:
    """Where nvcc's headers and libraries are, as it says itself: the nvcc on PATH may be a link or a script."""
    dry_run = subprocess.run([nvcc, "--dryrun", "-c", source], capture_output=True, text=True, check=False)
    tops = [line.partition("=")[2] for line in dry_run.stderr.splitlines() if line.startswith("#$ TOP=")]
    if not tops:
        raise PlatformError(f"{nvcc} --dryrun does not say where CUDA is: {dry_run.stderr.strip()[:500]!r}")
    return pathlib.Path(tops[0]).resolve()


def cuda_archs() -> list[str]:
    """Compute capabilities to compile for, without the point, the oldest first."""
    asked = os.environ.get("QF_CUDA_ARCHS", "").strip()
    names = re.split(r"[;,\s]+", asked) if asked else present_archs() or CUDA_ARCHS
    wrong = [name for name in names if not re.fullmatch(r"[89]\d|1\d\d", name)]
    if wrong:
        raise PlatformError(f"QF_CUDA_ARCHS={asked}: {wrong[0]!r} is none of 80, 86, 89, 90, ...")
    return sorted(set(names), key=int)


def present_archs() -> list[str]:
    """The compute capabilities, from 8.0 on, of the GPUs that nvidia-smi shows; empty where it shows none."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError):
        return []
    found = re.findall(r"^(\d+)\.(\d)$", shown.stdout, re.MULTILINE) if shown.returncode == 0 else []
    return [major + minor for major, minor in found if int(major) >= 8]


def arch_flags(names: list[str]) -> list[str]:
    """Machine code for each generation, Hopper's with what only Hopper has (90a), and PTX for those to come: it must
    do without that, so it is of plain 90, or, where 90 is not asked for, of the newest."""
    features = [f"{name}a" if name == "90" else name for name in names]
    ptx = "90" if "90" in names else names[-1]
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in features]
    return [*flags, f"-gencode=arch=compute_{ptx},code=compute_{ptx}"]


def own_flags(source: str) -> list[str]:
    """Flags that a .cu file asks for in its first comment lines: /* nvcc: --fmad=false */"""
    found = re.search(r"^/\* nvcc: (.*) \*/$", pathlib.Path(ROOT, source).read_text(), re.MULTILINE)
    return found[1].split() if found else []


class BuildEngine(build_ext):
    """build_ext that compiles in parallel, only what has changed, and .cu files with nvcc."""

    def build_extensions(self) -> None:
        self.check_tools()
        (extension,) = self.extensions
        extension.define_macros.append(("QF_VERSION", f'"{self.distribution.get_version()}"'))
        self.archs: list[str] = []
        self.nvcc = self.add_cuda(extension)
        # Objects are kept for the next build; those of other flags are others.
        flags = [self.compiler.compiler_so, extension.define_macros, self.include_dirs, self.nvcc, self.archs]
        key = hashlib.sha256(repr(flags).encode()).hexdigest()[:12]
        self.build_temp = os.path.join(self.build_temp, key)
        kernel_headers = sources("kernels/**/*.h", "kernels/**/*.cuh")
        self.headers = {
            ".c": [*extension.depends, *sources("csrc/**/*.h"), *kernel_headers],
            ".cu": [*extension.depends, *sources("csrc/base/*.h"), *kernel_headers],  # see tests/test_repo.py
        }
        super().build_extensions()

    def check_tools(self) -> None:
        """A message that says what to install, in place of the compiler's own."""
        command = self.compiler.compiler_so[0]
        if shutil.which(command) is None:
            raise PlatformError(
                f"no C compiler: {command!r} was not found. On Debian and Ubuntu: apt install build-essential "
                "(or set CC to the compiler's path)"
            )
        folders = [*self.include_dirs, *self.compiler.include_dirs]
        if not any(pathlib.Path(folder, "Python.h").is_file() for folder in folders):
            raise PlatformError(
                f"Python.h was not found in {', '.join(folders)}. On Debian and Ubuntu: apt install python3-dev"
            )

    def add_cuda(self, extension: Extension) -> str | None:
        """Adds the CUDA backend to the extension and returns nvcc, or says why it is left out."""
        kernels, host = sources("kernels/*.cu"), sources("csrc/backend/cuda/*.c")
        nvcc = find_nvcc()
        if os.environ.get("QF_WITHOUT_CUDA") == "1":
            reason = "QF_WITHOUT_CUDA=1"
        elif not kernels or not host:
            reason = "no CUDA sources here"
        elif nvcc is None:
            reason = "nvcc was not found on PATH or in CUDA_HOME"
        else:
            home = cuda_home(nvcc, kernels[0])
            self.archs = cuda_archs()
            extension.sources += [*host, *kernels]
            extension.define_macros += [("QF_WITH_CUDA", "1"), ("QF_CUDA_ARCHS", f'"{",".join(self.archs)}"')]
            extension.include_dirs += ["kernels", str(home / "include")]
            extension.library_dirs += [str(home / "lib64"), str(home / "lib")]
            extension.libraries += ["cudart_static", "dl", "rt"]
            return nvcc
        print(f"qwen_fast: building the CPU backend only ({reason})")
        return None

    def build_extension(self, extension: Extension) -> None:
        with concurrent.futures.ThreadPoolExecutor(self.parallel or os.cpu_count() or 2) as pool:
            objects = list(pool.map(lambda source: self.compile_one(source, extension), extension.sources))
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(extension.name),
            libraries=self.get_libraries(extension),
            library_dirs=extension.library_dirs,
            extra_postargs=extension.extra_link_args,
            build_temp=self.build_temp,
        )

    def compile_one(self, source: str, extension: Extension) -> str:
        """The object file of one source, compiled unless it is newer than all that it may depend on."""
        target = pathlib.Path(self.build_temp, source).with_suffix(".o")
        headers = self.headers[pathlib.PurePath(source).suffix]
        inputs = [pathlib.Path(ROOT, path).stat().st_mtime for path in [source, *headers]]
        if not self.force and target.exists() and target.stat().st_mtime > max(inputs):
            return str(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.endswith(".cu"):
            self.compile_cuda(source, target, extension)
        else:
            self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=extension.define_macros,
                include_dirs=extension.include_dirs,
                extra_postargs=extension.extra_compile_args,
            )
        return str(target)

    def compile_cuda(self, source: str, target: pathlib.Path, extension: Extension) -> None:
        includes = [f"-I{folder}" for folder in extension.include_dirs]
        flags = [*NVCC_FLAGS, *own_flags(source), *arch_flags(self.archs), *includes]
        command = [str(self.nvcc), *flags, "-c", source, "-o", str(target)]
        print(" ".join(command), flush=True)
        if subprocess.run(command, check=False).returncode != 0:
            raise CompileError(f"nvcc failed on {source}")


setup(
    ext_modules=[
        Extension(
            "qwen_fast._engine",
            sources=sources(*(f"csrc/{folder}/*.c" for folder in C_FOLDERS)),
            include_dirs=["csrc", "csrc/include"],
            depends=["setup.py", "pyproject.toml"],
            libraries=["m"],
            extra_compile_args=C_FLAGS,
            extra_link_args=LINK_FLAGS,
        )
    ],
    cmdclass={"build_ext": BuildEngine},
)
