"""Modules of the pipeline with a line of their source changed: to see whether a test would notice."""

from types import ModuleType


def mutated(module: ModuleType, line: str, by: str) -> ModuleType:
    """A copy of a module with `by` in place of a part of its source that occurs once."""
    with open(module.__file__) as file:
        source = file.read()
    assert source.count(line) == 1, f"{line!r} occurs {source.count(line)} times in {module.__file__}"
    copy = ModuleType(module.__name__)
    copy.__file__ = module.__file__
    exec(compile(source.replace(line, by), module.__file__, "exec"), copy.__dict__)
    return copy
