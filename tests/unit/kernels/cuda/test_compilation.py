"""Compile the kernels for several GPU architectures without a GPU; check registers, memory accesses and logarithms."""

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

NO_FEATURES = {f"{side}_HAS_{what}": False for side in ("STUDENT", "TEACHER") for what in ("BIAS", "SOFTCAP")}
ALL_FEATURES = dict.fromkeys(NO_FEATURES, True)
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
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, types, constexprs=constexprs, attrs=attributes)
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
        "loads per matrix": launch.block // (32 * 8 * launch.num_warps),  # of 16 bytes per thread
        "stack": int(re.search(r"STACK:(\\d+)", usage)[1]),
        "wide loads": len(re.findall(r"ld\\.global[.\\w:]*\\.v4\\.b32", ptx)),
        "narrow loads of logits": len(re.findall(r"ld\\.global[.\\w:]*\\.b16", ptx)),
        "wide stores": len(re.findall(r"st\\.global[.\\w:]*\\.v4\\.b32", ptx)),
        "logarithms": ptx.count("lg2.approx"),
        "roundings to nearest": ptx.count("cvt.rn.bf16"),
    }


results = {}
for capability in map(int, sys.argv[2].split(",")):
    for divergence in range(4):
        for groups in (False, True) if divergence == 0 else (False,):
            for features in (NO_FEATURES, ALL_FEATURES) if divergence == 3 else (NO_FEATURES,):
                kind = "groups" if groups else "full" if features is ALL_FEATURES else "plain"
                key = f"{capability} {divergence} {kind}"
                constants = {"HAS_TEACHER": True, "DIVERGENCE": divergence, "HAS_GROUPS": groups, "GROUP_SIZE": 32}
                kernel = row_statistics._statistics_kernel
                launch = row_statistics.JENSEN_SHANNON_LAUNCH if divergence == 3 else row_statistics.STATISTICS_LAUNCH
                constants |= {"BLOCK": launch.block, "STAGES": launch.stages, **features}
                results["statistics " + key] = compile_kernel(kernel, constants, launch, capability)
                if groups:
                    continue
                kernel, launch = logits_gradient._gradient_kernel, logits_gradient.GRADIENT_LAUNCH
                constants = {"DIVERGENCE": divergence, "BLOCK": launch.block, **features}
                results["gradient " + key] = compile_kernel(kernel, constants, launch, capability)
    launch = row_statistics.Launch(4096, 8)
    constants = {"HAS_BIAS": True, "HAS_SOFTCAP": True, "GROUP_SIZE": 32, "BLOCK": 1024}
    results[f"candidates {capability}"] = compile_kernel(top_k._candidates_kernel, constants, launch, capability)
    features = {f"{side}_HAS_{what}": True for side in ("TARGET", "OTHER") for what in ("BIAS", "SOFTCAP")}
    results[f"mix {capability}"] = compile_kernel(logits._mix_kernel, {"BLOCK": 4096, **features}, launch, capability)
print(json.dumps(results))
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_without_spills_and_with_16_byte_accesses(capability: int, tmp_path: object) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path), str(capability)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    results = json.loads(result.stdout)
    for name, usage in results.items():
        # The stack holds bytes of soft-cap and bias of both sides.
        assert usage["stack"] <= (64 if "full" in name else 0), (name, usage)
        assert usage["registers"] * usage["warps"] * 32 * 2 <= 65_536, (name, usage)  # two programs per multiprocessor
        loads = usage["loads per matrix"]
        if name.startswith(("statistics", "gradient")):
            # Two matrices; the entries of the sampled token are loaded one by one.
            assert usage["wide loads"] >= loads * (1 if name.startswith(f"gradient {capability} 0") else 2), (
                name,
                usage,
            )
            assert usage["narrow loads of logits"] <= 4, (name, usage)
        if name.startswith("gradient"):
            assert usage["wide stores"] == loads, (name, usage)
            # The interpreter rounds towards zero, the compiled kernel to nearest.
            assert usage["roundings to nearest"] >= 4 * loads, (name, usage)
        if f" {capability} 3 " in name:
            assert usage["logarithms"] >= 8 * usage["loads per matrix"], (name, usage)
