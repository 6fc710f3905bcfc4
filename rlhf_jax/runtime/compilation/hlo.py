"""Reading the text of a compiled program: its loops, its collectives, and what it moves in memory.

XLA's own cost analysis counts the body of a loop once, however often it runs, and does not tell of
collectives. Here each instruction counts as often as the loops around it run.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      name, shape, opcode: as printed; the shape with its layout, of a tuple in parentheses.
      operands: names of instructions of the same computation.
      value: what stands in the parentheses, the number of a constant or parameter.
      rest: the attributes.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    value: str
    rest: str


class Computation(NamedTuple):
    """Instructions by name, and which of them is the result."""

    instructions: dict[str, Instruction]
    root: str


class Module(NamedTuple):
    """A compiled program: computations by name, and the one that it starts with."""

    computations: dict[str, Computation]
    entry: str


class Executed(NamedTuple):
    """An instruction outside of fusions, the computation it stands in, and how often it runs."""

    instruction: Instruction
    computation: str
    times: int


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")


def parse(text: str) -> Module:
    """The module of `compiled.as_text()`.

    >>> text = "ENTRY %main (x: f32[2]) -> f32[2] {\\n  ROOT %x = f32[2]{0} parameter(0)\\n}"
    >>> module = parse(text)
    >>> module.entry, module.computations["main"].instructions["x"].opcode
    ('main', 'parameter')
    """
    computations: dict[str, Computation] = {}
    instructions: dict[str, Instruction] = {}
    entry = name = root = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name, root, instructions = header[2], "", {}
            entry = name if header[1] else entry
        elif line == "}" and name:
            computations[name], name = Computation(instructions, root), ""
        elif name and (found := _LINE.match(line)):
            instructions[found[2]] = _instruction(found[2], found[3])
            root = found[2] if found[1] else root
    return Module(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    shape, text = text[:end], text[end:].lstrip()
    opcode, _, _ = text.partition("(")
    end = _closing(text, len(opcode))
    inside = text[len(opcode) + 1 : end - 1]
    return Instruction(
        name, shape, opcode, tuple(re.findall(r"%([\w.\-]+)", inside)), inside, text[end:]
    )


def _closing(text: str, start: int) -> int:
    """The place behind the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place + 1
    raise ValueError(f"no closing parenthesis in {text[:80]!r}.")


