"""Every Triton kernel of the project, built for GPUs that are not here.

Triton compiles to PTX without a GPU, and the ptxas that it brings says what the kernel takes on the
device. That catches, on any Linux machine, what would otherwise show as a slow or failing launch on a
rented one. A module of kernels/ that holds Triton kernels exports `builds(major)`, which yields for a
compute capability (kernel, types of its arguments, constants, options, which tensor cores it must use).

Run as a script it prints the figures: python tests/test_kernels_compile.py 90
"""

import importlib
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes per block
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async"}


def triton_modules():
    """Names of the modules of kernels/ that import triton: those, and no others, can hold kernels."""
    names = (module.name for module in pkgutil.iter_modules([str(ROOT / "kernels")]))
    imports = re.compile(r"^import triton\b", re.MULTILINE)
    return [name for name in names if imports.search((ROOT / f"kernels/{name}.py").read_text())]


def unlisted(module, listed):
    """Names of the module's own jitted functions that are neither in its `builds` nor called by another."""
    from triton.runtime.jit import JITFunction

    found = {name: value for name, value in vars(module).items() if isinstance(value, JITFunction)}
    own = {name for name in found if found[name].__module__ == module.__name__}
    calls = {n for n in own for other in own - {n} if re.search(rf"\b{n}\(", found[other].src)}
    return sorted(own - calls - listed)


def resources(kernel, types, constants, options, capability):
    """Compiles one kernel -> registers, bytes spilled, bytes of shared memory, and its PTX."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    names = [name for name in kernel.arg_names if name not in constants]
    given = dict(zip(names, types, strict=True))
    signature = {n: given[n].removesuffix(":16") if n in given else "constexpr" for n in kernel.arg_names}
    index = kernel.arg_names.index
    aligned = [name for name, kind in given.items() if kind[0] == "*" or kind.endswith(":16")]
    source = ASTSource(
        kernel,
        signature,
        {(index(name),): value for name, value in constants.items()},
        {(index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = built.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        target = re.search(r"\.target (\w+)", ptx)[1]
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={target}", file.name]
        log = subprocess.run([*command, "-o", os.devnull], check=True, capture_output=True, text=True)
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", log.stderr)
    return {
        "registers": int(re.search(r"Used (\d+) reg", log.stderr)[1]),
        "spilled": sum(map(int, spilled)),
        "shared": built.metadata.shared,
        "serialized": "serialized" in log.stderr,  # ptxas gave up on asynchronous tensor cores
    }, ptx


def survey(capability):
    """-> one row for every build of every kernel, and the names of kernels that no build covers."""
    rows, missing = [], []
    for name in triton_modules():
        module = importlib.import_module(f"kernels.{name}")
        builds = list(module.builds(capability // 10)) if hasattr(module, "builds") else []
        missing += unlisted(module, {build[0].__name__ for build in builds})
        for kernel, types, constants, options, matmul in builds:
            figures, ptx = resources(kernel, types, constants, options, capability)
            descriptors = any(kind.startswith("tensordesc") for kind in types)
            label = f"{name}.{kernel.__name__}({types[0]})"
            rows.append(
                {
                    "kernel": label,
                    **figures,
                    "tensor_cores": (TENSOR_CORES[capability if matmul == "wide" else 80] in ptx)
                    if matmul
                    else None,
                    "copy_engine": "cp.async.bulk.tensor" in ptx if descriptors else None,
                }
            )
    return {"rows": rows, "missing": missing}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_fits_the_device(capability):
    """Fails when a kernel spills, takes too much shared memory, misses the tensor cores, or is unlisted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(capability)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["missing"] == [], "kernels that no build covers"
    assert any("_score_kernel" in row["kernel"] for row in result["rows"])
    for row in result["rows"]:
        assert row["spilled"] == 0, row
        assert not row["serialized"], row
        assert row["shared"] <= SHARED_LIMIT[capability], row
        assert row["tensor_cores"] is not False, row
        assert row["copy_engine"] is not False or capability < 90, row


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    print(json.dumps(survey(int(sys.argv[1])), indent=1))
