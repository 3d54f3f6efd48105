"""Compiles Triton kernels for GPUs that are not there, and reads what the compiler made of them."""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile


TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
INTEGERS = ("length", "channels", "state_size", "segments", "chunks")
SPECIAL = "MUFU"  # exponentials, reciprocals and the like go to a unit of their own


class Made(NamedTuple):
    """A compiled kernel."""

    registers: int
    local: int  # bytes of memory for what fits into no register, and for stacks
    shared: int  # bytes
    accesses: set[str]  # to memory, in PTX
    loops: list[Counter[str]]  # instructions of each innermost loop, by name


def compiled(kernel: Any, sm: int, constants: dict[str, Any], types: dict[str, str], **options: Any) -> Made:
    """A kernel for one GPU, its pointers and the number of channels divisible by 16, as they are in layers."""
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in INTEGERS:
            signature[name] = "i32"
        else:
            signature[name] = types.get(name, "*fp32")
        if signature[name].startswith("*") or name == "channels":
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    made = compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    accesses = set(re.findall(r"(?:ld|st)\.(?:global|shared|local)[.\w]*", made.asm["ptx"]))
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    return Made(found["REG"], found["STACK"] + found["LOCAL"], made.metadata.shared, accesses, inner_loops(code))


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def inner_loops(code: str) -> list[Counter[str]]:
    """The instructions between a label and a branch back to it, where no other loop is inside."""
    lines = [line.strip() for line in code.splitlines()]
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"\.L_x_\d+:", line)}
    loops = []
    for i, line in enumerate(lines):
        branch = re.search(r"BRA\S*\s+(?:\S+,\s*)?`\((\.L_x_\d+)\)", line)
        if branch and labels.get(branch[1], i) < i:
            loops.append((labels[branch[1]], i))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    names = re.compile(r"(?:/\*\w+\*/\s+)?(?:@!?\w+\s+)?([A-Z][A-Z0-9_]+)")
    return [Counter(found[1] for line in lines[a : b + 1] if (found := names.match(line))) for a, b in inner]
