"""How many bytes a compiled program reads and writes in the device's memory."""

from rlhf_jax.runtime.compilation.collectives import KINDS
from rlhf_jax.runtime.compilation.hlo import (
    Computation,
    Instruction,
    Module,
    array_bytes,
    called,
    executed,
)

# Names for what is there, and the ends of what was counted where it began.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "partition-id",
    "replica-id",
    "after-all",
    "opt-barrier",
    "async-start",
    "async-update",
    "iota",
}
_SLICES = ("slice", "dynamic-slice", "gather")


def bytes_moved(module: Module) -> int:
    """Bytes that one device reads and writes in a run of the program, loops counted in full.

    Each instruction reads its operands and writes its result, a fusion as one instruction; what is
    cut out of an operand, or written into it, counts alone. What a TPU keeps in its memory on the
    chip costs nothing.
    """
    return sum(
        times * _moved(module, module.computations[name], instruction)
        for instruction, name, times in executed(module)
        if instruction.opcode not in _FREE and not instruction.opcode.endswith("-done")
    )


def _moved(module: Module, place: Computation, instruction: Instruction) -> int:
    if instruction.opcode.endswith("-start"):  # operands and results, by their places in memory
        return sum(array_bytes(instruction.shape, in_hbm=True))
    read = sum(
        min(_size(place.instructions[name]), _read(module, place, name, instruction))
        for name in dict.fromkeys(instruction.operands)
    )
    return read + _written(module, place, instruction)


def _size(instruction: Instruction) -> int:
    return sum(array_bytes(instruction.shape, in_hbm=True))


def _all(instruction: Instruction) -> int:
    return sum(array_bytes(instruction.shape))


def _read(module: Module, place: Computation, name: str, user: Instruction) -> int:
    """Bytes of the value `name` that one of its users reads."""
    if user.opcode in _SLICES and user.operands[0] == name:
        return _all(user)
    if user.opcode == "dynamic-update-slice" and user.operands[0] == name:
        return 0
    if user.opcode == "fusion":
        inner = module.computations[called(user, "calls")]
        return sum(
            _read_inside(module, inner, _parameter(inner, number))
            for number, operand in enumerate(user.operands)
            if operand == name
        )
    return _all(place.instructions[name])


def _read_inside(module: Module, place: Computation, name: str) -> int:
    """Bytes of a parameter of a fusion that it reads: of all its users together."""
    total = 0
    for user in place.instructions.values():
        # A collective that is under way is handed from fusion to fusion, and moves nothing there.
        if name in user.operands and user.opcode not in ("tuple", *KINDS):
            follows = user.opcode in ("bitcast", "reshape")
            total += (
                _read_inside(module, place, user.name)
                if follows
                else _read(module, place, name, user)
            )
    return min(total, _all(place.instructions[name]))


def _parameter(computation: Computation, number: int) -> str:
    return next(
        each.name
        for each in computation.instructions.values()
        if each.opcode == "parameter" and each.value == str(number)
    )


def _written(module: Module, place: Computation, instruction: Instruction) -> int:
    """Bytes of a result; where a part of an operand is written over, of that part."""
    if instruction.opcode == "dynamic-update-slice":
        return min(_size(instruction), _all(place.instructions[instruction.operands[1]]))
    if instruction.opcode != "fusion":
        return _size(instruction)
    inner = module.computations[called(instruction, "calls")]
    root = inner.instructions[inner.root]
    names = root.operands if root.opcode == "tuple" else (root.name,)
    sizes = array_bytes(instruction.shape, in_hbm=True)
    if len(sizes) != len(names):
        return sum(sizes)
    return sum(
        min(size, _made(module, inner, name)) for size, name in zip(sizes, names, strict=True)
    )


def _made(module: Module, place: Computation, name: str) -> int:
    instruction = place.instructions[name]
    if instruction.opcode in ("bitcast", "reshape"):
        return _made(module, place, instruction.operands[0])
    if instruction.opcode == "dynamic-update-slice":
        return _all(place.instructions[instruction.operands[1]])
    if instruction.opcode == "fusion":
        return _written(module, place, instruction)
    return 0 if instruction.opcode in ("parameter", *KINDS) else _all(instruction)
