"""The kernels compiled for GPUs that need not be there: registers, width of memory accesses, logarithm."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="has no wheel for this system")

CODE = """
import json, re, subprocess, sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sdpo.kernels.cuda import logits, logits_gradient, row_statistics, top_k

PLAIN = {f"{side}_HAS_{what}": False for side in ("STUDENT", "TEACHER") for what in ("BIAS", "SOFTCAP")}
FULL = dict.fromkeys(PLAIN, True)
POINTERS = {
    **dict.fromkeys(("student", "teacher", "student_bias", "teacher_bias", "bias"), "*bf16"),
    **dict.fromkeys(("target", "other", "target_bias", "other_bias"), "*bf16"),
    **dict.fromkeys(("sampled_ids", "groups"), "*i64"),
    **dict.fromkeys(("statistics", "group_maxima", "coefficients", "candidates"), "*fp32"),
}
INTEGERS = {"num_rows", "num_groups", "vocab_size"}


def compile_kernel(kernel, constants, launch, capability):
    types, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
            continue
        is_integer = name in INTEGERS or name.endswith("_stride")
        types[name] = POINTERS.get(name, "i32" if is_integer else "fp32")
        if name in POINTERS or name == "vocab_size" or name.endswith("_stride"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, types, constexprs=places, attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": launch.num_warps})
    cubin = Path(sys.argv[1]) / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    ptx = compiled.asm["ptx"]
    return {
        "registers": int(re.search(r"REG:(\\d+)", usage)[1]),
        "warps": launch.num_warps,
        "loads of a matrix": launch.block // (32 * 8 * launch.num_warps),  # of 16 bytes, by a thread
        "stack": int(re.search(r"STACK:(\\d+)", usage)[1]),
        "wide loads": len(re.findall(r"ld\\.global[.\\w:]*\\.v4\\.b32", ptx)),
        "narrow loads of logits": len(re.findall(r"ld\\.global[.\\w:]*\\.b16", ptx)),
        "wide stores": len(re.findall(r"st\\.global[.\\w:]*\\.v4\\.b32", ptx)),
        "logarithms": ptx.count("lg2.approx"),
        "roundings to nearest": ptx.count("cvt.rn.bf16"),
    }


found = {}
for capability in map(int, sys.argv[2].split(",")):
    for divergence in range(4):
        for groups in (False, True) if divergence == 0 else (False,):
            for features in (PLAIN, FULL) if divergence == 3 else (PLAIN,):
                kind = "groups" if groups else "full" if features is FULL else "plain"
                key = f"{capability} {divergence} {kind}"
                constants = {"HAS_TEACHER": True, "DIVERGENCE": divergence, "HAS_GROUPS": groups, "GROUP_SIZE": 32}
                kernel = row_statistics._statistics_kernel
                launch = row_statistics.JENSEN_SHANNON_LAUNCH if divergence == 3 else row_statistics.STATISTICS_LAUNCH
                constants |= {"BLOCK": launch.block, "STAGES": launch.stages, **features}
                found["statistics " + key] = compile_kernel(kernel, constants, launch, capability)
                if groups:
                    continue
                kernel, launch = logits_gradient._gradient_kernel, logits_gradient.GRADIENT_LAUNCH
                constants = {"DIVERGENCE": divergence, "BLOCK": launch.block, **features}
                found["gradient " + key] = compile_kernel(kernel, constants, launch, capability)
    launch = row_statistics.Launch(4096, 8)
    constants = {"HAS_BIAS": True, "HAS_SOFTCAP": True, "GROUP_SIZE": 32, "BLOCK": 1024}
    found[f"candidates {capability}"] = compile_kernel(top_k._candidates_kernel, constants, launch, capability)
    features = {f"{side}_HAS_{what}": True for side in ("TARGET", "OTHER") for what in ("BIAS", "SOFTCAP")}
    found[f"mix {capability}"] = compile_kernel(logits._mix_kernel, {"BLOCK": 4096, **features}, launch, capability)
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_without_spills_and_move_sixteen_bytes_at_a_time(capability: int, tmp_path: object) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path), str(capability)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout)
    for name, usage in found.items():
        assert usage["stack"] <= (64 if "full" in name else 0), (name, usage)  # bytes: soft-cap and bias on both sides
        assert usage["registers"] * usage["warps"] * 32 * 2 <= 65_536, (name, usage)  # two programs on a multiprocessor
        loads = usage["loads of a matrix"]
        if name.startswith(("statistics", "gradient")):
            # Two matrices; the sampled token's entries are single.
            assert usage["wide loads"] >= loads * (1 if name.startswith(f"gradient {capability} 0") else 2), (
                name,
                usage,
            )
            assert usage["narrow loads of logits"] <= 4, (name, usage)
        if name.startswith("gradient"):
            assert usage["wide stores"] == loads, (name, usage)
            # The interpreter rounds towards zero instead.
            assert usage["roundings to nearest"] >= 4 * loads, (name, usage)
        if f" {capability} 3 " in name:
            assert usage["logarithms"] >= 8 * usage["loads of a matrix"], (name, usage)
