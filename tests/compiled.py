"""Compile the kernels for a GPU that needn't be there, and print what they use: a line of JSON each.

Usage: python compiled.py ARCHITECTURE FORMS PIXELS:SIZE ... (80: A100, 90: H100; the first so many of FORMS).
Shapes are the norm's; sums come along for a few.
Not in the process of the tests, whose kernels are interpreted.
"""

import json
import re
import subprocess
import sys
import tempfile
from itertools import product

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ebdiff.nets import kernels

FORMS = [  # shift, dropout, SiLU
    (True, True, True),  # norm2: the others are parts of it
    (True, False, True),  # ... without dropout
    (False, False, True),  # norm1 and norm_out
    (False, False, False),  # attention's
]
WHOLE = [{"SUM": True, "WRITE": True}]
PARTED = [{"SUM": True, "WRITE": False}, {"SUM": False, "WRITE": True}]
SUMS = ["add_kernel", "sum_kernel"]


def compiled(name, pixels, size, dtype, form, phases, architecture):
    """The kernel as `kernels` launches it for channels that are a multiple of 16."""
    kernel, shift, dropout = getattr(kernels, name), form[0], form[1]
    plan = kernels.plan(pixels, size)
    options = {"num_warps": plan.pop("num_warps")}
    if kernel is kernels.backward_kernel:
        options["maxnreg"] = kernels.REGISTERS
    fixed = {"EPS": 1e-6, "SILU": form[2], "GONE": kernels.gone(0.1), **phases, **plan}
    fixed |= {} if shift else {"shift": None, "apart": 0}
    fixed |= {} if dropout else {"seed": None}
    types = dict.fromkeys(("x", "dx", "y", "dy", "around", "shift", "dshift"), f"*{dtype}")
    types |= {"seed": "*i64", "pixels": "i32", "channels": "i32", "apart": "i32"}
    return built(kernel, types, fixed, options, architecture, [] if pixels % 16 == 0 else ["pixels"])


def compiled_sum(name, columns, dtype, residual, architecture):
    """As `kernels.add` and `kernels.channel_sums` launch it for rows that are a multiple of 16."""
    widest = min(kernels.WIDEST, triton.next_power_of_2(columns))
    fixed = {"ROWS": kernels.PIXELS, "COLUMNS": widest, **({} if residual else {"x": None})}
    types = dict.fromkeys(("h", "x", "y", "bias"), f"*{dtype}") | {"rows": "i32", "columns": "i32"}
    odd = [] if columns % 16 == 0 else ["columns"]
    return built(getattr(kernels, name), types, fixed, {"num_warps": 8}, architecture, odd)


def built(kernel, types, fixed, options, architecture, odd):
    """A kernel for arguments of these types, fp32 tensors otherwise; all but the odd ones divide by 16."""
    signature = {n: "constexpr" if n in fixed else types.get(n, "*fp32") for n in kernel.arg_names}
    constants = {n: v for n, v in fixed.items() if n in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(kernel.arg_names)
        if n not in fixed and n not in odd
    }
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(ASTSource(kernel, signature, constants, aligned), target=target, options=options)


def resources(cubin):
    """Registers per thread and bytes of its stack, which holds what spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(re.search(rf"{key}:(\d+)", told)[1]) for key in ("REG", "STACK")}


def report(kernel, **what):
    used = {"shared": kernel.metadata.shared, **resources(kernel.asm["cubin"])}
    print(json.dumps(what | used), flush=True)


def main(architecture, forms, *shapes):
    architecture, dtypes = int(architecture), ("bf16", "fp32")
    names = ("forward_kernel", "backward_kernel")
    for shape, name, dtype, form in product(shapes, names, dtypes, FORMS[: int(forms)]):
        pixels, size = map(int, shape.split(":"))
        for phases in WHOLE if kernels.plan(pixels, size)["PARTS"] == 1 else PARTED:
            kernel = compiled(name, pixels, size, dtype, form, phases, architecture)
            report(kernel, name=name, shape=shape, dtype=dtype, form=form, **phases)
    for name, dtype, columns, residual in product(SUMS, dtypes, (3, 96), (True, False)):
        if residual or name == "add_kernel":
            kernel = compiled_sum(name, columns, dtype, residual, architecture)
            report(kernel, name=name, shape=columns, dtype=dtype, residual=residual)


if __name__ == "__main__":
    main(*sys.argv[1:])