def array_bytes(shape: str, *, in_hbm: bool = False) -> list[int]:
    """Bytes of each array of a shape, without what a layout adds as padding.

    Args:
      in_hbm: counts those that a TPU's compiler keeps in its memory on the chip, `S(1)` in the
        layout, as 0.

    >>> array_bytes("(bf16[2,3]{1,0:T(8,128)S(1)}, f32[], pred[5])")
    [12, 4, 5]
    """
    sizes = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int((re.findall(r"\d+", dtype) or ["0"])[0])
        count = math.prod(int(size) for size in dims.split(",") if size)
        away = in_hbm and re.search(r"S\([1-9]", layout)
        sizes.append(0 if away else count * bits // 8)
    return sizes


def called(instruction: Instruction, attribute: str) -> str:
    """The computation that an attribute such as `body` names; "" without it."""
    found = re.search(rf"\b{attribute}=%?([\w.\-]+)", instruction.rest)
    return found[1] if found else ""


def executed(module: Module, start: str = "", times: int = 1) -> Iterator[Executed]:
    """All instructions outside of fusions, each with how often it runs.

    A loop of which the count is not known counts once, one that may end before its bound as the
    bound, and of a condition each branch counts.
    """
    start = start or module.entry
    for instruction in module.computations[start].instructions.values():
        yield Executed(instruction, start, times)
        if instruction.opcode == "while":
            count = times * (trip_count(module, module.computations[start], instruction) or 1)
            for attribute in ("condition", "body"):
                yield from executed(module, called(instruction, attribute), count)
        elif instruction.opcode == "conditional":
            for branch in _branches(instruction):
                yield from executed(module, branch, times)
        elif instruction.opcode in ("call", "async-start"):
            inner = called(instruction, "to_apply") or called(instruction, "calls")
            yield from executed(module, inner, times)


def _branches(instruction: Instruction) -> list[str]:
    if listed := re.search(r"branch_computations=\{([^}]*)\}", instruction.rest):
        return [name.strip().lstrip("%") for name in listed[1].split(",")]
    return [called(instruction, f"{which}_computation") for which in ("true", "false")]


def trip_count(module: Module, around: Computation, loop: Instruction) -> int | None:
    """How often a loop runs at most; None where its text does not tell.

    Some backends print it. Elsewhere it is read off the condition, counter < bound, the first
    counter, and what the body adds to it.
    """
    if known := re.search(r'known_trip_count":\s*\{"n":\s*"(\d+)"', loop.rest):
        return int(known[1])
    found = _bound(module, module.computations[called(loop, "condition")])
    if found is None:
        return None
    bound, index = found
    first, step = 0, 1
    if index is not None:
        step = _step(module, module.computations[called(loop, "body")], index)
        carried = around.instructions[loop.operands[0]]
        if carried.opcode == "tuple":
            first = _constant(around, carried.operands[index]) or 0
    return max(0, -(-(bound - first) // step))


def _bound(module: Module, condition: Computation) -> tuple[int, int | None] | None:
    """(bound, index of the counter in what the loop carries) of a condition."""
    for name in condition.instructions:
        compare, place, given = _inside(module, condition, name)
        if compare.opcode != "compare" or "direction=LT" not in compare.rest:
            continue
        (counter, at), (limit, where) = (_outside(place, given, x) for x in compare.operands)
        bound = _constant(where, limit)
        if bound is None:
            continue
        source = at.instructions[counter]
        if source.opcode == "add":
            added, place = _outside(at, given, source.operands[1])
            bound -= _constant(place, added) or 0
            counter, at = _outside(at, given, source.operands[0])
            source = at.instructions[counter]
        return bound, _tuple_index(source)
    return None


def _step(module: Module, body: Computation, index: int) -> int:
    """What the body adds to an element of what it carries; 1 where that is not seen."""
    root = body.instructions[body.root]
    if root.opcode != "tuple":
        return 1
    added, place, given = _inside(module, body, root.operands[index])
    if added.opcode != "add":
        return 1
    found = (_outside(place, given, operand) for operand in added.operands)
    numbers = [_constant(where, operand) for operand, where in found]
    return next((number for number in numbers if number), 1)


_Given = tuple[Instruction, Computation] | None


def _inside(
    module: Module, place: Computation, name: str
) -> tuple[Instruction, Computation, _Given]:
    """An instruction and where it stands; of a fusion its result, and the fusion and its place."""
    instruction = place.instructions[name]
    if instruction.opcode != "fusion":
        return instruction, place, None
    inner = module.computations[called(instruction, "calls")]
    return inner.instructions[inner.root], inner, (instruction, place)


def _outside(place: Computation, given: _Given, name: str) -> tuple[str, Computation]:
    """A name and where it stands; of a parameter of a fusion, what the fusion is given for it."""
    instruction = place.instructions[name]
    if given is None or place is given[1] or instruction.opcode != "parameter":
        return name, place
    return given[0].operands[int(instruction.value)], given[1]


def _constant(computation: Computation, name: str) -> int | None:
    instruction = computation.instructions[name]
    if instruction.opcode in ("copy", "bitcast", "convert"):
        return _constant(computation, instruction.operands[0])
    is_number = instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.value)
    return int(instruction.value) if is_number else None


def _tuple_index(instruction: Instruction) -> int | None:
    found = re.search(r"index=(\d+)", instruction.rest)
    return int(found[1]) if instruction.opcode == "get-tuple-element" and found else None
